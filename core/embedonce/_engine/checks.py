"""Validation of the vectors that come from a provider and of the entries that come from a backend."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from embedonce._messages import format_count
from embedonce.contracts import Embedded
from embedonce.errors import ProviderError
from embedonce.vectors import (
    MAX_SECONDS,
    MAX_TOKENS,
    Block,
    Columns,
    Cost,
    Decoded,
    Dtype,
    Entries,
    Entry,
    Matrix,
    freeze,
    is_valid_cost,
    is_valid_metadata,
    round_vectors,
)

_FINENESS: Mapping[Dtype, int] = {"int8": 0, "float16": 1, "float32": 2}


def check_rows(
    answer: Any, texts: int, *, dimensions: int | None, dtype: Dtype, who: str
) -> tuple[Matrix, dict[int, ProviderError]]:
    """Return the valid vectors of an answer, rounded to ``dtype``, and the errors of the other rows by position.

    The matrix is float32, of shape (valid rows, d). A row is invalid alone if it is None, if its dimensions are not
    the expected ones or those of most rows, if a value is not a number or not finite, if all values are zero, or if the
    row cannot be rounded.

    Raises:
        ProviderError: there is not exactly one vector per text, or no vector is valid.
    """
    if not isinstance(answer, np.ndarray):
        # An iterator is read once, because its rows may be read again.
        vectors = answer.vectors if isinstance(answer, Embedded) else answer
        answer = list(vectors) if hasattr(vectors, "__next__") else vectors
    try:
        return round_matrix(check_matrix(answer, texts, dimensions=dimensions, who=who), dtype, who), {}
    except ProviderError as error:
        whole = error
    if not hasattr(answer, "__len__") or len(answer) != texts or texts < 2:
        raise whole
    rows = [_read_row(row) for row in answer]
    sizes = Counter(row.size for row in rows if isinstance(row, np.ndarray))
    size, votes = max(sizes.items(), key=lambda item: item[1], default=(0, 0))
    expected = dimensions or (size if 2 * votes > sum(sizes.values()) else None)
    good: list[Matrix] = []
    bad: dict[int, ProviderError] = {}
    for i, row in enumerate(rows):
        try:
            good.append(_check_row(row, expected, dtype, who))
        except ProviderError as error:
            bad[i] = error
    if not good or expected is None:
        raise whole
    return np.concatenate(good), bad


def _read_row(row: Any) -> Any:
    """Return a row of numbers as an array of shape (d,); return anything else as it is."""
    try:
        array = np.asarray(row)
    except (ValueError, TypeError, RuntimeError):
        return row
    return array if array.dtype.kind in "fiu" and array.ndim == 1 and array.size else row


def _check_row(row: Any, dimensions: int | None, dtype: Dtype, who: str) -> Matrix:
    if row is None:
        raise ProviderError(f"{who} no vector for this text")
    if not isinstance(row, np.ndarray) or row.ndim != 1 or row.dtype.kind not in "fiu":
        raise ProviderError(f"{who} values that are not numbers for this text")
    if dimensions is not None and row.size != dimensions:
        raise ProviderError(
            f"{who} a vector of {format_count(row.size, 'dimension')} for this text; expected {dimensions:,}"
        )
    with np.errstate(over="ignore"):
        matrix = row[None, :].astype(np.float32)
    if not np.isfinite(matrix).all():
        raise ProviderError(f"{who} NaN or infinity for this text")
    if not matrix.any():
        raise ProviderError(f"{who} a vector of zeros for this text")
    return round_matrix(matrix, dtype, who)


def check_matrix(answer: Any, texts: int, *, dimensions: int | None, who: str) -> Matrix:
    """Return the vectors of an answer as a float32 matrix of shape (texts, d), or refuse all of them.

    ``who`` is the beginning of an error message, such as "provider 'x' returned" or "put was given".

    Raises:
        ProviderError: there is not exactly one vector per text, or a vector is invalid. A vector is invalid if its
            dimensions are not the expected ones, if it has no values or only zeros, or if a value is not a number, is
            not finite, or is beyond float32's range.
    """
    vectors = answer.vectors if isinstance(answer, Embedded) else answer
    if not isinstance(vectors, np.ndarray) and hasattr(vectors, "__next__"):
        vectors = list(vectors)
    try:
        count = len(vectors)
    except TypeError:
        raise ProviderError(f"{who} {type(vectors).__name__}; expected one vector per text") from None
    if count != texts:
        raise ProviderError(f"{who} {format_count(count, 'vector')} for {format_count(texts, 'text')}; none was stored")
    try:
        raw = np.asarray(vectors)
        if raw.dtype.kind not in "fiu":
            raise ValueError
        with np.errstate(over="ignore"):
            matrix = np.ascontiguousarray(raw, dtype=np.float32)
    except (ValueError, TypeError, RuntimeError):
        raise ProviderError(
            f"{who} vectors that differ in their dimensions, or values that are not numbers; none was stored"
        ) from None
    if matrix.ndim != 2 or matrix.shape[1] == 0:
        raise ProviderError(f"{who} an array of shape {matrix.shape}; expected ({texts}, d); none was stored")
    if dimensions is not None and matrix.shape[1] != dimensions:
        raise ProviderError(
            f"{who} vectors of {format_count(matrix.shape[1], 'dimension')}; expected {dimensions:,} "
            "according to the provider's vector space or to earlier vectors of that space; none was stored. "
            "If the model has changed, the vectors of the new model need a new vector space: set the model's "
            "revision, or change [key] version"
        )
    if not _are_plainly_valid(matrix):
        if not np.isfinite(matrix).all():
            raise ProviderError(f"{who} NaN or infinity; none of the vectors was stored")
        if not matrix.any(axis=1).all():
            raise ProviderError(f"{who} a vector of zeros; none was stored")
    return matrix


def _are_plainly_valid(matrix: Matrix) -> bool:
    """Return whether the squared length of each row is finite and above 0, so that its values are finite and not all 0.

    This takes a third of the time of the exact checks. The exact checks decide about very large and very small values,
    whose squares are infinite or 0.
    """
    with np.errstate(all="ignore"):
        squares = np.einsum("ij,ij->i", matrix, matrix)
    return bool(((squares > 0) & (squares < np.inf)).all())


def round_matrix(matrix: Matrix, dtype: Dtype, who: str) -> Matrix:
    """Round a checked matrix to the cache's dtype.

    Raises:
        ProviderError: a vector cannot be rounded to ``dtype``.
    """
    if dtype == "float32":
        return matrix
    try:
        return round_vectors(matrix, dtype)
    except ValueError as error:
        raise ProviderError(f"{who} a vector that cannot be rounded to {dtype}: {error}") from error


def check_entries(
    values: Mapping[str, Any], *, now: float, dtype: Dtype, dimensions: int | None, trusted: bool = False
) -> Decoded:
    """Check the answer of an entry backend, as ``decode_frames`` does for frames.

    ``trusted`` means that the backend is in this process and returns the same objects that this cache stored.
    """
    decoded = Decoded()
    if isinstance(values, Entries):
        values = _take_valid_blocks(values, now, dtype, dimensions, decoded.entries)
    if trusted and set(map(type, values.values())) <= {Entry}:
        columns = Columns.of(values.values())
        if are_as_stored(columns, now, dtype, dimensions):
            return Decoded(Entries(values, columns=columns))
    finite = _are_all_finite(values.values())
    for key, entry in values.items():
        if not _is_valid_entry(entry, dimensions) or not (finite or np.isfinite(entry.vector).all()):
            decoded.corrupt.append(key)
        elif entry.expires is not None and entry.expires <= now:
            decoded.missed.append(key)
        elif entry.dtype == dtype:
            decoded.entries[key] = entry
        elif _FINENESS[entry.dtype] < _FINENESS[dtype]:
            decoded.missed.append(key)
        else:
            _add_rounded(key, entry, dtype, decoded)
    return decoded


def _take_valid_blocks(
    values: Entries, now: float, dtype: Dtype, dimensions: int | None, entries: Entries
) -> dict[str, Entry]:
    """Add to ``entries`` the blocks whose rows are all valid. Return all other entries, to be checked one by one."""
    rest = values.loose()
    for block in values.blocks:
        if block.dtype == dtype and _is_valid_block(block, now, dimensions):
            entries.add_block(block)
        else:
            rest |= block.entries()
    return rest


def _is_valid_block(block: Block, now: float, dimensions: int | None) -> bool:
    rows = block.values
    return (
        rows.dtype == np.float32
        and rows.ndim == 2
        and (dimensions is None or rows.shape[1] == dimensions)
        and bool(np.isfinite(rows).all() and np.isfinite(block.created).all() and (block.expires > now).all())
        and (block.metadata is None or all(map(is_valid_metadata, block.metadata)))
        and _has_valid_costs(block)
    )


def _has_valid_costs(block: Block) -> bool:
    tokens, seconds = block.tokens, block.seconds
    if tokens is not None and (tokens.dtype != np.int64 or ((tokens < -1) | (tokens > MAX_TOKENS)).any()):
        return False
    return seconds is None or (seconds.dtype == np.float64 and not ((seconds < 0) | (seconds > MAX_SECONDS)).any())


def are_as_stored(
    columns: Columns, now: float, dtype: Dtype, dimensions: int | None, longest_life: float = math.inf
) -> bool:
    """Return whether all entries have the dimensions and the dtype that this cache stores, and none has expired.

    An entry whose expiry date is more than ``longest_life`` seconds from now has expired, too. If the result is True,
    the entries need no other check.
    """
    if not (set(columns.dtypes) <= {dtype} and set(map(len, columns.vectors)) <= {dimensions}):
        return False
    dates = set(columns.expires)
    dates.discard(None)
    return not dates or (now < min(dates) and max(dates) - now <= longest_life)  # type: ignore[type-var,operator]


def is_usable_entry(entry: Entry, now: float, dtype: Dtype, dimensions: int) -> bool:
    """Return whether one entry of a backend can be used as it is: it is valid, has the dtype, and has not expired."""
    return (
        _is_valid_entry(entry, dimensions)
        and entry.dtype == dtype
        and (entry.expires is None or entry.expires > now)
        # Searching bytes takes a third of the time of all(), which is a function in Python.
        and 0 not in np.isfinite(entry.vector).tobytes()
    )


def _is_valid_entry(entry: Any, dimensions: int | None) -> bool:
    if type(entry) is not Entry or entry.dtype not in _FINENESS:
        return False
    vector = entry.vector
    return (
        type(vector) is np.ndarray
        and vector.dtype == np.float32
        and vector.ndim == 1
        and (dimensions is None or vector.size == dimensions)
        and not vector.flags.writeable
        and _is_date(entry.created)
        and (entry.expires is None or _is_date(entry.expires))
        and is_valid_metadata(entry.metadata)
        and is_valid_cost(entry.tokens, entry.seconds)
    )


def _is_date(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _are_all_finite(entries: Iterable[Any]) -> bool:
    """Return whether all vectors are finite. One check of all vectors is ten times as fast as a check of each."""
    try:
        joined = b"".join([entry.vector for entry in entries])
    except (AttributeError, TypeError, ValueError, BufferError):
        return False
    return len(joined) % 4 == 0 and bool(np.isfinite(np.frombuffer(joined, np.float32)).all())


def _add_rounded(key: str, entry: Entry, dtype: Dtype, decoded: Decoded) -> None:
    try:
        vector = freeze(round_vectors(entry.vector[None, :], dtype)[0])
    except ValueError:
        decoded.missed.append(key)
    else:
        decoded.entries[key] = entry._replace(vector=vector, dtype=dtype)


def check_costs(costs: Sequence[Cost | None] | None, count: int) -> list[Cost]:
    """Return one cost per text. An unknown cost has two parts that are None.

    Raises:
        ValueError: there is not one item per text, or an item is neither a cost nor None.
    """
    if costs is None:
        return [Cost()] * count
    if len(costs) != count:
        raise ValueError(f"costs must have one item per text: got {len(costs)} for {format_count(count, 'text')}")
    for i, cost in enumerate(costs):
        if cost is not None and not (isinstance(cost, tuple) and len(cost) == 2 and is_valid_cost(*cost)):
            raise ValueError(
                f"costs: item {i} must be None or a Cost(tokens, seconds). Tokens are None or an int from 0 to "
                f"{MAX_TOKENS:,}, seconds are None or a number from 0 to {MAX_SECONDS:,.0f}"
            )
    return [Cost() if cost is None else Cost(*cost) for cost in costs]
