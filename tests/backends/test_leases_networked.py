"""Processes that share a Redis, Postgres, memcached or disk tier compute each missing text once."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import children
import pytest
from patience import LONG_TIMEOUT, wait_until

from embedonce import config

OPTIONS = {
    "redis": lambda request: {"url": request.getfixturevalue("redis_server").url},
    "postgres": lambda request: {"url": request.getfixturevalue("postgres_server").url},
    "memcached": lambda request: {"servers": request.getfixturevalue("memcached_servers")},
    "disk": lambda request: {"path": str(request.getfixturevalue("tmp_path") / "disk")},
}


@pytest.fixture(params=OPTIONS)
def table(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The table of a tier that has only a type and an address. The store is empty."""
    made = {"type": request.param, **OPTIONS[request.param](request)}
    if request.param != "disk":
        with config.open({"tiers": [made]}, provider=children.CountingProvider()) as cache:
            cache.migrate()
            cache.forget([*children.COLD_TEXTS, "a"])
    return made


@pytest.fixture(scope="module")
def embed_in_eight_processes() -> Iterator[Callable[..., list[dict[str, int]]]]:
    """A function that runs :func:`children.embed_cold_texts` in eight parallel processes, and returns their results.

    The tests share the processes, because a process imports embedonce for longer than it embeds. Each test opens a new
    cache in each process: every process waits at the barrier until all eight have a cache, so none can take two calls.
    """
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(8) as pool:

        def embed(tiers: list[dict[str, Any]], log: Path, face: str) -> list[dict[str, int]]:
            barrier = manager.Barrier(8)
            return pool.starmap(
                children.embed_cold_texts, [(tiers, str(log), seed, barrier, face) for seed in range(8)], chunksize=1
            )

        yield embed


def assert_each_text_was_computed_once(log: Path) -> None:
    computed = Counter(log.read_text().splitlines())
    assert {text: n for text, n in computed.items() if n > 1} == {}
    assert computed.keys() == set(children.COLD_TEXTS)


def test_eight_processes_compute_a_thousand_cold_texts_a_thousand_times(
    table: dict[str, Any], embed_in_eight_processes: Callable[..., list[dict[str, int]]], tmp_path: Path
) -> None:
    found = embed_in_eight_processes([table], tmp_path / "log", "sync")
    assert found == [{}] * 8
    assert_each_text_was_computed_once(tmp_path / "log")


@pytest.mark.parametrize("front", ["memory", "disk"])
def test_eight_processes_with_a_tier_of_their_own_compute_each_text_once(
    front: str,
    request: pytest.FixtureRequest,
    embed_in_eight_processes: Callable[..., list[dict[str, int]]],
    tmp_path: Path,
) -> None:
    first = {"type": "memory"} if front == "memory" else {"type": "disk", "path": str(tmp_path / "near")}
    tiers = [first, {"type": "redis", **OPTIONS["redis"](request), "prefix": f"{front}:"}]
    found = embed_in_eight_processes(tiers, tmp_path / "log", "async")
    assert found == [{}] * 8
    assert_each_text_was_computed_once(tmp_path / "log")


def test_when_a_process_is_killed_while_it_computes_another_takes_over(table: dict[str, Any], tmp_path: Path) -> None:
    log = tmp_path / "log"
    leader = multiprocessing.get_context("spawn").Process(
        target=children.embed_and_hang, args=([table], str(log)), daemon=True
    )
    leader.start()
    wait_until(lambda: log.exists() and log.read_text() == "a\n")
    assert leader.pid is not None
    os.kill(leader.pid, signal.SIGKILL)
    leader.join(LONG_TIMEOUT)
    provider = children.LoggingProvider(str(log))
    with config.open({"tiers": [table]}, provider=provider) as cache:
        assert (cache.embed("a") == provider.vector_of("a")).all()
    assert log.read_text() == "a\na\n"
