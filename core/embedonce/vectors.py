"""Entries and frames: a vector with its dates, in memory and as bytes.

The frame's layout is in ``docs/frames.md``, byte by byte.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from typing import Any, Literal, NamedTuple, NoReturn, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from .errors import Incomplete

Dtype: TypeAlias = Literal["float32", "float16", "int8"]
Metadata: TypeAlias = Mapping[str, Any]


class Entry(NamedTuple):
    """A vector, when it was made and when it expires."""

    vector: NDArray[np.float32]
    """Shape (d,), read-only. Whatever ``dtype`` is, the values are float32."""
    created: float
    """Unix time in seconds."""
    expires: float | None = None
    """Unix time in seconds; None: never."""
    metadata: Metadata | None = None
    """Small JSON, from whoever wrote the entry first."""
    dtype: Dtype = "float32"
    """How finely the values are rounded."""


_ENTRY: Callable[[tuple[Any, ...]], Entry] = partial(tuple.__new__, Entry)
"""Makes an entry from a tuple of its fields, without a call into Python."""

# --- read-only vectors ------------------------------------------------------------------------

_FLOAT32 = np.dtype(np.float32)
_LITTLE = sys.byteorder == "little"


def freeze(vector: ArrayLike) -> NDArray[np.float32]:
    """Return a float32 copy of shape (d,) that is read-only for good.

    It is backed by bytes of its own, so ``setflags(write=True)`` fails and no larger array is kept alive.
    """
    values = _float32(vector)
    if values.ndim != 1:
        raise ValueError(f"a vector has one dimension, not {values.ndim}")
    return np.ndarray(values.shape, _FLOAT32, values.tobytes())


def freeze_rows(matrix: ArrayLike) -> list[NDArray[np.float32]]:
    """Return each row of a matrix (n, d) as :func:`freeze` does; no row is a view of the others' memory."""
    values = _float32(matrix)
    if values.ndim != 2:
        raise ValueError(f"a matrix has two dimensions, not {values.ndim}")
    count, dimension = values.shape
    whole, width = values.tobytes(), 4 * dimension
    parts = [whole[at : at + width] for at in range(0, count * width, width)] if width else [b""] * count
    return _rows(parts, dimension)


def _float32(values: ArrayLike) -> NDArray[np.float32]:
    with np.errstate(all="ignore"):  # what becomes infinite is found by whoever checks, and raises there
        return np.asarray(values, np.float32)


def _rows(payloads: Iterable[bytes], dimension: int) -> list[NDArray[np.float32]]:
    # map over the constructor: 0.25 µs a row, np.frombuffer in a comprehension 0.35.
    make: Callable[..., NDArray[np.float32]] = np.ndarray
    return list(map(make, repeat((dimension,)), repeat(_FLOAT32), payloads))


def matrix(rows: Sequence[NDArray[np.float32]], dimensions: int | None = None) -> NDArray[np.float32]:
    """Put rows of one length together as a new matrix of shape (n, d); (0, dimensions or 0) where there is none.

    Raises:
        Incomplete: the rows have different lengths.
        TypeError: a row is None.
    """
    if not rows:
        return np.empty((0, dimensions or 0), np.float32)
    # Joining buffers is twice as fast as np.stack, which looks at every row in Python.
    joined = bytearray().join(rows)  # type: ignore[arg-type]
    if len(joined) != len(rows) * rows[0].nbytes:
        raise Incomplete("the rows have different dimensions")  # never reshaped into rows that nobody asked for
    return np.frombuffer(joined, np.float32).reshape(len(rows), -1)


# --- entries of a batch -----------------------------------------------------------------------

_NEVER = math.inf


