"""Entries and frames as Postgres' binary parameters, and its binary rows as entries and frames.

Arrays of the wire: the number of dimensions, whether there are NULLs, the elements' type, their number,
the index of the first, then each element after its length; all big-endian. A vector of pgvector is two
16-bit numbers, its dimension and one that is not used, and float32 values.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from embedonce.vectors import Block, Dtype, Entries, Entry, decode_frames, encode_frames

from .connections import Binary

Item: TypeAlias = Entry | bytes

MOST_DIMENSIONS = 16_000
"""Of pgvector's type ``vector``."""
PREVIEW = "text_preview"
"""The part of an entry's metadata that has a column of its own, or is not stored at all."""

BYTEA, INT4, TEXT, FLOAT8 = 17, 23, 25, 701
"""Numbers of Postgres' own types; those of an extension's differ between databases."""

_ARRAY = struct.Struct(">iiIii")
_EMPTY = struct.Struct(">iiI")
_LENGTH = struct.Struct(">i")
_NULL = _LENGTH.pack(-1)
_FLOAT = struct.Struct(">d")
_VECTOR_HEADER = 4
_DTYPES: Mapping[str, Dtype] = {"float32": "float32", "float16": "float16", "int8": "int8"}


Row: TypeAlias = tuple[Any, ...]
"""Of an answer: key, embedding, frame, dtype, created, expires, metadata, text_preview."""


# --- to parameters ----------------------------------------------------------------------------


def array(oid: int, elements: Sequence[bytes | None]) -> Binary:
    """Return an array. One that holds NULLs alone is empty: ``unnest`` fills the shorter arrays up with NULLs."""
    if None not in elements and len(set(map(len, elements))) == 1:  # type: ignore[arg-type]
        whole: list[bytes] = list(elements)  # type: ignore[arg-type]
        return _array(oid, len(whole), _LENGTH.pack(len(whole[0])).join((b"", *whole)))
    if all(element is None for element in elements):
        return Binary(_EMPTY.pack(0, 0, oid))
    parts = [_NULL if part is None else _LENGTH.pack(len(part)) + part for part in elements]
    return _array(oid, len(parts), b"".join(parts), nulls=True)


def _array(oid: int, count: int, body: bytes, *, nulls: bool = False) -> Binary:
    return Binary(_ARRAY.pack(1, nulls, oid, count, 1) + body)


def texts(values: Iterable[str | None]) -> Binary:
    """Return an array of type text."""
    return array(TEXT, [None if value is None else value.encode() for value in values])


def numbers(values: Iterable[float | None]) -> Binary:
    """Return an array of type double precision."""
    return array(FLOAT8, [None if value is None else _FLOAT.pack(value) for value in values])


def columns(items: Mapping[str, Item], vector_oid: int | None, preview: bool) -> list[Binary]:
    """Return the columns to write, one array each, in the order of the statement.

    Entries go before bytes, and those with a vector that pgvector holds before the others, so that the
    columns which the rest has not are short.

    Raises:
        ValueError: an entry that no row can hold; names the key.
        TypeError: metadata is not JSON; names the key.
    """
    vectors: dict[int, list[str]] = {}
    framed: dict[str, Entry] = {}
    plain: dict[str, bytes] = {}
    for key, item in items.items():
        if not isinstance(item, Entry):
            plain[key] = item
        elif vector_oid is not None and _is_vector(item):
            vectors.setdefault(item.vector.size, []).append(key)
        else:
            framed[key] = item._replace(metadata=None)
    first = [key for keys in vectors.values() for key in keys]
    entries: list[Entry] = [items[key] for key in (*first, *framed)]  # type: ignore[misc]
    frames = encode_frames(framed)
    written = [_metadata(key, entry.metadata) for key, entry in zip((*first, *framed), entries, strict=True)]
    embeddings = [] if vector_oid is None else [_vectors(vector_oid, items, vectors)]
    return [
        texts([*first, *framed, *plain]),
        array(BYTEA, [*repeat(None, len(first)), *(frames[key] for key in framed), *plain.values()]),
        texts(entry.dtype for entry in entries),
        array(INT4, [_LENGTH.pack(entry.vector.size) for entry in entries]),
        numbers(entry.created for entry in entries),
        numbers(entry.expires for entry in entries),
        texts(metadata for metadata, _ in written),
        texts((text if preview else None) for _, text in written),
        *embeddings,
    ]


def _is_vector(entry: Entry) -> bool:
    return entry.dtype == "float32" and entry.vector.ndim == 1 and 0 < entry.vector.size <= MOST_DIMENSIONS


