"""The columns of a part that is being written. They are kept in unnamed files, so memory does not grow with a part."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import secrets
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from numpy.typing import NDArray
from xxhash import xxh3_128

from embedonce.vectors import Entry, encode_frames

from .manifest import MAX_DIMENSIONS, PartRecord
from .opened import UNFINISHED
from .rows import (
    ENCRYPTED_SCHEMA,
    KEY_BYTES,
    UNKNOWN_SECONDS,
    UNKNOWN_TOKENS,
    Layout,
    compute_checksums,
    read_prefixes,
)

MAX_BUFFER_BYTES: Final = 2**20
"""Bytes of a column that are kept in memory before they are written to its file."""
CHUNK_BYTES: Final = 2**24
MAX_FRAME_BYTES: Final = 2**26
"""Maximum size of an encrypted frame. With it, a part stays below 2 GiB, whatever its last frames are."""
_METADATA_LENGTH_AT: Final = 20
"""Position in a frame of the length of its metadata, a u32."""


class _Column:
    """The values of one column, appended to an unnamed file. A full disk is an OSError here.

    A small column has no file.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._tail = bytearray()
        self.size = 0

    def append(self, values: bytes | NDArray[Any]) -> None:
        data = values if isinstance(values, bytes) else np.ascontiguousarray(values).tobytes()
        self._tail += data
        self.size += len(data)
        if len(self._tail) > MAX_BUFFER_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder, suffix=UNFINISHED, buffering=0)  # noqa: SIM115
        view = memoryview(self._tail)
        while view:
            view = view[self._file.write(view) :]
        view.release()
        self._tail = bytearray()

    def get_buffer(self) -> Any:
        """Return all values as a buffer of pyarrow."""
        if self._file is None:
            return pa.py_buffer(bytes(self._tail))
        if self._tail:
            self._flush()
        return pa.py_buffer(mmap.mmap(self._file.fileno(), self.size, access=mmap.ACCESS_READ))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class _Stage:
    """The rows of a part that is being written."""

    def __init__(self, folder: Path, schema: Any) -> None:
        self._folder = folder
        self._schema = schema
        self._columns: dict[str, _Column] = {name: _Column(folder) for name in schema.names}
        self.rows = 0
        self.first = ""
        self.last = ""

    @property
    def size(self) -> int:
        """Number of bytes of all columns."""
        return sum(column.size for column in self._columns.values()) + 8 * self.rows

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the files of the columns."""
        for column in self._columns.values():
            column.close()

    def _append(self, **values: bytes | NDArray[Any]) -> None:
        for name, data in values.items():
            self._columns[name].append(data)

    def _count_rows(self, keys: Sequence[str]) -> None:
        self.first = self.first or keys[0]
        self.last = keys[-1]
        self.rows += len(keys)

    def _write(self, scope: str, arrays: Sequence[Any], layout: Layout | None) -> PartRecord:
        """Write the part's file under its final name, and return what the manifest says about it."""
        batch = pa.record_batch(arrays, schema=self._schema)
        path = self._folder / f"{secrets.token_hex(8)}{UNFINISHED}"
        try:
            with path.open("xb+", buffering=0) as file:
                # pyarrow writes to a path. To write to an object of Python, it would copy all values of a column.
                with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, self._schema) as writer:
                    writer.write_batch(batch)
                digest = xxh3_128()
                while chunk := file.read(CHUNK_BYTES):
                    digest.update(chunk)
                size = os.fstat(file.fileno()).st_size
                sync_file(file.fileno())
            checksum = digest.hexdigest()
            final = f"{scope}-{checksum}.arrow"
            os.replace(path, self._folder / final)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return PartRecord(
            file=final,
            scope=scope,
            rows=self.rows,
            bytes=size,
            checksum=checksum,
            first=self.first,
            last=self.last,
            encrypted=layout is None,
            dtype=None if layout is None else layout.dtype,
            dimensions=None if layout is None else layout.dimensions,
        )

    def _make_texts(self, name: str, lengths: NDArray[np.integer[Any]], validity: Any = None) -> Any:
        """Return a column of texts or bytes. ``lengths`` are those of its values, shape (rows,)."""
        offsets = np.zeros(self.rows + 1, np.int32)
        np.cumsum(lengths, out=offsets[1:])
        buffers = [validity, pa.py_buffer(offsets), self._columns[name].get_buffer()]
        return pa.Array.from_buffers(self._schema.field(name).type, self.rows, buffers)

    def _make_keys(self) -> Any:
        return self._make_texts("key", np.full(self.rows, KEY_BYTES))

    def _make_numbers(self, name: str, validity: Any = None) -> Any:
        buffers = [validity, self._columns[name].get_buffer()]
        return pa.Array.from_buffers(self._schema.field(name).type, self.rows, buffers)


