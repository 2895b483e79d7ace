"""Token ids as arrays, and tokenizing in several processes."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tinygpt._numbers import check_whole
from tinygpt.errors import ConfigError, DataError
from tinygpt.tokenizer._base import Tokenizer
from tinygpt.tokenizer._load import load_tokenizer


def encode_array(tokenizer: Tokenizer, text: str) -> npt.NDArray[np.uint32]:
    """Return the token ids of a text as an array, by the tokenizer's own `encode_array` where it has one.

    A list of Python integers costs more than finding the ids: 36 bytes each, made while holding Python's lock.

    Raises:
        DataError: If the text holds a surrogate, which has no UTF-8 form.
    """
    method = getattr(tokenizer, "encode_array", None)
    return np.asarray(tokenizer.encode(text) if method is None else method(text), dtype=np.uint32)


class EncodedTexts(NamedTuple):
    """Several tokenized texts, one behind the other.

    Attributes:
        token_ids: Ids of all texts, `(tokens,)` uint16 if the vocabulary has at most 65,536 entries, else uint32.
        num_tokens: Tokens of each text, `(texts,)` int64.
        num_bytes: UTF-8 bytes of each text, `(texts,)` int64.
    """

    token_ids: npt.NDArray[Any]
    num_tokens: npt.NDArray[np.int64]
    num_bytes: npt.NDArray[np.int64]


class EncoderPool:
    """Processes that tokenize with a saved tokenizer. Use it in a `with` statement.

    Processes are spawned: a script that uses this needs the usual `if __name__ == "__main__":`. They end with their
    parent, however it ended.

    Args:
        folder: Folder that a tokenizer's `save` wrote.
        processes: Number of processes; 1 tokenizes in this one; None takes one a core.

    Raises:
        ConfigError: If `processes` is below 1.
        DataError: If the tokenizer cannot be loaded.
    """

    def __init__(self, folder: str | os.PathLike[str], *, processes: int | None = None) -> None:
        processes = (os.cpu_count() or 1) if processes is None else processes
        check_whole(processes=processes)
        if processes < 1:
            raise ConfigError(f"processes={processes} is not positive; choose 1 or more, or None for one a core.")
        self._tokenizer = load_tokenizer(folder)
        self._processes = processes
        self._pool: ProcessPoolExecutor | None = None
        if processes > 1:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(processes, context, _start_process, (os.fspath(folder),))

    def __enter__(self) -> "EncoderPool":
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, chunks: Iterable[Sequence[str]]) -> Iterator[EncodedTexts]:
        """Yield each chunk tokenized, in the order of the chunks, with up to two a process in work.

        Raises:
            DataError: If a text holds a surrogate, or a process was killed.
        """
        if self._pool is None:
            yield from (_encode(self._tokenizer, chunk) for chunk in chunks)
            return
        pending: deque[Future[EncodedTexts]] = deque()
        try:
            for chunk in chunks:
                pending.append(self._pool.submit(_encode_in_process, chunk))
                if len(pending) > 2 * self._processes:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                "a process that tokenizes was killed, perhaps for lack of memory, or could not start, because the "
                "script does its work outside `if __name__ == '__main__':`; use fewer processes, or add that line. "
                "What was finished is kept where the caller can go on."
            ) from None


_process_tokenizer: Tokenizer


def _start_process(folder: str) -> None:
    """Prepare a process of the pool."""
    global _process_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then shuts the pool down
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _process_tokenizer = load_tokenizer(folder)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)  # the executor's own queues keep a process waiting for ever when its parent was killed


def _encode_in_process(texts: Sequence[str]) -> EncodedTexts:
    return _encode(_process_tokenizer, texts)


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> EncodedTexts:
    arrays = [encode_array(tokenizer, text) for text in texts]
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    return EncodedTexts(
        np.concatenate([np.empty(0, dtype), *arrays], dtype=dtype, casting="unsafe"),
        np.array([len(array) for array in arrays], dtype=np.int64),
        np.array([len(text) if text.isascii() else len(text.encode()) for text in texts], dtype=np.int64),
    )
