"""The importer ``table`` reads every format, counts what it cannot read, and changes nothing."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optional
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedonce.errors import SourceError
from embedonce.testing import ImporterContract, Recipe
from embedonce_importers.table import TableImporter

from .stores.table import WRITERS, make_table, write, write_csv, write_json_lines, write_numpy, write_parquet

pytestmark = optional.needs("pyarrow")

TEXTS = ["first", "", "Grüße 🎉", 'a, "b"', " first ", "First", "1", "[1, 2]"]
VECTORS = np.random.default_rng(0).standard_normal((len(TEXTS), 8)).astype(np.float32)


def read(path: Path, **options: Any) -> tuple[list[str], list[list[float]], dict[str, int]]:
    importer = TableImporter(path=path, **options)
    importer.check()
    parts = list(importer.scan())
    texts = [text for part in parts for text in part.texts]
    rows = [np.asarray(row, np.float32).tolist() for part in parts for row in part.vectors]
    assert len(texts) == len(rows)
    return texts, rows, dict(sum((Counter(part.unreadable) for part in parts), Counter[str]()))


def refuse(path: Path, **options: Any) -> str:
    importer = TableImporter(path=path, **options)
    with pytest.raises(SourceError) as caught:
        importer.check()
    with pytest.raises(SourceError):
        list(importer.scan())
    return str(caught.value)


class TestContract(ImporterContract):
    examples = 10

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        self.stores: dict[int, Path] = {}

    def make(self, texts: Sequence[str], vectors: Any) -> TableImporter:
        path = Path(str(write(self.folder / str(len(self.stores)), texts, vectors)["path"]))
        importer = TableImporter(path=path)
        self.stores[id(importer)] = path
        return importer

    def recipe(self, importer: Any) -> Recipe:
        return Recipe(TableImporter, {"path": str(self.stores[id(importer)])})

    def missing(self) -> tuple[TableImporter, str]:
        path = self.folder / "missing.parquet"
        return TableImporter(path=path), str(path)

    def damage(self, importer: Any, text: str) -> None:
        path = self.stores[id(importer)]
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(path).to_pylist()
        for row in rows:
            if row["text"] == text:
                row["vector"] = [1.0, None]
        schema = make_table(["a"], np.ones((1, 8), np.float32)).schema
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path)

    def snapshot(self, importer: Any) -> object:
        return self.stores[id(importer)].read_bytes()


@pytest.mark.parametrize("name", WRITERS)
def test_each_format_is_read(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path / name, TEXTS, VECTORS)
    assert read(path) == (TEXTS, VECTORS.tolist(), {})


@pytest.mark.parametrize("name", WRITERS)
def test_many_rows_are_read_in_parts(tmp_path: Path, name: str) -> None:
    texts = [f"text {number}" for number in range(5000)]
    vectors = np.random.default_rng(1).standard_normal((5000, 4)).astype(np.float32)
    path = WRITERS[name](tmp_path / name, texts, vectors)
    assert read(path) == (texts, vectors.tolist(), {})
    parts = list(TableImporter(path=path).scan())
    assert max(len(part.texts) for part in parts) <= 2048
    assert TableImporter(path=path).count() in (5000, None)


@pytest.mark.parametrize("name", [name for name in WRITERS if "." in name])
def test_an_unknown_suffix_does_not_matter_if_the_content_tells_the_format(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path / name, TEXTS, VECTORS)
    renamed = path.rename(tmp_path / "a.bin")
    if name == "a.csv":
        assert "unknown format" in refuse(renamed)
    else:
        assert read(renamed)[0] == TEXTS


def test_a_folder_of_files_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    write_parquet(tmp_path / "b.parquet", TEXTS[:2], VECTORS[:2])
    write_parquet(tmp_path / "inner/a.parquet", TEXTS[4:], VECTORS[4:])
    write_parquet(tmp_path / "a.parquet", TEXTS[2:4], VECTORS[2:4])
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / ".hidden.parquet").write_text("no")
    (tmp_path / "README.md").write_text("no")
    order = [2, 3, 0, 1, *range(4, len(TEXTS))]
    assert read(tmp_path) == ([TEXTS[i] for i in order], VECTORS[order].tolist(), {})
    assert TableImporter(path=tmp_path).count() == len(TEXTS)


def test_all_splits_of_a_dataset_are_read(tmp_path: Path) -> None:
    for name, rows in (("train", slice(0, 5)), ("test", slice(5, None))):
        WRITERS["dataset"](tmp_path / name, TEXTS[rows], VECTORS[rows])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert read(tmp_path)[:2] == (TEXTS, VECTORS.tolist())


@pytest.mark.parametrize("listed", ['["../train"]', '["/etc"]', '"train"', "[1]", "[]", "[]]", "null"])
def test_a_dataset_cannot_lead_out_of_its_folder(tmp_path: Path, listed: str) -> None:
    (tmp_path / "dataset_dict.json").write_text(f'{{"splits": {listed}}}')
    assert "dataset_dict.json" in refuse(tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("kind", ["list", "large_list", "fixed_size_list"])
def test_each_type_of_list_and_number_is_read(tmp_path: Path, dtype: str, kind: str) -> None:
    import pyarrow
    import pyarrow.parquet

    numbers = pyarrow.from_numpy_dtype(np.dtype(dtype))
    list_ = {
        "list": pyarrow.list_(numbers),
        "large_list": pyarrow.large_list(numbers),
        "fixed_size_list": pyarrow.list_(numbers, 8),
    }[kind]
    vectors = VECTORS.astype(dtype)
    column = pyarrow.array([vectors[0], None, *vectors[1:]], list_)
    texts = pyarrow.array([TEXTS[0], "null", *TEXTS[1:]], pyarrow.large_string())
    table = pyarrow.table({"text": texts.dictionary_encode(), "vector": column})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table.slice(1), max_chunksize=3)
    expected = vectors.astype(np.float32).tolist()
    assert read(tmp_path / "a.parquet") == (TEXTS, expected, {"row without a vector": 1})
    assert read(tmp_path / "a.arrow") == (TEXTS[1:], expected[1:], {"row without a vector": 1})


def test_rows_of_different_lengths_and_missing_values_are_kept_apart(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows: list[tuple[str | None, list[float | None] | None]] = [
        ("a", [1.0]),
        (None, [2.0]),
        ("b", [3.0, 4.0]),
        ("null", None),
        ("hole", [5.0, None]),
        ("empty", []),
        (None, None),
        ("c", [6.0]),
    ]
    table = pyarrow.table(
        {
            "text": [row[0] for row in rows],
            "vector": pyarrow.array([row[1] for row in rows], pyarrow.list_(pyarrow.float32())),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    counts = {"row without a text": 2, "row without a vector": 2, "vector with a missing number": 1}
    assert read(tmp_path / "a.parquet") == (["a", "b", "c"], [[1.0], [3.0, 4.0], [6.0]], counts)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.none() | st.text(max_size=3),
            st.none() | st.lists(st.none() | st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=3),
        ),
        max_size=12,
    ),
    st.integers(0, 3),
)
def test_no_row_gets_the_vector_of_another_row(
    tmp_path: Path, rows: list[tuple[str | None, list[float | None] | None]], start: int
) -> None:
    import pyarrow

    from embedonce_importers._arrow_rows import Columns, read_parts

    table = pyarrow.table(
        {
            "text": pyarrow.array([row[0] for row in rows], pyarrow.string()),
            "vector": pyarrow.array([row[1] for row in rows], pyarrow.list_(pyarrow.float32())),
        }
    ).slice(start)
    found = [
        (text, np.asarray(row).tolist())
        for part in read_parts(table, Columns("text", "vector"))
        for text, row in zip(part.texts, part.vectors, strict=True)
    ]
    assert found == [(text, row) for text, row in rows[start:] if text is not None and row and None not in row]


@pytest.mark.parametrize(
    "line",
    [
        "not JSON",
        '{"text": 1, "embedding": [1]}',
        '{"text": "a", "embedding": ["1"]}',
        '{"text": "a", "embedding": [true]}',
        '{"text": "a", "embedding": [[1]]}',
        '{"text": "a", "embedding": {"0": 1}}',
        '{"text": "a", "embedding": "[1]"}',
        '{"text": "\\ud800", "embedding": [1]}',
        '{"text": "a", "text": "b", "embedding": [1]}',
        '["a", [1]]',
        '{"text": "a", "embedding": [1]',
        '{"x": ' + "[" * 100_000,
    ],
)
def test_an_invalid_line_is_counted_and_the_others_are_read(tmp_path: Path, line: str) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", TEXTS, VECTORS)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], line, *lines[3:]]))
    reason = "line that is not a JSON object with a text and a flat list of numbers"
    assert read(path) == (TEXTS, VECTORS.tolist(), {reason: 1})


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"embedding": [1]}', "row without a text"),
        ('{"text": null, "embedding": [1]}', "row without a text"),
        ('{"text": "a"}', "row without a vector"),
        ('{"text": "a", "embedding": []}', "row without a vector"),
        ('{"text": "a", "embedding": [1, null]}', "vector with a missing number"),
    ],
)
def test_a_line_without_a_text_or_vector_is_counted(tmp_path: Path, line: str, reason: str) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", TEXTS, VECTORS)
    path.write_text(f"{path.read_text()}\n\r\n{line}\n")
    assert read(path) == (TEXTS, VECTORS.tolist(), {reason: 1})


def test_the_first_lines_may_lack_a_text_or_a_vector(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", TEXTS, VECTORS)
    path.write_text('\ufeff{"text": "a", "embedding": null}\n{"embedding": [1]}\n' + path.read_text())
    counts = {"row without a text": 1, "row without a vector": 1}
    assert read(path) == (TEXTS, VECTORS.tolist(), counts)


def test_text_that_is_not_utf_8_is_counted(tmp_path: Path) -> None:
    lines = write_json_lines(tmp_path / "a.jsonl", TEXTS, VECTORS)
    lines.write_bytes(lines.read_bytes() + b'{"text": "\xff", "embedding": [1.0]}\n')
    cells = write_csv(tmp_path / "a.csv", TEXTS, VECTORS)
    cells.write_bytes(cells.read_bytes() + b'9,\xff,"[1.0]"\r\n')
    matrix = write_numpy(tmp_path / "a.npy", [*TEXTS, "last"], np.concatenate([VECTORS, VECTORS[:1]]))
    (tmp_path / "a.txt").write_bytes((tmp_path / "a.txt").read_bytes().replace(b"last", b"\xff"))
    for path in (lines, cells, matrix):
        assert read(path) == (TEXTS, VECTORS.tolist(), {"text that is not valid UTF-8": 1})


@pytest.mark.parametrize("cell", ["[1, null]", "[true]", "[[1]]", "{}", "nan", "[1 2]", "[1", "[]", '["1"]'])
def test_an_invalid_cell_of_csv_is_counted(tmp_path: Path, cell: str) -> None:
    path = write_csv(tmp_path / "a.csv", TEXTS, VECTORS)
    with path.open("a") as file:
        file.write(f'8,text,"{cell.replace(chr(34), chr(34) * 2)}"\r\n9,only two cells\r\n')
    texts, rows, unreadable = read(path, text_column="text", vector_column="embedding")
    assert (texts, rows) == (TEXTS, VECTORS.tolist())
    assert sum(unreadable.values()) == 2
    assert unreadable["row with too few or too many cells"] == 1


def test_columns_are_named_or_the_only_ones(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    def make(**columns: Any) -> Path:
        path = tmp_path / "a.parquet"
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        return path

    assert read(make(anything=TEXTS, numbers=VECTORS.tolist()))[0] == TEXTS
    assert read(make(title=["x"] * 8, text=TEXTS, embedding=VECTORS.tolist(), other=VECTORS.tolist()))[0] == TEXTS
    path = make(title=["x"] * 8, body=TEXTS, content=TEXTS, embedding=VECTORS.tolist())
    message = refuse(path)
    assert "'body', 'content'" in message
    assert "text_column" in message
    assert read(path, text_column="body")[:2] == (TEXTS, VECTORS.tolist())
    assert 'did you mean "body"?' in refuse(path, text_column="bodi")
    assert "has the type list" in refuse(path, text_column="embedding")
    assert "has the type string" in refuse(path, vector_column="title")
    assert "text_column" in refuse(make(id=TEXTS, vector=VECTORS.tolist()))
    assert "vector_column" in refuse(make(text=TEXTS, tokens=[[1, 2]] * 8))


def test_a_file_without_the_columns_is_counted(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    write_parquet(tmp_path / "a.parquet", TEXTS, VECTORS)
    pyarrow.parquet.write_table(pyarrow.table({"id": ["1", "2"]}), tmp_path / "b.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["1", "2", "3"]}), tmp_path / "c.parquet")
    counts = {"row without a text": 2, "row without a vector": 3}
    assert read(tmp_path) == (TEXTS, VECTORS.tolist(), counts)


def test_the_chosen_columns_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "embedonce")
    TableImporter(path=write_parquet(tmp_path / "a.parquet", TEXTS, VECTORS)).check()
    assert "texts from the column 'text', vectors from the column 'vector'" in caplog.text


@pytest.mark.parametrize("name", ["a.parquet", "a.feather", "stream.arrow", "a.npy"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.6, 0.99])
def test_a_truncated_file_is_an_error(tmp_path: Path, name: str, kept: float) -> None:
    path = WRITERS[name](tmp_path / name, TEXTS * 300, np.repeat(VECTORS, 300, axis=0))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(SourceError, match=str(path)):
        list(TableImporter(path=path).scan())


@pytest.mark.parametrize("name", ["a.parquet", "a.feather", "stream.arrow"])
def test_damaged_bytes_are_an_error_or_harmless(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path / name, TEXTS * 20, np.tile(VECTORS, (20, 1)))
    content = bytearray(path.read_bytes())
    chance = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(content)
        for place in chance.integers(0, len(content), 4):
            damaged[place] = int(chance.integers(256))
        path.write_bytes(damaged)
        try:
            for part in TableImporter(path=path).scan():
                assert len(part.texts) == len(part.vectors)
        except SourceError:
            pass


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"PARE1234", "encrypted"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"PK\x03\x04", "ZIP"),
        (b"\x80\x04\x95", "pickle"),
        (b"hello", "unknown format"),
        (b"", "unknown format"),
    ],
)
def test_other_formats_are_refused(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "data"
    path.write_bytes(content)
    assert word in refuse(path)
    assert "although its name says so" in refuse_renamed(path, "data.npy") or word != "unknown format"


def refuse_renamed(path: Path, name: str) -> str:
    return refuse(path.rename(path.with_name(name)))


def test_arrays_of_objects_and_other_shapes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    path.with_suffix(".txt").write_text("a\nb\n")
    arrays: list[Any] = [
        np.array([{"a": 1}, None], object),
        np.ones(2, np.float32),
        np.ones((2, 3), np.int8),
        np.asfortranarray(np.ones((2, 3), np.float32)),
        np.ones((2, 0), np.float32),
    ]
    for array in arrays:
        np.save(path, array, allow_pickle=True)
        assert "save a matrix of floats" in refuse(path)


def test_the_text_file_of_a_matrix_has_one_line_per_row(tmp_path: Path) -> None:
    path = write_numpy(tmp_path / "a.npy", TEXTS, VECTORS)
    texts = path.with_suffix(".txt")
    texts.write_bytes(texts.read_bytes().replace(b"\n", b"\r\n").removesuffix(b"\r\n"))
    assert read(path)[0] == TEXTS
    texts.write_bytes(texts.read_bytes() + b"\none more")
    assert "9 lines" in refuse(path)
    texts.unlink()
    assert str(texts) in refuse(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this platform has no named pipes")
def test_links_and_pipes_are_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXTS, VECTORS)
    folder = tmp_path / "folder"
    folder.mkdir()
    link = folder / "b.parquet"
    link.symlink_to(path)
    assert "symbolic link" in refuse(link)
    assert "symbolic link" in refuse(folder)
    link.unlink()
    os.mkfifo(link)
    assert "named pipe" in refuse(link)
    assert "named pipe" in refuse(folder)
    link.unlink()
    assert ".parquet" in refuse(folder)


def test_a_folder_of_several_formats_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", TEXTS, VECTORS)
    write_csv(tmp_path / "a.csv", TEXTS, VECTORS)
    assert "CSV, Parquet" in refuse(tmp_path)


def test_an_export_of_vector_io_is_for_another_importer(tmp_path: Path) -> None:
    (tmp_path / "VDF_META.json").write_text("{}")
    assert "importer vdf" in refuse(tmp_path)


def test_columns_of_the_same_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,text,vector\na,b,"[1]"\n')
    assert "several columns of the same name" in refuse(path)


def test_csv_with_only_a_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,vector\n")
    assert "no rows" in refuse(path)


def test_an_empty_table_has_no_texts(tmp_path: Path) -> None:
    assert read(write_parquet(tmp_path / "a.parquet", [], np.empty((0, 8), np.float32))) == ([], [], {})


def test_the_nodes_of_llama_index_are_read_if_their_text_was_embedded_alone(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    nodes = [
        json.dumps({"metadata": {}, "text": ""}),
        json.dumps({"metadata": {"file": "a"}, "excluded_embed_metadata_keys": []}),
        json.dumps({"metadata": {"file": "a"}, "excluded_embed_metadata_keys": ["file"]}),
        None,
        "{",
    ]
    table = pyarrow.table(
        {"text": list("abcde"), "vector": [[1.0], [2.0], [3.0], [4.0], [5.0]], "_node_content": nodes}
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    texts, rows, unreadable = read(tmp_path / "a.parquet")
    assert (texts, rows) == (["a", "c", "d"], [[1.0], [3.0], [4.0]])
    assert list(unreadable.values()) == [2]
