"""From text to batches: document sources, packing, a loader with exact state, frozen validation sets.

```
files --DocumentSource.read--> texts --Tokenizer--> token ids --Packer--> rows --BatchLoader--> Batch
        texts --tokenize_documents--> TokenShards --------^
```
"""

from tinygpt.data._batch import IGNORE_INDEX as IGNORE_INDEX
from tinygpt.data._batch import Batch as Batch
from tinygpt.data._batch import document_ids as document_ids
from tinygpt.data._corpus import embedded_corpus as embedded_corpus
from tinygpt.data._documents import Cursor as Cursor
from tinygpt.data._documents import DocumentSource as DocumentSource
from tinygpt.data._documents import IterableDocuments as IterableDocuments
from tinygpt.data._documents import TextDocuments as TextDocuments
from tinygpt.data._faults import OnError as OnError
from tinygpt.data._faults import Skipped as Skipped
from tinygpt.data._faults import skipped_of as skipped_of
from tinygpt.data._files import JsonLines as JsonLines
from tinygpt.data._files import TextFiles as TextFiles
from tinygpt.data._hub_files import HubFiles as HubFiles
from tinygpt.data._loader import BatchLoader as BatchLoader
from tinygpt.data._mixture import Mixture as Mixture
from tinygpt.data._open import open_source as open_source
from tinygpt.data._packing import Overflow as Overflow
from tinygpt.data._packing import Packer as Packer
from tinygpt.data._packing import PackerState as PackerState
from tinygpt.data._packing import Utilization as Utilization
from tinygpt.data._packing import pack_rows as pack_rows
from tinygpt.data._parquet import ParquetFiles as ParquetFiles
from tinygpt.data._shards import TokenShards as TokenShards
from tinygpt.data._split import hash_split as hash_split
from tinygpt.data._split import hold_out as hold_out
from tinygpt.data._tokenize import TokenizeProgress as TokenizeProgress
from tinygpt.data._tokenize import tokenize_documents as tokenize_documents
from tinygpt.data._validation import ValidationSet as ValidationSet

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "BatchLoader",
    "Cursor",
    "DocumentSource",
    "HubFiles",
    "IterableDocuments",
    "JsonLines",
    "Mixture",
    "OnError",
    "Overflow",
    "Packer",
    "PackerState",
    "ParquetFiles",
    "Skipped",
    "TextDocuments",
    "TextFiles",
    "TokenShards",
    "TokenizeProgress",
    "Utilization",
    "ValidationSet",
    "document_ids",
    "embedded_corpus",
    "hash_split",
    "hold_out",
    "open_source",
    "pack_rows",
    "skipped_of",
    "tokenize_documents",
]
