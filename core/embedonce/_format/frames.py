"""Entries as frames and back. ``docs/frames.md`` has the layout, byte by byte."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from .entries import FLOAT32, LITTLE_ENDIAN, NEVER, Block, Dtype, Entries, Entry, as_float32, freeze, rows_of
from .metadata import MAX_METADATA, read_metadata, write_metadata
from .rounding import explain_unfit, pack, payload_size, read_back, round_rows, unpack

HEADER = 64
START = struct.Struct("<QQ")  # magic, version, dtype and flags as one word; checksum: the same in every version
_REST = struct.Struct("<IIdd16sQ")  # dimension, metadata's length, created, expires, echo, key id
MAGIC = int.from_bytes(b"EO1F", "little")
_VERSION = 1
_HAS_METADATA = 1

# From fine to coarse: a stored code that is greater than the cache's is coarser.
_CODES: dict[Dtype, int] = {"float32": 1, "float16": 2, "int8": 3}
_DTYPES: dict[int, Dtype] = {code: dtype for dtype, code in _CODES.items()}


def _word(dtype: Dtype, flags: int = 0) -> int:
    return MAGIC | _VERSION << 32 | _CODES[dtype] << 40 | flags << 48


_KNOWN: dict[int, tuple[Dtype, int]] = {
    _word(dtype, flags): (dtype, flags) for dtype in _CODES for flags in (0, _HAS_METADATA)
}


def _echo(key: str) -> bytes:
    # Keys are ASCII; surrogatepass keeps a backend that answers with other strings from raising here.
    return xxh3_128_digest(key.encode("utf-8", "surrogatepass"))


def _echoes(keys: Sequence[str]) -> bytes:
    try:
        return b"".join([xxh3_128_digest(key.encode()) for key in keys])
    except UnicodeEncodeError:
        return b"".join(map(_echo, keys))


# --- entries to frames ------------------------------------------------------------------------


def encode_frames(items: Mapping[str, Entry]) -> dict[str, bytes]:
    """Return each entry as a frame for its key.

    The entry's own ``dtype`` decides how finely it is written. A vector that is not yet rounded to it is
    rounded here; one that is reads back bit for bit.

    Raises:
        ValueError: a vector or date that no frame can hold, an unknown dtype, or metadata over
            :data:`MAX_METADATA` bytes; names the key.
        TypeError: metadata is not JSON; names the key.
    """
    frames = {}
    for (dtype, dimension), keys in _alike(items).items():
        payloads = _payloads(keys, [items[key].vector for key in keys], dtype, dimension)
        for key, payload in zip(keys, payloads, strict=True):
            frames[key] = _frame(key, items[key], dimension, payload)
    return frames


def _alike(items: Mapping[str, Entry]) -> dict[tuple[Dtype, int], list[str]]:
    """Return the keys by dtype and length of their vectors."""
    groups: dict[tuple[Dtype, int], list[str]] = {}
    for key, entry in items.items():
        shape = entry.vector.shape
        if len(shape) != 1 or entry.dtype not in _CODES:
            raise ValueError(f"{key}: an entry is a vector of shape (d,) and a dtype of {', '.join(_CODES)}")
        groups.setdefault((entry.dtype, shape[0]), []).append(key)
    return groups


def _payloads(keys: Sequence[str], vectors: Sequence[NDArray[np.float32]], dtype: Dtype, dimension: int) -> list[bytes]:
    """Return the payloads of vectors of one length."""
    plain = [(v if v.dtype == FLOAT32 else as_float32(v)).tobytes() for v in vectors]
    rows: NDArray[np.float32] = np.ndarray((len(keys), dimension), np.float32, b"".join(plain))
    packed = pack(rows, dtype)
    fits = read_back(rows, packed, dtype)[1]
    if not fits.all():
        row = int(fits.argmin())
        raise ValueError(f"{keys[row]}: its vector {explain_unfit(rows[row], dtype)}")
    if dtype == "float32" and LITTLE_ENDIAN:
        return plain
    return [payload.tobytes() for payload in packed]


def _frame(key: str, entry: Entry, dimension: int, payload: bytes) -> bytes:
    expires = NEVER if entry.expires is None else entry.expires
    if not _dated(entry.created, expires):
        raise ValueError(f"{key}: created is a finite time, expires a time or None")
    metadata, flags = b"", 0
    if entry.metadata is not None:
        metadata, flags = write_metadata(key, entry.metadata), _HAS_METADATA
    word = _word(entry.dtype, flags)
    body = _REST.pack(dimension, len(metadata), entry.created, expires, _echo(key), 0) + metadata + payload
    return START.pack(word, xxh3_64_intdigest(body, word)) + body


def _dated(created: float, expires: float) -> bool:
    return math.isfinite(created) and (math.isfinite(expires) or expires == NEVER)


# --- frames to entries ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Decoded:
    """What :func:`decode_frames` made of a tier's answer; each key is in exactly one of the three."""

    entries: Entries = field(default_factory=Entries)
    corrupt: list[str] = field(default_factory=list)
    """Damaged, foreign or another key's: counted as corrupt, and the text is computed again."""
    missed: list[str] = field(default_factory=list)
    """Expired, of another format version, or coarser than asked for."""


