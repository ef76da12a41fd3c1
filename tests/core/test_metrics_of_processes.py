"""The metrics of several processes: the folder in PROMETHEUS_MULTIPROC_DIR, which prometheus_client reads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from embedonce.metrics import register

SETUP = """
import os
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from embedonce import Cache, Tier
from embedonce.metrics import register
from embedonce.testing.fakes import CountingProvider, DictBackend
from embedonce.testing.faults import Fault, FaultyBackend
from embedonce_backends.memory import MemoryBackend
"""

Run = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Start a process that uses the metrics' folder. A process that is still running at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen(
            [sys.executable, "-c", SETUP + code],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


@contextmanager
def sums(folder: Path) -> Iterator[Callable[..., float | None]]:
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(folder))
    yield lambda name, **labels: registry.get_sample_value(f"embed_cache_{name}_total", labels)


WORKER = """
far = FaultyBackend(DictBackend(scope="host"), [Fault("raise", on="get")])
cache = Cache(CountingProvider(), [MemoryBackend(), Tier(far, name="far")])
register(cache)
cache.embed_batch(["private a", "b", "b"])
for _ in range(3):
    cache.embed("b")
cache.count_passed_by()
"""


def test_the_counters_of_two_workers_are_summed_up(run: Run, tmp_path: Path) -> None:
    for process in (run(WORKER), run(WORKER + "cache.embed('only here')\n")):
        finish(process)
    with sums(tmp_path) as value:
        assert value("hits", tier="memory") == 6
        assert value("hits", tier="far") == 0
        assert value("misses") == 5
        assert value("stored", tier="memory") == 5
        assert value("errors", tier="far", cause="OSError") == 5
        assert value("passed_by") == 2
        assert value("provider_tokens", provider="counting") == 2 * len("private ab") + len("only here")
        assert (value("provider_seconds", provider="counting") or 0) > 0
    assert not any(b"private" in file.read_bytes() for file in tmp_path.iterdir())


def test_a_scrape_sees_a_running_worker_and_counts_it_after_it_is_killed(run: Run, tmp_path: Path) -> None:
    process = run(WORKER + "print('ready', flush=True)\ninput()\n")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    for step in ("running", "killed", "marked dead"):
        if step == "killed":
            process.kill()
            process.wait()
        elif step == "marked dead":
            mark_process_dead(process.pid, path=str(tmp_path))
        with sums(tmp_path) as value:
            assert (value("hits", tier="memory"), value("misses"), value("passed_by")) == (3, 2, 1), step


def test_texts_that_fail_are_counted_at_the_end_of_the_call(run: Run, tmp_path: Path) -> None:
    code = """
def fail(texts):
    raise OSError("no")
cache = Cache(fail, [MemoryBackend()], space={"model": "m"})
register(cache)
cache.fetch(["a", "b"])
os._exit(0)
"""
    finish(run(code))
    with sums(tmp_path) as value:
        assert value("provider_failed", provider="callable") == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_worker_counts_only_what_it_does_itself(run: Run, tmp_path: Path) -> None:
    code = """
cache = Cache(CountingProvider(), [MemoryBackend()])
register(cache)
cache.embed("a")
children = []
for number in range(2):
    child = os.fork()
    if child == 0:
        cache.embed("a")
        cache.embed(f"new {number}")
        os._exit(0)
    children.append(child)
for child in children:
    assert os.waitpid(child, 0)[1] == 0
cache.embed("a")
"""
    finish(run(code))
    assert len(list(tmp_path.iterdir())) == 3
    with sums(tmp_path) as value:
        assert value("misses") == 3
        assert value("hits", tier="memory") == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_forks_beside_threads_that_count_leave_no_lock_behind(run: Run, tmp_path: Path) -> None:
    code = """
import threading
cache = Cache(CountingProvider(), [MemoryBackend()])
register(cache)
stop = threading.Event()
def embed():
    while not stop.is_set():
        cache.embed("a")
threads = [threading.Thread(target=embed) for _ in range(3)]
for thread in threads:
    thread.start()
for number in range(20):
    child = os.fork()
    if child == 0:
        cache.embed_batch(["a", f"new {number}"])
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
for thread in threads:
    thread.join()
"""
    finish(run(code))
    with sums(tmp_path) as value:
        assert value("misses") == 21


def test_a_cache_that_is_registered_twice_is_counted_once(run: Run, tmp_path: Path) -> None:
    code = """
everything = CollectorRegistry()
MultiProcessCollector(everything)
one, two = (Cache(CountingProvider(), [MemoryBackend()]) for _ in range(2))
one.embed("before it is registered")
register(one, two, registry=CollectorRegistry())
register(one, registry=everything)
register(two)
for cache in (one, two):
    cache.embed("a")
    cache.embed("a")
for registry in (REGISTRY, everything):
    lines = generate_latest(registry).decode().splitlines()
    print(*(line for line in lines if line.startswith("embed_cache_misses_total")))
"""
    assert finish(run(code)).splitlines() == ["embed_cache_misses_total 1.0", "embed_cache_misses_total 3.0"]
    with sums(tmp_path) as value:
        assert value("misses") == 3
        assert value("hits", tier="memory") == 2


def test_a_folder_that_does_not_exist_is_an_error_at_startup(run: Run, tmp_path: Path) -> None:
    process = run("os.environ['PROMETHEUS_MULTIPROC_DIR'] += '/none'\n" + WORKER)
    _, err = process.communicate(timeout=120)
    assert "PROMETHEUS_MULTIPROC_DIR must name an existing folder" in err


def test_a_folder_that_cannot_be_written_fails_no_call(run: Run) -> None:
    code = """
import prometheus_client.mmap_dict as files
cache = Cache(CountingProvider(), [MemoryBackend()])
register(cache)
def fail(*_):
    raise OSError(28, "No space left on device")
files.MmapedDict.write_value = fail
cache.embed("a")
cache.embed("a")
print(cache.stats().providers["counting"].texts)
"""
    process = run(code)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, "1\n"), err
    assert err.count("metrics cannot be written") == 1


def test_without_the_variable_the_hits_take_the_fast_path() -> None:
    from embedonce import Cache
    from embedonce.testing.fakes import CountingProvider
    from embedonce_backends.memory import MemoryBackend

    with Cache(CountingProvider(), [MemoryBackend()]) as cache:
        register(cache, registry=CollectorRegistry())
        assert cache._hot[1]


def test_hits_take_the_fast_path_and_are_counted_at_once(run: Run, tmp_path: Path) -> None:
    code = """
cache = Cache(CountingProvider(), [MemoryBackend()])
register(cache)
cache.embed_batch(["a", "b"])
cache._chain.engine.fetch = None
cache.embed("a")
cache.embed_batch(["a"])
cache.fetch(["a", "b"])
os.kill(os.getpid(), 9)
"""
    process = run(code)
    process.communicate(timeout=120)
    mark_process_dead(process.pid, path=str(tmp_path))
    with sums(tmp_path) as value:
        assert value("hits", tier="memory") == 4
        assert value("stored", tier="memory") == 2
