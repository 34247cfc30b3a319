"""The attempts that run at once, and the requests that are under way."""

from collections import OrderedDict
from collections.abc import Callable

from millstream.aio.limits import Fixed, Limit


class Places:
    """The attempts that run at once, shared by all flows that are given the same."""

    def __init__(self, limit: int | Limit) -> None:
        self.limit: Limit = Fixed(limit) if isinstance(limit, int) else limit
        self.taken = 0
        self._waiting: OrderedDict[Callable[[], None], None] = OrderedDict()  # want one, first come first served

    def full(self, pump: Callable[[], None]) -> bool:
        """Whether none is free; then `pump` is called when one is."""
        if self.taken < self.limit.now:
            self._waiting.pop(pump, None)
            return False
        self._waiting.setdefault(pump)
        return True

    def forget(self, pump: Callable[[], None]) -> None:
        self._waiting.pop(pump, None)

    def give_back(self) -> None:
        self.taken -= 1
        while self._waiting and self.taken < self.limit.now:
            pump, _ = self._waiting.popitem(last=False)
            pump()


def default_window(in_flight: int) -> int:
    """Requests admitted and not handed out: enough that a slow head stalls nothing soon, in bounded memory."""
    return max(4 * in_flight, 256)
