"""`pack` and `plan`: a corpus in, samples out, and what that would give."""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from millstream.cli.types import IDS, INTERRUPTED, SIZE, WITH_FAULTS, Exit


@click.command(short_help="Pack a corpus into samples of exactly N token ids.")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--out", required=True, type=click.Path(), help="Folder or bucket of the run: new, or one to go on with.")
@click.option(
    "--tokenizer",
    default=None,
    help="gpt2 (default), cl100k_base, o200k_base, a tokenizer.json, a folder, a hub id.",
)
@click.option("--seq-len", default=2048, show_default=True, metavar="N", help="Token ids in a sample.")
@click.option(
    "--strategy",
    default="concat",
    show_default=True,
    type=click.Choice(["concat", "best-fit", "split"]),
    help="concat: join documents, cut every N ids. best-fit: cut only longer ones than N, place the rest so that "
    "hardly anything is padded. split: no two documents in a sample, padded.",
)
@click.option("--window", type=IDS, metavar="IDS", help="Ids within which best-fit places documents [default: 32Mi].")
@click.option("--max-segments", type=int, metavar="M", help="Documents in a sample of best-fit at most.")
@click.option("--shuffle", type=int, metavar="SEED", help="Shuffle documents, within a window.")
@click.option(
    "--shuffle-window", type=IDS, metavar="IDS", help="Ids within which documents are shuffled [default: --window]."
)
@click.option(
    "--overlong",
    default="cut",
    show_default=True,
    type=click.Choice(["cut", "truncate", "drop", "fault"]),
    help="What becomes of a document of more than N ids. cut: as the strategy does. truncate: its first N ids are "
    "kept. drop: it is left out, and counted. fault: it cannot be used (--on-error).",
)
@click.option("--bos", is_flag=True, help="Put a BOS token before each document.")
@click.option("--eos", is_flag=True, help="Put an EOS token after each document.")
@click.option("--bos-token", metavar="T", help="The BOS token's text, if the tokenizer names none; implies --bos.")
@click.option("--eos-token", metavar="T", help="The EOS token's text, if the tokenizer names none; implies --eos.")
@click.option(
    "--remainder",
    default="keep",
    show_default=True,
    type=click.Choice(["keep", "drop", "pad"]),
    help="What becomes of the last ids, fewer than N.",
)
@click.option("--pad-id", type=int, help="Id that pads [default: EOS].")
@click.option("--pad-side", default="right", show_default=True, type=click.Choice(["right", "left"]))
@click.option("--text-field", default="text", show_default=True, help="Field or column with the text.")
@click.option("--id-field", default="id", show_default=True, help="Field or column with the document's id.")
@click.option("--ids-field", help="Field or column with token ids: the text is tokenized already.")
@click.option("--chat", is_flag=True, help="Rows are conversations: messages, or prompt and completion.")
@click.option(
    "--loss",
    default="replies",
    show_default=True,
    type=click.Choice(["replies", "all"]),
    help="With --chat, what is to be learned: what the assistant says (or the completion), or everything.",
)
@click.option("--chat-template", type=click.Path(), metavar="FILE", help="A chat template instead of the tokenizer's.")
@click.option("--allow-specials", is_flag=True, help="With --chat, a text that spells a special token is that token.")
@click.option("--limit", type=int, metavar="DOCUMENTS", help="Stop after this many documents.")
@click.option(
    "--validation",
    default=0.0,
    metavar="FRACTION",
    help="Put this fraction of the documents, chosen by their id, into a validation subset.",
)
@click.option(
    "--format",
    "format_",
    default="npy",
    show_default=True,
    metavar="A,B,...",
    help="npy or parquet; with commas also megatron, mds, datatrove, litdata, nanogpt, llm.c.",
)
@click.option("--workers", type=int, metavar="N", help="Processes [default: what cores and --memory allow].")
@click.option(
    "--memory",
    type=SIZE,
    help="Most memory of all processes together [default: 1GiB, and what the tokenizer needs for long documents].",
)
@click.option(
    "--spill",
    type=click.Path(),
    metavar="DIR",
    help="Where several workers leave for one another what they tokenized [default: within --out].",
)
@click.option(
    "--on",
    default="local",
    show_default=True,
    metavar="WHERE",
    help="Where workers are. ray: on the Ray cluster of RAY_ADDRESS, or that runs here, or is started here. "
    "HOST:PORT or ray://HOST:PORT: on that one.",
)
@click.option(
    "--max-document", type=SIZE, help="Longer documents are faults [default: 32MiB; plain text has no limit]."
)
@click.option("--shard-size", default="256MiB", show_default=True, type=SIZE, help="Size of an output shard.")
@click.option(
    "--on-error",
    default="stop",
    show_default=True,
    type=click.Choice(["stop", "skip"]),
    help="At a document that cannot be used: stop, or write it to faults.jsonl.",
)
@click.option("--engine", default="fast", show_default=True, type=click.Choice(["fast", "reference"]))
@click.option("--overwrite", is_flag=True, help="Delete an earlier run in --out and start anew.")
@click.option(
    "--join", is_flag=True, help="Share the work with all that run this command with the same --out, anywhere."
)
@click.option(
    "--lease",
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="With --join: who is not heard of for so long is taken for dead.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the closing report as JSON.")
def pack(sources: tuple[str, ...], out: str, as_json: bool, format_: str, **options: Any) -> None:
    """Pack SOURCE... into samples of exactly N token ids.

    A SOURCE is a JSONL or NDJSON file, a plain text file (one document), a Parquet file, the first two also as .gz or
    .zst, a folder of those, a glob, - for JSONL on standard input, or stdlib: for Python's own source. Files, folders
    and globs may be in a bucket (s3://BUCKET/...) or on the Hugging Face hub (hf://datasets/ORG/NAME/...), too.

    The same command again goes on where an interrupted one stopped, and gives the same bytes.
    """
    from millstream.engines.lean import keep_freed_memory, lean_start

    keep_freed_memory()
    with lean_start():
        from millstream.report import pack_summary, watch_pack
        from millstream.runs.pack.packing import pack_to
        from millstream.runs.pack.settings import Settings
        from millstream.terminal import printable

    settings = Settings(format=format_, **options)
    try:
        with watch_pack() as on_progress:
            report = pack_to(out, sources, settings, on_progress=on_progress)
    except KeyboardInterrupt:
        click.echo(err=True)  # behind the line of progress
        raise Exit("stopped. Nothing is lost: run the same command again to go on.", INTERRUPTED) from None
    click.echo(json.dumps(report.as_json(), indent=1) if as_json else printable(pack_summary(report)))
    if (report.faults or report.unreadable) and not report.already:
        sys.exit(WITH_FAULTS)


