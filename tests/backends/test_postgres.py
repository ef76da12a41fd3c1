"""The Postgres backend: the contract for vectors and for frames, the table, roles, names, faults, forks."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

import numpy as np
import psycopg
import pytest
from psycopg import sql
from servers import PgBouncerServer, PostgresServer, wait_until

import embedonce
from embedonce import Cache, Tier
from embedonce.contracts import deadline
from embedonce.encryption import Encryption
from embedonce.errors import CacheClosed, ConfigError, TierBusy, TierError, TierTimeout
from embedonce.testing import BackendContract, CountingProvider, FaultProxy, NetworkFault, Recipe
from embedonce.testing.contracts.support import run_in_fork, run_in_threads
from embedonce.vectors import Dtype, Entry, freeze, round_vectors
from embedonce_backends.postgres import PostgresBackend, connections
from embedonce_backends.postgres import backend as postgres_backend
from embedonce_backends.postgres.exchange import execute, execute_async

SCOPE = "0123456789abcdef"
LONG = 60.0
"""Seconds within which a call to a healthy server ends on any machine, and so does a call with a short deadline."""

_names = (f"cache_{number}" for number in range(10**9))


def key_of(number: int) -> str:
    return f"eo1.{SCOPE}.{sha256(b'%d' % number).hexdigest()}"


def entry_of(number: int, dimensions: int = 8, *, dtype: Dtype = "float32", **rest: Any) -> Entry:
    row = np.random.default_rng(number).uniform(-1, 1, (1, dimensions)).astype(np.float32)
    return Entry(freeze(round_vectors(row, dtype)[0]), 1_700_000_000.25 + number, dtype=dtype, **rest)


def entries_of(numbers: range, dimensions: int = 8) -> dict[str, Entry]:
    return {key_of(number): entry_of(number, dimensions) for number in numbers}


def are_identical(found: Mapping[str, Any], stored: Mapping[str, Any]) -> bool:
    """Return whether the items are the are_identical, bit for bit."""
    return found.keys() == stored.keys() and all(
        found[key] == item
        if isinstance(item, bytes)
        else found[key].vector.tobytes() == item.vector.tobytes() and found[key][1:] == item[1:]
        for key, item in stored.items()
    )


class Database:
    """A database for these tests; ``run`` uses a connection that does not belong to the backend."""

    def __init__(self, server: str, name: str) -> None:
        self.server = server
        self.name = name
        self.url = urlsplit(server)._replace(path=f"/{name}").geturl()

    def run(self, statement: Any, *values: object) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(statement, values or None)
            return cursor.fetchall() if cursor.description else []

    def url_of(self, user: str, address: str | None = None) -> str:
        """Return the database's URL for another user or through a proxy."""
        parts = urlsplit(self.url)
        return parts._replace(netloc=f"{user}@{address or f'{parts.hostname}:{parts.port}'}").geturl()

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        return parts.hostname, parts.port or 5432


@contextmanager
def create_database(server: str, *, vectors: bool) -> Iterator[Database]:
    name = f"embedonce_test_{os.getpid()}_{next(_names)}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    database = Database(server, name)
    if vectors:
        database.run("CREATE EXTENSION vector")
    try:
        yield database
    finally:
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture(scope="module")
def database(postgres_server: Any) -> Iterator[Database]:
    """A database with pgvector."""
    with create_database(postgres_server.url, vectors=True) as made:
        yield made


@pytest.fixture(scope="module")
def plain_database(postgres_server: Any) -> Iterator[Database]:
    """A database without pgvector."""
    with create_database(postgres_server.url, vectors=False) as made:
        yield made


@contextmanager
def open_backend(url: str, **options: Any) -> Iterator[PostgresBackend]:
    backend = PostgresBackend(url=url, **{"table": next(_names), **options})
    try:
        yield backend
    finally:
        backend.close()


@pytest.fixture
def backend(database: Database) -> Iterator[PostgresBackend]:
    with open_backend(database.url) as made:
        yield made


def table_of(backend: PostgresBackend) -> sql.Composable:
    return sql.Identifier(backend.schema, backend.table)


def rows_of(database: Database, backend: PostgresBackend, columns: str) -> list[tuple[Any, ...]]:
    statement = sql.SQL("SELECT {} FROM {} ORDER BY key").format(sql.SQL(columns), table_of(backend))
    return database.run(statement)


# --- the contract -------------------------------------------------------------------------------


class PostgresContract(BackendContract):
    examples = 15
    holds: ClassVar[Literal["frames", "entries"]]
    column: ClassVar[Literal["auto", "bytea"]] = "auto"

    @pytest.fixture(autouse=True)
    def _own_database(self, database: Database) -> None:
        self.database = database
        self.made: list[PostgresBackend] = []

    def make(self) -> PostgresBackend:
        return self.make_backend(next(_names))

    def make_backend(self, table: str, clock_offset: float = 0.0, url: str = "") -> PostgresBackend:
        backend = PostgresBackend(url=url or self.database.url, table=table, column=self.column, max_connections=4)
        backend.capabilities = replace(backend.capabilities, holds=self.holds)
        backend.clock_offset = clock_offset
        self.made.append(backend)
        return backend

    def reopen(self, backend: PostgresBackend) -> PostgresBackend:
        return self.make_backend(backend.table, backend.clock_offset)

    def server(self) -> tuple[str, int]:
        return self.database.address

    def through(self, backend: PostgresBackend, host: str, port: int) -> PostgresBackend:
        user = urlsplit(self.database.url).netloc.rpartition("@")[0]
        return self.make_backend(backend.table, url=self.database.url_of(user, f"{host}:{port}"))

    def advance(self, seconds: float) -> None:
        for backend in self.made:
            backend.clock_offset += seconds

    @contextmanager
    def stall(self, backend: PostgresBackend) -> Iterator[None]:
        with lock_table(self.database, backend):
            yield


class TestVectors(PostgresContract):
    """Entries, in a pgvector column if they fit."""

    holds = "entries"
    dimensions = (8, 1, 384, 3072, 16_000, 16_001)


class TestEntriesInBytea(PostgresContract):
    """Entries in a database without pgvector."""

    holds = "entries"

    @pytest.fixture(autouse=True)
    def _own_database(self, plain_database: Database) -> None:
        self.database = plain_database
        self.made = []


class TestEntriesInByteaByOption(PostgresContract):
    """Entries in a database with pgvector, which the option turns off."""

    holds = "entries"
    column = "bytea"


