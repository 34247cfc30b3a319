"""What a server tells of the ids that a request took, under whatever names."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class Usage(NamedTuple):
    """Ids of a prompt (`given`, of which `cached` were read from a cache) and of its reply (`told`), as one pays them.

    None is what the server does not tell.
    """

    given: int | None
    told: int | None
    cached: int = 0


NOT_TOLD = Usage(None, None)


def paid_ids(usage: Any) -> Usage:
    """What a `usage` says, in the names of OpenAI's APIs or of Anthropic's.

    Some servers leave the ids of thinking out of `completion_tokens`, but not out of the total.

    >>> paid_ids({"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11})
    Usage(given=9, told=2, cached=0)
    >>> paid_ids({"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 511}).told
    502
    >>> paid_ids({"input_tokens": 9, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 8}})
    Usage(given=9, told=2, cached=8)
    >>> paid_ids({"prompt_tokens": 9}), paid_ids({"total_tokens": 11}) == paid_ids(None) == NOT_TOLD
    (Usage(given=9, told=None, cached=0), True)
    """
    if type(usage) is not dict or not usage:
        return NOT_TOLD
    given, told, total = usage.get("prompt_tokens"), usage.get("completion_tokens"), usage.get("total_tokens")
    if type(given) is type(told) is type(total) is int and len(usage) == 3 and given >= 0 <= told:
        return Usage(given, max(told, total - given))  # what most servers say, in a third of the time
    given, told, total = _number(given), _number(told), _number(total)
    cached = _cached(usage, usage.get("prompt_tokens_details"))
    if given is None and (given := _number(usage.get("input_tokens"))) is not None:
        cached = _cached(usage, usage.get("input_tokens_details"))
        # Anthropic's input_tokens are those that no cache had to do with.
        read, written = (_number(usage.get(f"cache_{way}_input_tokens")) or 0 for way in ("read", "creation"))
        given, cached = given + read + written, cached + read
    if told is None:
        told = _number(usage.get("output_tokens"))
    if total is not None and given is not None:
        told = max(told or 0, total - given)
    elif total is not None and told is not None:
        given = max(0, total - told)
    return Usage(given, told, min(cached, given or 0))


def added(total: dict[str, int] | None, ids: Usage) -> dict[str, int] | None:
    """A usage in OpenAI's names and what came to it; None as long as nothing was told.

    >>> added(added(None, Usage(given=9, told=2)), Usage(given=9, told=None))
    {'prompt_tokens': 18, 'completion_tokens': 2, 'total_tokens': 20}
    """
    if ids.given is None and ids.told is None:
        return total
    given, told = ids.given or 0, ids.told or 0
    if total is not None:
        given, told = given + total["prompt_tokens"], told + total["completion_tokens"]
    return {"prompt_tokens": given, "completion_tokens": told, "total_tokens": given + told}


def _cached(usage: Mapping[str, Any], details: Any) -> int:
    """Ids read from a cache: OpenAI tells them in `details`, others beside the rest."""
    if isinstance(details, Mapping) and (found := _number(details.get("cached_tokens"))) is not None:
        return found
    return _number(usage.get("prompt_cache_hit_tokens")) or _number(usage.get("cached_tokens")) or 0


def _number(value: Any) -> int | None:
    """A count of ids, which some servers write as a float or as text; None if it is none."""
    if type(value) is int:
        return value if value >= 0 else None
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, float) and math.isfinite(value) and value >= 0:
        return math.ceil(value)
    return None
