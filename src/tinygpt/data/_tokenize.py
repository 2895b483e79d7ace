"""Text to token shards: in parallel, resumable at any moment, with the same bytes however it went."""

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from tinygpt._disk import sync, write_text
from tinygpt._numbers import check_whole, given
from tinygpt.config import Config
from tinygpt.data._documents import NO_TOKENS, Cursor, DocumentSource
from tinygpt.data._shards import (
    TOKENIZER_FOLDER,
    Manifest,
    ShardEntry,
    TokenShards,
    file_sha256,
    read_manifest,
    shard_files,
)
from tinygpt.errors import ConfigError, DataError
from tinygpt.manifest import MANIFEST_FILE
from tinygpt.tokenizer import EncodedTexts, EncoderPool, Tokenizer

_UNFINISHED_FILE = "unfinished.json"

# One task of a process.
_CHUNK_DOCUMENTS = 1024
_CHUNK_CHARACTERS = 1 << 20


class TokenizeProgress(NamedTuple):
    """How far `tokenize_documents` is.

    Attributes:
        documents: Documents tokenized, in earlier runs too.
        utf8_bytes: Their bytes of text.
        tokens: Their tokens.
        shards: Shards finished.
        shard_fraction: How full the next shard is, 0 to 1.
        new_bytes: Bytes of text tokenized in this run.
        seconds: Time this run has taken.
        cursor: The source's cursor behind the last document.
    """

    documents: int
    utf8_bytes: int
    tokens: int
    shards: int
    shard_fraction: float
    new_bytes: int
    seconds: float
    cursor: Cursor | None


class _Plan(Config):
    """What `unfinished.json` holds: what is being done, and the shards that are done."""

    version: Literal[1] = 1
    source_fingerprint: str
    tokenizer_fingerprint: str
    shard_tokens: int
    shards: list[ShardEntry]
    cursor: dict[str, Any] | None = None


def tokenize_documents(
    source: DocumentSource,
    tokenizer: Tokenizer,
    out: str | os.PathLike[str],
    *,
    processes: int | None = None,
    shard_tokens: int = 1 << 25,
    progress: Callable[[TokenizeProgress], None] | None = None,
) -> TokenShards:
    """Write the token ids of every document to a folder of token shards.

    A run that was killed, at any moment, is taken up by calling this again: finished shards are not made again. The
    bytes written are the same for any number of processes and interruptions. A folder that is already finished is
    opened and nothing is done. Processes are spawned: a script needs the usual `if __name__ == "__main__":`.

    Args:
        source: Text.
        tokenizer: One that `load_tokenizer` can read back after `save`; it is saved into the folder.
        out: The folder, new or unfinished.
        processes: Processes that tokenize; 1 stays in this process, None takes one a core. The source is read by
            this one.
        shard_tokens: A shard ends with the document that brings it to this many tokens. Memory for reading grows
            with it: two bytes a token, four if the vocabulary has more than 65,536 entries.
        progress: Called after every megabyte or so of text.

    Returns:
        The shards.

    Raises:
        ConfigError: If `processes` or `shard_tokens` is below 1.
        DataError: If the source cannot be read, holds no token or changed meanwhile, the tokenizer cannot be saved
            and loaded, the folder belongs to another source, tokenizer or shard size, holds other files, or its
            finished shards are damaged.

    Example:
        ```python
        from tinygpt.data import embedded_corpus, tokenize_documents
        from tinygpt.tokenizer import ByteTokenizer

        shards = tokenize_documents(embedded_corpus(), ByteTokenizer(), "moby-dick-tokens", processes=1)
        len(shards), shards.num_tokens  # (124, 1105943)
        ```
    """
    check_whole(shard_tokens=shard_tokens, **given(processes=processes))
    if shard_tokens < 1:
        raise ConfigError(f"shard_tokens={shard_tokens} is not positive; choose 1 or more.")
    if processes is not None and processes < 1:
        raise ConfigError(f"processes={processes} is not positive; choose 1 or more, or None for one a core.")
    folder = Path(out)
    wanted = _Plan(
        source_fingerprint=source.fingerprint(),
        tokenizer_fingerprint=tokenizer.fingerprint(),
        shard_tokens=shard_tokens,
        shards=[],
    )
    if (folder / MANIFEST_FILE).exists():
        _refuse_other(folder, wanted, read_manifest(folder))
        shards = TokenShards(folder)
        _remove_leftovers(folder)
        return shards
    plan = _begin(folder, wanted, tokenizer)
    with EncoderPool(folder / TOKENIZER_FOLDER, processes=processes) as pool:
        plan = _write_shards(folder, plan, source, pool, progress)
    if not any(shard.tokens for shard in plan.shards):
        raise DataError(NO_TOKENS)
    if source.fingerprint() != plan.source_fingerprint:
        raise DataError(f"the source changed while it was read; remove {folder} and tokenize again.")
    _finish(folder, plan, tokenizer)
    return TokenShards(folder)


