"""Tokenized documents in memory-mapped files, described and hashed by one manifest."""

import hashlib
import json
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tinygpt.config import Config
from tinygpt.data._documents import Cursor, cursor_number
from tinygpt.data._packing import TokenArray
from tinygpt.errors import CheckpointError, ConfigError, DataError
from tinygpt.manifest import MANIFEST_FILE, read_json
from tinygpt.tokenizer import Tokenizer, load_tokenizer

TOKENIZER_FOLDER = "tokenizer"

# How many offsets become Python integers at a time.
_OFFSETS_AT_ONCE = 4096


class ShardEntry(Config):
    """One shard in the manifest: its two files' contents."""

    documents: int
    tokens: int
    utf8_bytes: int
    tokens_sha256: str
    offsets_sha256: str


class Manifest(Config):
    """What `manifest.json` holds; `sha256` is of all other fields."""

    kind: Literal["tinygpt token shards"] = "tinygpt token shards"
    version: Literal[1] = 1
    dtype: Literal["uint16", "uint32"]
    vocab_size: int
    source_fingerprint: str
    tokenizer_fingerprint: str
    tokenizer_files: dict[str, str]
    shard_tokens: int
    shards: list[ShardEntry]
    sha256: str = ""

    def digest(self) -> str:
        """Return the SHA-256 that `sha256` should be."""
        fields = self.model_dump(mode="json", exclude={"sha256"})
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


class TokenShards:
    """A folder that `tokenize_documents` wrote: documents as token ids, read by memory map.

    Opening it checks the manifest, the tokenizer's files and the size of every file. What a file holds is checked
    against its hash when it is first read from, at about a gigabyte a second; `verify` checks everything at once.

    Args:
        folder: The folder.
        verify: Check hashes at first use. Without it only sizes are checked.

    Raises:
        DataError: If the folder is unfinished, damaged, of another version, or a file is missing or has another
            size; from reading also if a file's hash is not the manifest's.

    Example:
        ```python
        from tinygpt.data import TextDocuments, tokenize_documents
        from tinygpt.tokenizer import ByteTokenizer

        shards = tokenize_documents(TextDocuments(["one", "two"]), ByteTokenizer(), "tokens", processes=1)
        shards.document(1)  # [116 119 111]
        ```
    """

    def __init__(self, folder: str | os.PathLike[str], *, verify: bool = True) -> None:
        self._folder = Path(folder)
        self._manifest = read_manifest(self._folder)
        # The checks that remain to be done at first use.
        self._unverified = set(range(len(self._manifest.shards))) if verify else set[int]()
        self._starts = list(accumulate((shard.documents for shard in self._manifest.shards), initial=0))
        for name, sha256 in self._manifest.tokenizer_files.items():
            _check_hash(self._folder / TOKENIZER_FOLDER / name, sha256)
        for index in range(self.num_shards):
            self._check_sizes(index)
        self._mapped: tuple[int, npt.NDArray[Any], npt.NDArray[np.int64]] | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids, loaded from the folder."""
        tokenizer = load_tokenizer(self._folder / TOKENIZER_FOLDER)
        if tokenizer.fingerprint() != self.tokenizer_fingerprint:
            raise DataError(f"the tokenizer in {self._folder} is not the one that made its tokens; tokenize again.")
        return tokenizer

    @property
    def tokenizer_fingerprint(self) -> str:
        """`fingerprint()` of the tokenizer that made the ids."""
        return self._manifest.tokenizer_fingerprint

    @property
    def source_fingerprint(self) -> str:
        """`fingerprint()` of the text the ids were made from."""
        return self._manifest.source_fingerprint

    @property
    def dtype(self) -> np.dtype[Any]:
        """How ids are stored: little-endian uint16 or uint32."""
        return np.dtype(self._manifest.dtype).newbyteorder("<")

    @property
    def num_shards(self) -> int:
        """Number of shards, each a file of tokens and a file of offsets."""
        return len(self._manifest.shards)

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all documents; `<|bos|>` is not stored."""
        return sum(shard.tokens for shard in self._manifest.shards)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all documents' text."""
        return sum(shard.utf8_bytes for shard in self._manifest.shards)

    def __len__(self) -> int:
        """Number of documents, empty ones included."""
        return self._starts[-1]

    def document(self, index: int) -> TokenArray:
        """Return a copy of one document's token ids, `(tokens,)` int32.

        Raises:
            DataError: If there is no such document, or its shard is damaged.
        """
        if not 0 <= index < len(self):
            raise DataError(f"there is no document {index}; {self._folder} has documents 0 to {len(self) - 1}.")
        return next(self.read({"document": index}))[0]

    def read(self, cursor: Cursor | None = None) -> Iterator[tuple[TokenArray, Cursor]]:
        """Yield documents in their order, `(tokens,)` int32, each with the cursor behind it.

        Raises:
            DataError: If a shard is damaged or the cursor is not one of these shards.
        """
        start = 0 if cursor is None else cursor_number(cursor, "document", len(self))
        for index in range(bisect_right(self._starts, start) - 1, self.num_shards):
            tokens, offsets = self._map(index)
            base = self._starts[index]
            first = max(0, start - base)
            for block in range(first, len(offsets) - 1, _OFFSETS_AT_ONCE):
                ends = offsets[block : block + _OFFSETS_AT_ONCE + 1].tolist()
                for number, (begin, end) in enumerate(pairwise(ends), start=base + block + 1):
                    # A copy, for a view of one document would keep the whole map in memory.
                    yield tokens[begin:end].astype(np.int32), {"document": number}

    def fingerprint(self) -> str:
        """Return a SHA-256 hex digest of the manifest, and so of every file it names."""
        return self._manifest.sha256

    def verify(self) -> None:
        """Check the hash of every file now.

        Raises:
            DataError: If one differs.
        """
        for index in range(self.num_shards):
            self._check_shard(index)

    def _check_sizes(self, index: int) -> None:
        shard = self._manifest.shards[index]
        tokens, offsets = shard_files(self._folder, index)
        _check_size(tokens, shard.tokens * self.dtype.itemsize)
        _check_size(offsets, (shard.documents + 1) * 8)

    def _check_shard(self, index: int) -> None:
        tokens, offsets = shard_files(self._folder, index)
        _check_hash(tokens, self._manifest.shards[index].tokens_sha256)
        _check_hash(offsets, self._manifest.shards[index].offsets_sha256)
        self._unverified.discard(index)

    def _map(self, index: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """Return a shard's tokens and offsets; the last one used stays open."""
        mapped = self._mapped
        if mapped is not None and mapped[0] == index:
            return mapped[1], mapped[2]
        if index in self._unverified:
            self._check_shard(index)
        # Sizes again: reading a map behind the end of a file that shrank would kill the process.
        self._check_sizes(index)
        shard = self._manifest.shards[index]
        tokens_file, offsets_file = shard_files(self._folder, index)
        offsets = np.fromfile(offsets_file, dtype="<i8")
        if offsets[0] != 0 or offsets[-1] != shard.tokens or (np.diff(offsets) < 0).any():
            raise DataError(f"{offsets_file} is damaged: offsets must rise from 0 to {shard.tokens}; tokenize again.")
        tokens = np.empty(0, self.dtype)
        if shard.tokens:
            with tokens_file.open("rb") as file:
                tokens = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=self.dtype)
        self._mapped = (index, tokens, offsets)
        return tokens, offsets


