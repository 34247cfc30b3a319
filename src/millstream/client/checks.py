"""Whether the options of a client, and of an ask run, can be what is meant: one table for both."""

from collections.abc import Mapping, Sequence
from typing import Any

from millstream.errors import RequestError
from millstream.options import Kind, is_count, is_number, is_seconds, misfits

_TEXT = Kind(lambda value: value is None or isinstance(value, str), "a text, or None")
_SECONDS = Kind(lambda value: value is None or is_seconds(value), "a number of seconds above 0, or None for no bound")
_RATE = Kind(lambda value: value is None or is_seconds(value), "a number above 0, or None for no limit")
_SWITCH = Kind(lambda value: isinstance(value, bool), "True or False")
_MAPPING = Kind(lambda value: value is None or isinstance(value, Mapping), "a mapping of names to values")
_NAMES = Kind(
    lambda value: isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(n, str) for n in value),
    "a list of names",
)

OPTIONS = {
    "model": _TEXT,
    "api_key": _TEXT,
    "system": _TEXT,
    "template": _TEXT,
    "proxy": _TEXT,
    "in_flight": Kind(lambda value: value == "auto" or is_count(value), 'a whole number from 1, or "auto"'),
    "window": Kind(lambda value: value is None or is_count(value), "a whole number from 1, or None"),
    "timeout": _SECONDS,
    "deadline": _SECONDS,
    "attempts": Kind(is_count, "a whole number from 1"),
    "longest_wait": Kind(lambda value: is_number(value) and value >= 0, "a number of seconds from 0"),
    "rpm": _RATE,
    "tpm": _RATE,
    "hedge": _SWITCH,
    "max_cost": Kind(lambda value: value is None or (is_number(value) and value >= 0), "a number from 0, or None"),
    "params": _MAPPING,
    "headers": _MAPPING,
    "max_reply": Kind(is_count, "a whole number of bytes from 1"),
    "seed": Kind(lambda value: value is None or is_count(value, 0), "a whole number from 0, or None"),
    "limit": Kind(lambda value: value is None or is_count(value, 0), "a whole number from 0, or None"),
    "row_params": _NAMES,
    "retry_finish": _NAMES,
    **dict.fromkeys(("ordered", "retry_faults", "batch_format", "keep_input", "reuse"), _SWITCH),
    **dict.fromkeys(("keep_body", "all_replies", "overwrite"), _SWITCH),
}
"""What each may be; `base_url`, `schema` and `price` are looked at where they are read."""


def check_options(options: Mapping[str, Any]) -> None:
    """Raises RequestError, in one line, for the first option that cannot be what is meant.

    >>> check_options({"timeout": 0})
    Traceback (most recent call last):
        ...
    millstream.errors.RequestError: timeout is a number of seconds above 0, or None for no bound; not 0
    >>> check_options({"timeout": 0.5, "in_flight": "auto"})
    """
    for name, value, words in misfits(OPTIONS, options):
        shown = type(value).__name__ if name in ("api_key", "proxy", "headers") else f"{value!r:.80}"  # secrets
        raise RequestError(f"{name} is {words}; not {shown}")
