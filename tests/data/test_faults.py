"""What cannot be used is refused with a clear message, or passed over, counted and reported: never silently lost."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from tinygpt.data import JsonLines, Skipped, TextDocuments, TextFiles, hash_split, open_source, skipped_of
from tinygpt.errors import ConfigError, DataError


def _line(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


def _texts(source: JsonLines | TextFiles) -> list[str]:
    return [text for text, _ in source.read()]


BROKEN = {
    "not valid JSON": b'{"text": "cut o\n',
    "not a JSON object": b"[1]\n",
    "no key 'text'": b'{"body": "a"}\n',
    "not a string": b'{"text": 3}\n',
    "half a character": b'{"text": "\\ud800"}\n',
    "not valid UTF-8": b'{"text": "\xff"}\n',
    "too long": _line("x" * 5000),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_a_broken_line_is_skipped_and_counted_with_its_place(tmp_path: Path, reason: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(_line("one") + BROKEN[reason] + _line("two") + BROKEN[reason] * 2)
    source = JsonLines(tmp_path, on_error="skip", max_document_bytes=1000)
    with pytest.warns(UserWarning, match=r"^skipped: a\.jsonl"):
        assert _texts(source) == ["one", "two"]
    (skipped,) = source.skipped
    assert (skipped.file, skipped.reason, skipped.count) == ("a.jsonl", reason, 3)
    with pytest.raises(DataError) as raised:
        _texts(JsonLines(tmp_path, max_document_bytes=1000))
    assert skipped.first == str(raised.value)


@pytest.mark.parametrize("reason", BROKEN)
def test_reading_again_or_from_the_middle_counts_nothing_twice(tmp_path: Path, reason: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(_line("one") + BROKEN[reason] + _line("two") + BROKEN[reason])
    source = JsonLines(tmp_path, on_error="skip", max_document_bytes=1000)
    with pytest.warns(UserWarning, match="skipped"):
        (_, cursor), _ = source.read()
    counted = source.skipped
    assert [text for text, _ in source.read(cursor)] == ["two"]
    assert _texts(source) == ["one", "two"]
    assert source.skipped == counted
    assert counted[0].count == 2


def test_a_kind_of_fault_warns_once_and_another_kind_again(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(_line("one") + b"[1]\n[2]\n{}\n")
    source = JsonLines(tmp_path, on_error="skip")
    with pytest.warns(UserWarning, match="skipped") as warned:
        _texts(source)
    assert len(warned) == 2
    assert [(skipped.file, skipped.count) for skipped in source.skipped] == [
        ("a.jsonl", 1),
        ("a.jsonl", 2),
        ("b.jsonl", 1),
        ("b.jsonl", 2),
    ]


def test_a_broken_document_of_a_text_file_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one||\xff||" + b"x" * 50 + b"||two||\xfe")
    source = TextFiles(tmp_path, separator="||", max_document_bytes=20, on_error="skip")
    with pytest.warns(UserWarning, match="skipped"):
        assert _texts(source) == ["one", "two"]
    assert {skipped.reason: skipped.count for skipped in source.skipped} == {"not valid UTF-8": 2, "too long": 1}


@pytest.mark.parametrize(("size", "fits"), [(99, True), (100, True), (101, False)])
@pytest.mark.parametrize("separator", [None, "||"])
def test_the_longest_document_is_as_long_as_was_said(
    tmp_path: Path, size: int, fits: bool, separator: str | None
) -> None:
    (tmp_path / "a.txt").write_text("x" * size)
    source = TextFiles(tmp_path, separator=separator, max_document_bytes=100)
    if fits:
        assert _texts(source) == ["x" * size]
    else:
        with pytest.raises(DataError, match=r"a\.txt: the document at byte 0 has more than max_document_bytes=100"):
            _texts(source)


def test_a_100_mb_text_file_is_refused_and_the_error_asks_for_a_separator(tmp_path: Path) -> None:
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(100 << 20)
    with pytest.raises(DataError, match="give the separator between its documents, or raise the limit"):
        _texts(TextFiles(tmp_path))
    with pytest.raises(DataError, match=r"the separator '\\n' is not in it: give one that is, or raise the limit"):
        _texts(TextFiles(tmp_path, separator="\n"))


PACK: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "zst": zstandard.compress}


@pytest.mark.parametrize("suffix", PACK)
def test_a_compressed_file_that_was_cut_off_is_refused_or_its_rest_skipped(tmp_path: Path, suffix: str) -> None:
    lines = b"".join(_line(f"{number} {os.urandom(40).hex()}") for number in range(5000))
    packed = PACK[suffix](lines)
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(packed[: len(packed) // 2])
    (tmp_path / f"b.jsonl.{suffix}").write_bytes(PACK[suffix](_line("last")))
    with pytest.raises(DataError, match=rf"a\.jsonl\.{suffix} ends in the middle of its compressed data"):
        _texts(JsonLines(tmp_path))
    source = JsonLines(tmp_path, on_error="skip")
    with pytest.warns(UserWarning, match="was cut off"):
        texts = _texts(source)
    assert texts[-1] == "last"
    assert texts[:100] == [json.loads(line)["text"] for line in lines.splitlines()[:100]]
    assert [(skipped.file, skipped.reason) for skipped in source.skipped] == [(f"a.jsonl.{suffix}", "cut off")]


@pytest.mark.parametrize("suffix", PACK)
def test_a_compressed_file_that_is_damaged_is_refused_or_its_rest_skipped(tmp_path: Path, suffix: str) -> None:
    packed = PACK[suffix](b"".join(_line(os.urandom(40).hex()) for _ in range(5000)))
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(packed[:5000] + bytes(2000) + packed[7000:])
    (tmp_path / f"b.jsonl.{suffix}").write_bytes(PACK[suffix](_line("last")))
    with pytest.raises(DataError, match=rf"a\.jsonl\.{suffix}"):
        _texts(JsonLines(tmp_path))
    source = JsonLines(tmp_path, on_error="skip")
    with pytest.warns(UserWarning, match="skipped"):
        assert _texts(source)[-1] == "last"
    assert {skipped.file for skipped in source.skipped} == {f"a.jsonl.{suffix}"}


def test_a_file_that_is_not_compressed_as_it_says_is_refused(tmp_path: Path) -> None:
    for suffix in PACK:
        (tmp_path / f"a.jsonl.{suffix}").write_bytes(_line("one"))
        with pytest.raises(DataError, match=rf"a\.jsonl\.{suffix} cannot be read: damaged"):
            _texts(JsonLines(tmp_path / f"a.jsonl.{suffix}"))


def test_an_empty_file_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.txt").write_text("text")
    with pytest.warns(UserWarning, match=r"a\.txt is empty"):
        source = TextFiles(tmp_path, on_error="skip")
    assert _texts(source) == ["text"]
    assert [(skipped.file, skipped.reason, skipped.count) for skipped in source.skipped] == [("a.txt", "empty", 1)]
    (tmp_path / "b.txt").unlink()
    with pytest.warns(UserWarning, match="empty"), pytest.raises(DataError, match=r"every file of .* is empty"):
        TextFiles(tmp_path, on_error="skip")


def _three(folder: Path) -> None:
    for name in "abc":
        (folder / f"{name}.txt").write_text(f"{name}1|{name}2")


def test_a_file_deleted_or_changed_while_in_use_is_refused_or_skipped(tmp_path: Path) -> None:
    _three(tmp_path)
    strict = TextFiles(tmp_path, separator="|")
    lenient = TextFiles(tmp_path, separator="|", on_error="skip")
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.txt").write_text("now something else")
    with pytest.raises(DataError, match=r"a\.txt cannot be read: No such file"):
        _texts(strict)
    with pytest.warns(UserWarning, match="skipped"):
        assert _texts(lenient) == ["c1", "c2"]
    assert [(skipped.file, skipped.reason) for skipped in lenient.skipped] == [
        ("a.txt", "deleted or unreadable"),
        ("b.txt", "changed while in use"),
    ]


def test_a_file_changed_since_the_position_was_saved_is_refused_or_its_rest_skipped(tmp_path: Path) -> None:
    _three(tmp_path)
    _, _, (_, cursor), *_ = TextFiles(tmp_path, separator="|").read()
    (tmp_path / "b.txt").write_text("b1|b2 changed")
    with pytest.raises(DataError, match=r"b\.txt had 5 bytes when the position was saved and has 13 now"):
        list(TextFiles(tmp_path, separator="|").read(cursor))
    source = TextFiles(tmp_path, separator="|", on_error="skip")
    with pytest.warns(UserWarning, match="skipped"):
        assert [text for text, _ in source.read(cursor)] == ["c1", "c2"]
    assert [(skipped.file, skipped.count) for skipped in source.skipped] == [("b.txt", 1)]


def test_a_file_deleted_since_the_position_was_saved_is_refused_or_skipped(tmp_path: Path) -> None:
    _three(tmp_path)
    _, _, (_, cursor), *_ = TextFiles(tmp_path, separator="|").read()
    (tmp_path / "b.txt").unlink()
    with pytest.raises(DataError, match=r"saved in b\.txt, which is not among the files any more"):
        list(TextFiles(tmp_path, separator="|").read(cursor))
    source = TextFiles(tmp_path, separator="|", on_error="skip")
    with pytest.warns(UserWarning, match="skipped"):
        assert [text for text, _ in source.read(cursor)] == ["c1", "c2"]
    assert [(skipped.file, skipped.count) for skipped in source.skipped] == [("b.txt", 1)]


def test_files_added_before_the_saved_position_are_refused_or_the_position_found_again(tmp_path: Path) -> None:
    _three(tmp_path)
    _, _, (_, cursor), *_ = TextFiles(tmp_path, separator="|").read()
    (tmp_path / "a0.txt").write_text("added")
    with pytest.raises(DataError, match=r"saved in b\.txt, which is file 2 then, 3 now"):
        list(TextFiles(tmp_path, separator="|").read(cursor))
    source = TextFiles(tmp_path, separator="|", on_error="skip")
    with pytest.warns(UserWarning, match="skipped"):
        assert [text for text, _ in source.read(cursor)] == ["b2", "c1", "c2"]


def test_a_source_of_which_everything_was_skipped_is_refused_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"body": "text"}\n')
    source = JsonLines(tmp_path, on_error="skip")
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(DataError, match=r"no documents in a\.jsonl.*'body'"),
    ):
        _texts(source)


def test_skipping_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    _three(tmp_path)
    strict = [TextFiles(tmp_path, max_document_bytes=size).fingerprint() for size in (10, 20)]
    lenient = [TextFiles(tmp_path, max_document_bytes=size, on_error="skip").fingerprint() for size in (10, 20)]
    assert strict[0] == strict[1]
    assert len({*strict, *lenient}) == 3


def test_settings_that_cannot_be_are_refused(tmp_path: Path) -> None:
    _three(tmp_path)
    with pytest.raises(ConfigError, match="on_error='ignore' is not known; choose 'raise' or 'skip'"):
        TextFiles(tmp_path, on_error="ignore")  # type: ignore[arg-type]
    for kind in (TextFiles, JsonLines):
        with pytest.raises(ConfigError, match="max_document_bytes=0 is not positive"):
            kind(tmp_path, max_document_bytes=0)


def test_sources_made_of_others_show_what_those_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"".join(_line(f"text {number}") for number in range(50)) + b"[1]\n")
    source = open_source(tmp_path, on_error="skip")
    training, validation = hash_split(source, validation_fraction=0.5)
    with pytest.warns(UserWarning, match="skipped"):
        list(training.read())
    expected = (Skipped("a.jsonl", "not a JSON object", 1, skipped_of(source)[0].first),)
    assert skipped_of(training) == skipped_of(validation) == expected
    assert skipped_of(TextDocuments(["a"])) == ()
