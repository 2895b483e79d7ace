"""Work done ahead of its use, by threads, in an order that does not depend on how many there are."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Self, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Ahead(Generic[T]):
    """An iterator that computes the next items of another in one background thread.

    The thread lives in an executor: it ends when a forgotten `Ahead` is collected, and the end of the program waits
    for no more than the items already asked for.

    Args:
        items: What to compute ahead; only the thread touches it from now on.
        depth: How many items to hold ready; 0 computes each when it is asked for, without a thread.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._items = items
        self._depth = depth
        self._pending: deque[Future[tuple[T] | None]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tinygpt-ahead") if depth else None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        if self._pool is None:
            return next(self._items)
        # One more than `depth`: the item about to be handed out.
        while len(self._pending) <= self._depth:
            self._pending.append(self._pool.submit(_take, self._items))
        item = self._pending.popleft().result()
        if item is None:
            raise StopIteration
        return item[0]

    def close(self) -> None:
        """Drop what is ready and wait until the thread has left the items alone.

        Never to be called while an object is being collected: that may happen in any thread, this one included.
        """
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _take(items: Iterator[T]) -> tuple[T] | None:
    for item in items:
        return (item,)
    return None


def map_ahead(function: Callable[[T], R], items: Iterable[T], *, workers: int) -> Iterator[R]:
    """Yield `function(item)` for each item in order, computed by threads up to two a worker ahead.

    An error of `items` is raised behind the results of what came before it, as without threads.

    Args:
        function: What to compute; it should spend its time without holding Python's lock.
        items: Read by the caller's thread.
        workers: Number of threads; 0 computes in the caller's thread.
    """
    if workers == 0:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="tinygpt-map")
    pending: deque[Future[R]] = deque()
    failure: Exception | None = None
    iterator = iter(items)
    try:
        while failure is None:
            try:
                item = next(iterator)
            except StopIteration:
                break
            except Exception as error:
                failure = error
            else:
                pending.append(pool.submit(function, item))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
        if failure is not None:
            raise failure
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
