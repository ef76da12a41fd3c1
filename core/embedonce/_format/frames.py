"""Encodes entries as frames, and decodes frames. ``docs/frames.md`` has the layout, byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from math import isfinite
from operator import itemgetter
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from .costs import MAX_SECONDS, MAX_TOKENS, NO_COST, is_valid_cost
from .entries import (
    FLOAT32,
    LITTLE_ENDIAN,
    NEVER,
    Block,
    Dtype,
    Entries,
    Entry,
    Matrix,
    Vector,
    as_float32,
    freeze,
    make_entry,
)
from .metadata import MAX_METADATA, read_metadata, write_metadata
from .rounding import explain_unfit, pack, payload_size, read_back, round_rows, unpack

HEADER = 64  # size in bytes
# The first word contains the magic, the version, the dtype and the flags. The second word is the checksum. Every
# version of the format has these two words.
START = struct.Struct("<QQ")
_REST = struct.Struct("<IIdd16sQ")  # dimension, length of the metadata, created, expires, echo of the key, key ID
MAGIC = int.from_bytes(b"EO1F", "little")
_HAS_METADATA = 1
# A frame of version 2 has the entry's cost after the header; a frame of version 1 has none. Every other part is equal.
_WITHOUT_COST, _WITH_COST = 1, 2
_COST = struct.Struct("<Qd")  # tokens, seconds
_COST_WORDS = struct.Struct("<QQ")  # the same 16 bytes as two words
_COST_SIZES = {_WITHOUT_COST: 0, _WITH_COST: _COST.size}
"""Size of the cost in bytes, by the version of the format."""
# A part that is unknown is a word in which every bit is 1. As seconds, this word is a NaN.
_UNKNOWN = 2**64 - 1
_UNKNOWN_BYTES = _UNKNOWN.to_bytes(8, "little")
# The bits of floats from 0 up have the same order as their values. So both parts are compared as words.
_MAX_TOKENS_WORD, _MAX_SECONDS_WORD = _COST_WORDS.unpack(_COST.pack(MAX_TOKENS, MAX_SECONDS))

# The codes are ordered from fine to coarse: a dtype is coarser than another dtype if its code is greater.
_CODES: dict[Dtype, int] = {"float32": 1, "float16": 2, "int8": 3}
_DTYPES: dict[int, Dtype] = {code: dtype for dtype, code in _CODES.items()}


def _build_first_word(version: int, dtype: Dtype, flags: int) -> int:
    return MAGIC | version << 32 | _CODES[dtype] << 40 | flags << 48


_KNOWN_WORDS: dict[int, tuple[int, Dtype, int]] = {
    _build_first_word(version, dtype, flags): (version, dtype, flags)
    for version in _COST_SIZES
    for dtype in _CODES
    for flags in (0, _HAS_METADATA)
}
_FIRST_WORDS = {layout: word for word, layout in _KNOWN_WORDS.items()}


_get_body = itemgetter(slice(START.size, None))
"""Function that returns the bytes of a frame that its checksum covers."""


def _hash_key(key: str) -> bytes:
    # Valid keys are ASCII. A faulty backend may return a key with lone surrogates, and hashing must not fail for it.
    return xxh3_128_digest(key.encode() if key.isascii() else key.encode("utf-8", "surrogatepass"))


def _hash_keys(keys: Sequence[str]) -> bytes:
    try:
        return b"".join([xxh3_128_digest(key.encode()) for key in keys])
    except UnicodeEncodeError:
        return b"".join(map(_hash_key, keys))


# --- entries to frames ------------------------------------------------------------------------


def encode_frames(items: Mapping[str, Entry]) -> dict[str, bytes]:
    """Return each entry as a frame for its key.

    An entry whose cost is unknown becomes a frame of version 1, which every version of embedonce reads. Other entries
    become frames of version 2.

    Each vector is written with the precision of its entry's ``dtype``. A vector that does not have this precision yet
    is rounded here. A vector that already has this precision is stored exactly, bit for bit.

    Raises:
        ValueError: a vector, a date or a cost does not fit into a frame, the dtype is unknown, or the metadata has more
            than :data:`MAX_METADATA` bytes; the message names the key.
        TypeError: metadata is not JSON; the message names the key.
    """
    frames = {}
    for (dtype, dimension), keys in _group_by_layout(items).items():
        payloads = _encode_payloads(keys, [items[key].vector for key in keys], dtype, dimension)
        for key, payload in zip(keys, payloads, strict=True):
            frames[key] = _build_frame(key, items[key], dimension, payload)
    return frames


def _group_by_layout(items: Mapping[str, Entry]) -> dict[tuple[Dtype, int], list[str]]:
    """Return the keys, grouped by dtype and dimension."""
    groups: dict[tuple[Dtype, int], list[str]] = {}
    for key, entry in items.items():
        shape = entry.vector.shape
        if len(shape) != 1 or entry.dtype not in _CODES:
            raise ValueError(
                f"{key}: an entry needs a vector of shape (d,), and the dtype must be one of {', '.join(_CODES)}"
            )
        groups.setdefault((entry.dtype, shape[0]), []).append(key)
    return groups


def _encode_payloads(keys: Sequence[str], vectors: Sequence[Vector], dtype: Dtype, dimension: int) -> list[bytes]:
    """Return one payload per key, from vectors that all have ``dimension`` dimensions."""
    plain = [(v if v.dtype == FLOAT32 else as_float32(v)).tobytes() for v in vectors]
    rows: Matrix = np.ndarray((len(keys), dimension), np.float32, b"".join(plain))
    packed = pack(rows, dtype)
    fits = read_back(rows, packed, dtype)[1]
    if not fits.all():
        row = int(fits.argmin())
        raise ValueError(f"{keys[row]}: the vector {explain_unfit(rows[row], dtype)}")
    if dtype == "float32" and LITTLE_ENDIAN:
        return plain
    return [payload.tobytes() for payload in packed]


def _build_frame(key: str, entry: Entry, dimension: int, payload: bytes) -> bytes:
    expires = NEVER if entry.expires is None else entry.expires
    if not _are_valid_dates(entry.created, expires):
        raise ValueError(f"{key}: created must be a finite number, and expires must be a number or None")
    metadata, flags = b"", 0
    if entry.metadata is not None:
        metadata, flags = write_metadata(key, entry.metadata), _HAS_METADATA
    cost, version = b"", _WITHOUT_COST
    if entry.tokens is not None or entry.seconds is not None:
        cost, version = _encode_cost(key, entry.tokens, entry.seconds), _WITH_COST
    word = _FIRST_WORDS[version, entry.dtype, flags]
    head = _REST.pack(dimension, len(metadata), entry.created, expires, _hash_key(key), 0)
    body = b"".join((head, cost, metadata, payload))
    return START.pack(word, xxh3_64_intdigest(body, word)) + body


def _encode_cost(key: str, tokens: int | None, seconds: float | None) -> bytes:
    if not is_valid_cost(tokens, seconds):
        raise ValueError(
            f"{key}: tokens must be an int from 0 to {MAX_TOKENS:,} or None, and seconds a number from 0 to "
            f"{MAX_SECONDS:,.0f} or None"
        )
    cost = _COST.pack(tokens or 0, (seconds or 0.0) + 0.0)  # adding 0.0 turns minus zero into zero
    if tokens is None:
        return _UNKNOWN_BYTES + cost[8:]
    return cost if seconds is not None else cost[:8] + _UNKNOWN_BYTES


def _are_valid_dates(created: float, expires: float) -> bool:
    return isfinite(created) and (expires == NEVER or isfinite(expires))


# --- frames to entries ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Decoded:
    """The result of :func:`decode_frames`; each key is in exactly one of the three fields."""

    entries: Entries = field(default_factory=Entries)
    corrupt: list[str] = field(default_factory=list)
    """Keys whose value is not a frame, is damaged, has the wrong dimensions, or is the frame of a different key.

    The cache counts these keys as corrupt and embeds their texts again.
    """
    missed: list[str] = field(default_factory=list)
    """Keys whose frame has expired, has a different format version, or has a coarser dtype than the requested one.

    A key is also missed if its vector does not fit the requested dtype, because a value is too large for the dtype or
    because all values become zero.
    """


class _Request(NamedTuple):
    """The requirements of the caller of :func:`decode_frames`."""

    now: float
    dtype: Dtype
    dimensions: int | None

    def accepts(self, dimension: int) -> bool:
        return self.dimensions is None or 0 < dimension == self.dimensions


_Rejection: TypeAlias = Literal["corrupt", "missed"]
_MIN_BATCH = 6
"""Minimum number of frames of the same size that are checked together, as columns. Fewer frames are checked one by one,
because this is faster for a few frames."""


def decode_frames(
    frames: Mapping[str, bytes], *, now: float, dtype: Dtype = "float32", dimensions: int | None = None
) -> Decoded:
    """Decode and check the frames that a tier returned. This function raises no error, whatever the tier returned.

    Frames of the same size are checked together, as columns. A stored vector that is finer than ``dtype`` is rounded
    to ``dtype``. Without ``dimensions``, a vector may have any number of dimensions, even 0 as in a space card.
    """
    wanted = _Request(now, dtype, dimensions)
    decoded = Decoded()
    for keys, group in _group_by_size(frames, decoded.corrupt):
        rest: Iterable[tuple[str, bytes]] = zip(keys, group, strict=True)
        if len(keys) >= _MIN_BATCH:
            rest = _decode_batch(keys, group, wanted, decoded.entries)
        for key, frame in rest:
            result = _decode_one(key, frame, wanted)
            if isinstance(result, Entry):
                decoded.entries[key] = result
            else:
                (decoded.corrupt if result == "corrupt" else decoded.missed).append(key)
    return decoded


def decode_frame(key: str, frame: bytes, *, now: float, dtype: Dtype, dimensions: int | None) -> Entry | None:
    """Return the entry of one frame, or None if :func:`decode_frames` would not return an entry."""
    result = _decode_one(key, frame, _Request(now, dtype, dimensions))
    return result if type(result) is Entry else None


def _group_by_size(frames: Mapping[str, bytes], corrupt: list[str]) -> Iterable[tuple[list[str], list[bytes]]]:
    """Return keys and frames, grouped by the frames' size. Keys whose value is not bytes are added to ``corrupt``."""
    values = list(frames.values())
    if len(set(map(len, values) if set(map(type, values)) == {bytes} else ())) == 1:
        return [(list(frames), values)]  # nearly every call takes this fast path
    groups: dict[int, tuple[list[str], list[bytes]]] = {}
    for key, frame in frames.items():
        if type(frame) is not bytes:
            converted = to_bytes(frame)
            if converted is None:
                corrupt.append(key)
                continue
            frame = converted
        size = len(frame)
        if size not in groups:
            groups[size] = ([], [])
        keys, group = groups[size]
        keys.append(key)
        group.append(frame)
    return groups.values()


