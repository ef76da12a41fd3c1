"""Writes an ingestion cache of LlamaIndex, into a JSON file or into Redis."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def write(folder: Path, texts: list[str], vectors: NDArray[np.float32]) -> dict[str, object]:
    """Run an ingestion pipeline of LlamaIndex, persist its cache, and return the options of the importer."""
    from llama_index.core.ingestion import IngestionPipeline
    from llama_index.core.schema import TextNode

    from .llama_index_models import GivenEmbedding

    pipeline = IngestionPipeline(transformations=[GivenEmbedding.of(texts, vectors)])
    pipeline.run(nodes=[TextNode(text=text) for text in texts])
    pipeline.persist(str(folder))
    return {"path": folder / "llama_cache", "line_breaks": "kept"}


def write_to_redis(url: str, texts: list[str], vectors: NDArray[np.float32], collection: str) -> dict[str, object]:
    """Do the same with a cache in Redis."""
    from llama_index.core.ingestion import IngestionCache, IngestionPipeline
    from llama_index.core.schema import TextNode
    from llama_index.storage.kvstore.redis import RedisKVStore
    from redis import Redis

    from .llama_index_models import GivenEmbedding

    # RedisKVStore would make an asynchronous client of its own, and never close it.
    with Redis.from_url(url) as client:
        cache = IngestionCache(
            cache=RedisKVStore(redis_client=client, async_redis_client=object()), collection=collection
        )
        pipeline = IngestionPipeline(transformations=[GivenEmbedding.of(texts, vectors)], cache=cache)
        pipeline.run(nodes=[TextNode(text=text) for text in texts])
    return {"url": url, "collection": collection, "line_breaks": "kept"}