class Block:
    """Entries that were read together, as columns; an :class:`Entry` of its own is made when somebody asks for one."""

    __slots__ = ("_entries", "created", "dtype", "expires", "keys", "metadata", "values")

    def __init__(
        self,
        keys: list[str],
        values: NDArray[np.float32],
        created: NDArray[np.float64],
        expires: NDArray[np.float64],
        metadata: Sequence[Metadata | None] | None = None,
        dtype: Dtype = "float32",
    ) -> None:
        columns = (values, created, expires) if metadata is None else (values, created, expires, metadata)
        if values.ndim != 2 or any(len(column) != len(keys) for column in columns):
            raise ValueError(f"a block of {len(keys)} keys has a matrix of as many rows, and columns as long")
        self.keys = keys
        self.values = values
        """Shape (n, d): row i belongs to key i. It may be a view of what a store answered; nobody writes to it."""
        self.created = created
        self.expires = expires
        """Shape (n,), as ``created``. Infinity: never."""
        self.metadata = metadata
        """None where no row has any."""
        self.dtype: Dtype = dtype
        self._entries: dict[str, Entry] | None = None

    def entries(self) -> dict[str, Entry]:
        """Return an entry for each key, the same ones every time; none keeps the block alive."""
        if self._entries is None:
            ends = repeat(None) if (self.expires == _NEVER).all() else _ends(self.expires)
            metadata = repeat(None) if self.metadata is None else self.metadata
            # strict would refuse the endless ones. All of it is in C: half the time of a loop.
            parts = zip(
                freeze_rows(self.values), self.created.tolist(), ends, metadata, repeat(self.dtype), strict=False
            )
            self._entries = dict(zip(self.keys, map(_ENTRY, parts), strict=True))
        return self._entries

    def where(self, good: NDArray[np.bool_]) -> Block:
        """Return a block of some of the rows: those that are True."""
        keep = np.flatnonzero(good).tolist()
        metadata = None if self.metadata is None else [self.metadata[row] for row in keep]
        keys = [self.keys[row] for row in keep]
        return Block(keys, self.values[keep], self.created[keep], self.expires[keep], metadata, self.dtype)


def _ends(dates: NDArray[np.float64]) -> list[float | None]:
    return [None if date == _NEVER else date for date in dates.tolist()]


class Entries(MutableMapping[str, Entry]):
    """Entries by key, of which those that were read together stay a :class:`Block` until somebody asks for one.

    A batch that only becomes a matrix thus costs no object per text. An entry backend may return one.
    """

    __slots__ = ("_blocks", "_held")

    def __init__(self, entries: Mapping[str, Entry] | None = None, blocks: Iterable[Block] = ()) -> None:
        self._held: dict[str, Entry | Block] = {} if entries is None else dict(entries)
        self._blocks: list[Block] = []
        for block in blocks:
            self.add_block(block)

    def add(self, entries: Mapping[str, Entry]) -> None:
        """Take in other entries."""
        if isinstance(entries, Entries):
            self._held.update(entries._held)
            self._blocks += entries._blocks
        else:
            self._held.update(entries)

    def add_block(self, block: Block) -> None:
        """Take in a block."""
        self._held.update(dict.fromkeys(block.keys, block))
        self._blocks.append(block)

    @property
    def blocks(self) -> Sequence[Block]:
        """What was read together."""
        return self._blocks

    def loose(self) -> dict[str, Entry]:
        """Return the entries that are in no block."""
        if not self._blocks:
            return dict(self._held)  # type: ignore[arg-type]
        if len(self._blocks) == 1 and len(self._blocks[0].keys) == len(self._held):
            return {}
        return {key: held for key, held in self._held.items() if type(held) is not Block}  # type: ignore[misc]

    def as_dict(self) -> dict[str, Entry]:
        """Return all entries, those of blocks made where they are not yet."""
        if not self._blocks:
            return dict(self._held)  # type: ignore[arg-type]
        return {key: self[key] for key in self._held}

    def sizes(self) -> Counter[int]:
        """Return how many entries there are of each dimension."""
        sizes = Counter(entry.vector.size for entry in self.loose().values())
        for block in self._blocks:
            sizes[block.values.shape[1]] += len(block.keys)
        return sizes

    def lacking(self, keys: Iterable[str]) -> list[str]:
        """Return the keys that are not here."""
        held = self._held
        return [key for key in keys if key not in held] if held else list(keys)

    def matrix(self, keys: Sequence[str], dimensions: int | None) -> NDArray[np.float32]:
        """Return the vectors of keys, in their order, as a new matrix of shape (n, d), as :func:`matrix` does.

        Raises:
            KeyError: a key that is not here.
            Incomplete: the vectors have different dimensions.
        """
        if not self._blocks:
            held = self._held
            return matrix([held[key].vector for key in keys], dimensions)  # type: ignore[union-attr]
        loose = self.loose()
        names = [key for block in self._blocks for key in block.keys] + list(loose)
        parts = [block.values for block in self._blocks]
        if loose:
            parts.append(matrix([entry.vector for entry in loose.values()]))
        if len({part.shape[1] for part in parts}) > 1:
            raise Incomplete("the rows have different dimensions")
        values = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if names == keys:
            return values.copy() if len(parts) == 1 else values
        place = dict(zip(names, range(len(names)), strict=True))
        return values[np.fromiter(map(place.__getitem__, keys), np.intp, len(keys))]

    def __getitem__(self, key: str) -> Entry:
        held = self._held[key]
        return held.entries()[key] if type(held) is Block else held  # type: ignore[return-value]

    def __setitem__(self, key: str, entry: Entry) -> None:
        self._held[key] = entry

    def __delitem__(self, key: str) -> None:
        self._held = dict(self.as_dict())
        self._blocks = []
        del self._held[key]

    def __contains__(self, key: object) -> bool:
        return key in self._held

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __repr__(self) -> str:
        return f"<Entries of {len(self)} keys, {len(self._blocks)} blocks>"


