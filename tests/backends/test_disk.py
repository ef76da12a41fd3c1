"""The disk backend: the contract, planted rows, permissions, size limits, locks, forks, full and damaged disks."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import random
import select
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import diskcache
import numpy as np
import pytest

import embedonce
from embedonce.contracts import deadline
from embedonce.errors import CacheClosed, ConfigError, TierError, TierTimeout
from embedonce.testing import BackendContract, CountingProvider, ManualClock, Recipe
from embedonce.testing.contracts.support import run_in_fork, run_in_threads
from embedonce_backends.disk import BytesDisk, DiskBackend, sqlite
from embedonce_backends.disk import file as disk_file
from embedonce_backends.disk.folder import find_permission_problem
from embedonce_backends.disk.stored_keys import encode_key

MIB = 2**20
PATIENT = 60.0
"""Seconds within which a healthy disk answers on any machine."""


LEASE = f"eo1.lease.{'0' * 16}.{'1' * 64}"
"""Key of a lease."""


def key_of(number: int) -> str:
    return f"eo1.0123456789abcdef.{sha256(b'%d' % number).hexdigest()}"


def value_of(number: int, size: int = 1600) -> bytes:
    return sha256(b"value %d" % number).digest() * (size // 32)


def items_of(numbers: range, size: int = 1600) -> dict[str, bytes]:
    return {key_of(number): value_of(number, size) for number in numbers}


def size_of(folder: Path) -> int:
    return (folder / "cache.db").stat().st_size


@contextmanager
def open_backend(folder: Path, **options: Any) -> Iterator[DiskBackend]:
    backend = DiskBackend(path=folder, **options)
    try:
        yield backend
    finally:
        backend.close()


def make_patient_tier(backend: DiskBackend) -> embedonce.Tier:
    return embedonce.Tier(backend, name="disk", timeout=PATIENT)


def assert_times_out(call: Callable[[], object], words: str) -> None:
    """Require that a call ends by its deadline with a message that says what it waited for."""
    for seconds in (0.1, 1.0, 10.0):
        with deadline(seconds), pytest.raises(TimeoutError) as caught:
            call()
        if "timeout has passed" not in str(caught.value):
            break
        # If the machine stalls, the deadline passes before the call starts to wait, so retry with more time.
    assert words in str(caught.value)


@contextmanager
def connect_directly(folder: Path) -> Iterator[sqlite3.Connection]:
    """Open the database with a connection that does not belong to the backend."""
    connection = sqlite3.connect(folder / "cache.db", isolation_level=None, timeout=0, check_same_thread=False)
    try:
        yield connection
    finally:
        connection.close()


class TestDisk(BackendContract):
    folders: Path

    @pytest.fixture(autouse=True)
    def _own_folder(self, tmp_path: Path) -> None:
        self.folders = tmp_path
        self.clock = ManualClock()
        self.made = 0

    def make(self) -> DiskBackend:
        self.made += 1
        return self._make_backend(self.folders / str(self.made))

    def reopen(self, backend: DiskBackend) -> DiskBackend:
        return self._make_backend(backend.path)

    def recipe(self, backend: DiskBackend) -> Recipe:
        return Recipe(DiskBackend, {"path": str(backend.path)})

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @contextmanager
    def stall(self, backend: DiskBackend) -> Iterator[None]:
        backend._database.connections.renew()
        with connect_directly(backend.path) as other:
            other.execute("PRAGMA locking_mode = EXCLUSIVE")
            other.execute("BEGIN EXCLUSIVE")
            other.execute("SELECT COUNT(*) FROM Cache")
            yield

    def _make_backend(self, folder: Path) -> DiskBackend:
        backend = DiskBackend(path=folder, max_bytes=64 * MIB)
        backend.clock = self.clock
        return backend


# --- nothing is unpickled ---------------------------------------------------------------------


class Canary:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, int]]:
        return os.mkdir, (str(self.path), 0o700)


def encode_in_place(key: str) -> bytes | str:
    return encode_key(key)[1]


@pytest.fixture(params=[encode_in_place, str], ids=["stored as bytes", "stored as text by an earlier version"])
def encode(request: pytest.FixtureRequest) -> Callable[[str], bytes | str]:
    """How keys are stored."""
    found: Callable[[str], bytes | str] = request.param
    return found


def plant(folder: Path, canary: Path, encode: Callable[[str], bytes | str]) -> None:
    """Plant pickles as values, in files and as keys, and odd settings, as anyone who may write to the folder can."""
    with diskcache.Cache(str(folder)) as cache:
        cache[encode(key_of(1))] = Canary(canary)
        cache[(key_of(2), Canary(canary))] = b"value"
    with diskcache.Cache(str(folder), disk_min_file_size=0) as cache:
        cache[encode(key_of(3))] = Canary(canary)
    evil = pickle.dumps(Canary(canary))
    with connect_directly(folder) as connection:
        insert = "INSERT INTO Cache (key, raw, mode, filename, value) VALUES (?, ?, ?, ?, ?)"
        connection.execute(insert, (encode(key_of(4)), 1, 4, None, evil))
        connection.execute(insert, (encode(key_of(5)), 0, 4, None, evil))
        connection.execute(insert, (encode(key_of(6)), 1, 2, "../../../etc/passwd", None))
        connection.execute(insert, (encode(key_of(7)), 1, 1, None, "text"))
        connection.execute(insert, (evil, 0, 4, None, evil))
        connection.execute(insert, (evil, 1, 4, None, evil))
        connection.execute("INSERT INTO Cache (key, raw, mode, value) VALUES (CAST(x'656f312eff' AS TEXT), 1, 1, 'x')")
        settings = {
            "disk_get": evil,
            "disk_pickle_protocol": evil,
            "disk_min_file_size": "x",
            "disk": evil,
            "_disk": evil,
            "_connection": evil,
            "eviction_policy": "no such policy",
            "sqlite_writable_schema": 1,
            "sqlite_journal_mode": "delete",
            "sqlite_x; DROP TABLE Cache; --": 1,
            "tag_index": evil,
            evil: evil,
            "count": evil,
            "size": "x",
        }
        connection.executemany("INSERT OR REPLACE INTO Settings VALUES (?, ?)", list(settings.items()))


def test_planted_pickles_are_never_loaded(tmp_path: Path, encode: Callable[[str], bytes | str]) -> None:
    folder, canary = tmp_path / "cache", tmp_path / "canary"
    plant(folder, canary, encode)
    planted = [key_of(number) for number in range(1, 8)]
    with open_backend(folder) as backend:
        found = backend.get_many(planted)
        assert set(found) == {key_of(number) for number in (1, 3, 4, 6, 7)}, "a pickled key (raw = 0) is not read"
        assert all(type(value) is bytes for value in found.values())
        assert {found[key_of(number)] for number in (3, 6, 7)} == {b""}, "neither a file nor a text is read"
        assert [backend.get(key) for key in planted] == [found.get(key) for key in planted]
        assert len(list(backend.scan(""))) == backend.count("") == 6
        backend.set_many(items_of(range(1, 8)), None)
        assert backend.add_many(items_of(range(20)), None) == {key_of(0), *map(key_of, range(8, 20))}
        assert dict(backend.get_many(list(items_of(range(20))))) == items_of(range(20))
        backend.delete_many(list(backend.scan("")))
        assert backend.count("eo1.0") == 0
    assert not canary.exists()
    assert (pickle.loads(pickle.dumps(Canary(canary))), canary.exists()) == (None, True), "the canary itself works"


def test_a_planted_pickle_is_a_corrupt_miss(tmp_path: Path) -> None:
    folder, canary = tmp_path / "cache", tmp_path / "canary"
    provider = CountingProvider()
    with embedonce.Cache(provider, [make_patient_tier(DiskBackend(path=folder))]) as cache:
        expected = cache.embed("text")
    evil = sqlite3.Binary(pickle.dumps(Canary(canary)))
    with connect_directly(folder) as connection:
        connection.execute("UPDATE Cache SET mode = 4, value = ? WHERE TYPEOF(key) = 'blob'", (evil,))
    with embedonce.Cache(provider, [make_patient_tier(DiskBackend(path=folder))]) as cache:
        np.testing.assert_array_equal(cache.embed("text"), expected)
        assert cache.stats().tiers["disk"].corrupt == 1
        assert cache.stats().tiers["disk"].hits == 0
    assert not canary.exists()


def test_bytes_disk_refuses_everything_else(tmp_path: Path) -> None:
    folder, canary = tmp_path / "cache", tmp_path / "canary"
    plant(folder, canary, encode_in_place)
    with connect_directly(folder) as connection:
        connection.execute("DELETE FROM Settings")
        connection.execute("DELETE FROM Cache WHERE value = 'x'")  # diskcache itself fails at its invalid UTF-8 key
    with diskcache.Cache(str(folder), disk=BytesDisk) as cache:
        for number in (1, 3, 4, 6, 7):
            with pytest.raises(ValueError, match="did not write"):
                cache.get(key_of(number))
        with pytest.raises(ValueError, match="did not write"):
            list(cache)
        for key in (1, b"key", ("key",), None):
            with pytest.raises(TypeError, match="key must be a str"):
                cache.get(key)
        for value in (1, "text", None, ["list"], bytearray(b"x")):
            with pytest.raises(TypeError, match="value must be bytes"):
                cache.set("key", value)
        cache.set("key", b"value" * 100_000)
        assert cache.get("key") == b"value" * 100_000
        assert cache.pop("key") == b"value" * 100_000
    assert not canary.exists()


def test_a_planted_file_name_removes_nothing(tmp_path: Path) -> None:
    folder, kept = tmp_path / "cache", tmp_path / "kept"
    kept.write_text("kept")
    with open_backend(folder) as backend:
        backend.set_many(items_of(range(2)), None)
    with connect_directly(folder) as connection:
        connection.execute("UPDATE Cache SET filename = '../kept', mode = 2, value = NULL, expire_time = 1")
    with open_backend(folder) as backend:
        backend.set_many(items_of(range(2, 4)), None)
        assert backend.count("") == 2
    with diskcache.Cache(str(folder), disk=BytesDisk) as cache:
        cache.clear()
    assert kept.exists()


def test_diskcache_reads_the_folder_and_finds_it_sound(tmp_path: Path) -> None:
    with open_backend(tmp_path) as backend:
        backend.set_many(items_of(range(100)), None)
        backend.set_many(items_of(range(50)), 60.0)
        backend.delete_many([key_of(99)])
    with diskcache.Cache(str(tmp_path), disk=BytesDisk) as cache:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            (warning,) = cache.check(fix=True)  # counts the entries, because this backend keeps no counts
        assert "count" in str(warning.message)
        assert len(cache) == 99
        assert cache.check() == []
        assert set(cache) == {key_of(number) for number in range(99)}
        assert cache.get(key_of(7)) == value_of(7)


# --- folder and files -------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o177])
def test_only_this_user_has_access_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    folder = tmp_path / "above" / "cache"
    before = os.umask(umask)
    try:
        with open_backend(folder) as backend:
            backend.set_many(items_of(range(10)), None)
            files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
            folders = {stat.S_IMODE(path.stat().st_mode) for path in (folder, folder.parent)}
    finally:
        os.umask(before)
    assert folders == {0o700}
    assert files == {"cache.db": 0o600, "cache.db-wal": 0o600, "cache.db-shm": 0o600}


def test_a_new_backend_does_not_touch_the_disk(tmp_path: Path) -> None:
    DiskBackend(path=tmp_path / "cache").close()
    assert list(tmp_path.iterdir()) == []


def test_a_tilde_in_the_path_is_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    with open_backend(Path("~/vectors")) as backend:
        backend.set_many(items_of(range(1)), None)
    assert (tmp_path / "vectors" / "cache.db").is_file()


def test_a_path_with_odd_characters(tmp_path: Path) -> None:
    folder = tmp_path / "a b?mode=ro#c%20ü"
    with open_backend(folder) as backend:
        backend.set_many(items_of(range(1)), None)
        assert backend.get(key_of(0)) == value_of(0)
    assert size_of(folder) > 0


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match="is not a folder"):
        DiskBackend(path=file)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_a_folder_that_every_user_may_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    with pytest.raises(ConfigError, match="chmod o-w"):
        DiskBackend(path=tmp_path)
    tmp_path.chmod(0o700)
    with open_backend(tmp_path) as backend:
        tmp_path.chmod(0o777)
        with pytest.raises(ConfigError, match="chmod o-w"):
            backend.get(key_of(0))


@pytest.mark.parametrize(
    ("owner", "mode", "user", "safe"),
    [
        (1000, 0o700, 1000, True),
        (1000, 0o775, 1000, True),
        (1000, 0o777, 1000, False),
        (1001, 0o755, 1000, False),
        (0, 0o770, 1000, True),
        (1000, 0o755, 0, True),
        (0, 0o1777, 0, False),
    ],
)
def test_a_folder_is_safe_by_its_owner_and_mode(owner: int, mode: int, user: int, safe: bool) -> None:
    assert (find_permission_problem(Path("/cache"), owner, mode, user) is None) is safe


def test_max_bytes_has_a_minimum(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be at least 1 MiB, got 1000 bytes"):
        DiskBackend(path=tmp_path, max_bytes=1000)


def test_a_folder_that_cannot_be_made_is_an_error_of_each_call_only(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    backend = DiskBackend(path=tmp_path / "file" / "cache")
    for _ in range(2):
        with pytest.raises(NotADirectoryError):
            backend.get_many([key_of(1)])
    with embedonce.Cache(CountingProvider(), [make_patient_tier(backend)]) as cache:
        assert cache.embed("text").shape == cache.embed("text").shape
        assert cache.stats().tiers["disk"].errors > 0


def test_a_folder_that_was_removed_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with open_backend(folder) as backend:
        backend.set_many(items_of(range(3)), None)
        backend._database.connections.renew()
        shutil.rmtree(folder)
        with pytest.raises(OSError, match="cannot open the file for writing"):
            backend.get(key_of(1))
        assert backend.get(key_of(1)) is None
        backend.set_many(items_of(range(3)), None)
        assert backend.count("") == 3


# --- size limits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 1600, 6208, 12_352, 60_000])
def test_the_file_stays_below_max_bytes(tmp_path: Path, size: int) -> None:
    with open_backend(tmp_path, max_bytes=2 * MIB) as backend:
        numbers = range(8 * MIB // (size + 400))
        for start in range(0, len(numbers), 64):
            backend.set_many(items_of(numbers[start : start + 64], size), None)
            assert size_of(tmp_path) <= 2 * MIB
        last = items_of(numbers[-10:], size)
        assert backend.get_many(list(last)) == last, "the newest entries stay"
        assert backend.get_many([key_of(0)]) == {}, "the oldest entry is evicted"
        held = backend.count("") * (size + 85)
    with connect_directly(tmp_path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert size_of(tmp_path) <= 2 * MIB
    assert held > 2 * MIB * 0.25, "the space is used"


def test_eviction_is_logged_once_without_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_backend(tmp_path, max_bytes=MIB) as backend, caplog.at_level(logging.WARNING):
        for start in range(0, 2000, 100):
            backend.set_many(items_of(range(start, start + 100)), None)
    (record,) = caplog.records
    assert "max_bytes" in record.getMessage()
    assert "eo1." not in record.getMessage()


def test_writes_shrink_the_file_to_a_lower_max_bytes(tmp_path: Path) -> None:
    with open_backend(tmp_path) as backend:
        backend.set_many(items_of(range(8000)), None)
    assert size_of(tmp_path) > 8 * MIB
    with open_backend(tmp_path, max_bytes=4 * MIB) as backend:
        backend.set_many(items_of(range(8000, 8001)), None)
        assert 4 * MIB < backend.count("") * 2100 + MIB < 8 * MIB, "no more is evicted than necessary"
        for start in range(10_000, 14_000, 500):
            backend.set_many(items_of(range(start, start + 500)), None)
        assert backend.get(key_of(13_999)) == value_of(13_999)
    assert size_of(tmp_path) <= 4 * MIB


def test_values_above_the_declared_limit_are_refused(tmp_path: Path) -> None:
    with open_backend(tmp_path, max_bytes=MIB) as backend:
        largest = backend.capabilities.max_value_bytes
        assert largest == MIB // 16
        with pytest.raises(ValueError, match="at most 65536"):
            backend.set_many({key_of(1): bytes(largest + 1)}, None)


def test_expired_entries_are_deleted_before_others_are_evicted(tmp_path: Path) -> None:
    clock = ManualClock()
    with open_backend(tmp_path, max_bytes=2 * MIB) as backend:
        backend.clock = clock
        backend.set_many(items_of(range(300)), None)
        backend.set_many(items_of(range(300, 600)), 60.0)
        clock.advance(61.0)
        for start in range(600, 840, 60):
            backend.set_many(items_of(range(start, start + 60)), None)
        assert len(backend.get_many(list(items_of(range(300))))) == 300
        assert backend.count("") == 540, "the expired entries' space is free"


@pytest.mark.parametrize("jump", [-86_400.0, 86_400.0 * 365], ids=["back", "forward"])
def test_a_clock_that_jumps_keeps_no_entry_beyond_its_ttl(tmp_path: Path, jump: float) -> None:
    now = [1_700_000_000.0]
    with open_backend(tmp_path) as backend:
        backend.clock = lambda: now[0]
        backend.set_many(items_of(range(10)), 3600.0)
        backend.set_many(items_of(range(10, 20)), None)
        assert backend.add_many({LEASE: b"token"}, 60.0) == {LEASE}
        now[0] += jump
        assert backend.get_many(list(items_of(range(20)))) == items_of(range(10, 20))
        assert [backend.get(key_of(number)) for number in range(10)] == [None] * 10
        assert backend.add_many({LEASE: b"other"}, 60.0) == {LEASE}, "the lease of a dead process ends"
        backend.set_many(items_of(range(5)), 3600.0)
        assert backend.get_many(list(items_of(range(20)))) == items_of(range(5)) | items_of(range(10, 20))
        now[0] += 3500.0
        assert backend.get(key_of(0)) == value_of(0)
        now[0] += 200.0
        assert backend.get(key_of(0)) is None


def test_a_small_correction_of_the_clock_expires_nothing(tmp_path: Path) -> None:
    now = [1_700_000_000.0]
    with open_backend(tmp_path) as backend:
        backend.clock = lambda: now[0]
        backend.set_many(items_of(range(10)), 3600.0)
        now[0] += -0.5
        assert backend.get_many(list(items_of(range(10)))) == items_of(range(10))


def test_the_first_stored_entry_is_evicted_whatever_the_clock_says(tmp_path: Path) -> None:
    now = [1_700_000_000.0]
    with open_backend(tmp_path, max_bytes=MIB) as backend:
        backend.clock = lambda: now[0]
        for turn in range(20):
            backend.set_many(items_of(range(100 * turn, 100 * turn + 100)), None)
            now[0] += -86_400.0 if turn % 2 else 43_200.0
        assert backend.get(key_of(0)) is None
        assert backend.get_many(list(items_of(range(1900, 2000)))) == items_of(range(1900, 2000))


def test_removing_entries_shrinks_the_file(tmp_path: Path) -> None:
    with open_backend(tmp_path) as backend:
        backend.set_many(items_of(range(5000)), None)
        backend._database.connections.renew()
        full = size_of(tmp_path)
        for start in range(0, 5000, 250):
            backend.delete_many([key_of(number) for number in range(start, start + 250)])
        assert size_of(tmp_path) < full / 4


def test_a_removed_value_is_overwritten_everywhere(tmp_path: Path) -> None:
    secret = b"a vector that somebody wants forgotten" * 40
    with open_backend(tmp_path) as backend:
        backend.set_many({**items_of(range(20)), key_of(100): secret}, None)
        assert any(secret[:60] in path.read_bytes() for path in tmp_path.iterdir())
        backend.delete_many([key_of(100)])
        assert not any(secret[:60] in path.read_bytes() for path in tmp_path.iterdir())
        assert backend.get_many(list(items_of(range(20)))) == items_of(range(20))


def test_a_batch_is_one_query(tmp_path: Path) -> None:
    with open_backend(tmp_path) as backend:
        backend.set_many(items_of(range(600)), None)
        statements: list[str] = []
        connection = backend._database.connections.take()
        connection.set_trace_callback(statements.append)
        backend._database.connections.give(connection, is_reusable=True)
        assert len(backend.get_many([key_of(number) for number in range(512)])) == 512
        assert len(statements) == 1


# --- deadlines -------------------------------------------------------------------------------------


def test_waiting_for_a_locked_database_ends_by_the_deadline(tmp_path: Path) -> None:
    with open_backend(tmp_path) as backend:
        backend.set_many(items_of(range(10)), None)
        with connect_directly(tmp_path) as other:
            other.execute("BEGIN IMMEDIATE")
            writes: list[Any] = [
                lambda: backend.set_many(items_of(range(1)), None),
                lambda: backend.add_many(items_of(range(1)), None),
                lambda: backend.delete_many([key_of(1)]),
            ]
            for write in writes:
                assert_times_out(write, "locked")
            with deadline(PATIENT):
                assert backend.get(key_of(1)) == value_of(1), "readers do not wait for writers"
            with open_backend(tmp_path) as late, deadline(PATIENT):
                assert late.get(key_of(1)) == value_of(1), "nor does a backend that opens the file now"
            other.execute("ROLLBACK")
        backend.set_many(items_of(range(20)), None)
        assert backend.count("") == 20


def test_threads_wait_for_each_other_until_the_deadline_at_most(tmp_path: Path) -> None:
    with open_backend(tmp_path) as backend:
        backend.set_many(items_of(range(1)), None)
        release = threading.Event()
        taken = threading.Event()

        def hold() -> None:
            with backend._database.open_transaction():
                taken.set()
                release.wait(60)

        thread = threading.Thread(target=hold)
        thread.start()
        taken.wait(60)
        try:
            assert_times_out(lambda: backend.set_many(items_of(range(2)), None), "other threads")
        finally:
            release.set()
        thread.join()
        backend.set_many(items_of(range(2)), None)
        assert backend.count("") == 2


def test_a_long_query_is_interrupted(tmp_path: Path) -> None:
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n"
    with open_backend(tmp_path) as backend:
        backend.set_many(items_of(range(1)), None)
        with deadline(0.1), pytest.raises(TimeoutError):
            backend._database.read(endless, ())
        assert backend.get(key_of(0)) == value_of(0)


def test_an_interrupted_transaction_is_rolled_back(tmp_path: Path) -> None:
    with open_backend(tmp_path) as backend:
        backend.set_many(items_of(range(10)), None)
        with suppress(KeyboardInterrupt), backend._database.open_transaction() as connection:
            backend._store(connection, items_of(range(5, 20), size=64), None)
            raise KeyboardInterrupt
        assert backend.get_many(list(items_of(range(20)))) == items_of(range(10))
        backend.set_many(items_of(range(20)), None)


# --- close ------------------------------------------------------------------------------------


def test_after_close_every_call_raises(tmp_path: Path) -> None:
    backend = DiskBackend(path=tmp_path)
    backend.set_many(items_of(range(1)), None)
    backend.close()
    backend.close()
    calls: list[Any] = [
        lambda: backend.get_many([key_of(1)]),
        lambda: backend.get(key_of(1)),
        lambda: backend.set_many(items_of(range(1)), None),
        lambda: backend.delete_many([key_of(1)]),
        lambda: backend.add_many(items_of(range(1)), None),
        lambda: backend.count(""),
        lambda: list(backend.scan("")),
    ]
    for call in calls:
        with pytest.raises(CacheClosed, match="closed"):
            call()
    assert [path.name for path in tmp_path.iterdir()] == ["cache.db"], "the log is written back and removed"


def test_close_during_calls_of_other_threads(tmp_path: Path) -> None:
    backend = DiskBackend(path=tmp_path)
    backend.set_many(items_of(range(100)), None)

    def work(number: int) -> None:
        if number == 0:
            backend.close()
            return
        for _ in range(50):
            try:
                assert backend.get_many(list(items_of(range(100)))) == items_of(range(100))
            except CacheClosed:
                return

    run_in_threads(4, work, "close during get_many")
    assert [path.name for path in tmp_path.iterdir()] == ["cache.db"], "the last one to close removes the log"


def test_backends_that_close_at_the_same_time_leave_no_log(tmp_path: Path) -> None:
    # Without a lock around the closing, about one run in twenty leaves the log.
    def close(backend: DiskBackend, together: threading.Barrier) -> None:
        together.wait(PATIENT)
        backend.close()

    for _ in range(100):
        together = threading.Barrier(4)
        backends = [DiskBackend(path=tmp_path) for _ in range(4)]
        for number, backend in enumerate(backends):
            backend.set_many(items_of(range(number, number + 1)), None)
        threads = [threading.Thread(target=close, args=(backend, together)) for backend in backends]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [path.name for path in tmp_path.iterdir()] == ["cache.db"]


def test_an_unclosed_backend_closes_the_file_when_it_is_collected(tmp_path: Path) -> None:
    backend = DiskBackend(path=tmp_path)
    backend.set_many(items_of(range(1)), None)
    del backend
    assert [path.name for path in tmp_path.iterdir()] == ["cache.db"]


def test_only_a_few_idle_connections_are_kept(tmp_path: Path) -> None:
    with open_backend(tmp_path) as backend:
        backend.set_many(items_of(range(10)), None)
        run_in_threads(20, lambda _: backend.get(key_of(1)) and None, "get")
        assert len(backend._database.connections._idle) <= sqlite.MAX_IDLE


# --- processes --------------------------------------------------------------------------------


def run_children(code: str, folder: Path, count: int) -> list[str]:
    """Run ``code`` in new processes at the same time, with a folder and a number as arguments; return their outputs."""
    paths = os.pathsep.join(path for path in sys.path if path)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder), str(number)],
            env={**os.environ, "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    outputs = [child.communicate(timeout=100)[0] for child in children]
    assert [child.returncode for child in children] == [0] * count
    return outputs


WRITE = """
import os, sys
from pathlib import Path
from embedonce_backends.disk import DiskBackend
folder, number = Path(sys.argv[1]), int(sys.argv[2])
backend = DiskBackend(path=folder, max_bytes=4 * 2**20)
largest = 0
for turn in range(60):
    backend.set_many({f"eo1.{number}.{turn}.{n}": bytes([number]) * 1600 for n in range(64)}, None)
    backend.get_many([f"eo1.{other}.{turn}.{n}" for other in range(4) for n in range(64)])
    largest = max(largest, os.path.getsize(folder / "cache.db"))
