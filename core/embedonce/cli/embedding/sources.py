"""Reading the passages of files and folders, in a fixed order and in bounded memory."""

from __future__ import annotations

import os
import stat
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import BinaryIO

from embedonce._globs import compile_globs

from .decoding import decode, detect_encoding
from .fields import Wanted
from .formats import MARKUP, PROMISES_TEXT, UNREADABLE, FileKind, Format, TextOptions, classify_file, read_items
from .parquet_rows import read_parquet
from .passages import Broken, ReadItem, decode_path, describe_os_error
from .selection import STDIN, Found, Selection
from .streams import Damaged, Meter, read_chunks
from .texts import Split

HEAD = 8192
"""Number of bytes at the beginning of a file that show its encoding and whether it is binary."""


class Reader:
    """Iterates over the passages of files and folders, in order. Iterate over a reader only once.

    :class:`~.selection.Selection` says which files of a folder are read. Binary files in folders are skipped.
    ``fields`` maps patterns of file names to the fields with the text; ``field`` is used instead if it is given.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        split: Split = "paragraph",
        field: str | None = None,
        fields: Mapping[str, str] | None = None,
        format: Format = "auto",
        leave_out: Collection[str] = (),
        keep: Sequence[str] = (),
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        delimiter: str | None = None,
        quote: str | None = None,
        encoding: str | None = None,
    ) -> None:
        self._selection = Selection(paths, leave_out=leave_out, include=include, exclude=exclude)
        self._options = TextOptions(split, delimiter, quote)
        self._field = field
        self._fields = [(compile_globs([glob]), name) for glob, name in (fields or {}).items()]
        self._format: Format = format
        self._encoding = encoding
        self._meter = Meter()
        self._skipped: Counter[str] = Counter()
        self._unseen = list(dict.fromkeys(keep))
        self._has_markup = False
        self.keep = tuple(dict.fromkeys(keep))
        """Names of the fields whose values each passage keeps."""
        self.files = 0
        """Number of files opened so far."""
        self.binary = 0
        """Number of binary files skipped so far."""

    @property
    def bytes_read(self) -> int:
        """Number of bytes read so far. Bytes of a compressed file count as they are on the disk."""
        return self._meter.bytes

    @property
    def skipped(self) -> dict[str, int]:
        """Number of entries of folders that were skipped so far, by suffix (``.pdf``) or by reason.

        A suffix is counted here only if the user may expect that files with this suffix are read.
        """
        return dict(self._skipped)

    @property
    def notes(self) -> list[str]:
        """Notes for the user about unusual input that was read so far."""
        notes = [f'note: no record has the field "{name}" that keep names' for name in self._unseen if self.files]
        if self._has_markup:
            notes.append("note: HTML is read as text, so its tags are part of the passages")
        return notes

    def compute_total_bytes(self) -> int | None:
        """Return the total size of all files that will be read, or None if a pipe is among them."""
        total = 0
        for found in self._selection.walk(Counter()):
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
        for found in self._selection.walk(self._skipped):
            if isinstance(found, Broken):
                yield found
                continue
            try:
                yield from self._watch(self._read_file(found))
            except Damaged as error:
                yield Broken(decode_path(found.path), None, str(error))
            except OSError as error:
                yield Broken(decode_path(found.path), None, describe_os_error(error))

    def _watch(self, items: Iterable[ReadItem]) -> Iterator[ReadItem]:
        """Give each passage a value for each field to keep, and record which fields exist."""
        if not self.keep:
            yield from items
            return
        nothing = (None,) * len(self.keep)
        for item in items:
            if isinstance(item, Broken):
                yield item
                continue
            kept = item.kept or nothing
            self._unseen = [name for name in self._unseen if kept[self.keep.index(name)] is None]
            yield item._replace(kept=kept)

    # --- one file -----------------------------------------------------------------------------

    def _read_file(self, file: Found) -> Iterator[ReadItem]:
        source = decode_path(file.path)
        if file.path == STDIN:
            yield from self._read_stdin(source)
            return
        kind = classify_file(file.path, self._format)
        if kind.suffix in UNREADABLE and self._format == "auto":
            yield from self._refuse(file, kind)
            return
        with _open_file(file.path) as stream:
            status = os.fstat(stream.fileno())
            before = self._meter.bytes
            if not _is_readable(file.path, status.st_mode):
                yield Broken(source, None, "not a regular file")
            elif kind.format == "parquet":
                yield from self._read_parquet(file, kind, source, status.st_size)
            else:
                yield from self._read_stream(stream, file, kind, source)
            if stat.S_ISREG(status.st_mode):
                self._meter.bytes = before + status.st_size

    def _read_stdin(self, source: str) -> Iterator[ReadItem]:
        if sys.stdin is None:
            yield Broken(source, None, "standard input is closed")
            return
        kind = FileKind("", "text" if self._format == "auto" else self._format, None)
        yield from self._read_stream(sys.stdin.buffer, Found(STDIN, STDIN, is_argument=True), kind, source)

    def _refuse(self, file: Found, kind: FileKind) -> Iterator[ReadItem]:
        if file.is_argument:
            reason = f"cannot read {kind.suffix} files; convert the file to text first"
            yield Broken(decode_path(file.path), None, reason)
            return
        self._skipped[kind.suffix] += 1
        self._meter.bytes += os.stat(file.path).st_size

    def _read_parquet(self, file: Found, kind: FileKind, source: str, size: int) -> Iterator[ReadItem]:
        if kind.compression is not None:
            yield Broken(source, None, "cannot read compressed Parquet files; decompress the file first")
            return
        self.files += 1
        yield from read_parquet(file.path, source, self._meter, self._choose_fields(file, kind), size)

    def _read_stream(self, stream: BinaryIO, file: Found, kind: FileKind, source: str) -> Iterator[ReadItem]:
        head, chunks = _read_head(read_chunks(stream, self._meter, kind.compression))
        encoding = self._encoding or detect_encoding(head)
        # A file without a known suffix counts as text, but a NUL shows that such a file is binary. Do not look for a
        # NUL if the user chose --format text, or if the file has records. There, a NUL breaks only one record.
        if kind.format == "text" and self._format == "auto" and file.path != STDIN and _has_nul(head, encoding):
            yield from self._skip_binary(file, kind, source)
            return
        self.files += 1
        self._has_markup = self._has_markup or (kind.suffix in MARKUP and kind.format == "text")
        text = decode(chain([head], chunks), encoding)
        yield from read_items(text, source, encoding, kind, self._choose_fields(file, kind), self._options)

    def _skip_binary(self, file: Found, kind: FileKind, source: str) -> Iterator[ReadItem]:
        if file.is_argument:
            yield Broken(source, None, "binary file; use --format text to read it anyway")
            return
        self.binary += 1
        if kind.suffix in PROMISES_TEXT:
            self._skipped[kind.suffix] += 1

    def _choose_fields(self, file: Found, kind: FileKind) -> Wanted:
        return Wanted(self._field if self._field is not None else self._match_field(file, kind), self.keep)

    def _match_field(self, file: Found, kind: FileKind) -> str:
        names = [file.name]
        if kind.compression is not None:  # *.csv is also the pattern for a.csv.gz
            names.append(os.path.splitext(file.name)[0])
        matching = (field for globs, field in self._fields if any(map(globs.match_file, names)))
        return next(matching, "text")


def _read_head(chunks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """Return the beginning of a file, and the rest. An error is raised by the rest, after what was read before it."""
    head = b""
    try:
        while len(head) < HEAD and (more := next(chunks, None)) is not None:
            head += more
    except (Damaged, OSError) as error:
        return head, _raise(error)
    return head, chunks


def _raise(error: Exception) -> Iterator[bytes]:
    raise error
    yield


def _has_nul(head: bytes, encoding: str) -> bool:
    return any("\0" in text for text in decode([head[:HEAD]], encoding))


def _open_file(path: str) -> BinaryIO:
    """Open a file without waiting: a named pipe that nobody writes to would block."""
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))


def _is_readable(path: str, mode: int) -> bool:
    """Return whether a file is a regular file or a pipe that the shell has opened: ``<(zcat corpus.gz)``."""
    if stat.S_ISREG(mode):
        return True
    return stat.S_ISFIFO(mode) and os.path.realpath(path).startswith(("/dev/fd/", "/proc/"))
