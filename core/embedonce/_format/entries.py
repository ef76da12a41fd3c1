"""Entries, which are vectors with dates and costs. Entries that were read together can stay in one block."""

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

from embedonce._messages import format_count
from embedonce.errors import Incomplete

from .costs import CostColumns

Dtype: TypeAlias = Literal["float32", "float16", "int8"]
Metadata: TypeAlias = Mapping[str, Any]
Vector: TypeAlias = np.ndarray[tuple[int], np.dtype[np.float32]]
"""One vector: float32, shape (d,)."""
Matrix: TypeAlias = np.ndarray[tuple[int, int], np.dtype[np.float32]]
"""Vectors as rows: float32, shape (n, d)."""


class Entry(NamedTuple):
    """A vector, its dates, and what it cost to compute it."""

    vector: Vector
    """Vector of shape (d,), read-only. The values are float32, whatever ``dtype`` is."""
    created: float
    """Unix time in seconds."""
    expires: float | None = None
    """Unix time in seconds, or None if the entry never expires."""
    metadata: Metadata | None = None
    """Small JSON object from the call that first stored the entry, or None."""
    dtype: Dtype = "float32"
    """Precision to which the values are rounded."""
    tokens: int | None = None
    """Tokens that the provider charged for the text, or None if the number is unknown."""
    seconds: float | None = None
    """The text's share of the seconds that the provider's call took, or None if they are unknown."""

    def __repr__(self) -> str:
        ends = "" if self.expires is None else f", expires={self.expires}"
        more = "" if self.metadata is None else f", metadata of {format_count(len(self.metadata), 'key')}"
        cost = "" if self.tokens is None else f", tokens={self.tokens}"
        return f"<Entry {np.size(self.vector)} x {self.dtype}, created={self.created}{ends}{more}{cost}>"


make_entry: Callable[[tuple[Any, ...]], Entry] = partial(tuple.__new__, Entry)
"""Function that makes an entry from a tuple of its fields; it runs in C, which is faster than ``Entry(...)``."""


def make_entries(
    vectors: Iterable[Vector],
    created: float,
    dtype: Dtype,
    tokens: Iterable[int | None],
    seconds: Iterable[float | None],
) -> list[Entry]:
    """Return one entry per vector, without an expiry date and metadata. This takes a third of the time of a loop."""
    parts = zip(vectors, repeat(created), repeat(None), repeat(None), repeat(dtype), tokens, seconds, strict=False)
    return list(map(make_entry, parts))


FLOAT32 = np.dtype(np.float32)
LITTLE_ENDIAN = sys.byteorder == "little"


def freeze(vector: ArrayLike) -> Vector:
    """Return a float32 copy of shape (d,) that stays read-only.

    The memory of the copy is a bytes object that nothing else uses. Therefore ``setflags(write=True)`` fails, and the
    copy does not keep a larger array alive.

    Raises:
        ValueError: the vector does not have one dimension.
    """
    values = as_float32(vector)
    if values.ndim != 1:
        raise ValueError(f"expected a vector with one dimension, got {values.ndim}")
    return np.ndarray(values.shape, FLOAT32, values.tobytes())


def freeze_rows(matrix: ArrayLike) -> list[Vector]:
    """Return a read-only copy of each row of a matrix (n, d), like :func:`freeze` for one vector.

    The copies share no memory.

    Raises:
        ValueError: the matrix does not have two dimensions.
    """
    values = as_float32(matrix)
    if values.ndim != 2:
        raise ValueError(f"expected a matrix with two dimensions, got {values.ndim}")
    count, dimension = values.shape
    if not values.size:
        return make_rows([b""] * count, dimension)
    # A row that is one value of a void type becomes a bytes object in C. This takes half the time of slicing a copy.
    rows = np.ascontiguousarray(values).view(f"V{4 * dimension}")
    return make_rows(rows.ravel().tolist(), dimension)


def as_float32(values: ArrayLike) -> NDArray[np.float32]:
    with np.errstate(all="ignore"):  # the caller checks for values that become infinite
        return np.asarray(values, np.float32)


def make_rows(payloads: Iterable[bytes], dimension: int) -> list[Vector]:
    """Return one read-only row of shape (dimension,) per payload. A row is a view of its payload, not a copy."""
    # Calling the constructor with map() takes 0.25 µs per row. np.frombuffer in a comprehension takes 0.35 µs.
    make: Callable[..., Vector] = np.ndarray
    return list(map(make, repeat((dimension,)), repeat(FLOAT32), payloads))


def matrix(rows: Sequence[Vector], dimensions: int | None = None) -> Matrix:
    """Join rows with the same number of dimensions into a new matrix of shape (n, d).

    If there are no rows, the shape is (0, ``dimensions``), or (0, 0) if ``dimensions`` is None.

    Raises:
        Incomplete: the rows have different numbers of dimensions.
        TypeError: a row is None.
    """
    if not rows:
        return np.empty((0, dimensions or 0), np.float32)
    # Joining buffers is twice as fast as np.stack, which looks at every row in Python.
    joined = bytearray().join(rows)  # type: ignore[arg-type]
    if len(joined) != len(rows) * rows[0].nbytes:
        raise Incomplete("the rows have different dimensions")  # reshaping would mix values of different rows
    return np.frombuffer(joined, np.float32).reshape(len(rows), -1)