def _as_in_pack(names: Sequence[str]) -> Callable[[click.Command], click.Command]:
    """The options of `pack` with these names, for another command."""

    def add(command: click.Command) -> click.Command:
        own = {option.name: option for option in pack.params}
        command.params[-1:-1] = [own[name] for name in names]  # before --json
        return command

    return add


@_as_in_pack(
    (
        "tokenizer",
        "window",
        "max_segments",
        "overlong",
        "bos",
        "eos",
        "bos_token",
        "eos_token",
        "text_field",
        "id_field",
        "ids_field",
        "chat",
        "loss",
        "chat_template",
        "allow_specials",
        "workers",
        "memory",
        "max_document",
        "engine",
    )
)
@click.command(short_help="Say what packing would give, before it is done.")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option(
    "--seq-len",
    "seq_lens",
    multiple=True,
    default=["1024,2048,4096,8192"],
    show_default=True,
    metavar="N,...",
    help="Token ids in a sample; several are compared.",
)
@click.option(
    "--strategy",
    "strategies",
    multiple=True,
    default=["concat,split,best-fit"],
    show_default=True,
    metavar="NAME,...",
    help="Strategies to compare.",
)
@click.option("--sample", default="64MiB", show_default=True, type=SIZE, help="Read about so much of the corpus.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Decides what is read.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan(
    sources: tuple[str, ...],
    seq_lens: tuple[str, ...],
    strategies: tuple[str, ...],
    sample: int,
    seed: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Say what packing SOURCE... would give: samples, padding, documents cut, size and time, for several settings.

    A SOURCE is as for pack. Blocks from all over the corpus are read, and nothing is written; numbers come with the
    interval that the true ones lie in with 95 % confidence. A corpus that is no larger than --sample is read whole:
    then they are exact.
    """
    from millstream.engines.lean import keep_freed_memory, lean_start

    keep_freed_memory()
    with lean_start():
        from millstream.runs.pack.settings import Settings
        from millstream.runs.plan.plan import make_plan

    lengths = [_whole_number(text, "--seq-len") for text in ",".join(seq_lens).split(",")]
    names = [name.strip() for name in ",".join(strategies).split(",")]
    found = make_plan(sources, Settings(**options), lengths, names, sample=sample, seed=seed)
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=1))
        return
    from millstream.planview import show_plan

    show_plan(found)


def _whole_number(text: str, flag: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is no whole number", param_hint=flag) from None
