import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygpt.data import DocumentSource, Mixture, TextDocuments, TextFiles, hash_split, hold_out
from tinygpt.errors import ConfigError, DataError

TEXTS = [f"document {number}" for number in range(2000)]


def _texts(source: DocumentSource) -> list[str]:
    return [text for text, _ in source.read()]


@settings(max_examples=25)
@given(fraction=st.floats(0.02, 0.98), seed=st.integers(-5, 5))
def test_every_document_falls_to_one_side_in_its_order(fraction: float, seed: int) -> None:
    training, validation = hash_split(TextDocuments(TEXTS), validation_fraction=fraction, seed=seed)
    sides = _texts(training), _texts(validation)
    assert sorted(sides[0] + sides[1]) == sorted(TEXTS)
    assert all(side == sorted(side, key=TEXTS.index) for side in sides)
    assert len(sides[1]) / len(TEXTS) == pytest.approx(fraction, abs=0.05)


def test_a_copy_falls_to_the_side_of_its_original() -> None:
    training, validation = hash_split(TextDocuments(TEXTS + TEXTS[::-1]), validation_fraction=0.3)
    assert not set(_texts(training)) & set(_texts(validation))


def test_adding_shards_moves_no_document_across(tmp_path: Path) -> None:
    def sides() -> tuple[set[str], set[str]]:
        training, validation = hash_split(TextFiles(tmp_path, separator="|"), validation_fraction=0.2)
        return set(_texts(training)), set(_texts(validation))

    (tmp_path / "b.txt").write_text("|".join(TEXTS[:500]))
    before = sides()
    (tmp_path / "a.txt").write_text("|".join(TEXTS[400:900]))
    (tmp_path / "c.txt").write_text("|".join(TEXTS[900:]))
    after = sides()
    assert before[0] < after[0]
    assert before[1] < after[1]


def test_a_mixture_is_divided_as_its_parts_are() -> None:
    parts = {"a": (TextDocuments(TEXTS[:1000]), 1.0), "b": (TextDocuments(TEXTS[1000:]), 3.0)}
    _, mixed = hash_split(Mixture(parts), validation_fraction=0.1)
    _, plain = hash_split(TextDocuments(TEXTS), validation_fraction=0.1)
    assert set(_texts(mixed)) == set(_texts(plain))


def test_a_larger_fraction_keeps_what_was_validation() -> None:
    small, large = (set(_texts(hash_split(TextDocuments(TEXTS), validation_fraction=f)[1])) for f in (0.1, 0.2))
    assert small < large


def test_seeds_divide_differently_and_the_same_seed_always_alike() -> None:
    divisions = [_texts(hash_split(TextDocuments(TEXTS), validation_fraction=0.1, seed=s)[1]) for s in (0, 1, 0)]
    assert divisions[0] == divisions[2]
    assert len(set(divisions[0]) & set(divisions[1])) < 60


def test_the_division_is_the_same_on_every_machine() -> None:
    _, validation = hash_split(TextDocuments(TEXTS), validation_fraction=0.003)
    assert _texts(validation) == ["document 210", "document 339", "document 358", "document 1423"]


def test_reading_from_any_cursor_gives_the_rest() -> None:
    for side in hash_split(TextDocuments(TEXTS[:60]), validation_fraction=0.5):
        everything = list(side.read())
        for index, (_, cursor) in enumerate(everything):
            assert list(side.read(json.loads(json.dumps(cursor)))) == everything[index + 1 :]


def test_sides_fractions_seeds_and_sources_have_fingerprints_of_their_own() -> None:
    prints = set()
    for texts in (TEXTS, TEXTS[1:]):
        for fraction, seed in ((0.1, 0), (0.2, 0), (0.1, 1)):
            sides = hash_split(TextDocuments(texts), validation_fraction=fraction, seed=seed)
            prints |= {side.fingerprint() for side in sides}
    assert len(prints) == 12


def test_a_side_can_go_to_another_process() -> None:
    training, _ = hash_split(TextDocuments(TEXTS), validation_fraction=0.1)
    assert _texts(pickle.loads(pickle.dumps(training))) == _texts(training)
    held_out = hold_out(TextDocuments(TEXTS), TextDocuments(TEXTS[:5]))
    assert _texts(pickle.loads(pickle.dumps(held_out))) == TEXTS[5:]


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_a_fraction_that_is_none_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"validation_fraction=.* is not a share; choose above 0 and below 1"):
        hash_split(TextDocuments(TEXTS), validation_fraction=fraction)


def test_a_side_without_documents_is_refused() -> None:
    training, validation = hash_split(TextDocuments(["one"]), validation_fraction=0.0001)
    assert _texts(training) == ["one"]
    with pytest.raises(DataError, match=r"no document falls to validation at validation_fraction=0\.0001"):
        _texts(validation)


def test_a_side_without_documents_tells_what_the_separator_that_was_given_made(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo", newline="\n")
    for separator, said in ((None, "unless a separator parts it"), ("@", "Parted by '@' the text has 1 document")):
        source = TextFiles(tmp_path, separator=separator)
        for each in (source, Mixture({"a": (source, 1.0)})):
            with pytest.raises(DataError, match=said):
                _texts(hash_split(each, validation_fraction=1e-9)[1])


def test_held_out_documents_do_not_reach_training() -> None:
    training = hold_out(TextDocuments(TEXTS * 2), TextDocuments([*TEXTS[::3], "and another"]))
    assert _texts(training) == [text for number, text in enumerate(TEXTS) if number % 3] * 2
    everything = list(training.read())
    assert list(training.read(everything[7][1])) == everything[8:]
    assert training.fingerprint() != hold_out(TextDocuments(TEXTS * 2), TextDocuments(TEXTS[::4])).fingerprint()


def test_holding_out_everything_is_refused() -> None:
    with pytest.raises(DataError, match="every document of the source is also in the validation source"):
        _texts(hold_out(TextDocuments(["a"]), TextDocuments(["a", "b"])))
