"""Postgres with restricted roles and with settings of a database or a role that differ from Postgres' own defaults."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psycopg
import pytest
from descriptors import without_descriptors
from psycopg import sql
from servers import PgBouncerServer, PostgresServer

from embedonce import Cache, Tier
from embedonce.contracts import deadline
from embedonce.errors import ConfigError, TierError
from embedonce.testing import CountingProvider
from embedonce.vectors import Entry
from embedonce_backends.postgres import PostgresBackend
from embedonce_backends.postgres import backend as postgres_backend
from embedonce_backends.postgres.errors import name_connection_error

PATIENT = 60.0
"""Seconds within which a healthy server answers on any machine."""

_numbers = itertools.count()


class Place:
    """A database with pgvector in a schema of its own, and a role without privileges."""

    def __init__(self, server: str, name: str) -> None:
        self.owner_url = urlsplit(server)._replace(path=f"/{name}").geturl()
        self.role = f"app_{name}"
        parts = urlsplit(self.owner_url)
        self.url = parts._replace(netloc=f"{self.role}@{parts.hostname}:{parts.port}").geturl()

    def run(self, *statements: str) -> None:
        """Run statements as the owner; ``{role}`` stands for the role."""
        with psycopg.connect(self.owner_url, autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement.replace("{role}", self.role).encode())

    def ask(self, statement: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.owner_url, autocommit=True) as connection:
            return connection.execute(statement.encode()).fetchall()

    def migrate(self, **options: Any) -> dict[str, str]:
        with Cache(CountingProvider(), [Tier(PostgresBackend(url=self.owner_url, **options), name="shared")]) as cache:
            return cache.migrate()


@pytest.fixture
def place(postgres_server: Any) -> Iterator[Place]:
    name = f"roles_{os.getpid()}_{next(_numbers)}"
    with psycopg.connect(postgres_server.url, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    place = Place(postgres_server.url, name)
    place.run("CREATE SCHEMA extensions", "CREATE EXTENSION vector SCHEMA extensions", "CREATE ROLE {role} LOGIN")
    try:
        yield place
    finally:
        place.run("DROP OWNED BY {role}")
        with psycopg.connect(postgres_server.url, autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
            connection.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(place.role)))


@contextmanager
def open_backend(url: str, **options: Any) -> Iterator[PostgresBackend]:
    backend = PostgresBackend(url=url, **options)
    try:
        yield backend
    finally:
        backend.close()


def entries(*numbers: int) -> dict[str, Any]:
    return {f"eo1.{'0' * 16}.{number}": make_entry(number) for number in numbers}


def make_entry(number: int) -> Entry:
    vector = np.full(4, number, np.float32)
    return Entry(vector=vector, dtype="float32", created=1.0, expires=float("inf"), metadata={"number": number})


def use_everything(url: str, **options: Any) -> None:
    """Use a tier in every way that needs a privilege."""
    with open_backend(url, **options) as backend, deadline(PATIENT):
        stored = entries(1, 2, 3)
        backend.set_many(stored, None)
        backend.set_many(entries(1), 60.0)
        assert set(backend.get_many(list(stored))) == set(stored)
        assert backend.add_many({"eo1.lease.x": b"held"}, 5.0) == {"eo1.lease.x"}
        backend.delete_many(["eo1.lease.x"])
        assert sorted(backend.scan("")) == sorted(stored)
        assert backend.count("") == 3
        backend.delete_many(list(stored))
    with Cache(
        CountingProvider(), [Tier(PostgresBackend(url=url, **options), write="inline", timeout=PATIENT)]
    ) as cache:
        cache.embed_batch(["one text", "another"])
        assert len(cache.contents()) == 1
        assert cache.stats().tiers["postgres"].causes == {}
        cache.forget(["one text"])
        cache.purge(scope=cache.contents()[0].scope)


# --- restricted roles ---------------------------------------------------------------------------------


@pytest.mark.parametrize("schema", ["public", "Its Own"])
@pytest.mark.parametrize("column", ["auto", "bytea", "vector"])
def test_the_grants_that_migrate_prints_are_enough(place: Place, schema: str, column: str) -> None:
    (done,) = place.migrate(schema=schema, column=column).values()
    grants = re.findall("GRANT [^;]*", done)
    assert len(grants) == (2 if column == "bytea" else 3)
    place.run("REVOKE ALL ON SCHEMA public FROM PUBLIC", "REVOKE TEMP ON DATABASE template1 FROM PUBLIC")
    place.run(*(grant.replace("TO ROLE", "TO {role}") for grant in grants))
    use_everything(place.url, schema=schema, column=column)
    with open_backend(place.url, schema=schema, column=column) as backend:
        assert backend.describe().startswith("bytea" if column == "bytea" else "pgvector")


@pytest.mark.parametrize("face", ["blocking", "async"])
def test_a_role_that_may_not_use_pgvector_stores_frames(place: Place, face: str) -> None:
    place.migrate()
    place.run("GRANT SELECT, INSERT, UPDATE, DELETE ON embedonce TO {role}")
    with open_backend(place.owner_url) as owner, open_backend(place.url) as limited, deadline(PATIENT):
        owner.set_many(entries(1, 2), None)
        if face == "async":
            asyncio.run(set_by_twin(limited, entries(2, 3)))
        else:
            limited.set_many(entries(2, 3), None)
        assert place.ask("SELECT key, embedding IS NULL, frame IS NULL FROM embedonce ORDER BY key") == [
            (key, is_frame, not is_frame) for key, is_frame in zip(entries(1, 2, 3), (False, True, True), strict=True)
        ]
        for backend in (owner, limited):
            found = backend.get_many(list(entries(1, 2, 3)))
            assert [int(found[key].vector[0]) for key in entries(1, 2, 3)] == [1, 2, 3]  # type: ignore[union-attr]
        assert (
            'may not use pgvector; an administrator must run GRANT USAGE ON SCHEMA "extensions"' in limited.describe()
        )
    use_everything(place.url)


async def set_by_twin(backend: PostgresBackend, items: dict[str, Any], ttl: float | None = None) -> None:
    twin = backend.twin()
    await twin.set_many(items, ttl)
    await twin.close()


def test_a_required_vector_column_names_the_missing_grant(place: Place) -> None:
    place.migrate()
    place.run("GRANT SELECT, INSERT, UPDATE, DELETE ON embedonce TO {role}")
    with open_backend(place.url, column="vector") as backend:
        with pytest.raises(TierError, match='GRANT USAGE ON SCHEMA "extensions"'):
            backend.set_many(entries(1), None)
        place.run("GRANT USAGE ON SCHEMA extensions TO {role}")
        backend.set_many(entries(1), None)


def test_a_role_that_may_make_tables_but_not_use_pgvector_makes_one_without_a_vector_column(place: Place) -> None:
    place.run("GRANT CREATE ON SCHEMA public TO {role}")
    use_everything(place.url)
    assert place.ask("SELECT 1 FROM information_schema.columns WHERE column_name = 'embedding'") == []


REFUSED_WRITES = {
    "no INSERT": ("REVOKE INSERT ON embedonce FROM {role}", "InsufficientPrivilege"),
    "row-level security": ("ALTER TABLE embedonce ENABLE ROW LEVEL SECURITY", "InsufficientPrivilege"),
    "read-only": ("ALTER ROLE {role} SET default_transaction_read_only = on", "ReadOnlySqlTransaction"),
    "a statement timeout": (
        "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(60); END $$;"
        "CREATE TRIGGER wait BEFORE INSERT ON embedonce FOR EACH STATEMENT EXECUTE FUNCTION wait();"
        "ALTER ROLE {role} SET statement_timeout = '10ms'",
        "QueryCanceled",
    ),
}


@pytest.mark.parametrize("fault", REFUSED_WRITES)
def test_the_cause_of_a_refused_write_says_why(place: Place, fault: str) -> None:
    statement, cause = REFUSED_WRITES[fault]
    place.migrate()
    place.run("GRANT SELECT, INSERT, UPDATE, DELETE ON embedonce TO {role}", statement)
    tier = Tier(PostgresBackend(url=place.url), name="far", write="inline", timeout=PATIENT)
    with Cache(CountingProvider(), [tier]) as cache:
        cache.embed_batch(["one text"])
        assert set(cache.stats().tiers["far"].causes) == {cause}


def test_an_error_does_not_quote_a_row(place: Place) -> None:
    place.migrate(text_preview=True)
    place.run("ALTER TABLE embedonce ADD CHECK (text_preview <> 'a private text')")
    entry = make_entry(1)._replace(metadata={"text_preview": "a private text"})
    with open_backend(place.owner_url, text_preview=True) as backend:
        with pytest.raises(psycopg.errors.CheckViolation) as caught:
            backend.set_many({"eo1.a.b": entry}, None)
        with pytest.raises(psycopg.errors.CheckViolation) as caught_async:
            asyncio.run(set_by_twin(backend, {"eo1.a.b": entry}))
    assert "private" not in f"{caught.value}{caught_async.value}"


# --- settings of a database or a role -------------------------------------------------------------------

SETTINGS = (
    "default_transaction_isolation = 'repeatable read'",
    "default_transaction_isolation = 'serializable'",
    "search_path = ''",
    "bytea_output = 'escape'",
    "standard_conforming_strings = off",
    "DateStyle = 'German'",
    "extra_float_digits = -10",
    "client_encoding = 'LATIN1'",
    "synchronous_commit = off",
    "row_security = off",
)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_of_the_database_changes_nothing(place: Place, setting: str) -> None:
    (database,) = place.ask("SELECT current_database()")
    place.run(f"ALTER DATABASE {database[0]} SET {setting}", "GRANT CREATE ON SCHEMA public TO {role}")
    use_everything(place.url)
    with open_backend(place.url) as backend, deadline(PATIENT):
        asyncio.run(set_by_twin(backend, entries(1, 2)))
        assert len(backend.get_many(list(entries(1, 2)))) == 2


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_no_write_is_lost_to_another_isolation_level(place: Place, level: str) -> None:
    place.run(f"ALTER ROLE {{role}} SET default_transaction_isolation = '{level}'")
    place.migrate()
    place.run("GRANT SELECT, INSERT, UPDATE, DELETE ON embedonce TO {role}")
    with open_backend(place.url) as backend:
        write_from_threads(backend)
        asyncio.run(write_from_tasks(backend))


def write_from_threads(backend: PostgresBackend) -> None:
    """Let four threads write the same keys; raise the first error."""
    errors: list[Exception] = []

    def work(number: int) -> None:
        try:
            for turn in range(15):
                backend.set_many({f"eo1.a.{n}": b"%d %d" % (number, turn) for n in range(100)}, None)
                backend.delete_many([f"eo1.a.{n}" for n in range(0, 100, 3)])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


async def write_from_tasks(backend: PostgresBackend) -> None:
    """Let four tasks write the same keys."""
    twin = backend.twin()

    async def work(number: int) -> None:
        for turn in range(15):
            await twin.set_many({f"eo1.a.{n}": b"%d %d" % (number, turn) for n in range(100)}, None)

    await asyncio.gather(*map(work, range(4)))
    await twin.close()


@pytest.mark.parametrize("face", ["blocking", "async"])
def test_a_conflict_is_repeated_although_the_isolation_level_changed_later(
    place: Place, face: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backend reads the level once. If it changes afterwards, conflicts of new sessions are repeated."""
    place.migrate()
    place.run("GRANT SELECT, INSERT, UPDATE, DELETE ON embedonce TO {role}")
    with open_backend(place.url) as backend:
        backend.get_many(["eo1.a.1"])
        backend._pool.reset()
        place.run("ALTER ROLE {role} SET default_transaction_isolation = 'repeatable read'")
        if face == "async":
            asyncio.run(write_from_tasks(backend))
        else:
            write_from_threads(backend)


