"""``Cache.check`` and ``Cache.contents`` with real servers: probes that leave nothing behind, and measured scopes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from typer.testing import CliRunner

import embedonce
from embedonce import Cache, Tier
from embedonce.answers import TierCheck
from embedonce.cli import app
from embedonce.encryption import Encryption
from embedonce.testing import DictBackend
from embedonce_providers.ngram import NgramProvider

PATIENT = 60.0


def make_backend(kind: str, request: pytest.FixtureRequest) -> Any:
    if kind == "redis":
        from embedonce_backends.redis import RedisBackend

        return RedisBackend(url=request.getfixturevalue("redis_server").url, prefix="probes:")
    if kind.startswith("postgres"):
        from embedonce_backends.postgres import PostgresBackend

        column: Any = "bytea" if kind.endswith("bytea") else "auto"
        url = request.getfixturevalue("postgres_server").url
        return PostgresBackend(url=url, table=f"probes_{column}", column=column)
    from embedonce_backends.memcached import MemcachedBackend

    return MemcachedBackend(servers=request.getfixturevalue("memcached_servers"))


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("kind", ["redis", "postgres", "postgres-bytea", "memcached"])
async def test_a_probe_is_written_and_removed(kind: str, encrypted: bool, request: pytest.FixtureRequest) -> None:
    encryption = Encryption(b"0" * 32) if encrypted else None
    tier = Tier(make_backend(kind, request), name="far", timeout=PATIENT, write="inline", encryption=encryption)
    with Cache(NgramProvider(dimensions=64), [tier]) as cache:
        for check in (*cache.check(), *await cache.acheck()):
            assert (check.ok, check.writes) == (True, True), check.detail
        backend = tier.backend
        if backend.capabilities.scan:
            assert [key for key in backend.scan("") if "probe" in key] == []  # type: ignore[attr-defined]
            cache.embed_batch(["one", "two", "three"])
            (held,) = [one for one in cache.contents() if one.current]
            assert (held.entries, held.dimensions) == (3, 64)
            assert held.bytes is not None
            assert held.bytes > 3 * 64
            if not encrypted or kind == "redis":
                assert held.oldest is not None
                assert held.newest is not None
                assert held.oldest <= held.newest
            cache.purge(scope=held.scope)


@contextmanager
def open_as_redis_user(server: Any, *commands: str) -> Iterator[str]:
    """Yield a URL with a new user of the server, who may use these commands."""
    import redis

    with redis.Redis.from_url(server.url) as admin:
        admin.acl_setuser("limited", enabled=True, passwords=["+x"], keys=["*"], commands=commands)
        try:
            yield server.url.replace("redis://", "redis://limited:x@").replace("default@", "")
        finally:
            admin.acl_deluser("limited")


def check_redis(url: str) -> TierCheck:
    from embedonce_backends.redis import RedisBackend

    tier = Tier(RedisBackend(url=url, prefix="probes:"), name="far", timeout=PATIENT)
    with Cache(NgramProvider(), [tier]) as cache:
        (check,) = cache.check()
    return check


def test_a_server_that_refuses_writes_fails_the_check(redis_server: Any) -> None:
    with open_as_redis_user(redis_server, "+@all", "-set", "-mset") as url:
        check = check_redis(url)
    assert (check.ok, check.writes) == (False, False)
    assert check.detail.startswith("NOPERM")


def test_a_redis_user_who_may_not_delete_fails_the_check(redis_server: Any) -> None:
    with open_as_redis_user(redis_server, "+@all", "-unlink", "-del") as url:
        check = check_redis(url)
    assert (check.ok, check.writes) == (False, False)
    assert check.detail.startswith("a probe was written, but it cannot be deleted (NOPERM): ")
    assert "unlink" in check.detail


async def test_a_postgres_role_that_may_not_delete_fails_the_check(postgres_server: Any) -> None:
    import psycopg

    from embedonce_backends.postgres import PostgresBackend

    parts = urlsplit(postgres_server.url)
    url = parts._replace(netloc=f"keeper@{parts.hostname}:{parts.port}").geturl()
    backend: Any = PostgresBackend(url=postgres_server.url, table="probes_kept", column="bytea")
    with Cache(NgramProvider(), [Tier(backend, timeout=PATIENT)]) as cache:
        cache.migrate()
    with psycopg.connect(postgres_server.url, autocommit=True) as admin:
        admin.execute("CREATE ROLE keeper LOGIN")
        try:
            admin.execute("GRANT SELECT, INSERT, UPDATE ON probes_kept TO keeper")
            backend = PostgresBackend(url=url, table="probes_kept", column="bytea")
            with Cache(NgramProvider(), [Tier(backend, timeout=PATIENT)]) as cache:
                checks = [*cache.check(), *await cache.acheck()]
        finally:
            admin.execute("DROP OWNED BY keeper")
            admin.execute("DROP ROLE keeper")
    for check in checks:
        assert (check.ok, check.writes) == (False, False)
        assert check.detail.startswith("a probe was written, but it cannot be deleted (")
        assert "permission denied" in check.detail


class KeepsEverything(DictBackend):
    """Confirms a deletion that it does not make."""

    def delete_many(self, keys: Sequence[str], /) -> None: ...


def test_a_tier_that_only_claims_to_delete_fails_the_check() -> None:
    with Cache(NgramProvider(), [Tier(KeepsEverything())]) as cache:
        (check,) = cache.check()
    assert (check.ok, check.writes) == (False, False)
    assert check.detail == "a probe was deleted, but it can still be read"


def test_a_scope_that_is_too_large_to_measure_says_so() -> None:
    tier = Tier(DictBackend(scope="network"), timeout=PATIENT, write="inline")
    with Cache(NgramProvider(dimensions=8), [tier]) as cache:
        cache.embed_batch([str(number) for number in range(1024)])
        (held,) = cache.contents()
        assert (held.unmeasured, held.bytes is None) == (None, False)
        cache.embed("one more")
        (held,) = cache.contents()
    assert held.unmeasured == "more than 1,024 entries, and its backend cannot measure"
    assert (held.bytes, held.oldest, held.newest, held.entries, held.dimensions) == (None, None, None, 1025, 8)


def test_stats_says_that_a_scope_was_not_measured(
    redis_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("embedonce.toml").write_text(
        '[provider]\ntype = "ngram"\ndimensions = 8\n\n[[tiers]]\ntype = "redis"\nname = "far"\n'
        f'url = "{redis_server.url}"\nprefix = "large:"\nwrite = "inline"\ntimeout = "60s"\n'
    )
    with embedonce.open() as cache:
        cache.embed_batch([str(number) for number in range(1025)])
    shown = CliRunner().invoke(app, ["stats"])
    assert shown.exit_code == 0, shown.stderr
    expected = "more than 1,024 entries, and its backend cannot measure"
    assert f"note: tier 'far': bytes and dates not measured: {expected}\n" in shown.stderr
    (held,) = json.loads(CliRunner().invoke(app, ["stats", "--json"]).stdout)["held"]
    assert (held["unmeasured"], held["bytes"]) == (expected, None)