NEVER = math.inf


class Columns(NamedTuple):
    """The fields of several entries: one tuple per field, with one item per entry."""

    vectors: tuple[Vector, ...]
    created: tuple[float, ...]
    expires: tuple[float | None, ...]
    metadata: tuple[Metadata | None, ...]
    dtypes: tuple[Dtype, ...]
    tokens: tuple[int | None, ...]
    seconds: tuple[float | None, ...]

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Columns:
        """Return the fields of entries. Reading one column takes a tenth of the time of a loop over the entries."""
        return _make_columns(zip(*entries, strict=True)) if entries else _NO_COLUMNS


_make_columns: Callable[[Iterable[Any]], Columns] = partial(tuple.__new__, Columns)
_NO_COLUMNS = Columns((), (), (), (), (), (), ())


class Block:
    """Entries that were read together, kept as columns; :class:`Entry` objects are made only on request."""

    __slots__ = ("_entries", "created", "dtype", "expires", "keys", "metadata", "seconds", "tokens", "values")

    def __init__(
        self,
        keys: list[str],
        values: Matrix,
        created: NDArray[np.float64],
        expires: NDArray[np.float64],
        metadata: Sequence[Metadata | None] | None = None,
        dtype: Dtype = "float32",
        tokens: NDArray[np.int64] | None = None,
        seconds: NDArray[np.float64] | None = None,
    ) -> None:
        columns = [column for column in (values, created, expires, metadata, tokens, seconds) if column is not None]
        if values.ndim != 2 or any(len(column) != len(keys) for column in columns):
            raise ValueError(f"a block of {len(keys)} keys needs a matrix and columns with {len(keys)} rows each")
        self.keys = keys
        self.values = values
        """Matrix of shape (n, d); row i belongs to key i.

        Do not write to the matrix, because it may be a view of the data that a store returned.
        """
        self.created = created
        self.expires = expires
        """Expiry dates, shape (n,) like ``created``; infinity means never."""
        self.metadata = metadata
        """Metadata per row, or None if no row has metadata."""
        self.dtype: Dtype = dtype
        self.tokens = tokens
        """Tokens per row, int64, shape (n,), or None if no row's tokens are known; -1 means unknown."""
        self.seconds = seconds
        """Seconds per row, float64, shape (n,), or None if no row's seconds are known; NaN means unknown."""
        self._entries: dict[str, Entry] | None = None

    def entries(self) -> dict[str, Entry]:
        """Return an entry for each key. Every call returns the same objects.

        The entries do not keep the block alive, because each entry has a copy of its vector.
        """
        if self._entries is None:
            expires = repeat(None) if (self.expires == NEVER).all() else _to_optional_dates(self.expires)
            metadata = repeat(None) if self.metadata is None else self.metadata
            tokens = repeat(None) if self.tokens is None else _to_optional_tokens(self.tokens)
            seconds = repeat(None) if self.seconds is None else _to_optional_seconds(self.seconds)
            # strict=False, because `repeat()` never ends. The expression runs in C and takes half the time of a loop.
            parts = zip(
                freeze_rows(self.values),
                self.created.tolist(),
                expires,
                metadata,
                repeat(self.dtype),
                tokens,
                seconds,
                strict=False,
            )
            self._entries = dict(zip(self.keys, map(make_entry, parts), strict=True))
        return self._entries

    def where(self, good: NDArray[np.bool_]) -> Block:
        """Return a block of the rows for which ``good`` is True."""
        keep = np.flatnonzero(good).tolist()
        metadata = None if self.metadata is None else [self.metadata[row] for row in keep]
        keys = [self.keys[row] for row in keep]
        tokens = None if self.tokens is None else self.tokens[keep]
        seconds = None if self.seconds is None else self.seconds[keep]
        return Block(
            keys, self.values[keep], self.created[keep], self.expires[keep], metadata, self.dtype, tokens, seconds
        )


def _to_optional_tokens(tokens: NDArray[np.int64]) -> list[int | None]:
    # Only -1 means unknown. Every other negative number is invalid, and the engine drops its entry.
    return [None if number == -1 else number for number in tokens.tolist()]


def _to_optional_seconds(seconds: NDArray[np.float64]) -> list[float | None]:
    return [None if math.isnan(number) else number for number in seconds.tolist()]


def _to_optional_dates(dates: NDArray[np.float64]) -> list[float | None]:
    return [None if date == NEVER else date for date in dates.tolist()]


