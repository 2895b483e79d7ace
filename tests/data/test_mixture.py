import json
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygpt.data import BatchLoader, DocumentSource, IterableDocuments, Mixture, TextDocuments
from tinygpt.errors import ConfigError, DataError
from tinygpt.tokenizer import ByteTokenizer


def _source(letter: str, count: int, length: int = 10) -> TextDocuments:
    return TextDocuments([f"{letter}{number:04}".ljust(length, letter) for number in range(count)])


def _mixture(*, seed: int = 0, **weights: float) -> Mixture:
    sizes = {"a": (300, 10), "b": (40, 100), "c": (20, 30)}
    return Mixture({name: (_source(name, *sizes[name]), weight) for name, weight in weights.items()}, seed=seed)


def _shares(texts: list[str]) -> dict[str, float]:
    total = sum(len(text) + 1 for text in texts)
    return {name: sum(len(text) + 1 for text in texts if text[0] == name) / total for name in "abc"}


@settings(max_examples=50)
@given(weights=st.lists(st.floats(0.05, 1), min_size=3, max_size=3), seed=st.integers(0, 9))
def test_at_any_place_each_source_has_given_its_share_to_within_a_document(weights: list[float], seed: int) -> None:
    mixture = _mixture(a=weights[0], b=weights[1], c=weights[2], seed=seed)
    given_so_far = dict.fromkeys("abc", 0)
    for text, _ in mixture.read():
        given_so_far[text[0]] += len(text) + 1
        total = sum(given_so_far.values())
        for name, weight in zip("abc", weights, strict=True):
            assert abs(given_so_far[name] - total * weight / sum(weights)) <= 2 * 101