def test_a_lock_timeout_does_not_fail_a_write(place: Place) -> None:
    place.run("ALTER ROLE {role} SET lock_timeout = '1ms'")
    place.migrate()
    place.run("GRANT SELECT, INSERT, UPDATE, DELETE ON embedonce TO {role}")
    with open_backend(place.url) as backend:
        write_from_threads(backend)


@pytest.mark.parametrize("level", ["read committed", "repeatable read", "serializable"])
def test_four_processes_make_the_table_at_once(place: Place, level: str, tmp_path: Path) -> None:
    place.run(
        f"ALTER ROLE {{role}} SET default_transaction_isolation = '{level}'",
        "ALTER ROLE {role} SET lock_timeout = '1ms'",
        "GRANT CREATE ON SCHEMA public TO {role}",
    )
    script = tmp_path / "write.py"
    script.write_text(
        "import sys\n"
        "from embedonce_backends.postgres import PostgresBackend\n"
        "backend = PostgresBackend(url=sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "for turn in range(10):\n"
        "    backend.set_many({f'eo1.a.{n}': sys.argv[2].encode() for n in range(50)}, None)\n"
        "backend.close()\n"
    )
    children = [
        subprocess.Popen(
            [sys.executable, str(script), place.url, str(number)],
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
    results = [child.communicate("go\n") for child in children]
    assert [child.returncode for child in children] == [0] * 4, results
    assert place.ask("SELECT count(*) FROM embedonce") == [(50,)]


def test_another_isolation_level_works_behind_a_transaction_pooler(place: Place) -> None:
    (database,) = place.ask("SELECT current_database()")
    place.run(f"ALTER DATABASE {database[0]} SET default_transaction_isolation = 'serializable'")
    parts = urlsplit(place.owner_url)
    assert parts.hostname is not None
    with PgBouncerServer((parts.hostname, parts.port or 5432)) as pooler:
        url = parts._replace(netloc=f"postgres@{pooler.address}").geturl()
        with open_backend(url) as backend:
            write_from_threads(backend)


async def test_the_twin_deletes_expired_rows(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_backend, "SWEEP_EVERY", 10)
    with open_backend(place.owner_url) as backend:
        twin = backend.twin()
        await twin.set_many({f"eo1.old.{number}": b"x" for number in range(10)}, 60.0)
        backend.clock_offset += 61
        await twin.set_many({f"eo1.new.{number}": b"x" for number in range(10)}, 60.0)
        await twin.close()
        assert {key.split(".")[1] for key in backend.scan("")} == {"new"}


# --- connections that fail ------------------------------------------------------------------------------


def catch_each_face(url: str) -> Iterator[BaseException]:
    """Yield the error of a read by each face."""
    with open_backend(url) as backend:
        calls: Sequence[Callable[[], object]] = (
            lambda: backend.get_many(["a"]),
            lambda: asyncio.run(set_by_twin(backend, {"a": b"x"})),
        )
        for call in calls:
            with deadline(PATIENT), pytest.raises(psycopg.OperationalError) as caught:
                call()
            yield caught.value


def test_the_name_of_a_connection_error_says_why(place: Place) -> None:
    parts = urlsplit(place.url)
    cases = {
        parts._replace(path="/absent").geturl(): "InvalidCatalogName",
        parts._replace(netloc=f"absent@{parts.hostname}:{parts.port}").geturl(): "InvalidAuthorizationSpecification",
        f"{place.url}?sslmode=require": "SSLError",
        "postgresql://a@no-such-host.invalid/a": "gaierror",
    }
    for url, name in cases.items():
        assert {type(error).__name__ for error in catch_each_face(url)} == {name}, url
    place.run("ALTER ROLE {role} CONNECTION LIMIT 0")
    assert {type(error).__name__ for error in catch_each_face(place.url)} == {"TooManyConnections"}
    place.run("ALTER ROLE {role} CONNECTION LIMIT -1", "ALTER ROLE {role} NOLOGIN")
    assert {type(error).__name__ for error in catch_each_face(place.url)} == {"InvalidAuthorizationSpecification"}


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("FATAL:  the database system is starting up", "CannotConnectNow"),
        ("FATAL:  the database system is shutting down", "CannotConnectNow"),
        ("FATAL:  sorry, too many clients already", "TooManyConnections"),
        (
            "FATAL:  remaining connection slots are reserved",
            "TooManyConnections",
        ),
        ('FATAL:  password authentication failed for user "app"', "InvalidPassword"),
        ('FATAL:  no pg_hba.conf entry for host "10.0.0.1"', "InvalidAuthorizationSpecification"),
        ("No buffer space available", "ENOBUFS"),
        ("root certificate file does not exist", "SSLError"),
        ("Connection refused", "OperationalError"),
    ],
)
def test_the_message_of_libpq_gives_the_name(words: str, name: str) -> None:
    error = psycopg.OperationalError(f'connection to server at "10.0.0.1", port 5432 failed: {words}')
    assert type(name_connection_error(error)).__name__ == name
    assert isinstance(error, psycopg.OperationalError)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "no-such-host.invalid"])
