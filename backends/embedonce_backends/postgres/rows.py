"""Convert entries and frames to parameters in Postgres' binary format, and binary rows to entries and frames.

In Postgres' binary format, an array starts with five numbers: the number of its dimensions, whether it has NULLs (0 or
1), the id of the elements' type, the number of elements, and the index of the first element. The elements
follow, each as its length and its bytes. All numbers are big-endian. In pgvector's format, a vector consists of two
16-bit numbers (the number of dimensions and an unused number) and the float32 values.
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

from embedonce.vectors import (
    MAX_SECONDS,
    MAX_TOKENS,
    Block,
    Dtype,
    Entries,
    Entry,
    decode_frames,
    encode_frames,
    is_valid_cost,
)

Item: TypeAlias = Entry | bytes
Row: TypeAlias = tuple[Any, ...]

MAX_DIMENSIONS = 16_000
"""Maximum number of dimensions of pgvector's type ``vector``."""
PREVIEW = "text_preview"
"""Field of an entry's metadata that has a column of its own. The field is not stored if the option of the same name is
off."""

BYTEA, INT8, INT4, TEXT, FLOAT8 = 17, 20, 23, 25, 701
"""Ids (oid) of Postgres' built-in types. The ids of an extension's types differ between databases."""

_ARRAY = struct.Struct(">iiIii")
_EMPTY = struct.Struct(">iiI")
_LENGTH = struct.Struct(">i")
_NULL = _LENGTH.pack(-1)
encode_long = struct.Struct(">q").pack
encode_double = struct.Struct(">d").pack
_VECTOR_HEADER = 4
_DTYPES: Mapping[str, Dtype] = {"float32": "float32", "float16": "float16", "int8": "int8"}


_KEPT_UNTIL, _SERVER_TIME = -2, -1
"""Places in a row: when it may be deleted, in Unix time or None; and the time of the server, in microseconds since the
year 2000. The other values are: key, embedding, frame, dtype, created, expires, metadata, text_preview, tokens,
seconds."""
_YEAR_2000 = 946_684_800
"""The beginning of the year 2000 in Unix time."""


# --- to parameters ----------------------------------------------------------------------------


def encode_array(oid: int, elements: Sequence[bytes | None]) -> bytes:
    """Return an array of encoded elements of the type ``oid``.

    If all elements are NULL, the array is empty. That is enough, because ``unnest`` fills up shorter arrays with NULLs.
    """
    if None not in elements and len(set(map(len, elements))) == 1:  # type: ignore[arg-type]
        whole: list[bytes] = list(elements)  # type: ignore[arg-type]
        return _pack_array(oid, len(whole), _LENGTH.pack(len(whole[0])).join((b"", *whole)))
    if all(element is None for element in elements):
        return _EMPTY.pack(0, 0, oid)
    parts = [_NULL if part is None else _LENGTH.pack(len(part)) + part for part in elements]
    return _pack_array(oid, len(parts), b"".join(parts), has_nulls=True)


def _pack_array(oid: int, count: int, body: bytes, *, has_nulls: bool = False) -> bytes:
    return _ARRAY.pack(1, has_nulls, oid, count, 1) + body


def encode_texts(values: Iterable[str | None]) -> bytes:
    """Return an array of type text."""
    return encode_array(TEXT, [None if value is None else value.encode() for value in values])


def encode_numbers(values: Iterable[float | None]) -> bytes:
    """Return an array of type double precision."""
    return encode_array(FLOAT8, [None if value is None else encode_double(value) for value in values])


