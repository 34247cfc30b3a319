"""A pooled run in one process, its tasks in any order and some of them twice."""

import json
import pickle
from dataclasses import replace

from msgspec import to_builtins

from millstream.corpus.parts import parts
from millstream.records import Cursor
from millstream.runs.pack.counts import placed
from millstream.runs.pack.course import Course, Start
from millstream.runs.pack.pieces import StoredPieces
from millstream.runs.pack.run import Run
from millstream.runs.pack.settings import Settings, paces
from millstream.runs.pack.subset import Mark
from millstream.runs.pack.writing import Form, WriteShards
from millstream.store import at


class Pooled:
    """One run of `settings` over `sources` into `out`, with pieces of `size` bytes of text in `spill`."""

    def __init__(self, out, spill, sources, chance, size=1, **settings):
        out.mkdir()
        self.out, self.chance = out, chance
        self.run = Run(str(out), [str(source) for source in sources], Settings(workers=1, **settings))
        self.pieces = StoredPieces(at(spill))
        self._tokenize = replace(sent(self.run.reading.tokenize_part(self.pieces)), size=size)
        forms = {
            name: Form(self.run.shape(pace), self.run.strategy(pace))
            for name, pace in zip(("train", "validation"), paces(settings.get("validation", 0.0)), strict=True)
            if pace
        }
        known = self.run.settings
        self.forms = forms
        self._write = sent(
            WriteShards(
                str(out),
                forms,
                self.pieces,
                remainder=known.remainder,
                pad_id=self.run.pad_id,
                pad_side=known.pad_side,
            )
        )

    def tokenize(self, part):
        """The counts of a part."""
        return self._tokenize(sent(self.run.reading.part_task(part)))

    def write(self, task):
        """What a worker does with a task; it takes as long as it takes."""
        return self._write(task)._replace(seconds=0.0)

    def go(self):
        """All of it: {subset: its manifest entry}, and the mark at the end."""
        planned = self.parts()
        counts = self.in_order(planned, self.tokenized(planned))
        end = self.faults_of(counts)
        if self.run.settings.limit is None and counts:
            self.check_marks(counts, end)
        entries = {name: {"shards": [], "remainder": None} for name in self.forms}
        tasks = self.tasks(counts)
        done = self.in_any_order(self.write, tasks)
        for number, task in enumerate(tasks):
            entries[task.subset]["shards"] += [to_builtins(sealed.entry) for sealed in done[number].shards]
            entries[task.subset]["remainder"] = to_builtins(done[number].remainder)
        return entries, end

    def parts(self):
        size, whole_texts = self.chance.choice([1, 50, 300, 2000, 1 << 20]), self.run.settings.overlong != "cut"
        return list(parts(self.run.shards, Cursor(), self.run.reading.manner, size, whole_texts=whole_texts))

    def in_any_order(self, function, tasks):
        """What a function makes of tasks, by their place in the list."""
        some = [number for number in range(len(tasks)) if self.chance.random() < 0.3]
        order = [*range(len(tasks)), *some]
        self.chance.shuffle(order)
        found = {}
        for number in order:
            made = sent(function(sent(tasks[number])))
            assert number not in found or made == found[number], "a task done again makes the same"
            found[number] = made
        return found

    def tokenized(self, planned):
        return self.in_any_order(lambda part: without_seconds(self.tokenize(part)), planned)

    def in_order(self, planned, done):
        """The counts that make up the run, each with the mark before it: up to the limit, and of an input shard no more
        than up to its end."""
        mark, limit, found, over = Mark(), self.run.settings.limit, [], None
        goes_on = False
        for number, part in enumerate(planned):
            some = done[number]
            if part.ranges[0].source == over:
                continue
            over = part.ranges[-1].source if some[-1].ends else over
            if limit is not None and mark.ordinal + sum(each.mark.ordinal for each in some) > limit:
                some = list(self.tokenize(replace(part, limit=limit - mark.ordinal)))
            for each in some:
                found.append((each, mark))
                mark = mark.plus(each.mark)
                goes_on = goes_on if each.empty else each.open
            if mark.ordinal == limit and not goes_on:
                break
        return found

    def check_marks(self, counts, end):
        """Reading on from a mark gives what is behind it."""
        reading = self.run.reading
        filled = [(each, mark) for each, mark in counts if not each.empty]
        for mark in self.chance.sample([mark for each, mark in filled if not each.opened], min(1, len(filled))):
            read = [reading.encode().counted(unit) for unit in reading.units(mark.cursor)]
            assert sum(each.count for each in read) == end.ordinal - mark.ordinal

    def faults_of(self, counts):
        """Write faults.jsonl; the mark at the end."""
        faults = [fault for each, mark in counts for fault in placed(each.faults, mark)]
        if faults:
            lines = [json.dumps(fault._asdict(), ensure_ascii=False) + "\n" for fault in faults]
            self.out.joinpath("faults.jsonl").write_bytes("".join(lines).encode("utf-8", "backslashreplace"))
        return counts[-1][1].plus(counts[-1][0].mark) if counts else Mark()

    def tasks(self, counts):
        """The shard tasks of all subsets."""
        course = Course({name: Start(form.strategy, form.shape.per_shard) for name, form in self.forms.items()})
        tasks = [task for each, mark in counts for task in course.add(each, mark)]
        return [*tasks, *course.finish()]


def sent(something):
    """As another process gets it."""
    return pickle.loads(pickle.dumps(something))


def without_seconds(counts):
    found = list(counts)
    for each in found:
        each.checks.seconds.clear()
    return found
