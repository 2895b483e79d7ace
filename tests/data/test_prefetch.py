import gc
import threading
import time
from collections.abc import Iterator
from itertools import count, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygpt.data._prefetch import Ahead, map_ahead


def _failing(after: int) -> Iterator[int]:
    yield from range(after)
    raise ValueError("the end is broken")


def _until(condition: object, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


@given(items=st.lists(st.integers()), depth=st.integers(0, 5))
def test_ahead_yields_the_same_items_in_the_same_order(items: list[int], depth: int) -> None:
    ahead = Ahead(iter(items), depth)
    assert list(ahead) == items
    assert next(ahead, "ended") == "ended"
    ahead.close()


@given(items=st.lists(st.integers()), workers=st.integers(0, 4))
def test_map_ahead_is_map(items: list[int], workers: int) -> None:
    assert list(map_ahead(lambda item: item * 2, items, workers=workers)) == [item * 2 for item in items]


def test_ahead_works_ahead_by_its_depth_and_no_further() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in count():
            taken.append(number)
            yield number

    ahead = Ahead(items(), 3)
    assert next(ahead) == 0
    assert _until(lambda: len(taken) == 4)
    time.sleep(0.05)
    assert taken == [0, 1, 2, 3]
    ahead.close()


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_an_error_comes_behind_the_items_before_it(depth: int) -> None:
    ahead = Ahead(_failing(3), depth)
    assert list(islice(ahead, 3)) == [0, 1, 2]
    with pytest.raises(ValueError, match="the end is broken"):
        next(ahead)
    ahead.close()


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("after", [0, 1, 20])
def test_an_error_of_the_items_comes_behind_the_results_before_it(workers: int, after: int) -> None:
    results = map_ahead(lambda item: -item, _failing(after), workers=workers)
    assert list(islice(results, after)) == [-item for item in range(after)]
    with pytest.raises(ValueError, match="the end is broken"):
        next(results)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_function_is_raised_in_its_place(workers: int) -> None:
    results = map_ahead(lambda item: 1 // item, [1, 1, 0, 1], workers=workers)
    assert list(islice(results, 2)) == [1, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_close_waits_until_the_items_are_left_alone() -> None:
    running = threading.Event()

    def slow() -> Iterator[int]:
        for number in count():
            running.set()
            time.sleep(0.05)
            running.clear()
            yield number

    ahead = Ahead(slow(), 2)
    next(ahead)
    ahead.close()
    assert not running.is_set()


def test_threads_end_when_they_are_forgotten() -> None:
    def ours() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("tinygpt-")]

    gc.collect()
    assert _until(lambda: not ours())
    ahead, mapped = Ahead(count(), 2), map_ahead(abs, count(), workers=2)
    next(ahead), next(mapped)
    assert ours()
    del ahead, mapped
    gc.collect()
    assert _until(lambda: not ours())
