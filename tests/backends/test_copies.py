"""Every kind of tier is copied to every other one by the command line, which is killed half-way and then continues.

The commands run in children of one process that has imported everything, because a new process would take longer to
import embedonce than to copy. Run with ``-rP`` to see the counts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optional import needs
from typer.testing import CliRunner

import embedonce
from embedonce import Cache, Entry
from embedonce._engine.bulk_calls import LIFE_RATIO, read_exactly
from embedonce._engine.ports import run_blocking
from embedonce.cli import app
from embedonce.testing.fakes import DictBackend
from embedonce.vectors import freeze

pytestmark = [needs("pyarrow"), pytest.mark.skipif(sys.platform == "win32", reason="the children are forked")]

KINDS = ("disk", "redis", "postgres", "memcached")
COUNT = 240
DIMENSIONS = 8
TEXTS = [f"text {i}" for i in range(COUNT)]
CREATED = 1_700_000_000.125
LIVES = (None, 3600.5, 86_400.0, 30 * 86_400.0)

CHILDREN = """
import json, os, sys, time

import embedonce_backends.disk.backend, embedonce_backends.redis.backend, embedonce_backends.postgres.backend
import embedonce_backends.memcached.backend, embedonce_backends.bundle.backend, embedonce_providers.ngram

from embedonce._engine import transferring
from embedonce.cli import commands, copy, opened, transfers

transferring.MAX_WINDOW = transferring.FIRST_WINDOW = 24
store = transferring.write_strictly
windows = 0


