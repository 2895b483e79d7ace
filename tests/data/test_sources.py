"""What every document source promises, and what each refuses."""

import gzip
import json
import os
import pickle
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygpt.data import (
    DocumentSource,
    IterableDocuments,
    JsonLines,
    ParquetFiles,
    TextDocuments,
    TextFiles,
    open_source,
)
from tinygpt.data import _files as files_module
from tinygpt.data import _formats as formats_module
from tinygpt.errors import DataError, MissingDependencyError

DOCUMENTS = ["first, größer", "second 鯨\n", "", "third \u2028 and 🐋", "x" * 50]


def _lines(documents: list[str]) -> str:
    return "".join(json.dumps({"text": document, "id": 1}) + "\n" for document in documents)


def _text_files(folder: Path) -> DocumentSource:
    for number, document in enumerate(DOCUMENTS):
        (folder / f"{number}.txt").write_bytes((document or "x").encode())
    return TextFiles(folder)


def _separated(folder: Path) -> DocumentSource:
    (folder / "b.txt").write_bytes("||".join(DOCUMENTS[:3]).encode())
    (folder / "a.txt").write_bytes("||".join(DOCUMENTS[3:]).encode() + b"||")
    return TextFiles(folder, separator="||")


def _json_lines(folder: Path) -> DocumentSource:
    (folder / "a.jsonl").write_text(_lines(DOCUMENTS[:2]) + "\n  \n" + _lines(DOCUMENTS[2:4]))
    (folder / "b.jsonl").write_text(_lines(DOCUMENTS[4:]).rstrip("\n"))
    return JsonLines(folder)


def _compressed_lines(folder: Path) -> DocumentSource:
    content = _lines(DOCUMENTS[:2]).encode(), _lines(DOCUMENTS[2:]).encode()
    # Compressed files may consist of several parts, as `cat a.gz b.gz` makes them.
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(content[0][:30]) + gzip.compress(content[0][30:]))
    pack = zstandard.ZstdCompressor().compress
    (folder / "b.jsonl.zst").write_bytes(pack(content[1][:30]) + pack(content[1][30:]))
    return JsonLines(folder)


def _compressed_text(folder: Path) -> DocumentSource:
    (folder / "a.txt.gz").write_bytes(gzip.compress("||".join(DOCUMENTS).encode()))
    return TextFiles(folder, separator="||")


def _in_memory(folder: Path) -> DocumentSource:
    return TextDocuments(DOCUMENTS)


def _iterable(folder: Path) -> DocumentSource:
    return IterableDocuments(lambda: iter(DOCUMENTS))


FILES = [_text_files, _separated, _json_lines, _compressed_lines, _compressed_text]
EACH = pytest.mark.parametrize("make", [*FILES, _in_memory, _iterable])


@EACH
def test_reading_from_any_cursor_gives_the_rest(make: Callable[[Path], DocumentSource], tmp_path: Path) -> None:
    source = make(tmp_path)
    everything = list(source.read())
    for index, (_, cursor) in enumerate(everything):
        restored = json.loads(json.dumps(cursor))
        assert list(source.read(restored)) == everything[index + 1 :]


def test_documents_come_as_they_were_written(tmp_path: Path) -> None:
    for make, expected in [
        (_separated, DOCUMENTS[3:] + DOCUMENTS[:2]),  # nothing behind a last separator is no document
        (_json_lines, DOCUMENTS),
        (_compressed_lines, DOCUMENTS),
        (_compressed_text, DOCUMENTS),
        (_iterable, DOCUMENTS),
        (_in_memory, DOCUMENTS),
        (_text_files, [document or "x" for document in DOCUMENTS]),
    ]:
        folder = tmp_path / make.__name__
        folder.mkdir()
        assert [text for text, _ in make(folder).read()] == expected


@settings(max_examples=60)
@given(
    pieces=st.lists(st.text("ab|", max_size=6), min_size=1, max_size=8),
    separator=st.sampled_from(["|", "||", "|a|"]),
    block=st.integers(1, 5),
)
def test_splitting_a_file_is_splitting_its_text(
    pieces: list[str], separator: str, block: int, tmp_path_factory
) -> None:
    content = "a" + separator.join(pieces)
    path = tmp_path_factory.mktemp("split") / "a.txt"
    path.write_bytes(content.encode())
    expected = content.split(separator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats_module, "_BLOCK_BYTES", block)
        found = [text for text, _ in TextFiles(path, separator=separator).read()]
    assert found == (expected if expected[-1] else expected[:-1])


