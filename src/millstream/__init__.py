"""millstream: text in, samples of exactly N token ids out, in bounded memory, with nothing lost.

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
    from millstream.formats.dataset import Dataset, open
    from millstream.integrity import verify
    from millstream.records import Document, Sample
    from millstream.runs.packing import pack_to
    from millstream.runs.streams import Stream, pack, read, split, tokenize

__version__ = "0.1.0"

_HOMES = {
    "Dataset": "formats.dataset",
    "Document": "records",
    "Sample": "records",
    "Stream": "runs.streams",
    "open": "formats.dataset",
    "pack": "runs.streams",
    "pack_to": "runs.packing",
    "read": "runs.streams",
    "split": "runs.streams",
    "tokenize": "runs.streams",
    "verify": "integrity",
}

__all__ = [
    "Dataset",
    "Document",
    "Sample",
    "Stream",
    "open",
    "pack",
    "pack_to",
    "read",
    "split",
    "tokenize",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'millstream' has no attribute {name!r}")
    value = getattr(import_module(f"millstream.{_HOMES[name]}"), name)
    globals()[name] = value  # the next look-up is a plain one
    return value
