"""Writes a collection with Chroma."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@contextmanager
def open_client(folder: Path) -> Iterator[Any]:
    import chromadb
    from chromadb.config import Settings

    client = chromadb.PersistentClient(folder, settings=Settings(anonymized_telemetry=False))
    try:
        yield client
    finally:
        client.close()


def write(folder: Path, texts: Sequence[str], vectors: NDArray[np.floating[Any]]) -> dict[str, object]:
    """Write a collection, and return the options of the importer."""
    write_collection(folder, "passages", texts, vectors)
    return {"path": folder, "collection": "passages"}


def write_collection(
    folder: Path,
    name: str,
    texts: Sequence[str],
    vectors: NDArray[np.floating[Any]],
    *,
    metadatas: Sequence[Mapping[str, Any] | None] | None = None,
    space: str = "l2",
) -> None:
    with open_client(folder) as client:
        add(client, name, texts, vectors, metadatas=metadatas, space=space)


def add(
    client: Any,
    name: str,
    texts: Sequence[str],
    vectors: NDArray[np.floating[Any]],
    *,
    metadatas: Sequence[Mapping[str, Any] | None] | None = None,
    space: str = "l2",
) -> None:
    collection = client.create_collection(name, embedding_function=None, configuration={"hnsw": {"space": space}})
    for start in range(0, len(texts), 1000):
        part = slice(start, start + 1000)
        collection.add(
            ids=[str(number) for number in range(start, start + len(texts[part]))],
            documents=list(texts[part]),
            embeddings=vectors[part],
            metadatas=None if metadatas is None else list(metadatas[part]),
        )
