"""Leases: who does what, among processes that share nothing but a store.

A lease is taken by making the next generation of a task, `<task>.<generation>`, which `create` lets one of them do; it
names its holder. Each holder beats, in a file of its own for all that it has. Nobody compares clocks: a holder whose
beat stays the same for as long as an observer's patience, by the observer's own clock, is taken for dead, and one
whose beat is gone has left.

It may be alive all the same and only slow, so what is done under a lease has to be such that doing it twice, even at
once, does no harm.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from millstream.store.contract import Store

_BEATS = "beats/"
_RHYTHM = 3
"""Beats in the time after which a holder is taken for dead."""


class _Generation(NamedTuple):
    number: int
    holder: str


class Leases:
    """What `me`, a name that no other process has ever had, holds in `store`, which has nothing but leases.

    `beat` before the first `take`, and then at least every `patience` seconds, as `beating` does. A task that was done
    is told of elsewhere before it is `done` here: after a `take`, look whether it is, as somebody may have finished it
    just before.

    >>> from millstream.store.local import LocalStore
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     now = 0.0
    ...     one, two = (Leases(LocalStore(folder), name, patience=30, clock=lambda: now) for name in ("one", "two"))
    ...     one.beat(), two.beat()
    ...     print(one.take("part-7"), two.take("part-7"))
    ...     now = 30.0
    ...     two.take("part-7"), one.fresh
    (None, None)
    True False
    (True, False)
    """

    def __init__(self, store: Store, me: str, *, patience: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self.me, self.patience, self._clock = store, me, patience, clock
        self._beats = 0
        self._last = float("-inf")  # when the last beat began that the others can see
        self._latest: dict[str, _Generation] = {}  # of tasks, as far as it was looked for
        self._seen: dict[str, tuple[bytes, float]] = {}  # beats of others, and when they were first seen so

    @property
    def fresh(self) -> bool:
        """Whether nobody can have taken this process for dead yet."""
        return self._clock() - self._last < self.patience

    def beat(self) -> None:
        now = self._clock()
        self._beats += 1
        self._store.put(_BEATS + self.me, b"%d" % self._beats)
        self._last = now

    def take(self, task: str) -> bool:
        """Take a task, unless another process has it that is not taken for dead."""
        found = self._latest.get(task, _Generation(0, ""))
        while not found.number or not self._is_alive(f"{task}.{found.number}", found.holder):
            number = found.number + 1
            if self._store.create(f"{task}.{number}", self.me.encode()):
                self._latest[task] = _Generation(number, self.me)
                return True
            try:
                found = _Generation(number, self._store.read(f"{task}.{number}").decode())
            except FileNotFoundError:  # it was done meanwhile
                self._latest.pop(task, None)
                return False
            self._latest[task] = found
            if found.holder == self.me:  # the answer was lost that it is made, as NFS may do
                return True
        return False

    def holds(self, task: str) -> bool:
        """Whether a task is still ours: unlike `fresh` this asks, as a clock may stand still while a machine sleeps,
        and a beat that comes too late may have been missed by nobody."""
        found = self._latest.get(task)
        if found is None or found.holder != self.me:
            return False
        if not self.fresh:
            self.beat()
        return self._has(f"{task}.{found.number}") and not self._has(f"{task}.{found.number + 1}")

    def _has(self, lease: str) -> bool:
        try:
            self._store.size(lease)
        except FileNotFoundError:
            return False
        return True

    def done(self, task: str) -> None:
        """Whoever looks for a task sees that it is done, or need not be: nobody will ask for it any more."""
        found = self._latest.pop(task, _Generation(0, ""))
        for number in range(1, found.number + 1):
            self._store.delete_file(f"{task}.{number}")

    def holder(self, task: str) -> str | None:
        """Who has a task, as it was when we last looked."""
        found = self._latest.get(task)
        return found.holder if found else None

    def holders(self) -> Sequence[str]:
        """All that beat, dead ones too that nobody has waited for."""
        return [name.removeprefix(_BEATS) for name in self._store.list(_BEATS.removesuffix("/"))]

    def leave(self) -> None:
        """What this process holds can be taken at once."""
        self._last = float("-inf")
        self._store.delete_file(_BEATS + self.me)

    def _is_alive(self, lease: str, holder: str) -> bool:
        """Whether a lease is held. Those that have left, or were taken for dead by somebody, have no beat."""
        if holder == self.me:
            return True
        try:
            beat = self._store.read(_BEATS + holder) if holder else b""
        except FileNotFoundError:
            return False
        # Where a disk has no links, a lease is empty for a moment; and for ever, if its holder was killed in it.
        known = self._seen.get(holder or lease)
        if known is None or known[0] != beat:
            known = self._seen[holder or lease] = beat, self._clock()
        if self._clock() - known[1] < self.patience:
            return True
        if holder:
            self._store.delete_file(_BEATS + holder)  # if it is only slow, its next beat is seen again
        return False


@contextlib.contextmanager
def beating(leases: Leases) -> Iterator[None]:
    """Within the block they beat, in a thread; a beat that fails is tried again. Behind it all is left.

    It is begun with a beat, which has to succeed.
    """
    leases.beat()
    over = threading.Event()

    def beat() -> None:
        while not over.wait(leases.patience / _RHYTHM):
            with contextlib.suppress(OSError):
                leases.beat()

    thread = threading.Thread(target=beat, name="beating", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(OSError):  # then it is taken for dead, in time
            leases.leave()
