"""Reading passages: from paths to a stream of what is in them, in a fixed order and in bounded memory."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import BinaryIO, NamedTuple

from .formats import BY_SUFFIX, Format, Meter, Split, read_csv, read_jsonl, read_parquet, read_text
from .passages import Broken, Found, name_of

STDIN = "-"
UTF16 = (b"\xff\xfe", b"\xfe\xff")


class _File(NamedTuple):
    path: str
    named: bool
    """Given on the command line itself, and not found in a folder."""


class Reader:
    """The passages of some files and folders, in order. Iterate once.

    Folders are read in the order of their names, at every level; hidden files, linked folders and
    what is in ``leave_out`` are passed over, and so are binary files, which are counted.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        split: Split = "paragraph",
        field: str = "text",
        format: Format = "auto",
        leave_out: Collection[str] = (),
    ) -> None:
        self._paths = tuple(paths)
        self._split: Split = split
        self._field = field
        self._format: Format = format
        self._leave_out = frozenset(map(os.path.realpath, leave_out))
        self._meter = Meter()
        self.files = 0
        """Files opened so far."""
        self.binary = 0
        """Binary files passed over so far."""

    @property
    def bytes_read(self) -> int:
        return self._meter.bytes

    def bytes_total(self) -> int | None:
        """Return the size of everything that will be read, or None where a pipe is among it."""
        total = 0
        for found in self._walk():
            if isinstance(found, Broken):
                continue
            if found.path == STDIN:
                return None
            try:
                status = os.stat(found.path)
            except OSError:
                continue  # it is named when its turn to be read comes
            if not stat.S_ISREG(status.st_mode):
                return None
            total += status.st_size
        return total

    def __iter__(self) -> Iterator[Found]:
        for found in self._walk():
            if isinstance(found, Broken):
                yield found
                continue
            try:
                yield from self._read(found)
            except OSError as error:
                yield Broken(name_of(found.path), None, _reason(error))

    # --- which files --------------------------------------------------------------------------

    def _walk(self) -> Iterator[_File | Broken]:
        for path in self._paths:
            if path != STDIN and os.path.isdir(path):
                yield from self._folder(path)
            else:
                yield _File(path, named=True)

    def _folder(self, top: str) -> Iterator[_File | Broken]:
        """Walk with a stack of our own: folders nest deeper than Python's calls may."""
        stack: list[str] = [top]
        while stack:
            path = stack.pop()
            if path != top and not (os.path.isdir(path) and not os.path.islink(path)):
                if os.path.isfile(path) and os.path.realpath(path) not in self._leave_out:
                    yield _File(path, named=False)
                elif not os.path.isfile(path) and not os.path.isdir(path):
                    nowhere = os.path.islink(path) and not os.path.exists(path)
                    yield Broken(name_of(path), None, "a link that leads nowhere" if nowhere else "no regular file")
                continue
            try:
                names = sorted(name for name in os.listdir(path) if not name.startswith("."))
            except OSError as error:
                yield Broken(name_of(path), None, _reason(error))
                continue
            stack.extend(os.path.join(path, name) for name in reversed(names))

    # --- one file -----------------------------------------------------------------------------

    def _read(self, file: _File) -> Iterator[Found]:
        source = name_of(file.path)
        if file.path == STDIN and sys.stdin is None:
            yield Broken(source, None, "standard input is closed")
            return
        if file.path == STDIN:
            self.files += 1
            yield from self._stream(sys.stdin.buffer, source, "text" if self._format == "auto" else self._format)
            return
        suffix = os.path.splitext(file.path)[1].lower()
        format = BY_SUFFIX.get(suffix, "text") if self._format == "auto" else self._format
        if format == "parquet":
            self.files += 1
            yield from read_parquet(file.path, source, self._meter, self._field, os.path.getsize(file.path))
            return
        with open(file.path, "rb") as stream:
            # Asked for as text, or of a format whose lines stand alone: a NUL then costs one line, not the file.
            head = stream.peek(8192)[:8192] if format == "text" and self._format == "auto" else b""
            if head.startswith(UTF16):
                yield Broken(source, None, "UTF-16; only UTF-8 is read")
            elif b"\0" in head and file.named:
                yield Broken(source, None, "a binary file; --format text reads it all the same")
            elif b"\0" in head:
                self.binary += 1
                self._meter.bytes += os.fstat(stream.fileno()).st_size
            else:
                self.files += 1
                yield from self._stream(stream, source, format, "\t" if suffix == ".tsv" else ",")

    def _stream(self, stream: BinaryIO, source: str, format: Format, delimiter: str = ",") -> Iterator[Found]:
        if format == "jsonl":
            return read_jsonl(stream, source, self._meter, self._field)
        if format == "csv":
            return read_csv(stream, source, self._meter, self._field, delimiter)
        return read_text(stream, source, self._meter, self._split)


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__
