"""A fixed set of batches to measure on, with a hash that says which."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from tinygpt.data._batch import IGNORE_INDEX, Batch
from tinygpt.data._documents import DocumentSource
from tinygpt.data._packing import pack_rows
from tinygpt.errors import ConfigError, DataError
from tinygpt.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class ValidationSet:
    """Batches that never change, held as one int32 tensor; build it with `from_source`.

    Two losses may be compared if their sets have the same `hash`.

    Attributes:
        token_rows: Packed rows, `(rows, seq_len + 1)` int32, padded in the last one with `IGNORE_INDEX`.
        batch_rows: Rows in a batch; the last batch may have fewer.
        bos_token_id: What the model reads in padded places.
        token_bytes: UTF-8 bytes of each token id, 0 for special tokens, `(vocab,)` int64.
        num_bytes: UTF-8 bytes of all target tokens, special tokens counted as 0.
    """

    token_rows: Tensor
    batch_rows: int
    bos_token_id: int
    token_bytes: Tensor
    num_bytes: int

    @classmethod
    def from_source(
        cls,
        source: DocumentSource,
        tokenizer: Tokenizer,
        *,
        rows: int,
        seq_len: int,
        max_tokens: int | None = None,
    ) -> "ValidationSet":
        """Read a source once and pack it so that every token of every document is a target exactly once.

        Documents longer than a row go on in later rows (`overflow="carry"`).

        Args:
            source: Documents held out from training.
            tokenizer: The model's tokenizer.
            rows: Rows in a batch.
            seq_len: Positions in a row.
            max_tokens: Stop after this many positions, rounded down to whole rows; None packs the whole source.

        Raises:
            ConfigError: If a number is not positive or `max_tokens` is less than a row.
            DataError: If no document of the source holds a token, or the source cannot be read.

        Example:
            ```python
            from tinygpt.data import ValidationSet, embedded_corpus
            from tinygpt.tokenizer import ByteTokenizer

            validation = ValidationSet.from_source(embedded_corpus("validation"), ByteTokenizer(), rows=8, seq_len=256)
            ```
        """
        for name, value in (("rows", rows), ("seq_len", seq_len)):
            if value < 1:
                raise ConfigError(f"{name}={value} is not positive; choose 1 or more.")
        if max_tokens is not None and max_tokens < seq_len:
            raise ConfigError(f"max_tokens={max_tokens} is less than one row of seq_len={seq_len}; choose more.")
        documents = (tokenizer.encode(text) for text, _ in source.read())
        packed = pack_rows(documents, row_tokens=seq_len + 1, bos_token_id=tokenizer.bos_token_id, overflow="carry")
        kept = list(islice(packed, None if max_tokens is None else max_tokens // seq_len))
        if not kept:
            raise DataError("the source has no document with a token in it; give it text.")
        token_rows = torch.from_numpy(np.stack(kept))
        token_bytes = torch.tensor(tokenizer.token_bytes())
        targets = token_rows[:, 1:]
        num_bytes = int(token_bytes[targets[targets != IGNORE_INDEX]].sum())
        return cls(token_rows, rows, tokenizer.bos_token_id, token_bytes, num_bytes)

    @property
    def hash(self) -> str:
        """SHA-256 hex digest of the token rows and their shape; the batch size does not enter."""
        array = self.token_rows.numpy()
        digest = hashlib.sha256(repr(array.shape).encode())
        digest.update(array.astype("<i4", copy=False).tobytes())
        return digest.hexdigest()

    @property
    def num_tokens(self) -> int:
        """Number of targets, `<|bos|>` between documents included."""
        return int((self.token_rows[:, 1:] != IGNORE_INDEX).sum())

    def __len__(self) -> int:
        """Number of batches."""
        return math.ceil(len(self.token_rows) / self.batch_rows)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the same batches every time: `Batch`es on the CPU."""
        for start in range(0, len(self.token_rows), self.batch_rows):
            rows = self.token_rows[start : start + self.batch_rows]
            yield Batch.from_rows(rows, bos_token_id=self.bos_token_id)
