"""Reading `.gz` and `.zst` files as streams that give everything up to the place where a file is damaged."""

import io
import sys
import zlib
from collections.abc import Callable
from typing import Any, cast

from tinygpt.errors import MissingDependencyError

COMPRESSED = (".gz", ".zst")

# Small, because what a block unpacks to is in memory at once.
_BLOCK_BYTES = 16 << 10
_BUFFER_BYTES = 1 << 20


def open_content(file: io.BufferedReader, name: str) -> io.BufferedReader:
    """Return a stream of a file's contents, uncompressed by the suffix of its name.

    Reading a compressed one raises `EOFError` if the file was cut off and `OSError` if it is damaged.

    Raises:
        MissingDependencyError: If nothing installed can read `.zst`.
    """
    lower = name.lower()
    if lower.endswith(".gz"):
        return io.BufferedReader(_Reader(file, lambda: zlib.decompressobj(wbits=31), zlib.error, b"\0"), _BUFFER_BYTES)
    if lower.endswith(".zst"):
        return io.BufferedReader(_Reader(file, *_zstd(), b""), _BUFFER_BYTES)
    return file


class _Reader(io.RawIOBase):
    """Unpacks one part of a file after another; a file may consist of several, as `cat a.gz b.gz` makes it.

    The readers of gzip and zstandard will not do: the first loses what lies within a buffer before the damage, the
    second takes a cut-off file for a whole one.
    """

    def __init__(
        self, file: io.BufferedReader, make: Callable[[], Any], error: type[Exception], padding: bytes
    ) -> None:
        self._file = file
        self._make, self._error, self._padding = make, error, padding
        self._part: Any = None
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            packed = self._file.read(_BLOCK_BYTES)
            if not packed:
                if self._part is not None:
                    raise EOFError("the last part does not end")
                return 0
            try:
                self._unpacked = memoryview(self._unpack(packed))
            except self._error as error:
                raise OSError(f"damaged compressed data: {error}") from None
        target = memoryview(buffer).cast("B")
        size = min(len(target), len(self._unpacked))
        target[:size] = self._unpacked[:size]
        self._unpacked = self._unpacked[size:]
        return size

    def _unpack(self, packed: bytes) -> bytes:
        unpacked = []
        while packed:
            if self._part is None:
                packed = packed.lstrip(self._padding) if self._padding else packed
                if not packed:
                    break
                self._part = self._make()
            unpacked.append(self._part.decompress(packed))
            if not self._part.eof:
                break
            packed = self._part.unused_data
            self._part = None
        return b"".join(unpacked)


def _zstd() -> tuple[Callable[[], Any], type[Exception]]:
    """Return what makes a decompressor of one frame, and the error it raises."""
    if sys.version_info >= (3, 14):
        from compression import zstd

        return zstd.ZstdDecompressor, zstd.ZstdError
    try:
        import zstandard
    except ImportError:
        raise MissingDependencyError('reading .zst files needs zstandard: pip install "tinygpt[zstd]".') from None
    return cast(Callable[[], Any], zstandard.ZstdDecompressor().decompressobj), zstandard.ZstdError
