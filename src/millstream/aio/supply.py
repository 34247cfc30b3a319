"""What a flow is asked to do: the items of an iterable, pulled when there is room for them and no sooner."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Generator, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
Items = Iterable[T] | AsyncIterable[T]


class Supply(Generic[T]):
    """Items of either kind of iterable. `pull` puts the next one into `stock`, or, of a `batched` async one, the next
    list of them.

    What is not there at once comes later; `pulled` is called then, and `ended` when nothing more will come: `over` is
    true from then on, and `failure` is what the iterable has raised, if it has.
    """

    def __init__(
        self, items: Items[T], *, batched: bool, pulled: Callable[[], None], ended: Callable[[], None]
    ) -> None:
        self.stock: deque[T] = deque()
        self.over = False
        self.failure: BaseException | None = None
        self.pulling: asyncio.Task[T] | None = None
        self._items, self._batched, self._tell_pulled, self._tell_ended = items, batched, pulled, ended
        self._iterator: Iterator[T] | AsyncIterator[T] | None = None

    @property
    def begun(self) -> bool:
        return self._iterator is not None

    def begin(self) -> None:
        items = self._items
        self._iterator = aiter(items) if isinstance(items, AsyncIterable) else iter(items)

    @property
    def waiting(self) -> bool:
        """Whether it is asked, and has not answered yet."""
        return self.pulling is not None and not self.pulling.done()

    def pull(self) -> None:
        """The next item goes into the stock, or the next batch; if there is one, and at once."""
        try:
            if not isinstance(self._iterator, AsyncIterator):
                assert self._iterator is not None
                item = next(self._iterator)
                if not self.over:  # stopped by the iterable itself
                    self.stock.append(item)
                return
            if self.pulling is None:
                self.pulling = asyncio.get_running_loop().create_task(_pull(self._iterator))
                self.pulling.add_done_callback(self._pulled)
            if not self.pulling.done():
                return
            pulled, self.pulling = self.pulling, None
            self.stock.extend(pulled.result() if self._batched else [pulled.result()])  # type: ignore[arg-type]
            if not self.stock:
                self.pull()  # after an empty batch
        except (StopIteration, _End):
            self._end(None)
        except (Exception, asyncio.CancelledError) as error:
            self._end(error)

    def _pulled(self, task: "asyncio.Task[T]") -> None:
        if not task.cancelled():
            task.exception()  # seen: it may be that nobody asks for it any more
        self._tell_pulled()

    def _end(self, failure: BaseException | None) -> None:
        self.over, self.failure = True, failure
        self._tell_ended()

    def stop(self) -> None:
        """Nothing more is wanted of it."""
        self.over = True
        self.stock.clear()
        if self.pulling:
            self.pulling.cancel()

    async def close(self) -> None:
        if isinstance(self._iterator, AsyncGenerator):
            await self._iterator.aclose()
        elif isinstance(self._iterator, Generator):
            self._iterator.close()


class _End(Exception):
    """StopAsyncIteration cannot be the result of a task."""


async def _pull(source: AsyncIterator[T]) -> T:
    try:
        return await anext(source)
    except StopAsyncIteration:
        raise _End from None