class _Wanted(NamedTuple):
    now: float
    dtype: Dtype
    dimensions: int | None

    def takes(self, dimension: int) -> bool:
        return self.dimensions is None or 0 < dimension == self.dimensions


_Refused: TypeAlias = Literal["corrupt", "missed"]
_BATCH = 6
"""From this many frames of one size on, checking them as columns is faster than one by one."""


def decode_frames(
    frames: Mapping[str, bytes], *, now: float, dtype: Dtype = "float32", dimensions: int | None = None
) -> Decoded:
    """Read a tier's answer; never raises, whatever the values are.

    Frames of one size are checked together, as columns. A stored entry that is finer than ``dtype`` is
    rounded to it. Without ``dimensions`` every length is taken, also 0: that of a space card.
    """
    wanted = _Wanted(now, dtype, dimensions)
    decoded = Decoded()
    for keys, alike in _by_size(frames, decoded.corrupt):
        rest: Iterable[tuple[str, bytes]] = zip(keys, alike, strict=True)
        if len(keys) >= _BATCH:
            rest = _decode_alike(keys, alike, wanted, decoded.entries)
        for key, frame in rest:
            result = _decode_one(key, frame, wanted)
            if isinstance(result, Entry):
                decoded.entries[key] = result
            else:
                (decoded.corrupt if result == "corrupt" else decoded.missed).append(key)
    return decoded


def _by_size(frames: Mapping[str, bytes], corrupt: list[str]) -> Iterable[tuple[list[str], list[bytes]]]:
    whole = list(frames.values())
    if len(set(map(len, whole) if set(map(type, whole)) == {bytes} else ())) == 1:
        return [(list(frames), whole)]  # as nearly all answers are
    groups: dict[int, tuple[list[str], list[bytes]]] = {}
    for key, frame in frames.items():
        if type(frame) is not bytes:
            plain = as_bytes(frame)
            if plain is None:
                corrupt.append(key)
                continue
            frame = plain
        size = len(frame)
        if size not in groups:
            groups[size] = ([], [])
        keys, alike = groups[size]
        keys.append(key)
        alike.append(frame)
    return groups.values()


def as_bytes(value: Any) -> bytes | None:
    """Return what a client gave instead of bytes, if it is bytes under another name."""
    if not isinstance(value, (bytes, bytearray, memoryview)):
        return None
    try:
        return bytes(value)
    except ValueError:  # a memoryview that its owner released
        return None


def _decode_alike(
    keys: list[str], frames: list[bytes], wanted: _Wanted, entries: Entries
) -> Iterable[tuple[str, bytes]]:
    """Add a block of the frames of one size that are like the first; return the frames that need a closer look.

    Takes only frames that pass every check; :func:`_decode_one` says what the others are.
    """
    count, size = len(frames), len(frames[0])
    if size < HEADER:
        return zip(keys, frames, strict=True)
    buffer = b"".join(frames)
    # A header is eight words: start, checksum, dimension with metadata's length, created, expires, echo (two), key id.
    words = np.ndarray((count, 8), np.dtype("<u8"), buffer, strides=(size, 8)).copy()
    likeness = _likeness(words, size, wanted)
    if likeness is None:
        return zip(keys, frames, strict=True)
    dtype, start = likeness
    good = _good_headers(words, keys, wanted.now)
    good &= words[:, 1] == _checksums(frames, int(words[0, 0]))
    values, sound = unpack(np.frombuffer(buffer, np.uint8).reshape(count, size)[:, start:], dtype)
    good &= sound
    if wanted.dtype != dtype:
        values, fits = round_rows(values, wanted.dtype)
        good &= fits
    metadata = None
    if start > HEADER:
        metadata = [
            read_metadata(frame[HEADER:start]) if fine else None
            for frame, fine in zip(frames, good.tolist(), strict=True)
        ]
        good &= [read is not None for read in metadata]
    dates = words[:, 3:5].view("<f8")
    block = Block(keys, values, dates[:, 0], dates[:, 1], metadata, wanted.dtype)
    if good.all():
        entries.add_block(block)
        return ()
    if good.any():
        entries.add_block(block.where(good))
    return [pair for pair, fine in zip(zip(keys, frames, strict=True), good.tolist(), strict=True) if not fine]


