"""What a finished run makes one think of: nothing is wrong, and it may not be what was wanted."""

from collections.abc import Iterator

from millstream.errors import Words, setting
from millstream.folder.entries import Identity, Ledger


def hints_of(
    settings: Identity,
    ledger: Ledger,
    repeated: str | None,
    unlearned: int = 0,
    twice: int = 0,
    *,
    already: bool,
) -> list[Words]:
    """Hints about a finished run, or one that was finished `already`.

    `settings` and `ledger` are those of its manifest, `repeated` says which inputs were given more than once; in
    `unlearned` conversations nothing is learned, and `twice` counts ready ids that had BOS or EOS already.
    """
    found = [repeated] if repeated else []
    if not already:
        found += [*_separators(settings), *_cut(settings, ledger), *_unlearned(unlearned), *_twice(twice)]
    return [Words(hint) for hint in found]


_ROLES = "replies are what the role assistant says, and not what others say, such as model, gpt or Assistant"


def nothing_learned(documents: int) -> str:
    """What is wrong with a run that would teach nothing."""
    return (
        f"nothing in {documents:,} documents is to be learned: {_ROLES}. Name the roles so, or learn everything with "
        f"{setting('loss', 'all')}"
    )


def _unlearned(count: int) -> Iterator[str]:
    if count:
        many = "1 conversation has" if count == 1 else f"{count:,} conversations have"
        yield f"{many} nothing that is to be learned: {_ROLES}"


def _twice(count: int) -> Iterator[str]:
    if count:
        yield f"ready ids had BOS or EOS already where one was added, {count:,} times: leave it out"


def _cut(settings: Identity, ledger: Ledger) -> Iterator[str]:
    """Conversations that are in more than one sample."""
    cut = ledger.documents["split"]
    if not settings.chat or not cut:
        return
    whole, first = setting("strategy", "best-fit"), setting("overlong", "truncate")
    ways = [f"{whole} cuts only what is longer than N"] if settings.strategy == "concat" else []
    if not settings.overlong:
        ways.append(f"{first} keeps the first N ids of longer ones, {setting('overlong', 'drop')} leaves them out")
    many = "1 conversation is" if cut == 1 else f"{cut:,} conversations are"
    yield f"{many} cut: what is behind a cut is learned without its prompt. {'; '.join(ways)}"


def _separators(settings: Identity) -> Iterator[str]:
    """Documents that nothing ends."""
    if not settings.tokenizer or settings.ids_field or settings.chat:
        return
    if settings.bos_id is None and settings.eos_id is None:
        what = (
            "no EOS ends a document: a model never learns to stop"
            if settings.strategy == "split"
            else "neither BOS nor EOS separates documents: a model cannot see where one ends"
        )
        yield f"{what}; {setting('eos', True)} adds one"
