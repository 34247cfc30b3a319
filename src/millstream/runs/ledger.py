"""The token ledger: what came in, counted while reading, against what went out, counted while writing."""

from typing import Any

from millstream.errors import LedgerError
from millstream.runs.subset import Mark


def make_ledger(mark: Mark, subsets: dict[str, Any], seq_len: int) -> dict[str, Any]:
    """What came in, counted while reading, against what went out, counted while writing. Raises LedgerError."""
    shards = [shard for subset in subsets.values() for shard in subset["shards"]]

    def total(key: str) -> int:
        return sum(shard[key] for shard in shards)

    left = {"keep": 0, "pad": 0, "drop": 0}
    for subset in subsets.values():
        left[subset["remainder"]["policy"]] += subset["remainder"]["ids"]
    documents = {
        "in": mark.ordinal,
        "whole": total("documents") - total("split") - total("empty"),
        "split": total("split"),
        "empty": total("empty"),
        "faulty": sum(mark.faults.values()),
    }
    ids = {
        "in": mark.text_ids + mark.special_ids,
        "text": mark.text_ids,
        "special": mark.special_ids,
        "in_samples": total("samples") * seq_len - total("padding"),
        "padding": total("padding"),
        "remainder": left["keep"],
        "dropped": left["drop"],
    }
    ledger = {"documents": documents, "ids": ids, "samples": total("samples"), "faults": mark.faults}
    check_ledger(ledger)
    return ledger


def check_ledger(ledger: dict[str, Any]) -> None:
    """Raises LedgerError unless documents in = whole + split + empty + faulty, and ids in = what became of them."""
    documents, ids = ledger["documents"], ledger["ids"]
    out = documents["whole"] + documents["split"] + documents["empty"] + documents["faulty"]
    if documents["in"] != out:
        raise LedgerError(f"{documents['in']:,} documents came in and {out:,} are accounted for")
    out = ids["in_samples"] + ids["remainder"] + ids["dropped"]
    if ids["in"] != out or ids["in"] != ids["text"] + ids["special"]:
        raise LedgerError(f"{ids['in']:,} ids came in and {out:,} are accounted for")
