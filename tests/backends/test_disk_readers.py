"""A reader that stands still on the disk tier: SQLite's log stays limited, and removals say what is not overwritten."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from hashlib import sha256
from pathlib import Path

import pytest

import embedonce
from embedonce.contracts import deadline
from embedonce.errors import EraseIncomplete, TierError
from embedonce.testing import CountingProvider
from embedonce_backends.disk import DiskBackend
from embedonce_backends.disk import log as disk_log

MIB = 2**20
LEASE = f"eo1.lease.{'0' * 16}.{'1' * 64}"
SECRET = b"a vector that somebody wants forgotten" * 40


def make_items(start: int, count: int, size: int = 1600) -> dict[str, bytes]:
    numbers = range(start, start + count)
    return {f"eo1.0123456789abcdef.{number:064x}": sha256(b"%d" % number).digest() * (size // 32) for number in numbers}


@contextmanager
def open_reader(folder: Path) -> Iterator[sqlite3.Connection]:
    """Open a transaction that reads and does not end, as in a ``sqlite3`` shell. The caller may roll it back."""
    with closing(sqlite3.connect(folder / "cache.db", isolation_level=None)) as connection:
        connection.execute("BEGIN")
        connection.execute("SELECT COUNT(*) FROM Cache").fetchall()
        yield connection


def contains(folder: Path, data: bytes) -> bool:
    return any(data in path.read_bytes() for path in folder.iterdir())


@pytest.fixture
def small_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_log, "MIN_LIMIT", 2 * MIB)
    monkeypatch.setattr(disk_log, "LOG_BYTES", MIB // 2)


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each attempt to empty the log, whether it waited for readers."""
    made: list[bool] = []
    original = disk_log.Log._empty

    def count(self: disk_log.Log, connection: disk_log.Connection, is_waiting: bool) -> bool:
        made.append(is_waiting)
        return original(self, connection, is_waiting)

    monkeypatch.setattr(disk_log.Log, "_empty", count)
    return made


# --- the log ----------------------------------------------------------------------------------


def fill_log(backend: DiskBackend) -> int:
    """Write until a write is refused, and return the number of writes that succeeded."""
    for turn in range(200):
        try:
            backend.set_many(make_items(1000 * turn, 60), None)
        except disk_log.LogTooLarge:
            return turn
    raise AssertionError("no write was refused")


@pytest.mark.usefixtures("small_log")
def test_a_reader_that_stands_still_cannot_make_the_log_grow_forever(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(DiskBackend(path=tmp_path, max_bytes=16 * MIB)) as backend:
        backend.set_many(make_items(0, 10), None)
        with open_reader(tmp_path) as reader, caplog.at_level(logging.WARNING):
            fill_log(backend)
            for turn in range(20):
                with pytest.raises(disk_log.LogTooLarge, match="another connection still reads"):
                    backend.set_many(make_items(10**6 + turn, 60), None)
                with pytest.raises(disk_log.LogTooLarge):
                    backend.add_many(make_items(10**6 + turn, 60), None)
            assert os.stat(tmp_path / "cache.db-wal").st_size < 3 * MIB
            assert backend.get_many(list(make_items(0, 10))) == make_items(0, 10), "stored entries are served"
            assert [record.name for record in caplog.records] == ["embedonce.disk"], "the problem is logged once"
            assert "eo1." not in caplog.text
            reader.execute("ROLLBACK")
            backend.set_many(make_items(0, 60), None)
        assert os.stat(tmp_path / "cache.db-wal").st_size < MIB, "the log is small again"


def test_the_limit_of_the_log_depends_on_the_limit_of_the_file(tmp_path: Path) -> None:
    assert disk_log.Log(tmp_path / "cache.db", MIB).limit == 256 * MIB
    assert disk_log.Log(tmp_path / "cache.db", 64 * 2**30).limit == 8 * 2**30


@pytest.mark.usefixtures("small_log")
def test_attempts_that_wait_for_readers_become_rare(tmp_path: Path, attempts: list[bool]) -> None:
    with closing(DiskBackend(path=tmp_path, max_bytes=16 * MIB)) as backend:
        backend.set_many(make_items(0, 10), None)
        with open_reader(tmp_path):
            writes = fill_log(backend)
            assert writes > 5
            assert sum(attempts) <= 4, "the log doubles only a few times before it reaches its limit"
            attempts.clear()
            for _ in range(64):
                with pytest.raises(disk_log.LogTooLarge):
                    backend.set_many(make_items(10**6, 60), None)
            assert len(attempts) == 64
            assert sum(attempts) <= 6


@pytest.mark.usefixtures("small_log")
def test_a_refused_write_is_a_cause_in_the_statistics(tmp_path: Path) -> None:
    backend = DiskBackend(path=tmp_path, max_bytes=16 * MIB)
    with embedonce.Cache(
        CountingProvider(dimensions=384), [embedonce.Tier(backend, name="disk", timeout=60.0)]
    ) as cache:
        cache.embed("stored")
        with open_reader(tmp_path):
            for turn in range(40):
                cache.embed_batch([f"text {turn} {number}" for number in range(100)])
            assert cache.stats().tiers["disk"].causes["LogTooLarge"] > 0
            assert cache.fetch(["stored"]).sources == ["disk"]
            (check,) = cache.check()
            assert not check.ok
            assert check.detail.startswith("LogTooLarge")


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="this platform cannot stop a process")
@pytest.mark.usefixtures("small_log")
def test_a_stopped_process_that_reads_is_noticed(tmp_path: Path) -> None:
    code = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1] + "/cache.db", isolation_level=None)
