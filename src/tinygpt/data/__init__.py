"""From text to batches: document sources, packing, a loader with exact state, frozen validation sets.

```
files --DocumentSource.read--> texts --Tokenizer--> token ids --Packer--> rows --BatchLoader--> Batch
```
"""

from tinygpt.data._batch import IGNORE_INDEX as IGNORE_INDEX
from tinygpt.data._batch import Batch as Batch
from tinygpt.data._corpus import embedded_corpus as embedded_corpus
from tinygpt.data._documents import Cursor as Cursor
from tinygpt.data._documents import DocumentSource as DocumentSource
from tinygpt.data._documents import TextDocuments as TextDocuments
from tinygpt.data._files import JsonLines as JsonLines
from tinygpt.data._files import TextFiles as TextFiles
from tinygpt.data._files import open_source as open_source
from tinygpt.data._loader import BatchLoader as BatchLoader
from tinygpt.data._packing import Overflow as Overflow
from tinygpt.data._packing import Packer as Packer
from tinygpt.data._packing import Utilization as Utilization
from tinygpt.data._packing import pack_rows as pack_rows
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
