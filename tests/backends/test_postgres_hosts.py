"""Postgres with several hosts, with TLS, and in recovery."""

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
from embedonce_backends.postgres.connections import split_hosts

numbers = itertools.count()


def key_of(number: int) -> str:
    return f"eo1.0123456789abcdef.{sha256(b'%d' % number).hexdigest()}"


ITEMS = {key_of(number): Entry(freeze(np.full(8, number, np.float32)), 1_700_000_000.0) for number in range(20)}


@contextmanager
def open_backend(url: str, **options: Any) -> Iterator[PostgresBackend]:
    backend = PostgresBackend(url=url, **{"table": f"hosts_{next(numbers)}", **options})
    try:
        yield backend
    finally:
        backend.close()


def read(backend: PostgresBackend) -> list[dict[str, Any]]:
    """Return what the blocking and the async client read."""

    async def read_by_twin() -> dict[str, Any]:
        twin = backend.twin()
        try:
            return await twin.get_many(list(ITEMS))
        finally:
            await twin.close()

    return [backend.get_many(list(ITEMS)), asyncio.run(read_by_twin())]


@pytest.fixture(scope="module")
def primary() -> Iterator[PostgresServer]:
    with PostgresServer() as server:
        yield server


@pytest.fixture(scope="module")
def standby(primary: PostgresServer) -> Iterator[PostgresStandby]:
    with PostgresStandby(primary) as server:
        yield server


# --- several hosts ------------------------------------------------------------------------------


def test_a_host_that_refuses_is_skipped(primary: PostgresServer) -> None:
    url = f"postgresql://postgres@{HOST}:{find_free_port()},{primary.address}/postgres"
    with open_backend(url) as backend:
        backend.set_many(ITEMS, None)
        assert [found.keys() for found in read(backend)] == [ITEMS.keys()] * 2


def test_a_host_that_does_not_answer_does_not_delay_a_call(primary: PostgresServer) -> None:
    """Waiting for it would take its connect_timeout, which is longer than this test may take."""
    with FaultProxy(HOST, primary.port) as silent:
        silent.fault = NetworkFault("black_hole")
        url = f"postgresql://postgres@{silent.url_port},{primary.address}/postgres?connect_timeout=3600"
        with open_backend(url) as backend:
            with deadline(60.0):
                backend.set_many(ITEMS, None)
            assert [found.keys() for found in read(backend)] == [ITEMS.keys()] * 2


def test_it_is_a_timeout_if_no_host_answers_and_an_error_if_all_refuse(primary: PostgresServer) -> None:
    with FaultProxy(HOST, primary.port) as first, FaultProxy(HOST, primary.port) as second:
        url = f"postgresql://postgres@{first.url_port},{second.url_port}/postgres"
        for fault, error in (("black_hole", TimeoutError), ("refuse", psycopg.OperationalError)):
            first.fault = second.fault = NetworkFault(fault)  # type: ignore[arg-type]
            with open_backend(url) as backend, deadline(0.3 if error is TimeoutError else 60.0), pytest.raises(error):
                backend.get_many(list(ITEMS))


def test_target_session_attrs_chooses_the_host(primary: PostgresServer, standby: PostgresStandby) -> None:
    def is_recovering(backend: PostgresBackend) -> bool:
        ((answer,),) = backend._run(b"SELECT pg_is_in_recovery()")
        return bool(answer)

    both = f"{standby.address},{primary.address}"
    for wanted, expected in (("read-write", False), ("standby", True), ("prefer-standby", True), ("any", True)):
        url = f"postgresql://postgres@{both}/postgres?target_session_attrs={wanted}"
        if wanted == "any":  # normally the first host, but the second one if the first is slow, so remove it
            url = url.replace(f",{primary.address}", "")
        with open_backend(url) as backend:
            assert is_recovering(backend) == expected
    with open_backend(
        f"postgresql://postgres@{primary.address},{HOST}:{find_free_port()}/postgres?target_session_attrs=prefer-standby"
    ) as backend:
        assert not is_recovering(backend)


def test_after_a_failover_the_promoted_standby_is_used() -> None:
    with PostgresServer() as first, PostgresStandby(first) as second:
        url = f"postgresql://postgres@{first.address},{second.address}/postgres?target_session_attrs=read-write"
        provider = CountingProvider()
        with open_backend(url) as backend:
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


def test_a_standby_serves_reads_while_writes_fail(primary: PostgresServer, standby: PostgresStandby) -> None:
    table = f"hosts_{next(numbers)}"
    provider = CountingProvider()
    with (
        open_backend(primary.url, table=table) as backend,
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
    # A standby cannot make a missing table, and its error says that it is read-only.
    with open_backend(standby.url) as backend, pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        backend.get_many(list(ITEMS))


def test_hosts_are_split_as_libpq_splits_them() -> None:
    given = {"host": "a,b", "port": "1,2", "user": "u"}
    assert split_hosts(given) == [{"host": "a", "port": "1", "user": "u"}, {"host": "b", "port": "2", "user": "u"}]
    assert [host["port"] for host in split_hosts({"host": "a,b,c", "port": "7"})] == ["7", "7", "7"]
    assert split_hosts({"host": "a"}) == [{"host": "a"}]
    assert {host["host"] for host in split_hosts({"host": "a,b", "load_balance_hosts": "random"})} == {"a", "b"}
    with pytest.raises(ConfigError, match="as many ports"):
        PostgresBackend(url="postgresql://hush@a:1,b:2,c/db?port=1,2")


# --- TLS ----------------------------------------------------------------------------------------


def test_tls_with_a_private_authority(primary: PostgresServer, tmp_path: Path) -> None:
    """PgBouncer provides the TLS, as it often does in production, because the tests' Postgres is built without it."""
    ours, others = Certificates(tmp_path), tmp_path / "others"
    others.mkdir()
    with PgBouncerServer((HOST, primary.port), tls=ours) as server:
        url = f"postgresql://postgres@{server.address}/postgres"
        with open_backend(f"{url}?sslmode=verify-full&sslrootcert={ours.authority}") as backend:
            backend.set_many(ITEMS, None)
            assert [found.keys() for found in read(backend)] == [ITEMS.keys()] * 2
            assert backend._pool._idle[0].pgconn.ssl_in_use
        refused = {
            "certificate": f"?sslmode=verify-full&sslrootcert={Certificates(others).authority}",
            "SSL": "?sslmode=disable",
        }
        for words, options in refused.items():
            with open_backend(url + options) as backend, pytest.raises(psycopg.OperationalError, match=words):
                backend.get_many(list(ITEMS))
        with (
            open_backend(
                f"{url.replace(HOST, '127.0.0.2')}?sslmode=verify-full&sslrootcert={ours.authority}"
            ) as backend,
            pytest.raises(psycopg.OperationalError),
        ):
            backend.get_many(list(ITEMS))
        server.pause()
        try:
            with (
                open_backend(f"{url}?sslmode=verify-full&sslrootcert={ours.authority}") as backend,
                deadline(0.3),
                pytest.raises(TimeoutError),
            ):
                backend.get_many(list(ITEMS))
        finally:
            server.resume()
