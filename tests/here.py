"""An engine in this process, whose workers do their units in any order; what they are given and answer is pickled."""

import contextlib
import pickle
import random

import pytest

from millstream.engines import ENGINES, Done
from millstream.engines.worker import Desk
from millstream.runs.pack import driver, planning
from millstream.runs.pack.site import site_of

CHANCE = random.Random()
LEFT = [-1]
"""How often the driver is still answered, before it is interrupted; a number below 0: as often as it likes."""


class Here:
    """An `Engine`. Raises AssertionError where all wait for one another."""

    def __init__(self, workers, *, depth=16, named=repr, on_death=None, advice=""):
        self.slots, self._depth = workers, depth
        self._answers = []
        self._desks = [Desk(self._answers.append) for _ in range(workers)]
        self._sent = [[] for _ in range(workers)]
        self._at = {}

    def _load(self, which):
        return sum(at == which for at in self._at.values())

    @property
    def room(self):
        return min(map(self._load, range(self.slots))) < self._depth

    def submit(self, number, function, unit, needs=(), *, urgent=False, ahead=None):
        which = self._at[number] = min(range(self.slots), key=self._load)
        desk, sent = self._desks[which], self._sent[which]
        if function not in sent:
            sent.append(function)
            desk.take(("function", as_sent(function)))
        desk.take(("unit", number, sent.index(function), as_sent(unit), urgent, ahead))

    def more(self, number):
        if number in self._at:
            self._desks[self._at[number]].take(("more", number))

    def give_up(self, number):
        if number in self._at:
            self._desks[self._at[number]].take(("give up", number))

    def done(self):
        while self._at and not self._answers:
            some = [desk for desk in CHANCE.sample(self._desks, self.slots) if CHANCE.random() < 0.7]
            if not [None for desk in some if desk.step()]:
                assert any(desk.step() for desk in self._desks), "all wait for one another"
        answers, self._answers[:] = self._answers[:], []
        for number, kind, result in answers:
            LEFT[0] -= 1
            if LEFT[0] == -1:
                raise KeyboardInterrupt
            if kind != "part":
                del self._at[number]
            result = as_sent(result)
            yield Done(number, error=result) if kind == "error" else Done(number, result, last=kind != "part")

    def close(self):
        """They went on for a while, with what nobody waits for any more."""
        for _ in range(CHANCE.randrange(20)):
            CHANCE.choice(self._desks).step()


def as_sent(something):
    return pickle.loads(pickle.dumps(something))


@contextlib.contextmanager
def pooled(seed, part=100, piece=1000, bound=1 << 30, large=64 << 20, answers=-1, engine="here:Here", afar=False):
    """Within, runs with several workers have them here: parts of so many bytes of input, pieces of as many of text, and
    `bound` for all of them that lie about. Packed files that are `large` are unpacked by one worker for all. The first
    of them is interrupted when it was given so many `answers`, and ends with KeyboardInterrupt. Those that are `afar`
    are taken for workers on other machines."""
    CHANCE.seed(seed)
    LEFT[0] = answers
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENGINES, "local", engine)
        patch.setattr(driver, "part_size", lambda *_: part)
        patch.setattr(driver, "site_of", lambda *given: site_of(*given)._replace(piece=piece, afar=afar))
        patch.setattr(planning, "LARGE", large)
        patch.setattr(driver, "most_of", lambda *_, piece: bound)
        patch.setattr(driver, "make_room", lambda *_: None)
        yield