class TestFrames(PostgresContract):
    """Bytes, as an encrypted tier stores them."""

    holds = "frames"

    def recipe(self, backend: PostgresBackend) -> Recipe:
        return Recipe(PostgresBackend, {"url": self.database.url, "table": backend.table})


# --- the columns --------------------------------------------------------------------------------


def test_a_mixed_batch_goes_to_the_column_of_each(database: Database, backend: PostgresBackend) -> None:
    expires = 4_102_444_800.5
    items: dict[str, Any] = {
        key_of(0): entry_of(0),
        key_of(1): entry_of(1, 384, expires=expires),
        key_of(2): entry_of(2, dtype="float16", metadata={"source": "a.md", "n": 1e16, "NUL": "\0", "no": -0.0}),
        key_of(3): entry_of(3, dtype="int8"),
        key_of(4): entry_of(4, 16_000),
        key_of(5): entry_of(5, 16_001),
        key_of(6): b"encrypted",
        key_of(7): entry_of(7, metadata={"source": "b.md", "unpaired": "\ud800", "ä": "🧪"}),
        f"eo1.card.{SCOPE}": entry_of(8, 0, metadata={"model": "m"}),
    }
    backend.set_many(items, None)
    found = backend.get_many(list(items))
    assert are_identical(found, items)
    assert all(not item.vector.flags.writeable for item in found.values() if isinstance(item, Entry))
    nested = found[key_of(2)].metadata  # type: ignore[union-attr]
    assert nested is not None
    assert type(nested["n"]) is float
    assert str(nested["no"]) == "-0.0"

    kind = "CASE WHEN embedding IS NOT NULL THEN 'vector' END, frame IS NOT NULL"
    rows = rows_of(database, backend, f"key, {kind}, dtype, dimensions, created, expires, metadata::text, scope")
    held = {row[0]: row[1:] for row in rows}
    at = 1_700_000_000.25
    assert held[key_of(0)] == ("vector", False, "float32", 8, at, None, None, SCOPE)
    assert held[key_of(1)] == ("vector", False, "float32", 384, at + 1, expires, None, SCOPE)
    assert held[key_of(3)] == (None, True, "int8", 8, at + 3, None, None, SCOPE)
    assert held[key_of(4)][:4] == ("vector", False, "float32", 16_000)
    assert held[key_of(5)][:4] == (None, True, "float32", 16_001)
    assert held[key_of(6)] == (None, True, None, None, None, None, None, SCOPE)
    assert held[f"eo1.card.{SCOPE}"] == (None, True, "float32", 0, at + 8, None, '{"model":"m"}', SCOPE)


def test_a_replaced_item_leaves_nothing_in_its_row(database: Database, backend: PostgresBackend) -> None:
    key = key_of(1)
    for item in (entry_of(1, metadata={"a": 1}), b"frame", entry_of(2, dtype="int8"), entry_of(3), b"frame"):
        backend.set_many({key: item}, 60.0 if isinstance(item, bytes) else None)
        assert are_identical(backend.get_many([key]), {key: item})
    plain = rows_of(database, backend, "embedding, dtype, dimensions, created, expires, metadata, text_preview")
    assert plain == [(None,) * 7]
    with open_backend(database.url, table=backend.table, column="bytea") as other:
        backend.set_many({key: entry_of(4)}, None)
        other.set_many({key: entry_of(5)}, None)
        assert are_identical(backend.get_many([key]), {key: entry_of(5)})
        backend.set_many({key: entry_of(6)}, None)
        assert are_identical(other.get_many([key]), {key: entry_of(6)})


def test_zero_and_minus_zero_are_different_vectors(backend: PostgresBackend) -> None:
    for zero in (0.0, -0.0):
        entry = Entry(freeze([zero, 1.0]), 1.0)
        backend.set_many({key_of(1): entry}, None)
        assert are_identical(backend.get_many([key_of(1)]), {key_of(1): entry})


def test_a_row_that_would_not_change_is_not_written(database: Database, backend: PostgresBackend) -> None:
    items = {**entries_of(range(20)), key_of(50): b"frame", key_of(51): entry_of(51, metadata={"a": 1})}
    backend.set_many(items, None)
    before = rows_of(database, backend, "key, ctid::text, xmin::text")
    backend.set_many(items, None)
    assert rows_of(database, backend, "key, ctid::text, xmin::text") == before


def test_an_encrypted_tier_stores_nothing_readable_beside_its_frames(database: Database) -> None:
    with open_backend(database.url) as backend:
        tier = Tier(backend, encryption=Encryption(os.urandom(32)), write="inline", ttl=3600, timeout=LONG)
        with Cache(CountingProvider(), [tier]) as cache:
            cache.put(["secret text"], [np.ones(cache.embed("other").size)], metadata=[{"text_preview": "secret text"}])
            assert cache.fetch(["secret text"]).sources == ["postgres"]
        columns = "embedding, dtype, dimensions, created, expires, metadata, text_preview"
        rows = rows_of(database, backend, f"{columns}, frame")
        assert {row[:-1] for row in rows} == {(None,) * 7}
        assert not any(b"secret" in row[-1] for row in rows)
        assert {row for row in rows_of(database, backend, "kept_until IS NULL")} == {
            (False,),
            (True,),
        }  # the space card has no expiry


def test_a_preview_is_stored_only_with_its_option(database: Database) -> None:
    items = {
        key_of(0): entry_of(0, metadata={"text_preview": "How do I\0 reset", "source": "a"}),
        key_of(1): entry_of(1, dtype="int8", metadata={"text_preview": "the beginning"}),
    }
    with open_backend(database.url, text_preview=True) as backend:
        backend.set_many(items, None)
        columns = "text_preview, metadata::text"
        assert sorted(rows_of(database, backend, columns)) == [
            ("How do I\ufffd reset", '{"source":"a"}'),
            ("the beginning", "{}"),
        ]
        found = backend.get_many(list(items))
        assert found[key_of(1)].metadata == {"text_preview": "the beginning"}  # type: ignore[union-attr]
    with open_backend(database.url) as backend:
        backend.set_many(items, None)
        assert sorted(rows_of(database, backend, columns)) == [(None, '{"source":"a"}'), (None, "{}")]
        whole = database.run(sql.SQL("SELECT t::text FROM {} AS t").format(table_of(backend)))
        assert not any("reset" in row or b"reset".hex() in row for (row,) in whole)


