"""Who is measured: millstream, its bare engine and the rivals, each as one function that runs it once."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from bench import corpus, measure
from bench.measure import Failed

SEQ_LEN = 2048
HERE = Path(__file__).parent
MIB = 1 << 20

RIVALS = {
    "teaching": (
        "teaching.py",
        "The common teaching pipeline (transformers, one document at a time, a list as buffer)",
    ),
    "datatrove": ("datatrove_tokens.py", "datatrove (JsonlReader, DocumentTokenizer, one task)"),
    "datasets": ("datasets_map.py", "datasets (batched map of the tokenizer, then of group_texts)"),
}
ROWS = ("pack", "engine", *RIVALS, "kinds", "start", "cores", "memory", "packer", "leading", "driver")


@dataclass(frozen=True)
class Plan:
    """What is measured with what: the wanted rows, the inputs, and the two interpreters."""

    wanted: tuple[str, ...]
    folder: Path
    mixed: corpus.Corpus
    subset_mb: int
    memory_mb: tuple[int, int]
    repeats: int
    tokenizer: Path
    rivals: str
    judge: bool = True

    @property
    def packed(self) -> Path:
        """Where millstream writes to; removed after each run."""
        return self.folder / "packed"

    @property
    def rival_repeats(self) -> int:
        """Fewer rounds for what takes long."""
        return min(self.repeats, 3)

    def judged(self, met: bool) -> bool | None:
        return met if self.judge else None


@dataclass(frozen=True)
class Cost:
    """One run of one contender: what it cost for how many ids, and the hash of them where it is known."""

    cpu: float
    wall: float
    ids: int
    sha256: str = ""

    @property
    def rate(self) -> float:
        return self.ids / self.cpu


C = TypeVar("C")
Contender = Callable[[], Cost]
Costs = dict[str, list[Cost] | Failed]


def alternate(contenders: dict[str, Callable[[], C]], repeats: int) -> dict[str, list[C] | Failed]:
    """Run each contender once a round, every other round in reverse; one that fails is out from then on."""
    costs: dict[str, list[C] | Failed] = {name: [] for name in contenders}
    for number in range(repeats):
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            done = costs[name]
            if isinstance(done, list):
                say(f"round {number + 1} of {repeats}: {name}")
                try:
                    done.append(contenders[name]())
                except Failed as failure:
                    costs[name] = failure
    return costs


def say(line: str) -> None:
    print(f"bench: {line}", file=sys.stderr, flush=True)


def pack_command(plan: Plan, source: str, *options: str) -> list[str]:
    """The command line a user would type, with this interpreter's millstream."""
    command = [sys.executable, "-m", "millstream", "pack", source, "--out", str(plan.packed), "--overwrite"]
    return [*command, "--tokenizer", "gpt2", "--seq-len", str(SEQ_LEN), "--json", *options]


def packed(plan: Plan, source: str, *options: str, core: int | None = None) -> Cost:
    """Pack once, then count and hash the ids that lie in the shards; the files are removed."""
    shutil.rmtree(plan.packed, ignore_errors=True)
    try:
        done = measure.run(pack_command(plan, source, *options), core=core)
        count, sha256 = ids_on_disk(plan.packed)
        return Cost(done.cpu, done.wall, count, sha256)
    finally:
        shutil.rmtree(plan.packed, ignore_errors=True)


def ids_on_disk(folder: Path) -> tuple[int, str]:
    """How many ids the shards and the remainder hold, and the SHA-256 of all of them in order."""
    shards = sorted(folder.glob("samples-*.npy"))
    if not shards:
        raise Failed("no samples-*.npy was written")
    count, digest = 0, hashlib.sha256()
    for path in [*shards, *folder.glob("remainder.npy")]:
        ids = np.load(path)
        if ids.dtype != np.uint16 or (path in shards and ids.shape[1:] != (SEQ_LEN,)):
            raise Failed(f"{path.name} has {ids.dtype} of the shape {ids.shape}")
        count += ids.size
        digest.update(ids.tobytes())
    return count, digest.hexdigest()


def engine(plan: Plan, batch_bytes: int) -> Cost:
    """The bare engine over the same text; only the seconds inside `encode_batch_flat` count."""
    arguments = [plan.mixed.path, str(plan.tokenizer), str(batch_bytes)]
    done = measure.run([sys.executable, str(HERE / "engine.py"), *arguments])
    told = json.loads(done.output)
    return Cost(told["seconds"], done.wall, told["ids"], told["sha256"])


def rival(plan: Plan, name: str, source: Path) -> Cost:
    """One rival's program on the subset, on one thread, in a folder of its own that is removed."""
    folder = (plan.folder / "rival").absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    one_thread = {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    arguments = [str(source.absolute()), str(folder), str(plan.tokenizer.absolute()), str(SEQ_LEN)]
    try:
        command = [plan.rivals, str(HERE / "rivals" / RIVALS[name][0]), *arguments]
        done = measure.run(command, env=one_thread | offline)
        return Cost(done.cpu, done.wall, json.loads(done.output.splitlines()[-1])["ids"])
    except FileNotFoundError:
        raise Failed("its environment is missing: make bench-env") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def warm_up(plan: Plan) -> None:
    """Run everything once on a little text, so that no measured run compiles modules or reads a cold disk."""
    small = corpus.subset(plan.mixed, plan.folder, 1)
    contenders: dict[str, Contender] = {"warm-up, millstream": partial(packed, plan, str(small))}
    for name in RIVALS:
        if name in plan.wanted:
            contenders[f"warm-up, {name}"] = partial(rival, plan, name, small)
    alternate(contenders, 1)
    with open(plan.mixed.path, "rb") as file:
        while file.read(MIB):
            pass
