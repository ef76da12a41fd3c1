"""An embedding model of LlamaIndex that returns given vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr
from numpy.typing import NDArray


class GivenEmbedding(BaseEmbedding):
    """Returns the vector that was given for a text, and records the texts that it was asked for."""

    _vectors: dict[str, list[float]] = PrivateAttr()
    _asked: list[str] = PrivateAttr(default_factory=list)

    @classmethod
    def of(cls, texts: Sequence[str], vectors: NDArray[np.float32]) -> GivenEmbedding:
        model = cls(model_name="given")
        model._vectors = dict(zip(texts, vectors.astype(float).tolist(), strict=True))
        return model

    @property
    def asked(self) -> list[str]:
        return self._asked

    def _get_text_embedding(self, text: str) -> list[float]:
        self._asked.append(text)
        return self._vectors[text]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


class HashEmbedding(GivenEmbedding):
    """Returns a vector for any text. Different texts have different vectors."""

    def _get_text_embedding(self, text: str) -> list[float]:
        self._asked.append(text)
        return find_vector(text).astype(float).tolist()


def find_vector(text: str) -> NDArray[np.float32]:
    seed = [*text.encode("utf-8", "surrogatepass"), len(text)]
    return np.random.default_rng(seed).standard_normal(8).astype(np.float32)