def test_an_item_that_cannot_be_stored_is_named_by_its_key(backend: PostgresBackend) -> None:
    bad = entry_of(1, metadata={"a": {"text that must not be shown"}})
    with pytest.raises(TypeError, match=key_of(1)) as caught:
        backend.set_many({key_of(1): bad}, None)
    assert "shown" not in str(caught.value)


def test_damaged_rows_are_corrupt_and_replaced(database: Database) -> None:
    provider = CountingProvider(dimensions=8)
    with (
        open_backend(database.url) as backend,
        Cache(provider, [Tier(backend, write="inline", timeout=LONG)]) as cache,
    ):
        wanted = cache.embed_batch(["a", "b", "c"])
        space = sql.SQL("UPDATE {} SET embedding = '[1,2]' WHERE dimensions = 8").format(table_of(backend))
        database.run(space)
        assert np.array_equal(cache.embed_batch(["a", "b", "c"]), wanted)
        assert cache.stats().tiers["postgres"].corrupt == 3
        assert cache.fetch(["a", "b", "c"]).sources == ["postgres"] * 3


def test_a_damaged_frame_is_corrupt(database: Database) -> None:
    with open_backend(database.url, column="bytea") as backend:
        provider = CountingProvider(dimensions=8)
        with Cache(provider, [Tier(backend, write="inline", timeout=LONG)]) as cache:
            wanted = cache.embed("a")
            damage = "UPDATE {} SET frame = set_byte(frame, 70, get_byte(frame, 70) # 1) WHERE dimensions = 8"
            database.run(sql.SQL(damage).format(table_of(backend)))
            assert np.array_equal(cache.embed("a"), wanted)
            assert cache.stats().tiers["postgres"].corrupt == 1


# --- statements ---------------------------------------------------------------------------------


def test_a_batch_is_one_query_by_the_index(database: Database, backend: PostgresBackend) -> None:
    items = entries_of(range(3000), 96)
    backend.set_many(items, None)
    database.run(sql.SQL("VACUUM ANALYZE {}").format(table_of(backend)))
    statement = backend.get_statements().get
    keys = list(items)[:256]
    with psycopg.connect(database.url, cursor_factory=psycopg.RawCursor) as connection:
        plan = "\n".join(row for (row,) in connection.execute(b"EXPLAIN " + statement, (keys,)))
    assert "_pkey" in plan
    assert "Seq Scan" not in plan
    counts = sql.SQL("SELECT idx_scan > 0, seq_scan FROM pg_stat_user_tables WHERE relname = {}")
    backend._run(b"SELECT pg_stat_force_next_flush()")
    ((_, before),) = database.run(counts.format(backend.table))
    assert are_identical(backend.get_many(keys), {key: items[key] for key in keys})
    backend.delete_many(keys)
    assert list(backend.scan(keys[0])) == []
    assert backend.add_many({keys[0]: b"x"}, None) == {keys[0]}
    backend._run(b"SELECT pg_stat_force_next_flush()")
    assert database.run(counts.format(backend.table))[0] == (True, before)


def test_one_statement_per_call_and_nothing_prepared(database: Database, backend: PostgresBackend) -> None:
    """A transaction pooler requires that no prepared statement, setting or open transaction remains."""
    items = entries_of(range(300))
    for _ in range(10):
        backend.set_many(items, 60.0)
        backend.get_many(list(items))
        backend.add_many(items, None)
    connection = backend._pool.take()
    try:
        assert connection.execute(b"SELECT count(*) FROM pg_prepared_statements").fetchone() == (0,)
        changed = b"SELECT name FROM pg_settings WHERE source = 'session'"
        assert connection.execute(changed).fetchall() == []
        assert connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
    finally:
        backend._pool.give(connection)
    activity = (
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'embedonce' AND datname = %s AND query LIKE %s"
    )
    assert database.run(activity, database.name, f"%{backend.table}%")[0][0] <= 1


def test_writers_of_the_same_rows_do_not_deadlock(backend: PostgresBackend) -> None:
    """Each writer has its own order of keys. If rows were locked in that order, Postgres would report deadlocks."""
    keys = [key_of(number) for number in range(300)]

    def work(number: int) -> None:
        chance = np.random.default_rng(number)
        for turn in range(10):
            shuffled = [keys[place] for place in chance.permutation(len(keys))]
            backend.set_many({key: b"%d %d" % (number, turn) for key in shuffled}, None)
            backend.delete_many(shuffled[:100])

    run_in_threads(6, work, "set_many of the are_identical rows")


def test_expired_rows_are_deleted_a_thousand_at_a_time(
    database: Database, backend: PostgresBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_backend, "SWEEP_EVERY", 100)
    backend.set_many({key_of(number): b"old" for number in range(2500)}, 60.0)
    backend.set_many({key_of(5000): b"stays"}, None)
    backend.clock_offset += 61
    assert backend.get_many([key_of(1)]) == {}
    left = []
    for turn in range(4):
        backend.set_many({key_of(10_000 + 100 * turn + number): b"new" for number in range(100)}, 60.0)
        left.append(len([row for row in rows_of(database, backend, "frame") if row == (b"old",)]))
    assert left == [1500, 500, 0, 0]
    assert backend.get_many([key_of(5000)]) == {key_of(5000): b"stays"}
    plan = "\n".join(row for (row,) in database.run(_make_explain(backend.get_statements().sweep)))
    assert "kept_until_idx" in plan or "Seq Scan" in plan  # the table is so small that either may be chosen


def _make_explain(statement: bytes) -> bytes:
    return b"EXPLAIN " + statement.replace(b"$1", b"0")


def test_the_write_succeeds_although_deleting_expired_rows_fails(
    database: Database, backend: PostgresBackend, caplog: pytest.LogCaptureFixture
) -> None:
    backend.set_many({key_of(1): b"old"}, 60.0)
    name = table_of(backend)
    refuse = "CREATE FUNCTION {0}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$"
    function = sql.Identifier(f"refuse_{backend.table}")
    database.run(sql.SQL(refuse).format(function))
    trigger = "CREATE TRIGGER refuse BEFORE DELETE ON {} FOR EACH STATEMENT EXECUTE FUNCTION {}()"
    database.run(sql.SQL(trigger).format(name, function))
    with caplog.at_level(logging.WARNING, "embedonce.postgres"):
        backend.set_many({key_of(number): b"new" for number in range(2, 1500)}, None)
    assert [record.getMessage() for record in caplog.records] == [
        "could not delete expired rows (RaiseException); retrying after later writes"
    ]
    assert backend.get_many([key_of(1400)]) == {key_of(1400): b"new"}


