"""An endless stream of batches whose position can be saved and restored exactly."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Self

import numpy as np
import torch

from tinygpt.data._batch import Batch
from tinygpt.data._documents import Cursor, DocumentSource
from tinygpt.data._packing import Overflow, Packer, TokenArray, Utilization
from tinygpt.data._state import buffer_arrays, buffer_tensors, check_state
from tinygpt.errors import ConfigError, DataError
from tinygpt.tokenizer import Tokenizer

# Documents are tokenized together for the threads' sake, up to a size that keeps memory small.
_ENCODE_DOCUMENTS = 64
_ENCODE_CHARACTERS = 4_000_000


class BatchLoader:
    """Reads documents, tokenizes and packs them, and yields `Batch`es of CPU tensors without end.

    The source is read again and again. An epoch is packed to its end before the next one starts, so a document
    comes once an epoch however small the corpus. Nothing but the arguments decides what comes: no environment,
    no clock, no random state.

    With several processes each packs the same stream of rows and keeps every `world_size`-th, from `rank` on: one
    step's rows, over all ranks, are the ones that a single process with `rows * world_size` would get.

    Args:
        source: Where documents come from.
        tokenizer: What turns them into token ids.
        rows: Rows in a batch of this process.
        seq_len: Positions in a row.
        buffer_documents: How many documents packing chooses from; see `Packer`.
        overflow: What happens to the rest of a document cut to fill a row: `"crop"` drops it, `"carry"` keeps it.
        rank: Number of this process, from 0.
        world_size: Number of processes.

    Raises:
        ConfigError: If a number is out of range or `overflow` is not known.
        DataError: From iteration, if no document of the source holds a token, or the source cannot be read.

    Example:
        ```python
        from tinygpt.data import BatchLoader, embedded_corpus
        from tinygpt.tokenizer import ByteTokenizer

        loader = BatchLoader(embedded_corpus(), ByteTokenizer(), rows=4, seq_len=128, overflow="carry")
        batch = next(loader)
        batch.inputs.shape  # (4, 128)
        ```
    """

    def __init__(
        self,
        source: DocumentSource,
        tokenizer: Tokenizer,
        *,
        rows: int,
        seq_len: int,
        buffer_documents: int = 1000,
        overflow: Overflow = "crop",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        for name, value in (("rows", rows), ("seq_len", seq_len), ("world_size", world_size)):
            if value < 1:
                raise ConfigError(f"{name}={value} is not positive; choose 1 or more.")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank={rank} is not one of {world_size} processes; choose 0 to {world_size - 1}.")
        self._packer = Packer(
            row_tokens=seq_len + 1,
            bos_token_id=tokenizer.bos_token_id,
            buffer_documents=buffer_documents,
            overflow=overflow,
        )
        self._source = source
        self._tokenizer = tokenizer
        self._rank = rank
        self._settings: dict[str, int | str] = {
            "rows": rows,
            "seq_len": seq_len,
            "buffer_documents": buffer_documents,
            "overflow": overflow,
            "world_size": world_size,
        }
        # Taken once: were a file changed while we read, a digest taken later would hide it from the next run.
        self._fingerprints = {"source": source.fingerprint(), "tokenizer": tokenizer.fingerprint()}
        self._epoch = 0
        self._cursor: Cursor | None = None
        self._documents = self._read_epoch()

    @property
    def tokenizer(self) -> Tokenizer:
        """What turns documents into token ids."""
        return self._tokenizer

    @property
    def epoch(self) -> int:
        """How many times the source was read and packed to its end."""
        return self._epoch

    def utilization(self) -> Utilization:
        """Return how many documents and tokens were read, used and cropped since the first batch."""
        return self._packer.utilization

    def fingerprint(self) -> str:
        """Return a SHA-256 hex digest of source, tokenizer and settings: equal digests, equal rows over all ranks."""
        parts = {**self._fingerprints, "settings": self._settings}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """Return the next batch, `(rows, seq_len)` int64 on the CPU."""
        rows, world_size = int(self._settings["rows"]), int(self._settings["world_size"])
        step = [self._next_row() for _ in range(rows * world_size)]
        kept = torch.from_numpy(np.stack(step[self._rank :: world_size]))
        return Batch.from_rows(kept, bos_token_id=self._tokenizer.bos_token_id)

    def state_dict(self) -> dict[str, Any]:
        """Return the position behind the last batch; every rank's is the same.

        Returns:
            JSON values, and under `"tensors"` the packing buffer: `buffer_tokens`, its token ids one document
            after the other, `(tokens,)` int32, and `buffer_lengths`, `(documents,)` int64.
        """
        return {
            "version": 1,
            "epoch": self._epoch,
            "cursor": self._cursor,
            "counters": asdict(self._packer.utilization),
            "settings": dict(self._settings),
            "source_fingerprint": self._fingerprints["source"],
            "tokenizer_fingerprint": self._fingerprints["tokenizer"],
            "tensors": buffer_tensors(self._packer.buffered_documents()),
        }

    def load_state_dict(self, state: dict[str, Any], *, allow_source_change: bool = False) -> None:
        """Continue where `state_dict` was taken: the next batches equal those of the loader that was not stopped.

        Args:
            state: What `state_dict` returned.
            allow_source_change: Accept the state of a loader with another source. This source then starts at its
                beginning and at epoch 0; what was already in the packing buffer comes first, and counters go on.

        Raises:
            DataError: If the state is damaged, of another version, or was saved with other settings, another
                tokenizer or, unless allowed, another source.
        """
        check_state(state, settings=self._settings, fingerprints=self._fingerprints, other_source=allow_source_change)
        documents, counts = buffer_arrays(state["tensors"]), Utilization(**state["counters"])
        same_source = state["source_fingerprint"] == self._fingerprints["source"]
        self._packer.restore(documents, counts)
        self._epoch = state["epoch"] if same_source else 0
        self._cursor = state["cursor"] if same_source else None
        self._documents = self._read_epoch()

    def _next_row(self) -> TokenArray:
        """Return the next row of the global stream, starting new epochs as needed."""
        try:
            while (row := self._packer.next_row(self._documents)) is None:
                self._epoch += 1
                self._cursor = None
                self._documents = self._read_epoch()
        except BaseException:
            # A generator that raised looks like one that ended; asked again, we must not take that for an epoch.
            self._documents = self._read_epoch()
            raise
        return row

    def _read_epoch(self) -> Iterator[TokenArray]:
        """Yield the token ids of the rest of this epoch, moving the cursor along with what was taken."""
        # Behind a cursor lies at least one document with tokens, or there would have been no state to save.
        found = self._cursor is not None
        documents = self._source.read(self._cursor)
        while chunk := _take_chunk(documents):
            encoded = self._tokenizer.encode_batch([text for text, _ in chunk])
            for token_ids, (_, cursor) in zip(encoded, chunk, strict=True):
                self._cursor = cursor
                found = found or len(token_ids) > 0
                yield np.asarray(token_ids, dtype=np.int32)
        if not found:
            raise DataError("the source has no document with a token in it; give it text.")


def _take_chunk(documents: Iterator[tuple[str, Cursor]]) -> list[tuple[str, Cursor]]:
    """Return the next documents to tokenize together, at least one unless the source has ended."""
    chunk = []
    characters = 0
    for text, cursor in documents:
        chunk.append((text, cursor))
        characters += len(text)
        if len(chunk) == _ENCODE_DOCUMENTS or characters >= _ENCODE_CHARACTERS:
            break
    return chunk
