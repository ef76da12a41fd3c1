"""Reads large JSON files piece by piece, such as the key-value stores of LlamaIndex.

A store with 100,000 vectors has a gigabyte of JSON, and ``json.load`` would need about ten gigabytes of memory for it.
:class:`JsonReader` holds only a window of the file. It steps into objects and arrays, returns the bytes of a value, and
skips over values. It also knows the offset of each value, so that a lookup can read a single value again.

Most of such a file are lists of numbers. The reader finds the end of a list with ``bytes.find``, without looking at the
numbers, so it is about 40 times faster than a parser that reports events (ijson reads 67 MB per second).
"""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from embedonce.errors import SourceError

from ._files import open_file

CHUNK: Final = 1 << 20
"""Number of bytes that are read from the file at once."""
MAX_PIECE: Final = 64 << 20
"""Maximum number of bytes of a string, and of a value that is returned. The window never grows beyond twice of it."""
MAX_LIST: Final = 1 << 18
"""Number of bytes in which the end of a list of numbers is searched at once. 8,192 numbers take about 180,000 bytes."""
MAX_NESTED: Final = 16
"""Number of lists in a value that contain something other than numbers, before the search for the end of a list
is given up. It keeps the time for a value proportional to its size, even if the value was made to be slow."""
MAX_NAMES: Final = 10
"""Maximum number of collections that a message names."""

_NAME: Final = re.compile(r"[\w.:/-]{1,100}")
_STRING: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_SPACES: Final = b" \t\n\r"
_SPACE: Final = re.compile(rb"[ \t\n\r]*+")
_SCALAR: Final = re.compile(rb"[^\s,:\[\]{}\"]++")
_TOKEN: Final = re.compile(rb'["\[\]{}]')
_NESTED: Final = (b'"', b"[", b"{")


