"""One function that opens whatever holds text."""

import os

from tinygpt.data._documents import DocumentSource
from tinygpt.data._faults import OnError
from tinygpt.data._files import JsonLines, TextFiles, given_path, require_path
from tinygpt.data._formats import MAX_DOCUMENT_BYTES, with_compression
from tinygpt.data._hub_files import HUB_SCHEME, HubFiles
from tinygpt.data._parquet import ParquetFiles
from tinygpt.errors import DataError

_KINDS = {".txt": with_compression(".txt"), ".jsonl": with_compression(".jsonl"), ".parquet": (".parquet",)}


def open_source(
    path: str | os.PathLike[str],
    *,
    text_key: str = "text",
    separator: str | None = None,
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
    on_error: OnError = "raise",
) -> DocumentSource:
    """Open a file, a folder or a dataset of the Hugging Face Hub as documents, by suffix.

    Args:
        path: A `.txt`, `.jsonl` or `.parquet` file, the first two also compressed (`.gz`, `.zst`); a folder that
            holds files of one of these kinds; or `hf://datasets/USER/NAME/*.parquet`, see `HubFiles`.
        text_key: Key of a JSON line, or column of a parquet file, that holds the text.
        separator: What stands between two documents of a text file; None makes each file one document.
        max_document_bytes: A longer document is a fault.
        on_error: `"raise"` stops at a file or document that cannot be used; `"skip"` passes over it, counts it in
            `skipped`, and warns once for each kind of fault.

    Raises:
        DataError: If the path is empty, does not exist, is of another kind, or is a folder with several kinds or none;
            and for the reasons of the source it opens.
        HubError: If a dataset cannot be listed.

    Example:
        ```python
        from pathlib import Path
        from tinygpt.data import open_source

        Path("notes.txt").write_text("one document")
        source = open_source("notes.txt")
        ```
    """
    if str(path).startswith(HUB_SCHEME):
        return HubFiles(
            str(path),
            text_key=text_key,
            separator=separator,
            max_document_bytes=max_document_bytes,
            on_error=on_error,
        )
    if "://" in str(path):
        raise DataError(
            f"{path} is an address; give a file or a folder, downloaded first, or hf://datasets/USER/NAME/PATTERN."
        )
    path = given_path(path)
    require_path(path)
    candidates = path.rglob("*") if path.is_dir() else [path]
    names = {file.name.lower() for file in candidates if file.is_file()}
    kinds = [kind for kind, suffixes in _KINDS.items() if any(name.endswith(suffixes) for name in names)]
    match kinds:
        case [".txt"]:
            return TextFiles(path, separator=separator, max_document_bytes=max_document_bytes, on_error=on_error)
        case [".jsonl"]:
            return JsonLines(path, text_key=text_key, max_document_bytes=max_document_bytes, on_error=on_error)
        case [".parquet"]:
            return ParquetFiles(path, text_key=text_key, max_document_bytes=max_document_bytes, on_error=on_error)
        case []:
            known = " nor ".join(_KINDS)
            raise DataError(
                f"{path} is neither {known} nor a folder of them; open it with TextFiles, JsonLines or ParquetFiles."
            )
    raise DataError(
        f"{path} holds both {' and '.join(kinds)} files; open one kind with TextFiles, JsonLines or ParquetFiles."
    )