def test_leases_use_the_clock_of_the_server(database: Database, backend: PostgresBackend) -> None:
    assert backend.add_many({key_of(1): b"ours"}, 60.0) == {key_of(1)}
    ((left,),) = rows_of(database, backend, "kept_until - extract(epoch FROM now())")
    assert 0 < left <= 60


# --- the table ----------------------------------------------------------------------------------


def test_a_new_backend_does_not_connect() -> None:
    with open_backend("postgresql://user:hush@192.0.2.1:1/none") as backend:
        assert "hush" not in repr(backend)


@pytest.mark.parametrize(
    "url", ["postgresql://user:hush@[host/db", "hush", "postgresql://h/db?hush=1", "a=hush", "mysql://u:hush@h/db"]
)
def test_an_invalid_url_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ConfigError, match="url is not a Postgres URL") as caught:
        PostgresBackend(url=url)
    assert "hush" not in str(caught.value)
    assert caught.value.__context__ is None  # a context's message could repeat the URL


@pytest.mark.parametrize("name", ["", "a" * 64, "ä" * 32, "a\0b"])
def test_a_name_that_postgres_would_change_is_refused(name: str) -> None:
    for option in ("table", "schema"):
        with pytest.raises(ConfigError, match=f"{option} must be a name of 1 to 63 bytes"):
            PostgresBackend(url="postgresql:///x", **{option: name})


@pytest.mark.parametrize(
    "name", ["Odd Name", 'quo"te', "semi;colon--", "per%cent %s {}", "$1", "ü" * 31, "select", "a.b", "\\", "it's"]
)
def test_odd_names_are_quoted(database: Database, name: str) -> None:
    with open_backend(database.url, table=name, schema=f"{name[:30]}s") as backend:
        items = {**entries_of(range(3)), key_of(4): b"frame"}
        backend.set_many(items, 60.0)
        assert are_identical(backend.get_many(list(items)), items)
        assert backend.add_many(items, None) == set()
        assert set(backend.scan("eo1.")) == set(items)
        assert backend.count("") == 4
        backend.delete_many(list(items))
        assert backend.count("") == 0
        assert "pgvector" in backend.describe()
        assert "is up to date" in backend.migrate()
        assert rows_of(database, backend, "count(*) OVER ()") == []


def test_migrate_says_what_it_does_and_does_it_once(database: Database, plain_database: Database) -> None:
    with open_backend(database.url, table="migrated", schema="its own") as backend:
        assert backend.describe() == "no table yet"
        assert backend.migrate() == "made the schema 'its own', made the table 'migrated', added the vector column"
        assert backend.migrate() == "the table 'migrated' is up to date (schema 1)"
        assert backend.describe().startswith("pgvector 0.")
    with open_backend(plain_database.url, table="migrated") as backend:
        backend.set_many(entries_of(range(3)), None)
        assert backend.describe() == "bytea: pgvector is not installed in this database (CREATE EXTENSION vector)"
    with open_backend(plain_database.url, table="migrated", column="bytea") as backend:
        assert backend.describe() == 'bytea (column = "bytea")'


