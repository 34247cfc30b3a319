"""A worker process of the local engine: units come on standard input, results go to standard output."""

import os
import pickle
import queue
import threading
from typing import Any

from millstream.engines.local import keep_freed_memory, receive, send
from millstream.errors import RunError


def main() -> None:
    units: queue.SimpleQueue[Any] = queue.SimpleQueue()
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # Nobody else may write into the frames: whatever prints goes to standard error.
    source, target = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def read() -> None:
        # Reading all the time keeps the parent from waiting in a write while we wait in ours.
        try:
            while True:
                units.put(receive(source))
        except EOFError:
            os._exit(0)  # the parent is gone, killed perhaps: nobody wants the rest

    def write() -> None:
        # And writing in a thread of its own lets the next unit begin while the parent is busy with others.
        try:
            while True:
                send(target, answers.get())
        except BaseException:  # the parent is gone, or a result cannot be pickled: either way this worker is done
            os._exit(1)

    keep_freed_memory()
    threading.Thread(target=read, daemon=True).start()
    threading.Thread(target=write, daemon=True).start()
    functions: list[Any] = []
    while True:
        number, content = units.get()
        if number is None:
            functions.append(content)
            continue
        which, unit = content
        try:
            answer = (number, False, functions[which](unit))
        except BaseException as error:
            answer = (number, True, portable(error))
        answers.put(answer)


def portable(error: BaseException) -> BaseException:
    """The error, or one with its words if it cannot be sent: the classes of some libraries cannot be imported."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except (pickle.PickleError, AttributeError, ImportError, TypeError, ValueError):
        return RunError(f"{type(error).__name__}: {error}")
