"""The token ledger: what came in, counted while reading, against what went out, counted while writing."""

from millstream.errors import LedgerError
from millstream.folder.entries import Ledger, SubsetEntry
from millstream.runs.pack.subset import Mark


def make_ledger(mark: Mark, subsets: dict[str, SubsetEntry], seq_len: int) -> Ledger:
    """The ledger of a run that has read to `mark` and written `subsets`. Raises LedgerError if it does not balance."""
    documents, ids = written(subsets, seq_len)
    learned = written_learned(subsets)
    if learned:
        learned = {"in": mark.learned, **learned, "cut_off": mark.learned_cut_off}
    ledger = Ledger(
        {"in": mark.ordinal, **documents, "faulty": sum(mark.faults.values())},
        {"in": mark.text_ids + mark.special_ids, "text": mark.text_ids, "special": mark.special_ids, **ids},
        samples=sum(subset.samples for subset in subsets.values()),
        faults=mark.faults,
        learned=learned or None,
    )
    check_ledger(ledger)
    return ledger


def written(subsets: dict[str, SubsetEntry], seq_len: int) -> tuple[dict[str, int], dict[str, int]]:
    """(documents, ids): what became of them, from the counts of the output shards."""
    shards = [shard for subset in subsets.values() for shard in subset.shards]

    def total(name: str) -> int:
        return sum(getattr(shard, name) for shard in shards)

    left = {"keep": 0, "pad": 0, "drop": 0}
    for subset in subsets.values():
        left[subset.remainder.policy] += subset.remainder.ids
    apart = {name: total(name) for name in ("split", "truncated", "left_out", "empty")}
    documents = {"whole": total("documents") - sum(apart.values()), **apart}
    ids = {
        "in_samples": total("samples") * seq_len - total("padding"),
        "padding": total("padding"),
        "remainder": left["keep"],
        "dropped": left["drop"],
        "cut_off": total("cut_off"),
    }
    return documents, ids


def written_learned(subsets: dict[str, SubsetEntry]) -> dict[str, int]:
    """What became of the ids that are to be learned; empty without a loss mask."""
    if not all(subset.remainder.learned is not None for subset in subsets.values()):
        return {}
    left = {"keep": 0, "pad": 0, "drop": 0}
    for subset in subsets.values():
        left[subset.remainder.policy] += subset.remainder.learned or 0
    inside = sum(shard.learned or 0 for subset in subsets.values() for shard in subset.shards)
    return {"in_samples": inside, "remainder": left["keep"], "dropped": left["drop"]}


def check_ledger(ledger: Ledger) -> None:
    """Raises LedgerError unless documents in = whole + split + truncated + left out + empty + faulty, and ids in = in
    samples + remainder + dropped + cut off; those that are to be learned, too."""
    documents, ids = ledger.documents, ledger.ids
    out = sum(count for name, count in documents.items() if name != "in")
    if documents["in"] != out:
        raise LedgerError(f"{documents['in']:,} documents came in and {out:,} are accounted for")
    out = ids["in_samples"] + ids["remainder"] + ids["dropped"] + ids["cut_off"]
    if ids["in"] != out or ids["in"] != ids["text"] + ids["special"]:
        raise LedgerError(f"{ids['in']:,} ids came in and {out:,} are accounted for")
    learned = ledger.learned
    if learned and learned["in"] != sum(count for name, count in learned.items() if name != "in"):
        raise LedgerError(f"{learned['in']:,} ids to be learned came in, and not as many are accounted for: {learned}")
