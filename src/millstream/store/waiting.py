"""Calls that may take long, made by threads, so that who waits for them can be interrupted."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Underway(Generic[T]):
    """A call that a thread makes; the thread ends with the process, whatever it waits for."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._results: list[T] = []
        self._error: BaseException | None = None

        def work() -> None:
            try:
                self._results.append(call())
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=work, name="millstream-ask", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> None:
        """For its end, but not for ever."""
        self._thread.join(seconds)

    def result(self) -> T:
        """What the call has given, or raised."""
        self._thread.join()
        if self._error:
            raise self._error
        return self._results[0]


def interruptible(call: Callable[[], T]) -> T:
    """What a call gives. Where signals are answered, in the main thread, Ctrl-C does not wait for its end: code that is
    not Python's hears of it only then.

    >>> interruptible(lambda: 1)
    1
    """
    return Underway(call).result() if threading.current_thread() is threading.main_thread() else call()
