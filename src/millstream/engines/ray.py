"""The engine of a Ray cluster: a worker for each CPU of its nodes, which come and go.

The driver decides what is done next and where, a call at a time. What a worker puts on the shelf is an object of Ray's
on its own node, which outlives the worker and not the node, and is handed to whoever needs it.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

from millstream.engines import Done
from millstream.engines.called import Consumed, Handed
from millstream.engines.cluster import Cluster, Node, Sight
from millstream.engines.deaths import PATIENCE, ended_by_itself
from millstream.engines.hands import CALLS, Call, Errand, Hand
from millstream.engines.shelf import Shelf
from millstream.errors import RequestError, RunError, setting

_LOOK = 2.0  # seconds between two looks at which nodes there are
_ALONE = 300.0  # seconds without any worker after which nobody waits for one any more


class Ray:
    """An `Engine` on a Ray cluster, of `workers` at most (None: one for each CPU), which have `depth` units each.

    Where no cluster runs, one of this machine is started, with so many `cores`.
    `check` is done on each node before it gets work, and `share` says how many workers a node with so many CPUs and
    bytes of memory has. Raises RequestError, which names the node, where one that is there at the beginning will not
    do; one that joins later is left out. `on_node` is told of that and of nodes that are gone, in words, as `on_death`
    is of workers that died.
    """

    def __init__(
        self,
        workers: int | None,
        *,
        depth: int = 2,
        named: Callable[[Any], str] = repr,
        on_death: Callable[[str], None] = lambda words: None,
        on_node: Callable[[str], None] = lambda words: None,
        advice: str = "",
        address: str | None = None,
        cores: int | None = None,
        check: Callable[[], Sight] = Sight,
        share: Callable[[int, int], int] = lambda cores, memory: cores,
    ) -> None:
        self._most, self._depth, self._named, self._on_death = workers, depth, named, on_death
        self._check, self._share, self._on_node, self._advice = check, share, on_node, advice
        self._tasks: dict[int, Errand] = {}
        self._urgent: deque[Errand] = deque()
        self._new: deque[Errand] = deque()
        self._suspects: deque[Errand] = deque()
        self._hands: list[Hand] = []
        self._functions: list[tuple[Callable[[Any], Any], Any]] = []
        self._nodes: dict[str, Node] = {}  # that have workers, or will do
        self._probes: dict[Any, Node] = {}
        self._over: list[Done] = []  # units that were given up before anybody had them
        self._idle_deaths = 0
        self._looked = self._had_hands = time.monotonic()
        self.cluster = Cluster(address, cores)
        self.shelf = Shelf(self.cluster)
        try:
            self._begin()
        except BaseException:
            self.cluster.close()
            raise

    def _begin(self) -> None:
        """Look at all nodes that are there, and start their workers."""
        nodes = self.cluster.nodes()
        self._nodes = {node.id: node for node in nodes}
        probes = [(node, self.cluster.probe(node, self._check)) for node in nodes]
        for node, probe in probes:
            sight = self.cluster.seen(probe)
            if sight.problem and not self.cluster.has(node):
                continue  # it left meanwhile
            if sight.problem:
                raise RequestError(f"the Ray node {node.name} {sight.problem}")
            self._staff(node, sight)
        if self._hands:
            return
        if self._nodes:
            raise RequestError(
                f"no node of the Ray cluster{self.cluster.where} has the memory that a worker needs: give more as "
                f"{setting('memory')}, which is that of each machine, or a smaller {setting('max_document')}"
            )
        raise RequestError(f"no node of the Ray cluster{self.cluster.where} has a CPU: start some with --num-cpus")

    def _staff(self, node: Node, sight: Sight) -> None:
        cores = node.cores if sight.cores is None else min(node.cores, sight.cores)
        memory = node.memory if sight.memory is None else min(node.memory, sight.memory)
        wanted = self._share(cores, memory)
        if self._most is not None:
            wanted = min(wanted, self._most - len(self._hands))
        for _ in range(wanted):
            self._start(node)

    def _start(self, node: Node) -> None:
        actor = self.cluster.hand(node)
        hand = Hand(actor, node)
        hand.calls.append(Call(None, actor.learn.remote()))
        self._hands.append(hand)

    @property
    def told(self) -> str:
        """Why there are so many workers."""
        count = len({hand.node.id for hand in self._hands})
        if self.cluster.own:
            return "by Ray, which was started on this machine"
        return f"on {count} node{'s' * (count > 1)} of the Ray cluster{self.cluster.where}"

    @property
    def taken(self) -> dict[str, list[Consumed]]:
        """What the workers that are there have taken, by the names of their nodes."""
        found: dict[str, list[Consumed]] = {}
        for hand in self._hands:
            found.setdefault(hand.node.name, []).append(hand.taken)
        return found

    @property
    def slots(self) -> int:
        return max(1, len(self._hands))

    @property
    def room(self) -> bool:
        return len(self._tasks) < self._depth * self.slots

    # Units ----------------------------------------------------------------------------------------------------------

    def submit(
        self,
        number: int,
        function: Callable[[Any], Any],
        unit: Any,
        needs: Iterable[str] = (),
        *,
        urgent: bool = False,
        ahead: int | None = None,
    ) -> None:
        task = self._tasks[number] = Errand(number, function, unit, tuple(needs), urgent, ahead)
        (self._urgent if urgent else self._new).append(task)
        self._fill()

    def more(self, number: int) -> None:
        task = self._tasks.get(number)
        if task is not None and task.allowed is not None:
            task.allowed += 1
            self._fill()

    def give_up(self, number: int) -> None:
        task = self._tasks.get(number)
        if task is None or task.given_up:
            return
        task.given_up = True
        if task.hand:
            self._call(task.hand, task, "give_up")
        else:
            for queue in (self._urgent, self._new, self._suspects):
                if task in queue:
                    queue.remove(task)
            self._is_over(task)

    def _is_over(self, task: Errand) -> None:
        del self._tasks[task.number]
        self._over.append(Done(task.number))

    def done(self) -> Iterator[Done]:
        found: list[Done] = []
        while (self._tasks or self._over) and not found:
            self._look()
            self._fill()
            firsts = {hand.calls[0].answer: hand for hand in self._hands if hand.calls}
            for ref in self.cluster.wait([*firsts, *self._probes], 0.0 if self._over else _LOOK):
                if ref in self._probes:
                    self._joined(ref)
                elif firsts[ref] in self._hands:  # else its node is gone, meanwhile
                    found += self._took(firsts[ref])
            found += self._over
            self._over.clear()
        yield from found

    def _fill(self) -> None:
        """Give workers what they can go on with, first those that have nothing."""
        for load in range(CALLS):
            for hand in self._hands:
                if len(hand.calls) == load and hand.free and (task := self._next(hand)):
                    self._call(hand, task, "go_on" if task.hand else "begin")

    def _next(self, hand: Hand) -> Errand | None:
        if self._suspects and not hand.calls:
            return self._suspects.popleft()
        if self._urgent:
            return self._urgent.popleft()
        begun = next((task for task in hand.begun.values() if task.wants), None)
        return begun or (self._new.popleft() if self._new else None)

    def _call(self, hand: Hand, task: Errand, what: str) -> None:
        method = getattr(hand.actor, what).options(num_returns=2)
        if what == "begin":
            step = task.allowed != 0 or task.alone
            task.hand, hand.begun[task.number] = hand, task
            which, needs = self._known(hand, task.function), self.shelf.refs(task.needs)
            refs = method.remote(task.number, which, task.unit, needs, step=step)
            task.asked += step
        else:
            refs = method.remote(task.number)
            task.asked += what == "go_on"
        hand.calls.append(Call(task, *refs))

    def _known(self, hand: Hand, function: Callable[[Any], Any]) -> int:
        """The place of a function among all; a worker is sent those that it does not know."""
        which = next((at for at, (known, _) in enumerate(self._functions) if known is function), None)
        if which is None:
            which = len(self._functions)
            self._functions.append((function, self.cluster.put(function)))
        if hand.learned <= which:
            refs = [ref for _, ref in self._functions[hand.learned :]]
            hand.calls.append(Call(None, hand.actor.learn.remote(*refs)))
            hand.learned = len(self._functions)
        return which

    def _took(self, hand: Hand) -> Iterator[Done]:
        """The first call of a worker has been answered, or the worker has died."""
        call = hand.calls[0]
        try:
            answer = self.cluster.get(call.answer)
        except self.cluster.gone as error:
            self._died(hand, error)
            return
        except Exception as error:  # what it was given or answers cannot be sent
            told = str(error).strip().splitlines() or [type(error).__name__]
            answer = Handed("error", RunError(f"the Ray node {hand.node.name} cannot do its work: {told[-1]}"), ())
        hand.calls.popleft()
        hand.ready, self._idle_deaths = True, 0
        if answer and answer.taken:
            hand.taken = answer.taken
        if call.task:
            yield from self._answered(hand, call, answer)
        elif answer and answer.kind == "error":
            raise answer.result

    def _answered(self, hand: Hand, call: Call, answer: Handed) -> Iterator[Done]:
        task = call.task
        assert task
        if not answer.kind or task.number not in self._tasks:
            return
        if answer.kind == "part":
            task.came += 1
            fresh = task.came > task.given  # else a worker that died has given it before
            for name in answer.names:
                if fresh or self.shelf.has(name):
                    self.shelf.add(name, call.tray, hand.node.id)
            if fresh:
                task.given += 1
                yield Done(task.number, answer.result, last=False)
            return
        for name in answer.names:
            self.shelf.add(name, call.tray, hand.node.id)
        del hand.begun[task.number], self._tasks[task.number]
        failed = answer.kind == "error"
        yield Done(task.number, error=answer.result) if failed else Done(task.number, answer.result)

    # Nodes and deaths -----------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """See which nodes there are, now and then."""
        now = time.monotonic()
        if self._hands:
            self._had_hands = now
        elif now - self._had_hands > _ALONE and not self._probes:
            raise RunError(
                f"the Ray cluster has had no node to work on for {_ALONE / 60:.0f} minutes. "
                "Run the same command again to go on"
            )
        if now - self._looked < _LOOK:
            return
        self._looked = now
        there = {node.id: node for node in self.cluster.nodes()}
        for gone in [known for known in self._nodes if known not in there]:
            del self._nodes[gone]
            self._lost(gone)
        for node in there.values():
            if node.id not in self._nodes:
                self._nodes[node.id] = node
                self._probes[self.cluster.probe(node, self._check)] = node

    def _joined(self, probe: Any) -> None:
        """A node that has come later has been looked at."""
        node = self._probes.pop(probe)
        sight = self.cluster.seen(probe)
        if not self.cluster.has(node):
            return
        if sight.problem:
            self._on_node(f"the Ray node {node.name} is left out: it {sight.problem}")
        else:
            self._staff(node, sight)

    def _lost(self, node: str) -> None:
        """A node is gone, with all workers and objects that it had. Nobody is to blame."""
        self.shelf.lost(node)
        lost = [hand for hand in self._hands if hand.node.id == node]
        if lost:
            self._on_node(f"the Ray node {lost[0].node.name} is gone")
        for hand in lost:
            self._hands.remove(hand)
            self._do_again(list(hand.begun.values()))

    def _died(self, hand: Hand, error: Exception) -> None:
        """Start another worker in the place of one. What it had been asked is done again by one worker each, so that
        it shows which of them kills."""
        if not self.cluster.has(hand.node):
            self._nodes.pop(hand.node.id, None)
            self._lost(hand.node.id)
            return
        self._hands.remove(hand)
        self.cluster.end(hand.actor)
        asked = [call.task for call in hand.calls if call.task and call.task.number in self._tasks]
        why = f"on the Ray node {hand.node.name}: {self.cluster.words_of(error)}"
        first = asked[0] if asked else None
        if self._blamed(first) >= PATIENCE:
            hint = f"; often the system was out of memory: fewer {setting('workers')} need less"
            raise ended_by_itself(why, self._named(first.unit) if first else None, hint, self._advice)
        self._on_death(why)
        for task in asked:
            task.alone = True
        self._do_again(list(hand.begun.values()))
        self._start(hand.node)

    def _blamed(self, task: Errand | None) -> int:
        """How often a worker has died at this unit, or at none, with this time."""
        if task is None:
            self._idle_deaths += 1
            return self._idle_deaths
        task.deaths += 1
        return task.deaths

    def _do_again(self, tasks: list[Errand]) -> None:
        for task in reversed(tasks):
            task.again()
            if task.given_up:
                self._is_over(task)
            elif task.alone:
                self._suspects.appendleft(task)
            else:
                (self._urgent if task.urgent else self._new).appendleft(task)

    def close(self) -> None:
        waiting = [call.answer for hand in self._hands for call in hand.calls]
        for hand in self._hands:
            self.cluster.end(hand.actor)
        with suppress(Exception):  # the cluster may be gone
            self.cluster.wait(waiting, 5.0, all_of_them=True)  # for them to be dead, and write nothing any more
        self._hands.clear()
        self.cluster.close()