# --- rounding ---------------------------------------------------------------------------------

_SMALLEST_SCALE = float(np.finfo(np.float32).smallest_normal)


def round_vectors(matrix: ArrayLike, dtype: Dtype) -> NDArray[np.float32]:
    """Return the rows of a matrix (n, d) as a cache of this dtype answers them, as float32.

    Rounding what is rounded changes no bit, and a row gives the same bits alone as in a batch. With
    ``"float32"`` the result may be ``matrix`` itself.

    Raises:
        ValueError: a row is not finite, too large for the dtype, or becomes all zero; names the row.
    """
    given = np.asarray(matrix)
    if given.ndim != 2:
        raise ValueError(f"a matrix has two dimensions, not {given.ndim}")
    rows = _float32(given)
    values, fits = _rounded(rows, dtype)
    if rows is not given:  # float64 has small values that float32 does not
        fits &= values.any(axis=1) | ~given.any(axis=1)
    if not fits.all():
        row = int(fits.argmin())
        raise ValueError(f"row {row} {_complaint(given[row], dtype)}")
    return values


def _rounded(rows: NDArray[np.float32], dtype: Dtype) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return the rows as they read back once written, and which of them the dtype can hold."""
    return _read_back(rows, _packed(rows, dtype), dtype)


def _read_back(
    rows: NDArray[np.float32], payloads: NDArray[np.uint8], dtype: Dtype
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    if dtype == "float32":
        return rows, _finite(rows)
    values, sound = _unpacked(payloads, dtype)
    with np.errstate(all="ignore"):  # numpy warns of a signalling NaN
        lost = ~values.any(axis=1) & rows.any(axis=1)
    return values, sound & ~lost


def _finite(rows: NDArray[np.float32]) -> NDArray[np.bool_]:
    finite: NDArray[np.bool_] = np.logical_and.reduce(np.isfinite(rows), axis=1)
    return finite


def _complaint(row: NDArray[Any], dtype: Dtype) -> str:
    if not np.isfinite(row).all():
        return "is not finite"
    if np.abs(row).max() >= 1:
        return f"has a value that is too large for {dtype}"
    return f"becomes all zero as {dtype}"


# --- payloads ---------------------------------------------------------------------------------


def _payload_size(dtype: Dtype, dimension: int) -> int:
    if dtype == "int8":
        return 4 + dimension
    return dimension * (2 if dtype == "float16" else 4)


def _packed(rows: NDArray[np.float32], dtype: Dtype) -> NDArray[np.uint8]:
    """Return the payloads of rows (n, d), one a row; what does not fit is for :func:`_unpacked` to find."""
    if dtype == "float32":
        return _octets(rows.astype("<f4", copy=False))
    with np.errstate(all="ignore"):
        if dtype == "float16":
            return _octets(rows.astype("<f2"))
        scales, steps = _to_int8(rows)
    return np.hstack((_octets(scales.astype("<f4", copy=False)[:, None]), _octets(steps)))


def _unpacked(payloads: NDArray[np.uint8], dtype: Dtype) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return the values of payloads of one size, shape (n, d), and which rows an encoder could have written."""
    if dtype == "float32":
        values = payloads.view("<f4").astype(np.float32, copy=False)
        return values, _finite(values)
    with np.errstate(all="ignore"):
        if dtype == "int8":
            return _from_int8(payloads[:, :4].copy().view("<f4")[:, 0], payloads[:, 4:].view(np.int8))
        values = payloads.view("<f2").astype(np.float32)
    return values, _finite(values)


