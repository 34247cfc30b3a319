"""The row about conversations: `millstream pack --chat` beside what makes their ids and masks today."""

import hashlib
import json
import shutil
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from bench import corpus, measure
from bench.contenders import HERE, Contender, Cost, Plan, alternate, ids_on_disk, pack_command
from bench.measure import Failed
from bench.rows import PER_SECOND, Row, could_not, millions, spread

TARGET = 4
LETTERS = 1_500
"""In a message at most."""
TURNS = 6
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: "
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content + '\\n' }}{% endif %}{% endfor %}"
)


def written(plan: Plan) -> Path:
    """The subset of the corpus as conversations: each document's text cut into messages that take turns."""
    text = corpus.subset(plan.mixed, plan.folder, plan.subset_mb)
    path = text.with_name(f"{text.stem}-chats.jsonl")
    if not path.exists():
        partly = path.with_suffix(".partial")
        with open(text, encoding="utf-8") as documents, open(partly, "w", encoding="utf-8") as file:
            for line in documents:
                whole = json.loads(line)["text"].strip() + "."
                parts = [whole[at : at + LETTERS] for at in range(0, len(whole), LETTERS)]
                for first in range(0, len(parts), TURNS):
                    messages = [
                        {"role": ("user", "assistant")[number % 2], "content": part.strip() or "."}
                        for number, part in enumerate(parts[first : first + TURNS])
                    ]
                    file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        partly.replace(path)
    return path


def tokenizer(plan: Plan) -> Path:
    """GPT-2 as a folder with a chat template."""
    folder = plan.folder / "chat-tokenizer"
    folder.mkdir(exist_ok=True)
    shutil.copy(plan.tokenizer, folder / "tokenizer.json")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def ours(plan: Plan, source: Path, folder: Path) -> Cost:
    """The whole command, and the ids and masks that it wrote."""
    shutil.rmtree(plan.packed, ignore_errors=True)
    try:
        done = measure.run(pack_command(plan, str(source), "--tokenizer", str(folder), "--chat", "--workers", "1"))
        count, ids = ids_on_disk(plan.packed)
        masks = hashlib.sha256()
        for path in [*sorted(plan.packed.glob("loss-*.npy")), *plan.packed.glob("remainder-loss.npy")]:
            masks.update(np.load(path).tobytes())
        return Cost(done.cpu, done.wall, count, ids + masks.hexdigest())
    finally:
        shutil.rmtree(plan.packed, ignore_errors=True)


def theirs(plan: Plan, source: Path, folder: Path) -> Cost:
    alone = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    try:
        command = [plan.rivals, str(HERE / "rivals" / "chat_template.py"), str(source), str(folder)]
        done = measure.run(command, env=alone)
    except FileNotFoundError:
        raise Failed("its environment is missing: make bench-env") from None
    told = json.loads(done.output.splitlines()[-1])
    return Cost(done.cpu, done.wall, told["ids"], told["sha256"])


def chat_row(plan: Plan) -> Row:
    """Ids per CPU second, start included, and that both make the same ids and masks."""
    what = (
        "`millstream pack --chat`, one worker, over transformers' `apply_chat_template` with its mask: "
        f"conversations of {plan.subset_mb} MB of text, start included"
    )
    target = f"at least {TARGET} times"
    source, folder = written(plan), tokenizer(plan)
    runs: dict[str, Contender] = {
        "millstream pack --chat": partial(ours, plan, source, folder),
        "apply_chat_template": partial(theirs, plan, source, folder),
    }
    mine, other = alternate(runs, plan.rival_repeats).values()
    for costs in (mine, other):
        if isinstance(costs, Failed):
            return Row(what, target, could_not(costs), plan.judged(False))
    assert not isinstance(mine, Failed)
    assert not isinstance(other, Failed)
    if {cost.sha256 for cost in mine} != {cost.sha256 for cost in other}:
        return Row(what, target, could_not(Failed("the ids or masks differ")), plan.judged(False))
    ratios = [a.rate / b.rate for a, b in zip(mine, other, strict=True)]
    rates = [millions([cost.rate for cost in costs]) for costs in (mine, other)]
    measured = f"{spread(ratios, 1, ' times')}; {rates[0]} {PER_SECOND} against {rates[1]}; equal ids and masks"
    return Row(what, target, measured, plan.judged(median(ratios) >= TARGET))