def _begin(folder: Path, wanted: _Plan, tokenizer: Tokenizer) -> _Plan:
    """Return the plan to go on with, and see to it that the tokenizer is in the folder."""
    path = folder / _UNFINISHED_FILE
    if path.exists():
        try:
            plan = _Plan.from_json(path.read_text("utf-8"))
        except (ConfigError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is damaged or from another version of tinygpt: {error}") from None
        _refuse_other(folder, wanted, plan)
        _check_finished(folder, plan, tokenizer)
    else:
        if folder.exists() and not folder.is_dir():
            raise DataError(f"{folder} is a file; choose a new folder.")
        strangers = [] if not folder.exists() else [p.name for p in folder.iterdir() if not p.name.endswith(".tmp")]
        if strangers:
            raise DataError(f"{folder} holds other files ({', '.join(sorted(strangers)[:3])}); choose a new folder.")
        folder.mkdir(parents=True, exist_ok=True)
        plan = wanted
        write_text(path, plan.to_json())
    tokenizer.save(folder / TOKENIZER_FOLDER)
    return plan


def _refuse_other(folder: Path, wanted: _Plan, found: _Plan | Manifest) -> None:
    for name in ("source_fingerprint", "tokenizer_fingerprint", "shard_tokens"):
        was, now = getattr(found, name), getattr(wanted, name)
        if was != now:
            was, now = (value[:12] if isinstance(value, str) else value for value in (was, now))
            raise DataError(
                f"{folder} was begun with {name}={was} and this call has {now}; choose another folder, or remove it."
            )


def _check_finished(folder: Path, plan: _Plan, tokenizer: Tokenizer) -> None:
    width = np.dtype(_dtype(tokenizer)).itemsize
    for index, shard in enumerate(plan.shards):
        sizes = (shard.tokens * width, (shard.documents + 1) * 8)
        for path, expected in zip(shard_files(folder, index), sizes, strict=True):
            size = path.stat().st_size if path.exists() else None
            if size != expected:
                raise DataError(
                    f"{path} was finished with {expected:,} bytes and now has {size}; remove {folder} and begin again."
                )


def _write_shards(
    folder: Path,
    plan: _Plan,
    source: DocumentSource,
    pool: EncoderPool,
    progress: Callable[[TokenizeProgress], None] | None,
) -> _Plan:
    """Write all shards that the plan lacks; return the plan with them."""
    started = time.perf_counter()
    resumed_bytes = sum(shard.utf8_bytes for shard in plan.shards)
    cursors: deque[list[Cursor]] = deque()
    writer = _ShardWriter(folder, len(plan.shards))

    def close_shard(cursor: Cursor) -> None:
        nonlocal plan, writer
        plan = plan.replace(shards=[*plan.shards, writer.close()], cursor=cursor)
        write_text(folder / _UNFINISHED_FILE, plan.to_json())
        writer = _ShardWriter(folder, len(plan.shards))

    try:
        for encoded in pool.map(_chunks(source.read(plan.cursor), cursors)):
            behind = cursors.popleft()
            first = 0
            while first < len(behind):
                # The documents up to the one that fills the shard.
                reached = writer.tokens + np.cumsum(encoded.num_tokens[first:])
                last = min(first + int(np.searchsorted(reached, plan.shard_tokens)) + 1, len(behind))
                writer.write(encoded, first, last)
                if writer.tokens >= plan.shard_tokens:
                    close_shard(behind[last - 1])
                first = last
            if progress is not None:
                totals = [*plan.shards, writer.entry()]
                utf8_bytes = sum(shard.utf8_bytes for shard in totals)
                progress(
                    TokenizeProgress(
                        documents=sum(shard.documents for shard in totals),
                        utf8_bytes=utf8_bytes,
                        tokens=sum(shard.tokens for shard in totals),
                        shards=len(plan.shards),
                        shard_fraction=writer.tokens / plan.shard_tokens,
                        new_bytes=utf8_bytes - resumed_bytes,
                        seconds=time.perf_counter() - started,
                        cursor=behind[-1],
                    )
                )
        if writer.documents:
            close_shard(behind[-1])
    finally:
        writer.discard()
    return plan


def _chunks(documents: Iterator[tuple[str, Cursor]], cursors: deque[list[Cursor]]) -> Iterator[list[str]]:
    """Yield texts to tokenize together, and put the cursors behind them aside for when they come back."""
    texts: list[str] = []
    behind: list[Cursor] = []
    characters = 0
    for text, cursor in documents:
        texts.append(text)
        behind.append(cursor)
        characters += len(text)
        if len(texts) == _CHUNK_DOCUMENTS or characters >= _CHUNK_CHARACTERS:
            cursors.append(behind)
            yield texts
            texts, behind, characters = [], [], 0
    if texts:
        cursors.append(behind)
        yield texts


class _ShardWriter:
    """The two files of one shard, under other names until they are complete."""

    def __init__(self, folder: Path, index: int) -> None:
        self._paths = shard_files(folder, index)
        self._temporary = tuple(path.with_name(f"{path.name}.{os.getpid()}.tmp") for path in self._paths)
        self._tokens_file = self._temporary[0].open("wb")
        self._tokens_hash = hashlib.sha256()
        self._ends = [np.zeros(1, dtype="<i8")]
        self.documents = 0
        self.tokens = 0
        self._utf8_bytes = 0

    def write(self, encoded: EncodedTexts, first: int, last: int) -> None:
        """Append documents `first` to `last - 1` of a chunk."""
        counts = encoded.num_tokens
        begin, size = int(counts[:first].sum()), int(counts[first:last].sum())
        ids = encoded.token_ids[begin : begin + size]
        content = ids.astype(ids.dtype.newbyteorder("<"), copy=False).tobytes()
        self._tokens_file.write(content)
        self._tokens_hash.update(content)
        self._ends.append((self.tokens + np.cumsum(counts[first:last])).astype("<i8"))
        self.documents += last - first
        self.tokens += size
        self._utf8_bytes += int(encoded.num_bytes[first:last].sum())

    def entry(self, offsets_sha256: str = "") -> ShardEntry:
        """Return the manifest's entry for what was written."""
        return ShardEntry(
            documents=self.documents,
            tokens=self.tokens,
            utf8_bytes=self._utf8_bytes,
            tokens_sha256=self._tokens_hash.hexdigest(),
            offsets_sha256=offsets_sha256,
        )

    def close(self) -> ShardEntry:
        """Make both files durable and give them their names."""
        offsets = np.concatenate(self._ends).tobytes()
        self._temporary[1].write_bytes(offsets)
        self._tokens_file.close()
        for temporary, path in zip(self._temporary, self._paths, strict=True):
            sync(temporary)
            temporary.replace(path)
        sync(self._paths[0].parent)
        return self.entry(hashlib.sha256(offsets).hexdigest())

    def discard(self) -> None:
        """Remove what was not completed."""
        self._tokens_file.close()
        for temporary in self._temporary:
            temporary.unlink(missing_ok=True)


def _finish(folder: Path, plan: _Plan, tokenizer: Tokenizer) -> None:
    files = sorted(path for path in (folder / TOKENIZER_FOLDER).iterdir() if path.is_file())
    manifest = Manifest(
        dtype=_dtype(tokenizer),
        vocab_size=tokenizer.vocab_size,
        source_fingerprint=plan.source_fingerprint,
        tokenizer_fingerprint=plan.tokenizer_fingerprint,
        tokenizer_files={path.name: file_sha256(path) for path in files},
        shard_tokens=plan.shard_tokens,
        shards=plan.shards,
    )
    write_text(folder / MANIFEST_FILE, manifest.replace(sha256=manifest.digest()).to_json())
    _remove_leftovers(folder)


def _remove_leftovers(folder: Path) -> None:
    """Remove what only an unfinished folder needs, and what killed runs left."""
    (folder / _UNFINISHED_FILE).unlink(missing_ok=True)
    for path in folder.glob("*.tmp"):
        path.unlink(missing_ok=True)


def _dtype(tokenizer: Tokenizer) -> Literal["uint16", "uint32"]:
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
