"""`python -m bench`: measure, print the tables, and write them into docs/performance.md if asked."""

import argparse
import sys
from pathlib import Path

from bench import asking, asking_contenders, contenders, corpus, gpt2, lengths, measure, rows, strategies, table

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".bench"
PAGE = ROOT / "docs" / "performance.md"
MERGES = ROOT / "src" / "millstream" / "data" / "gpt2" / "vocab.bpe"
GROUPS = {"pack": contenders.ROWS, "bestfit": strategies.ROWS, "ask": asking_contenders.ROWS}
"""The tables, and the names of their rows."""
ONLY = {**GROUPS, "pack": (*contenders.ROWS, *strategies.ROWS)}
NAMED = {
    "pack": ("fastokens", "tokenizers", "transformers", "datasets", "datatrove"),
    "ask": ("openai", "httpx2", "aiohttp", "orjson"),
}


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    known = tuple(name for names in GROUPS.values() for name in names)
    parser.add_argument("--only", choices=ONLY, help="packing, its half with best-fit and exports, or asking")
    parser.add_argument("--size", type=int, metavar="MB", help="JSONL to pack (default 300, --quick 30)")
    parser.add_argument("--subset", type=int, metavar="MB", help="for the rivals (default 100, --quick 5)")
    parser.add_argument(
        "--prompts", type=int, metavar="N", help="for million and resume (default 1000000, --quick 20000)"
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="rounds (default 5, --quick 1)")
    parser.add_argument("--quick", action="store_true", help="small inputs, one round; judges no target")
    parser.add_argument("--rows", metavar="NAME,...", help=f"only these: {', '.join(known)}")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/performance.md")
    parser.add_argument("--rivals", metavar="PYTHON", help="the rivals' interpreter (default: .venv-bench)")
    options = parser.parse_args(arguments)
    options.wanted = tuple(options.rows.split(",")) if options.rows else ONLY.get(options.only, known)
    if unknown := set(options.wanted) - set(known):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if options.write and (options.quick or options.rows):
        parser.error("--write wants every row of a table, in one full run: leave --quick and --rows away")
    return options


def rivals_python(given: str | None) -> str:
    """The interpreter asked for, else that of `make bench-env`, else this one."""
    installed = ROOT / ".venv-bench" / "bin" / "python"
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
        rivals=rivals_python(options.rivals),
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
        rivals=rivals_python(options.rivals),
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


def packing(options: argparse.Namespace) -> tuple[str, list[rows.Row]]:
    """What the packing table rests on, and its rows."""
    plan = planned(options, "pack")
    contenders.warm_up(plan)
    rounds = f"{plan.repeats} (rivals: {plan.rival_repeats})"
    lines = [
        f"* Machine: {table.machine()}.",
        f"* Command: `{command(options)}`.",
        f"* Text: {plan.mixed.described()}.",
        f"* Compared with: {versions(plan.rivals, 'pack')}; each on one thread.",
        f"* Medians of {rounds} rounds in which the contenders take turns, lowest and highest in brackets; "
        "ratios are taken within a round. CPU seconds are user and system time of all processes.",
    ]
    return "\n".join(lines), rows.measured_rows(plan)


def placing(options: argparse.Namespace) -> tuple[str, list[rows.Row]]:
    """What the table of best-fit, shuffling and exports rests on, and its rows."""
    plan = planned(options, "bestfit")
    contenders.warm_up(plan)
    lines = [
        f"* Machine: {table.machine()}.",
        f"* Command: `{command(options)}`.",
        f"* Text: {plan.mixed.described()}. Synthetic documents: {lengths.DESCRIBED}.",
        f"* Medians of {plan.repeats} rounds, lowest and highest in brackets; commands take turns, and ratios are "
        "taken within a round. CPU seconds are user and system time of all processes. Lengths are drawn anew in each "
        "round.",
    ]
    return "\n".join(lines), strategies.measured_rows(plan)


def asked(options: argparse.Namespace) -> tuple[str, list[rows.Row]]:
    """What the asking table rests on, and its rows."""
    plan = planned_asking(options)
    asking_contenders.warm_up(plan)
    bound = ", each bound to a core of its own" if asking_contenders.client_core() is not None else ""
    lines = [
        f"* Machine: {table.machine()}; client and server are processes on it{bound}.",
        f"* Command: `{command(options)}`.",
        f"* Compared with: {versions(plan.rivals, 'ask')}.",
        f"* Other load before: {100 * measure.busy_share():.0f} % of the machine.",
        f"* Medians of up to {plan.long_repeats} rounds in which the contenders take turns, lowest and highest in "
        "brackets; ratios are taken within a round. CPU time is user and system time of the client's process.",
    ]
    return "\n".join(lines), asking.measured_rows(plan)


def main(arguments: list[str]) -> None:
    options = parsed(arguments)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / ".gitignore").write_text("*\n")
    for group, measured in {"pack": packing, "bestfit": placing, "ask": asked}.items():
        if set(options.wanted) & set(GROUPS[group]):
            head, found = measured(options)
            print(f"{head}\n\n{table.plain(found)}", flush=True)
            if options.write:
                table.write(PAGE, group, f"{head}\n\n{table.markdown(found)}")


main(sys.argv[1:])
