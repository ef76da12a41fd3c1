"""Reading Parquet: one passage per row of a column of strings or bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .fields import Wanted, check_text, list_names, make_plain
from .passages import Broken, ReadItem
from .streams import Meter

BATCH = 1024
"""Number of rows that are read at a time."""


def read_parquet(path: str, source: str, meter: Meter, wanted: Wanted, size: int) -> Iterator[ReadItem]:
    """Yield one passage per row. ``size`` is the size of the file in bytes."""
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError:
        yield Broken(source, None, "reading Parquet requires pyarrow: pip install 'embedonce[parquet]'")
        return
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _read_batches(file, source, meter, wanted, size)
    except pyarrow.ArrowException as error:
        yield Broken(source, None, f"not readable as Parquet: {type(error).__name__}")


def _read_batches(file: Any, source: str, meter: Meter, wanted: Wanted, size: int) -> Iterator[ReadItem]:
    schema = file.schema_arrow
    steps = _find_column(schema, wanted.field)
    if steps is None:
        hint = f'no column "{wanted.field}"; choose a column with --field'
        yield Broken(source, None, hint, list_names(schema.names))
        return
    kept = [_find_column(schema, name) for name in wanted.keep]
    columns = sorted({found[0] for found in (steps, *kept) if found})
    number, total, before = 0, file.metadata.num_rows, meter.bytes
    for batch in file.iter_batches(batch_size=BATCH, columns=columns):
        texts = _list_values(batch, steps)
        others = [_list_values(batch, found) if found else [None] * len(texts) for found in kept]
        for text, *values in zip(texts, *others, strict=True):
            number += 1
            yield _read_row(text, values, source, number, wanted)
        meter.bytes = before + size * number // max(total, 1)
    meter.bytes = before + size


def _find_column(schema: Any, name: str) -> list[str] | None:
    """Return the column with exactly this name; otherwise follow the dots of the name into structs."""
    import pyarrow

    if schema.names.count(name) == 1:
        return [name]
    first, *others = name.split(".")
    if not others or schema.names.count(first) != 1:
        return None
    type_ = schema.field(first).type
    for part in others:
        if not pyarrow.types.is_struct(type_) or type_.get_field_index(part) < 0:
            return None
        type_ = type_.field(type_.get_field_index(part)).type
    return [first, *others]


def _list_values(batch: Any, steps: list[str]) -> list[Any]:
    """Return the values of a column. Strings are returned as bytes, so that an invalid one breaks only its row."""
    import pyarrow
    import pyarrow.compute  # type: ignore[import-untyped]

    compute: Any = pyarrow.compute
    values = batch.column(batch.schema.get_field_index(steps[0]))
    for name in steps[1:]:
        values = compute.struct_field(values, name)
    if isinstance(values, pyarrow.ExtensionArray):
        values = values.storage
    if pyarrow.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    types = pyarrow.types
    if types.is_large_string(values.type):
        values = values.cast(pyarrow.large_binary())
    elif types.is_string(values.type) or types.is_string_view(values.type):
        values = values.cast(pyarrow.binary())
    elif types.is_temporal(values.type):
        values = values.cast(pyarrow.string())  # Python's dates have no nanoseconds
    result: list[Any] = values.to_pylist()
    return result


def _read_row(text: Any, values: Sequence[Any], source: str, number: int, wanted: Wanted) -> ReadItem:
    name = wanted.field
    kept: list[Any] = []
    try:
        if isinstance(text, bytes):
            text = text.decode()
        for name, value in zip(wanted.keep, values, strict=True):  # noqa: B007  (the handler below uses it)
            kept.append(make_plain(value))
    except UnicodeDecodeError:
        return Broken(source, number, f'column "{name}" is not UTF-8')
    return check_text(text, source, number, wanted.field, tuple(kept))
