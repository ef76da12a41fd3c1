"""Writes the cache of LiteLLM in Redis."""

from __future__ import annotations

import asyncio
import os
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

# Without this, LiteLLM downloads prices when it is imported.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")


def make_cache(url: str, namespace: str = "", ttl: float | None = None) -> Any:
    """Return a cache of LiteLLM in a Redis database."""
    from litellm.caching.caching import Cache

    parts = urlsplit(url)
    return Cache(
        type="redis",  # type: ignore[arg-type]
        host=parts.hostname,
        port=str(parts.port),
        db=int(parts.path.strip("/") or 0),
        namespace=namespace or None,
        ttl=ttl,
    )


def write(
    url: str,
    texts: list[str],
    vectors: NDArray[np.float32],
    *,
    group: str = "the-group",
    namespace: str = "",
    **parameters: object,
) -> dict[str, object]:
    """Store the vectors as answers to requests of LiteLLM's aembedding, and return the options of the importer.

    The proxy and ``aembedding`` call this method of the cache after each request. ``parameters`` are those of the
    requests, in their order.
    """
    from litellm.types.utils import Embedding, EmbeddingResponse

    rows = vectors.astype(float).tolist()
    data = [Embedding(embedding=row, index=place, object="embedding") for place, row in enumerate(rows)]
    request = {"model": group, "input": texts, **parameters}

    async def store() -> None:
        cache = make_cache(url, namespace, ttl=3600)
        try:
            await cache.async_add_cache_pipeline(EmbeddingResponse(model="deployed", data=data), **request)
        finally:
            await cache.disconnect()

    asyncio.run(store())
    dimensions = {"dimensions": parameters["dimensions"]} if "dimensions" in parameters else {}
    return {"url": url, "group": group, "namespace": namespace, **dimensions}