@settings(max_examples=30)
@given(seed=st.integers(0, 5), weights=st.lists(st.sampled_from([0.0, 0.1, 1, 3]), min_size=2, max_size=2))
def test_reading_from_any_cursor_gives_the_rest(seed: int, weights: list[float]) -> None:
    mixture = _mixture(a=1, b=weights[0], c=weights[1], seed=seed)
    everything = list(mixture.read())
    for index in range(0, len(everything), len(everything) // 5):
        restored = json.loads(json.dumps(everything[index][1]))
        again = _mixture(a=1, b=weights[0], c=weights[1], seed=seed)
        assert list(again.read(restored)) == everything[index + 1 :]


def test_an_epoch_reads_every_source_to_its_end_and_the_small_ones_again() -> None:
    texts = [text for text, _ in _mixture(a=0.5, b=0.25, c=0.25).read()]
    for name, count in [("a", 300), ("b", 40), ("c", 20)]:
        given_texts = [text for text in texts if text[0] == name]
        assert len(set(given_texts)) == count
        for start in range(0, len(given_texts), count):  # in order, pass after pass
            part = given_texts[start : start + count]
            assert part == given_texts[: len(part)]
    assert sum(text[0] == "c" for text in texts) > 20


def test_the_seed_decides_the_order_and_equal_seeds_give_equal_orders() -> None:
    texts = {
        seed: [text for text, _ in Mixture({n: (_source(n, 9), 1) for n in "abc"}, seed=seed).read()]
        for seed in range(6)
    }
    again = [text for text, _ in Mixture({n: (_source(n, 9), 1) for n in "abc"}, seed=3).read()]
    assert texts[3] == again
    assert len({tuple(order[:3]) for order in texts.values()}) > 1


def test_the_order_of_the_parts_does_not_matter() -> None:
    parts = {name: (_source(name, 20), weight) for name, weight in [("a", 0.3), ("b", 0.7)]}
    one, other = Mixture(parts), Mixture(dict(reversed(parts.items())))
    assert [text for text, _ in one.read()] == [text for text, _ in other.read()]
    assert one.fingerprint() == other.fingerprint()


def test_a_weight_of_zero_leaves_a_source_out_until_it_is_brought_in() -> None:
    mixture = _mixture(a=1, b=0, c=0)
    assert {text[0] for text, _ in mixture.read()} == {"a"}
    _, cursor = next(mixture.read())
    rest = [text for text, _ in mixture.with_weights({"a": 1, "b": 0, "c": 1}).read(cursor)]
    assert {text[0] for text in rest} == {"a", "c"}
    assert rest[1].startswith(("a0001", "c0000"))


def test_with_weights_goes_on_in_every_source_with_the_new_shares() -> None:
    mixture = _mixture(a=0.9, b=0.1, c=0.1)
    documents = list(islice(mixture.read(), 100))
    first, cursor = [text for text, _ in documents], documents[-1][1]
    later = mixture.with_weights({"a": 0.2, "b": 0.2, "c": 0.6})
    rest = [text for text, _ in later.read(json.loads(json.dumps(cursor)))]
    for name, count in [("a", 300), ("b", 40), ("c", 20)]:
        together = [text for text in first + rest if text[0] == name]
        assert [int(text[1:5]) for text in together] == [number % count for number in range(len(together))]
    assert _shares(rest[:150]) == pytest.approx({"a": 0.2, "b": 0.2, "c": 0.6}, abs=0.05)


def test_with_weights_keeps_the_fingerprint_and_other_weights_of_their_own_do_not() -> None:
    mixture = _mixture(a=0.9, b=0.1)
    changed = mixture.with_weights({"a": 0.5, "b": 0.5})
    assert changed.fingerprint() == mixture.fingerprint()
    assert changed.weights == {"a": 0.5, "b": 0.5}
    assert mixture.weights == {"a": 0.9, "b": 0.1}
    prints = {mixture.fingerprint(), _mixture(a=0.5, b=0.5).fingerprint(), _mixture(a=0.9, b=0.1, seed=1).fingerprint()}
    assert len(prints) == 3


def test_a_phase_goes_on_exactly_and_takes_up_the_phase_before() -> None:
    mixture = _mixture(a=0.9, b=0.1)
    _, cursor = next(mixture.read())
    later = mixture.with_weights({"a": 0.5, "b": 0.5})
    everything = list(later.read(cursor))
    assert list(later.read(everything[30][1])) == everything[31:]
    last = later.with_weights({"a": 0.1, "b": 0.9})
    assert next(last.read(everything[30][1]))
    with pytest.raises(DataError, match=r"saved with the weights .* build it with those, then change them"):
        list(mixture.read(everything[30][1]))


def test_a_loader_changes_weights_between_phases_and_loses_no_place() -> None:
    def loader(source: DocumentSource) -> BatchLoader:
        return BatchLoader(source, ByteTokenizer(), rows=2, seq_len=64, buffer_documents=4, overflow="carry")

    mixture = _mixture(a=0.9, b=0.1)
    first = loader(mixture)
    for _ in range(5):
        next(first)
    later = mixture.with_weights({"a": 0.1, "b": 0.9})
    second, third = loader(later), loader(later)
    second.load_state_dict(first.state_dict())
    third.load_state_dict(first.state_dict())
    for _ in range(5):
        assert next(second).inputs.tolist() == next(third).inputs.tolist()


def test_a_mixture_of_mixtures_is_a_source() -> None:
    inner = Mixture({"a": (_source("a", 30), 1), "b": (_source("b", 30), 1)})
    outer = Mixture({"ab": (inner, 1), "c": (_source("c", 60), 1)})
    everything = list(outer.read())
    assert {text[0] for text, _ in everything} == {"a", "b", "c"}
    assert list(outer.read(json.loads(json.dumps(everything[40][1])))) == everything[41:]


def test_empty_documents_do_not_hold_up_the_others() -> None:
    mixture = Mixture({"a": (TextDocuments([""] * 5), 1), "b": (_source("b", 5), 1)})
    texts = [text for text, _ in mixture.read()]
    assert "b0004bbbbb" in texts


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "a mixture of no parts"),
        ({"a": -1.0}, "the weight -1.0 of 'a' is not a share"),
        ({"a": float("nan")}, "the weight nan of 'a' is not a share"),
        ({"a": 0.0, "b": 0.0}, "every weight is 0"),
    ],
)
def test_weights_that_cannot_be_are_refused(parts: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mixture({name: (_source(name, 2), weight) for name, weight in parts.items()})


def test_with_weights_wants_every_name() -> None:
    with pytest.raises(ConfigError, match=r"weights are for \['a', 'x'\] and the sources are \['a', 'b'\]"):
        _mixture(a=1, b=1).with_weights({"a": 1, "x": 1})


def test_a_cursor_of_another_mixture_is_refused() -> None:
    for cursor in ({}, {"document": 1}, next(_mixture(a=1, c=1).read())[1]):
        with pytest.raises(DataError, match="does not belong to this mixture of a, b"):
            list(_mixture(a=1, b=1).read(cursor))


class Nothing:
    def read(self, cursor=None):
        return iter(())

    def fingerprint(self) -> str:
        return "nothing"


def test_a_part_without_documents_is_refused() -> None:
    with pytest.raises(DataError, match="the part 'b' of the mixture has no documents"):
        list(Mixture({"a": (_source("a", 3), 1), "b": (Nothing(), 1)}).read())
    with pytest.raises(DataError, match="the iterable is empty"):
        list(Mixture({"a": (_source("a", 3), 1), "b": (IterableDocuments([]), 1)}).read())
