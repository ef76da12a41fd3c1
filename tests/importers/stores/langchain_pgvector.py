"""Writes a collection with LangChain's PGVector."""

from __future__ import annotations

import re
from typing import Any
from uuid import uuid4

import numpy as np


def make_embeddings(vectors: np.ndarray[Any, Any]) -> Any:
    """Return LangChain's Embeddings that returns these vectors for any texts."""
    from langchain_core.embeddings import Embeddings

    class KnownVectors(Embeddings):
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            assert len(texts) == len(vectors)
            return [[float(number) for number in row] for row in vectors]

        def embed_query(self, text: str) -> list[float]:
            raise AssertionError("a vector store does not store queries")

    return KnownVectors()


def write(
    url: str, texts: list[str], vectors: np.ndarray[Any, Any], collection: str | None = None
) -> dict[str, object]:
    """Write the texts into a collection of the database at ``url``, and return the options of the importer."""
    from langchain_core.documents import Document
    from langchain_postgres import PGVector
    from sqlalchemy import create_engine

    collection = collection or f"texts {uuid4()}"
    engine = create_engine(re.sub("^postgres(ql)?://", "postgresql+psycopg://", url))
    try:
        store = PGVector(make_embeddings(vectors), collection_name=collection, connection=engine)
        if texts:
            # LangChain stores metadata beside the text, and does not embed it.
            store.add_documents([Document(text, metadata={"number": place}) for place, text in enumerate(texts)])
        store.session_maker.remove()  # type: ignore[union-attr]
    finally:
        engine.dispose()
    return {"url": url, "collection": collection}
