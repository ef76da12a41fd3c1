"""Processes that share a Redis, Postgres or memcached server compute each missing text once."""

from __future__ import annotations

import children
import pytest

OPTIONS = {
    "redis": lambda request: {"url": request.getfixturevalue("redis_server").url},
    "postgres": lambda request: {"url": request.getfixturevalue("postgres_server").url, "table": "leases"},
    "memcached": lambda request: {"servers": request.getfixturevalue("memcached_servers")},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_eight_processes_compute_a_thousand_cold_texts_a_thousand_times(
    kind: str, request: pytest.FixtureRequest
) -> None:
    table = {"type": kind, "lease": "60s", "timeout": "60s", **OPTIONS[kind](request)}
    found = children.run_eight_processes(table, kind)
    assert sum(errors for _, errors in found) == 0
    assert sum(computed for computed, _ in found) == len(children.COLD_TEXTS)
