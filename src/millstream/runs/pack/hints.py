"""What a finished run makes one think of: nothing is wrong, and it may not be what was wanted."""

from collections.abc import Iterator
from typing import Any

from millstream.errors import Words, setting


def hints_of(settings: dict[str, Any], ledger: dict[str, Any], repeated: str | None, *, already: bool) -> list[Words]:
    """Hints about a finished run, or one that was finished `already`.

    `settings` and `ledger` are those of its manifest, `repeated` says which inputs were given more than once.
    """
    found = [repeated] if repeated else []
    return [Words(hint) for hint in (found if already else [*found, *_separators(settings), *_cut(settings, ledger)])]


def _cut(settings: dict[str, Any], ledger: dict[str, Any]) -> Iterator[str]:
    """Conversations that are in more than one sample."""
    cut = ledger["documents"]["split"]
    if not settings["chat"] or not cut:
        return
    whole, first = setting("strategy", "best-fit"), setting("overlong", "truncate")
    ways = [f"{whole} cuts only what is longer than N"] if settings["strategy"] == "concat" else []
    if not settings["overlong"]:
        ways.append(f"{first} keeps the first N ids of longer ones, {setting('overlong', 'drop')} leaves them out")
    many = "1 conversation is" if cut == 1 else f"{cut:,} conversations are"
    yield f"{many} cut: what is behind a cut is learned without its prompt. {'; '.join(ways)}"


def _separators(settings: dict[str, Any]) -> Iterator[str]:
    """Documents that nothing ends."""
    if not settings["tokenizer"] or settings["ids_field"] or settings["chat"]:
        return
    if settings["bos_id"] is None and settings["eos_id"] is None:
        what = (
            "no EOS ends a document: a model never learns to stop"
            if settings["strategy"] == "split"
            else "neither BOS nor EOS separates documents: a model cannot see where one ends"
        )
        yield f"{what}; {setting('eos', True)} adds one"