async def hang_in_the_fourth_window(port, tier, in_flight, number, entries, now):
    global windows
    windows += 1
    if windows < 4:
        return await store(port, tier, in_flight, number, entries, now)
    half = dict(list(entries.items())[: len(entries) // 2])
    await store(port, tier, in_flight, number, half, now)
    os.write(1, b"waiting\\n")  # a command redirects what is printed
    time.sleep(600)


for line in sys.stdin:
    child = os.fork()
    if not child:
        transferring.write_strictly = hang_in_the_fourth_window
        commands.app(json.loads(line))
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


@pytest.fixture(scope="module")
def children() -> Iterator[subprocess.Popen[str]]:
    """A process that runs each command of its standard input in a child, up to the middle of the copy."""
    with subprocess.Popen(
        [sys.executable, "-P", "-c", CHILDREN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def kill_in_the_middle(children: subprocess.Popen[str], *arguments: str | Path) -> None:
    """Run a command in a child, and kill it when it has stored three windows and a half."""
    assert children.stdin is not None
    assert children.stdout is not None
    children.stdin.write(json.dumps([str(argument) for argument in arguments]) + "\n")
    children.stdin.flush()
    lines = [children.stdout.readline().strip() for _ in range(2)]
    assert "waiting" in lines
    [pid] = [line for line in lines if line != "waiting"]
    os.kill(int(pid), signal.SIGKILL)
    assert children.stdout.readline() == "ended\n"


def run_command(*arguments: str | Path) -> dict[str, Any]:
    """Run a command with ``--json`` to its end, and return its document."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert (result.exit_code, result.stderr) == (0, ""), result.exception
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def describe_tier(kind: str, name: str, folder: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return the table of a tier whose store is its own."""
    own: dict[str, Any] = {"path": str(folder / name)}
    if kind == "redis":
        own = {"url": request.getfixturevalue("redis_server").url, "prefix": f"{folder.name}{name}:"}
    elif kind == "postgres":
        own = {"url": request.getfixturevalue("postgres_server").url, "table": f"{folder.name}{name}"}
    elif kind == "memcached":
        own = {"servers": request.getfixturevalue("memcached_servers"), "prefix": f"{folder.name}{name}:"}
    return {"type": kind, "name": name, "timeout": "60s"} | own


def open_cache(*tiers: Mapping[str, Any]) -> Cache:
    return embedonce.open({"provider": {"type": "ngram", "dimensions": DIMENSIONS}, "tiers": list(tiers)})


@pytest.fixture(scope="module")
def entries() -> dict[str, Entry]:
    """Entries with costs, metadata and dates."""
    rng = np.random.default_rng(17)
    now = time.time()
    with open_cache() as cache:
        keys = cache.keys(TEXTS)
    return {
        key: Entry(
            freeze(rng.normal(size=DIMENSIONS)),
            CREATED + i,
            None if LIVES[i % 4] is None else now + (LIVES[i % 4] or 0),
            {"number": i, "words": "grün"} if i % 3 else None,
            tokens=i if i % 2 else None,
            seconds=i / 7 if i % 5 else None,
        )
        for i, key in enumerate(keys)
    }


@pytest.fixture(scope="module")
def sources(
    entries: dict[str, Entry], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, dict[str, Any]]:
    """The table of a tier of each kind, which has all entries."""
    folder = tmp_path_factory.mktemp("copies")
    tables = {kind: describe_tier(kind, f"source-{kind}", folder, request) for kind in KINDS}
    full = DictBackend(holds="entries", scope="host")
    full.set_many(entries, None)
    with open_cache(*tables.values()) as cache:
        for kind in KINDS:
            assert cache.copy(full, f"source-{kind}").copied == COUNT
        cache.export(folder / "bundle", full)
    return tables | {"bundle": {"type": "bundle", "name": "source-bundle", "path": str(folder / "bundle")}}


def write_config(folder: Path, *tiers: Mapping[str, Any]) -> Path:
    lines = ["[provider]", 'type = "ngram"', f"dimensions = {DIMENSIONS}"]
    for tier in tiers:
        lines += ["", "[[tiers]]", *(f"{name} = {json.dumps(value)}" for name, value in tier.items())]
    path = folder / "embedonce.toml"
    path.write_text("\n".join(lines))
    return path


def read_all(table: Mapping[str, Any], keys: list[str]) -> dict[str, Entry]:
    """Return what a tier has, without counting or promoting anything."""
    with open_cache(table) as cache:
        [tier] = cache._chain.tiers
        return run_blocking(read_exactly(cache._chain.ports.blocking, tier, keys)).entries


def compare(found: Mapping[str, Entry], entries: Mapping[str, Entry]) -> None:
    """Check that all entries are equal: in the bits of the vectors, in costs, metadata and dates."""
    assert found.keys() == entries.keys()
    for key, entry in entries.items():
        copy = found[key]
        assert copy.vector.tobytes() == entry.vector.tobytes()
        assert copy._replace(vector=entry.vector, expires=entry.expires) == entry
        assert (copy.expires is None) == (entry.expires is None)
        assert copy.expires is None or copy.expires == pytest.approx(entry.expires, abs=0.01)


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", [*KINDS, "bundle"])
def test_a_copy_that_was_killed_stores_exactly_the_rest(
    source: str,
    target: str,
    sources: dict[str, dict[str, Any]],
    entries: dict[str, Entry],
    children: subprocess.Popen[str],
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> None:
    folder = tmp_path_factory.mktemp("to")
    table = describe_tier(target, "target", folder, request)
    config = write_config(folder, sources[source], table)
    texts = folder / "texts.jsonl"
    texts.write_text("".join(f"{json.dumps({'text': text})}\n" for text in TEXTS))
    arguments = ["copy", "--config", config, "--from", f"source-{source}", "--to", "target"]
    arguments += ["--texts", texts] if source == "memcached" else []
    kill_in_the_middle(children, *arguments)
    stored = len(read_all(table, list(entries)))
    # A source that cannot list its keys is asked for the keys that the texts could have, so its windows are not full.
    assert 0 < stored < 3 * 24 if source == "memcached" else stored == 3 * 24 + 12
    done = run_command(*arguments)
    counts = {name: done[name] for name in ("found", "copied", "already_there")}
    assert counts == {"found": COUNT, "copied": COUNT - stored, "already_there": stored}
    compare(read_all(table, list(entries)), entries)
    again = run_command(*arguments)
    assert (again["copied"], again["already_there"]) == (0, COUNT)
    print(f"{source} to {target}: {stored} stored before the kill, {done['copied']} after it, {COUNT} in all")


def test_the_ttl_in_the_store_is_what_remains(
    sources: dict[str, dict[str, Any]],
    entries: dict[str, Entry],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    redis_server: Any,
) -> None:
    table = describe_tier("redis", "ttl", tmp_path, request)
    with open_cache(sources["disk"], table) as cache:
        assert cache.copy("source-disk", "ttl").copied == COUNT
    now = time.time()
    for key, entry in entries.items():
        left = redis_server.call("PTTL", table["prefix"] + key) / 1000
        if entry.expires is None:
            assert left < 0
        else:
            assert entry.expires - now - 1 <= left <= LIFE_RATIO * (entry.expires - now) + 60


def test_a_bundle_is_imported_into_every_kind_of_tier(
    sources: dict[str, dict[str, Any]], entries: dict[str, Entry], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tables = {kind: describe_tier(kind, f"new-{kind}", tmp_path, request) for kind in KINDS}
    config = write_config(tmp_path, *tables.values())
    done = run_command("import", sources["bundle"]["path"], "--from", "bundle", "--config", config)
    assert {name: one["copied"] for name, one in done["tiers"].items()} == {f"new-{kind}": COUNT for kind in KINDS}
    for table in tables.values():
        compare(read_all(table, list(entries)), entries)
