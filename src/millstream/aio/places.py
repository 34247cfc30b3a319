"""The attempts that run at once, and the requests that are under way."""

import math
from collections import OrderedDict
from collections.abc import Callable

from millstream.aio.limits import Fixed, Limit


class Places:
    """The attempts that run at once, shared by all flows that are given the same.

    There are as many as `limit` says, but no more than `most`, which is for what each attempt takes of this machine:
    `ceiling`, or what there was when it ran out. Then it grows again by one in a round, in case that there is more.

    >>> places, none = Places(64), lambda: None
    >>> places.taken = 8  # and the eighth finds no socket
    >>> places.ran_out()
    >>> places.most, places.full(none), places.was_short
    (7, True, True)
    >>> for _ in range(7):
    ...     places.give_back(went_well=True)
    >>> places.most
    8
    """

    def __init__(self, limit: int | Limit) -> None:
        self.limit: Limit = Fixed(limit) if isinstance(limit, int) else limit
        self.taken = 0
        self.most: float = math.inf
        self.was_short = False  # there were fewer than the limit says
        self._ceiling: float = math.inf
        self._went_well = 0  # since `most` was changed
        self._waiting: OrderedDict[Callable[[], None], None] = OrderedDict()  # want one, first come first served

    @property
    def free(self) -> bool:
        return self.taken < self.limit.now and self.taken < self.most

    def full(self, pump: Callable[[], None]) -> bool:
        """Whether none is free; then `pump` is called when one is."""
        if self.taken < self.limit.now and self.taken < self.most:  # as `free`, which to call takes longer
            if self._waiting:
                self._waiting.pop(pump, None)
            return False
        self.was_short = self.was_short or self.taken < self.limit.now
        self._waiting.setdefault(pump)
        return True

    def forget(self, pump: Callable[[], None]) -> None:
        self._waiting.pop(pump, None)

    def bound(self, ceiling: int) -> None:
        """There will never be more than so many."""
        self.most = self._ceiling = ceiling

    def ran_out(self) -> None:
        """An attempt, which still has its place, could not begin for want of what the others hold."""
        self.most, self._went_well, self.was_short = max(1, self.taken - 1), 0, True

    def give_back(self, *, went_well: bool = False) -> None:
        self.taken -= 1
        if went_well and self.most < self._ceiling:
            self._went_well += 1
            if self._went_well >= self.most:
                self.most, self._went_well = self.most + 1, 0
        while self._waiting and self.free:
            pump, _ = self._waiting.popitem(last=False)
            pump()


def default_window(in_flight: int) -> int:
    """Requests admitted and not handed out: enough that a slow head stalls nothing soon, in bounded memory."""
    return max(4 * in_flight, 256)