class JsonReader:
    """Steps through one JSON document in a binary file, from the current position of the file.

    Every method raises :class:`ValueError` if the file is not valid JSON at this place. The message has the offset and
    no content. Values that are skipped or returned are not checked: parse what :meth:`read` returns.
    """

    def __init__(self, file: BinaryIO, *, offset: int = 0) -> None:
        """``offset`` is the position of the file, so that :attr:`offset` counts from the start of the file."""
        self._file = file
        self._data = b""
        self._at = 0
        self._base = offset
        self._is_ended = False
        self.key_offset = offset
        """Position of the key that :meth:`members` yielded last."""

    @property
    def offset(self) -> int:
        """Position of the next byte in the file."""
        return self._base + self._at

    def peek(self) -> bytes:
        """Skip white space, and return the next byte without taking it.

        Raises:
            ValueError: the file ends here.
        """
        while True:
            byte = self._data[self._at : self._at + 1]
            if byte not in _SPACES:  # the empty bytes at the end of the window are in every bytes
                return byte
            self._at = _end(_SPACE.match(self._data, self._at))
            if self._at == len(self._data) and not self._fill(self.offset):
                raise ValueError(f"it ends too early, at byte {self.offset:,}")

    def has_ended(self) -> bool:
        """Return whether only white space is left."""
        try:
            self.peek()
        except ValueError:
            return True
        return False

    def members(self) -> Iterator[bytes]:
        """Yield the key of each member of the object that comes next, as JSON with its quotes.

        The caller reads or skips the value of each member before it asks for the next one.
        """
        self._expect(b"{")
        if self.peek() == b"}":
            self._at += 1
            return
        while True:
            self.peek()
            self.key_offset = self.offset
            key = self._read_string()
            self._expect(b":")
            self.peek()
            yield key
            if not self.has_next(b"}"):
                return

    def elements(self) -> Iterator[None]:
        """Yield once for each element of the array that comes next.

        The caller reads or skips the element before it asks for the next one.
        """
        self._expect(b"[")
        if self.peek() == b"]":
            self._at += 1
            return
        while True:
            yield
            if not self.has_next(b"]"):
                return

    def has_next(self, closing: bytes) -> bool:
        """Take a comma or the closing bracket, and return whether it was a comma."""
        found = self.peek()
        self._at += 1
        if found == b",":
            return True
        if found == closing:
            return False
        raise ValueError(f"it is not valid JSON at byte {self.offset - 1:,}")

    def read(self) -> bytes:
        """Return the bytes of the next value.

        Raises:
            ValueError: the value has more than :data:`MAX_PIECE` bytes, or is not valid JSON at its first level.
        """
        self.peek()
        start = self.offset
        self._pass_value(start)
        return self._data[start - self._base : self._at]

    def skip(self) -> None:
        """Pass over the next value. It may have any size."""
        self.peek()
        self._pass_value(None)

    def _expect(self, byte: bytes) -> None:
        if self.peek() != byte:
            raise ValueError(f"{byte.decode()} is missing at byte {self.offset:,}")
        self._at += 1

    def _read_string(self) -> bytes:
        if self.peek() != b'"':
            raise ValueError(f"a string is missing at byte {self.offset:,}")
        start = self.offset
        self._pass_string(start)
        return self._data[start - self._base : self._at]

    def _pass_value(self, start: int | None) -> None:
        """Move behind the next value. The window keeps everything from the offset ``start``, if it is not None."""
        first = self.peek()
        if first == b'"':
            self._pass_string(start)
        elif first in b"[{":
            self._pass_container(start)
        else:
            self._pass_scalar(start)

    def _pass_container(self, start: int | None) -> None:
        depth = 0
        nested = 0
        while True:
            match = _TOKEN.search(self._data, self._at)
            if match is None:
                # A sparse file ends in terabytes of zero bytes, which read as if they were there.
                if self._data.find(b"\0", self._at) >= 0:
                    raise ValueError(f"it is not valid JSON after byte {self.offset:,}")
                self._at = len(self._data)
                self._need_more(start)
                continue
            self._at = match.start()
            token = match.group()
            if token == b'"':
                self._pass_string(start)
                continue
            self._at += 1
            if token in b"]}":
                depth -= 1
                if not depth:
                    return
                continue
            depth += 1
            if token == b"[" and nested < MAX_NESTED and not self._pass_numbers(start):
                nested += 1

    def _pass_numbers(self, start: int | None) -> bool:
        """Move to the closing bracket of a list of numbers; return False if there is something else in the list."""
        if len(self._data) - self._at < MAX_LIST:
            self._fill(self.offset if start is None else start)
        end = self._data.find(b"]", self._at, self._at + MAX_LIST)
        if end < 0 or any(self._data.find(token, self._at, end) >= 0 for token in _NESTED):
            return False
        self._at = end
        return True

    def _pass_string(self, start: int | None) -> None:
        begin = self.offset
        while True:
            match = _STRING.match(self._data, self._at)
            if match is not None:
                self._at = match.end()
                return
            self._need_more(begin if start is None else start)

    def _pass_scalar(self, start: int | None) -> None:
        begin = self.offset if start is None else start
        while True:
            end = _end(_SCALAR.match(self._data, self._at))
            if self._at < end < len(self._data) or (self._is_ended and end > self._at):
                self._at = end
                return
            if end <= self._at:
                raise ValueError(f"it is not valid JSON at byte {self.offset:,}")
            if not self._fill(begin):
                continue

    def _need_more(self, start: int | None) -> None:
        if not self._fill(self.offset if start is None else start):
            raise ValueError(f"it ends too early, at byte {self._base + len(self._data):,}")

    def _fill(self, start: int) -> bool:
        """Read more of the file, and drop everything before the offset ``start``; return False at the end of the file.

        Raises:
            ValueError: the window would exceed its limit.
        """
        if self._is_ended:
            return False
        kept = self._data[start - self._base :]
        if len(kept) > MAX_PIECE:
            raise ValueError(f"it has a value of more than {MAX_PIECE >> 20} MiB at byte {start:,}")
        # Reading as much as there is already keeps the number of copies of a long value small.
        more = self._file.read(max(CHUNK, len(kept)))
        self._at += self._base - start
        self._base = start
        self._data = kept + more
        self._is_ended = not more
        return bool(more)


def decode_string(raw: bytes) -> str:
    """Return the string of a JSON string with its quotes.

    Raises:
        ValueError: it is not a valid JSON string.
    """
    try:
        return str(json.loads(raw))
    except ValueError:  # its message has a position, and a reason to be counted must not
        raise ValueError("not a valid string in JSON") from None