def holds_shards(folder: Path) -> bool:
    """Return whether a folder is one of token shards, whole or not; other programs write a manifest.json as well."""
    try:
        kind = read_json(folder / MANIFEST_FILE).get("kind")
    except CheckpointError:
        return shard_files(folder, 0)[0].exists()
    return kind == Manifest.model_fields["kind"].default


def shard_files(folder: Path, index: int) -> tuple[Path, Path]:
    """Return the paths of a shard's tokens and offsets."""
    return folder / f"tokens-{index:05d}.bin", folder / f"offsets-{index:05d}.bin"


def file_sha256(path: Path) -> str:
    """Return the SHA-256 hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read and check what a finished folder says of itself.

    Raises:
        DataError: If there is none, or it is damaged.
    """
    path = folder / MANIFEST_FILE
    try:
        manifest = Manifest.from_json(path.read_text("utf-8"))
    except OSError as error:
        raise DataError(
            f"{folder} holds no finished token shards: {MANIFEST_FILE}: {error.strerror}; run `tinygpt tokenize` "
            "to make them, or again to finish them."
        ) from None
    except (ConfigError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged or from another version of tinygpt: {error}") from None
    if manifest.sha256 != manifest.digest():
        raise DataError(f"{path} is damaged: it does not have the sha256 it names; tokenize again.")
    return manifest


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(
            f"{path} is missing or cannot be read ({error.strerror}); restore it, or tokenize again."
        ) from None
    if size != expected:
        raise DataError(f"{path} has {size:,} bytes and the manifest says {expected:,}; restore it, or tokenize again.")


def _check_hash(path: Path, expected: str) -> None:
    try:
        found = file_sha256(path)
    except OSError as error:
        raise DataError(
            f"{path} is missing or cannot be read ({error.strerror}); restore it, or tokenize again."
        ) from None
    if found != expected:
        raise DataError(
            f"{path} was changed since it was written: its sha256 is {found[:12]}..., the manifest says "
            f"{expected[:12]}...; restore it, or tokenize again."
        )
