"""Reading a part: one Arrow file, mapped into memory, in which rows are found by their keys.

A damaged row must not fail the others, so nothing here trusts a value of a row. The file's structure (its schema, and
where its columns are) is checked once, when the part is opened.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import stat
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest, xxh3_128

from embedonce.errors import ConfigError, TierError
from embedonce.keys import KEY_PREFIX
from embedonce.vectors import Block, Entry, Metadata, Vector, freeze, round_vectors

from .manifest import PartRecord, restore_hint
from .rows import (
    ENCRYPTED_SCHEMA,
    KEY_BYTES,
    PADDING_BYTES,
    UNKNOWN_TOKENS,
    Layout,
    Rows,
    compute_checksums,
    read_prefixes,
)

CHUNK_BYTES: Final = 2**24
"""Number of bytes that are read at once to check a whole file."""
ALL_ROWS: Final = slice(None)
CHUNK_ROWS: Final = 8192
"""Number of rows that are listed or checked at once."""
_COSTS: Final = ("tokens", "seconds")
_NUMBERS: Final = struct.Struct("<ddqd")
"""The fields ``created``, ``expires``, ``tokens`` and ``seconds`` of a row."""


class Found(NamedTuple):
    """Which of some keys a part has, by their positions among the keys."""

    positions: NDArray[np.intp]
    """Positions of the keys that the part has."""
    rows: NDArray[np.intp]
    """The row of each of these keys."""
    suspects: NDArray[np.intp]
    """Positions of keys that the part does not have, although a row has the same prefix."""
    suspect_rows: NDArray[np.intp]


class Part:
    """A part of a bundle that is open."""

    def __init__(self, folder: Path, record: PartRecord) -> None:
        """Open the part.

        Raises:
            FileNotFoundError: the file is missing.
            ConfigError: the file has another size or structure than the manifest says, or is outside the folder.
        """
        self.record = record
        self.path = folder / record.file
        self.layout = record.layout
        descriptor = _open_inside(folder, self.path)
        try:
            _check_size(descriptor, self.path, record, folder)
            self._map = mmap.mmap(descriptor, record.bytes, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        try:
            self._columns = _find_columns(self._map, record)
        except (pa.ArrowException, ValueError, OSError) as error:
            # The message of pyarrow may repeat bytes of the file, so it is not shown.
            reason = str(error) if type(error) is _WrongStructure else "it is not a valid Arrow file"
            raise ConfigError(f"{self.path} is damaged: {reason}; {restore_hint(folder)}") from None
        self.rows = record.rows
        self.keys: NDArray[np.uint8] = self._view("key", np.dtype(np.uint8), KEY_BYTES).reshape(-1, KEY_BYTES)
        """ASCII codes of the keys, shape (rows, KEY_BYTES)."""
        self._void_keys: NDArray[Any] = self._view("key", np.dtype(f"V{KEY_BYTES}"), 1)
        self._prefixes: NDArray[np.uint64] = self._view("prefix", np.dtype("<u8"), 1)
        ends = np.frombuffer(f"{record.first}{record.last}".encode(), np.uint8).reshape(2, KEY_BYTES)
        self.first, self.last = read_prefixes(ends)
        if self.layout is None:
            self._offsets: NDArray[np.int32] = self._view("frame", np.dtype("<i4"), 1, is_offsets=True)
            self._text = self._columns["frame"]
        else:
            self._fields: dict[str, NDArray[Any]] = {
                name: self._view(name, np.dtype("<u8"), 1) for name in ("created", "expires", *_COSTS, "checksum")
            }
            if self.layout.has_scale:
                self._fields["scale"] = self._view("scale", np.dtype("<u4"), 1)
            self._fields["vector"] = self._view("vector", np.dtype(f"V{self.layout.vector_bytes}"), 1)
            self._offsets = self._view("metadata", np.dtype("<i4"), 1, is_offsets=True)
            self._text = self._columns["metadata"]
            self._row_type = self.layout.make_rows(0).dtype
            names = [name for name in self._row_type.names or () if name in self._fields]
            self._fixed = [*((name, self._fields[name]) for name in names), ("key", self._void_keys)]
            self._sizes = [(self._columns[name].at, self._row_type[name].itemsize) for name in names]
        self._advise("frame" if self.layout is None else "vector")

    def _view(self, name: str, dtype: np.dtype[Any], per_row: int, *, is_offsets: bool = False) -> NDArray[Any]:
        column = self._columns[name]
        if is_offsets:
            return np.frombuffer(self._map, dtype, self.record.rows + 1, column.offsets_at)
        return np.frombuffer(self._map, dtype, self.record.rows * per_row, column.at)

    def _advise(self, name: str) -> None:
        """Tell the system not to read ahead in the column that takes nearly all of the file: hits are random."""
        if not hasattr(mmap, "MADV_RANDOM"):
            return
        column = self._columns[name]
        start = -(-column.at // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (column.at + column.size) // mmap.PAGESIZE * mmap.PAGESIZE - start
        if size > 0:
            self._map.madvise(mmap.MADV_RANDOM, start, size)

    # --- finding and reading rows ---

    def find(self, keys: NDArray[np.uint8], prefixes: NDArray[np.uint64], positions: NDArray[np.intp]) -> Found:
        """Find the rows of some keys. ``positions`` are those of the keys in question, in ascending order of prefixes.

        ``keys`` are ASCII codes, shape (n, KEY_BYTES), and ``prefixes`` are read from them.
        """
        asked = prefixes[positions]
        at = np.searchsorted(self._prefixes, asked)
        hits = np.flatnonzero(self._prefixes[np.minimum(at, self.rows - 1)] == asked)
        hits = hits[at[hits] < self.rows]
        rows, positions, asked = at[hits], positions[hits], asked[hits]
        void_keys = keys.view(f"V{KEY_BYTES}")[:, 0]
        # Numpy compares values of a void type one by one in Python's way, so their bytes are compared.
        if self._void_keys[rows].tobytes() == void_keys[positions].tobytes():
            return Found(positions, rows, positions[:0], rows[:0])
        same = (self.keys[rows] == keys[positions]).all(axis=1)
        # A damaged key, or another key with the same prefix. Anyone can compute two texts with the same prefix, so the
        # other rows with this prefix are looked at, too.
        for index in np.flatnonzero(~same).tolist():
            end = int(np.searchsorted(self._prefixes, asked[index], "right"))
            others = np.flatnonzero((self.keys[rows[index] : end] == keys[positions[index]]).all(axis=1))
            if len(others):
                rows[index] += others[0]
                same[index] = True
        return Found(positions[same], rows[same], positions[~same], rows[~same])

    def find_prefix(self, prefix: int) -> int | None:
        """Return the first row with a prefix, or None if there is no such row."""
        row = int(self._prefixes.searchsorted(np.uint64(prefix)))
        return row if row < self.rows and self._prefixes[row] == prefix else None

    def read_entry(self, key: bytes, row: int) -> Entry | None:
        """Return the entry of a row if it has this key and is intact; else None.

        This takes a tenth of the time of reading a batch of one key.
        """
        if self.layout is None:
            return None
        at = self._columns["key"].at + row * KEY_BYTES
        if self._map[at : at + KEY_BYTES] != key:
            return None
        fields = [self._map[start + row * size : start + (row + 1) * size] for start, size in self._sizes]
        item = b"".join([*fields, key, bytes(PADDING_BYTES)])
        start, end = self._offsets[row : row + 2].tolist()
        text = self._map[self._text.at + start : self._text.at + end] if 0 <= start < end <= self._text.size else b""
        if xxh3_64_intdigest(item + text) != self._fields["checksum"][row]:
            return None
        metadata = parse_metadata(text) if text else None
        created, expires, tokens, seconds = _NUMBERS.unpack_from(item)
        if text and metadata is None:
            return None
        if self.layout.dtype == "float32" and sys.byteorder == "little":
            # The payload is a copy that nothing else uses. The usual way to a vector takes four times as long.
            vector: Vector = np.ndarray((self.layout.dimensions,), np.float32, fields[-1])
        else:
            vector = freeze(self.layout.read_vectors(np.frombuffer(item, self._row_type))[0])
        return Entry(
            vector,
            created,
            None if expires == math.inf else expires,
            metadata,
            self.layout.dtype,
            None if tokens == UNKNOWN_TOKENS else tokens,
            None if math.isnan(seconds) else seconds,
        )

    def read_rows(self, rows: NDArray[np.intp], into: Rows, at: NDArray[np.intp] | slice = ALL_ROWS) -> None:
        """Copy the fixed fields of some rows to the places ``at`` of another array."""
        for name, column in self._fixed:
            into[name][at] = column[rows]

    def read_checksums(self, rows: NDArray[np.intp]) -> NDArray[np.uint64]:
        """Return the stored checksums of some rows."""
        return self._fields["checksum"][rows]

    def has_metadata(self) -> bool:
        """Return whether any row may have metadata."""
        return self._text.size > 0

    def read_texts(self, rows: NDArray[np.intp]) -> list[bytes | None]:
        """Return the metadata of some rows as JSON, or their frames.

        The result has None for a damaged row, and ``b""`` for a row without metadata.
        """
        starts, ends = self._offsets[rows].tolist(), self._offsets[rows + 1].tolist()
        at, size = self._text.at, self._text.size
        return [
            self._map[at + start : at + end] if 0 <= start <= end <= size else None
            for start, end in zip(starts, ends, strict=True)
        ]

    def is_sound(self, rows: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Return which rows have a right checksum. Frames have a checksum of their own, which is not checked here."""
        if self.layout is None:
            return np.ones(len(rows), np.bool_)
        read = self.layout.make_rows(len(rows))
        self.read_rows(rows, read)
        metadata = self.read_texts(rows) if self.has_metadata() else None
        sums = compute_checksums(read, None if metadata is None else [text or b"" for text in metadata])
        sound: NDArray[np.bool_] = sums == self.read_checksums(rows)
        if metadata is not None:
            sound &= [text is not None for text in metadata]
        return sound

    # --- listing ---

    def find_range(self, prefix: str) -> tuple[int, int]:
        """Return the first row whose key starts with ``prefix``, and the row after the last one."""
        beginning = f"{KEY_PREFIX}{self.record.scope}."
        if beginning.startswith(prefix):
            return 0, self.rows
        if not prefix.startswith(beginning) or len(prefix) > KEY_BYTES or not prefix.isascii():
            return 0, 0
        wanted = prefix.encode()
        return self._bisect(wanted, 0), self._bisect(wanted, 1)

    def _bisect(self, prefix: bytes, is_end: int) -> int:
        """Return the first row whose key is at least ``prefix``. With ``is_end``, skip the keys that start with it."""
        low, high = 0, self.rows
        while low < high:
            middle = (low + high) // 2
            key = self.keys[middle, : len(prefix)].tobytes()
            if key < prefix or (is_end and key == prefix):
                low = middle + 1
            else:
                high = middle
        return low

    def list_keys(self, prefix: str) -> Iterator[str]:
        """Yield the keys that start with ``prefix``, in ascending order. Damaged keys are left out."""
        start, end = self.find_range(prefix)
        for low in range(start, end, CHUNK_ROWS):
            chunk = self.keys[low : min(low + CHUNK_ROWS, end)].tobytes().decode("latin-1")
            for at in range(0, len(chunk), KEY_BYTES):
                key = chunk[at : at + KEY_BYTES]
                if key.startswith(prefix):
                    yield key

    def measure_dates(self, start: int, end: int) -> tuple[float, float]:
        """Return the earliest and the latest date of creation in a range of rows."""
        dates = self._fields["created"][start:end].view("<f8")
        dates = dates[np.isfinite(dates)]
        return float(dates.min(initial=math.inf)), float(dates.max(initial=-math.inf))

    # --- checking ---

    def verify(self, folder: Path) -> None:
        """Check everything in the file.

        Raises:
            TierError: something is damaged.
        """
        problem = self._find_damage()
        if problem is not None:
            raise TierError(f"{self.path} is damaged: {problem}; {restore_hint(folder)}")

    def _find_damage(self) -> str | None:
        digest = xxh3_128()
        # The file is read and not mapped, because an error of the disk is then an exception. In a map, it would end the
        # process.
        with self.path.open("rb", buffering=0) as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
        if digest.hexdigest() != self.record.checksum:
            return f"its checksum is not that of the manifest ({self._count_damaged()} of {self.rows:,} rows affected)"
        # A writer of another program may have made an invalid file with a right checksum.
        ends = self.keys[[0, -1]].tobytes().decode("latin-1")
        if ends != self.record.first + self.record.last:
            return "its first or last key is not that of the manifest"
        previous = b""
        for low in range(0, self.rows, CHUNK_ROWS):
            rows = np.arange(low, min(low + CHUNK_ROWS, self.rows))
            problem = self._find_invalid(rows, previous)
            if problem is not None:
                return f"{problem} in the rows {low:,} to {rows[-1]:,}"
            previous = self.keys[rows[-1]].tobytes()
        return None

    def _count_damaged(self) -> str:
        if self.layout is None:
            return "some"
        damaged = 0
        for low in range(0, self.rows, CHUNK_ROWS):
            rows = np.arange(low, min(low + CHUNK_ROWS, self.rows))
            damaged += len(rows) - int(self.is_sound(rows).sum())
        return f"{damaged:,}"

    def _find_invalid(self, rows: NDArray[np.intp], previous: bytes) -> str | None:
        names = np.concatenate([np.frombuffer(previous, f"S{KEY_BYTES}"), self._void_keys[rows].view(f"S{KEY_BYTES}")])
        if not (names[:-1] < names[1:]).all():
            return "keys are not in ascending order"
        beginning = np.frombuffer(f"{KEY_PREFIX}{self.record.scope}.".encode(), np.uint8)
        if not (self.keys[rows, : len(beginning)] == beginning).all():
            return "a key belongs to another scope"
        if not (read_prefixes(self.keys[rows]) == self._prefixes[rows]).all():
            return "the column prefix does not match the keys"
        if not self.is_sound(rows).all():
            return "a checksum is wrong"
        if self.layout is not None and self.layout.dtype == "int8":
            read = self.layout.make_rows(len(rows))
            self.read_rows(rows, read)
            vectors = self.layout.read_vectors(read)
            try:
                is_rounded = np.array_equal(round_vectors(vectors, "int8"), vectors)
            except ValueError:
                is_rounded = False
            if not is_rounded:
                return "a vector is not rounded as docs/frames.md says"
        return None


