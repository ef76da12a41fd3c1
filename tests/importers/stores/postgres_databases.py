"""Databases for the tests of importers that read Postgres."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import LiteralString
from urllib.parse import urlsplit
from uuid import uuid4

import psycopg
from psycopg import sql


@contextmanager
def create_database(server: str, options: LiteralString = "") -> Iterator[str]:
    """Make an empty database, yield its URL, and drop it. ``options`` are those of CREATE DATABASE."""
    name = f"embedonce_test_{uuid4().hex}"
    run(server, sql.SQL("CREATE DATABASE {} {}").format(sql.Identifier(name), sql.SQL(options)))
    try:
        yield urlsplit(server)._replace(path=f"/{name}").geturl()
    finally:
        run(server, sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def run(url: str, statement: str | sql.Composed) -> None:
    """Run statements in a database."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement)  # type: ignore[arg-type]
