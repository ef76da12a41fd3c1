"""Writes tables in each format."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.floating[Any]]


def write(folder: Path, texts: Sequence[str], vectors: Vectors) -> dict[str, object]:
    """Write a Parquet file, and return the options of the importer."""
    folder.mkdir(parents=True, exist_ok=True)
    return {"path": write_parquet(folder / "vectors.parquet", texts, vectors)}


def make_table(texts: Sequence[str], vectors: Vectors) -> Any:
    import pyarrow

    ids = pyarrow.array([str(number) for number in range(len(texts))], pyarrow.string())
    type_ = pyarrow.list_(pyarrow.from_numpy_dtype(vectors.dtype))
    columns = {"text": pyarrow.array(list(texts), pyarrow.string()), "vector": pyarrow.array(list(vectors), type_)}
    return pyarrow.table({"id": ids, **columns})


def write_parquet(path: Path, texts: Sequence[str], vectors: Vectors) -> Path:
    import pyarrow.parquet

    pyarrow.parquet.write_table(make_table(texts, vectors), path, row_group_size=1000)
    return path


def write_arrow(path: Path, texts: Sequence[str], vectors: Vectors) -> Path:
    import pyarrow.feather

    pyarrow.feather.write_feather(make_table(texts, vectors), str(path))
    return path


def write_stream(path: Path, texts: Sequence[str], vectors: Vectors) -> Path:
    import pyarrow

    table = make_table(texts, vectors)
    with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)
    return path


def write_dataset(path: Path, texts: Sequence[str], vectors: Vectors) -> Path:
    """Write what ``datasets.Dataset.save_to_disk`` writes: Arrow streams, and a file that names them."""
    path.mkdir()
    middle = len(texts) // 2
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    write_stream(path / names[0], texts[:middle], vectors[:middle])
    write_stream(path / names[1], texts[middle:], vectors[middle:])
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": "train"}
    (path / "state.json").write_text(json.dumps(state))
    (path / "dataset_info.json").write_text("{}")
    return path


def write_json_lines(path: Path, texts: Sequence[str], vectors: Vectors) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for text, vector in zip(texts, vectors.tolist(), strict=True):
            file.write(json.dumps({"text": text, "embedding": vector, "extra": {"a": [1]}}) + "\n")
    return path


def write_csv(path: Path, texts: Sequence[str], vectors: Vectors) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text", "embedding"])
        for number, (text, vector) in enumerate(zip(texts, vectors.tolist(), strict=True)):
            writer.writerow([number, text, json.dumps(vector)])
    return path


def write_numpy(path: Path, texts: Sequence[str], vectors: Vectors) -> Path:
    np.save(path, vectors)
    path.with_suffix(".txt").write_bytes("".join(f"{text}\n" for text in texts).encode())
    return path


WRITERS: Mapping[str, Callable[[Path, Sequence[str], Vectors], Path]] = {
    "a.parquet": write_parquet,
    "a.feather": write_arrow,
    "stream.arrow": write_stream,
    "dataset": write_dataset,
    "a.jsonl": write_json_lines,
    "a.csv": write_csv,
    "a.npy": write_numpy,
}
"""The writer of each format, by the name of a file."""
