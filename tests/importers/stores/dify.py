"""Writes what Dify's `CacheEmbedding` writes into Postgres and Redis.

Dify is an application and not a package, so this follows its source (commit 00127b6 of langgenius/dify: the class
`Embedding` of api/models/dataset.py, `CacheEmbedding` of api/core/rag/embedding/cached_embedding.py and
`generate_text_hash` of api/libs/helper.py). Dify normalises the vectors first; the vectors here are stored as given.
"""

from __future__ import annotations

import base64
import pickle
from hashlib import sha256
from typing import Any
from uuid import uuid4

import numpy as np

PROVIDER = "langgenius/openai/openai"


def hash_text(text: str) -> str:
    return sha256(f"{text}None".encode()).hexdigest()


def write(url: str, texts: list[str], vectors: np.ndarray[Any, Any], model: str | None = None) -> dict[str, object]:
    """Write the vectors of a new model, and return the options of the importer.

    They are vectors of documents in the database at a postgresql:// URL, or of queries at a redis:// URL.
    """
    model = model or f"text-embedding-{uuid4()}"
    (_write_queries if url.startswith("redis") else _write_documents)(url, texts, vectors, model)
    return {"url": url, "provider": PROVIDER, "model": model}


def _write_documents(url: str, texts: list[str], vectors: np.ndarray[Any, Any], model: str) -> None:
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("""
            CREATE TABLE IF NOT EXISTS embeddings (
                id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
                model_name varchar(255) NOT NULL DEFAULT 'text-embedding-ada-002',
                hash varchar(64) NOT NULL,
                embedding bytea NOT NULL,
                created_at timestamp NOT NULL DEFAULT CURRENT_TIMESTAMP(0),
                provider_name varchar(255) NOT NULL DEFAULT '',
                CONSTRAINT embedding_hash_idx UNIQUE (model_name, hash, provider_name)
            )""")
        rows = [
            (model, hash_text(text), pickle.dumps(row.tolist(), protocol=pickle.HIGHEST_PROTOCOL), PROVIDER)
            for text, row in zip(texts, np.asarray(vectors, np.float64), strict=True)
        ]
        with connection.cursor() as cursor:
            statement = "INSERT INTO embeddings (model_name, hash, embedding, provider_name) VALUES (%s, %s, %s, %s)"
            cursor.executemany(statement, rows)


def _write_queries(url: str, texts: list[str], vectors: np.ndarray[Any, Any], model: str) -> None:
    import redis

    with redis.Redis.from_url(url) as client:
        for text, row in zip(texts, np.asarray(vectors, np.float64), strict=True):
            value = base64.b64encode(np.array(row.tolist()).tobytes()).decode("utf-8")
            client.set(f"{PROVIDER}_{model}_{hash_text(text)}", value, ex=600)
