"""Writes an embeddings cache of LlamaIndex into Redis."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def write(url: str, texts: list[str], vectors: NDArray[np.float32]) -> dict[str, object]:
    """Embed the texts with LlamaIndex, and return the options of the importer."""
    from llama_index.storage.kvstore.redis import RedisKVStore

    from .llama_index_models import GivenEmbedding

    store = RedisKVStore(redis_uri=url)
    try:
        model = GivenEmbedding.of(texts, vectors)
        model.embeddings_cache = store
        model.get_text_embedding_batch(texts)
    finally:
        store._redis_client.close()
    return {"url": url, "line_breaks": "kept"}
