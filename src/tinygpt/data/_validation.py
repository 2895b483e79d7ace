"""A fixed set of batches to measure on, with a hash that says which."""

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tinygpt._disk import replacing
from tinygpt._numbers import check_whole, given
from tinygpt.data._batch import IGNORE_INDEX, Batch
from tinygpt.data._documents import NO_TOKENS, DocumentSource
from tinygpt.data._packing import pack_rows
from tinygpt.errors import ConfigError, DataError
from tinygpt.tokenizer import Tokenizer

_FORMAT = "tinygpt validation set, version 1"


@dataclass(frozen=True, eq=False)
class ValidationSet:
    """Batches that never change, held as one int32 tensor; build it with `from_source`, keep it with `save`.

    Two losses may be compared if their sets have the same `hash`; `BpbReport.compare` looks after that.

    Attributes:
        token_rows: Packed rows, `(rows, seq_len + 1)` int32, padded in the last one with `IGNORE_INDEX`.
        batch_rows: Rows in a batch; the last batch is filled up with rows that have no target.
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

        Documents longer than a row go on in later rows (`overflow="carry"`). With `max_tokens` the documents are the
        first of the source, whatever their length: the choice is made before packing, which takes long ones first.

        Args:
            source: Documents held out from training.
            tokenizer: The model's tokenizer.
            rows: Rows in a batch.
            seq_len: Positions in a row.
            max_tokens: Take documents in their order until they have this many tokens, `<|bos|>` not counted; the last
                one is cut there. None takes the whole source.

        Raises:
            ConfigError: If a number is not positive.
            DataError: If no document of the source holds a token, or the source cannot be read.

        Example:
            ```python
            from tinygpt.data import ValidationSet, embedded_corpus
            from tinygpt.tokenizer import ByteTokenizer

            validation = ValidationSet.from_source(embedded_corpus("validation"), ByteTokenizer(), rows=8, seq_len=256)
            ```
        """
        check_whole(rows=rows, seq_len=seq_len, **given(max_tokens=max_tokens))
        for name, value in (("rows", rows), ("seq_len", seq_len), ("max_tokens", max_tokens)):
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} is not positive; choose 1 or more.")
        documents: Iterator[Sequence[int]] = (tokenizer.encode(text) for text, _ in source.read())
        if max_tokens is not None:
            documents = _first_tokens(documents, max_tokens)
        packed = pack_rows(documents, row_tokens=seq_len + 1, bos_token_id=tokenizer.bos_token_id, overflow="carry")
        kept = list(packed)
        if not kept:
            raise DataError(NO_TOKENS)
        token_rows = torch.from_numpy(np.stack(kept))
        token_bytes = torch.tensor(tokenizer.token_bytes())
        num_bytes = _count_bytes(token_rows, token_bytes)
        return cls(token_rows, rows, tokenizer.bos_token_id, token_bytes, num_bytes)

    @property
    def hash(self) -> str:
        """SHA-256 hex digest of the token rows and their shape; the batch size does not enter."""
        return _hash_rows(self.token_rows)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Freeze the set as one safetensors file, complete or not at all: rows, bytes of each token, and `hash`.

        A run that loads it measures on the same tokens for good, whatever becomes of files and tokenizer.
        """
        from safetensors.torch import save_file

        tensors = {"token_rows": self.token_rows.contiguous(), "token_bytes": self.token_bytes.contiguous()}
        metadata = {
            "format": _FORMAT,
            "hash": self.hash,
            "token_bytes_hash": _digest(self.token_bytes),
            "batch_rows": str(self.batch_rows),
            "bos_token_id": str(self.bos_token_id),
        }
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary:
            save_file(tensors, temporary, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, rows: int | None = None) -> "ValidationSet":
        """Read a set that `save` wrote, checking that its tokens have the hash they were saved with.

        Args:
            path: The file.
            rows: Rows in a batch; None is as many as when it was saved. It does not enter the hash.

        Raises:
            ConfigError: If `rows` is not positive.
            DataError: If there is no such file, it is no validation set, or it is damaged.

        Example:
            ```python
            from tinygpt.data import ValidationSet, embedded_corpus
            from tinygpt.tokenizer import ByteTokenizer

            source = embedded_corpus("validation")
            ValidationSet.from_source(source, ByteTokenizer(), rows=8, seq_len=256).save("validation.safetensors")
            validation = ValidationSet.load("validation.safetensors")
            ```
        """
        from safetensors import SafetensorError, safe_open

        check_whole(**given(rows=rows))
        if rows is not None and rows < 1:
            raise ConfigError(f"rows={rows} is not positive; choose 1 or more.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        except OSError as error:
            raise DataError(f"no validation set can be read from {os.fspath(path)}: {error}.") from None
        except SafetensorError as error:
            raise DataError(f"{os.fspath(path)} is damaged or no validation set: {error}; save it again.") from None
        if metadata.get("format") != _FORMAT or set(tensors) != {"token_rows", "token_bytes"}:
            raise DataError(f"{os.fspath(path)} is no validation set of this version; save it again.")
        token_rows, token_bytes = tensors["token_rows"], tensors["token_bytes"]
        found = {"hash": _hash_rows(token_rows), "token_bytes_hash": _digest(token_bytes)}
        if any(metadata.get(name) != digest for name, digest in found.items()):
            raise DataError(
                f"{os.fspath(path)} is damaged: its tokens have the hash {found['hash'][:12]} and it was saved with "
                f"{metadata.get('hash', 'none')[:12]}; copy it again."
            )
        batch_rows = _saved_number(path, metadata, "batch_rows", least=1)
        bos_token_id = _saved_number(path, metadata, "bos_token_id", least=0, most=len(token_bytes) - 1)
        num_bytes = _count_bytes(token_rows, token_bytes)
        return cls(token_rows, rows or batch_rows, bos_token_id, token_bytes, num_bytes)

    @property
    def num_tokens(self) -> int:
        """Number of targets, `<|bos|>` between documents included."""
        return int((self.token_rows[:, 1:] != IGNORE_INDEX).sum())

    def __len__(self) -> int:
        """Number of batches."""
        return math.ceil(len(self.token_rows) / self.batch_rows)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the same batches every time: `(batch_rows, seq_len)` on the CPU, the last one too.

        One shape for all, so that a compiled model is compiled once.
        """
        for start in range(0, len(self.token_rows), self.batch_rows):
            rows = self.token_rows[start : start + self.batch_rows]
            if missing := self.batch_rows - len(rows):
                rows = torch.cat([rows, rows.new_full((missing, rows.shape[1]), IGNORE_INDEX)])
            yield Batch.from_rows(rows, bos_token_id=self.bos_token_id)


