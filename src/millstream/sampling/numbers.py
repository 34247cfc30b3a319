"""Numbers as they are given: a seed, and how many of something."""

import sys

from millstream.errors import RequestError
from millstream.options import is_count


def seed_of(seed: int) -> int:
    """The seed, as Python's own number: one of numpy makes another key, and is not in JSON.

    >>> import numpy
    >>> seed_of(numpy.uint8(7))
    7
    >>> seed_of(1.5)
    Traceback (most recent call last):
    millstream.errors.RequestError: seed 1.5 does not work: give one from 0 to 2^64 - 1
    """
    if not is_count(seed, 0) or seed >= 1 << 64:
        raise RequestError(f"seed {seed!r} does not work: give one from 0 to 2^64 - 1")
    return int(seed)


def count_of(name: str, number: int, least: int = 1) -> int:
    """The same of what is called `name`.

    >>> import numpy
    >>> count_of("workers", numpy.int64(0), 0)
    0
    >>> count_of("epochs", 0)
    Traceback (most recent call last):
    millstream.errors.RequestError: epochs=0 does not work: give a whole number, at least 1
    """
    if not is_count(number, least) or number > sys.maxsize:
        raise RequestError(f"{name}={number!r} does not work: give a whole number, at least {least}")
    return int(number)