class Entries(MutableMapping[str, Entry]):
    """Entries by key; entries that were read together stay in a :class:`Block` until one of them is requested.

    Therefore no entry objects are created for a batch that is only converted to a matrix. An entry backend may return
    an ``Entries``.
    """

    __slots__ = ("_blocks", "_by_key", "_columns")

    def __init__(
        self,
        entries: Mapping[str, Entry] | None = None,
        blocks: Iterable[Block] = (),
        *,
        columns: Columns | None = None,
    ) -> None:
        self._by_key: dict[str, Entry | Block] = {} if entries is None else dict(entries)
        self._columns = columns
        """The columns of all entries, in their order, or None if they are not known. They are valid only as long as
        their length is the number of keys."""
        self._blocks: list[Block] = []
        for block in blocks:
            self.add_block(block)

    def add(self, entries: Mapping[str, Entry]) -> None:
        """Add entries. An added entry replaces an entry with the same key."""
        if not isinstance(entries, Entries):
            self._columns = None
            self._by_key.update(entries)
            return
        # Several threads may fill the answer of one call. Whoever uses the columns checks their length.
        self._columns = None if self._by_key else entries._columns
        self._by_key.update(entries._by_key)
        self._blocks += entries._blocks

    def add_block(self, block: Block) -> None:
        """Add a block."""
        self._columns = None
        self._by_key.update(dict.fromkeys(block.keys, block))
        self._blocks.append(block)

    @property
    def blocks(self) -> Sequence[Block]:
        """The blocks that were added."""
        return self._blocks

    def loose(self) -> dict[str, Entry]:
        """Return the entries that are not in a block."""
        if not self._blocks:
            return dict(self._by_key)  # type: ignore[arg-type]
        # Several threads may fill the answer of one call. Copying a dict is one step for them, a loop is not.
        items = dict(self._by_key)
        if set(map(type, items.values())) == {Block}:
            return {}
        return {key: item for key, item in items.items() if type(item) is not Block}  # type: ignore[misc]

    def list_keys(self) -> list[str]:
        """Return all keys. This is faster than making a list of the mapping itself."""
        return list(self._by_key)

    def as_dict(self) -> dict[str, Entry]:
        """Return all entries as a dict. Entry objects are created for the entries that are still in blocks."""
        if not self._blocks:
            return dict(self._by_key)  # type: ignore[arg-type]
        by_key = dict(self._by_key)  # a copy, because several threads may fill the answer of one call
        found: dict[str, Any] = dict(by_key)
        # A later block has replaced the entries of an earlier one, and a single entry those of the blocks before it.
        for block in list(self._blocks):
            found.update(block.entries())
        found.update({key: item for key, item in by_key.items() if type(item) is not Block})
        return found

    def sizes(self) -> Counter[int]:
        """Count the entries by the number of dimensions of their vectors."""
        sizes = Counter(entry.vector.size for entry in self.loose().values())
        for block in list(self._blocks):
            sizes[block.values.shape[1]] += len(block.keys)
        return sizes

    def list_costs(self) -> list[CostColumns]:
        """Return the costs of all entries as columns, for :func:`sum_costs`."""
        columns = self._get_columns()
        if columns is not None:
            return [CostColumns(len(columns.tokens), columns.tokens, columns.seconds)]
        costs = [CostColumns(len(block.keys), block.tokens, block.seconds) for block in list(self._blocks)]
        entries = list(self.loose().values())
        if entries:
            tokens, seconds = tuple([entry.tokens for entry in entries]), tuple([entry.seconds for entry in entries])
            costs.append(CostColumns(len(entries), tokens, seconds))
        return costs

    def _get_columns(self) -> Columns | None:
        columns = self._columns
        return columns if columns is not None and len(columns.vectors) == len(self._by_key) else None

    def lacking(self, keys: Iterable[str]) -> list[str]:
        """Return the keys that have no entry here."""
        by_key = self._by_key
        return [key for key in keys if key not in by_key] if by_key else list(keys)

    def matrix(self, keys: Sequence[str], dimensions: int | None) -> Matrix:
        """Return the vectors of the keys, in the order of the keys, as a new matrix of shape (n, d).

        Raises:
            KeyError: a key has no entry here.
            Incomplete: the vectors have different numbers of dimensions.
        """
        by_key, columns = self._by_key, self._get_columns()
        if columns is not None and list(by_key) == keys:
            return matrix(columns.vectors, dimensions)
        if not self._blocks:
            return matrix([by_key[key].vector for key in keys], dimensions)  # type: ignore[union-attr]
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
        item = self._by_key[key]
        return item.entries()[key] if type(item) is Block else item  # type: ignore[return-value]

    def __setitem__(self, key: str, entry: Entry) -> None:
        self._columns = None
        self._by_key[key] = entry

    def __delitem__(self, key: str) -> None:
        self._by_key = dict(self.as_dict())
        self._blocks = []
        self._columns = None
        del self._by_key[key]

    def __contains__(self, key: object) -> bool:
        return key in self._by_key

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_key)

    def __len__(self) -> int:
        return len(self._by_key)

    def __repr__(self) -> str:
        return f"<Entries of {format_count(len(self), 'key')}, {format_count(len(self._blocks), 'block')}>"
