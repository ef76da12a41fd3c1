"""Writing results: the rows can be read back, and an unfinished file never has the final name."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from optional import needs

from embedonce.cli.embedding.passages import Passage
from embedonce.cli.embedding.sinks import (
    HEADER,
    Extras,
    SinkError,
    list_written_files,
    make_npy_header,
    open_sink,
    replace_surrogates,
)

KINDS = ("npy", "jsonl", "parquet")
EACH_KIND = pytest.mark.parametrize("kind", ["npy", "jsonl", pytest.param("parquet", marks=needs("pyarrow"))])
PASSAGES = [Passage(f"text {i} “quoted”\n", f"folder/é{i % 3}.txt", i + 1) for i in range(10)]
VECTORS = np.random.default_rng(7).standard_normal((10, 5)).astype(np.float32)
VECTORS[0] = [np.float32(1e-45), np.finfo(np.float32).max, -0.0, 0.1, 1.0]


def write(out: Path, *, with_text: bool = False, rows: int = 10) -> None:
    sink = open_sink(out, with_text=with_text)
    for start in range(0, rows, 4):
        chunk = slice(start, min(start + 4, rows))
        sink.write(PASSAGES[chunk], VECTORS[chunk])
    sink.finish(5)
    sink.abort()


def read(out: Path) -> tuple[list[dict[str, Any]], NDArray[np.float32]]:
    """Return the fields of each row, and the vectors."""
    if out.suffix == ".npy":
        rows = [json.loads(line) for line in out.with_suffix(".index.jsonl").read_text("utf-8").splitlines()]
        assert [row.pop("row") for row in rows] == list(range(len(rows)))
        matrix: NDArray[np.float32] = np.load(out, allow_pickle=False)
        return rows, matrix
    if out.suffix == ".jsonl":
        rows = [json.loads(line) for line in out.read_text("utf-8").split("\n")[:-1]]
    else:
        import pyarrow.parquet as pq

        rows = pq.read_table(out).to_pylist()
    return rows, np.array([row.pop("vector") for row in rows], dtype=np.float32)


@EACH_KIND
@pytest.mark.parametrize("with_text", [False, True])
def test_written_rows_are_read_back(tmp_path: Path, kind: str, with_text: bool) -> None:
    out = tmp_path / f"out.{kind}"
    write(out, with_text=with_text)
    rows, vectors = read(out)
    assert np.array_equal(vectors, VECTORS)
    assert kind == "jsonl" or vectors.tobytes() == VECTORS.tobytes()
    text = [{"text": passage.text} if with_text else {} for passage in PASSAGES]
    assert rows == [{"source": p.source, "line": p.line} | more for p, more in zip(PASSAGES, text, strict=True)]
    assert set(os.listdir(tmp_path)) == {path.name for path in list_written_files(out) if not path.name.startswith(".")}


@needs("pyarrow")
def test_an_output_without_rows_has_the_dimensions(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    for kind in KINDS:
        write(tmp_path / f"out.{kind}", rows=0)
    matrix = np.load(tmp_path / "out.npy")
    assert matrix.shape == (0, 5)
    assert matrix.dtype == np.float32
    assert (tmp_path / "out.index.jsonl").read_text() == (tmp_path / "out.jsonl").read_text() == ""
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.num_rows == 0
    assert table.schema.field("vector").type.list_size == 5


@given(st.integers(0, 10**15), st.integers(0, 10**6))
def test_numpy_reads_the_npy_header(rows: int, dimensions: int) -> None:
    import io

    file = io.BytesIO(make_npy_header((rows, dimensions)))
    assert np.lib.format.read_magic(file) == (1, 0)
    assert np.lib.format.read_array_header_1_0(file) == ((rows, dimensions), False, np.dtype("<f4"))
    assert file.tell() == HEADER
    assert HEADER % 64 == 0  # numpy aligns the data for memory maps


@EACH_KIND
def test_the_earlier_output_stays_until_the_new_one_is_finished(tmp_path: Path, kind: str) -> None:
    out = tmp_path / f"out.{kind}"
    write(out)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    sink = open_sink(out)
    sink.write(PASSAGES[:2], VECTORS[:2])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".part"} == before
    sink.abort()
    sink.abort()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@EACH_KIND
def test_the_files_of_a_killed_run_are_reused(tmp_path: Path, kind: str) -> None:
    out = tmp_path / f"out.{kind}"
    for path in list_written_files(out):
        if path.name.startswith("."):
            path.write_bytes(b"half of something longer" * 10_000)
    write(out, rows=2)
    assert len(read(out)[0]) == 2
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".part"]


@EACH_KIND
def test_two_runs_never_write_one_output(tmp_path: Path, kind: str) -> None:
    out = tmp_path / f"out.{kind}"
    first = open_sink(out)
    with pytest.raises(SinkError, match="another run is writing"):
        open_sink(out)
    first.write(PASSAGES, VECTORS)
    first.finish(5)
    assert len(read(out)[0]) == 10
    write(out)


def test_an_index_that_another_run_writes_is_refused(tmp_path: Path) -> None:
    held = open_sink(tmp_path / "out.index.jsonl")
    with pytest.raises(SinkError, match="another run is writing"):
        open_sink(tmp_path / "out.npy")
    held.abort()
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "out.jsonl"
    link.symlink_to("real/there.jsonl")
    write(link)
    assert link.is_symlink()
    assert len(read(tmp_path / "real/there.jsonl")[0]) == 10


@needs("pyarrow")
def test_vectors_of_two_lengths_are_refused(tmp_path: Path) -> None:
    for kind in KINDS:
        sink = open_sink(tmp_path / f"out.{kind}")
        sink.write(PASSAGES, VECTORS)
        with pytest.raises(SinkError, match="of 5 and of 4 dimensions"):
            sink.write(PASSAGES, VECTORS[:, :4])
        sink.abort()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.txt", "the file name must end in .npy, .jsonl or .parquet"),
        ("out", "the file name must end in"),
        ("missing/out.npy", "the folder .*missing does not exist"),
        ("folder.npy", "is a folder"),
    ],
)
def test_an_invalid_output_path_is_refused_at_once(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(SinkError, match=message):
        open_sink(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.npy"]


@EACH_KIND
@pytest.mark.parametrize("linked", [False, True])
def test_only_a_regular_file_is_replaced(tmp_path: Path, kind: str, linked: bool) -> None:
    special = tmp_path / f"special.{kind}"
    os.mkfifo(special)
    out = special
    if linked:
        out = tmp_path / f"link.{kind}"
        out.symlink_to(special)
    with pytest.raises(SinkError, match="not a regular file"):
        open_sink(out)
    assert special.is_fifo()
    sink = open_sink(tmp_path / f"late.{kind}")
    os.mkfifo(tmp_path / f"late.{kind}")
    sink.write(PASSAGES, VECTORS)
    with pytest.raises(SinkError, match="not a regular file"):
        sink.finish(5)
    sink.abort()
    assert (tmp_path / f"late.{kind}").is_fifo()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_circular_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out.npy").symlink_to("out.npy")
    with pytest.raises(SinkError, match="is a circular link"):
        open_sink(tmp_path / "out.npy")


def test_a_link_with_the_name_of_the_hidden_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".out.jsonl.part").symlink_to("precious")
    with pytest.raises(SinkError, match="cannot write"):
        open_sink(tmp_path / "out.jsonl")
    assert (tmp_path / "precious").read_text() == "precious"


def test_an_invalid_index_path_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "out.index.jsonl").mkdir()
    with pytest.raises(SinkError, match=r"out\.index\.jsonl: is a folder"):
        open_sink(tmp_path / "out.npy")


@pytest.mark.parametrize("fails", ["fsync", "out.index.jsonl", "out.npy"])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["error", "signal"]
)
@pytest.mark.parametrize("earlier", [False, True])
def test_the_earlier_output_stays_if_finish_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, error: BaseException, earlier: bool
) -> None:
    out = tmp_path / "out.npy"
    if earlier:
        write(out, rows=3)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    sink = open_sink(out)
    sink.write(PASSAGES, VECTORS)
    real = os.replace

    def fsync(number: int) -> None:
        raise error

    def replace(old: Any, new: Any) -> None:
        if Path(new).name == fails and Path(old).suffix == ".part":
            raise error
        real(old, new)

    with monkeypatch.context() as patch:
        if fails == "fsync":
            patch.setattr(os, "fsync", fsync)
        else:
            patch.setattr(os, "replace", replace)
        with pytest.raises(SinkError if isinstance(error, OSError) else KeyboardInterrupt) as raised:
            sink.finish(5)
    if isinstance(error, OSError) and fails != "fsync":
        assert fails in str(raised.value)
    sink.abort()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    write(out)
    assert len(read(out)[0]) == 10


@pytest.mark.skipif(sys.platform == "win32", reason="requires fork")
@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_between_two_renames_leaves_no_index_of_another_matrix(tmp_path: Path, renames: int) -> None:
    out, index = tmp_path / "out.npy", tmp_path / "out.index.jsonl"
    write(out, rows=3)
    child = os.fork()
    if child == 0:
        kill_after_renames(renames, open_sink(out))
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    rows = len(np.load(out))
    assert rows == (3 if renames < 2 else len(VECTORS))
    assert not index.exists() or len(index.read_bytes().splitlines()) == rows
    write(out)
    assert len(read(out)[0]) == 10
    assert {path.name for path in tmp_path.iterdir()} == {out.name, index.name}


def kill_after_renames(count: int, sink: Any) -> None:
    """Write another output, and kill this process in place of the rename number ``count``."""
    real, done = os.replace, []

    def replace(old: Any, new: Any) -> None:
        if len(done) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(new)
        real(old, new)

    try:
        os.replace = replace  # type: ignore[assignment]
        sink.write(PASSAGES, VECTORS)
        sink.finish(5)
    finally:
        os._exit(1)


def test_names_that_differ_in_case_have_different_indexes(tmp_path: Path) -> None:
    assert not {*list_written_files(tmp_path / "x.npy")} & {*list_written_files(tmp_path / "x.NPY")}


# --- the fields of a row ----------------------------------------------------------------------

VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.just("\ud800")


@given(st.lists(st.tuples(st.text(max_size=3), st.text(max_size=3), st.integers(1), VALUES), max_size=5), st.booleans())
def test_the_fields_of_rows_are_those_of_the_json_module(rows: list[tuple[str, str, int, Any]], more: bool) -> None:
    extras = Extras(with_text=more, keep=("id",) if more else ())
    passages = [Passage(text, source, line, (kept,) if more else ()) for text, source, line, kept in rows]
    expected = [
        {"source": passage.source, "line": passage.line}
        | ({"text": replace_surrogates(passage.text), "id": passage.kept[0]} if more else {})
        for passage in passages
    ]
    encoded = [f"{{{fields}}}" for fields in extras.encode(passages)]
    assert list(map(json.loads, encoded)) == expected
    for text in encoded:
        text.encode()
