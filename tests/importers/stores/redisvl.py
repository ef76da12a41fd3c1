"""Writes an EmbeddingsCache of RedisVL."""

from __future__ import annotations

import numpy as np
import redis
from numpy.typing import NDArray


def write(
    url: str, texts: list[str], vectors: NDArray[np.float32], *, name: str = "embedcache", model: str = "the-model"
) -> dict[str, object]:
    """Store the vectors with RedisVL, and return the options of the importer."""
    from redisvl.extensions.cache.embeddings import EmbeddingsCache

    items = [
        {"content": text, "model_name": model, "embedding": row, "metadata": {"source": "test"}}
        for text, row in zip(texts, vectors.astype(float).tolist(), strict=True)
    ]
    with redis.Redis.from_url(url) as client:
        EmbeddingsCache(name=name, redis_client=client).mset(items)
    return {"url": url, "name": name, "model": model}
