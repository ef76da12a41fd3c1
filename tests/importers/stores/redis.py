"""Writes a cache of embeddings into Redis, as tutorials do it."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import redis
from numpy.typing import NDArray


def write(
    url: str, texts: list[str], vectors: NDArray[np.float32], *, prefix: str = "embed:v1:", field: str = ""
) -> dict[str, object]:
    """Store each vector as JSON under the hash of its text, and return the options of the importer."""
    with redis.Redis.from_url(url) as client, client.pipeline(transaction=False) as pipeline:
        for text, row in zip(texts, vectors.astype(float).tolist(), strict=True):
            key = prefix + hashlib.sha256(text.encode()).hexdigest()
            if field:
                pipeline.hset(key, field, json.dumps(row))
            else:
                pipeline.set(key, json.dumps(row), ex=3600)
        pipeline.execute()
    return {"url": url, "prefix": prefix, "key": 'sha256("{text}")', **({"field": field} if field else {})}
