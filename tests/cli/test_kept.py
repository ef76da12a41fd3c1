"""Metadata that is kept beside each row: ``--keep``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optional import needs

from embedonce.cli.embedding.passages import Passage
from embedonce.cli.embedding.sinks import open_sink

CONFIG = 'tiers = []\n\n[provider]\ntype = "ngram"\ndimensions = 64\n'


def write(out: Path, windows: Sequence[Sequence[Any]]) -> None:
    """Write rows whose one kept value is given, window by window."""
    sink = open_sink(out, keep=["value"])
    for values in windows:
        passages = [Passage("text", "a.jsonl", line, (value,)) for line, value in enumerate(values, 1)]
        sink.write(passages, np.ones((len(values), 3), np.float32))
    sink.finish(3)


def read_parquet(out: Path) -> Any:
    pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    return parquet.read_table(out)


SURROGATES = st.characters(codec="utf-8") | st.sampled_from("\ud800\udfff")
SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    SCALARS | st.text(SURROGATES, max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=4,
)
WINDOWS = st.lists(st.lists(VALUES, min_size=1, max_size=3), min_size=1, max_size=4)


@given(windows=WINDOWS)
def test_json_lines_keep_every_value(windows: list[list[Any]]) -> None:
    with TemporaryDirectory() as folder:
        out = Path(folder, "out.jsonl")
        write(out, windows)
        rows = [json.loads(line) for line in out.read_bytes().splitlines()]
        assert [row["value"] for row in rows] == [value for values in windows for value in values]
        write(Path(folder, "out.npy"), windows)
        index = [json.loads(line) for line in Path(folder, "out.index.jsonl").read_bytes().splitlines()]
        assert [row["value"] for row in index] == [value for values in windows for value in values]


@needs("pyarrow")
@given(windows=WINDOWS)
def test_parquet_takes_values_of_every_kind(windows: list[list[Any]]) -> None:
    with TemporaryDirectory() as folder:
        out = Path(folder, "out.parquet")
        write(out, windows)
        table = read_parquet(out)
        values = [value for window in windows for value in window]
        assert table.column_names == ["source", "line", "value", "vector"]
        assert [value is None for value in table["value"].to_pylist()] == [value is None for value in values]
        assert table["vector"].to_pylist() == [[1.0, 1.0, 1.0]] * len(values)


@needs("pyarrow")
@pytest.mark.parametrize(
    ("windows", "kind", "expected"),
    [
        ([[1, None], [2]], "int64", [1, None, 2]),
        ([[None], [None, "a"]], "string", [None, None, "a"]),
        ([[1], [2.5]], "double", [1.0, 2.5]),
        ([[2**53 + 1], [2.5]], "string", ["9007199254740993", "2.5"]),
        ([[2.5], [2**53 + 1]], "string", ["2.5", "9007199254740993"]),
        ([[2**63]], "string", ["9223372036854775808"]),
        ([[1], ["a"], [True]], "string", ["1", "a", "true"]),
        ([[True, False]], "bool", [True, False]),
        ([[["a", "b"]], [[]]], "list<element: string>", [["a", "b"], []]),
        ([[[]], [[1]]], "list<element: int64>", [[], [1]]),
        ([[{}], [{"a": 1}]], "string", ["{}", '{"a": 1}']),
        ([["tea \ud800"]], "string", ["tea \ufffd"]),
        ([[None], [None]], "null", [None, None]),
    ],
)
def test_a_parquet_column_has_the_type_of_its_values(
    tmp_path: Path, windows: list[list[Any]], kind: str, expected: list[Any]
) -> None:
    write(tmp_path / "out.parquet", windows)
    column = read_parquet(tmp_path / "out.parquet")["value"]
    assert (str(column.type), column.to_pylist()) == (kind, expected)


@pytest.mark.parametrize("suffix", ["jsonl", "npy", pytest.param("parquet", marks=needs("pyarrow"))])
def test_kept_fields_are_columns_of_the_output(command: Any, folder: Path, suffix: str) -> None:
    (folder / "embedonce.toml").write_text(CONFIG)
    (folder / "a.jsonl").write_text(
        '{"text": "one", "id": 7, "meta": {"tags": ["x"]}}\n{"text": "two", "meta": {"tags": []}}\n'
    )
    out = folder / f"out.{suffix}"
    done = command("embed", "a.jsonl", "--out", out, "--keep", "id", "--keep", "meta.tags", "--with-text")
    assert done.code == 0
    if suffix == "parquet":
        rows = read_parquet(out).to_pylist()
    else:
        lines = (out.with_suffix(".index.jsonl") if suffix == "npy" else out).read_text().splitlines()
        rows = list(map(json.loads, lines))
    found = [(row["line"], row["text"], row["id"], row["meta.tags"]) for row in rows]
    assert found == [(1, "one", 7, ["x"]), (2, "two", None, [])]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--out", "out.npy", "--keep", "row"], "row"),
        (["--out", "out.jsonl", "--keep", "id", "--keep", "source"], "source"),
        (["--out", "out.jsonl", "--keep", "vector"], "vector"),
        (["--out", "out.jsonl", "--keep", "text", "--with-text"], "text"),
    ],
)
def test_a_kept_field_must_not_replace_a_field_of_the_row(
    command: Any, folder: Path, arguments: list[str], name: str
) -> None:
    (folder / "embedonce.toml").write_text(CONFIG)
    (folder / "a.jsonl").write_text('{"text": "one"}\n')
    done = command("embed", "a.jsonl", *arguments)
    assert done.code == 2
    assert f'--keep {name}: each row already has a field "{name}" of its own' in done.err
    assert sorted(path.name for path in folder.iterdir()) == ["a.jsonl", "embedonce.toml"]
