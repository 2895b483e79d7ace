import hashlib
import re
from importlib.resources import files

import pytest

from tinygpt.data import embedded_corpus
from tinygpt.errors import DataError


def _texts(split: str) -> list[str]:
    return [text for text, _ in embedded_corpus(split).read()]  # type: ignore[arg-type]


def test_the_file_is_the_one_its_source_note_describes() -> None:
    folder = files("tinygpt.data") / "corpus"
    content = (folder / "moby_dick.txt").read_bytes()
    note = (folder / "SOURCE.md").read_text()
    assert len(content) == 1_204_997
    assert hashlib.sha256(content).hexdigest() in note


def test_the_parts_are_chapters_and_every_twelfth_is_validation() -> None:
    numbers = {
        split: [int(re.match(r"CHAPTER (\d+)\. ", text)[1]) for text in _texts(split)]  # type: ignore[index]
        for split in ("train", "validation")
    }
    assert numbers["validation"] == list(range(12, 136, 12))
    assert sorted(numbers["train"] + numbers["validation"]) == list(range(1, 136))


def test_no_word_of_the_book_is_lost() -> None:
    book = (files("tinygpt.data") / "corpus" / "moby_dick.txt").read_text(encoding="utf-8")
    words = sum(len(text.split()) for split in ("train", "validation") for text in _texts(split))
    assert words == len(book.split())


def test_training_is_the_default_part() -> None:
    assert embedded_corpus().fingerprint() == embedded_corpus("train").fingerprint()
    assert embedded_corpus().fingerprint() != embedded_corpus("validation").fingerprint()


def test_another_part_is_refused() -> None:
    with pytest.raises(DataError, match="split='test' is not a part of the corpus; choose 'train' or 'validation'"):
        embedded_corpus("test")  # type: ignore[arg-type]
