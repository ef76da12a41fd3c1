"""Writes an export as vector-io does (``vdf_io/export_vdf/vdb_export_cls.py``, version 0.1.248).

vector-io itself needs the clients of a dozen vector databases, so it is not installed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def write(folder: Path, texts: Sequence[str], vectors: NDArray[np.floating[Any]]) -> dict[str, object]:
    """Write an export with one index, and return the options of the importer."""
    folder.mkdir(parents=True, exist_ok=True)
    write_index(folder, "passages", texts, vectors)
    write_meta(folder, {"passages": [describe(folder, "passages", len(texts), vectors.shape[1])]})
    return {"path": folder}


def write_index(
    folder: Path, index: str, texts: Sequence[str | None], vectors: NDArray[np.floating[Any]], part: int = 1_000
) -> None:
    import pyarrow
    import pyarrow.parquet

    (folder / index).mkdir()
    for number, start in enumerate(range(0, len(texts), part), 1):
        columns = {
            "id": [str(start + row) for row in range(len(texts[start : start + part]))],
            "vector": vectors[start : start + part].tolist(),
            "document": list(texts[start : start + part]),
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / index / f"{number}.parquet")


def describe(folder: Path, index: str, count: int, dimensions: int, **others: object) -> dict[str, object]:
    """Return the entry of a namespace in ``VDF_META.json``."""
    model = {
        "model_name": "NOT_PROVIDED",
        "text_column": "NOT_PROVIDED",
        "dimensions": dimensions,
        "vector_column": "vector",
    }
    return {
        "namespace": "",
        "index_name": index,
        "total_vector_count": count,
        "exported_vector_count": count,
        "dimensions": dimensions,
        "model_name": "NOT_PROVIDED",
        "model_map": {"vector": model},
        "vector_columns": ["vector"],
        "data_path": index,
        "metric": "Cosine",
        "index_config": None,
        "schema_dict_str": None,
        **others,
    }


def write_meta(folder: Path, indexes: dict[str, list[dict[str, object]]]) -> None:
    meta = {
        "version": "0.1.248",
        "file_structure": [],
        "author": "tests",
        "exported_from": "chroma",
        "indexes": indexes,
        "exported_at": "2026-11-30T00:00:00+00:00",
        "id_column": None,
    }
    (folder / "VDF_META.json").write_text(json.dumps(meta, indent=4))