def to_bytes(value: Any) -> bytes | None:
    """Return a bytes-like value as bytes, or None if it is not bytes-like."""
    if not isinstance(value, (bytes, bytearray, memoryview)):
        return None
    try:
        return bytes(value)
    except ValueError:  # a memoryview that its owner released
        return None


def _decode_batch(
    keys: list[str], frames: list[bytes], wanted: _Request, entries: Entries
) -> Iterable[tuple[str, bytes]]:
    """Decode frames of the same size together. Add a block of valid frames to ``entries``, and return all other frames.

    The block contains each frame that has the layout of the first frame and passes every check. The caller passes the
    returned frames to :func:`_decode_one`, because a frame with a different layout may also be valid, and because
    only :func:`_decode_one` finds out why a frame is rejected.
    """
    count, size = len(frames), len(frames[0])
    layout = _read_layout(frames[0], wanted)
    if layout is None:
        return zip(keys, frames, strict=True)
    dtype, rest, start = layout
    buffer = b"".join(frames)
    # The words of a header are: 0 the first word, 1 the checksum, 2 the dimension and the length of the metadata
    # (in one word), 3 created, 4 expires, 5 and 6 the echo of the key, 7 the key ID. In version 2, two more words
    # follow: 8 the tokens, 9 the seconds.
    words = np.ndarray((count, rest // 8), np.dtype("<u8"), buffer, strides=(size, 8)).copy()
    good = _check_headers(words, keys, wanted.now)
    good &= words[:, 1] == _compute_checksums(frames, int(words[0, 0]))
    values, sound = unpack(np.frombuffer(buffer, np.uint8).reshape(count, size)[:, start:], dtype)
    good &= sound
    if wanted.dtype != dtype:
        values, fits = round_rows(values, wanted.dtype)
        good &= fits
    tokens = seconds = None
    if rest > HEADER:
        # Adding 1 turns the word of an unknown part into 0, so that one comparison per part is enough.
        good &= words[:, 8] + 1 <= _MAX_TOKENS_WORD + 1
        good &= words[:, 9] + 1 <= _MAX_SECONDS_WORD + 1
        tokens, seconds = words[:, 8].view("<i8"), words[:, 9].view("<f8")
    metadata = None
    if start > rest:
        metadata = [
            read_metadata(frame[rest:start]) if is_good else None
            for frame, is_good in zip(frames, good.tolist(), strict=True)
        ]
        good &= [read is not None for read in metadata]
    dates = words[:, 3:5].view("<f8")
    block = Block(keys, values, dates[:, 0], dates[:, 1], metadata, wanted.dtype, tokens, seconds)
    if good.all():
        entries.add_block(block)
        return ()
    if good.any():
        entries.add_block(block.where(good))
    return [pair for pair, is_good in zip(zip(keys, frames, strict=True), good.tolist(), strict=True) if not is_good]


def _read_layout(frame: bytes, wanted: _Request) -> tuple[Dtype, int, int] | None:
    """Return the dtype and the offsets of the metadata and of the payload, as the header of a frame describes them.

    Return None if frames with this header cannot be decoded as a block.
    """
    if len(frame) < HEADER:
        return None
    word, _ = START.unpack_from(frame)
    known = _KNOWN_WORDS.get(word)
    if known is None:
        return None
    version, dtype, flags = known
    dimension, length, *_ = _REST.unpack_from(frame, START.size)
    if _CODES[dtype] > _CODES[wanted.dtype] or not wanted.accepts(dimension) or not _is_metadata_length(length, flags):
        return None
    rest = HEADER + _COST_SIZES[version]
    start = rest + length
    return (dtype, rest, start) if len(frame) == start + payload_size(dtype, dimension) else None


def _is_metadata_length(length: int, flags: int) -> bool:
    """Return whether the length of the metadata is valid with these flags."""
    return 0 < length <= MAX_METADATA if flags else length == 0


def _compute_checksums(frames: Sequence[bytes], word: int) -> NDArray[np.uint64]:
    return np.fromiter(map(xxh3_64_intdigest, map(_get_body, frames), repeat(word)), np.uint64, len(frames))


def _check_headers(words: NDArray[np.uint64], keys: Sequence[str], now: float) -> NDArray[np.bool_]:
    """Return a mask of the valid headers.

    A valid header has the same layout as the first header, and contains the echo of the frame's own key. Its creation
    date is finite, and its expiry date is in the future.
    """
    echoes = np.frombuffer(_hash_keys(keys), "<u8").reshape(len(keys), 2)
    dates = words[:, 3:5].view("<f8")
    good: NDArray[np.bool_] = (words[:, 0] == words[0, 0]) & (words[:, 2] == words[0, 2]) & (words[:, 7] == 0)
    good &= (words[:, 5] == echoes[:, 0]) & (words[:, 6] == echoes[:, 1])
    good &= np.isfinite(dates[:, 0]) & (dates[:, 1] > now)
    return good


def _decode_one(key: str, frame: bytes, wanted: _Request) -> Entry | _Rejection:
    """Return the frame's entry, or why it was rejected."""
    if len(frame) < START.size:
        return "corrupt"
    word, checksum = START.unpack_from(frame)
    if word & 0xFFFFFFFF != MAGIC or xxh3_64_intdigest(frame[START.size :], word) != checksum:
        return "corrupt"
    version, code, flags = word >> 32 & 0xFF, word >> 40 & 0xFF, word >> 48
    if version not in _COST_SIZES:
        return "missed"
    dtype = _DTYPES.get(code)
    if dtype is None or flags & ~_HAS_METADATA or len(frame) < HEADER:
        return "corrupt"
    dimension, length, created, expires, echo, key_id = _REST.unpack_from(frame, START.size)
    if echo != _hash_key(key) or key_id or not _are_valid_dates(created, expires) or not wanted.accepts(dimension):
        return "corrupt"
    rest = HEADER + _COST_SIZES[version]
    if len(frame) != rest + length + payload_size(dtype, dimension) or not _is_metadata_length(length, flags):
        return "corrupt"
    cost = NO_COST if version == _WITHOUT_COST else _decode_cost(frame)
    if cost is None:
        return "corrupt"
    if expires <= wanted.now or code > _CODES[wanted.dtype]:
        return "missed"
    metadata = read_metadata(frame[rest : rest + length]) if flags else None
    if flags and metadata is None:
        return "corrupt"
    vector = _decode_vector(frame[rest + length :], dtype, dimension, wanted.dtype)
    if isinstance(vector, str):
        return vector
    return make_entry((vector, created, None if expires == NEVER else expires, metadata, wanted.dtype, *cost))


def _decode_cost(frame: bytes) -> tuple[int | None, float | None] | None:
    """Return the tokens and the seconds in a frame of version 2, or None if they are invalid."""
    tokens, word = _COST_WORDS.unpack_from(frame, HEADER)
    if _MAX_TOKENS_WORD < tokens != _UNKNOWN or _MAX_SECONDS_WORD < word != _UNKNOWN:
        return None
    return (
        None if tokens == _UNKNOWN else tokens,
        None if word == _UNKNOWN else _COST.unpack_from(frame, HEADER)[1],
    )


def _decode_vector(payload: bytes, dtype: Dtype, dimension: int, wanted: Dtype) -> Vector | _Rejection:
    if dtype == wanted == "float32" and LITTLE_ENDIAN:
        vector: Vector = np.ndarray((dimension,), FLOAT32, payload)
        # Searching bytes takes a third of the time of all(), which is a function in Python.
        return vector if 0 not in np.isfinite(vector).tobytes() else "corrupt"
    values, sound = unpack(np.ndarray((1, len(payload)), np.uint8, payload), dtype)
    if not sound.all():
        return "corrupt"
    if wanted != dtype:
        values, fits = round_rows(values, wanted)
        # A vector that does not fit counts as a miss, so the text is embedded again. If the new vector does not fit
        # either, the call raises an error that gives the reason.
        if not fits.all():
            return "missed"
    return freeze(values[0])