print(largest)
backend.close()
"""


def test_many_processes_that_write_stay_below_max_bytes(tmp_path: Path) -> None:
    largest = [int(output) for output in run_children(WRITE, tmp_path, 3)]
    assert max(largest) <= 4 * MIB
    with open_backend(tmp_path, max_bytes=4 * MIB) as backend:
        held = dict(backend.get_many(list(backend.scan(""))))
        assert len(held) > 1000
        assert all(value == bytes([int(key.split(".")[1])]) * 1600 for key, value in held.items())


ADD = """
import sys
from pathlib import Path
from embedonce_backends.disk import DiskBackend
backend = DiskBackend(path=Path(sys.argv[1]))
names = [f"eo1.lease.{n}" for n in range(200)]
won = [name for name in names if backend.add_many({name: sys.argv[2].encode()}, 60.0)]
print(*won)
backend.close()
"""


def test_an_added_key_has_one_winner_among_processes(tmp_path: Path) -> None:
    won = [name for output in run_children(ADD, tmp_path / "new", 4) for name in output.split()]
    assert sorted(won) == sorted(f"eo1.lease.{n}" for n in range(200))


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")


@forks
def test_a_child_can_use_the_file_after_the_parent_has_closed_it(tmp_path: Path) -> None:
    # What goes wrong otherwise: a child that inherits SQLite's table of locks relies on locks that it does not hold.
    # When the parent closes the file, it removes the log that the child still uses, and the child's writes are lost.
    backend = DiskBackend(path=tmp_path)
    backend.set_many(items_of(range(10)), None)
    opened_by_child, tell = os.pipe()
    closed_by_parent, close = os.pipe()

    def child() -> None:
        assert backend.get_many(list(items_of(range(10)))) == items_of(range(10))
        os.write(tell, b"!")
        os.read(closed_by_parent, 1)  # until the parent has closed, the child keeps its connection open
        backend.set_many(items_of(range(100, 150)), None)

    def parent() -> None:
        if select.select([opened_by_child], [], [], 0.01)[0] and os.read(opened_by_child, 1):
            backend.close()
            os.write(close, b"!")

    run_in_fork(child, "a child whose parent closes the file", meanwhile=parent)
    for end in (opened_by_child, tell, closed_by_parent, close):
        os.close(end)
    with open_backend(tmp_path) as reopened:
        assert reopened.get_many(list(items_of(range(150)))) == items_of(range(10)) | items_of(range(100, 150))


def wait_until_a_fork_waits(backend: DiskBackend, stop: threading.Event) -> None:
    """Return when calls of ``backend`` are blocked because another thread is forking, or when ``stop`` is set."""
    while not stop.is_set():
        try:
            with deadline(0.05):
                backend.get(key_of(0))
        except TierTimeout as error:
            if "forking" in str(error):
                return


@forks
def test_forks_while_threads_write_lose_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "FORK_SECONDS", PATIENT)
    with open_backend(tmp_path) as backend:
        stop = threading.Event()
        stored: list[dict[str, bytes]] = []

        def write(number: int) -> None:
            turn = 0
            while not stop.is_set():
                items = items_of(range(number * 1_000_000 + turn, number * 1_000_000 + turn + 20))
                backend.set_many(items, None)
                assert backend.get_many(list(items)) == items
                stored.append(items)
                turn += 20

        threads = [threading.Thread(target=write, args=(number,)) for number in (1, 2)]
        for thread in threads:
            thread.start()
        try:
            for fork in range(8):
                items = items_of(range(9_000_000 + fork * 10, 9_000_000 + fork * 10 + 10))
                run_in_fork(lambda items=items: backend.set_many(items, None), "a fork beside threads")  # type: ignore[misc]
                stored.append(items)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        for items in stored:
            assert backend.get_many(list(items)) == items


@forks
def test_a_child_forked_in_the_middle_of_a_call_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "FORK_SECONDS", 0.1)
    with open_backend(tmp_path) as backend:
        backend.set_many(items_of(range(5)), None)
        taken, release = threading.Event(), threading.Event()

        def hold() -> None:
            with backend._database.open_transaction() as connection:
                backend._store(connection, items_of(range(5, 10)), None)
                taken.set()
                release.wait(60)

        thread = threading.Thread(target=hold)
        thread.start()
        taken.wait(60)

        def child() -> None:
            with pytest.raises(TierError, match="forked"):
                backend.get(key_of(1))
            # SQLite's locks and mutexes belong to the whole process, so no backend works, of this file or another.
            for path in (tmp_path, tmp_path / "other"):
                with open_backend(path) as other, pytest.raises(TierError, match="forked"):
                    other.set_many(items_of(range(3)), None)
            run_in_fork(grandchild, "a fork of that child")

        def grandchild() -> None:
            with open_backend(tmp_path) as other, pytest.raises(TierError, match="forked"):
                other.get(key_of(1))

        try:
            run_in_fork(child, "a fork in the middle of a call")
        finally:
            release.set()
            thread.join()
        assert backend.count("") == 10


@forks
def test_a_fork_while_threads_make_and_close_backends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "FORK_SECONDS", PATIENT)
    stop = threading.Event()

    def make_and_close(number: int) -> None:
        while not stop.is_set():
            with open_backend(tmp_path) as own:
                own.set_many(items_of(range(number, number + 1)), None)

    def child() -> None:
        with open_backend(tmp_path) as own, deadline(PATIENT):
            own.set_many(items_of(range(100, 110)), None)
            assert own.get_many(list(items_of(range(100, 110)))) == items_of(range(100, 110))

    threads = [threading.Thread(target=make_and_close, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            run_in_fork(child, "a fork while backends are made and closed")
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@forks
def test_a_backend_made_while_a_fork_waits_has_to_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "FORK_SECONDS", PATIENT)
    taken, release, forked = threading.Event(), threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def hold() -> None:
        with busy._database.open_transaction():
            taken.set()
            release.wait(PATIENT)

    def use_new_backends() -> None:
        try:
            wait_until_a_fork_waits(busy, forked)
            assert_times_out(lambda: make_backend().get(key_of(1)), "this process is forking")
        except BaseException as error:
            errors.append(error)
        finally:
            release.set()

    def make_backend() -> DiskBackend:
        made.append(DiskBackend(path=tmp_path))
        return made[-1]

    def child() -> None:
        for backend in (busy, *made):
            assert backend.get(key_of(1)) == value_of(1)

    made: list[DiskBackend] = []
    with open_backend(tmp_path) as busy:
        busy.set_many(items_of(range(2)), None)
        threads = [threading.Thread(target=call) for call in (hold, use_new_backends)]
        threads[0].start()
        assert taken.wait(PATIENT)
        threads[1].start()
        try:
            run_in_fork(child, "a fork that waited")
        finally:
            forked.set()
            for thread in threads:
                thread.join()
        assert not errors, errors
        child()
        for backend in made:
            backend.close()


def make_connection_class(close: Callable[[], object]) -> type[sqlite.Connection]:
    """Return a class of connections that call ``close`` before they close."""

    class Closing(sqlite.Connection):
        def close(self) -> None:
            close()
            super().close()

    return Closing


@forks
def test_a_fork_waits_for_connections_that_are_being_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closing, release, forked = threading.Event(), threading.Event(), threading.Event()

    def close() -> None:
        closing.set()
        release.wait(PATIENT)

    def child_of_a_fork_that_waited_in_vain() -> None:
        with open_backend(tmp_path) as own, pytest.raises(TierError, match="forked"):
            own.get(key_of(1))

    def child_of_a_fork_that_waited() -> None:
        with open_backend(tmp_path) as own:
            assert own.get(key_of(1)) == value_of(1)

    def allow_closing() -> None:
        with open_backend(tmp_path / "other") as other:
            wait_until_a_fork_waits(other, forked)
        release.set()

    with monkeypatch.context() as patch:
        patch.setattr(disk_file, "Connection", make_connection_class(close))
        backend = DiskBackend(path=tmp_path)
        backend.set_many(items_of(range(2)), None)
    threads = [threading.Thread(target=call) for call in (backend.close, allow_closing)]
    threads[0].start()
    assert closing.wait(PATIENT)
    try:
        monkeypatch.setattr(sqlite, "FORK_SECONDS", 0.1)
        run_in_fork(child_of_a_fork_that_waited_in_vain, "a fork that waited in vain")
        monkeypatch.setattr(sqlite, "FORK_SECONDS", PATIENT)
        threads[1].start()
        run_in_fork(child_of_a_fork_that_waited, "a fork that waited")
    finally:
        forked.set()
        release.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()


@forks
def test_a_call_that_forks_continues_only_in_the_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "FORK_SECONDS", 0.1)
    with open_backend(tmp_path) as backend:
        with backend._database.open_transaction() as connection:
            backend._store(connection, items_of(range(5)), None)

            def child() -> None:
                with pytest.raises(TierError, match="forked"):
                    sqlite.fetch_rows(connection, "COMMIT")
                backend._database.connections.give(connection, is_reusable=True)
                assert connection.in_transaction, "it is neither kept nor closed: both would use the parent's locks"
                with pytest.raises(TierError, match="forked"):
                    backend.get(key_of(1))

            run_in_fork(child, "a call that forks")
        assert backend.count("") == 5


@forks
def test_a_fork_and_a_call_inside_a_fork_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A signal handler or a finalizer can run at any point: here, in the thread that forks, while it closes connections.
    monkeypatch.setattr(sqlite, "FORK_SECONDS", 0.1)
    messages: list[str] = []

    def close() -> None:
        if messages:
            return
        try:
            backend.get(key_of(1))
        except TierTimeout as error:
            messages.append(str(error))
        run_in_fork(inner_child, "a fork inside a fork")

    def inner_child() -> None:
        with pytest.raises(TierError, match="forked"):
            backend.get(key_of(1))

    def child() -> None:
        assert backend.get(key_of(1)) == value_of(1)

    monkeypatch.setattr(disk_file, "Connection", make_connection_class(close))
    with open_backend(tmp_path) as backend:
        backend.set_many(items_of(range(2)), None)
        run_in_threads(1, lambda _: run_in_fork(child, "the outer fork"), "a fork inside a fork")
        assert messages == ["this process is forking"]
        child()


# --- disks that are full or damaged -----------------------------------------------------------


def test_a_full_disk_is_an_error_and_stored_entries_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_backend(tmp_path) as backend:
        backend.set_many(items_of(range(100)), None)
    with monkeypatch.context() as patch:
        patch.setattr(disk_file, "WRITE_PRAGMAS", (*disk_file.WRITE_PRAGMAS, "max_page_count = 30"))
        with open_backend(tmp_path) as backend:
            for _ in range(3):
                with pytest.raises(OSError, match="disk full") as caught:
                    backend.set_many(items_of(range(1000, 1500)), None)
                assert caught.value.errno == errno.ENOSPC
                assert backend.get_many(list(items_of(range(100)))) == items_of(range(100))
            provider = CountingProvider()
            with embedonce.Cache(provider, [make_patient_tier(DiskBackend(path=tmp_path))]) as cache:
                assert len(cache.embed_batch([f"text {n}" for n in range(2000)])) == 2000
                assert cache.stats().tiers["disk"].errors + cache.stats().tiers["disk"].dropped > 0
    with open_backend(tmp_path) as backend:
        backend.set_many(items_of(range(1000, 1500)), None)


FULL = """
import resource, sys
from pathlib import Path
from embedonce_backends.disk import DiskBackend
backend = DiskBackend(path=Path(sys.argv[1]))
values = {f"eo1.x.{n}": bytes(1600) for n in range(200)}
backend.set_many(values, None)
resource.setrlimit(resource.RLIMIT_FSIZE, (2 * 2**20, 2 * 2**20))
failed = 0
for turn in range(20):
    try:
        backend.set_many({f"eo1.{turn}.{n}": bytes(1600) for n in range(256)}, None)
    except OSError:
        failed += 1