def _likeness(words: NDArray[np.uint64], size: int, wanted: _Wanted) -> tuple[Dtype, int] | None:
    """Return dtype and start of the payload of frames like the first of these headers; None if those are not wanted."""
    known = _KNOWN.get(int(words[0, 0]))
    if known is None:
        return None
    dtype, flags = known
    length, dimension = divmod(int(words[0, 2]), 1 << 32)
    if _CODES[dtype] > _CODES[wanted.dtype] or not wanted.takes(dimension) or not _announced(flags, length):
        return None
    start = HEADER + length
    return (dtype, start) if size == start + payload_size(dtype, dimension) else None


def _announced(flags: int, length: int) -> bool:
    """Return whether the metadata's length is one that goes with the flags."""
    return 0 < length <= MAX_METADATA if flags else length == 0


def _checksums(frames: Sequence[bytes], word: int) -> NDArray[np.uint64]:
    body = START.size
    return np.fromiter([xxh3_64_intdigest(frame[body:], word) for frame in frames], np.uint64, len(frames))


def _good_headers(words: NDArray[np.uint64], keys: Sequence[str], now: float) -> NDArray[np.bool_]:
    """Return which headers are like the first, of their key, dated, and not expired."""
    echoes = np.frombuffer(_echoes(keys), "<u8").reshape(len(keys), 2)
    dates = words[:, 3:5].view("<f8")
    good: NDArray[np.bool_] = (words[:, 0] == words[0, 0]) & (words[:, 2] == words[0, 2]) & (words[:, 7] == 0)
    good &= (words[:, 5] == echoes[:, 0]) & (words[:, 6] == echoes[:, 1])
    good &= np.isfinite(dates[:, 0]) & (dates[:, 1] > now)
    return good


def _decode_one(key: str, frame: bytes, wanted: _Wanted) -> Entry | _Refused:
    """Return the frame's entry, or what is the matter with it."""
    if len(frame) < START.size:
        return "corrupt"
    word, checksum = START.unpack_from(frame)
    if word & 0xFFFFFFFF != MAGIC or xxh3_64_intdigest(frame[START.size :], word) != checksum:
        return "corrupt"
    version, code, flags = word >> 32 & 0xFF, word >> 40 & 0xFF, word >> 48
    if version != _VERSION:
        return "missed"
    dtype = _DTYPES.get(code)
    if dtype is None or flags & ~_HAS_METADATA or len(frame) < HEADER:
        return "corrupt"
    dimension, length, created, expires, echo, key_id = _REST.unpack_from(frame, START.size)
    if echo != _echo(key) or key_id or not _dated(created, expires) or not wanted.takes(dimension):
        return "corrupt"
    if len(frame) != HEADER + length + payload_size(dtype, dimension) or not _announced(flags, length):
        return "corrupt"
    if expires <= wanted.now or code > _CODES[wanted.dtype]:
        return "missed"
    metadata = read_metadata(frame[HEADER : HEADER + length]) if flags else None
    if flags and metadata is None:
        return "corrupt"
    vector = _vector(frame[HEADER + length :], dtype, dimension, wanted.dtype)
    if isinstance(vector, str):
        return vector
    return Entry(vector, created, None if expires == NEVER else expires, metadata, wanted.dtype)


def _vector(payload: bytes, dtype: Dtype, dimension: int, wanted: Dtype) -> NDArray[np.float32] | _Refused:
    if dtype == wanted == "float32" and LITTLE_ENDIAN:
        vector = rows_of((payload,), dimension)[0]
        return vector if np.isfinite(vector).all() else "corrupt"
    values, sound = unpack(np.ndarray((1, len(payload)), np.uint8, payload), dtype)
    if not sound.all():
        return "corrupt"
    if wanted != dtype:
        values, fits = round_rows(values, wanted)
        if not fits.all():  # as if it were not there: computing it again says what is wrong
            return "missed"
    return freeze(values[0])
