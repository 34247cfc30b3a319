"""Who works on a cluster, and what they have been asked for."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from millstream.engines.called import Consumed
from millstream.engines.cluster import Node

CALLS = 2
"""How many a worker has at once: one to do, and one to go on with."""


@dataclass(eq=False, slots=True)
class Errand:
    """A unit on its way: `allowed` answers it may give, of which `given` were handed out. Of this attempt at it,
    `asked` were asked for and `came`. It is done `alone` by a worker once it is suspected of a death."""

    number: int
    function: Callable[[Any], Any]
    unit: Any
    needs: tuple[str, ...]
    urgent: bool
    allowed: int | None
    given: int = 0
    asked: int = 0
    came: int = 0
    deaths: int = 0
    alone: bool = False
    given_up: bool = False
    hand: "Hand | None" = None

    @property
    def wants(self) -> bool:
        """Whether it may be asked for another answer."""
        if self.given_up or self.asked - self.came >= CALLS:
            return False
        return self.alone or self.allowed is None or self.asked < self.allowed

    def again(self) -> None:
        self.asked, self.came, self.hand = 0, 0, None


class Call(NamedTuple):
    """What a worker has been asked: the references of its answer, and of what it puts."""

    task: Errand | None
    answer: Any
    tray: Any = None


@dataclass(eq=False, slots=True)
class Hand:
    """A worker on a node; it is given nothing before it has answered for the first time. What it has `taken` it tells
    with each answer."""

    actor: Any
    node: Node
    calls: deque[Call] = field(default_factory=deque)
    begun: dict[int, Errand] = field(default_factory=dict)
    learned: int = 0
    ready: bool = False
    taken: Consumed = field(default_factory=Consumed)

    @property
    def free(self) -> bool:
        """Whether another call may be sent."""
        return self.ready and len(self.calls) < CALLS and not any(call.task and call.task.alone for call in self.calls)
