import pytest

from tinygpt.data import TextDocuments
from tinygpt.errors import ConfigError, DataError
from tinygpt.tokenizer import BPETokenizer, ByteTokenizer, tokenizer_report

TRAIN = ["the ship sailed over the sea", "the whale swam under the ship"]
VALIDATION = ["größe\t🐋", "", "the ship\nsank"]


def test_figures_are_those_of_encoding_text_by_text(bpe: BPETokenizer) -> None:
    report = tokenizer_report(bpe, TextDocuments(TRAIN), TextDocuments(VALIDATION))
    for texts, measured in ((TRAIN, report.train), (VALIDATION, report.validation)):
        ids = [token_id for text in texts for token_id in bpe.encode(text)]
        num_bytes = sum(len(text.encode()) for text in texts)
        assert (measured.documents, measured.num_bytes, measured.num_tokens) == (len(texts), num_bytes, len(ids))
        assert measured.tokens_seen == len(set(ids))
        assert measured.bytes_per_token == num_bytes / len(ids)


def test_texts_may_be_an_iterable_or_a_source(bpe: BPETokenizer) -> None:
    sources = tokenizer_report(bpe, TextDocuments(TRAIN), TextDocuments(VALIDATION))
    assert tokenizer_report(bpe, iter(TRAIN), VALIDATION) == sources


def test_the_longest_tokens_come_first_and_are_no_special_ones(bpe: BPETokenizer) -> None:
    longest = tokenizer_report(bpe, TRAIN, VALIDATION).longest
    lengths = [len(token) for token in longest]
    assert lengths == sorted(bpe.token_bytes(), reverse=True)[: len(lengths)]
    assert b"<|bos|>" not in longest


def test_samples_are_the_text_cut_into_tokens(bpe: BPETokenizer) -> None:
    report = tokenizer_report(bpe, TRAIN, VALIDATION)
    assert [b"".join(sample).decode() for sample in report.samples] == [VALIDATION[0], VALIDATION[2]]


def test_the_report_as_text_shows_every_part_on_lines_of_its_own(bpe: BPETokenizer) -> None:
    report = tokenizer_report(bpe, TRAIN, VALIDATION)
    text = str(report)
    assert f"{report.train.bytes_per_token:.3f}" in text
    assert f"{report.validation.bytes_per_token:.3f}" in text
    assert "\\t" in text
    assert "\\n" in text
    assert text.count("a sample of validation") == 2
    assert all(line.isprintable() for line in text.split("\n"))


def test_any_tokenizer_can_be_measured() -> None:
    report = tokenizer_report(ByteTokenizer(), TRAIN, VALIDATION)
    assert report.train.bytes_per_token == 1
    assert "\\xf0" in str(report)  # a byte that is no character


def test_reading_stops_after_the_document_that_reaches_the_limit(bpe: BPETokenizer) -> None:
    report = tokenizer_report(bpe, TRAIN * 50, VALIDATION * 50, max_characters=len(TRAIN[0]) + 1)
    assert report.train.documents == 2
    with pytest.raises(ConfigError, match="max_characters=0 is not positive"):
        tokenizer_report(bpe, TRAIN, VALIDATION, max_characters=0)


def test_no_text_is_refused(bpe: BPETokenizer) -> None:
    with pytest.raises(DataError, match="the validation texts have nothing to encode"):
        tokenizer_report(bpe, TRAIN, [""])
    with pytest.raises(DataError, match="would be read letter by letter"):
        tokenizer_report(bpe, "text", VALIDATION)
