"""Documents in a column of parquet files."""

from collections.abc import Iterator
from io import BufferedReader
from typing import Any

from tinygpt.data._documents import Cursor, cursor_number
from tinygpt.data._faults import WHOLE_FILE, Faults, OnError
from tinygpt.data._files import LocalFiles, Paths
from tinygpt.data._formats import MAX_DOCUMENT_BYTES, checked_limit, too_long
from tinygpt.errors import MissingDependencyError

# Rows unpacked at a time: few enough that rows of a megabyte do not matter.
_BATCH_ROWS = 128
_BUFFER_BYTES = 1 << 20

# A fault's position is one number that grows along the file: no row group has this many rows.
_ROWS_IN_GROUP = 1 << 40


class ParquetFormat:
    """One column of a parquet file, a value a document; other columns are not read."""

    def __init__(self, text_key: str, max_document_bytes: int) -> None:
        self._column = text_key
        self.limit = checked_limit(max_document_bytes)
        self.suffixes: tuple[str, ...] = (".parquet",)
        self.settings = f"parquet {text_key!r}"

    def documents(self, file: BufferedReader, name: str, place: Cursor, faults: Faults) -> Iterator[tuple[str, Cursor]]:
        """Yield documents with the row group and the row in it behind each, one batch of rows in memory at a time."""
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise MissingDependencyError(
                'reading parquet files needs pyarrow: pip install "tinygpt[parquet]".'
            ) from None
        try:
            # Without pre_buffer and with a buffer, a row group of gigabytes is read page by page.
            table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER_BYTES)
            if not self._has_column(table.schema_arrow, name, faults):
                return
            groups = table.metadata.num_row_groups
            group = cursor_number(place, "row_group", groups - 1) if place else 0
            start = cursor_number(place, "row", table.metadata.row_group(group).num_rows) if place else 0
            for number in range(group, groups):
                for row, text in self._rows(table, number, start, name, faults):
                    yield text, {"row_group": number, "row": row + 1}
                start = 0
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            message = f"{name} is not a whole parquet file ({reason}); it was cut off or damaged: fetch it again."
            faults.note(name, WHOLE_FILE, "not a whole parquet file", message)

    def _has_column(self, schema: Any, name: str, faults: Faults) -> bool:
        """Return whether the column is there and holds text."""
        import pyarrow.types as types

        if self._column not in schema.names:
            reason = f"no column {self._column!r}"
            message = f"{name} has {reason}; its columns are {schema.names}; choose a text_key."
        elif schema.names.count(self._column) > 1:
            reason = f"several columns {self._column!r}"
            message = f"{name} has {reason}; write it again with one, or choose a text_key."
        else:
            kind = schema.field(self._column).type
            value = kind.value_type if types.is_dictionary(kind) else kind
            if types.is_string(value) or types.is_large_string(value) or types.is_string_view(value):
                return True
            texts = [field.name for field in schema if types.is_string(field.type) or types.is_large_string(field.type)]
            reason = "not a column of text"
            message = f"{name}: column {self._column!r} is {kind}; columns of text are {texts}; choose a text_key."
        faults.note(name, WHOLE_FILE, reason, message)
        return False

    def _rows(self, table: Any, group: int, start: int, name: str, faults: Faults) -> Iterator[tuple[int, str]]:
        """Yield the usable documents of one row group from a row on, each with its row."""
        first = 0
        batches = table.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[self._column], use_threads=False)
        for batch in batches:
            column = batch.column(0)
            skip = max(0, start - first)
            if skip < len(column):
                for row, text in enumerate(_values(column.slice(skip)), start=first + skip):
                    if self._usable(text, row, group, name, faults):
                        yield row, str(text)
            first += len(column)

    def _usable(self, text: str | UnicodeDecodeError | None, row: int, group: int, name: str, faults: Faults) -> bool:
        where, position = f"in row {row} of row group {group}", group * _ROWS_IN_GROUP + row
        if isinstance(text, str):
            # A character has 1 to 4 bytes, so almost every text is settled by its length.
            if len(text) * 4 <= self.limit or len(text.encode("utf-8")) <= self.limit:
                return True
            too_long(faults, name, position, where, self.limit, "raise")
        elif text is None:
            message = f"{name}: the document {where} is null; leave such rows out."
            faults.note(name, position, "null", message)
        else:
            message = f"{name} is not valid UTF-8 {where}, byte {text.start} ({text.reason}); write it again as UTF-8."
            faults.note(name, position, "not valid UTF-8", message)
        return False


class ParquetFiles(LocalFiles):
    """Parquet files: each value of one column is a document. Other columns are not read.

    Needs `pip install "tinygpt[parquet]"`. Rows are read a few at a time, so memory does not grow with files or row
    groups; going on in the middle of a file passes over the rows before in that row group.

    Args:
        paths: A file, a list of files, or a folder, of which every `.parquet` file below it is taken.
        text_key: Name of the column that holds the text.
        max_document_bytes: A longer document is a fault: tokenizing one takes about ten times its size in memory.
        on_error: `"raise"` stops at a file or document that cannot be used; `"skip"` passes over it, counts it in
            `skipped`, and warns once for each kind of fault.

    Raises:
        ConfigError: If `max_document_bytes` is not positive or `on_error` is not known.
        DataError: If a path does not exist or is listed twice, or there is no file; and, unless skipped, if a file
            is empty.
        MissingDependencyError: From reading, if pyarrow is not installed.

    Example:
        ```python
        from tinygpt.data import ParquetFiles

        source = ParquetFiles("fineweb-edu/sample-10BT", text_key="text", on_error="skip")
        ```
    """

    def __init__(
        self,
        paths: Paths,
        *,
        text_key: str = "text",
        max_document_bytes: int = MAX_DOCUMENT_BYTES,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(paths, ParquetFormat(text_key, max_document_bytes), on_error)


def _values(column: Any) -> list[str | UnicodeDecodeError | None]:
    """Return the values of an Arrow column of text, an error in place of one that is not UTF-8."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        values: list[str | UnicodeDecodeError | None] = []
        for value in column:
            try:
                values.append(value.as_py())
            except UnicodeDecodeError as error:
                values.append(error)
        return values
