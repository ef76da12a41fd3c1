"""Writes a table as tutorials do: a SHA-256 digest, a preview of the text, and a pgvector column."""

from __future__ import annotations

from hashlib import sha256
from typing import Any
from uuid import uuid4

import numpy as np
import psycopg
from psycopg import sql


def write(url: str, texts: list[str], vectors: np.ndarray[Any, Any]) -> dict[str, object]:
    """Write the texts into a new table of the database at ``url``, and return the options of the importer."""
    table = f"embedding_cache_{uuid4().hex}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        connection.execute(
            sql.SQL("CREATE TABLE {} (text_hash char(64) PRIMARY KEY, text_preview text, embedding vector)").format(
                sql.Identifier(table)
            )
        )
        statement = sql.SQL("INSERT INTO {} VALUES (%s, %s, %s::vector)").format(sql.Identifier(table))
        rows = [
            # Postgres cannot store a NUL in the preview.
            (sha256(text.encode()).hexdigest(), text[:200].replace("\0", ""), str(row.tolist()))
            for text, row in zip(texts, np.asarray(vectors, np.float64), strict=True)
        ]
        with connection.cursor() as cursor:
            cursor.executemany(statement, rows)
    return {"url": url, "table": table, "key_column": "text_hash"}