connection.execute("BEGIN")
connection.execute("SELECT COUNT(*) FROM Cache").fetchall()
print("reading", flush=True)
sys.stdin.read()
"""
    with closing(DiskBackend(path=tmp_path, max_bytes=16 * MIB)) as backend:
        backend.set_many(make_items(0, 10), None)
        reader = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            assert reader.stdout is not None
            assert reader.stdout.readline() == b"reading\n"
            reader.send_signal(signal.SIGSTOP)
            fill_log(backend)
        finally:
            reader.kill()
            reader.communicate()
        backend.set_many(make_items(10**6, 60), None)


def test_check_names_the_size_of_the_log(tmp_path: Path) -> None:
    with embedonce.Cache(CountingProvider(), [DiskBackend(path=tmp_path)]) as cache:
        cache.embed("text")
        (check,) = cache.check()
        assert check.ok
        assert "log 0." in check.detail


# --- removed data -----------------------------------------------------------------------------


def test_removing_with_a_reader_in_the_way_says_that_the_data_is_still_there(tmp_path: Path) -> None:
    with closing(DiskBackend(path=tmp_path)) as backend:
        backend.set_many({**make_items(0, 20), "eo1.x.secret": SECRET}, None)
        with open_reader(tmp_path) as reader:
            with deadline(1.0), pytest.raises(TierError, match="still contains their data"):
                backend.delete_many(["eo1.x.secret"])
            assert backend.get("eo1.x.secret") is None, "the entry is not served any more"
            assert contains(tmp_path, SECRET[:60])
            with deadline(1.0), pytest.raises(TierError, match="still contains their data"):
                backend.delete_many(["eo1.x.secret"])
            reader.execute("ROLLBACK")
            backend.set_many(make_items(100, 1), None)
            assert not contains(tmp_path, SECRET[:60]), "the next write overwrites the data"


def test_removing_again_overwrites_the_data_in_another_process_too(tmp_path: Path) -> None:
    with closing(DiskBackend(path=tmp_path)) as first, closing(DiskBackend(path=tmp_path)) as second:
        first.set_many({**make_items(0, 20), "eo1.x.secret": SECRET}, None)
        with open_reader(tmp_path) as reader:
            with deadline(1.0), pytest.raises(TierError):
                first.delete_many(["eo1.x.secret"])
            reader.execute("ROLLBACK")
            second.delete_many(["eo1.x.secret"])
            assert not contains(tmp_path, SECRET[:60])


def test_forget_and_purge_name_a_tier_whose_file_still_contains_the_data(tmp_path: Path) -> None:
    with embedonce.Cache(CountingProvider(), [DiskBackend(path=tmp_path)]) as cache:
        cache.embed_batch([f"text {number}" for number in range(1500)])
        with open_reader(tmp_path) as reader:
            with pytest.raises(EraseIncomplete, match="still contains their data") as caught:
                cache.forget(["text 7"])
            assert list(caught.value.tiers) == ["disk"]
            with pytest.raises(EraseIncomplete, match="still contains their data"):
                cache.purge(namespace="")
            assert sum(held.entries for held in cache.contents()) == 0, "all entries are removed nevertheless"
            reader.execute("ROLLBACK")
        cache.forget(["text 7"])


def test_removing_a_lease_does_not_empty_the_log(tmp_path: Path, attempts: list[bool]) -> None:
    with closing(DiskBackend(path=tmp_path)) as backend:
        backend.set_many(make_items(0, 5), None)
        backend.add_many({LEASE: b"token"}, 10.0)
        backend.delete_many([LEASE])
        assert attempts == []
        assert backend.get(LEASE) is None
        backend.delete_many([next(iter(make_items(0, 5)))])
        assert attempts == [True]


def test_upkeep_that_fails_does_not_fail_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bool:
        raise sqlite3.OperationalError("disk I/O error")

    with closing(DiskBackend(path=tmp_path, max_bytes=MIB)) as backend:
        monkeypatch.setattr(disk_log, "LOG_BYTES", 0)
        monkeypatch.setattr(disk_log.Log, "_empty", fail)
        monkeypatch.setattr("embedonce_backends.disk.backend.release_pages", fail)
        for turn in range(20):
            backend.set_many(make_items(100 * turn, 100), None)
        assert backend.get_many(list(make_items(1900, 100))) == make_items(1900, 100)
