"""Several that join one run, in one process: one step of one of them at a time, by a clock of their own."""

import contextlib
from collections import Counter

import pytest
from here import pooled

from millstream.corpus import sources
from millstream.runs.pack import hearing, joiner, joining
from millstream.runs.pack.joining import JoinedRun
from millstream.runs.pack.run import Run
from millstream.runs.pack.settings import Settings
from millstream.store.local import LocalStore

PATIENCE = 30


class Killed(BaseException):
    """What kill -9 is here: nothing of ours is done after it."""


class Member:
    """One that joins, with `other` settings perhaps; its change number `change` of anything on the disk, if that is
    given, ends with the error `how`, and so do all later ones."""

    def __init__(self, world, change=None, how=Killed, **other):
        self.world, self.left, self.how, self.lists = world, change, how, 0
        self.report = self.error = self.leases = None
        self.begun = world.now
        wanted = {"join": True, "lease": PATIENCE, "memory": 8 << 30, **world.settings, **other}
        run = Run(str(world.out), [str(source) for source in world.sources], Settings(**wanted))
        self._steps = JoinedRun(run, beats=self._beats, clock=lambda: world.now).steps()

    @contextlib.contextmanager
    def _beats(self, leases):
        leases.beat()
        self.leases = leases
        yield
        leases.leave()

    @property
    def over(self):
        return self.report is not None or self.error is not None

    def step(self):
        """Go on; how many seconds it would wait now."""
        self.world.changing = self
        try:
            if self.leases:
                self.leases.beat()
            return next(self._steps)
        except StopIteration as end:
            self.report = end.value
        except BaseException as error:
            self.error = error
        finally:
            self.world.changing = None
        return 0.0

    def change(self):
        if self.left is not None:
            self.left -= 1
            if self.left <= 0:
                raise self.how()


class World:
    """A folder that several join, of whom some are killed and others slow; what they change and ask for is counted."""

    def __init__(self, out, sources, **settings):
        self.out, self.sources, self.settings = out, sources, settings
        self.now, self.changing, self.changes, self.members, self.asked = 0.0, None, 0, [], Counter()

    def join(self, *given, **other):
        self.members.append(Member(self, *given, **other))
        return self.members[-1]

    def step(self, number, seconds=0.0):
        living = [member for member in self.members if not member.over]
        if living:
            self.now += living[number % len(living)].step() / len(living) + seconds

    def end(self, most=400):
        """All go on in turn, and another one comes if none is left, until all that live are done."""
        while not any(member.report for member in self.members):
            if all(member.over for member in self.members):
                assert all(isinstance(member.error, Killed) for member in self.members), self.members[-1].error
                self.join()
            for number in range(len(self.members)):
                self.step(number)
            most -= 1
            assert most, [member.error for member in self.members]
        while not all(member.over for member in self.members):
            self.step(0)
            most -= 1
            assert most > -2000, [member.error for member in self.members]


@contextlib.contextmanager
def several(seed, world, *, part=100, piece=1000, bound=1 << 30, section=2, large=64 << 20):
    """Within, what joins `world` has its workers here, as `pooled` says; packed files that are `large` are unpacked by
    one of them for all."""
    names = ("create", "put", "write", "delete", "publish")
    with pooled(seed, large=large), pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(LocalStore, name, _counted(world, getattr(LocalStore, name)))
        patch.setattr(LocalStore, "list", _listed(world, LocalStore.list))
        for name in ("read", "create"):
            patch.setattr(LocalStore, name, _asked(world, name, getattr(LocalStore, name)))
        patch.setattr(joining, "part_size", lambda total, most: part)
        patch.setattr(joining, "PIECE", piece)
        patch.setattr(hearing, "is_far", lambda url: seed % 2)
        patch.setattr(joiner, "SECTION", section)
        patch.setattr(joiner, "PART", part)
        if not large:  # else a small file is unpacked in one step
            patch.setattr(sources, "READ", 100)
        patch.setattr(joiner, "most_of", lambda *_: bound)
        patch.setattr(joining, "make_room", lambda *_, needed: None)
        yield


def _counted(world, function):
    def changed(*given, **named):
        world.changes += 1
        if world.changing:
            world.changing.change()
        return function(*given, **named)

    return changed


def _listed(world, function):
    def listed(*given):
        if world.changing:
            world.changing.lists += 1
        return function(*given)

    return listed


def _asked(world, name, function):
    def asked(self, *given):
        if world.changing and self.url.startswith(str(world.out)):
            world.asked[name] += 1
        return function(self, *given)

    return asked
