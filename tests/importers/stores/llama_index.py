"""Writes an embeddings cache of LlamaIndex into a JSON file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def write(folder: Path, texts: list[str], vectors: NDArray[np.float32]) -> dict[str, object]:
    """Embed the texts with LlamaIndex, persist its cache, and return the options of the importer."""
    from llama_index.core.storage.kvstore import SimpleKVStore

    from .llama_index_models import GivenEmbedding

    model = GivenEmbedding.of(texts, vectors)
    model.embeddings_cache = store = SimpleKVStore()
    model.get_text_embedding_batch(texts)
    path = folder / "embeddings_cache.json"
    store.persist(str(path))
    return {"path": path, "line_breaks": "kept"}