@EACH
def test_a_fingerprint_stays_until_the_documents_change(make: Callable[[Path], DocumentSource], tmp_path: Path) -> None:
    source = make(tmp_path)
    before = source.fingerprint()
    assert source.fingerprint() == before == make(tmp_path).fingerprint()
    if files := sorted(tmp_path.iterdir()):
        content = files[0].read_bytes()
        files[0].write_bytes(content[:-1] + b"?")
        assert source.fingerprint() != before
    else:
        assert TextDocuments([*DOCUMENTS[:-1], "y" * 50]).fingerprint() != before
        assert TextDocuments(["".join(DOCUMENTS)]).fingerprint() != before


def test_a_folder_may_move_without_changing_its_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "old" / "part").mkdir(parents=True)
    (tmp_path / "old" / "part" / "a.txt").write_text("text")
    before = TextFiles(tmp_path / "old").fingerprint()
    (tmp_path / "old").rename(tmp_path / "new")
    assert TextFiles(tmp_path / "new").fingerprint() == before


def test_how_a_file_is_read_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text('{"text": "a", "body": "b"}')
    path = tmp_path / "a.txt"
    sources: list[DocumentSource] = [
        TextFiles(path),
        TextFiles(path, separator="\n"),
        JsonLines(path),
        JsonLines(path, text_key="body"),
    ]
    assert len({source.fingerprint() for source in sources}) == 4


@pytest.mark.parametrize("place", [0, -1])
def test_a_large_file_that_changes_at_its_start_end_or_size_has_another_fingerprint(
    tmp_path: Path, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_module, "_HASHED_WHOLE_BYTES", 1 << 20)
    path = tmp_path / "large.txt"
    size = 3 << 20
    with path.open("wb") as file:
        file.truncate(size)
    source = TextFiles(path)
    prints = {source.fingerprint()}
    with path.open("r+b") as file:
        file.seek(place % size)
        file.write(b"x")
    prints.add(source.fingerprint())
    with path.open("ab") as file:
        file.write(b"y")
    prints.add(source.fingerprint())
    assert len(prints) == 3


def test_sources_of_up_to_256_mib_are_hashed_to_the_last_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"a" * (3 << 20))
    before = TextFiles(path).fingerprint()
    with path.open("r+b") as file:
        file.seek(1_234_567)
        file.write(b"b")
    assert TextFiles(path).fingerprint() != before


def test_files_are_read_in_sorted_order_whatever_the_order_given(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("c.txt", "a.txt", "b.txt")]
    for path in paths:
        path.write_text(path.stem)
    assert [text for text, _ in TextFiles(paths).read()] == ["a", "b", "c"]


def test_open_source_chooses_by_suffix(tmp_path: Path) -> None:
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "a.jsonl").write_text(_lines(["one"]))
    (tmp_path / "lines" / "README.md").write_text("about")
    (tmp_path / "A.TXT").write_text("two")
    assert [text for text, _ in open_source(tmp_path / "lines").read()] == ["one"]
    assert [text for text, _ in open_source(tmp_path / "lines" / "a.jsonl").read()] == ["one"]
    assert [text for text, _ in open_source(str(tmp_path / "A.TXT")).read()] == ["two"]