assert failed, "the limit was not reached"
assert backend.get_many(list(values)) == values
print("still running")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_file_that_cannot_grow_does_not_kill_the_process(tmp_path: Path) -> None:
    assert run_children(FULL, tmp_path, 1) == ["still running\n"]
    with open_backend(tmp_path) as backend:
        assert len(backend.get_many([f"eo1.x.{n}" for n in range(200)])) == 200


@pytest.mark.parametrize("garbage", [b"not a database at all" * 1000, b"SQLite format 3\x00" + b"\xff" * 20_000])
def test_a_file_of_garbage_is_an_error_that_says_what_to_do(tmp_path: Path, garbage: bytes) -> None:
    (tmp_path / "cache.db").write_bytes(garbage)
    provider = CountingProvider()
    with open_backend(tmp_path) as backend:
        for _ in range(2):
            with pytest.raises(sqlite3.DatabaseError, match=r"cache\.db: .*remove the folder of this file"):
                backend.get_many([key_of(1)])
    with embedonce.Cache(provider, [make_patient_tier(DiskBackend(path=tmp_path))]) as cache:
        assert len(cache.embed_batch(["a", "b"])) == 2
        assert cache.stats().tiers["disk"].errors == 2
        (tmp_path / "cache.db").unlink()
    with embedonce.Cache(provider, [make_patient_tier(DiskBackend(path=tmp_path))]) as cache:
        cache.embed_batch(["a", "b"])
        assert cache.stats().tiers["disk"].stored == 2


