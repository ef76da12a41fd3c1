"""Importers of a configuration that is used with a framework's own embedder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import optional
import pytest
from importers.stores.langchain import write

from embedonce_integrations.langchain import CachedEmbeddings

pytestmark = optional.needs("langchain_classic")

TEXTS = [f"text {number}" for number in range(40)]


def make_embeddings() -> Any:
    from langchain_core.embeddings import Embeddings

    class Numbered(Embeddings):
        """Embeddings whose vectors depend on the text, and which note what they embed."""

        model = "numbered"

        def __init__(self) -> None:
            self.embedded: list[str] = []

        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            self.embedded += texts
            return [make_row(text) for text in texts]

        def embed_query(self, text: str) -> list[float]:
            self.embedded.append(text)
            return [-value for value in make_row(text)]

    return Numbered()


def make_row(text: str) -> list[float]:
    row: list[float] = np.random.default_rng([*text.encode()]).standard_normal(8).astype(np.float32).tolist()
    return row


def write_store(folder: Path, **options: Any) -> dict[str, Any]:
    given = write(folder / "langchain", TEXTS, np.array([make_row(text) for text in TEXTS], np.float32))
    given.pop("query_embedding_cache", None)
    return {
        "tiers": [{"type": "disk", "path": str(folder / "vectors")}],
        "imports": [{"type": "langchain", **given, "path": str(given["path"]), "timeout": 60, **options}],
    }


def open_embeddings(inner: Any, config: dict[str, Any]) -> CachedEmbeddings:
    return CachedEmbeddings(inner, config=config, space={"model": "numbered"})


def test_the_vectors_of_langchains_own_cache_are_imported_and_its_queries_are_not(tmp_path: Path) -> None:
    inner = make_embeddings()
    cached = open_embeddings(inner, write_store(tmp_path, query_embedding_cache=False))
    assert np.array_equal(cached.embed_documents(TEXTS), [make_row(text) for text in TEXTS])
    assert len(inner.embedded) == 20
    assert cached.embed_query(TEXTS[0]) == [-value for value in make_row(TEXTS[0])]
    assert len(inner.embedded) == 21


def test_a_cache_that_may_mix_queries_and_documents_is_not_imported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inner = make_embeddings()
    cached = open_embeddings(inner, write_store(tmp_path))
    assert np.array_equal(cached.embed_documents(TEXTS), [make_row(text) for text in TEXTS])
    assert len(inner.embedded) == 40
    assert "query_embedding_cache" in caplog.text
