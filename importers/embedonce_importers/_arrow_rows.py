"""Makes texts and vectors from columns of Arrow, and chooses these columns.

This module imports pyarrow, so an importer imports this module inside its methods.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from numpy.typing import NDArray
from pyarrow import compute as arrow_compute

from embedonce.contracts import FoundVectors
from embedonce.errors import SourceError

from ._llama_index_texts import NODE_COLUMN, is_text_alone_embedded
from ._missing_names import MAX_SHOWN, describe_missing

BATCH_ROWS = 2048
"""Maximum number of rows per part. A part with vectors of 3,072 dimensions takes 25 MB."""

TEXT_NAMES = (
    "text",
    "texts",
    "content",
    "contents",
    "page_content",
    "document",
    "documents",
    "chunk",
    "chunk_text",
    "passage",
    "sentence",
    "body",
)
VECTOR_NAMES = ("vector", "vectors", "embedding", "embeddings", "emb", "dense", "dense_vector", "values")
"""Names of columns that are preferred if several columns have the right type. Upper case counts as lower case."""

NOT_TEXT_NAMES = ("id", "ids", "_id", "uuid", "key", "hash", "url", "uri", "path", "__index_level_0__")
"""Names of columns that are never chosen as the texts unless an option names them."""

compute: Any = arrow_compute
"""The same module without its types, because type checkers cannot see the functions that pyarrow makes at run time."""
Array: TypeAlias = Any
"""An ``Array`` or ``ChunkedArray`` of pyarrow, which has no types."""
DataType: TypeAlias = Any
Matrix: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Columns:
    """The names of the columns that are read."""

    text: str
    vector: str
    node: str | None = None
    """The column in which LlamaIndex keeps a node as JSON, if there is one."""

    @property
    def names(self) -> list[str]:
        return [self.text, self.vector, *([self.node] if self.node else [])]

    def __str__(self) -> str:
        return f"texts from the column {self.text!r}, vectors from the column {self.vector!r}"


def is_text(type_: DataType) -> bool:
    """Tell whether a column of this type has texts."""
    types = pa.types
    if types.is_dictionary(type_):
        type_ = type_.value_type
    return bool(types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_))


def is_vector(type_: DataType) -> bool:
    """Tell whether a column of this type has one flat list of floating-point numbers per row.

    Lists of integers are token numbers or quantised vectors, which are not the numbers that the provider returned.
    """
    types = pa.types
    if isinstance(type_, pa.BaseExtensionType):
        if len(getattr(type_, "shape", ()) or ()) > 1:
            return False
        type_ = type_.storage_type
    is_list = types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_)
    return bool(is_list and types.is_floating(type_.value_type))


def choose_columns(
    text_columns: Sequence[str],
    vector_columns: Sequence[str],
    types: Mapping[str, str],
    *,
    text_column: str | None,
    vector_column: str | None,
    where: str,
) -> Columns:
    """Return the columns to read: those that the options name, or the only ones that can be meant.

    ``types`` has the name of each column's type, for messages.

    Raises:
        SourceError: a named column is missing or of another type, or it is not clear which columns are meant.
    """
    vector = _choose("vector", vector_column, vector_columns, VECTOR_NAMES, types, where)
    others = [name for name in text_columns if name != vector]
    if text_column is None:
        others = [name for name in others if name != NODE_COLUMN and name.lower() not in NOT_TEXT_NAMES]
    text = _choose("text", text_column, others, TEXT_NAMES, types, where)
    return Columns(text, vector, NODE_COLUMN if NODE_COLUMN in text_columns else None)


def _choose(
    kind: str,
    wanted: str | None,
    usable: Sequence[str],
    preferred: Sequence[str],
    types: Mapping[str, str],
    where: str,
) -> str:
    option = f"{kind}_column"
    if wanted is not None:
        if wanted in usable:
            return wanted
        if wanted in types:
            needed = "text" if kind == "text" else "a list of floating-point numbers"
            raise SourceError(
                f"{where}: the column {wanted!r} has the type {types[wanted]}, and not {needed}; choose another column "
                f"with the option {option}. The columns are {_show(types)}"
            )
        names = [name for name in types if show_name(name) == repr(name)]
        raise SourceError(describe_missing(f"{where} has no column", wanted, names, "columns"))
    known = [name for name in usable if name.lower() in preferred]
    found = known if known else usable
    if len(found) == 1:
        return found[0]
    if not found:
        raise SourceError(
            f"{where} has no column that looks like {'the texts' if kind == 'text' else 'vectors'}; name the column "
            f"with the option {option}. The columns are {_show(types)}"
        )
    raise SourceError(
        f"{where}: more than one column may have the {kind}s: {_show_names(found)}; choose one with the option {option}"
    )


def _show(types: Mapping[str, str]) -> str:
    if not types:
        return "none"
    shown = ", ".join(f"{show_name(name)} ({type_[:60]})" for name, type_ in list(types.items())[:MAX_SHOWN])
    return f"{shown} and {len(types) - MAX_SHOWN:,} others" if len(types) > MAX_SHOWN else shown


def _show_names(names: Sequence[str]) -> str:
    return ", ".join(show_name(name) for name in names[:MAX_SHOWN])


def show_name(name: str) -> str:
    """Return the name of a column for a message, or that it is hidden.

    The first line of a CSV file without a header is data, and a text must not be in a message.
    """
    return repr(name) if re.fullmatch(r"[\w.:/-]{1,60}", name) else "(a name that may be a text)"


def read_parts(table: Any, columns: Columns, unreadable: Mapping[str, int] | None = None) -> Iterator[FoundVectors]:
    """Yield the rows of a table or record batch in parts of at most :data:`BATCH_ROWS` rows.

    A column that the table lacks counts as empty. ``unreadable`` is added to the first part. There is at least one
    part if ``unreadable`` has something.
    """
    counts = Counter(unreadable or {})
    for start in range(0, table.num_rows, BATCH_ROWS):
        part = table.slice(start, BATCH_ROWS)
        yield _read_part(part, columns, counts)
        counts = Counter()
    if counts:
        yield FoundVectors([], [], counts)


def _read_part(part: Any, columns: Columns, counts: Counter[str]) -> FoundVectors:
    names = part.schema.names
    missing = [name for name in (columns.text, columns.vector) if name not in names]
    if missing:
        is_text_missing = columns.text in missing
        counts["row without a text" if is_text_missing else "row without a vector"] += part.num_rows
        return FoundVectors([], [], counts)
    texts = _read_texts(part.column(columns.text), counts)
    vectors = _get_storage(part.column(columns.vector))
    is_good = np.fromiter((text is not None for text in texts), np.bool_, len(texts))
    is_good &= _find_good_vectors(vectors, is_good, counts)
    if columns.node is not None and columns.node in names:
        nodes = part.column(columns.node).to_pylist()
        is_alone = np.fromiter(
            (not isinstance(node, str) or is_text_alone_embedded(node) for node in nodes), np.bool_, len(nodes)
        )
        if embedded := int((is_good & ~is_alone).sum()):
            counts["LlamaIndex node that was embedded together with its metadata"] += embedded
        is_good &= is_alone
    if not is_good.all():
        texts = [text for text, is_row_good in zip(texts, is_good, strict=True) if is_row_good]
        vectors = vectors.filter(pa.array(is_good))
    return FoundVectors([text for text in texts if text is not None], _read_vectors(vectors), counts)


def _get_storage(array: Array) -> Array:
    """Return one array without chunks and extension types."""
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
        if isinstance(array, pa.ChunkedArray):  # older versions of pyarrow return one chunk for some types
            array = array.chunk(0) if array.num_chunks else pa.array([], array.type)
    return array.storage if isinstance(array, pa.ExtensionArray) else array


def _read_texts(array: Array, counts: Counter[str]) -> list[str | None]:
    if array.null_count:
        counts["row without a text"] += array.null_count
    try:
        texts: list[str | None] = array.to_pylist()
    except UnicodeDecodeError:
        binary = _get_storage(array)
        if pa.types.is_dictionary(binary.type):
            binary = binary.dictionary_decode()
        texts = [_decode(value, counts) for value in binary.cast(pa.large_binary()).to_pylist()]
    return texts


def _decode(value: bytes | None, counts: Counter[str]) -> str | None:
    if value is None:
        return None
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        counts["text that is not valid UTF-8"] += 1
        return None


def _find_good_vectors(vectors: Array, is_wanted: NDArray[np.bool_], counts: Counter[str]) -> NDArray[np.bool_]:
    """Return which rows have a vector without nulls. A row that is not wanted is not counted a second time."""
    lengths = compute.list_value_length(vectors).fill_null(0).to_numpy(zero_copy_only=False)
    is_empty = lengths == 0
    if empty := int((is_empty & is_wanted).sum()):
        counts["row without a vector"] += empty
    is_good: NDArray[np.bool_] = ~is_empty
    values = vectors.flatten()  # this leaves out the rows that are null
    if values.null_count:
        rows = np.repeat(np.arange(len(lengths)), lengths)
        has_null = np.zeros(len(lengths), np.bool_)
        has_null[rows[values.is_null().to_numpy(zero_copy_only=False)]] = True
        counts["vector with a missing number"] += int((has_null & is_wanted).sum())
        is_good &= ~has_null
    return is_good


def _read_vectors(vectors: Array) -> Matrix | list[Matrix]:
    """Return a float32 matrix of shape (n, d), or n rows if their lengths differ. No row is null or empty."""
    values = vectors.flatten().to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore"):  # embedonce refuses a row with an infinite number
        values = values.astype(np.float32, copy=False)
    lengths = compute.list_value_length(vectors).to_numpy(zero_copy_only=False)
    if len(lengths) == 0:
        return np.empty((0, 0), np.float32)
    if (lengths == lengths[0]).all():
        matrix: Matrix = values.reshape(len(lengths), int(lengths[0]))
        return matrix
    return np.split(values, np.cumsum(lengths)[:-1])
