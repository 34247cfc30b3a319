"""`python -m bench`: measure, print the tables, and write them into docs/performance.md if asked."""

import argparse
import sys
from pathlib import Path

from bench import (
    asking,
    asking_contenders,
    contenders,
    corpus,
    driving,
    gpt2,
    kinds,
    leading,
    lengths,
    loading,
    lost,
    measure,
    rows,
    scaling,
    strategies,
    streaming,
    table,
    two_cores,
    ways,
)

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".bench"
PAGE = ROOT / "docs" / "performance.md"
MERGES = ROOT / "src" / "millstream" / "data" / "gpt2" / "vocab.bpe"
GROUPS = {
    "pack": contenders.ROWS,
    "bestfit": strategies.ROWS,
    "same": ways.ROWS,
    "scale": scaling.ROWS,
    "lost": lost.ROWS,
    "ask": asking_contenders.ROWS,
    "train": loading.ROWS,
    "stream": streaming.ROWS,
}
"""The tables, and the names of their rows."""
ONLY = {**GROUPS, "pack": (*contenders.ROWS, *strategies.ROWS)}
EVERY_SECOND = "CPU seconds are user and system time of all processes"
NAMED = {
    "pack": ("fastokens", "tokenizers", "transformers", "datasets", "datatrove"),
    "ask": ("openai", "httpx2", "aiohttp", "orjson"),
    "train": ("torch", "litdata", "grain", "datasets"),
    "mosaic": ("mosaicml-streaming", "torch"),
}


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    known = tuple(name for names in GROUPS.values() for name in names)
    parser.add_argument(
        "--only",
        choices=ONLY,
        help="packing; its part with best-fit and exports, with ways to the same bytes, with what is large, or with "
        "kills; asking; training; or streams inside of it",
    )
    parser.add_argument("--size", type=int, metavar="MB", help="JSONL to pack (default 300, --quick 30)")
    parser.add_argument("--subset", type=int, metavar="MB", help="for the rivals (default 100, --quick 5)")
    parser.add_argument(
        "--prompts", type=int, metavar="N", help="for million and resume (default 1000000, --quick 20000)"
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="rounds (default 5, --quick 1)")
    parser.add_argument("--quick", action="store_true", help="small inputs, one round; judges no target")
    parser.add_argument("--rows", metavar="NAME,...", help=f"only these: {', '.join(known)}")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/performance.md")
    parser.add_argument("--loaders", metavar="PYTHON", help="the interpreter with PyTorch (default: .venv-loaders)")
    parser.add_argument("--rivals", metavar="PYTHON", help="the rivals' interpreter (default: .venv-bench)")
    options = parser.parse_args(arguments)
    options.wanted = tuple(options.rows.split(",")) if options.rows else ONLY.get(options.only, known)
    if unknown := set(options.wanted) - set(known):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if options.write and (options.quick or options.rows):
        parser.error("--write wants every row of a table, in one full run: leave --quick and --rows away")
    return options


def interpreter(given: str | None, environment: str) -> str:
    """The interpreter asked for, else that of `make bench-env`, else this one."""
    installed = ROOT / environment / "bin" / "python"
    return given or (str(installed) if installed.exists() else sys.executable)


def planned(options: argparse.Namespace, group: str) -> contenders.Plan:
    """Gather the corpus, make the tokenizer file, and fill in what was not said."""
    tokenizer = FOLDER / "gpt2.json"
    tokenizer.write_text(gpt2.tokenizer_json(MERGES), encoding="utf-8")
    contenders.say("gathering text")
    size, subset, repeats, memory = (30, 5, 1, (50, 200)) if options.quick else (300, 100, 5, (500, 2000))
    return contenders.Plan(
        wanted=tuple(name for name in options.wanted if name in GROUPS[group]),
        folder=FOLDER,
        mixed=corpus.mixed(FOLDER, options.size or size),
        subset_mb=options.subset or subset,
        memory_mb=memory,
        repeats=options.repeats or repeats,
        tokenizer=tokenizer,
        rivals=interpreter(options.rivals, ".venv-bench"),
        judge=not options.quick,
    )


def planned_asking(options: argparse.Namespace) -> asking_contenders.AskPlan:
    """Fill in what was not said."""
    prompts, share, repeats = (20_000, 0.1, 1) if options.quick else (1_000_000, 1.0, 5)
    return asking_contenders.AskPlan(
        wanted=options.wanted,
        folder=FOLDER,
        prompts=options.prompts or prompts,
        share=share,
        repeats=options.repeats or repeats,
        rivals=interpreter(options.rivals, ".venv-bench"),
        judge=not options.quick,
    )


def versions(python: str, group: str) -> str:
    """Which releases of the rivals were measured, as that interpreter tells."""
    code = "import sys, importlib.metadata as m; print(', '.join(f'{n} {m.version(n)}' for n in sys.argv[1:]))"
    try:
        return measure.run([python, "-c", code, *NAMED[group]]).output.strip()
    except (measure.Failed, OSError):
        return "not all of them are installed"


def command(options: argparse.Namespace) -> str:
    """The command line to say again, without this machine's paths."""
    numbers = {name: getattr(options, name) for name in ("only", "size", "subset", "prompts", "repeats")}
    words = ["python -m bench", *(f"--{name} {number}" for name, number in numbers.items() if number)]
    words += ["--quick"] if options.quick else []
    words += [f"--rows {options.rows}"] if options.rows else []
    words += ["--write"] if options.write else []
    return " ".join(words)


