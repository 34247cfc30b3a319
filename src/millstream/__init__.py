"""millstream: text in, samples of exactly N token ids out; prompts in, one outcome each out; with nothing lost.

>>> from millstream import pack
>>> for sample in pack([[1, 2, 3], [], [4, 5]], 2):
...     print(sample.token_ids.tolist(), sample.complete)
[1, 2] True
[3, 4] True
[5] False

The names below are imported on first use, so that ``import millstream`` and ``millstream --help`` are instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from millstream.aio.outcomes import Fault
    from millstream.client.client import Client, ask
    from millstream.client.embedding import Embedding
    from millstream.client.outcomes import Outcomes
    from millstream.client.requests import Reply
    from millstream.errors import DataError, RequestError, ResumeRefused, RunError
    from millstream.folder.dataset import Dataset, open
    from millstream.integrity import verify
    from millstream.records import Document, DocumentFault
    from millstream.runs.ask.asking import ask_to
    from millstream.runs.ask.settings import AskSettings
    from millstream.runs.pack.packing import pack_to
    from millstream.runs.pack.provenance import text_of
    from millstream.runs.pack.settings import Settings
    from millstream.runs.progress import Report
    from millstream.samples import Batch, Sample, Segment, collate
    from millstream.streams import Stream, pack, read, split, tokenize

__version__ = "0.1.0"

_HOMES = {
    "AskSettings": "runs.ask.settings",
    "Batch": "samples",
    "Client": "client.client",
    "DataError": "errors",
    "Dataset": "folder.dataset",
    "Document": "records",
    "DocumentFault": "records",
    "Embedding": "client.embedding",
    "Fault": "aio.outcomes",
    "Outcomes": "client.outcomes",
    "Reply": "client.requests",
    "Report": "runs.progress",
    "RequestError": "errors",
    "ResumeRefused": "errors",
    "RunError": "errors",
    "Sample": "samples",
    "Segment": "samples",
    "Settings": "runs.pack.settings",
    "Stream": "streams",
    "ask": "client.client",
    "ask_to": "runs.ask.asking",
    "collate": "samples",
    "open": "folder.dataset",
    "pack": "streams",
    "pack_to": "runs.pack.packing",
    "read": "streams",
    "split": "streams",
    "text_of": "runs.pack.provenance",
    "tokenize": "streams",
    "verify": "integrity",
}

__all__ = [
    "AskSettings",
    "Batch",
    "Client",
    "DataError",
    "Dataset",
    "Document",
    "DocumentFault",
    "Embedding",
    "Fault",
    "Outcomes",
    "Reply",
    "Report",
    "RequestError",
    "ResumeRefused",
    "RunError",
    "Sample",
    "Segment",
    "Settings",
    "Stream",
    "ask",
    "ask_to",
    "collate",
    "open",
    "pack",
    "pack_to",
    "read",
    "split",
    "text_of",
    "tokenize",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'millstream' has no attribute {name!r}")
    value = getattr(import_module(f"millstream.{_HOMES[name]}"), name)
    globals()[name] = value  # the next look-up is a plain one
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})  # those not looked up yet, too: Tab in a notebook shows them
