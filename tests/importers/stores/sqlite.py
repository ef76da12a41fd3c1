"""Writes a table as tutorials do: the SHA-256 digest of the text, and the vector as JSON."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def write(path: Path, texts: Sequence[str], vectors: NDArray[np.floating[Any]]) -> dict[str, object]:
    """Write a new database, and return the options of the importer."""
    rows = [
        (hashlib.sha256(text.encode()).hexdigest(), json.dumps(row))
        for text, row in zip(texts, vectors.tolist(), strict=True)
    ]
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE embeddings (cache_key TEXT PRIMARY KEY, vector TEXT NOT NULL)")
        connection.executemany("INSERT INTO embeddings VALUES (?, ?)", rows)
    return {"path": path, "table": "embeddings", "key_column": "cache_key", "vector_column": "vector"}
