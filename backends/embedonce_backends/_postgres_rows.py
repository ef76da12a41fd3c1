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

from embedonce.vectors import Dtype, Entry, decode_frames, encode_frames, freeze_rows

from ._postgres_connections import Binary

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


def items_of(rows: Sequence[Row]) -> dict[str, Item]:
    """Return what the rows hold: vectors bit for bit, bytes as they are.

    A frame that cannot be read comes back as bytes, for the tier to count as corrupt.
    """
    groups: dict[int | None, list[Row]] = {}
    for row in rows:
        embedding = row[1]
        groups.setdefault(None if embedding is None else len(embedding), []).append(row)
    framed = groups.pop(None, [])
    found: dict[str, Item] = {}
    for group in groups.values():
        found |= _entries(group)
    if framed:
        found |= _unframed(framed)
    return found


def _entries(rows: Sequence[Row]) -> dict[str, Entry]:
    """Return the entries of rows whose vectors have one dimension."""
    keys, embeddings, _, _, created, expires, metadata, previews = zip(*rows, strict=True)
    words: NDArray[Any] = np.frombuffer(b"".join(embeddings), ">f4").reshape(len(rows), -1)
    vectors = freeze_rows(words[:, _VECTOR_HEADER // 4 :])
    read: Iterable[dict[str, Any] | None] = repeat(None)
    if any(metadata) or any(previews):
        read = map(_read_metadata, metadata, previews)
    return dict(zip(keys, map(Entry, vectors, created, expires, read), strict=True))


def _unframed(rows: Sequence[Row]) -> dict[str, Item]:
    found: dict[str, Item] = {}
    entries: dict[Dtype, dict[str, bytes]] = {}
    metadata: dict[str, dict[str, Any] | None] = {}
    for key, _, frame, dtype, _, _, written, preview in rows:
        found[key] = frame = b"" if frame is None else frame
        if dtype in _DTYPES:
            entries.setdefault(_DTYPES[dtype], {})[key] = frame
            if written is not None or preview is not None:
                metadata[key] = _read_metadata(written, preview)
    for dtype, frames in entries.items():
        found |= decode_frames(frames, now=-math.inf, dtype=dtype).entries
    for key, read in metadata.items():
        entry = found[key]
        if isinstance(entry, Entry):
            found[key] = entry._replace(metadata=read)
    return found


def _read_metadata(written: str | None, preview: str | None) -> dict[str, Any] | None:
    if written is None and preview is None:
        return None
    metadata: dict[str, Any] = {} if written is None else json.loads(written)
    if preview is not None:
        metadata[PREVIEW] = preview
    return metadata
