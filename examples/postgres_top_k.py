"""Search cached vectors in the database itself: top-k by cosine in Postgres, with an HNSW index for one vector space.

    pip install '.[postgres]'
    python examples/postgres_top_k.py postgresql://user@localhost:5432/database

The database needs pgvector (``CREATE EXTENSION vector``). The texts are the docstrings of the standard library, the
ngram provider makes their vectors, and the metadata of each is the name of the class or function that it documents. The
script puts everything into the schema ``embedonce_example``, which it drops first.
"""

from __future__ import annotations

import ast
import sys
import sysconfig
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from psycopg import sql

import embedonce
from embedonce import Tier
from embedonce_backends.postgres import PostgresBackend
from embedonce_providers.ngram import NgramProvider

SCHEMA = "embedonce_example"
QUERIES = ("parse a date and time", "compress a file", "split a path into its parts", "draw a random number")
K = 10

# A view of one vector space, with fixed dimensions and without expired entries.
VIEW = """
CREATE VIEW {schema}.docstrings AS
SELECT key, embedding::vector({dimensions}) AS embedding, metadata, to_timestamp(created) AS created
FROM {schema}.embedonce
WHERE scope = {scope} AND dimensions = {dimensions} AND embedding IS NOT NULL
    AND (least(kept_until, expires) IS NULL OR least(kept_until, expires) > extract(epoch FROM now()))
"""
INDEX = """
CREATE INDEX docstrings_hnsw ON {schema}.embedonce
USING hnsw ((embedding::vector({dimensions})) vector_cosine_ops)
WHERE scope = {scope} AND dimensions = {dimensions} AND embedding IS NOT NULL
"""
TOP_K = """
SELECT metadata->>'name', 1 - (embedding <=> %(query)s::vector)
FROM {schema}.docstrings ORDER BY embedding <=> %(query)s::vector LIMIT %(k)s
"""


def read_docstrings() -> dict[str, str]:
    """Return the docstrings of the standard library's single-file modules, by the name of what they document."""
    found = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                found.setdefault(text, f"{path.stem}.{node.name}")
    return {name: text for text, name in found.items()}


def top_k(connection: psycopg.Connection[Any], query: np.ndarray, parts: dict[str, Any]) -> list[tuple[str, float]]:
    """Return the names and cosines of the nearest docstrings. The statement reads only the view."""
    values = {"query": str(query.tolist()), "k": K}
    return connection.execute(sql.SQL(TOP_K).format(**parts), values).fetchall()


def uses_index(connection: psycopg.Connection[Any], query: np.ndarray, parts: dict[str, Any]) -> bool:
    """Return whether Postgres uses the HNSW index for the query."""
    statement = sql.SQL("EXPLAIN ") + sql.SQL(TOP_K).format(**parts)
    plan = connection.execute(statement, {"query": str(query.tolist()), "k": K}).fetchall()
    return any("docstrings_hnsw" in line for (line,) in plan)


def compute_recall(cosines: np.ndarray, names: Sequence[str], found: Sequence[tuple[str, float]]) -> float:
    """Return the share of the exact top-k that the index found, because HNSW is approximate."""
    exact = {names[place] for place in np.argsort(-cosines)[:K]}
    return len(exact & {name for name, _ in found}) / K


def main(url: str) -> dict[str, float]:
    """Print the nearest docstrings of some queries; return the mean recall, and how many queries used the index."""
    texts = read_docstrings()
    names = list(texts)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(SCHEMA)))

        backend = PostgresBackend(url=url, schema=SCHEMA, column="vector")
        tier = Tier(backend, write="inline", timeout=30)
        with embedonce.Cache(NgramProvider(dimensions=256), [tier]) as cache:
            filled = cache.fetch(list(texts.values()), metadata=[{"name": name} for name in names])
            queries = cache.fetch(QUERIES, task="query", store=False).vectors
            scope = cache.explain(QUERIES[0]).scope
        vectors = filled.vectors
        print(f"{len(texts)} docstrings are in {SCHEMA}.embedonce ({vectors.shape[1]} dimensions)")

        parts = {
            "schema": sql.Identifier(SCHEMA),
            "scope": sql.Literal(scope),
            "dimensions": sql.Literal(vectors.shape[1]),
        }
        connection.execute(sql.SQL(VIEW).format(**parts))
        connection.execute(sql.SQL(INDEX).format(**parts))
        connection.execute(sql.SQL("ANALYZE {}.embedonce").format(sql.Identifier(SCHEMA)))

        recalls, indexed = [], 0
        for text, query in zip(QUERIES, queries, strict=True):
            found = top_k(connection, query, parts)
            recalls.append(compute_recall(vectors @ query, names, found))
            indexed += uses_index(connection, query, parts)
            print(f"\n{text}")
            for name, cosine in found[:3]:
                print(f"  {cosine:.3f}  {name}")
    print(f"\n{np.mean(recalls):.0%} of the exact top {K} found, by the index: {indexed} of {len(QUERIES)} queries")
    return {"recall": float(np.mean(recalls)), "indexed": indexed, "texts": len(texts)}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
