"""What a setting may be, as a table: of a pack run, of a client, of an ask run."""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from numbers import Integral, Real
from typing import Any, NamedTuple

_UNITS = {unit: 1000**power for power, unit in enumerate(("", "k", "m", "g", "t"))}
_BINARY = {unit: 1024**power for power, unit in enumerate(("", "k", "m", "g", "t"))}


def size_of(text: str) -> int | None:
    """A number of bytes: 300000, 64MiB (powers of 1,024) or 64MB (powers of 1,000); None if it is none.

    >>> size_of("64MiB"), size_of("1.5 kB"), size_of("much")
    (67108864, 1500, None)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if not found:
        return None
    number, unit, binary = found.groups()
    return int(float(number) * (_BINARY if binary else _UNITS)[unit])


class Kind(NamedTuple):
    """What values `fits` is true for, in words."""

    fits: Callable[[Any], bool]
    words: str


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def are_weights(value: Any) -> bool:
    """Whether these are numbers above 0, in order.

    >>> are_weights([0.5, 2]), are_weights([0, 1]), are_weights({"a": 1}), are_weights(2)
    (True, False, False, False)
    """
    several = isinstance(value, Collection) and not isinstance(value, str | Mapping | Set)
    return several and all(is_number(each) and each > 0 for each in value)


def is_seconds(value: Any) -> bool:
    return is_number(value) and value > 0


def one_of(known: Sequence[str]) -> Kind:
    return Kind(lambda value: value in known, f"give {' or '.join(known)}")


def or_none(kind: Kind) -> Kind:
    """The same, or nothing given.

    >>> or_none(Kind(is_count, "give at least 1")).fits(None)
    True
    """
    return Kind(lambda value: value is None or kind.fits(value), kind.words)


def misfits(kinds: Mapping[str, Kind], values: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Those of the values that are not what they may be: (name, value, what is wanted).

    >>> list(misfits({"workers": Kind(is_count, "give at least 1")}, {"workers": 0, "unknown": 0}))
    [('workers', 0, 'give at least 1')]
    """
    for name, kind in kinds.items():
        if name in values and not kind.fits(values[name]):
            yield name, values[name], kind.words