def head(options: argparse.Namespace, *facts: str, bound: str = "") -> str:
    """What a table rests on: the machine, how processes are `bound` to it, the command, and other facts."""
    told = (f"Machine: {table.machine()}{bound}.", f"Command: `{command(options)}`.", *facts)
    return "\n".join(f"* {fact}" for fact in told)


def other_load() -> str:
    return f"Other load before: {100 * measure.busy_share():.0f} % of the machine."


def medians(rounds: object, seconds: str = EVERY_SECOND) -> str:
    """How numbers come about; `seconds`: what CPU time is."""
    return (
        f"Medians of {rounds} rounds in which contenders take turns, lowest and highest in brackets; ratios are taken "
        f"within a round. {seconds}."
    )


def packing(options: argparse.Namespace) -> tuple[str, list[rows.Row]]:
    """What the packing table rests on, and its rows."""
    plan = planned(options, "pack")
    contenders.warm_up(plan)
    told = head(
        options,
        f"Text: {plan.mixed.described()}.",
        f"Compared with: {versions(plan.rivals, 'pack')}; each on one thread.",
        medians(f"{plan.repeats} (rivals: {plan.rival_repeats})"),
    )
    found = rows.measured_rows(plan) + kinds.measured_rows(plan)
    found += two_cores.cores_rows(plan) if "cores" in plan.wanted else []
    found += leading.leading_rows(plan) if "leading" in plan.wanted else []
    return told, found + (driving.driver_rows(plan) if "driver" in plan.wanted else [])


def placing(options: argparse.Namespace) -> tuple[str, list[rows.Row]]:
    """What the table of best-fit, shuffling and exports rests on, and its rows."""
    plan = planned(options, "bestfit")
    contenders.warm_up(plan)
    told = head(
        options,
        f"Text: {plan.mixed.described()}. Synthetic documents: {lengths.DESCRIBED}; drawn anew in each round.",
        medians(plan.repeats),
    )
    return told, strategies.measured_rows(plan)


def same(options: argparse.Namespace) -> tuple[str, list[rows.Row]]:
    """What the table of ways to the same bytes rests on, and its rows."""
    plan = planned(options, "same")
    told = head(
        options,
        f"Text: the first {plan.subset_mb} MB of {plan.mixed.described()}. Every run has `{' '.join(ways.EVERY)}`, "
        f"windows have {ways.WINDOW} ids. Compared is the SHA-256 of the manifest, which has those of all files.",
    )
    return told, ways.same_rows(plan)


def scaled(options: argparse.Namespace) -> tuple[str, list[rows.Row]]:
    """What the table about large inputs rests on, and its rows."""
    plan = planned(options, "scale")
    told = head(options, f"Text: {plan.mixed.described()}.", other_load(), medians(plan.repeats))
    return told, scaling.measured_rows(plan)


def killed(options: argparse.Namespace) -> tuple[str, list[rows.Row]]:
    """What the table of kills rests on, and its rows."""
    plan = planned(options, "lost")
    loaders = interpreter(options.loaders, ".venv-loaders")
    told = head(
        options,
        f"Text: the first {plan.subset_mb} MB of {plan.mixed.described()}, in {lost.FILES} files.",
        f"Compared with: {versions(plan.rivals, 'pack')}; {versions(loaders, 'train')}.",
        lost.DESCRIBED,
    )
    return told, lost.lost_rows(plan, loaders)


def asked(options: argparse.Namespace) -> tuple[str, list[rows.Row]]:
    """What the asking table rests on, and its rows."""
    plan = planned_asking(options)
    asking_contenders.warm_up(plan)
    core = ", each bound to a core of its own" if asking_contenders.client_core() is not None else ""
    told = head(
        options,
        f"Compared with: {versions(plan.rivals, 'ask')}.",
        other_load(),
        medians(f"up to {plan.long_repeats}", "CPU time is user and system time of the client's process"),
        bound=f"; client and server are processes on it{core}",
    )
    return told, asking.measured_rows(plan)


def training(options: argparse.Namespace) -> tuple[str, list[rows.Row]]:
    """What the table of loaders rests on, and its rows."""
    plan = planned(options, "train")
    python = interpreter(options.loaders, ".venv-loaders")
    mosaic = versions(loading.interpreter("mosaic", python), "mosaic")
    told = head(
        options,
        f"Compared with: {versions(python, 'train')}; {mosaic}; each in one process, on one thread, shuffled.",
        other_load(),
        f"{loading.DESCRIBED} {medians(plan.repeats, 'CPU seconds are user and system time of the epochs')}",
    )
    return told, loading.measured_rows(plan, python)


def in_streams(options: argparse.Namespace) -> tuple[str, list[rows.Row]]:
    """What the table of streams in a training process rests on, and its rows."""
    plan = planned(options, "stream")
    seconds = f"{EVERY_SECOND}, start included"
    told = head(options, f"Text: {plan.mixed.described()}.", other_load(), medians(plan.repeats, seconds))
    return told, streaming.measured_rows(plan)


def main(arguments: list[str]) -> None:
    options = parsed(arguments)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / ".gitignore").write_text("*\n")
    groups = {
        "pack": packing,
        "bestfit": placing,
        "same": same,
        "scale": scaled,
        "lost": killed,
        "ask": asked,
        "train": training,
        "stream": in_streams,
    }
    for group, measured in groups.items():
        if set(options.wanted) & set(GROUPS[group]):
            head, found = measured(options)
            print(f"{head}\n\n{table.plain(found)}", flush=True)
            if options.write:
                table.write(PAGE, group, f"{head}\n\n{table.markdown(found)}")


if __name__ == "__main__":
    main(sys.argv[1:])
