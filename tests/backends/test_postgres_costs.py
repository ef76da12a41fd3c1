"""A Postgres table keeps costs in two columns, which a table of an earlier version of embedonce does not have."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psycopg
import pytest
from psycopg import sql

from embedonce import Cache, Tier
from embedonce.contracts import deadline
from embedonce.encryption import Encryption
from embedonce.testing.fakes import CountingProvider
from embedonce.vectors import MAX_SECONDS, MAX_TOKENS, Cost, Dtype, Entry, decode_frames, freeze, round_vectors
from embedonce_backends.postgres import PostgresBackend

PATIENT = 60.0
"""Seconds within which a healthy server answers on any machine."""
DTYPES: tuple[Dtype, ...] = ("float32", "float16", "int8")
_numbers = itertools.count()

COLUMNS_OF_VERSION_1 = """
    key text COLLATE "C" PRIMARY KEY,
    scope text COLLATE "C" NOT NULL GENERATED ALWAYS AS
        (split_part(key, '.', CASE WHEN split_part(key, '.', 2) IN ('card', 'lease') THEN 3 ELSE 2 END)) STORED,
    dtype text, dimensions integer, created double precision, expires double precision, kept_until double precision,
    frame bytea, metadata json, text_preview text
"""
"""The columns of a table that a version of embedonce without costs made, with or without ``embedding``."""


class Database:
    """A database of the server, and its owner's connection."""

    def __init__(self, url: str) -> None:
        self.url = url

    def run(self, statement: str, values: Any = None) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(statement.encode(), values)
            return cursor.fetchall() if cursor.description else []

    def make_old_table(self, *, vectors: bool = True) -> str:
        """Make a table as earlier versions of embedonce made it, and return its name."""
        table = f"old_{next(_numbers)}"
        embedding = ", embedding vector" if vectors else ""
        self.run(f"CREATE TABLE {table} ({COLUMNS_OF_VERSION_1}{embedding})")
        self.run(f"COMMENT ON TABLE {table} IS 'embedonce cache, schema 1'")
        return table

    def list_columns(self, table: str) -> set[str]:
        rows = self.run("SELECT column_name FROM information_schema.columns WHERE table_name = %s", (table,))
        return {name for (name,) in rows}


