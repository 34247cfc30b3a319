"""A permutation of n places that needs no memory: a Feistel network over a rectangle that is just large enough."""

import hashlib
import math

import numpy as np

from millstream.records import Ids

VERSION = 1
"""Of everything in this room that decides an order. Other numbers out of `Permutation` or `Mixture` are a new one."""

_ROUNDS = 8
_MULTIPLY = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # those of splitmix64
_HALF = np.uint64(32)


def key_of(*parts: int | str) -> bytes:
    """64 bytes that every part decides, and their order: (0, 1) and (1, 0) have nothing in common.

    >>> key_of(0, 1) != key_of(1, 0) != key_of("01"), len(key_of(7, "a"))
    (True, 64)
    """
    return hashlib.blake2b(repr((VERSION, *parts)).encode(), digest_size=8 * _ROUNDS).digest()


class Permutation:
    """The numbers from 0 to n - 1 in an order that `key` decides; n is at most 2^62.

    Called with an array of places it gives, for each, the number that stands there. It remembers nothing but the key.
    There may be several keys, and so orders: then `which` says for each place whose it is.

    >>> order = Permutation(10, key_of("seed", 7), key_of("seed", 8))
    >>> order(np.arange(10)).tolist()
    [1, 9, 8, 2, 4, 6, 5, 3, 7, 0]
    >>> order(np.array([0, 0, 1]), which=np.array([0, 1, 1])).tolist()
    [1, 2, 3]
    """

    def __init__(self, n: int, *keys: bytes) -> None:
        self.n = n
        # A place is a cell of a rectangle with at most sqrt(n) cells too many. A number that falls on one of those is
        # sent through once more, until it falls below n ("cycle walking"): so it stays a bijection.
        self._rows = math.isqrt(max(0, n - 1)) + 1
        self._columns = -(-n // self._rows)
        self._keys = np.frombuffer(b"".join(keys), "<u8").reshape(len(keys), _ROUNDS).T

    def __call__(self, places: Ids, which: Ids | None = None) -> Ids:
        keys = self._keys[:, :1] if which is None else self._keys[:, which]
        found: Ids = self._once(places.astype(np.uint64), keys)
        while len(outside := np.flatnonzero(found >= self.n)):
            found[outside] = self._once(found[outside], keys if which is None else keys[:, outside])
        numbers: Ids = found.astype(np.int64)
        return numbers

    def _once(self, numbers: Ids, keys: Ids) -> Ids:
        rows, columns = np.uint64(self._rows), np.uint64(self._columns)
        row = numbers // columns
        column = numbers - row * columns
        for first, second in zip(keys[::2], keys[1::2], strict=True):
            row = _turned(row, column, first, rows)
            column = _turned(column, row, second, columns)
        cell: Ids = row * columns + column
        return cell


def _turned(moved: Ids, by: Ids, key: Ids, size: np.uint64) -> Ids:
    """(moved + a number below `size` that `key` makes of `by`) modulo `size`; all below 2^32."""
    number = mixed(by, key)
    number &= np.uint64(0xFFFFFFFF)
    number *= size
    number >>= _HALF
    number += moved
    # Below size the difference wraps around to a huge number: so this is the remainder.
    least: Ids = np.minimum(number, number - size)
    return least


def mixed(numbers: Ids, key: Ids) -> Ids:
    """u64: for each number one that looks as if drawn by lot, always the same with the same key."""
    found: Ids = numbers ^ key
    for factor in _MULTIPLY:
        found *= factor
        found ^= found >> _HALF
    return found