def _vectors(oid: int, items: Mapping[str, Any], groups: Mapping[int, Sequence[str]]) -> Binary:
    if not groups:
        return array(oid, [])
    parts = []
    for dimension, keys in groups.items():
        rows = np.empty(len(keys), [("length", ">i4"), ("dim", ">i2"), ("unused", ">i2"), ("values", ">f4", dimension)])
        rows["length"], rows["dim"], rows["unused"] = _VECTOR_HEADER + 4 * dimension, dimension, 0
        whole = b"".join([np.asarray(items[key].vector, np.float32).tobytes() for key in keys])
        rows["values"] = np.frombuffer(whole, np.float32).reshape(rows["values"].shape)
        parts.append(rows.tobytes())
    return _array(oid, sum(map(len, groups.values())), b"".join(parts))


def _metadata(key: str, metadata: Mapping[str, Any] | None) -> tuple[str | None, str | None]:
    """Return metadata as JSON, and the preview out of it."""
    if metadata is None:
        return None, None
    rest = {name: value for name, value in metadata.items() if name != PREVIEW}
    preview = metadata.get(PREVIEW)
    try:
        written = json.dumps(rest, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError):
        # Without the cause: its message may show what the metadata holds.
        raise TypeError(f"{key}: metadata is not a JSON object") from None
    # Postgres' text has no NUL.
    return written, preview.replace("\0", "\ufffd") if isinstance(preview, str) else None


# --- from rows --------------------------------------------------------------------------------


def items_of(rows: Sequence[Row]) -> Mapping[str, Item]:
    """Return what the rows hold: vectors bit for bit, as one block where they have one dimension, bytes as they are.

    A frame that cannot be read comes back as bytes, for the tier to count as corrupt.
    """
    entries = Entries()
    frames: dict[str, bytes] = {}
    for size, dtype, alike in _alike(rows):
        columns = tuple(zip(*alike, strict=True))
        if size is not None:
            entries.add_block(_vector_block(columns))
        elif dtype is not None and dtype in _DTYPES:
            _unframe(columns, _DTYPES[dtype], entries, frames)
        else:
            frames.update(zip(columns[0], (frame or b"" for frame in columns[2]), strict=True))
    return {**entries.as_dict(), **frames} if frames else entries


def _alike(rows: Sequence[Row]) -> Iterable[tuple[int | None, str | None, Sequence[Row]]]:
    """Yield the rows by the size of their vector (None: they have a frame) and their dtype."""
    kinds = [(None if row[1] is None else len(row[1]), row[3]) for row in rows]
    for kind in dict.fromkeys(kinds):
        alike = rows if kinds.count(kind) == len(rows) else [r for r, k in zip(rows, kinds, strict=True) if k == kind]
        yield *kind, alike


def _vector_block(columns: Sequence[Sequence[Any]]) -> Block:
    """Return the block of rows whose vectors have one dimension."""
    keys, embeddings, _, _, created, expires, *more = columns
    words: NDArray[Any] = np.frombuffer(b"".join(embeddings), ">f4").reshape(len(keys), -1)
    return Block(
        list(keys),
        words[:, _VECTOR_HEADER // 4 :].astype(np.float32),
        np.array(created, np.float64),
        np.array([math.inf if end is None else end for end in expires], np.float64),
        _metadata_of(*more),
    )


def _unframe(columns: Sequence[Sequence[Any]], dtype: Dtype, entries: Entries, frames: dict[str, bytes]) -> None:
    """Add the entries that the frames of rows hold; their metadata has a column of its own."""
    keys, _, written, _, _, _, *more = columns
    given = {key: frame or b"" for key, frame in zip(keys, written, strict=True)}
    found = decode_frames(given, now=-math.inf, dtype=dtype).entries
    if (metadata := _metadata_of(*more)) is not None:
        read = dict(zip(keys, metadata, strict=True))
        found = Entries({key: entry._replace(metadata=read[key]) for key, entry in found.as_dict().items()})
    entries.add(found)
    frames.update((key, given[key]) for key in found.lacking(keys))


def _metadata_of(written: Sequence[str | None], previews: Sequence[str | None]) -> list[dict[str, Any] | None] | None:
    """Return the metadata of each row; None where none has any."""
    if written.count(None) == previews.count(None) == len(written):
        return None
    return list(map(_read_metadata, written, previews))


def _read_metadata(written: str | None, preview: str | None) -> dict[str, Any] | None:
    if written is None and preview is None:
        return None
    metadata: dict[str, Any] = {} if written is None else json.loads(written)
    if preview is not None:
        metadata[PREVIEW] = preview
    return metadata
