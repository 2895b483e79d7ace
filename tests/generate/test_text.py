"""Streamed text: whole characters, no part of a stop string, and all of the rest."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygpt.generate._text import TextStream


def streamed(data: bytes, cuts: list[int], stops: list[str]) -> tuple[str, bool]:
    stream = TextStream(stops)
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    text = "".join(stream.push(data[start:end]) for start, end in pairwise(edges))
    return text + stream.finish(), stream.stopped


def letter_by_letter(text: str, stops: list[str]) -> tuple[str, bool]:
    for end in range(1, len(text) + 1):
        places = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if places:
            return text[: min(places)], True
    return text, False


@given(
    text=st.text(alphabet="abcé😀", max_size=30),
    stops=st.lists(st.text(alphabet="abcé😀", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 200), max_size=20),
)
def test_pieces_join_to_the_text_before_the_first_stop_string(text: str, stops: list[str], cuts: list[int]) -> None:
    assert streamed(text.encode(), cuts, stops) == letter_by_letter(text, stops)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    stream = TextStream(["\nUser:"])
    assert stream.push(b"Hi.\nUs") == "Hi."
    assert stream.push(b"e it") == "\nUse it"
    assert stream.push(b".\nUser: no") == "."
    assert stream.stopped
    assert stream.push(b"more") == ""
    assert stream.finish() == ""


def test_what_was_held_back_comes_when_the_text_ends() -> None:
    stream = TextStream(["END"])
    assert stream.push(b"the EN") == "the "
    assert stream.finish() == "EN"
    assert not stream.stopped


@pytest.mark.parametrize("data", ["é".encode()[:1], "😀".encode()[:3], b"\xff"])
def test_half_a_character_at_the_end_becomes_the_replacement_character(data: bytes) -> None:
    assert streamed(b"a" + data, [], [])[0] == "a\ufffd"