def test_open_source_refuses_what_it_cannot_tell(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing does not exist"):
        open_source(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"neither \.txt nor \.jsonl"):
        open_source(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl").write_text(_lines(["b"]))
    with pytest.raises(DataError, match=r"holds both \.txt and \.jsonl files"):
        open_source(tmp_path)
    (tmp_path / "c.csv").write_text("c")
    with pytest.raises(DataError, match=r"c\.csv is neither"):
        open_source(tmp_path / "c.csv")


@pytest.mark.parametrize("opened", [TextFiles, JsonLines, ParquetFiles, open_source])
def test_an_empty_path_is_refused_and_not_the_current_folder(opened: Callable[[Any], object]) -> None:
    with pytest.raises(DataError, match=r"the path is empty; give a file or a folder, '\.' for the current one"):
        opened("")
    if opened is not open_source:
        with pytest.raises(DataError, match="the path is empty"):
            opened(["a.txt", ""])


@pytest.mark.parametrize("kind", [TextFiles, JsonLines])
def test_paths_that_cannot_be_read_are_refused(kind: type[TextFiles] | type[JsonLines], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.txt does not exist"):
        kind(tmp_path / "absent.txt")
    with pytest.raises(DataError, match=r"there is no \.(txt|jsonl) file in"):
        kind(tmp_path)
    with pytest.raises(DataError, match="the list of paths is empty"):
        kind([])
    path = tmp_path / "a.txt"
    path.write_text("")
    with pytest.raises(DataError, match=r"a\.txt is empty; remove it or leave it out"):
        kind(path)
    path.write_text("text")
    with pytest.raises(DataError, match=r"a\.txt is listed twice"):
        kind([path, path])
    with pytest.raises(DataError, match="is a folder; give it alone"):
        kind([path, tmp_path])
    source = kind(path)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.txt cannot be read: No such file"):
        list(source.read())
    with pytest.raises(DataError, match=r"a\.txt cannot be read: No such file"):
        source.fingerprint()


def test_an_empty_separator_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="separator is empty"):
        TextFiles(tmp_path, separator="")


def test_invalid_utf8_is_refused_with_file_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("größe\n\nab".encode() + b"\xff" + b"c")
    where = path.read_bytes().index(b"\xff")
    for make in (TextFiles, lambda path: TextFiles(path, separator="\n\n"), JsonLines):
        if make is JsonLines:
            path.write_bytes(_lines(["größe"]).encode() + b'{"text": "\xff"}')
            where = path.read_bytes().index(b"\xff")
        source = make(path)
        with pytest.raises(DataError, match=rf"a\.txt is not valid UTF-8 at byte {where} "):
            list(source.read())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut of', r"a\.jsonl line 3 is not valid JSON .* the file was cut off in a record"),
        ("[" * 100_000, "line 3 is not valid JSON"),
        ('{"text": ' + "1" * 5000 + "}", "line 3 is not valid JSON"),
        ('["text"]', "line 3 is a JSON list; each line must be an object"),
        ('{"body": "a", "id": 3}', r"line 3 has no key 'text'; its keys are \['body', 'id'\]; choose a text_key"),
        ('{"text": null}', "line 3: 'text' is NoneType; the document must be a string"),
        (r'{"text": "half \ud83d"}', "line 3 escapes half a character"),
    ],
)
def test_a_broken_record_is_refused_with_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(_lines(["fine"]) + "\n" + line)
    source = JsonLines(path)
    with pytest.raises(DataError, match=message):
        list(source.read())
    (_, cursor) = next(source.read())
    with pytest.raises(DataError, match=message):  # the line number is right after a resume, too
        list(source.read(cursor))


def test_escaped_characters_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(r'{"text": "\ud83d\udc0b \u00e9"}')
    assert [text for text, _ in JsonLines(tmp_path).read()] == ["🐋 é"]


def test_a_file_without_documents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"there are no documents in a\.jsonl"):
        list(JsonLines(tmp_path).read())


def test_documents_in_memory_must_be_a_list_of_strings() -> None:
    with pytest.raises(DataError, match="would be read letter by letter"):
        TextDocuments("text")
    with pytest.raises(DataError, match="the list is empty"):
        TextDocuments([])
    with pytest.raises(DataError, match="document 1 is bytes; documents are str"):
        TextDocuments(["a", b"b"])  # type: ignore[list-item]


@pytest.mark.parametrize("cursor", [{}, {"document": 6, "file": 9}, {"document": -1, "file": "0"}])
def test_a_cursor_of_another_source_is_refused(cursor: dict, tmp_path: Path) -> None:
    for source in (TextDocuments(DOCUMENTS), _json_lines(tmp_path)):
        with pytest.raises(DataError, match=r"does not belong to this source: (document|file) must be 0 to"):
            list(source.read(cursor))


def test_a_cursor_behind_the_end_of_a_file_is_refused(tmp_path: Path) -> None:
    source = _separated(tmp_path)
    _, cursor = next(source.read())
    with pytest.raises(DataError, match="offset must be 0 to"):
        list(source.read({**cursor, "offset": os.path.getsize(tmp_path / "a.txt") + 1}))
    with pytest.raises(DataError, match="name and size are missing"):
        list(source.read({"file": 0, "offset": 1}))


@EACH
def test_a_source_can_go_to_another_process(make: Callable[[Path], DocumentSource], tmp_path: Path) -> None:
    if make is _iterable:
        source: DocumentSource = IterableDocuments(_few)
        next(source.read())
    else:
        source = make(tmp_path)
    assert list(pickle.loads(pickle.dumps(source)).read()) == list(source.read())


def _few() -> Iterator[str]:
    yield from DOCUMENTS


def test_the_fingerprint_of_an_iterable_is_its_identity_or_its_first_documents() -> None:
    named = [IterableDocuments(make, identity="v1").fingerprint() for make in (_few, lambda: ["other"])]
    assert named[0] == named[1] != IterableDocuments(_few, identity="v2").fingerprint()
    assert IterableDocuments(_few).fingerprint() == IterableDocuments(lambda: DOCUMENTS).fingerprint()
    assert IterableDocuments(_few).fingerprint() != IterableDocuments(lambda: DOCUMENTS[1:]).fingerprint()


def test_an_iterable_that_can_be_read_once_is_refused() -> None:
    with pytest.raises(DataError, match="a single iterator, which can be read once; give the function"):
        IterableDocuments(iter(DOCUMENTS))
    once = iter(DOCUMENTS)
    source = IterableDocuments(lambda: once)
    assert len(list(source.read())) == len(DOCUMENTS)
    with pytest.raises(DataError, match="the function returned the same iterator again"):
        list(source.read())


