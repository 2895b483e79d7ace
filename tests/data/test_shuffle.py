from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygpt.data import _shuffle
from tinygpt.data._documents import Cursor
from tinygpt.data._packing import TokenArray
from tinygpt.data._shuffle import Place, collect_windows, permutation, shuffled
from tinygpt.errors import DataError

START = Place()


def _documents(count: int, cursor: Cursor | None = None) -> Iterator[tuple[TokenArray, Cursor]]:
    for number in range(cursor["document"] if cursor else 0, count):
        yield np.array([number], dtype=np.int32), {"document": number + 1}


def _order(count: int, place: Place = START, **settings: int) -> list[tuple[int, Place]]:
    arguments = {"seed": 1, "epoch": 0, "window_documents": 10, **settings}
    windows = collect_windows(partial(_documents, count), place, arguments.pop("window_documents"))
    placed = shuffled(windows, place, **arguments)
    return [(int(tokens[0]), behind) for tokens, behind in placed]


@given(count=st.integers(0, 60), window=st.integers(1, 25), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 9))
def test_every_document_comes_once_and_stays_in_its_window(count: int, window: int, seed: int, epoch: int) -> None:
    numbers = [number for number, _ in _order(count, window_documents=window, seed=seed, epoch=epoch)]
    assert sorted(numbers) == list(range(count))
    for start in range(0, count, window):
        assert set(numbers[start : start + window]) == set(range(start, min(start + window, count)))


@given(count=st.integers(1, 60), window=st.integers(1, 25), data=st.data())
def test_any_place_can_be_gone_on_from(count: int, window: int, data: st.DataObject) -> None:
    whole = _order(count, window_documents=window)
    at = data.draw(st.integers(0, count - 1))
    assert _order(count, whole[at][1], window_documents=window) == whole[at + 1 :]


def test_seed_epoch_and_window_each_give_another_order() -> None:
    orders = [
        permutation(50, seed=seed, epoch=epoch, window=window)
        for seed in (0, 1, 2**64 - 1)
        for epoch in (0, 1)
        for window in (0, 1, 2)
    ]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert permutation(50, seed=0, epoch=0, window=0) == permutation(50, seed=0, epoch=0, window=0)


def test_permutations_are_even() -> None:
    """Each number stands at each place about equally often: chi-square with 81 degrees of freedom."""
    counts = np.zeros((10, 10))
    for seed in range(2000):
        counts[range(10), permutation(10, seed=seed, epoch=0, window=0)] += 1
    assert ((counts - 200) ** 2 / 200).sum() < 81 + 5 * (2 * 81) ** 0.5


def test_long_documents_close_a_window_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_shuffle, "WINDOW_TOKENS", 3)
    numbers = [number for number, _ in _order(9, window_documents=100)]
    assert [set(numbers[start : start + 3]) for start in (0, 3, 6)] == [{0, 1, 2}, {3, 4, 5}, {6, 7, 8}]


def test_a_place_behind_the_end_of_its_window_is_refused() -> None:
    with pytest.raises(DataError, match="the loader state is damaged: 7 documents were taken of window 2, which has 5"):
        _order(5, Place(None, 2, 7))


def test_a_window_the_source_no_longer_gives_is_passed_over_with_a_warning() -> None:
    """The place was saved in the first window, which ended at document 12 then."""
    with pytest.warns(UserWarning, match="the source gives other documents than .* left of 10 shuffled together is"):
        numbers = [number for number, _ in _order(30, Place(None, 0, 3, {"document": 12}))]
    assert sorted(numbers) == list(range(12, 30))
    assert set(numbers[:10]) == set(range(12, 22))
