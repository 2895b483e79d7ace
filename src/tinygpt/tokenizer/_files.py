"""A tokenizer as files: `tokenizer_config.json`, and for a BPE the ranks in `tokenizer.tiktoken`."""

import base64
import binascii
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from tinygpt.config import Config
from tinygpt.errors import DataError

CONFIG_FILE = "tokenizer_config.json"
RANKS_FILE = "tokenizer.tiktoken"

# The largest vocabularies in use (200 k entries) need 4 MB of ranks; a file far beyond that is not a tokenizer.
MAX_RANKS_BYTES = 64 << 20
_MAX_BYTES = {CONFIG_FILE: 1 << 20, RANKS_FILE: MAX_RANKS_BYTES}


class TokenizerConfig(Config):
    """What `tokenizer_config.json` holds."""

    kind: Literal["bpe", "byte"]
    version: Literal[1] = 1
    special_tokens: dict[str, int]
    pattern: str | None = None
    ranks_sha256: str | None = None


def write_tokenizer(
    folder: str | os.PathLike[str],
    *,
    kind: Literal["bpe", "byte"],
    special_tokens: dict[str, int],
    pattern: str | None = None,
    ranks: bytes | None = None,
) -> None:
    """Write the files of one tokenizer, each complete or not at all."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    sha256 = None
    if ranks is not None:
        sha256 = hashlib.sha256(ranks).hexdigest()
        replace_file(target / RANKS_FILE, ranks)
    config = TokenizerConfig(kind=kind, special_tokens=special_tokens, pattern=pattern, ranks_sha256=sha256)
    # Last, because it names the hash of the other file: a save that stops half way is then found by loading.
    replace_file(target / CONFIG_FILE, config.to_json().encode("utf-8"))


def format_ranks(ranks: Mapping[bytes, int]) -> bytes:
    """Return ranks in tiktoken's text format: `base64(token) rank`, one a line, by rank."""
    by_rank = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in by_rank)


def parse_ranks(text: bytes, path: Path) -> dict[bytes, int]:
    """Read what `format_ranks` wrote; `path` is for the error message.

    Raises:
        DataError: If a line is not `base64 rank` or a token comes twice.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            if token in ranks:
                raise ValueError("the token comes twice")
            ranks[token] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise DataError(f"{path} line {number}: expected 'base64 rank', got {line[:60]!r} ({error}).") from None
    return ranks


def read_file(path: Path) -> bytes:
    """Return the bytes of one of the files that `write_tokenizer` writes.

    Raises:
        DataError: If it cannot be read or is larger than such a file can be.
    """
    return read_limited(path, _MAX_BYTES[path.name], "give the folder that a tokenizer's save() wrote")


def read_limited(path: Path, limit: int, hint: str) -> bytes:
    """Return the bytes of a tokenizer file.

    Raises:
        DataError: If it cannot be read or is larger than `limit` bytes.
    """
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise DataError(
            f"no tokenizer can be read from {path.parent}: {path.name}: {error.strerror}; {hint}."
        ) from None
    if len(content) > limit:
        raise DataError(f"{path} is larger than {limit:,} bytes and cannot be a tokenizer file.")
    return content


def replace_file(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it, so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
