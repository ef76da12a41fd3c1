"""Entries: vectors with their dates, one by one or as the block in which they were read."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from itertools import repeat
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from embedonce._reprs import number_of
from embedonce.errors import Incomplete

Dtype: TypeAlias = Literal["float32", "float16", "int8"]
Metadata: TypeAlias = Mapping[str, Any]
Vector: TypeAlias = np.ndarray[tuple[int], np.dtype[np.float32]]
"""One vector: float32, shape (d,)."""
Matrix: TypeAlias = np.ndarray[tuple[int, int], np.dtype[np.float32]]
"""Vectors as rows: float32, shape (n, d)."""


class Entry(NamedTuple):
    """A vector, when it was made and when it expires."""

    vector: Vector
    """Shape (d,), read-only. Whatever ``dtype`` is, the values are float32."""
    created: float
    """Unix time in seconds."""
    expires: float | None = None
    """Unix time in seconds; None: never."""
    metadata: Metadata | None = None
    """Small JSON, from whoever wrote the entry first."""
    dtype: Dtype = "float32"
    """How finely the values are rounded."""

    def __repr__(self) -> str:
        ends = "" if self.expires is None else f", expires={self.expires}"
        more = "" if self.metadata is None else f", metadata of {number_of(len(self.metadata), 'key')}"
        return f"<Entry {np.size(self.vector)} x {self.dtype}, created={self.created}{ends}{more}>"


_ENTRY: Callable[[tuple[Any, ...]], Entry] = partial(tuple.__new__, Entry)
"""Makes an entry from a tuple of its fields, without a call into Python."""

FLOAT32 = np.dtype(np.float32)
LITTLE_ENDIAN = sys.byteorder == "little"


def freeze(vector: ArrayLike) -> Vector:
    """Return a float32 copy of shape (d,) that is read-only for good.

    It is backed by bytes of its own, so ``setflags(write=True)`` fails and no larger array is kept alive.
    """
    values = as_float32(vector)
    if values.ndim != 1:
        raise ValueError(f"a vector has one dimension, not {values.ndim}")
    return np.ndarray(values.shape, FLOAT32, values.tobytes())


def freeze_rows(matrix: ArrayLike) -> list[Vector]:
    """Return each row of a matrix (n, d) as :func:`freeze` does; no row is a view of the others' memory."""
    values = as_float32(matrix)
    if values.ndim != 2:
        raise ValueError(f"a matrix has two dimensions, not {values.ndim}")
    count, dimension = values.shape
    whole, width = values.tobytes(), 4 * dimension
    parts = [whole[at : at + width] for at in range(0, count * width, width)] if width else [b""] * count
    return rows_of(parts, dimension)


def as_float32(values: ArrayLike) -> NDArray[np.float32]:
    with np.errstate(all="ignore"):  # what becomes infinite is found by whoever checks, and raises there
        return np.asarray(values, np.float32)


def rows_of(payloads: Iterable[bytes], dimension: int) -> list[Vector]:
    # map over the constructor: 0.25 µs a row, np.frombuffer in a comprehension 0.35.
    make: Callable[..., Vector] = np.ndarray
    return list(map(make, repeat((dimension,)), repeat(FLOAT32), payloads))


def matrix(rows: Sequence[Vector], dimensions: int | None = None) -> Matrix:
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


NEVER = math.inf


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
            ends = repeat(None) if (self.expires == NEVER).all() else _ends(self.expires)
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
    return [None if date == NEVER else date for date in dates.tolist()]


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
