import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygpt.data import ParquetFiles, open_source
from tinygpt.data import _parquet as parquet_module
from tinygpt.errors import ConfigError, DataError, MissingDependencyError

TEXTS = [f"document {number}: größer 🐋" for number in range(23)]


def _write(path: Path, texts: list[str | None], *, rows: int = 5, kind: pa.DataType | None = None) -> Path:
    table = pa.table({"id": list(range(len(texts))), "text": pa.array(texts, kind or pa.string())})
    pq.write_table(table, path, row_group_size=rows)
    return path


def _texts(source: ParquetFiles) -> list[str]:
    return [text for text, _ in source.read()]


@settings(max_examples=25)
@given(rows=st.integers(1, 30), batch=st.integers(1, 7))
def test_reading_from_any_cursor_gives_the_rest(
    rows: int, batch: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("parquet")
    _write(folder / "a.parquet", [*TEXTS[:12]], rows=rows)
    _write(folder / "b.parquet", [*TEXTS[12:]], rows=rows)
    source = ParquetFiles(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet_module, "_BATCH_ROWS", batch)
        everything = list(source.read())
        assert [text for text, _ in everything] == TEXTS
        for index, (_, cursor) in enumerate(everything):
            assert list(source.read(json.loads(json.dumps(cursor)))) == everything[index + 1 :]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_every_kind_of_text_column_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    assert _texts(ParquetFiles(_write(tmp_path / "a.parquet", [*TEXTS], kind=kind))) == TEXTS


def test_another_column_can_be_chosen_and_others_are_not_read(tmp_path: Path) -> None:
    table = pa.table({"body": TEXTS, "broken": pa.array([b"\xff"] * len(TEXTS), pa.binary()).view(pa.string())})
    pq.write_table(table, tmp_path / "a.parquet")
    assert _texts(ParquetFiles(tmp_path, text_key="body")) == TEXTS
    assert [text for text, _ in open_source(tmp_path, text_key="body").read()] == TEXTS


def test_a_row_group_larger_than_memory_allows_is_read_piece_by_piece(tmp_path: Path) -> None:
    texts = [f"{number:05} " * 700 for number in range(20_000)]  # 84 MB in one row group
    path = _write(tmp_path / "a.parquet", [*texts], rows=len(texts))
    before = pa.total_allocated_bytes()
    most = 0
    for expected, (text, _) in zip(texts, ParquetFiles(path).read(), strict=True):
        most = max(most, pa.total_allocated_bytes() - before)
        assert text == expected
    assert most < 30 << 20


def test_the_column_is_part_of_the_fingerprint_and_so_is_the_content(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.parquet", [*TEXTS])
    prints = {ParquetFiles(path).fingerprint(), ParquetFiles(path, text_key="body").fingerprint()}
    _write(path, [*TEXTS[:-1], "another"])
    prints.add(ParquetFiles(path).fingerprint())
    assert len(prints) == 3


def test_a_wrong_column_is_refused_and_those_that_are_there_named(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.parquet", [*TEXTS])
    with pytest.raises(DataError, match=r"a\.parquet has no column 'body'; its columns are \['id', 'text'\]"):
        _texts(ParquetFiles(path, text_key="body"))
    with pytest.raises(DataError, match=r"column 'id' is int64; columns of text are \['text'\]; choose a text_key"):
        _texts(ParquetFiles(path, text_key="id"))


def test_a_file_with_a_wrong_column_can_be_skipped(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["other"]}), tmp_path / "a.parquet")
    _write(tmp_path / "b.parquet", [*TEXTS])
    source = ParquetFiles(tmp_path, on_error="skip")
    with pytest.warns(UserWarning, match="its columns are"):
        assert _texts(source) == TEXTS
    assert [(skipped.file, skipped.reason, skipped.count) for skipped in source.skipped] == [
        ("a.parquet", "no column 'text'", 1)
    ]


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_file_that_was_cut_off_is_refused_or_skipped(tmp_path: Path, kept: float) -> None:
    path = _write(tmp_path / "a.parquet", [*TEXTS])
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept) or 3])
    _write(tmp_path / "b.parquet", ["whole"])
    with pytest.raises(DataError, match=r"a\.parquet is not a whole parquet file .* cut off or damaged"):
        _texts(ParquetFiles(tmp_path))
    source = ParquetFiles(tmp_path, on_error="skip")
    with pytest.warns(UserWarning, match="skipped"):
        assert _texts(source) == ["whole"]
    assert [skipped.file for skipped in source.skipped] == ["a.parquet"]


def test_a_file_with_damaged_pages_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.parquet", [f"{number} " + "text" * 500 for number in range(2000)], rows=500)
    content = bytearray(path.read_bytes())
    content[2000:4000] = bytes(2000)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet is not a whole parquet file"):
        _texts(ParquetFiles(path))


def test_a_row_that_cannot_be_used_is_refused_or_skipped(tmp_path: Path) -> None:
    raw = [b"one", b"caf\xe9", b"two", None, b"x" * 100, b"three"]
    column = pa.array(raw, pa.binary()).view(pa.string())
    path = tmp_path / "a.parquet"
    for number, message in [
        (1, r"a\.parquet is not valid UTF-8 in row 0 of row group 0, byte 3 "),
        (3, "the document in row 0 of row group 0 is null"),
        (4, "the document in row 0 of row group 0 has more than max_document_bytes=50 bytes"),
    ]:
        pq.write_table(pa.table({"text": column.slice(number)}), path)
        with pytest.raises(DataError, match=message):
            _texts(ParquetFiles(path, max_document_bytes=50))
    pq.write_table(pa.table({"text": column}), path, row_group_size=2)
    source = ParquetFiles(path, max_document_bytes=50, on_error="skip")
    with pytest.warns(UserWarning, match="skipped"):
        assert _texts(source) == ["one", "two", "three"]
    assert _texts(source) == ["one", "two", "three"]
    assert {skipped.reason: skipped.count for skipped in source.skipped} == {
        "not valid UTF-8": 1,
        "null": 1,
        "too long": 1,
    }


@pytest.mark.parametrize(("text", "fits"), [("é" * 25, True), ("é" * 26, False), ("a" * 50, True)])
def test_the_limit_counts_bytes(tmp_path: Path, text: str, fits: bool) -> None:
    source = ParquetFiles(_write(tmp_path / "a.parquet", [text]), max_document_bytes=50)
    if fits:
        assert _texts(source) == [text]
    else:
        with pytest.raises(DataError, match="more than max_document_bytes=50"):
            _texts(source)


def test_a_cursor_that_cannot_be_is_refused(tmp_path: Path) -> None:
    source = ParquetFiles(_write(tmp_path / "a.parquet", [*TEXTS]))
    _, cursor = next(source.read())
    for wrong, message in [({"row_group": 5}, "row_group must be 0 to 4"), ({"row": 6}, "row must be 0 to 5")]:
        with pytest.raises(DataError, match=message):
            list(source.read({**cursor, **wrong}))


def test_numbers_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_document_bytes=0 is not positive"):
        ParquetFiles(_write(tmp_path / "a.parquet", [*TEXTS]), max_document_bytes=0)
    (tmp_path / "a.parquet").rename(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"there is no \.parquet file in"):
        ParquetFiles(tmp_path)


def test_without_pyarrow_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ParquetFiles(_write(tmp_path / "a.parquet", [*TEXTS]))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "tinygpt\[parquet\]"'):
        _texts(source)


def test_a_table_with_two_columns_of_the_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "two.parquet"
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    with pytest.raises(DataError, match="has several columns 'text'"):
        list(ParquetFiles(path).read())