def _octets(rows: NDArray[Any]) -> NDArray[np.uint8]:
    if not rows.size:
        return np.empty((len(rows), rows.shape[1] * rows.itemsize), np.uint8)
    return np.ascontiguousarray(rows).view(np.uint8)


def _to_int8(rows: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """Return each row's scale (n,) and steps (n, d); a value is its step times its row's scale.

    The scale is the row's largest value / 127, rounded up to 16 significant bits and to no less than the
    smallest normal float32. A step has 7 bits, so the product has at most 23 and is exact in float32;
    the largest step is 127 (unless the scale is the smallest), so the rounded row has the same scale again.
    """
    finite = _finite(rows)
    if not finite.all():  # such a row becomes all zero, and is refused for that
        rows = np.where(finite[:, None], rows, np.float32(0))
    peaks = np.abs(rows).max(axis=1, initial=0).astype(np.float64)
    mantissas, exponents = np.frexp(peaks / 127)
    scales = np.maximum(np.ldexp(np.ceil(np.ldexp(mantissas, 16)), exponents - 16), _SMALLEST_SCALE)
    return scales.astype(np.float32), np.rint(rows / scales[:, None]).astype(np.int8)


def _from_int8(scales: NDArray[np.float32], steps: NDArray[np.int8]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    values = steps.astype(np.float32) * scales.astype(np.float32, copy=False)[:, None]
    # Only what _to_int8 gives rounds to itself again: 16 significant bits, and steps that use the range.
    bits = np.ascontiguousarray(scales, np.float32).view(np.uint32)
    peaks = np.maximum(steps.max(axis=1, initial=0), -steps.min(axis=1, initial=0).astype(np.int16))
    sound = (bits & 0xFF == 0) & (scales >= _SMALLEST_SCALE) & _finite(values)
    return values, sound & ((peaks == 127) | ((scales == _SMALLEST_SCALE) & (peaks < 127)))


# --- the frame's layout -----------------------------------------------------------------------

MAX_METADATA = 64 * 1024
"""Most bytes of an entry's metadata as compact JSON."""


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite_number(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError("a number is too large for a float")
    return number


# Made once: json.dumps and json.loads with options make a new one per call, which costs more than the JSON.
_TO_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_FROM_JSON = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite_number)

_HEADER = 64
_START = struct.Struct("<QQ")  # magic, version, dtype and flags as one word; checksum: the same in every version
_REST = struct.Struct("<IIdd16sQ")  # dimension, metadata's length, created, expires, echo, key id
_MAGIC = int.from_bytes(b"EO1F", "little")
_VERSION = 1
_HAS_METADATA = 1

# From fine to coarse: a stored code that is greater than the cache's is coarser.
_CODES: dict[Dtype, int] = {"float32": 1, "float16": 2, "int8": 3}
_DTYPES: dict[int, Dtype] = {code: dtype for dtype, code in _CODES.items()}


def _word(dtype: Dtype, flags: int = 0) -> int:
    return _MAGIC | _VERSION << 32 | _CODES[dtype] << 40 | flags << 48


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
    plain = [(v if v.dtype == _FLOAT32 else _float32(v)).tobytes() for v in vectors]
    rows: NDArray[np.float32] = np.ndarray((len(keys), dimension), np.float32, b"".join(plain))
    packed = _packed(rows, dtype)
    fits = _read_back(rows, packed, dtype)[1]
    if not fits.all():
        row = int(fits.argmin())
        raise ValueError(f"{keys[row]}: its vector {_complaint(rows[row], dtype)}")
    if dtype == "float32" and _LITTLE:
        return plain
    return [payload.tobytes() for payload in packed]


def _frame(key: str, entry: Entry, dimension: int, payload: bytes) -> bytes:
    expires = _NEVER if entry.expires is None else entry.expires
    if not _dated(entry.created, expires):
        raise ValueError(f"{key}: created is a finite time, expires a time or None")
    metadata, flags = b"", 0
    if entry.metadata is not None:
        metadata, flags = _write_metadata(key, entry.metadata), _HAS_METADATA
    word = _word(entry.dtype, flags)
    body = _REST.pack(dimension, len(metadata), entry.created, expires, _echo(key), 0) + metadata + payload
    return _START.pack(word, xxh3_64_intdigest(body, word)) + body


def _dated(created: float, expires: float) -> bool:
    return math.isfinite(created) and (math.isfinite(expires) or expires == _NEVER)


def plain_metadata(metadata: Metadata) -> dict[str, Any]:
    """Return a copy of metadata as it will be read back from a frame (a tuple as a list).

    Raises:
        TypeError: it is not a JSON object.
        ValueError: it is larger than 64 KiB.
    """
    copy: dict[str, Any] = json.loads(_write_metadata("an entry", metadata))
    return copy


def _write_metadata(key: str, metadata: Metadata) -> bytes:
    try:
        if not isinstance(metadata, Mapping) or not _has_plain_keys(metadata):
            raise TypeError("a key is not a string")
        written = _TO_JSON.encode(dict(metadata)).encode()
    except (TypeError, ValueError, RecursionError):
        # Without the cause: its message may show what the metadata holds.
        raise TypeError(f"{key}: metadata is not a JSON object with strings as keys") from None
    if len(written) > MAX_METADATA:
        raise ValueError(f"{key}: metadata takes {len(written)} bytes; the most is {MAX_METADATA}")
    return written


def _has_plain_keys(value: Any) -> bool:
    # json.dumps writes {1: …} as {"1": …}, and the answer would differ after a restart.
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _has_plain_keys(item) for name, item in value.items())
    return not isinstance(value, (list, tuple)) or all(map(_has_plain_keys, value))


# --- encrypted frames -------------------------------------------------------------------------

_ENCRYPTED = 2
_START_BYTES, _CHECKSUM_END = 8, 16
_KEY_ID = struct.Struct("<Q")
_KEY_ID_AT = _HEADER - _KEY_ID.size


class SealedFrame(NamedTuple):
    """An encrypted frame, taken apart."""

    key_id: int
    header: bytes
    """What is bound to the body beside the storage key: the header without its checksum, 56 bytes."""
    body: bytes

    def with_body(self, body: bytes) -> bytes:
        """Return the plain frame with this body, as it was before it was sealed."""
        word = int.from_bytes(self.header[:_START_BYTES], "little") & ~(_ENCRYPTED << 48)
        rest = self.header[_START_BYTES : -_KEY_ID.size] + _KEY_ID.pack(0) + body
        return _START.pack(word, xxh3_64_intdigest(rest, word)) + rest


def seal_frame(frame: bytes, key_id: int, encrypt: Callable[[bytes, bytes], bytes]) -> bytes:
    """Return a frame whose metadata and payload are replaced by ``encrypt(them, header)``."""
    word = int.from_bytes(frame[:_START_BYTES], "little") | _ENCRYPTED << 48
    head = frame[_CHECKSUM_END:_KEY_ID_AT] + _KEY_ID.pack(key_id)
    rest = head + encrypt(frame[_HEADER:], word.to_bytes(_START_BYTES, "little") + head)
    return _START.pack(word, xxh3_64_intdigest(rest, word)) + rest


def open_frame(frame: Any) -> SealedFrame | None:
    """Take an encrypted frame apart; None if it is none."""
    frame = frame if type(frame) is bytes else _as_bytes(frame)
    if frame is None or len(frame) < _HEADER or not int.from_bytes(frame[:_START_BYTES], "little") >> 48 & _ENCRYPTED:
        return None
    (key_id,) = _KEY_ID.unpack_from(frame, _KEY_ID_AT)
    return SealedFrame(key_id, frame[:_START_BYTES] + frame[_CHECKSUM_END:_HEADER], frame[_HEADER:])


def is_plain_frame(frame: Any) -> bool:
    """Say whether this is a whole frame that is not encrypted."""
    frame = frame if type(frame) is bytes else _as_bytes(frame)
    if frame is None or len(frame) < _HEADER:
        return False
    word, checksum = _START.unpack_from(frame)
    whole = word & 0xFFFFFFFF == _MAGIC and xxh3_64_intdigest(frame[_START.size :], word) == checksum
    return whole and not word >> 48 & _ENCRYPTED


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
            plain = _as_bytes(frame)
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


def _as_bytes(value: Any) -> bytes | None:
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
    if size < _HEADER:
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
    values, sound = _unpacked(np.frombuffer(buffer, np.uint8).reshape(count, size)[:, start:], dtype)
    good &= sound
    if wanted.dtype != dtype:
        values, fits = _rounded(values, wanted.dtype)
        good &= fits
    metadata = None
    if start > _HEADER:
        metadata = [
            _read_metadata(frame[_HEADER:start]) if fine else None
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
    start = _HEADER + length
    return (dtype, start) if size == start + _payload_size(dtype, dimension) else None


def _announced(flags: int, length: int) -> bool:
    """Return whether the metadata's length is one that goes with the flags."""
    return 0 < length <= MAX_METADATA if flags else length == 0


def _checksums(frames: Sequence[bytes], word: int) -> NDArray[np.uint64]:
    body = _START.size
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
    if len(frame) < _START.size:
        return "corrupt"
    word, checksum = _START.unpack_from(frame)
    if word & 0xFFFFFFFF != _MAGIC or xxh3_64_intdigest(frame[_START.size :], word) != checksum:
        return "corrupt"
    version, code, flags = word >> 32 & 0xFF, word >> 40 & 0xFF, word >> 48
    if version != _VERSION:
        return "missed"
    dtype = _DTYPES.get(code)
    if dtype is None or flags & ~_HAS_METADATA or len(frame) < _HEADER:
        return "corrupt"
    dimension, length, created, expires, echo, key_id = _REST.unpack_from(frame, _START.size)
    if echo != _echo(key) or key_id or not _dated(created, expires) or not wanted.takes(dimension):
        return "corrupt"
    if len(frame) != _HEADER + length + _payload_size(dtype, dimension) or not _announced(flags, length):
        return "corrupt"
    if expires <= wanted.now or code > _CODES[wanted.dtype]:
        return "missed"
    metadata = _read_metadata(frame[_HEADER : _HEADER + length]) if flags else None
    if flags and metadata is None:
        return "corrupt"
    vector = _vector(frame[_HEADER + length :], dtype, dimension, wanted.dtype)
    if isinstance(vector, str):
        return vector
    return Entry(vector, created, None if expires == _NEVER else expires, metadata, wanted.dtype)


def _vector(payload: bytes, dtype: Dtype, dimension: int, wanted: Dtype) -> NDArray[np.float32] | _Refused:
    if dtype == wanted == "float32" and _LITTLE:
        vector = _rows((payload,), dimension)[0]
        return vector if np.isfinite(vector).all() else "corrupt"
    values, sound = _unpacked(np.ndarray((1, len(payload)), np.uint8, payload), dtype)
    if not sound.all():
        return "corrupt"
    if wanted != dtype:
        values, fits = _rounded(values, wanted)
        if not fits.all():  # as if it were not there: computing it again says what is wrong
            return "missed"
    return freeze(values[0])


def _read_metadata(written: bytes) -> dict[str, Any] | None:
    """Return the metadata, or None where it is not a JSON object that could be written again."""
    try:
        metadata = _FROM_JSON.decode(written.decode())
        if b"\\u" in written:  # an escape can stand for half a character
            _TO_JSON.encode(metadata).encode()
    except (ValueError, RecursionError):
        return None
    return metadata if isinstance(metadata, dict) else None