@pytest.mark.parametrize(
    ("vectors", "column", "detail"),
    [
        (True, "auto", "pgvector 0."),
        (True, "bytea", 'bytea (column = "bytea")'),
        (False, "auto", "bytea: pgvector is not installed in this database"),
    ],
)
def test_check_says_which_column_stores_the_vectors(
    database: Database, plain_database: Database, tmp_path: Path, vectors: bool, column: str, detail: str
) -> None:
    url = (database if vectors else plain_database).url
    config = tmp_path / "embedonce.toml"
    config.write_text(
        f'[provider]\ntype = "ngram"\n[[tiers]]\ntype = "postgres"\nurl = "{url}"\n'
        f'table = "{next(_names)}"\ncolumn = "{column}"\ntimeout = "60s"\n'
    )
    command = [sys.executable, "-m", "embedonce", "check", "--json", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (tier,) = json.loads(done.stdout)["tiers"]
    assert tier["ok"]
    assert tier["detail"].startswith(detail)


def test_migrate_adds_the_vector_column_to_a_table_made_without_pgvector(postgres_server: Any) -> None:
    with create_database(postgres_server.url, vectors=False) as database:
        with open_backend(database.url, table="later") as backend:
            backend.set_many({key_of(1): entry_of(1)}, None)
            database.run("CREATE SCHEMA elsewhere")
            database.run("CREATE EXTENSION vector SCHEMA elsewhere")
            assert "`embedonce migrate`" in backend.describe()
            assert backend.migrate() == "added the vector column"
            backend.set_many({key_of(2): entry_of(2)}, None)
            assert are_identical(
                backend.get_many([key_of(1), key_of(2)]), {key_of(1): entry_of(1), key_of(2): entry_of(2)}
            )
            assert rows_of(database, backend, "embedding IS NULL") in ([(True,), (False,)], [(False,), (True,)])
        with open_backend(database.url, table="new", column="vector") as backend:
            backend.set_many({key_of(1): entry_of(1)}, None)
            assert rows_of(database, backend, "embedding IS NULL") == [(False,)]


def test_a_vector_column_installs_pgvector_if_permitted(postgres_server: Any) -> None:
    with (
        create_database(postgres_server.url, vectors=False) as database,
        open_backend(database.url, column="vector") as backend,
    ):
        assert "installed the extension vector" in backend.migrate()
        backend.set_many({key_of(1): entry_of(1)}, None)
        assert rows_of(database, backend, "embedding IS NULL") == [(False,)]


def test_another_programs_table_is_left_alone(database: Database) -> None:
    database.run("CREATE TABLE foreign_one (id integer)")
    with open_backend(database.url, table="foreign_one") as backend:
        for call in (lambda: backend.get_many([key_of(1)]), backend.migrate):
            with pytest.raises(TierError, match="did not make"):
                call()
    assert database.run("SELECT * FROM foreign_one") == []


def test_a_table_of_a_later_embedonce_is_left_alone(database: Database, backend: PostgresBackend) -> None:
    backend.migrate()
    database.run(sql.SQL("COMMENT ON TABLE {} IS 'embedonce cache, schema 2'").format(table_of(backend)))
    with pytest.raises(TierError, match="supports only 1: upgrade embedonce"):
        backend.get_many([key_of(1)])


def test_a_table_that_was_dropped_or_altered_is_inspected_again(database: Database, backend: PostgresBackend) -> None:
    backend.set_many({key_of(1): entry_of(1)}, None)
    database.run(sql.SQL("DROP TABLE {}").format(table_of(backend)))
    with pytest.raises(psycopg.errors.UndefinedTable):
        backend.get_many([key_of(1)])
    assert backend.get_many([key_of(1)]) == {}
    backend.set_many({key_of(1): entry_of(1)}, None)
    database.run(sql.SQL("ALTER TABLE {} DROP COLUMN embedding").format(table_of(backend)))
    with pytest.raises(psycopg.errors.UndefinedColumn):
        backend.set_many({key_of(2): entry_of(2)}, None)
    backend.set_many({key_of(2): entry_of(2)}, None)
    assert are_identical(backend.get_many([key_of(2)]), {key_of(2): entry_of(2)})


def test_without_create_only_migrate_makes_the_table(database: Database) -> None:
    with open_backend(database.url, create=False) as backend:
        with pytest.raises(TierError, match="embedonce migrate"):
            backend.set_many({key_of(1): b"x"}, None)
        backend.migrate()
        backend.set_many({key_of(1): b"x"}, None)


@pytest.fixture
def role(database: Database) -> Iterator[str]:
    """A role that may connect but has no other privilege."""
    name = f"embedonce_reader_{os.getpid()}"
    database.run(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'hush'").format(sql.Identifier(name)))
    yield name
    database.run(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(name)))


def test_a_role_that_may_not_make_tables_can_use_an_existing_one(
    database: Database, backend: PostgresBackend, role: str
) -> None:
    items = {**entries_of(range(5)), key_of(9): b"frame"}
    with open_backend(database.url_of(role), table=backend.table) as limited:
        with pytest.raises(TierError, match="lacks the privileges to add what is missing: run `embedonce migrate`"):
            limited.set_many(items, None)
        backend.migrate()
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            limited.get_many(list(items))
        grant = sql.SQL("GRANT SELECT, INSERT, UPDATE, DELETE ON {} TO {}")
        database.run(grant.format(table_of(backend), sql.Identifier(role)))
        limited.set_many(items, 60.0)
        assert are_identical(limited.get_many(list(items)), items)
        assert limited.add_many(items, None) == set()
        limited.delete_many([key_of(9)])
        assert limited.count("") == 5
        assert "pgvector" in limited.describe()
        assert "up to date" in limited.migrate()


def test_four_processes_migrate_at_once(database: Database, tmp_path: Path) -> None:
    script = tmp_path / "migrate.py"
    script.write_text(
        "import sys\n"
        "from embedonce_backends.postgres import PostgresBackend\n"
        "backend = PostgresBackend(url=sys.argv[1], table='by four', schema='of four')\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "print(backend.migrate())\n"
        "backend.set_many({'eo1.a.' + sys.argv[2]: b'x'}, None)\n"
        "backend.close()\n"
    )
    children = [
        subprocess.Popen(
            [sys.executable, str(script), database.url, str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    outputs = [child.communicate(timeout=LONG) for child in children]
    assert [error for _, error in outputs] == [""] * 4
    assert sum("made the table" in output for output, _ in outputs) == 1
    assert sum("up to date" in output for output, _ in outputs) == 3
    assert database.run('SELECT count(*) FROM "of four"."by four"') == [(4,)]


def test_threads_whose_first_writes_coincide_make_one_table(database: Database, backend: PostgresBackend) -> None:
    run_in_threads(8, lambda number: backend.set_many({key_of(number): b"x"}, None), "the first eight writes")
    assert backend.count("") == 8


def test_errors_do_not_show_the_password_of_the_url(database: Database) -> None:
    host, port = database.address
    for user in ("nobody:hush", "postgres:hush"):
        with open_backend(f"postgresql://{user}@{host}:{port}/no_such_database") as backend:
            with pytest.raises(psycopg.OperationalError) as caught:
                backend.get_many([key_of(1)])
            assert "hush" not in str(caught.value) + repr(caught.value)


# --- deadlines and faults -----------------------------------------------------------------------


@pytest.fixture
def proxy(database: Database) -> Iterator[FaultProxy]:
    with FaultProxy(*database.address) as made:
        yield made


@pytest.fixture
def proxied_backend(database: Database, proxy: FaultProxy) -> Iterator[PostgresBackend]:
    """A backend that reaches its server through a proxy; 40 entries of 384 dimensions are stored."""
    with open_backend(database.url_of("postgres", proxy.url_port), max_connections=2) as made:
        made.set_many(entries_of(range(40), 384), None)
        yield made


HANGS = {
    "black hole": NetworkFault("black_hole"),
    "a byte at a time": NetworkFault("bandwidth", bytes_per_second=20),
    "replies do not come": NetworkFault("black_hole", direction="replies"),
    "half open": NetworkFault("half_open"),
}
BREAKS = {
    "refused": NetworkFault("refuse"),
    "reset": NetworkFault("reset"),
    "reset in a reply": NetworkFault("reset", after=3000),
    "cut in a reply": NetworkFault("cut", after=3000),
    "garbage": NetworkFault("garbage"),
    "garbage in a reply": NetworkFault("garbage", after=500),
}


@pytest.mark.parametrize("connected", [True, False], ids=["connected", "connecting"])
@pytest.mark.parametrize("fault", HANGS)
def test_a_call_to_a_server_that_hangs_ends_by_its_deadline(
    proxied_backend: PostgresBackend, proxy: FaultProxy, fault: str, connected: bool
) -> None:
    items = entries_of(range(40), 384)
    if not connected:
        if fault == "half open":
            pytest.skip("only an existing connection can be half open")
        drop_idle_connection(proxied_backend)
    proxy.fault = HANGS[fault]
    for call in (
        lambda: proxied_backend.get_many(list(items)),
        lambda: proxied_backend.set_many(entries_of(range(40, 80), 384), None),
    ):
        start = time.monotonic()
        with deadline(0.3), pytest.raises(TimeoutError):
            call()
        assert time.monotonic() - start < LONG
        if fault == "half open":
            break  # the next call makes a new connection, which works
    proxy.heal()
    with deadline(LONG):
        assert are_identical(proxied_backend.get_many(list(items)), items)


def drop_idle_connection(backend: PostgresBackend) -> None:
    connection = backend._pool.take()
    backend._pool.drop(connection)


@pytest.mark.parametrize("fault", BREAKS)
def test_a_call_over_a_broken_connection_raises_and_the_next_one_works(
    proxied_backend: PostgresBackend, proxy: FaultProxy, fault: str
) -> None:
    items = entries_of(range(40), 384)
    proxy.fault = BREAKS[fault]
    for _ in range(3):
        with deadline(LONG), pytest.raises((psycopg.Error, TimeoutError)):
            proxied_backend.get_many(list(items))
    proxy.heal()
    with deadline(LONG):
        assert are_identical(proxied_backend.get_many(list(items)), items)
        proxied_backend.set_many(entries_of(range(80), 384), None)
        assert are_identical(proxied_backend.get_many([key_of(70)]), {key_of(70): entry_of(70, 384)})


def test_a_connection_that_takes_longer_than_the_deadline_serves_a_later_call(
    database: Database, proxy: FaultProxy
) -> None:
    with open_backend(database.url_of("postgres", proxy.url_port), max_connections=1) as backend:
        backend.set_many({key_of(1): b"x"}, None)
        drop_idle_connection(backend)
        before = proxy.accepted
        proxy.fault = NetworkFault("black_hole", direction="replies")
        for _ in range(2):
            with deadline(0.2), pytest.raises(TierTimeout):
                backend.get_many([key_of(1)])
        proxy.heal()
        with deadline(LONG):
            assert backend.get_many([key_of(1)]) == {key_of(1): b"x"}
        assert proxy.accepted - before == 1


@pytest.mark.skipif(not psycopg.capabilities.has_cancel_safe(), reason="libpq before 17 cannot cancel without blocking")
def test_the_query_of_a_call_that_timed_out_is_cancelled(
    database: Database, backend: PostgresBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "CANCEL_SECONDS", LONG)
    backend.set_many({key_of(1): b"x"}, None)
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = %s"
    with lock_table(database, backend):
        with deadline(0.2), pytest.raises(TierTimeout):
            backend.set_many({key_of(1): b"y"}, None)
        end = time.monotonic() + LONG
        while database.run(waiting, database.name) != [(0,)] and time.monotonic() < end:
            time.sleep(0.01)
        assert database.run(waiting, database.name) == [(0,)]
    assert backend.get_many([key_of(1)]) == {key_of(1): b"x"}


def test_an_exhausted_pool_raises_busy(database: Database) -> None:
    with open_backend(database.url, max_connections=2) as backend:
        backend.set_many({key_of(1): b"x"}, None)
        lent = [backend._pool.take() for _ in range(2)]
        with deadline(0.2), pytest.raises(TierBusy, match="max_connections = 2"):
            backend.get_many([key_of(1)])
        waiting = threading.Timer(0.05, lambda: backend._pool.give(lent.pop()))
        waiting.start()
        with deadline(LONG):
            assert backend.get_many([key_of(1)]) == {key_of(1): b"x"}
        waiting.join()
        backend._pool.give(lent.pop())


def test_a_server_that_does_not_answer_raises_a_timeout_not_busy(
    proxied_backend: PostgresBackend, proxy: FaultProxy
) -> None:
    drop_idle_connection(proxied_backend)
    proxy.fault = NetworkFault("black_hole")
    errors: list[BaseException] = []

    def ask(_: int) -> None:
        try:
            with deadline(0.3):
                proxied_backend.get_many([key_of(1)])
        except Exception as error:
            errors.append(error)

    run_in_threads(6, ask, "get_many of a server that does not answer")
    assert [type(error) for error in errors] == [TierTimeout] * 6


def test_the_pool_opens_at_most_max_connections(database: Database) -> None:
    with open_backend(database.url, max_connections=3) as backend:
        backend.set_many({key_of(1): b"x"}, None)
        run_in_threads(12, lambda _: [backend.get_many([key_of(1)]) for _ in range(20)] and None, "twelve threads")
        assert len(backend._pool._idle) <= 3
        assert backend._pool._open_count == len(backend._pool._idle)


def test_no_thread_starves_if_the_pool_is_too_small(database: Database) -> None:
    with open_backend(database.url, max_connections=1) as backend:
        backend.set_many({key_of(1): b"x"}, None)
        turns = [0] * 4

        def work(number: int) -> None:
            while min(turns) < 20:
                with deadline(LONG / 2):
                    backend.get_many([key_of(1)])
                turns[number] += 1

        run_in_threads(4, work, "four threads with one connection")


def end_sessions(database: Database, backend: PostgresBackend) -> None:
    """Let the server end the sessions in which the backend has run a statement on its table or waits for it."""
    database.run(
        "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE strpos(query, %s) > 0"
        " AND left(query, 4) <> 'LOCK' AND pid <> pg_backend_pid()",
        f'"{backend.table}"',
    )


STATEMENTS = {"small": (), "large": (b"x" * 20_000,)}
"""The parameters of a statement that libpq sends at once, and of one that it sends in parts."""


@pytest.mark.parametrize("size", STATEMENTS)
def test_the_reason_is_known_if_the_server_has_ended_an_idle_session(
    database: Database, backend: PostgresBackend, size: str
) -> None:
    values = STATEMENTS[size]
    statement = b"SELECT length($1::bytea)" if values else b"SELECT 1"
    backend.set_many({key_of(1): b"x"}, None)
    connection = backend._pool.take()
    end_sessions(database, backend)
    with deadline(LONG), pytest.raises(psycopg.errors.AdminShutdown):
        execute(connection, statement, values)
    backend._pool.drop(connection)
    assert backend.get_many([key_of(1)]) == {key_of(1): b"x"}

    async def use_twin() -> None:
        twin = backend.twin()
        await twin.get_many([key_of(1)])
        connection = await twin._pool.take()
        end_sessions(database, backend)
        with pytest.raises(psycopg.errors.AdminShutdown):
            await execute_async(connection, statement, values)
        twin._pool.drop(connection)
        assert await twin.get_many([key_of(1)]) == {key_of(1): b"x"}
        await twin.close()

    asyncio.run(use_twin())


@pytest.mark.parametrize("is_async", [False, True], ids=["blocking", "twin"])
def test_the_reason_is_known_if_the_server_ends_a_session_while_a_statement_runs(
    database: Database, backend: PostgresBackend, is_async: bool
) -> None:
    backend.set_many({key_of(1): b"x"}, None)
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = %s"

    def end_waiting_session() -> None:
        wait_until(lambda: database.run(waiting, database.name) == [(1,)], "the statement waits for the lock")
        end_sessions(database, backend)

    async def read_by_twin() -> None:
        twin = backend.twin()
        try:
            await twin.get_many([key_of(1)])
        finally:
            await twin.close()

    thread = threading.Thread(target=end_waiting_session)
    with lock_table(database, backend):
        thread.start()
        with deadline(LONG), pytest.raises(psycopg.errors.AdminShutdown) as raised:
            asyncio.run(read_by_twin()) if is_async else backend.get_many([key_of(1)])
    thread.join()
    assert str(raised.value) == "terminating connection due to administrator command"
    assert backend.get_many([key_of(1)]) == {key_of(1): b"x"}


@pytest.mark.parametrize("is_async", [False, True], ids=["blocking", "twin"])
def test_a_lost_connection_without_a_reason_is_an_error_of_one_line(
    proxied_backend: PostgresBackend, proxy: FaultProxy, is_async: bool
) -> None:
    keys = list(entries_of(range(40)))

    async def read_by_twin() -> None:
        twin = proxied_backend.twin()
        try:
            await twin.get_many(keys[:1])
            proxy.fault = BREAKS["cut in a reply"]
            await twin.get_many(keys)
        finally:
            await twin.close()

    def read() -> None:
        proxy.fault = BREAKS["cut in a reply"]
        proxied_backend.get_many(keys)

    with deadline(LONG), pytest.raises(psycopg.OperationalError) as raised:
        asyncio.run(read_by_twin()) if is_async else read()
    assert type(raised.value) is psycopg.OperationalError
    assert "closed the connection" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_connections_idle_for_too_long_are_closed(backend: PostgresBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    backend.migrate()
    for connection in [backend._pool.take() for _ in range(4)]:
        backend._pool.give(connection)
    assert backend._pool._open_count == 4
    monkeypatch.setattr(connections, "IDLE_SECONDS", 0.0)
    assert backend.get_many([key_of(1)]) == {}
    assert backend._pool._open_count == len(backend._pool._idle) == 1
    assert backend.get_many([key_of(1)]) == {}


def test_a_wrong_password_and_a_read_only_server(database: Database, role: str) -> None:
    with open_backend(database.url) as backend:
        backend.set_many({key_of(1): b"x"}, None)
        grant = "GRANT SELECT, INSERT, UPDATE, DELETE ON {} TO {}"
        database.run(sql.SQL(grant).format(table_of(backend), sql.Identifier(role)))
        database.run(sql.SQL("ALTER ROLE {} SET default_transaction_read_only = on").format(sql.Identifier(role)))
        with open_backend(database.url_of(role), table=backend.table) as reader:
            assert reader.get_many([key_of(1)]) == {key_of(1): b"x"}
            with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                reader.set_many({key_of(1): b"y"}, None)
            assert reader.get_many([key_of(1)]) == {key_of(1): b"x"}
            assert reader._pool._open_count == 1


def test_a_server_is_killed_and_started_again() -> None:
    with PostgresServer() as server, open_backend(server.url, max_connections=4) as backend:
        server.call("CREATE EXTENSION vector")
        items = entries_of(range(20), 384)
        backend.set_many(items, None)
        for connection in [backend._pool.take() for _ in range(4)]:
            backend._pool.give(connection)
        server.kill()
        with pytest.raises(psycopg.OperationalError):
            read_until_it_fails(backend)  # sessions end a moment after the server
        server.restart()
        with deadline(LONG):  # the first call succeeds, although four connections are dead
            assert are_identical(backend.get_many(list(items)), items)
        server.pause()  # the operating system still accepts connections
        drop_idle_connection(backend)
        with deadline(0.3), pytest.raises(TimeoutError):
            backend.get_many(list(items))
        server.resume()
        with deadline(LONG):
            assert are_identical(backend.get_many(list(items)), items)


def read_until_it_fails(backend: PostgresBackend) -> None:
    with deadline(LONG):
        while True:
            backend.get_many([key_of(1)])


def test_a_wrong_password_is_an_error_of_the_tier() -> None:
    with PostgresServer() as server:
        server.call("CREATE ROLE somebody LOGIN PASSWORD 'right'")
        access = server.data / "pg_hba.conf"
        access.write_text(f"host all somebody 127.0.0.1/32 scram-sha-256\n{access.read_text()}")
        server.reload()
        url = f"postgresql://somebody:WRONG-hush@{server.address}/postgres"
        with open_backend(url) as backend, pytest.raises(psycopg.OperationalError, match="password") as caught:
            backend.get_many([key_of(1)])
        assert "hush" not in f"{caught.value} {caught.value!r}"


def test_the_backend_works_behind_a_transaction_pooler(database: Database) -> None:
    with PgBouncerServer(database.address) as bouncer:
        url = database.url_of("postgres", bouncer.address)
        with open_backend(url, max_connections=8, schema="behind") as backend:
            assert "made the table" in backend.migrate()

            def work(number: int) -> None:
                for turn in range(15):
                    items = entries_of(range(100 * number + turn, 100 * number + turn + 20))
                    backend.set_many(items, 60.0)
                    assert are_identical(backend.get_many(list(items)), items)
                    backend.add_many(items, None)

            run_in_threads(8, work, "eight threads over two sessions")
            with deadline(0.2), pytest.raises(TimeoutError), lock_table(database, backend):
                backend.get_many([key_of(1)])
            assert are_identical(backend.get_many([key_of(1)]), {key_of(1): entry_of(1)})

            async def use() -> None:
                twin = backend.twin()
                answers = await asyncio.gather(*(twin.get_many([key_of(number)]) for number in range(20)))
                assert all(are_identical(found, {key_of(n): entry_of(n)}) for n, found in enumerate(answers))
                await twin.close()

            asyncio.run(use())


@contextmanager
def lock_table(database: Database, backend: PostgresBackend) -> Iterator[None]:
    """Hold a lock for which every statement on the table waits."""
    with psycopg.connect(database.url) as connection:
        connection.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(table_of(backend)))
        yield


# --- the twin -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["black hole", "a byte at a time", "replies do not come"])
async def test_the_twin_keeps_its_deadline_if_the_server_hangs(
    proxied_backend: PostgresBackend, proxy: FaultProxy, fault: str
) -> None:
    items = entries_of(range(40), 384)
    twin = proxied_backend.twin()
    assert are_identical(await twin.get_many(list(items)), items)
    for _ in range(2):  # connected, then connecting
        proxy.fault = HANGS[fault]
        start = time.monotonic()
        with deadline(0.3), pytest.raises(TimeoutError):
            await twin.get_many(list(items))
        assert time.monotonic() - start < LONG
    proxy.heal()
    assert are_identical(await twin.get_many([key_of(3)]), {key_of(3): entry_of(3, 384)})
    assert are_identical(await twin.get_many(list(items)), items)
    await twin.close()


async def test_a_cancelled_call_of_the_twin_loses_only_its_own_connection(proxied_backend: PostgresBackend) -> None:
    items = entries_of(range(40), 384)
    twin = proxied_backend.twin()
    await twin.get_many(list(items))
    for turn in range(60):
        call = asyncio.ensure_future(twin.get_many(list(items)))
        for _ in range(turn // 4):
            await asyncio.sleep(0)
        call.cancel()
        others = [key_of(turn % 40), key_of((turn + 7) % 40)]
        expected = {key: items[key] for key in others}
        assert are_identical(await twin.get_many(others), expected)
        await asyncio.gather(call, return_exceptions=True)
    await twin.close()
    with pytest.raises(CacheClosed):
        await twin.get_many([key_of(1)])


async def test_the_twin_raises_busy_if_all_its_connections_are_in_use(database: Database) -> None:
    with open_backend(database.url, max_connections=1) as backend:
        backend.set_many({key_of(1): b"x"}, None)
        twin = backend.twin()
        connection = await twin._pool.take()
        for seconds in (0.2, 2.0, 20.0):
            # If the event loop stalls, the deadline may pass before the wait for a connection ends, so retry.
            with deadline(seconds), pytest.raises((TierBusy, TierTimeout)) as caught:
                await twin.get_many([key_of(1)])
            if isinstance(caught.value, TierBusy):
                break
        assert isinstance(caught.value, TierBusy)
        twin._pool.give(connection)
        assert await twin.get_many([key_of(1)]) == {key_of(1): b"x"}
        await twin.close()


async def test_the_twin_makes_the_table(backend: PostgresBackend) -> None:
    twin = backend.twin()
    items = {**entries_of(range(5)), key_of(9): b"frame"}
    assert await twin.get_many(list(items)) == {}
    await twin.set_many(items, None)
    assert are_identical(await twin.get_many(list(items)), items)
    await twin.close()


# --- forks --------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_forked_child_has_connections_of_its_own(backend: PostgresBackend) -> None:
    backend.set_many(entries_of(range(5)), None)
    for connection in [backend._pool.take() for _ in range(3)]:
        backend._pool.give(connection)
    pids = {connection.info.backend_pid for connection in backend._pool._idle}

    def child() -> None:
        assert backend._pool._idle == []
        assert are_identical(backend.get_many([key_of(1)]), {key_of(1): entry_of(1)})
        assert not pids & {connection.info.backend_pid for connection in backend._pool._idle}
        backend.close()

    run_in_fork(child, "a backend that was open before the fork")
    assert {connection.info.backend_pid for connection in backend._pool._idle} == pids
    for connection in [backend._pool.take() for _ in range(3)]:
        assert connection.execute(b"SELECT 1").fetchone() == (1,)
        backend._pool.give(connection)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_fork_while_calls_are_in_flight(backend: PostgresBackend) -> None:
    items = entries_of(range(50))
    backend.set_many(items, None)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            assert are_identical(backend.get_many(list(items)), items)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            run_in_fork(
                lambda: are_identical(backend.get_many(list(items)), items) or os._exit(3), "get_many during a fork"
            )
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert are_identical(backend.get_many(list(items)), items)


# --- queries inside Postgres --------------------------------------------------------------------


def test_the_statements_of_the_documentation_work(postgres_server: Any) -> None:
    page = Path(__file__).parents[2] / "docs" / "postgres.md"
    statements = re.findall(r"```sql\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(statements) == 6
    with create_database(postgres_server.url, vectors=True) as database:
        database.run("DO $$ BEGIN CREATE ROLE app; EXCEPTION WHEN duplicate_object THEN NULL; END $$")
        database.run("CREATE SCHEMA extensions")
        provider = CountingProvider(dimensions=384)
        with open_backend(database.url, table="embedonce") as backend:
            tier = Tier(backend, write="inline", timeout=60, ttl=3600)
            texts = [f"text {number}" for number in range(500)]
            with Cache(provider, [tier]) as cache:
                vectors = cache.embed_batch(texts)
                scope = cache.explain(texts[0]).scope
            with Cache(CountingProvider(dimensions=8), [tier]) as other:
                other.embed("of another dimension")
            made = [statement.replace("0123456789abcdef", scope) for statement in statements]
            answers = [database.run(statement) for statement in made[:-1]]
            costs = {row[0]: row[1:4] for row in answers[1]}
            assert costs[scope] == (500, sum(map(len, texts)), 0)
            assert scope in [row[0] for row in answers[2]]
            assert database.run("SELECT count(*) FROM minilm") == [(500,)]
            with psycopg.connect(database.url) as connection:
                connection.execute("SET enable_seqscan = off")
                plan = "\n".join(row for (row,) in connection.execute("EXPLAIN " + made[-1]))
                assert "Index Scan using minilm_hnsw" in plan
                nearest = connection.execute(made[-1]).fetchall()
            assert len(nearest) == 10
            assert nearest[0][2] == pytest.approx(1.0, abs=1e-6)
            ((first,),) = database.run("SELECT embedding::text FROM minilm LIMIT 1")
            units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
            cosines = units @ (np.array(json.loads(first)) / np.linalg.norm(json.loads(first)))
            exact = np.sort(cosines)[::-1][:10]
            assert sum(np.isclose(exact, row[2], atol=1e-5).any() for row in nearest) >= 8  # HNSW is approximate
            database.run("UPDATE embedonce SET kept_until = 1 WHERE embedding IS NOT NULL")
            assert database.run("SELECT count(*) FROM minilm") == [(0,)]
        database.run("DROP OWNED BY app")


# --- in a chain ---------------------------------------------------------------------------------


def test_a_chain_from_toml_promotes_after_a_restart(database: Database, tmp_path: Path) -> None:
    table = next(_names)
    config = {
        "provider": {"type": "ngram"},
        "tiers": [{"type": "memory"}, {"type": "postgres", "url": database.url, "table": table, "timeout": LONG}],
        "cache": {"flush_timeout": LONG},
    }
    with embedonce.open(config) as cache:
        vector = cache.embed("once")
    with embedonce.open(config) as cache:
        assert cache.fetch(["once"]).sources == ["postgres"]
        assert cache.fetch(["once"]).sources == ["memory"]
        assert cache.embed("once").tobytes() == vector.tobytes()

    async def use() -> list[str | None]:
        async with embedonce.open(config) as cache:
            return list((await cache.afetch(["once"])).sources)

    assert asyncio.run(use()) == ["postgres"]
