"""Reading the passages of files and folders, in a fixed order and in bounded memory."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import BinaryIO, NamedTuple

from .formats import BY_SUFFIX, Format, Meter, Split, read_csv, read_jsonl, read_parquet, read_text
from .passages import Broken, ReadItem, decode_path

STDIN = "-"
UTF16 = (b"\xff\xfe", b"\xfe\xff")


class _File(NamedTuple):
    path: str
    is_argument: bool
    """Whether the path was given on the command line; if not, the file was found in a folder."""


class Reader:
    """Iterates over the passages of files and folders, in order. Iterate over a reader only once.

    The entries of a folder are read in the order of their names, at every level. Hidden files, linked folders and the
    paths in ``leave_out`` are skipped. Binary files in folders are skipped and counted.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        split: Split = "paragraph",
        field: str = "text",
        format: Format = "auto",
        leave_out: Collection[str] = (),
        keep: Sequence[str] = (),
    ) -> None:
        self._paths = tuple(paths)
        self._split: Split = split
        self._field = field
        self._format: Format = format
        self._leave_out = frozenset(map(os.path.realpath, leave_out))
        self._meter = Meter()
        self.files = 0
        """Number of files opened so far."""
        self.binary = 0
        """Number of binary files skipped so far."""
        self.skipped: dict[str, int] = {}
        """Number of files and folders that were passed over so far, by suffix (``.pdf``) or reason."""
        self.keep = tuple(keep)
        """Names of the fields whose values each passage keeps."""
        self.notes: list[str] = []
        """What the user should know once the files are read. Each note is one sentence."""

    @property
    def bytes_read(self) -> int:
        return self._meter.bytes

    def compute_total_bytes(self) -> int | None:
        """Return the total size of all files that will be read, or None if a pipe is among them."""
        total = 0
        for found in self._walk():
            if isinstance(found, Broken):
                continue
            if found.path == STDIN:
                return None
            try:
                status = os.stat(found.path)
            except OSError:
                continue  # reported later, when the file is read
            if not stat.S_ISREG(status.st_mode):
                return None
            total += status.st_size
        return total

    def __iter__(self) -> Iterator[ReadItem]:
        for found in self._walk():
            if isinstance(found, Broken):
                yield found
                continue
            try:
                yield from self._read_file(found)
            except OSError as error:
                yield Broken(decode_path(found.path), None, _describe_os_error(error))

    # --- which files --------------------------------------------------------------------------

    def _walk(self) -> Iterator[_File | Broken]:
        for path in self._paths:
            if path != STDIN and os.path.isdir(path):
                yield from self._walk_folder(path)
            else:
                yield _File(path, is_argument=True)

    def _walk_folder(self, top: str) -> Iterator[_File | Broken]:
        """Walk a folder with an explicit stack, because folders may nest deeper than Python's recursion limit."""
        stack: list[str] = [top]
        while stack:
            path = stack.pop()
            if path != top and not (os.path.isdir(path) and not os.path.islink(path)):
                if os.path.isfile(path) and os.path.realpath(path) not in self._leave_out:
                    yield _File(path, is_argument=False)
                elif not os.path.isfile(path) and not os.path.isdir(path):
                    is_dangling = os.path.islink(path) and not os.path.exists(path)
                    yield Broken(decode_path(path), None, "dangling link" if is_dangling else "not a regular file")
                continue
            try:
                names = sorted(name for name in os.listdir(path) if not name.startswith("."))
            except OSError as error:
                yield Broken(decode_path(path), None, _describe_os_error(error))
                continue
            stack.extend(os.path.join(path, name) for name in reversed(names))

    # --- one file -----------------------------------------------------------------------------

    def _read_file(self, file: _File) -> Iterator[ReadItem]:
        source = decode_path(file.path)
        if file.path == STDIN and sys.stdin is None:
            yield Broken(source, None, "standard input is closed")
            return
        if file.path == STDIN:
            self.files += 1
            yield from self._read_stream(sys.stdin.buffer, source, "text" if self._format == "auto" else self._format)
            return
        suffix = os.path.splitext(file.path)[1].lower()
        format = BY_SUFFIX.get(suffix, "text") if self._format == "auto" else self._format
        if format == "parquet":
            self.files += 1
            yield from read_parquet(file.path, source, self._meter, self._field, os.path.getsize(file.path))
            return
        with open(file.path, "rb") as stream:
            # A file without a known suffix counts as text, but a NUL shows that such a file is binary. Do not look for
            # a NUL if the user chose --format text, or if each line is a record. In a file of records, a NUL breaks
            # only one record.
            head = stream.peek(8192)[:8192] if format == "text" and self._format == "auto" else b""
            if head.startswith(UTF16):
                yield Broken(source, None, "UTF-16 is not supported; convert it to UTF-8")
            elif b"\0" in head and file.is_argument:
                yield Broken(source, None, "binary file; use --format text to read it anyway")
            elif b"\0" in head:
                self.binary += 1
                self._meter.bytes += os.fstat(stream.fileno()).st_size
            else:
                self.files += 1
                yield from self._read_stream(stream, source, format, "\t" if suffix == ".tsv" else ",")

    def _read_stream(self, stream: BinaryIO, source: str, format: Format, delimiter: str = ",") -> Iterator[ReadItem]:
        if format == "jsonl":
            return read_jsonl(stream, source, self._meter, self._field)
        if format == "csv":
            return read_csv(stream, source, self._meter, self._field, delimiter)
        return read_text(stream, source, self._meter, self._split)


def _describe_os_error(error: OSError) -> str:
    return error.strerror or type(error).__name__