# --- blocks -----------------------------------------------------------------------------------


def make_block(keys: list[str], layout: Layout, rows: Rows, metadata: list[bytes] | None) -> tuple[Block, list[str]]:
    """Return a block of rows whose checksums are right, and the keys whose metadata is invalid.

    Each of these keys has empty metadata in the block, which the caller does not use for them.
    """
    tokens, seconds = rows["tokens"].view("<i8").astype(np.int64), rows["seconds"].view("<f8").astype(np.float64)
    parsed: list[Metadata | None] | None = None
    invalid: list[str] = []
    if metadata is not None and any(metadata):
        parsed = []
        for key, text in zip(keys, metadata, strict=True):
            parsed.append(parse_metadata(text) if text else None)
            if text and parsed[-1] is None:
                invalid.append(key)
    block = Block(
        keys,
        layout.read_vectors(rows),
        rows["created"].view("<f8").astype(np.float64),
        rows["expires"].view("<f8").astype(np.float64),
        parsed,
        layout.dtype,
        None if (tokens == UNKNOWN_TOKENS).all() else tokens,
        None if np.isnan(seconds).all() else seconds,
    )
    return block, invalid


def parse_metadata(text: bytes) -> dict[str, Any] | None:
    """Return the metadata, or None if it is not a JSON object. The engine checks its contents."""
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return metadata if isinstance(metadata, dict) else None


