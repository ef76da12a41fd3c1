"""The files of a bundle: other programs open them, their format does not drift, and a killed export leaves no half."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optional
import pytest
from bundle_entries import CARD, CARD_KEY, SCOPE, are_same, make_entries, write_bundle

from embedonce import ConfigError
from embedonce.testing.contracts.support import run_in_fork
from embedonce.vectors import Dtype, Entry

pytestmark = optional.needs("pyarrow")

DTYPES: tuple[Dtype, ...] = ("float32", "float16", "int8")


def open_bundle(folder: Path) -> Any:
    from embedonce_backends.bundle import BundleBackend

    return BundleBackend(path=folder)


def find_part(folder: Path) -> Path:
    [part] = folder.glob("*.arrow")
    return part


def read_rows(vectors: Any, scales: Any) -> list[list[float]]:
    """Return stored vectors as the documentation says: the steps of int8 are multiplied by their scale."""
    rows = np.asarray([np.asarray(row, np.float32) for row in vectors])
    return (rows if scales is None else rows * np.asarray(scales, np.float32)[:, None]).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_polars_pandas_and_pyarrow_open_a_part_as_it_is(tmp_path: Path, dtype: Dtype) -> None:
    import pandas as pd
    import polars as pl
    import pyarrow.feather

    items = make_entries(30, dtype=dtype)
    write_bundle(tmp_path / "b", items)
    part = find_part(tmp_path / "b")
    expected = [entry.vector.tolist() for entry in items.values()]
    tokens = sum(entry.tokens or 0 for entry in items.values())

    polars = pl.read_ipc(part)
    assert polars["key"].to_list() == list(items)
    assert polars["tokens"].sum() == tokens
    assert polars["tokens"].null_count() == sum(entry.tokens is None for entry in items.values())
    assert read_rows(polars["vector"].to_list(), polars["scale"].to_list() if dtype == "int8" else None) == expected
    assert (
        pl.scan_ipc(part).filter(pl.col("key") == list(items)[7]).select("created").collect().item()
        == list(items.values())[7].created
    )

    pandas = pd.read_feather(part)
    assert pandas["key"].tolist() == list(items)
    assert read_rows(pandas["vector"], pandas["scale"] if dtype == "int8" else None) == expected

    arrow = pyarrow.feather.read_table(part, memory_map=True)
    assert read_rows(arrow["vector"].to_pylist(), arrow["scale"].to_pylist() if dtype == "int8" else None) == expected
    assert arrow["prefix"].to_pylist() == [int(key[21:37], 16) for key in items]


@pytest.mark.parametrize("dtype", DTYPES)
def test_duckdb_reads_a_part_through_pyarrow(tmp_path: Path, dtype: Dtype) -> None:
    import duckdb
    import pyarrow.feather

    items = make_entries(30, dtype=dtype)
    write_bundle(tmp_path / "b", items)
    arrow = pyarrow.feather.read_table(find_part(tmp_path / "b"), memory_map=True)
    if dtype == "float16":  # DuckDB has no half floats
        arrow = arrow.drop_columns(["vector"])
    found = duckdb.from_arrow(arrow).aggregate("count(*), sum(tokens), min(key), max(created)").fetchall()
    entries = items.values()
    assert found == [
        (30, sum(entry.tokens or 0 for entry in entries), min(items), max(entry.created for entry in entries))
    ]


GOLDEN = Path(__file__).parent / "golden_bundle"
"""A bundle that version 1 of the format has written. It stays readable, bit for bit."""


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_format_does_not_drift(tmp_path: Path, dtype: Dtype) -> None:
    import pyarrow as pa

    items: Mapping[str, Entry | bytes] = {**make_entries(5, dtype=dtype), CARD_KEY: CARD}
    backend = open_bundle(GOLDEN / dtype)
    assert are_same(backend.get_many(list(items)), items)
    backend.verify()
    write_bundle(tmp_path / "b", items)
    files = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in (GOLDEN / dtype, tmp_path / "b")]
    assert json.loads(files[0].pop("manifest.json")).keys() == json.loads(files[1].pop("manifest.json")).keys()
    rows = [pa.ipc.open_file(*names.values()).read_all() for names in files]
    assert rows[0].equals(rows[1])


def test_equal_entries_make_equal_files(tmp_path: Path) -> None:
    """A bundle in git changes only if its entries change."""
    items: Mapping[str, Entry | bytes] = {**make_entries(40), CARD_KEY: CARD}
    for name in "ab":
        write_bundle(tmp_path / name, items)
    files = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in "ab"]
    assert files[0] == files[1]


def open_if_there(folder: Path) -> Any:
    """Return the backend of a bundle, or None if the folder has no bundle."""
    try:
        return open_bundle(folder)
    except ConfigError:
        return None


def kill_at_step(folder: Path, items: Mapping[str, Entry], step: int) -> bool:
    """Replace a bundle in a forked child that dies before its file operation number ``step``. Return if it died."""
    child = os.fork()
    if not child:
        count = 0

        def die(event: str, _: object) -> None:
            nonlocal count
            if event in ("open", "os.rename", "os.remove", "os.truncate", "os.mkdir", "os.rmdir", "mmap.__new__"):
                count += 1
                if count > step:
                    os._exit(9)

        sys.addaudithook(die)
        try:
            write_bundle(folder, items, replace=True)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("has_old", [True, False])
def test_an_export_that_is_killed_at_any_step_leaves_the_old_bundle_or_none(tmp_path: Path, has_old: bool) -> None:
    old, new = make_entries(20, seed=1), make_entries(60, seed=2)
    folder = tmp_path / "b"
    write_bundle(tmp_path / "first", new)  # what is imported now is not imported in a child
    outcomes = set()
    for step in range(60):
        if has_old:
            write_bundle(folder, old, replace=True)
        died = kill_at_step(folder, new, step)
        backend = open_if_there(folder)
        if backend is None:
            assert not has_old
            outcomes.add("none")
        else:
            found = backend.get_many(list(new))
            is_new = are_same(found, new)
            assert is_new or (has_old and are_same(found, old))
            backend.verify()
            backend.close()
            outcomes.add("new" if is_new else "old")
        write_bundle(folder, new, replace=True)
        left = {file.name for file in folder.iterdir() if file.suffix == ".arrow" or "json" in file.name}
        assert len(left) == 2, "the next export removes what the killed one has left"
        if not died:
            break
        if not has_old:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    assert not died, "the last export was not killed"
    assert outcomes == ({"old", "new"} if has_old else {"none", "new"})


def test_a_process_that_was_forked_reads_the_same_bundle(tmp_path: Path) -> None:
    items = make_entries(30)
    write_bundle(tmp_path / "b", items)
    backend = open_bundle(tmp_path / "b")

    def read() -> None:
        assert are_same(backend.get_many(list(items)), items)

    run_in_fork(read, "reading an open bundle")
    assert backend.count(f"eo1.{SCOPE}.") == 30
