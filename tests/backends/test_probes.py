"""``Cache.check`` and ``Cache.contents`` with real servers: probes that leave nothing behind, and measured scopes."""

from __future__ import annotations

from typing import Any

import pytest

from embedonce import Cache, Tier
from embedonce.encryption import Encryption
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


def test_a_server_that_refuses_writes_fails_the_check(redis_server: Any) -> None:
    import redis

    from embedonce_backends.redis import RedisBackend

    with redis.Redis.from_url(redis_server.url) as admin:
        admin.acl_setuser("reader", enabled=True, nopass=True, keys=["*"], commands=["+@all", "-set", "-mset"])
        url = redis_server.url.replace("redis://", "redis://reader:x@").replace("default@", "")
        try:
            tier = Tier(RedisBackend(url=url, prefix="probes:"), name="far", timeout=PATIENT)
            with Cache(NgramProvider(), [tier]) as cache:
                (check,) = cache.check()
        finally:
            admin.acl_deluser("reader")
    assert (check.ok, check.writes) == (False, False)
    assert check.detail