def test_an_iterable_of_something_else_is_refused() -> None:
    with pytest.raises(DataError, match="would be read letter by letter"):
        IterableDocuments("text")
    with pytest.raises(DataError, match="documents is int; give an iterable of str, or a function"):
        IterableDocuments(3)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="document 1 is bytes; documents are str"):
        list(IterableDocuments(["a", b"b"], identity="x").read())  # type: ignore[list-item]
    with pytest.raises(DataError, match="document 0 is bytes"):
        IterableDocuments([b"b"]).fingerprint()  # type: ignore[list-item]
    with pytest.raises(DataError, match="the iterable is empty"):
        list(IterableDocuments([]).read())
    with pytest.raises(DataError, match="behind document 9 and only 5 came this time"):
        list(IterableDocuments(_few).read({"document": 9}))


@pytest.mark.parametrize("suffix", [".txt.gz", ".txt.zst"])
def test_a_cursor_behind_the_end_of_a_compressed_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(b"a||b||c") if suffix.endswith("gz") else zstandard.compress(b"a||b||c"))
    source = TextFiles(path, separator="||")
    _, cursor = next(source.read())
    with pytest.raises(DataError, match="offset must be 0 to 7"):
        list(source.read({**cursor, "offset": 8}))


def test_open_source_reads_compressed_files_and_takes_settings(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"body": "one"}'))
    assert [text for text, _ in open_source(tmp_path, text_key="body").read()] == ["one"]
    (tmp_path / "a.TXT.zst").write_bytes(zstandard.compress(b"one||two"))
    assert [text for text, _ in open_source(tmp_path / "a.TXT.zst", separator="||").read()] == ["one", "two"]


def test_without_zstandard_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.version_info >= (3, 14):
        pytest.skip("this Python reads .zst files itself")
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"one"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "tinygpt\[zstd\]"'):
        list(TextFiles(tmp_path).read())


def test_a_file_with_one_enormous_document_is_not_taken_into_memory(tmp_path: Path) -> None:
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(100 << 20)
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "' + b"x" * (100 << 20) + b'"}\n{"text": "next"}')
    tracemalloc.start()
    for source in (
        TextFiles(tmp_path, max_document_bytes=1 << 20),
        TextFiles(tmp_path, separator="||", max_document_bytes=1 << 20),
        JsonLines(tmp_path, max_document_bytes=1 << 20),
    ):
        with pytest.raises(DataError, match="more than max_document_bytes=1,048,576 bytes"):
            list(source.read())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 << 20


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_byte_order_mark_at_the_beginning_of_a_file_is_no_text(tmp_path: Path, suffix: str) -> None:
    def write(name: str, content: bytes) -> Path:
        path = tmp_path / (name + suffix)
        path.write_bytes(gzip.compress(content) if suffix else content)
        return path

    mark = b"\xef\xbb\xbf"
    text = TextFiles(write("a.txt", mark + b"one\n\n" + mark + b"two"), separator="\n\n")
    assert [document for document, _ in text.read()] == ["one", "\ufefftwo"]  # elsewhere it is a character of the text
    (_, place), _ = text.read()
    assert [document for document, _ in text.read(place)] == ["\ufefftwo"]
    whole = TextFiles(write("b.txt", mark + b"whole"))
    assert [document for document, _ in whole.read()] == ["whole"]
    lines = JsonLines(write("c.jsonl", mark + b'{"text": "one"}\r\n{"text": "two"}\r\n'))
    assert [document for document, _ in lines.read()] == ["one", "two"]


def test_a_separator_that_windows_wrote_in_its_own_way_is_not_overlooked(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\n\r\ntwo\r\nlines\n\nthree")
    with pytest.raises(DataError, match=r"byte 0 holds '\\r\\n\\r\\n', .* give separator='\\r\\n\\r\\n', or convert"):
        list(TextFiles(path, separator="\n\n").read())
    assert [text for text, _ in TextFiles(path, separator="\r\n\r\n").read()] == ["one", "two\r\nlines\n\nthree"]
    skipping = TextFiles(path, separator="\n\n", on_error="skip")
    with pytest.warns(UserWarning, match="line ends of Windows"):
        assert [text for text, _ in skipping.read()] == ["three"]
    assert [(skipped.reason, skipped.count) for skipped in skipping.skipped] == [("line ends of Windows", 1)]
    # Without a separator, or with one that has no line end, line ends are text like any other.
    assert [text for text, _ in TextFiles(path).read()] == ["one\r\n\r\ntwo\r\nlines\n\nthree"]
    assert len(list(TextFiles(path, separator="two").read())) == 2
