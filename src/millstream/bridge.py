"""The one door between synchronous and asynchronous code: event loops are started here and nowhere else."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """The result of `main`, from synchronous code; also in a notebook, where a loop is running already.

    >>> async def answer():
    ...     return 42
    >>> run(answer())
    42
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(main)
    # A loop cannot wait for itself: another thread runs one of its own while this one waits.
    result: list[T] = []
    failure: list[BaseException] = []

    def in_thread() -> None:
        try:
            result.append(asyncio.run(main))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=in_thread, name="millstream")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]