@pytest.fixture(scope="module")
def database(postgres_server: Any) -> Iterator[Database]:
    """A database with pgvector."""
    name = f"costs_{os.getpid()}"
    with psycopg.connect(postgres_server.url, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    made = Database(urlsplit(postgres_server.url)._replace(path=f"/{name}").geturl())
    made.run("CREATE EXTENSION vector")
    try:
        yield made
    finally:
        with psycopg.connect(postgres_server.url, autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@contextmanager
def open_backend(database: Database, url: str | None = None, **options: Any) -> Iterator[PostgresBackend]:
    table = {"table": f"new_{next(_numbers)}"}
    backend = PostgresBackend(url=url or database.url, **{**table, **options})
    try:
        with deadline(PATIENT):
            yield backend
    finally:
        backend.close()


def key_of(number: int) -> str:
    return f"eo1.0123456789abcdef.{number:064x}"


def entry_of(number: int, dtype: Dtype = "float32", **more: Any) -> Entry:
    row = np.random.default_rng(number).standard_normal((1, 8)).astype(np.float32)
    return Entry(freeze(round_vectors(row, dtype)[0]), 1_700_000_000.0 + number, dtype=dtype, **more)


def make_items() -> dict[str, Entry]:
    """Return entries of every dtype, with each part of a cost known and unknown, with and without metadata."""
    parts: list[dict[str, Any]] = [
        {},
        {"tokens": 12},
        {"seconds": 0.1},
        {"tokens": 0, "seconds": 0.0},
        {"tokens": MAX_TOKENS, "seconds": MAX_SECONDS},
    ]
    chosen = itertools.product(DTYPES, parts, [None, {"source": "a.md"}])
    items = {
        key_of(n): entry_of(n, dtype, metadata=metadata, **part) for n, (dtype, part, metadata) in enumerate(chosen)
    }
    # So many frames of the same size are decoded as a block, fewer are decoded one by one.
    return items | {key_of(n): entry_of(n, "int8", tokens=n) for n in range(100, 120)}


def drop_costs(items: Mapping[str, Entry]) -> dict[str, Entry]:
    return {key: entry._replace(tokens=None, seconds=None) for key, entry in items.items()}


def are_same(found: Mapping[str, Any], expected: Mapping[str, Entry]) -> bool:
    return found.keys() == expected.keys() and all(
        found[key][1:] == entry[1:]
        and found[key].vector.tobytes() == entry.vector.tobytes()
        and type(found[key].tokens) is type(entry.tokens)
        and type(found[key].seconds) is type(entry.seconds)
        for key, entry in expected.items()
    )


def call(backend: PostgresBackend, asynchronous: bool, method: str, *args: Any) -> Any:
    """Call a method of the backend or of its async twin."""
    if not asynchronous:
        return getattr(backend, method)(*args)

    async def call_twin() -> Any:
        twin = backend.twin()
        try:
            return await getattr(twin, method)(*args)
        finally:
            await twin.close()

    return asyncio.run(call_twin())


faces = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
columns = pytest.mark.parametrize("column", ["auto", "bytea"])


# --- new tables -------------------------------------------------------------------------------


@faces
@columns
def test_costs_are_kept_in_columns_of_their_own(database: Database, column: str, asynchronous: bool) -> None:
    items = make_items()
    with open_backend(database, column=column) as backend:
        call(backend, asynchronous, "set_many", items, None)
        assert are_same(call(backend, asynchronous, "get_many", list(items)), items)
        assert are_same(backend.get_many([key_of(4)]), {key_of(4): items[key_of(4)]})
        rows = database.run(f"SELECT key, tokens, seconds, frame FROM {backend.table}")
        assert {key: (tokens, seconds) for key, tokens, seconds, _ in rows} == {
            key: (entry.tokens, entry.seconds) for key, entry in items.items()
        }
        # Earlier versions of embedonce read only frames of version 1.
        assert {frame[4] for *_, frame in rows if frame is not None} == {1}


@columns
@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize("cost", [{"tokens": 12}, {"seconds": 0.5}, {"tokens": 12, "seconds": 0.5}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_entries_that_are_alike_are_read_as_one_batch(
    database: Database, column: str, count: int, cost: dict[str, Any], dtype: Dtype
) -> None:
    items = {key_of(n): entry_of(n, dtype, **cost) for n in range(count)}
    with open_backend(database, column=column) as backend:
        backend.set_many(items, None)
        assert are_same(backend.get_many(list(items)), items)


@columns
def test_a_replaced_entry_leaves_no_cost_behind(database: Database, column: str) -> None:
    key = key_of(1)
    items: list[Any] = [
        entry_of(1, tokens=5, seconds=0.5),
        entry_of(1, tokens=6),
        entry_of(1),
        entry_of(1, "int8", seconds=0.5),
        b"encrypted",
        entry_of(1, tokens=0),
    ]
    with open_backend(database, column=column) as backend:
        for item in items:
            backend.set_many({key: item}, None)
            if isinstance(item, Entry):
                assert are_same(backend.get_many([key]), {key: item})
            else:
                assert database.run(f"SELECT tokens, seconds FROM {backend.table}") == [(None, None)]


def test_a_row_whose_cost_would_not_change_is_not_written(database: Database) -> None:
    items = make_items()
    with open_backend(database) as backend:
        backend.set_many(items, None)
        before = database.run(f"SELECT key, ctid::text, xmin::text FROM {backend.table} ORDER BY key")
        backend.set_many(items, None)
        assert database.run(f"SELECT key, ctid::text, xmin::text FROM {backend.table} ORDER BY key") == before


def test_an_added_entry_has_its_cost(database: Database) -> None:
    item = {key_of(1): entry_of(1, tokens=5, seconds=0.5)}
    with open_backend(database) as backend:
        assert backend.add_many(item, 60.0) == {key_of(1)}
        assert are_same(backend.get_many([key_of(1)]), item)
        backend.clock_offset = 120.0
        item = {key_of(1): entry_of(1)}
        assert backend.add_many(item, 60.0) == {key_of(1)}
        assert are_same(backend.get_many([key_of(1)]), item)


@columns
@pytest.mark.parametrize("cost", [{"tokens": -2}, {"tokens": MAX_TOKENS + 1}, {"seconds": -1.0}, {"seconds": math.inf}])
def test_an_invalid_cost_in_a_row_is_corrupt_alone(database: Database, column: str, cost: dict[str, Any]) -> None:
    texts = [f"text {number}" for number in range(20)]
    with open_backend(database, column=column) as backend:
        tier = Tier(backend, name="shared", write="inline", timeout=PATIENT)
        with Cache(CountingProvider(), [tier]) as cache:
            cache.embed_batch(texts)
            ((name, value),) = cost.items()
            last = f"SELECT max(key) FROM {backend.table} WHERE dimensions = 8"
            database.run(f"UPDATE {backend.table} SET {name} = %s WHERE key = ({last})", (value,))
            assert sorted(cache.lookup(texts).sources, key=str) == [None, *["shared"] * 19]
            assert cache.stats().tiers["shared"].corrupt == 1


@pytest.mark.parametrize("cost", [{"tokens": -1}, {"tokens": 2**63}, {"seconds": math.nan}])
def test_an_entry_whose_cost_does_not_fit_is_named_by_its_key(database: Database, cost: dict[str, Any]) -> None:
    with open_backend(database) as backend:
        with pytest.raises(ValueError, match=rf"^{key_of(2)}: tokens must be an int from 0 to"):
            backend.set_many({key_of(1): entry_of(1), key_of(2): entry_of(2, **cost)}, None)
        assert backend.count("") == 0


@faces
def test_an_encrypted_cost_is_in_the_frame_alone(database: Database, asynchronous: bool) -> None:
    with open_backend(database) as backend:
        tier = Tier(backend, encryption=Encryption(os.urandom(32)), write="inline", timeout=PATIENT)
        with Cache(CountingProvider(), [tier]) as cache:
            vector = np.ones((1, cache.embed("other").size))
            cache.put(["text"], vector, costs=[Cost(tokens=123_456_789, seconds=0.5)])
            found = asyncio.run(cache.alookup(["text"])) if asynchronous else cache.lookup(["text"])
            assert found.sources == ["postgres"]
            assert cache.stats().saved.tokens == 123_456_789
        rows = database.run(f"SELECT tokens, seconds, frame FROM {backend.table}")
        assert {row[:2] for row in rows} == {(None, None)}
        assert not any((123_456_789).to_bytes(8, "little") in row[-1] for row in rows)


# --- tables of earlier versions ---------------------------------------------------------------


@faces
@pytest.mark.parametrize("vectors", [True, False])
def test_a_table_without_the_columns_is_used_without_costs(
    database: Database, vectors: bool, asynchronous: bool
) -> None:
    table, items = database.make_old_table(vectors=vectors), make_items()
    with open_backend(database, table=table, create=False) as backend:
        call(backend, asynchronous, "set_many", items, None)
        assert are_same(call(backend, asynchronous, "get_many", list(items)), drop_costs(items))
        assert backend.add_many({key_of(500): entry_of(500, tokens=1)}, 60.0) == {key_of(500)}
        rows = database.run(f"SELECT frame FROM {table} WHERE frame IS NOT NULL")
        assert {frame[4] for (frame,) in rows} == {1}
        assert "no columns for costs: run `embedonce migrate` to add them" in backend.describe()
    assert not database.list_columns(table) & {"tokens", "seconds"}


def test_migrate_adds_the_columns_to_an_old_table(database: Database) -> None:
    table, items = database.make_old_table(), make_items()
    with open_backend(database, table=table, create=False) as backend:
        backend.set_many(items, None)
        assert backend.migrate() == "added the columns for costs"
        assert backend.migrate() == f"the table {table!r} is up to date (schema 1)"
        assert are_same(backend.get_many(list(items)), drop_costs(items))
        backend.set_many(items, None)
        assert are_same(backend.get_many(list(items)), items)
        assert "costs" not in backend.describe()
    assert database.run(f"SELECT obj_description('{table}'::regclass)") == [("embedonce cache, schema 1",)]


def test_migrate_completes_a_table_that_has_one_of_the_columns(database: Database) -> None:
    table, items = database.make_old_table(), make_items()
    database.run(f"ALTER TABLE {table} ADD COLUMN tokens bigint")
    with open_backend(database, table=table, create=False) as backend:
        backend.set_many(items, None)
        assert are_same(backend.get_many(list(items)), drop_costs(items))
        assert backend.migrate() == "added the columns for costs"
        backend.set_many(items, None)
        assert are_same(backend.get_many(list(items)), items)


@faces
def test_the_first_use_adds_the_columns_if_the_role_owns_the_table(database: Database, asynchronous: bool) -> None:
    table, items = database.make_old_table(), make_items()
    with open_backend(database, table=table) as backend:
        assert call(backend, asynchronous, "get_many", list(items)) == {}
        assert database.list_columns(table) >= {"tokens", "seconds"}
        call(backend, asynchronous, "set_many", items, None)
        assert are_same(call(backend, asynchronous, "get_many", list(items)), items)


def test_a_role_that_does_not_own_the_table_uses_it_without_costs(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    table, items, role = database.make_old_table(), make_items(), f"costs_role_{os.getpid()}"
    database.run(f"CREATE ROLE {role} LOGIN")
    try:
        database.run(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO {role}")
        parts = urlsplit(database.url)
        url = parts._replace(netloc=f"{role}@{parts.hostname}:{parts.port}").geturl()
        with caplog.at_level(logging.WARNING), open_backend(database, url, table=table) as backend:
            backend.set_many(items, None)
            assert are_same(backend.get_many(list(items)), drop_costs(items))
            assert "costs" in backend.describe()
        assert caplog.records == []
        assert not database.list_columns(table) & {"tokens", "seconds"}
        with open_backend(database, table=table) as owner:
            owner.migrate()
        with open_backend(database, url, table=table) as backend:
            backend.set_many(items, None)
            assert are_same(backend.get_many(list(items)), items)
    finally:
        database.run(f"DROP OWNED BY {role}")
        database.run(f"DROP ROLE {role}")


def test_a_locked_table_is_used_without_costs(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    table, items = database.make_old_table(), make_items()
    # A dump locks the table like this while it runs. It prevents new columns, but neither reads nor writes.
    with psycopg.connect(database.url) as dump:
        dump.execute(f"LOCK TABLE {table} IN ACCESS SHARE MODE".encode())
        with caplog.at_level(logging.WARNING), open_backend(database, table=table) as backend:
            backend.set_many(items, None)
            assert are_same(backend.get_many(list(items)), drop_costs(items))
    (record,) = caplog.records
    assert "LockNotAvailable" in record.getMessage()
    assert "run `embedonce migrate`" in record.getMessage()
    with open_backend(database, table=table) as backend:
        backend.set_many(items, None)
        assert are_same(backend.get_many(list(items)), items)


# --- old and new processes together -----------------------------------------------------------

OLD_UPSERT = """
INSERT INTO {table} AS held
    (key, dtype, dimensions, created, expires, metadata, text_preview, kept_until, frame, embedding)
VALUES (%s, %s, 8, %s, NULL, NULL, NULL, NULL, %s, %s::vector)
ON CONFLICT (key) DO UPDATE SET frame = excluded.frame, dtype = excluded.dtype, dimensions = excluded.dimensions,
    created = excluded.created, expires = excluded.expires, metadata = excluded.metadata,
    text_preview = excluded.text_preview, kept_until = excluded.kept_until, embedding = excluded.embedding
"""
"""The statement with which a process without costs stores a row. It names no column for costs."""


def test_a_row_that_an_old_process_replaces_keeps_its_cost(database: Database) -> None:
    # The key names one text in one vector space, so the old cost is what computing the new vector costs too.
    with open_backend(database) as backend:
        backend.set_many({key_of(1): entry_of(1, tokens=5, seconds=0.5)}, None)
        replaced = entry_of(1)._replace(created=1_800_000_000.0)
        for key in (key_of(1), key_of(2)):
            values = (key, "float32", replaced.created, None, str(replaced.vector.tolist()))
            database.run(OLD_UPSERT.format(table=backend.table), values)
        expected = {key_of(1): replaced._replace(tokens=5, seconds=0.5), key_of(2): replaced}
        assert are_same(backend.get_many(list(expected)), expected)
        backend.set_many(expected | {key_of(2): replaced._replace(tokens=7)}, None)
        assert backend.get_many([key_of(2)])[key_of(2)].tokens == 7  # type: ignore[union-attr]


@columns
def test_an_old_process_finds_the_vectors_of_rows_with_costs(database: Database, column: str) -> None:
    items = make_items()
    with open_backend(database, column=column) as backend:
        backend.set_many(items, None)
        embedding = "embedding::text" if column == "auto" else "NULL"
        rows = database.run(f"SELECT key, frame, dtype, created, {embedding} FROM {backend.table}")
    for key, frame, dtype, created, embedding in rows:
        assert (dtype, created) == (items[key].dtype, items[key].created)
        if embedding is not None:
            assert np.array_equal(np.array(embedding[1:-1].split(","), np.float32), items[key].vector)
        else:
            (entry,) = decode_frames({key: frame}, now=0.0, dtype=dtype).entries.values()
            assert entry.vector.tobytes() == items[key].vector.tobytes()
