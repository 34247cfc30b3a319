"""What a run tells: how far it is, and how it ended."""

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import msgspec

from millstream.errors import Words
from millstream.folder.entries import Identity


class Progress(NamedTuple):
    """How far a run is, for whoever shows it. Bytes are decompressed where the input is.

    `share` of the corpus is packed, from 0 to 1, and `share_before` was when this process began; None with standard
    input. `bytes_before` and `ids_before` are likewise.
    """

    bytes: int
    share: float | None
    share_before: float | None
    documents: int
    ids: int
    faults: int
    seconds: float
    stages: dict[str, float]
    workers: int
    bytes_before: int
    ids_before: int


@dataclass(frozen=True)
class Report:
    """How a run ended. `ledger` and `settings` are the manifest's; `stages` are seconds of work by stage, over all
    processes.

    `compared` bytes were compared with the reference engine; `not_compared` documents were not, as it cannot encode
    them, `not_compared_such_as` has the id of one and what it said. In `unlearned` conversations nothing is learned.
    For `lost` bytes of text there is no id in the vocabulary, and `unknown` ids stand for any text that is unknown.

    `spilled`: most bytes at once that workers left for one another in pieces.

    `shared`: what of a run that several joined was done here, in words.

    `ignored` counts what the folders hold besides what is read, `unreadable` has folders that could not be listed: they
    are no documents, so the ledger knows nothing of them.
    """

    out: str
    complete: bool
    already: bool
    resumed: bool
    ledger: dict[str, Any]
    seq_len: int
    samples: int
    shards: int
    seconds: float
    stages: dict[str, float]
    bytes: int
    ids_this_time: int
    workers: int
    workers_why: str
    compared: int
    hints: list[Words]
    tokenizer: str | None
    settings: Identity
    validation: dict[str, Any] | None = None
    spilled: int = 0
    unlearned: int = 0
    lost: int = 0
    unknown: int = 0
    not_compared: int = 0
    not_compared_such_as: tuple[str, str] | None = None
    exports: list[dict[str, Any]] = field(default_factory=list)
    ignored: dict[str, int] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    shared: str = ""

    @property
    def faults(self) -> int:
        return int(self.ledger["documents"]["faulty"])

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "settings": msgspec.to_builtins(self.settings), "faults": self.faults}


class AskProgress(NamedTuple):
    """How far an ask run is; `asked` counts what went to a server this time, `total` all prompts if that is known.

    `cost` is in the money of the prices (None: there are none); `waits_for` is what limits it now, in a few words.
    """

    done: int
    faults: int
    asked: int
    in_flight: int
    seconds: float
    ids_out: int
    total: int | None
    cost: float | None
    waits_for: str


IN_VAIN = "in vain"
"""Beside the kinds of faults in `AskReport.examples`: why replies could not be asked again."""


@dataclass(frozen=True)
class AskReport:
    """How an ask run ended.

    `again` are outcomes taken from the journal of an earlier run; ids are those of this one, as the servers count them,
    `ids_wasted` of replies that could not be used. `spent` is where the time went, in seconds over all requests (see
    `millstream.aio.jobs.Spent`); `limits` are the (second, attempts in flight) of an adaptive run. `stopped` says why
    it ended before its prompts did: "interrupted" or "too dear". `kept` says whether there is a journal,
    from which the next run goes on; `damaged` counts its lines that nothing could be made of, `damaged_lines` are the
    numbers of the first few. `endings` counts the replies that are not whole: "length" (cut by the limit of ids),
    "content_filter", "refusal", and, if such are asked again, "unknown" of older journals; `left_out` of them did not
    go to standard output. `in_vain` counts replies that were asked again and stay as they were, as no other came.
    `notes` tells of what the prompts have and nobody asked for.
    """

    out: str
    requests: int
    replies: int
    faults: dict[str, int]
    examples: dict[str, str]
    again: int
    ids_in: int
    ids_out: int
    ids_wasted: int
    cost: float | None
    seconds: float
    spent: dict[str, float]
    in_flight: int
    limits: list[tuple[float, int]]
    stopped: str | None
    kept: bool = True
    damaged: int = 0
    damaged_lines: list[int] = field(default_factory=list)
    endings: dict[str, int] = field(default_factory=dict)
    left_out: int = 0
    in_vain: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def attempts(self) -> int:
        return int(self.spent["attempts"])
