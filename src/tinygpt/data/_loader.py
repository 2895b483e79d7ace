"""An endless stream of batches whose position can be saved and restored exactly."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch

from tinygpt._numbers import check_whole, given
from tinygpt.data._batch import Batch
from tinygpt.data._documents import DocumentSource
from tinygpt.data._packing import Overflow, Packer, Utilization
from tinygpt.data._prefetch import Ahead
from tinygpt.data._rows import Mark, RowStream
from tinygpt.data._shards import TokenShards
from tinygpt.data._state import read_state, write_state
from tinygpt.errors import ConfigError, DataError
from tinygpt.tokenizer import Tokenizer

logger = logging.getLogger("tinygpt")

# The documented run cropped 35 % of its tokens; this much means that documents and rows do not fit each other.
_MUCH_CROPPED = 0.75


class BatchLoader:
    """Reads documents, tokenizes and packs them, and yields `Batch`es of CPU tensors without end.

    The source is read again and again. An epoch is packed to its end before the next one starts, so a document
    comes once an epoch however small the corpus. Nothing but the arguments decides what comes: no environment,
    no clock, no random state. Text and the token shards made of it give the same batches.

    With several processes each packs the same stream of rows and keeps every `world_size`-th, from `rank` on: one
    step's rows, over all ranks, are the ones that a single process with `rows * world_size` would get.

    Batches are made ahead by threads, tokenization included. `epoch`, `utilization` and `state_dict` speak of the
    batches handed out, not of those waiting. An error leaves the loader behind the last batch handed out.

    Args:
        source: Where documents come from: text, or `TokenShards`.
        tokenizer: What turns text into token ids; None takes that of the shards.
        rows: Rows in a batch of this process.
        seq_len: Positions in a row.
        buffer_documents: How many documents packing chooses from; see `Packer`.
        overflow: What happens to the rest of a document cut to fill a row: `"crop"` drops it, `"carry"` lets it
            start a later row, `"concat"` goes on with it in the next row, whatever a row then starts with.
        seed: Shuffles documents, differently in every epoch; None keeps the source's order.
        shuffle_documents: Documents shuffled at a time: consecutive ones are collected and handed out in random
            order. More mix better and take more memory, 8 bytes a token; windows end early at 8 million tokens.
        rank: Number of this process, from 0.
        world_size: Number of processes.
        num_workers: Threads that tokenize text; None takes one a core, at most 8; 0 tokenizes where batches are
            made. It changes no batch.
        prefetch: Batches made ahead in a thread; 0 makes each when it is asked for. It changes no batch.
        pin_memory: Put batches into pinned memory, from which copies to a GPU overlap with work; None does so where
            CUDA is there.

    Raises:
        ConfigError: If a number is out of range, `overflow` is not known, text comes without a tokenizer, or memory
            cannot be pinned.
        DataError: If the tokenizer is not the one that made the shards. From iteration, if no document of the source
            holds a token, or the source cannot be read.

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
        source: DocumentSource | TokenShards,
        tokenizer: Tokenizer | None = None,
        *,
        rows: int,
        seq_len: int,
        buffer_documents: int = 1000,
        overflow: Overflow = "crop",
        seed: int | None = None,
        shuffle_documents: int = 8192,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int | None = None,
        prefetch: int = 2,
        pin_memory: bool | None = None,
    ) -> None:
        if not (hasattr(source, "read") and hasattr(source, "fingerprint")):
            raise ConfigError(
                f"source is a {type(source).__name__}; open a file or folder with open_source(path), "
                "wrap a list of texts in TextDocuments(texts)."
            )
        if tokenizer is not None and (isinstance(tokenizer, type) or not hasattr(tokenizer, "bos_token_id")):
            name = tokenizer.__name__ if isinstance(tokenizer, type) else type(tokenizer).__name__
            raise ConfigError(
                f"tokenizer is {name}; give a tokenizer such as ByteTokenizer() or load_tokenizer(folder)."
            )
        workers = min(8, os.cpu_count() or 1) if num_workers is None else num_workers
        positive = {"rows": rows, "seq_len": seq_len, "shuffle_documents": shuffle_documents, "world_size": world_size}
        check_whole(**positive, buffer_documents=buffer_documents, rank=rank, num_workers=workers, prefetch=prefetch)
        check_whole(**given(seed=seed))
        for name, value in positive.items():
            if value < 1:
                raise ConfigError(f"{name}={value} is not positive; choose 1 or more.")
        for name, value in (("num_workers", workers), ("prefetch", prefetch)):
            if value < 0:
                raise ConfigError(f"{name}={value} is negative; choose 0 or more.")
        if seed is not None and not 0 <= seed < 1 << 64:
            raise ConfigError(f"seed={seed} is out of range; choose 0 to 2**64 - 1, or None for the source's order.")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank={rank} is not one of {world_size} processes; choose 0 to {world_size - 1}.")
        if pin_memory and not torch.cuda.is_available():
            raise ConfigError("pin_memory=True needs CUDA, which is not there; leave it at None.")
        self._source = source
        self._tokenizer = _tokenizer_of(source, tokenizer)
        packer = Packer(
            row_tokens=seq_len + 1,
            bos_token_id=self._tokenizer.bos_token_id,
            buffer_documents=buffer_documents,
            overflow=overflow,
        )
        self._rows = rows
        self._seq_len = seq_len
        self._rank = rank
        self._world_size = world_size
        self._pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._prefetch = prefetch
        # What decides the stream of rows; how it is dealt out to batches and ranks does not.
        self._settings: dict[str, int | str | None] = {
            "seq_len": seq_len,
            "buffer_documents": buffer_documents,
            "overflow": overflow,
            "seed": seed,
            "shuffle_documents": None if seed is None else shuffle_documents,
        }
        # Taken once: were a file changed while we read, a digest taken later would hide it from the next run.
        self._fingerprints = {"source": source.fingerprint(), "tokenizer": self._tokenizer.fingerprint()}
        self._stream = RowStream(
            source, self._tokenizer, packer, seed=seed, window_documents=shuffle_documents, workers=workers
        )
        self._mark = self._stream.mark()
        self._batches: Ahead[tuple[Batch, Mark]] | None = None
        self._told = False

    @property
    def rows(self) -> int:
        """Rows in a batch of this process."""
        return self._rows

    @property
    def seq_len(self) -> int:
        """Positions in a row."""
        return self._seq_len

    @property
    def source(self) -> DocumentSource | TokenShards:
        """Where documents come from."""
        return self._source

    @property
    def world_size(self) -> int:
        """Number of processes that rows are dealt out to."""
        return self._world_size

    @property
    def tokenizer(self) -> Tokenizer:
        """What turns documents into token ids."""
        return self._tokenizer

    @property
    def epoch(self) -> int:
        """How many times the source was read and packed to its end."""
        return self._mark.epoch

    def utilization(self) -> Utilization:
        """Return how many documents and tokens were read, used and cropped since the first batch."""
        return replace(self._mark.packer.counts)

    def fingerprint(self) -> str:
        """Return a SHA-256 hex digest of source, tokenizer and settings: equal digests, equal rows over all ranks."""
        parts = {**self._fingerprints, "settings": self._settings}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """Return the next batch, `(rows, seq_len)` int64 on the CPU."""
        if self._batches is None:
            batches = _make_batches(self._stream, self._rows, self._rank, self._world_size, self._pin_memory)
            self._batches = Ahead(batches, self._prefetch)
        try:
            batch, self._mark = next(self._batches)
        except BaseException:
            self._rewind(self._mark)
            raise
        if self._mark.epoch and not self._told and self._mark.packer.counts.cropped_fraction > _MUCH_CROPPED:
            self._told = True
            logger.warning(
                "%.0f %% of the tokens read were cropped: documents are longer than a row of %d. Keep them with "
                "overflow='carry', or cut documents smaller, by TextFiles(..., separator=...) for example.",
                100 * self._mark.packer.counts.cropped_fraction,
                self.seq_len,
            )
        return batch

    def close(self) -> None:
        """Stop the threads and drop what they prepared. Asked for another batch, the loader starts them again."""
        if self._batches is not None:
            self._rewind(self._mark)

    def state_dict(self) -> dict[str, Any]:
        """Return the position behind the last batch handed out; every rank's is the same.

        It can be loaded with other `rows`, `world_size`, `num_workers` and `prefetch`: the rows go on where they were.

        Returns:
            JSON values, and under `"tensors"` the packing buffer: `buffer_tokens`, its token ids one document
            after the other, `(tokens,)` int32, and `buffer_lengths`, `(documents,)` int64.
        """
        return write_state(self._mark, settings=self._settings, fingerprints=self._fingerprints)

    def load_state_dict(self, state: dict[str, Any], *, allow_source_change: bool = False) -> None:
        """Continue where `state_dict` was taken: the next rows equal those of the loader that was not stopped.

        Args:
            state: What `state_dict` returned, in this version or in version 1.
            allow_source_change: Accept the state of a loader with another source. This source then starts at its
                beginning and at epoch 0; what was already in the packing buffer comes first, and counters go on.

        Raises:
            DataError: If the state is damaged, of an unknown version, or was saved with other settings, another
                tokenizer or, unless allowed, another source.
        """
        mark = read_state(
            state,
            settings=self._settings,
            fingerprints=self._fingerprints,
            vocab_size=self._tokenizer.vocab_size,
            other_source=allow_source_change,
        )
        self._rewind(mark)

    def _rewind(self, mark: Mark) -> None:
        """Stop making batches, and go on at a mark when asked for one."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None
        self._stream.restore(mark)
        self._mark = mark


def _make_batches(
    stream: RowStream, rows: int, rank: int, world_size: int, pin_memory: bool
) -> Iterator[tuple[Batch, Mark]]:
    """Yield every batch with the place behind it; runs in the thread that works ahead."""
    while True:
        step = [stream.next_row() for _ in range(rows * world_size)]
        # In numpy, since torch would start its threads again for this one; and no row is padded.
        tokens = np.stack(step[rank::world_size]).astype(np.int64)
        batch = Batch(*(torch.from_numpy(part.copy()) for part in (tokens[:, :-1], tokens[:, 1:])))
        if pin_memory:
            batch = Batch(*(part.pin_memory() for part in batch))
        yield batch, stream.mark()


def _tokenizer_of(source: DocumentSource | TokenShards, tokenizer: Tokenizer | None) -> Tokenizer:
    """Return the tokenizer to use, which must be the one that made the shards."""
    if not isinstance(source, TokenShards):
        if tokenizer is None:
            raise ConfigError("tokenizer=None: text needs a tokenizer; only TokenShards bring their own.")
        return tokenizer
    if tokenizer is None:
        return source.tokenizer
    if tokenizer.fingerprint() != source.tokenizer_fingerprint:
        raise DataError(
            f"the token shards were made with another tokenizer: fingerprint {source.tokenizer_fingerprint[:12]} then, "
            f"{tokenizer.fingerprint()[:12]} now; leave the tokenizer out, or tokenize again."
        )
    return tokenizer