# --- opening ----------------------------------------------------------------------------------


class _WrongStructure(ValueError):
    """A part does not have the structure of a part; the message says why."""


class _Column(NamedTuple):
    """Where the values of a column are in the file."""

    at: int
    size: int
    offsets_at: int
    """Where the offsets are, for a column of texts or bytes."""


def _open_inside(folder: Path, path: Path) -> int:
    """Open a file of the folder. A link is followed if it stays in the folder, as in a volume of Kubernetes.

    Raises:
        ConfigError: the file is outside the folder, or is not a regular file.
    """
    resolved = path.resolve()
    if not resolved.is_relative_to(folder.resolve()):
        raise ConfigError(
            f"{path} is a link out of the folder; a bundle must contain its parts, so copy the file there"
        )
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(resolved, flags | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        raise
    except OSError as error:
        hint = " (raise the limit with `ulimit -n`)" if error.errno in (errno.EMFILE, errno.ENFILE) else ""
        raise ConfigError(f"cannot open {path}: {error.strerror}{hint}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ConfigError(f"{path} is not a regular file; {restore_hint(folder)}")
    return descriptor


def _check_size(descriptor: int, path: Path, record: PartRecord, folder: Path) -> None:
    """Refuse a file of another size. Reading a map beyond the end of its file would end the process."""
    size = os.fstat(descriptor).st_size
    if size == record.bytes:
        return
    if size < 1024 and os.read(descriptor, 16).startswith(b"version https://"):
        raise ConfigError(f"{path} is a pointer of Git LFS and not the file itself; run `git lfs pull`")
    raise ConfigError(f"{path} is damaged: it has {size:,} bytes instead of {record.bytes:,}; {restore_hint(folder)}")


def _find_columns(mapped: mmap.mmap, record: PartRecord) -> dict[str, _Column]:
    """Return where the columns of a part are.

    Raises:
        ValueError: the file is not a part as the manifest describes it.
        pa.ArrowException: the file is not a valid Arrow file.
    """
    whole = pa.py_buffer(mapped)
    layout = record.layout
    schema = ENCRYPTED_SCHEMA if layout is None else layout.make_schema()
    with pa.ipc.open_file(pa.BufferReader(whole)) as reader:
        if not reader.schema.equals(schema) or reader.num_record_batches != 1:
            raise _WrongStructure("its columns are not those of a part")
        batch = reader.get_batch(0)
    if batch.num_rows != record.rows:
        raise _WrongStructure(f"it has {batch.num_rows:,} rows instead of {record.rows:,}")
    needed = {"key": record.rows * KEY_BYTES, "frame": 0, "metadata": 0, "scale": record.rows * 4}
    if layout is not None:
        needed["vector"] = record.rows * layout.vector_bytes
    columns: dict[str, _Column] = {}
    for field, column in zip(schema, batch.columns, strict=True):
        buffers = column.buffers()
        has_offsets = pa.types.is_string(field.type) or pa.types.is_binary(field.type)
        at, size = _place(buffers[-1], whole)
        if size < needed.get(field.name, record.rows * 8):
            raise _WrongStructure(f"the column {field.name} is too short")
        offsets_at, offsets_size = _place(buffers[1], whole) if has_offsets else (0, 0)
        if has_offsets and offsets_size < (record.rows + 1) * 4:
            raise _WrongStructure(f"the column {field.name} is too short")
        columns[field.name] = _Column(at, size, offsets_at)
    return columns


def _place(buffer: Any, whole: Any) -> tuple[int, int]:
    """Return the position of a buffer in the file, and its size.

    Raises:
        ValueError: the buffer is missing, or is not in the file.
    """
    if buffer is None:
        raise _WrongStructure("a column has no values")
    at = buffer.address - whole.address
    if buffer.size and not 0 <= at <= at + buffer.size <= whole.size:
        # A compressed file, which another program may have written, has its values elsewhere in memory.
        raise _WrongStructure("a column is compressed or incomplete")
    return (at, buffer.size) if buffer.size else (0, 0)