def test_missing_descriptors_are_the_cause(postgres_server: PostgresServer, host: str) -> None:
    with (
        open_backend(f"postgresql://postgres@{host}:{postgres_server.port}/postgres") as backend,
        without_descriptors(),
        deadline(PATIENT),
        pytest.raises(psycopg.OperationalError, match="Too many open files") as caught,
    ):
        backend.get_many(["a"])
    assert type(caught.value).__name__ == "EMFILE"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql+psycopg://user:hush@host/d", r"begin with postgresql://, without \+psycopg"),
        ("postgresql+asyncpg://user:hush@host/d", r"without \+asyncpg"),
        ("postgresql://user:hush@host/d?ssl=require", "option ssl.* write sslmode=require"),
        ("postgresql://user:hush@host/d?sslmode=require&schema=hush", "option schema.* set schema in the table"),
        ("postgresql://user:hush@host/d?pool_size=3", "set max_connections in the table"),
        ("postgresql://user:hush@host/d?command_timeout=3", "set timeout in the table"),
        ("postgresql://user:hush@host/d?pgbouncer=true", "remove it"),
        ("postgresql://user:hush@host/d?hush=1", "not a Postgres URL, or has an option that libpq does not have"),
    ],
)
def test_an_option_of_another_client_is_explained(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        PostgresBackend(url=url)
    assert "hush" not in str(caught.value)


def test_options_of_libpq_are_accepted() -> None:
    PostgresBackend(url="postgresql://h/d?sslmode=require&connect_timeout=3&options=-c%20statement_timeout%3D1").close()
