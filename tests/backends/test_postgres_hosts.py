"""Postgres by several hosts, by TLS, and while it is in recovery."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from servers import HOST, Certificates, PgBouncerServer, PostgresServer, PostgresStandby, find_free_port, wait_until

from embedonce import Cache, ConfigError, Entry, Tier
from embedonce.contracts import deadline
from embedonce.testing import CountingProvider, FaultProxy, NetworkFault
from embedonce.vectors import freeze
from embedonce_backends.postgres import PostgresBackend
from embedonce_backends.postgres.connections import hosts_of

numbers = itertools.count()


def key_of(number: int) -> str:
    return f"eo1.0123456789abcdef.{sha256(b'%d' % number).hexdigest()}"


ITEMS = {key_of(number): Entry(freeze(np.full(8, number, np.float32)), 1_700_000_000.0) for number in range(20)}


@contextmanager
def opened(url: str, **options: Any) -> Iterator[PostgresBackend]:
    backend = PostgresBackend(url=url, **{"table": f"hosts_{next(numbers)}", **options})
    try:
        yield backend
    finally:
        backend.close()


def read(backend: PostgresBackend) -> list[dict[str, Any]]:
    """Return what either face reads."""

    async def by_twin() -> dict[str, Any]:
        twin = backend.twin()
        try:
            return await twin.get_many(list(ITEMS))
        finally:
            await twin.close()

    return [backend.get_many(list(ITEMS)), asyncio.run(by_twin())]


@pytest.fixture(scope="module")
def primary() -> Iterator[PostgresServer]:
    with PostgresServer() as server:
        yield server


@pytest.fixture(scope="module")
def standby(primary: PostgresServer) -> Iterator[PostgresStandby]:
    with PostgresStandby(primary) as server:
        yield server


# --- several hosts ------------------------------------------------------------------------------


def test_a_host_that_refuses_is_passed_over(primary: PostgresServer) -> None:
    url = f"postgresql://postgres@{HOST}:{find_free_port()},{primary.address}/postgres"
    with opened(url) as backend:
        backend.set_many(ITEMS, None)
        assert [found.keys() for found in read(backend)] == [ITEMS.keys()] * 2


def test_a_host_that_does_not_answer_holds_up_none(primary: PostgresServer) -> None:
    """It would be waited for for its connect_timeout, which is longer than this test may take."""
    with FaultProxy(HOST, primary.port) as silent:
        silent.fault = NetworkFault("black_hole")
        url = f"postgresql://postgres@{silent.url_port},{primary.address}/postgres?connect_timeout=3600"
        with opened(url) as backend:
            with deadline(60.0):
                backend.set_many(ITEMS, None)
            assert [found.keys() for found in read(backend)] == [ITEMS.keys()] * 2


def test_where_no_host_answers_it_is_a_timeout_and_where_all_refuse_an_error(primary: PostgresServer) -> None:
    with FaultProxy(HOST, primary.port) as first, FaultProxy(HOST, primary.port) as second:
        url = f"postgresql://postgres@{first.url_port},{second.url_port}/postgres"
        for fault, error in (("black_hole", TimeoutError), ("refuse", psycopg.OperationalError)):
            first.fault = second.fault = NetworkFault(fault)  # type: ignore[arg-type]
            with opened(url) as backend, deadline(0.3 if error is TimeoutError else 60.0), pytest.raises(error):
                backend.get_many(list(ITEMS))


def test_the_host_that_is_wanted_is_taken(primary: PostgresServer, standby: PostgresStandby) -> None:
    def recovering(backend: PostgresBackend) -> bool:
        ((answer,),) = backend._run(b"SELECT pg_is_in_recovery()")
        return bool(answer)

    both = f"{standby.address},{primary.address}"
    for wanted, expected in (("read-write", False), ("standby", True), ("prefer-standby", True), ("any", True)):
        url = f"postgresql://postgres@{both}/postgres?target_session_attrs={wanted}"
        if wanted == "any":  # the first; but the other one where that takes long
            url = url.replace(f",{primary.address}", "")
        with opened(url) as backend:
            assert recovering(backend) == expected
    with opened(
        f"postgresql://postgres@{primary.address},{HOST}:{find_free_port()}/postgres?target_session_attrs=prefer-standby"
    ) as backend:
        assert not recovering(backend)


def test_when_the_primary_goes_the_promoted_standby_is_used() -> None:
    with PostgresServer() as first, PostgresStandby(first) as second:
        url = f"postgresql://postgres@{first.address},{second.address}/postgres?target_session_attrs=read-write"
        provider = CountingProvider()
        with opened(url) as backend:
            tier = Tier(backend, name="shared", timeout=60.0, write="inline")
            with Cache(provider, [tier]) as cache:
                texts = [f"text {number}" for number in range(10)]
                vectors = cache.embed_batch(texts)
                lsn = first.call("SELECT pg_current_wal_lsn()")
                wait_until(
                    lambda: second.call(f"SELECT pg_last_wal_replay_lsn() >= '{lsn}'") == "t", "the standby has it all"
                )
                first.stop()
                second.call("SELECT pg_promote()")
                wait_until(lambda: cache.fetch(texts).sources == ["shared"] * 10, "the other host serves")
                assert (cache.embed_batch(texts) == vectors).all()
                new = [f"new {number}" for number in range(10)]
                wait_until(
                    lambda: cache.embed_batch(new) is not None and cache.fetch(new).sources == ["shared"] * 10,
                    "the other host stores",
                )


def test_a_standby_serves_and_its_writes_fail_by_themselves(primary: PostgresServer, standby: PostgresStandby) -> None:
    table = f"hosts_{next(numbers)}"
    provider = CountingProvider()
    with (
        opened(primary.url, table=table) as backend,
        Cache(provider, [Tier(backend, name="pg", timeout=60.0, write="inline")]) as cache,
    ):
        vector = cache.embed("known")
        lsn = primary.call("SELECT pg_current_wal_lsn()")
    wait_until(lambda: standby.call(f"SELECT pg_last_wal_replay_lsn() >= '{lsn}'") == "t", "the standby has it all")
    tier = Tier(PostgresBackend(url=standby.url, table=table), name="pg", timeout=60.0, write="inline")
    with Cache(provider, [tier]) as cache:
        for number in range(4):
            cache.embed(f"new {number}")
            assert cache.fetch(["known"]).sources == ["pg"]
            assert (cache.embed("known") == vector).all()
        stats = cache.stats().tiers["pg"]
        assert set(stats.causes) == {"ReadOnlySqlTransaction"}
    # Where the table is not there a standby cannot make it, and says what it is.
    with opened(standby.url) as backend, pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        backend.get_many(list(ITEMS))


def test_hosts_are_read_as_libpq_reads_them() -> None:
    given = {"host": "a,b", "port": "1,2", "user": "u"}
    assert hosts_of(given) == [{"host": "a", "port": "1", "user": "u"}, {"host": "b", "port": "2", "user": "u"}]
    assert [host["port"] for host in hosts_of({"host": "a,b,c", "port": "7"})] == ["7", "7", "7"]
    assert hosts_of({"host": "a"}) == [{"host": "a"}]
    assert {host["host"] for host in hosts_of({"host": "a,b", "load_balance_hosts": "random"})} == {"a", "b"}
    with pytest.raises(ConfigError, match="as many ports"):
        PostgresBackend(url="postgresql://hush@a:1,b:2,c/db?port=1,2")


# --- TLS ----------------------------------------------------------------------------------------


def test_tls_with_an_authority_of_ones_own(primary: PostgresServer, tmp_path: Path) -> None:
    """PgBouncer ends the TLS, as it does in production: the Postgres of the tests is built without."""
    ours, others = Certificates(tmp_path), tmp_path / "others"
    others.mkdir()
    with PgBouncerServer((HOST, primary.port), tls=ours) as server:
        url = f"postgresql://postgres@{server.address}/postgres"
        with opened(f"{url}?sslmode=verify-full&sslrootcert={ours.authority}") as backend:
            backend.set_many(ITEMS, None)
            assert [found.keys() for found in read(backend)] == [ITEMS.keys()] * 2
            assert backend._pool._idle[0].pgconn.ssl_in_use
        refused = {
            "certificate": f"?sslmode=verify-full&sslrootcert={Certificates(others).authority}",
            "SSL": "?sslmode=disable",
        }
        for words, options in refused.items():
            with opened(url + options) as backend, pytest.raises(psycopg.OperationalError, match=words):
                backend.get_many(list(ITEMS))
        with (
            opened(f"{url.replace(HOST, '127.0.0.2')}?sslmode=verify-full&sslrootcert={ours.authority}") as backend,
            pytest.raises(psycopg.OperationalError),
        ):
            backend.get_many(list(ITEMS))
        server.pause()
        try:
            with (
                opened(f"{url}?sslmode=verify-full&sslrootcert={ours.authority}") as backend,
                deadline(0.3),
                pytest.raises(TimeoutError),
            ):
                backend.get_many(list(ITEMS))
        finally:
            server.resume()
