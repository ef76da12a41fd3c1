"""The bytes of a file in chunks of bounded size, decompressed if the file is compressed."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

CHUNK = 2**16
"""Maximum number of bytes to read at a time."""
ZSTD_CHUNK = 2**11
"""Maximum number of compressed bytes to decompress at a time. The most repetitive input expands to 32,768 times its
size, so that one step yields at most 64 MiB."""
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
"""Kinds of compression by file suffix."""


class Damaged(Exception):
    """A file cannot be read to its end. The message says why, without the content."""


class Meter:
    """Counts the bytes read, for the progress bar. Bytes of a compressed file count as they are on the disk."""

    __slots__ = ("bytes",)

    def __init__(self) -> None:
        self.bytes = 0


class _Counted:
    """A binary stream that adds what is read from it to a meter."""

    def __init__(self, stream: BinaryIO, meter: Meter) -> None:
        # read1 returns as soon as some bytes are there, so that lines from a pipe are not held back.
        self._read = getattr(stream, "read1", stream.read)
        self._meter = meter

    def read(self, size: int) -> bytes:
        data: bytes = self._read(size)
        self._meter.bytes += len(data)
        return data


def read_chunks(stream: BinaryIO, meter: Meter, compression: str | None = None) -> Iterator[bytes]:
    """Yield the content of a stream. ``compression`` is the kind that the file's name promises.

    A stream that begins with the signature of gzip or zstd is decompressed, whatever its name. No text in UTF-8 begins
    with one of these signatures.

    Raises:
        Damaged: the content is not what the name promises, is damaged or truncated, or requires a missing library.
    """
    counted = _Counted(stream, meter)
    head = b""
    while len(head) < len(ZSTD_MAGIC) and (more := counted.read(CHUNK)):
        head += more
    if head.startswith(GZIP_MAGIC):
        compression = "gzip"
    elif head.startswith(ZSTD_MAGIC):
        compression = "zstd"
    source = _Rest(head, counted)
    if compression == "gzip":
        return _read_gzip(source)
    return _read_zstd(source) if compression == "zstd" else _read_plain(source)


class _Rest:
    """A stream whose first bytes have already been read."""

    def __init__(self, head: bytes, stream: _Counted) -> None:
        self._head = head
        self._stream = stream

    def read(self, size: int) -> bytes:
        if not self._head:
            return self._stream.read(size)
        data, self._head = self._head[:size], self._head[size:]
        return data


def _read_plain(source: _Rest) -> Iterator[bytes]:
    while data := source.read(CHUNK):
        yield data


def _read_gzip(source: Any) -> Iterator[bytes]:
    """Decompress all members of a gzip file."""
    is_empty = True
    try:
        with gzip.GzipFile(fileobj=source, mode="rb") as file:
            while data := file.read1(CHUNK):
                is_empty = False
                yield data
            if is_empty and file.mtime is None:  # there is not even a header
                raise EOFError
    except EOFError:
        raise Damaged("truncated gzip file; its end is missing") from None
    except (gzip.BadGzipFile, zlib.error):
        raise Damaged("damaged gzip file; what follows the damage is not read") from None


def _read_zstd(source: _Rest) -> Iterator[bytes]:
    """Decompress all frames of a Zstandard file."""
    try:
        import zstandard
    except ImportError:
        raise Damaged("reading .zst requires zstandard: pip install 'embedonce[zstd]'") from None
    decompressor = zstandard.ZstdDecompressor()
    frame = decompressor.decompressobj()
    is_inside = True
    try:
        while data := source.read(ZSTD_CHUNK):
            while data:
                if not is_inside:
                    frame, is_inside = decompressor.decompressobj(), True
                yield from _split(frame.decompress(data))
                data = b""
                if frame.eof:
                    data, is_inside = frame.unused_data, False
    except zstandard.ZstdError:
        raise Damaged("damaged Zstandard file; what follows the damage is not read") from None
    if is_inside:
        raise Damaged("truncated Zstandard file; its end is missing")


def _split(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), CHUNK):
        yield data[start : start + CHUNK]
