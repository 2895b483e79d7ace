import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import pytest

from tinygpt.data import TextDocuments
from tinygpt.errors import ConfigError, DataError, MissingDependencyError
from tinygpt.tokenizer import train_bpe

TEXTS = ["low lower lowest newer newest wider widest 1851", "the whale, the ship, the sea"] * 4


def test_vocab_size_counts_every_id() -> None:
    tokenizer = train_bpe(TEXTS, vocab_size=290)
    assert tokenizer.vocab_size == 290
    assert len(tokenizer.token_bytes()) == 290


def test_the_first_merge_is_the_most_frequent_pair() -> None:
    text = "ab ab ab ab cd cd cd"
    pairs = Counter(pair for word in text.split() for pair in pairwise(word))
    (first, _), *_ = pairs.most_common()
    tokenizer = train_bpe([text], vocab_size=266, pattern=r"\w+|\W")
    assert tokenizer.decode([256]) == "".join(first)


def test_training_again_gives_the_same_tokenizer() -> None:
    assert train_bpe(TEXTS, vocab_size=290).fingerprint() == train_bpe(iter(TEXTS), vocab_size=290).fingerprint()


def test_training_makes_text_shorter() -> None:
    tokenizer = train_bpe(TEXTS, vocab_size=290)
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_the_smallest_vocabulary_has_no_merges() -> None:
    assert train_bpe([], vocab_size=265).encode("ab") == [97, 98]


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size=264 has no room for 256 bytes and 9 special tokens; choose 265"):
        train_bpe(TEXTS, vocab_size=264)


def test_too_little_text_is_refused_and_what_it_gives_is_named() -> None:
    with pytest.raises(DataError, match=r"too small for vocab_size=5000: .* choose vocab_size=(\d+) or less") as raised:
        train_bpe(TEXTS, vocab_size=5000)
    reached = int(str(raised.value).split("vocab_size=")[-1].split()[0])
    assert train_bpe(TEXTS, vocab_size=reached).vocab_size == reached


def test_one_string_instead_of_a_list_is_refused() -> None:
    with pytest.raises(DataError, match="would be read letter by letter"):
        train_bpe("some text", vocab_size=300)


@pytest.mark.parametrize(("text", "message"), [("a\ud800", "surrogate"), (b"abc", "got bytes")])
def test_unusable_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        train_bpe(["fine", text], vocab_size=300)


def test_an_unusable_pattern_is_refused_before_any_text_is_read() -> None:
    texts = iter(TEXTS)
    with pytest.raises(DataError, match="not a valid regular expression"):
        train_bpe(texts, vocab_size=300, pattern="(")
    with pytest.raises(DataError, match="does not match every character"):
        train_bpe(texts, vocab_size=300, pattern="[a-z]+")
    assert next(texts) == TEXTS[0]


def test_an_error_in_the_texts_is_passed_on() -> None:
    def broken():
        yield "fine"
        raise ValueError("from the generator")

    with pytest.raises(ValueError, match="from the generator"):
        train_bpe(broken(), vocab_size=300)


def test_without_rustbpe_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rustbpe", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "tinygpt\[tokenizer\]"'):
        train_bpe(TEXTS, vocab_size=300)


def test_reading_stops_after_the_document_that_reaches_the_limit() -> None:
    read = []

    def texts() -> Iterator[str]:
        for number in range(10):
            read.append(number)
            yield "some words and some more words " * 10

    limited = train_bpe(texts(), vocab_size=270, max_characters=600)
    assert read == [0, 1]
    assert (
        limited.fingerprint() == train_bpe(["some words and some more words " * 10] * 2, vocab_size=270).fingerprint()
    )


def test_a_document_source_is_read_as_its_texts() -> None:
    from_source = train_bpe(TextDocuments(TEXTS), vocab_size=290)
    assert from_source.fingerprint() == train_bpe(TEXTS, vocab_size=290).fingerprint()


def test_progress_is_shown_on_standard_error_and_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = train_bpe(TEXTS, vocab_size=290)
    assert capsys.readouterr().err == ""
    shown = train_bpe(TEXTS, vocab_size=290, progress=True)
    output = capsys.readouterr()
    assert shown.fingerprint() == quiet.fingerprint()
    assert "reading text" in output.err
    assert "merging" in output.err
    assert output.out == ""
