"""Writes a cache of LangChain's CacheBackedEmbeddings into Redis."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import redis
from numpy.typing import NDArray


def write(
    url: str,
    texts: list[str],
    vectors: NDArray[np.float32],
    *,
    store_namespace: str = "",
    namespace: str = "model",
    key_encoder: Any = "sha256",
) -> dict[str, object]:
    """Embed the texts with LangChain, and return the options of the importer."""
    from langchain_classic.embeddings import CacheBackedEmbeddings
    from langchain_core.embeddings import Embeddings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`langchain-community` is being sunset", DeprecationWarning)
        from langchain_community.storage import RedisStore

    rows = dict(zip(texts, vectors.astype(float).tolist(), strict=True))

    class GivenEmbeddings(Embeddings):
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return [rows[text] for text in texts]

        def embed_query(self, text: str) -> list[float]:
            return rows[text]

    with redis.Redis.from_url(url) as client, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using default key encoder: SHA-1")
        store = RedisStore(client=client, namespace=store_namespace or None)
        CacheBackedEmbeddings.from_bytes_store(
            GivenEmbeddings(), store, namespace=namespace, key_encoder=key_encoder
        ).embed_documents(texts)
    return {
        "url": url,
        "store_namespace": store_namespace,
        "namespace": namespace,
        "key_encoder": key_encoder,
        "query_embedding_cache": False,
    }