def encode_columns(items: Mapping[str, Item], vector_oid: int | None, preview: bool) -> list[bytes]:
    """Return one array per column to write, in the order of the statement's parameters.

    Entries that go into the vector column come first, then the other entries, then the items that are bytes. In this
    order, a column that is NULL in the last rows needs only a short array.

    A frame has no metadata and no cost, because they have columns. Therefore it is of version 1, which earlier
    versions of embedonce read. If the table has no columns for costs, the costs are not stored.

    Raises:
        ValueError: an entry does not fit into a row; the message names its key.
        TypeError: metadata is not JSON; the message names the entry's key.
    """
    vectors: dict[int, list[str]] = {}
    framed: dict[str, Entry] = {}
    plain: dict[str, bytes] = {}
    for key, item in items.items():
        if not isinstance(item, Entry):
            plain[key] = item
            continue
        if not is_valid_cost(item.tokens, item.seconds):
            raise ValueError(
                f"{key}: tokens must be an int from 0 to {MAX_TOKENS:,} or None, and seconds a number from 0 to "
                f"{MAX_SECONDS:,.0f} or None"
            )
        if vector_oid is not None and _fits_vector_column(item):
            vectors.setdefault(item.vector.size, []).append(key)
        else:
            framed[key] = item._replace(metadata=None, tokens=None, seconds=None)
    first = [key for keys in vectors.values() for key in keys]
    entries: list[Entry] = [items[key] for key in (*first, *framed)]  # type: ignore[misc]
    frames = encode_frames(framed)
    written = [_encode_metadata(key, entry.metadata) for key, entry in zip((*first, *framed), entries, strict=True)]
    embeddings = [] if vector_oid is None else [_encode_vectors(vector_oid, items, vectors)]
    return [
        encode_texts([*first, *framed, *plain]),
        encode_array(BYTEA, [*repeat(None, len(first)), *(frames[key] for key in framed), *plain.values()]),
        encode_texts(entry.dtype for entry in entries),
        encode_array(INT4, [_LENGTH.pack(entry.vector.size) for entry in entries]),
        encode_numbers(entry.created for entry in entries),
        encode_numbers(entry.expires for entry in entries),
        encode_texts(metadata for metadata, _ in written),
        encode_texts((text if preview else None) for _, text in written),
        encode_array(INT8, [None if entry.tokens is None else encode_long(entry.tokens) for entry in entries]),
        encode_numbers(entry.seconds for entry in entries),
        *embeddings,
    ]


def _fits_vector_column(entry: Entry) -> bool:
    return entry.dtype == "float32" and entry.vector.ndim == 1 and 0 < entry.vector.size <= MAX_DIMENSIONS


def _encode_vectors(oid: int, items: Mapping[str, Any], groups: Mapping[int, Sequence[str]]) -> bytes:
    """Return an array of vectors. ``groups`` has the keys of the vectors, by their number of dimensions."""
    if not groups:
        return encode_array(oid, [])
    parts = []
    for dimension, keys in groups.items():
        rows = np.empty(len(keys), [("length", ">i4"), ("dim", ">i2"), ("unused", ">i2"), ("values", ">f4", dimension)])
        rows["length"], rows["dim"], rows["unused"] = _VECTOR_HEADER + 4 * dimension, dimension, 0
        whole = b"".join([np.asarray(items[key].vector, np.float32).tobytes() for key in keys])
        rows["values"] = np.frombuffer(whole, np.float32).reshape(rows["values"].shape)
        parts.append(rows.tobytes())
    return _pack_array(oid, sum(map(len, groups.values())), b"".join(parts))


def _encode_metadata(key: str, metadata: Mapping[str, Any] | None) -> tuple[str | None, str | None]:
    """Return two texts: the metadata as JSON without the preview, and the preview."""
    if metadata is None:
        return None, None
    rest = {name: value for name, value in metadata.items() if name != PREVIEW}
    preview = metadata.get(PREVIEW)
    try:
        written = json.dumps(rest, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError):
        # This uses "from None", because the cause's message may show content of the metadata.
        raise TypeError(f"{key}: metadata cannot be stored as JSON") from None
    # In Postgres, a value of type ``text`` cannot contain NUL characters.
    return written, preview.replace("\0", "\ufffd") if isinstance(preview, str) else None


# --- from rows --------------------------------------------------------------------------------


def decode_rows(rows: Sequence[Row], clock_offset: float) -> Mapping[str, Item]:
    """Return the entries and frames of the rows that are still kept, by key.

    ``clock_offset`` is a number of seconds that is added to the server's clock.

    The vectors are bit for bit identical to those that were stored. Vectors with the same number of dimensions form one
    :class:`Block`. A frame that cannot be decoded is returned as bytes, so that the tier counts it as corrupt.
    """
    entries = Entries()
    frames: dict[str, bytes] = {}
    for size, dtype, group in _group_rows(_drop_expired(rows, clock_offset)):
        columns = tuple(zip(*group, strict=True))
        if size is not None:
            entries.add_block(_make_vector_block(columns))
        elif dtype is not None and dtype in _DTYPES:
            _decode_frames(columns, _DTYPES[dtype], entries, frames)
        else:
            frames.update(zip(columns[0], (frame or b"" for frame in columns[2]), strict=True))
    return {**entries.as_dict(), **frames} if frames else entries


def _drop_expired(rows: Sequence[Row], clock_offset: float) -> Sequence[Row]:
    """Return the rows that may not be deleted yet.

    The statement does not do this, because planning a comparison with a time takes the server longer than the whole
    reply to one key.
    """
    if not rows:
        return rows
    now = rows[0][_SERVER_TIME] / 1e6 + _YEAR_2000 + clock_offset
    return [row for row in rows if row[_KEPT_UNTIL] is None or row[_KEPT_UNTIL] > now]


