"""Stores of every importer that reads files, for the tests of hostile and damaged sources."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optional import needs

from embedonce.contracts import FoundVectors

from .stores import chroma, diskcache, langchain, llama_index, llama_index_ingestion, sqlite, table, vdf

Vectors = np.ndarray[Any, Any]
Write = Callable[[Path, list[str], Vectors], dict[str, Any]]


@dataclass(frozen=True)
class Store:
    """How the store of an importer is written into a new folder."""

    importer: str
    write: Write
    library: str = "numpy"
    """A library that writing or reading the store needs."""
    suffix: str = ""
    """Suffix of the store's file, if the importer chooses the format by it."""
    is_folder: bool = False


def _write_sqlite(folder: Path, texts: list[str], vectors: Vectors) -> dict[str, Any]:
    folder.mkdir()
    return sqlite.write(folder / "vectors.db", texts, vectors)


def _write_diskcache_files(folder: Path, texts: list[str], vectors: Vectors) -> dict[str, Any]:
    return diskcache.write(folder, texts, vectors, disk_min_file_size=1)


def _write_fanout(folder: Path, texts: list[str], vectors: Vectors) -> dict[str, Any]:
    return diskcache.write(folder, texts, vectors, is_fanout=True, shards=2, disk_min_file_size=1)


def _write_nested_langchain(folder: Path, texts: list[str], vectors: Vectors) -> dict[str, Any]:
    return langchain.write(folder, texts, vectors, namespace="group/a-model")


def _write_table(name: str) -> Write:
    def write(folder: Path, texts: list[str], vectors: Vectors) -> dict[str, Any]:
        folder.mkdir()
        return {"path": table.WRITERS[name](folder / name, texts, vectors)}

    return write


STORES = {
    "langchain": Store("langchain", langchain.write, "langchain_classic", is_folder=True),
    "langchain-nested": Store("langchain", _write_nested_langchain, "langchain_classic", is_folder=True),
    "llama-index": Store("llama-index", llama_index.write, "llama_index.core"),
    "llama-index-ingestion": Store("llama-index-ingestion", llama_index_ingestion.write, "llama_index.core"),
    "sqlite": Store("sqlite", _write_sqlite),
    "diskcache": Store("diskcache", diskcache.write, is_folder=True),
    "diskcache-files": Store("diskcache", _write_diskcache_files, is_folder=True),
    "diskcache-fanout": Store("diskcache", _write_fanout, is_folder=True),
    "parquet": Store("table", _write_table("a.parquet"), "pyarrow", ".parquet"),
    "feather": Store("table", _write_table("a.feather"), "pyarrow", ".feather"),
    "json-lines": Store("table", _write_table("a.jsonl"), "pyarrow", ".jsonl"),
    "csv": Store("table", _write_table("a.csv"), "pyarrow", ".csv"),
    "numpy": Store("table", _write_table("a.npy"), "pyarrow", ".npy"),
    "dataset": Store("table", _write_table("dataset"), "pyarrow", is_folder=True),
    "vdf": Store("vdf", vdf.write, "pyarrow", is_folder=True),
    "chroma": Store("chroma", chroma.write, "chromadb", is_folder=True),
}


def each_store(*, is_folder: bool | None = None) -> pytest.MarkDecorator:
    """Run a test with the name of each store; those of one kind if ``is_folder`` is given."""
    names = [name for name, store in STORES.items() if is_folder in (None, store.is_folder)]
    return pytest.mark.parametrize("name", [pytest.param(name, marks=needs(STORES[name].library)) for name in names])


def make_importer(plugin: str, /, **options: Any) -> Any:
    """Return an importer by the name of TOML."""
    module = importlib.import_module(f"embedonce_importers.{plugin.replace('-', '_')}")
    return module.embedonce_importers()[plugin](**options)


def read(importer: Any, texts: Sequence[str]) -> tuple[dict[str, Vectors], dict[str, int]]:
    """Look the texts up and scan the store. Return the finite vector of each text, and what was unreadable.

    The engine does not use vectors that are not finite.
    """
    found: dict[str, Vectors] = {}
    unreadable: dict[str, int] = {}
    parts: list[FoundVectors] = []
    if hasattr(importer, "lookup"):
        parts.append(importer.lookup(texts))
    if hasattr(importer, "scan"):
        parts.extend(importer.scan())
    for part in parts:
        for text, row in zip(part.texts, part.vectors, strict=True):
            if row is None:
                continue
            with np.errstate(over="ignore"):
                vector = np.asarray(row).astype(np.float32)
            assert vector.ndim == 1
            if np.isfinite(vector).all():
                found[text] = vector
        for reason, count in part.unreadable.items():
            unreadable[reason] = unreadable.get(reason, 0) + count
    return found, unreadable
