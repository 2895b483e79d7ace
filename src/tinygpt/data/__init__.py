"""From text to batches: document sources, packing, a loader with exact state, frozen validation sets.

```
files --DocumentSource.read--> texts --Tokenizer--> token ids --Packer--> rows --BatchLoader--> Batch
```
"""

from tinygpt.data._batch import IGNORE_INDEX as IGNORE_INDEX, Batch as Batch
from tinygpt.data._corpus import embedded_corpus as embedded_corpus
from tinygpt.data._documents import Cursor as Cursor, DocumentSource as DocumentSource, TextDocuments as TextDocuments
from tinygpt.data._files import JsonLines as JsonLines, TextFiles as TextFiles, open_source as open_source
from tinygpt.data._loader import BatchLoader as BatchLoader
from tinygpt.data._packing import (
    Overflow as Overflow,
    Packer as Packer,
    Utilization as Utilization,
    pack_rows as pack_rows,
)
from tinygpt.data._validation import ValidationSet as ValidationSet

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "BatchLoader",
    "Cursor",
    "DocumentSource",
    "JsonLines",
    "Overflow",
    "Packer",
    "TextDocuments",
    "TextFiles",
    "Utilization",
    "ValidationSet",
    "embedded_corpus",
    "open_source",
    "pack_rows",
]