def _group_rows(rows: Sequence[Row]) -> Iterable[tuple[int | None, str | None, Sequence[Row]]]:
    """Group the rows by the number of bytes in the vector column and by dtype; yield both values with each group.

    The number of bytes is None for rows that have a frame and no vector.
    """
    kinds = [(None if row[1] is None else len(row[1]), row[3]) for row in rows]
    for kind in dict.fromkeys(kinds):
        group = rows if kinds.count(kind) == len(rows) else [r for r, k in zip(rows, kinds, strict=True) if k == kind]
        yield *kind, group


def _make_vector_block(columns: Sequence[Sequence[Any]]) -> Block:
    """Return a block of all rows; their vectors must have the same number of dimensions."""
    keys, embeddings, _, _, created, expires, metadata, previews, tokens, seconds, *_ = columns
    words: NDArray[Any] = np.frombuffer(b"".join(embeddings), ">f4").reshape(len(keys), -1)
    return Block(
        list(keys),
        words[:, _VECTOR_HEADER // 4 :].astype(np.float32),
        np.array(created, np.float64),
        np.array([math.inf if end is None else end for end in expires], np.float64),
        _decode_metadata_columns(metadata, previews),
        tokens=_decode_tokens(tokens),
        seconds=_decode_seconds(seconds),
    )


def _decode_tokens(tokens: Sequence[int | None]) -> NDArray[np.int64] | None:
    unknown = tokens.count(None)
    if unknown == len(tokens):
        return None
    return np.array([-1 if number is None else number for number in tokens] if unknown else tokens, np.int64)


def _decode_seconds(seconds: Sequence[float | None]) -> NDArray[np.float64] | None:
    return None if seconds.count(None) == len(seconds) else np.array(seconds, np.float64)  # NULL becomes NaN


def _decode_frames(columns: Sequence[Sequence[Any]], dtype: Dtype, entries: Entries, frames: dict[str, bytes]) -> None:
    """Decode the frames of the rows and add the results to ``entries``.

    If a frame cannot be decoded, the frame itself is added to ``frames``. The entries get their metadata and their
    costs from their columns.
    """
    keys, _, written, _, _, _, texts, previews, tokens, seconds, *_ = columns
    found_frames = {key: frame or b"" for key, frame in zip(keys, written, strict=True)}
    decoded = decode_frames(found_frames, now=-math.inf, dtype=dtype).entries
    replacements = _decode_metadata_columns(texts, previews), _decode_tokens(tokens), _decode_seconds(seconds)
    if any(column is not None for column in replacements):
        decoded = _replace_columns(decoded, keys, *replacements)
    entries.add(decoded)
    frames.update((key, found_frames[key]) for key in decoded.lacking(keys))


def _replace_columns(
    entries: Entries,
    keys: Sequence[str],
    metadata: Sequence[dict[str, Any] | None] | None,
    tokens: NDArray[np.int64] | None,
    seconds: NDArray[np.float64] | None,
) -> Entries:
    """Return the entries with the metadata and the costs of the columns, which have one item per key of ``keys``."""
    place = dict(zip(keys, range(len(keys)), strict=True))

    def replace(block: Block) -> Block:
        rows = [place[key] for key in block.keys]
        return Block(
            block.keys,
            block.values,
            block.created,
            block.expires,
            None if metadata is None else [metadata[row] for row in rows],
            block.dtype,
            None if tokens is None else tokens[rows],
            None if seconds is None else seconds[rows],
        )

    blocks = [replace(block) for block in entries.blocks]
    blocks += [replace(_make_block(key, entry)) for key, entry in entries.loose().items()]
    return Entries(blocks=blocks)


def _make_block(key: str, entry: Entry) -> Block:
    """Return a block of one entry, without its metadata and its cost."""
    expires = math.inf if entry.expires is None else entry.expires
    return Block([key], entry.vector[None, :], np.array([entry.created]), np.array([expires]), dtype=entry.dtype)


def _decode_metadata_columns(
    written: Sequence[str | None], previews: Sequence[str | None]
) -> list[dict[str, Any] | None] | None:
    """Return the metadata of each row, or None if no row has metadata."""
    if written.count(None) == previews.count(None) == len(written):
        return None
    return list(map(_decode_metadata, written, previews))


def _decode_metadata(written: str | None, preview: str | None) -> dict[str, Any] | None:
    if written is None and preview is None:
        return None
    metadata: dict[str, Any] = {} if written is None else json.loads(written)
    if preview is not None:
        metadata[PREVIEW] = preview
    return metadata
