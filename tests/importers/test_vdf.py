"""The importer ``vdf`` reads exports of vector-io."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optional
import pytest

from embedonce.errors import SourceError
from embedonce.testing import ImporterContract, Recipe
from embedonce_importers.vdf import VdfImporter

from .stores.vdf import describe, write, write_index, write_meta

pytestmark = optional.needs("pyarrow")

TEXTS = ["first", "", "Grüße 🎉", "a\nb", " first ", "First"]
VECTORS = np.random.default_rng(0).standard_normal((len(TEXTS), 8)).astype(np.float32)


def read(**options: Any) -> tuple[list[str], list[list[float]], dict[str, int]]:
    importer = VdfImporter(**options)
    importer.check()
    parts = list(importer.scan())
    counts: dict[str, int] = {}
    for part in parts:
        counts |= {reason: counts.get(reason, 0) + number for reason, number in part.unreadable.items()}
    texts = [text for part in parts for text in part.texts]
    return texts, [np.asarray(row, np.float32).tolist() for part in parts for row in part.vectors], counts


def refuse(**options: Any) -> str:
    with pytest.raises(SourceError) as caught:
        VdfImporter(**options).check()
    return str(caught.value)


class TestContract(ImporterContract):
    examples = 5

    @pytest.fixture(autouse=True)
    def in_a_folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        self.stores: dict[int, Path] = {}

    def make(self, texts: Sequence[str], vectors: Any) -> VdfImporter:
        path = self.folder / str(len(self.stores))
        write(path, texts, vectors)
        importer = VdfImporter(path=path)
        self.stores[id(importer)] = path
        return importer

    def recipe(self, importer: Any) -> Recipe:
        return Recipe(VdfImporter, {"path": str(self.stores[id(importer)])})

    def missing(self) -> tuple[VdfImporter, str]:
        return VdfImporter(path=self.folder / "missing"), str(self.folder / "missing")

    def snapshot(self, importer: Any) -> object:
        return {file: file.read_bytes() for file in self.stores[id(importer)].rglob("*") if file.is_file()}


def test_an_export_of_several_files_is_read(tmp_path: Path) -> None:
    write_index(tmp_path, "passages", TEXTS, VECTORS, part=2)
    write_meta(tmp_path, {"passages": [describe(tmp_path, "passages", 6, 8)]})
    assert read(path=tmp_path) == (TEXTS, VECTORS.tolist(), {})
    assert VdfImporter(path=tmp_path).count() == 6


def test_the_index_and_the_namespace_are_chosen(tmp_path: Path) -> None:
    for number, name in enumerate(("one", "two", "three")):
        write_index(tmp_path, name, TEXTS[number : number + 1], VECTORS[number : number + 1])
    spaces = [describe(tmp_path, name, 1, 8, namespace=name) for name in ("two", "three")]
    write_meta(tmp_path, {"small": [describe(tmp_path, "one", 1, 8)], "large": spaces})
    assert "'small', 'large'" in refuse(path=tmp_path)
    assert 'did you mean "large"?' in refuse(path=tmp_path, index="larg")
    assert "'two', 'three'" in refuse(path=tmp_path, index="large")
    assert read(path=tmp_path, index="small")[0] == TEXTS[:1]
    assert read(path=tmp_path, index="large", namespace="three")[0] == TEXTS[2:3]
    options: list[dict[str, str]] = [{"index": "small"}, {"index": "large", "namespace": "two"}]
    assert len({VdfImporter(path=tmp_path, **chosen).source.name for chosen in options}) == 2


def test_the_columns_of_the_export_are_used(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a").mkdir()
    columns = {"x": ["no"] * 6, "text": TEXTS, "vector": VECTORS.tolist(), "second": (-VECTORS).tolist()}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a/1.parquet")
    models = {"vector": {"text_column": "x"}, "second": {"text_column": "text"}}
    entry = describe(tmp_path, "a", 6, 8, vector_columns=["vector", "second"], model_map=models)
    write_meta(tmp_path, {"a": [entry]})
    assert "'vector', 'second'" in refuse(path=tmp_path)
    assert read(path=tmp_path, vector_column="second")[:2] == (TEXTS, (-VECTORS).tolist())
    assert read(path=tmp_path, vector_column="vector", text_column="text")[:2] == (TEXTS, VECTORS.tolist())


def test_rows_without_a_text_are_counted(tmp_path: Path) -> None:
    write_index(tmp_path, "a", [*TEXTS[:3], None, None], VECTORS[:5], part=4)
    write_meta(tmp_path, {"a": [describe(tmp_path, "a", 5, 8)]})
    assert read(path=tmp_path) == (TEXTS[:3], VECTORS[:3].tolist(), {"row without a text": 2})


@pytest.mark.parametrize("data_path", ["..", "../other", "/etc", "a/../../b", "a\0b", 1, None])
def test_an_export_cannot_lead_out_of_its_folder(tmp_path: Path, data_path: object) -> None:
    write_meta(tmp_path, {"a": [describe(tmp_path, "a", 1, 8, data_path=data_path)]})
    assert "does not describe an export" in refuse(path=tmp_path)


def test_a_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    export = tmp_path / "export"
    export.mkdir()
    write_index(tmp_path / "elsewhere", "a", TEXTS, VECTORS)
    (export / "a").symlink_to(tmp_path / "elsewhere/a")
    write_meta(export, {"a": [describe(export, "a", 6, 8)]})
    assert "symbolic link" in refuse(path=export)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"indexes": []}', '{"indexes": {"a": {}}}', '{"indexes": {"a": [1]}}', "[" * 50_000],
)
def test_a_damaged_description_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "VDF_META.json").write_text(content)
    assert "VDF_META.json does not describe an export" in refuse(path=tmp_path)


def test_an_incomplete_export_is_an_error(tmp_path: Path) -> None:
    assert "VDF_META.json does not exist" in refuse(path=tmp_path)
    write_meta(tmp_path, {})
    assert "has no indexes" in refuse(path=tmp_path)
    write_meta(tmp_path, {"a": [describe(tmp_path, "a", 6, 8)]})
    assert str(tmp_path / "a") in refuse(path=tmp_path)
    (tmp_path / "a").mkdir()
    assert "no Parquet files" in refuse(path=tmp_path)
    (tmp_path / "a/1.parquet").write_bytes(b"PAR1" + b"\0" * 100)
    assert "damaged" in refuse(path=tmp_path)


def test_the_description_may_leave_out_what_old_versions_did_not_write(tmp_path: Path) -> None:
    write_index(tmp_path, "a", TEXTS, VECTORS)
    (tmp_path / "VDF_META.json").write_text(json.dumps({"indexes": {"a": [{"data_path": "a"}]}}))
    assert read(path=tmp_path)[:2] == (TEXTS, VECTORS.tolist())


def test_an_incomplete_export_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_index(tmp_path, "a", TEXTS, VECTORS)
    write_meta(tmp_path, {"a": [describe(tmp_path, "a", 6, 8, total_vector_count=7)]})
    assert read(path=tmp_path)[0] == TEXTS
    assert "has 6 of the 7 vectors" in caplog.text
