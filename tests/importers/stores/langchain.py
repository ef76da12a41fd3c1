"""Writes LangChain's CacheBackedEmbeddings over a LocalFileStore."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def write(
    folder: Path,
    texts: Sequence[str],
    vectors: NDArray[np.floating[Any]],
    *,
    namespace: str = "a-model",
    key_encoder: str = "sha256",
) -> dict[str, object]:
    """Write a store into a new folder, and return the options of the importer."""
    from langchain_classic.embeddings import CacheBackedEmbeddings
    from langchain_classic.storage import LocalFileStore
    from langchain_core.embeddings import Embeddings

    by_text = dict(zip(texts, vectors.tolist(), strict=True))

    class Given(Embeddings):
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return [by_text[text] for text in texts]

        def embed_query(self, text: str) -> list[float]:
            return by_text[text]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using default key encoder")
        embedder = CacheBackedEmbeddings.from_bytes_store(
            Given(), LocalFileStore(folder), namespace=namespace, key_encoder=key_encoder
        )
    folder.mkdir(parents=True, exist_ok=True)
    embedder.embed_documents(list(texts))
    return {"path": folder, "namespace": namespace, "key_encoder": key_encoder, "query_embedding_cache": False}
