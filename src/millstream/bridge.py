"""The one door between synchronous and asynchronous code: event loops are started here and nowhere else."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
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
    ended = threading.Event()
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []

    async def inside() -> T:
        task = asyncio.current_task()
        assert task
        running.append((asyncio.get_running_loop(), task))
        return await main

    def in_thread() -> None:
        try:
            result.append(asyncio.run(inside()))
        except BaseException as error:
            failure.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=in_thread, name="millstream")
    thread.start()
    try:
        ended.wait()  # a `join` that is interrupted takes the thread for ended, before Python 3.13
    except KeyboardInterrupt:  # the other thread, which knows nothing of it, must not go on
        for loop, task in running:
            with contextlib.suppress(RuntimeError):  # closed by now
                loop.call_soon_threadsafe(task.cancel)
        ended.wait()
        raise
    finally:
        thread.join()
    if failure:
        raise failure[0]
    return result[0]


async def in_thread(items: Iterator[T]) -> AsyncIterator[T]:
    """The items of an iterator that blocks, without blocking the loop: each is awaited in a thread, when it is wanted.

    The thread ends with the process: a read that nothing will ever answer keeps nobody waiting.
    """
    loop = asyncio.get_running_loop()
    wanted: queue.SimpleQueue[asyncio.Future[Any] | None] = queue.SimpleQueue()

    def work() -> None:
        while (future := wanted.get()) is not None:
            found: tuple[Any, BaseException | None]
            try:
                found = (next(items), None)
            except StopIteration:
                found = (_END, None)
            except BaseException as error:
                found = (None, error)
            try:
                loop.call_soon_threadsafe(_fulfil, future, *found)
            except RuntimeError:
                return  # the loop is closed: nobody waits any more

    threading.Thread(target=work, name="millstream-source", daemon=True).start()
    try:
        while True:
            wanted.put(future := loop.create_future())
            if (item := await future) is _END:
                return
            yield item
    finally:
        wanted.put(None)


_END: Any = object()


def _fulfil(future: "asyncio.Future[Any]", value: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)