def test_a_damaged_file_gives_an_error_or_a_miss_or_bytes(tmp_path: Path) -> None:
    intact = tmp_path / "intact"
    items = items_of(range(200))
    with open_backend(intact) as backend:
        backend.set_many(items, None)
    whole = (intact / "cache.db").read_bytes()
    chance = random.Random(5)
    outcomes = set()
    for turn in range(40):
        folder = tmp_path / str(turn)
        folder.mkdir()
        damaged = bytearray(whole)
        for _ in range(chance.choice([1, 20, 400])):
            start = chance.randrange(len(damaged))
            damaged[start : start + 8] = chance.randbytes(len(damaged[start : start + 8]))
        (folder / "cache.db").write_bytes(damaged[: chance.choice([len(damaged), chance.randrange(len(damaged))])])
        with open_backend(folder) as backend, deadline(10.0):
            outcomes |= {use_damaged_file(backend, items)}
    assert {"error", "values"} <= outcomes


def use_damaged_file(backend: DiskBackend, items: Mapping[str, bytes]) -> str:
    """Make every kind of call and return ``"error"`` if one raised, otherwise ``"values"``."""
    try:
        found = backend.get_many(list(items))
        list(backend.scan(""))
        backend.set_many(dict(items), None)
        backend.delete_many(list(items))
    except (sqlite3.Error, OSError):
        return "error"
    assert set(found) <= set(items)
    assert all(type(value) is bytes for value in found.values())
    return "values"