class PlainStage(_Stage):
    """Entries of one scope, dtype and number of dimensions."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        if not 0 < layout.dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"the vector of an entry must have 1 to {MAX_DIMENSIONS:,} dimensions")
        super().__init__(folder, layout.make_schema())
        self._layout = layout
        self._lengths = _Column(folder)

    def close(self) -> None:
        super().close()
        self._lengths.close()

    def add(self, items: Mapping[str, Entry]) -> None:
        """Append entries, whose keys are in ascending order.

        Raises:
            ValueError: an entry is invalid; the message names its key.
            TypeError: the metadata of an entry is not JSON.
        """
        keys, entries = list(items), list(items.values())
        # A frame is made of each entry, because this checks and rounds the entry as every other tier does.
        frames = encode_frames(items)
        layout = self._layout
        scale_bytes = 4 if layout.has_scale else 0
        payload = layout.vector_bytes + scale_bytes
        metadata = [_get_metadata(frame, payload) for frame in frames.values()]
        payloads = b"".join([frame[-payload:] for frame in frames.values()])
        values = np.frombuffer(
            payloads, np.dtype([("scale", f"V{scale_bytes}"), ("vector", f"V{payload - scale_bytes}")])
        )
        codes = np.frombuffer("".join(keys).encode(), np.uint8).reshape(-1, KEY_BYTES)
        rows = layout.make_rows(len(keys))
        rows["key"] = codes.view(f"V{KEY_BYTES}")[:, 0]
        rows["created"].view("<f8")[:] = [entry.created for entry in entries]
        rows["expires"].view("<f8")[:] = [math.inf if entry.expires is None else entry.expires for entry in entries]
        tokens = [UNKNOWN_TOKENS if entry.tokens is None else entry.tokens for entry in entries]
        rows["tokens"].view("<i8")[:] = tokens
        # Adding 0.0 turns minus zero into zero.
        rows["seconds"].view("<f8")[:] = [0.0 if entry.seconds is None else entry.seconds + 0.0 for entry in entries]
        rows["seconds"][[entry.seconds is None for entry in entries]] = UNKNOWN_SECONDS
        if layout.has_scale:
            rows["scale"] = np.frombuffer(np.ascontiguousarray(values["scale"]).tobytes(), "<u4")
            self._append(scale=rows["scale"])
        rows["vector"] = values["vector"]
        self._append(
            key=codes,
            prefix=read_prefixes(codes),
            created=rows["created"],
            expires=rows["expires"],
            tokens=rows["tokens"],
            seconds=rows["seconds"],
            vector=rows["vector"],
            metadata=b"".join(metadata),
            checksum=compute_checksums(rows, metadata),
        )
        self._lengths.append(np.fromiter(map(len, metadata), np.uint32, len(metadata)))
        self._count_rows(keys)

    def write_part(self, scope: str) -> PartRecord:
        """Write the part and return what the manifest says about it."""
        lengths = np.frombuffer(self._lengths.get_buffer(), np.uint32)
        tokens = np.frombuffer(self._columns["tokens"].get_buffer(), "<i8")
        seconds = np.frombuffer(self._columns["seconds"].get_buffer(), "<u8")
        vector = self._schema.field("vector").type
        values = pa.Array.from_buffers(
            vector.value_type, self.rows * self._layout.dimensions, [None, self._columns["vector"].get_buffer()]
        )
        arrays = {
            "key": self._make_keys(),
            "tokens": self._make_numbers("tokens", _pack_validity(tokens != UNKNOWN_TOKENS)),
            "seconds": self._make_numbers("seconds", _pack_validity(seconds != UNKNOWN_SECONDS)),
            "vector": pa.Array.from_buffers(vector, self.rows, [None], children=[values]),
            "metadata": self._make_texts("metadata", lengths, _pack_validity(lengths > 0)),
        }
        ordered = [arrays[name] if name in arrays else self._make_numbers(name) for name in self._schema.names]
        return self._write(scope, ordered, self._layout)


class EncryptedStage(_Stage):
    """Encrypted frames of one scope."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, ENCRYPTED_SCHEMA)
        self._lengths = _Column(folder)

    def close(self) -> None:
        super().close()
        self._lengths.close()

    def add(self, items: Mapping[str, bytes]) -> None:
        """Append frames, whose keys are in ascending order."""
        for key, frame in items.items():
            if not 0 < len(frame) <= MAX_FRAME_BYTES:
                raise ValueError(f"{key}: a frame must have 1 to {MAX_FRAME_BYTES:,} bytes, got {len(frame):,}")
        keys = list(items)
        codes = np.frombuffer("".join(keys).encode(), np.uint8).reshape(-1, KEY_BYTES)
        self._append(key=codes, prefix=read_prefixes(codes), frame=b"".join(items.values()))
        self._lengths.append(np.fromiter(map(len, items.values()), np.uint32, len(keys)))
        self._count_rows(keys)

    def write_part(self, scope: str) -> PartRecord:
        """Write the part and return what the manifest says about it."""
        lengths = np.frombuffer(self._lengths.get_buffer(), np.uint32)
        arrays = [self._make_keys(), self._make_numbers("prefix"), self._make_texts("frame", lengths)]
        return self._write(scope, arrays, None)


def _get_metadata(frame: bytes, payload: int) -> bytes:
    """Return the metadata of a frame as JSON. The metadata is right before the payload, which is at the end."""
    size = int.from_bytes(frame[_METADATA_LENGTH_AT : _METADATA_LENGTH_AT + 4], "little")
    return frame[-payload - size : -payload] if size else b""


def _pack_validity(is_known: NDArray[np.bool_]) -> Any:
    """Return an Arrow bitmap with a 1 for each value that is not null, or None if there are no nulls."""
    return None if is_known.all() else pa.py_buffer(np.packbits(is_known, bitorder="little"))


def sync_file(descriptor: int) -> None:
    """Wait until a file is on the disk."""
    os.fsync(descriptor)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk. Windows cannot do this for a folder."""
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some network file systems refuse to do this for a folder; the files themselves are on the disk.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
