"""The one door between synchronous and asynchronous code: event loops are started here and nowhere else."""

import asyncio
import atexit
import contextlib
import queue
import signal
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T], *, answers_signals: bool = False) -> T:
    """The result of `main`, from synchronous code; also in a notebook, where a loop is running already.

    SIGTERM and SIGHUP, where they are a Ctrl-C, cancel `main` as that does, unless it `answers_signals` itself.

    >>> async def answer():
    ...     return 42
    >>> run(answer())
    42
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(main if answers_signals else _interrupted_alike(main))
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


async def _interrupted_alike(main: Coroutine[Any, Any, T]) -> T:
    """`main`, cancelled by SIGTERM and SIGHUP where they are a Ctrl-C, as asyncio does it for that one alone.

    Their exception, raised in the midst of the loop, may take a task's next step along: then that never ends, nor does
    the loop, which waits for it.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task
    came: list[bool] = []

    def interrupt() -> None:
        came.append(True)
        task.cancel()

    here = threading.current_thread() is threading.main_thread()  # no other can be told of signals
    others = (signal.SIGTERM, signal.SIGHUP) if here else ()
    alike = [number for number in others if signal.getsignal(number) is signal.default_int_handler]
    for number in alike:
        loop.add_signal_handler(number, interrupt)
    try:
        return await main
    except asyncio.CancelledError:
        if came:
            raise KeyboardInterrupt from None
        raise
    finally:
        for number in alike:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.default_int_handler)


class Alongside:
    """A coroutine in a thread and a loop of its own, beside whoever made it.

    Where it fails or is cancelled, `failed` is told why, in that thread. `close` cancels it, unless it has ended, and
    waits for its end; the end of the process closes it as well.

    >>> async def count(found):
    ...     found.append(1)
    ...     await asyncio.sleep(3600)
    >>> found = []
    >>> beside = Alongside(count(found), lambda error: found.append(type(error).__name__))
    >>> beside.call(found.append, 2)
    >>> beside.close()
    >>> found
    [1, 2, 'CancelledError']
    """

    def __init__(self, main: Coroutine[Any, Any, None], failed: Callable[[BaseException], None]) -> None:
        self._main, self._failed = main, failed
        self._begun = threading.Event()
        # A daemon, since the end of the process waits for no other: it is closed then, and so ends in good order.
        self._thread = threading.Thread(target=self._run, name="millstream", daemon=True)
        self._thread.start()
        self._begun.wait()
        atexit.register(self.close)

    def _run(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(self._inside())

    async def _inside(self) -> None:
        task = asyncio.current_task()
        assert task
        self._task, self._loop = task, asyncio.get_running_loop()
        self._begun.set()
        try:
            await self._main
        except BaseException as error:
            self._failed(error)
            if isinstance(error, asyncio.CancelledError):
                raise

    def call(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Have a function called in the loop; if it has ended, nothing happens."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)

    def close(self) -> None:
        self.call(self._task.cancel)
        if threading.current_thread() is not self._thread:  # where garbage is collected, of all places
            self._thread.join()
            atexit.unregister(self.close)


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