def _first_tokens(documents: Iterator[Sequence[int]], max_tokens: int) -> Iterator[Sequence[int]]:
    """Yield documents until they have so many tokens, the last one cut."""
    left = max_tokens
    for tokens in documents:
        yield tokens[:left]
        left -= len(tokens)
        if left <= 0:
            return


def _saved_number(
    path: str | os.PathLike[str], metadata: Mapping[str, str], name: str, *, least: int, most: int = 2**31
) -> int:
    """Return a number that `save` wrote beside the tokens, whose hash does not vouch for it."""
    text = metadata.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < 12 and least <= int(text) <= most):
        raise DataError(f"{os.fspath(path)} is damaged: its {name} is {text[:40]!r}; copy it again.")
    return int(text)


def _count_bytes(token_rows: Tensor, token_bytes: Tensor) -> int:
    """Return the UTF-8 bytes of all targets."""
    targets = token_rows[:, 1:]
    return int(token_bytes[targets[targets != IGNORE_INDEX]].sum())


def _hash_rows(token_rows: Tensor) -> str:
    array = token_rows.numpy()
    digest = hashlib.sha256(repr(array.shape).encode())
    digest.update(array.astype("<i4", copy=False).tobytes())
    return digest.hexdigest()


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().astype("<i8", copy=False).tobytes()).hexdigest()
