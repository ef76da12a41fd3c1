"""pandas, Polars and DuckDB open the parts of a bundle as they are. ``docs/bundles.md`` shows how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import optional
import pytest
from bundle_entries import make_entries, write_bundle

from embedonce.vectors import Dtype, Entry

pytestmark = optional.needs("pyarrow")

DTYPES: tuple[Dtype, ...] = ("float32", "float16", "int8")


@pytest.fixture(params=DTYPES)
def part(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Entry]]:
    """The file of a part, and its entries."""
    items = make_entries(20, dtype=request.param)
    write_bundle(tmp_path / "b", items)
    [path] = (tmp_path / "b").glob("*.arrow")
    return path, items


def check_rows(rows: list[dict[str, Any]], items: dict[str, Entry]) -> None:
    assert [row["key"] for row in rows] == list(items)
    for row in rows:
        entry = items[row["key"]]
        scale = row.get("scale", 1.0)
        values = np.asarray(row["vector"], np.float32) * np.float32(scale)
        assert values.tobytes() == entry.vector.tobytes()
        assert row["created"] == entry.created
        assert row["expires"] == (float("inf") if entry.expires is None else entry.expires)
        assert row["prefix"] == int(row["key"][21:37], 16)
        for name in ("tokens", "seconds", "metadata"):
            assert (row[name] is None or row[name] != row[name]) == (getattr(entry, name) is None)


@optional.needs("pandas")
def test_pandas_opens_a_part(part: tuple[Path, dict[str, Entry]]) -> None:
    import pandas

    check_rows(pandas.read_feather(part[0]).to_dict("records"), part[1])


@optional.needs("polars")
@pytest.mark.parametrize("is_lazy", [False, True])
def test_polars_opens_a_part(part: tuple[Path, dict[str, Entry]], is_lazy: bool) -> None:
    import polars

    frame = polars.scan_ipc(part[0]).collect() if is_lazy else polars.read_ipc(part[0])
    check_rows(frame.to_dicts(), part[1])


@optional.needs("duckdb")
def test_duckdb_opens_a_part_through_pyarrow(part: tuple[Path, dict[str, Entry]]) -> None:
    import duckdb
    import pyarrow as pa

    table = pa.ipc.open_file(pa.memory_map(str(part[0]))).read_all()
    vector = table.schema.field("vector").type
    if vector.value_type == pa.float16():
        with duckdb.connect() as connection, pytest.raises(duckdb.NotImplementedException):
            connection.from_arrow(table).fetchall()
        index = table.schema.get_field_index("vector")
        single = table["vector"].cast(pa.list_(pa.float32(), vector.list_size))
        table = table.set_column(index, "vector", single)
    with duckdb.connect() as connection:
        found = connection.from_arrow(table).fetchall()
        check_rows([dict(zip(table.column_names, row, strict=True)) for row in found], part[1])