def _end(match: re.Match[bytes] | None) -> int:
    return -1 if match is None else match.end()


class JsonStore:
    """A JSON file with the collections of a SimpleKVStore of LlamaIndex, ``{collection: {key: value}}``."""

    def __init__(self, path: Path, collection: str, *, example: str) -> None:
        """``example`` is the call of LlamaIndex that writes such a file, for messages."""
        self.path = path
        self.collection = collection
        self._example = example

    def open_file(self) -> BinaryIO:
        """Open the file.

        Raises:
            SourceError: the file is missing or is not a regular file.
        """
        if self.path.is_dir():
            names = sorted(child.name for child in self.path.iterdir() if child.name.endswith(("json", "cache")))[:5]
            hint = f", such as {self.path / names[0]}" if names else ""
            raise SourceError(f"{self.path} is a folder; give the file in it that {self._example} has written{hint}")
        return open_file(self.path)

    @contextmanager
    def open(self) -> Iterator[tuple[Callable[[], None], Iterator[tuple[bytes, JsonReader]]]]:
        """Open the file; return a function that checks that nobody has changed it, and its entries.

        An entry is its key, as JSON with its quotes, and the reader that is in front of its value. The caller reads or
        skips the value. A :class:`ValueError` inside the block becomes a :class:`~embedonce.errors.SourceError`.

        Raises:
            SourceError: the file is missing, is not such a store, or has no such collection.
        """
        with self.open_file() as file:
            version = self.get_version(file)
            with self.explain_errors(file, version):
                yield lambda: self.check_unchanged(file, version), self.read_entries(file)

    @contextmanager
    def explain_errors(self, file: BinaryIO, version: tuple[int, ...]) -> Iterator[None]:
        """Turn a :class:`ValueError` of a reader of the file inside the block into a SourceError."""
        try:
            yield
        except ValueError as error:
            self.check_unchanged(file, version)
            raise SourceError(
                f"{self.path} is not a whole JSON file of LlamaIndex's SimpleKVStore: {error}; give the file that "
                f"{self._example} has written"
            ) from None

    def get_version(self, file: BinaryIO) -> tuple[int, ...]:
        """Return what changes when another program writes the file."""
        found = os.fstat(file.fileno())
        return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)

    def check_unchanged(self, file: BinaryIO, version: tuple[int, ...]) -> None:
        """Check that nobody has written the opened file since ``version``.

        SimpleKVStore writes into the existing file, so a reader may get the start of the old content and the end of the
        new one, and a text with the vector of another one.

        Raises:
            SourceError: the file has changed.
        """
        if self.get_version(file) != version:
            raise SourceError(f"{self.path} was changed while it was read; try again when no program writes it")

    def read_entries(self, file: BinaryIO) -> Iterator[tuple[bytes, JsonReader]]:
        """Yield the key of each entry of the collection, with the reader that is in front of its value."""
        file.seek(0)
        reader = JsonReader(file)
        others: deque[str] = deque(maxlen=MAX_NAMES + 1)
        has_collection = False
        for name in reader.members():
            # Another program's file may have texts in this place, and no message contains a text.
            if reader.peek() != b"{":
                raise ValueError(f"a collection is missing at byte {reader.offset:,}")
            collection = decode_string(name)
            if collection != self.collection:
                others.append(collection)
                reader.skip()
                continue
            has_collection = True
            for key in reader.members():
                yield key, reader
        if not reader.has_ended():
            raise ValueError(f"there is something after its end, at byte {reader.offset:,}")
        if not has_collection:
            raise SourceError(describe_missing_collection(str(self.path), self.collection, others))


def describe_missing_collection(where: str, collection: str, others: Collection[str]) -> str:
    """Return the message about a collection that a store does not have. It names a few others, if they are names."""
    message = f"{where} has no collection {collection!r}"
    if not others:
        return f"{message}, because it is empty"
    if len(others) > MAX_NAMES or not all(_NAME.fullmatch(name) for name in others):
        return f"{message}; set collection to one that it has"
    return f"{message}; it has {', '.join(map(repr, sorted(others)))}: set collection to one of them"
