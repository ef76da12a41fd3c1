"""A read-only backend of frames in one file, and the ways in which such a backend can be wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

from embedonce.contracts import Capabilities, StoredSize
from embedonce.errors import TierError

_WRITTEN: set[str] = set()
"""The files that this process has written."""


def write_slate(path: Path, items: Mapping[str, bytes]) -> None:
    """Write a line of JSON with the place and the checksum of each value, and then the values."""
    index: dict[str, tuple[int, int, int]] = {}
    body = bytearray()
    for key in sorted(items):
        index[key] = (len(body), len(items[key]), crc32(items[key]))
        body += items[key]
    path.write_bytes(json.dumps(index).encode() + b"\n" + body)
    _WRITTEN.add(str(path))


def damage_slate(path: Path, key: str) -> None:
    """Change the middle of a value."""
    content = bytearray(path.read_bytes())
    index = json.loads(content.partition(b"\n")[0])
    start, size, _ = index[key]
    content[content.index(b"\n") + 1 + start + size // 2] ^= 0xFF
    path.write_bytes(content)


class SlateBackend:
    """Reads the values of one file. Reads give their position, so threads and forked children may share the file."""

    capabilities = Capabilities(get=True, scan=True, count=True, bounded=True, read_only=True, max_batch=500)

    def __init__(self, *, path: str) -> None:
        self.path = path
        self.file = os.open(path, os.O_RDONLY)
        head = os.pread(self.file, 2**22, 0).partition(b"\n")[0]
        self.index: dict[str, Any] = json.loads(head)
        self.start = len(head) + 1

    def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        self.check_open()
        return {key: self.read(key) for key in dict.fromkeys(keys) if key in self.index}

    def get(self, key: str) -> bytes | None:
        return self.get_many([key]).get(key)

    def scan(self, prefix: str) -> Iterator[str]:
        self.check_open()
        return iter([key for key in self.index if key.startswith(prefix)])

    def count(self, prefix: str) -> int:
        return len(list(self.scan(prefix)))

    def measure(self, prefix: str) -> StoredSize:
        sizes = [self.index[key][1] for key in self.scan(prefix)]
        return StoredSize(bytes=sum(sizes) if sizes else None)

    def verify(self) -> str:
        damaged = sum(not self.read(key) and self.index[key][1] > 0 for key in self.index)
        if damaged:
            raise TierError(f"{damaged} values are damaged; write the file again")
        return f"{len(self.index)} values are intact"

    def close(self) -> None:
        if self.file >= 0:
            os.close(self.file)
            self.file = -1

    def check_open(self) -> None:
        if self.file < 0:
            raise ValueError("the file is closed")

    def read(self, key: str) -> bytes:
        start, size, checksum = self.index[key]
        value = os.pread(self.file, size, self.start + start)
        return value if crc32(value) == checksum else b""


class KnowsWhatItHasWritten(SlateBackend):
    """Knows the keys of a file only in the process that has written it."""

    def __init__(self, *, path: str) -> None:
        super().__init__(path=path)
        if path not in _WRITTEN:
            self.index = {}
