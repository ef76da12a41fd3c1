"""The lmdb backend passes the contract, and does what its README says."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from embedonce_lmdb.backend import LmdbBackend

from embedonce.contracts import deadline
from embedonce.errors import CacheClosed, ConfigError, TierBusy, TierError, TierTimeout
from embedonce.testing import BackendContract, ManualClock, Recipe

MIB = 2**20


class TestLmdb(BackendContract):
    examples = 30

    @pytest.fixture(autouse=True)
    def in_a_folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        self.clock = ManualClock()

    def make(self) -> LmdbBackend:
        return self.at(Path(tempfile.mkdtemp(dir=self.folder)))

    def reopen(self, backend: LmdbBackend) -> LmdbBackend:
        return self.at(backend.path)

    def at(self, path: Path) -> LmdbBackend:
        # No waiting for the disk: hypothesis writes thousands of times.
        backend = LmdbBackend(path=path, max_bytes=64 * MIB, sync=False)
        backend.clock = self.clock
        return backend

    def recipe(self, backend: LmdbBackend) -> Recipe:
        return Recipe(LmdbBackend, {"path": str(backend.path), "max_bytes": 64 * MIB, "sync": False})

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)


key = BackendContract.key


def many(count: int, size: int = 1600, start: int = 0) -> dict[str, bytes]:
    return {key(number): number.to_bytes(4, "big") * (size // 4) for number in range(start, start + count)}


@contextmanager
def another_process(path: Path, code: str) -> Iterator[subprocess.Popen[str]]:
    """Run ``code`` with a ``backend`` on ``path`` until the block ends, which begins when it has said "ready"."""
    program = textwrap.dedent(
        """
        import itertools, sys
        from pathlib import Path
        from embedonce_lmdb.backend import LmdbBackend
        backend = LmdbBackend(path=Path(sys.argv[1]), max_bytes=int(sys.argv[2]), sync=False)
        """
    ) + textwrap.dedent(code)
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(path), str(256 * MIB)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == "ready\n"
        yield child
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


# --- one environment per folder and process ----------------------------------------------------


def test_a_folder_is_shared_by_whoever_opens_it(tmp_path: Path) -> None:
    one, two = LmdbBackend(path=tmp_path), LmdbBackend(path=tmp_path / "sub" / "..")
    one.set_many({key(1): b"one"}, None)
    assert two.get(key(1)) == b"one"
    one.close()
    one.close()
    assert two.get_many([key(1)]) == {key(1): b"one"}
    with pytest.raises(CacheClosed):
        one.get(key(1))
    two.close()


def test_settings_that_differ_are_refused(tmp_path: Path) -> None:
    one = LmdbBackend(path=tmp_path, max_bytes=8 * MIB)
    with pytest.raises(ConfigError, match="another max_bytes or sync"):
        LmdbBackend(path=tmp_path, max_bytes=16 * MIB)
    one.close()
    LmdbBackend(path=tmp_path, max_bytes=16 * MIB).close()


def test_a_backend_that_nobody_closed_lets_go_of_its_folder(tmp_path: Path) -> None:
    LmdbBackend(path=tmp_path, max_bytes=8 * MIB).set_many({key(1): b"one"}, None)
    again = LmdbBackend(path=tmp_path, max_bytes=16 * MIB)
    assert again.get(key(1)) == b"one"
    again.close()


def test_nothing_is_made_before_it_is_used(tmp_path: Path) -> None:
    backend = LmdbBackend(path=tmp_path / "vectors")
    assert not (tmp_path / "vectors").exists()
    assert backend.get_many([key(1)]) == {}
    assert (tmp_path / "vectors").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "vectors" / "data.mdb").stat().st_mode & 0o777 == 0o600
    backend.close()


# --- room ----------------------------------------------------------------------------------------


def test_what_was_stored_first_makes_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backend = LmdbBackend(path=tmp_path, max_bytes=4 * MIB, sync=False)
    with caplog.at_level(logging.WARNING, "embedonce.lmdb"):
        for start in range(0, 8000, 200):
            backend.set_many(many(200, start=start), None)
    held = [number for number in range(8000) if backend.get(key(number)) is not None]
    assert held == list(range(held[0], 8000)), "others went than those stored first"
    assert len(held) > 1000
    assert (tmp_path / "data.mdb").stat().st_size < 24 * MIB
    assert len(caplog.records) == 1
    assert "max_bytes" in caplog.text
    assert backend.get_many([key(7999)]) == many(1, start=7999)
    backend.close()


def test_storing_again_takes_no_more_room_and_makes_young(tmp_path: Path) -> None:
    backend = LmdbBackend(path=tmp_path, max_bytes=4 * MIB, sync=False)
    for start in range(0, 8000, 200):
        backend.set_many({**many(200, start=start), key(0): b"again"}, None)
    assert backend.get(key(0)) == b"again"
    backend.close()


def test_expired_entries_make_room_by_themselves(tmp_path: Path) -> None:
    backend = LmdbBackend(path=tmp_path, max_bytes=64 * MIB, sync=False)
    backend.clock = clock = ManualClock()
    backend.set_many(many(1000), 60.0)
    clock.advance(61.0)
    assert backend.count("") == 1000
    for start in range(1000, 1020):
        backend.set_many(many(1, start=start), None)
    assert backend.count("") == 20, "what has expired still takes space"
    backend.close()


def test_a_map_that_readers_keep_full_is_made_larger(tmp_path: Path) -> None:
    backend = LmdbBackend(path=tmp_path, max_bytes=1 * MIB, sync=False)
    backend.set_many(many(100), None)
    reader = """
        backend.get("eo1.x")
        opened = backend._shared._opened
        with opened.handle.begin():
            print("ready", flush=True)
            sys.stdin.read()
    """
    with another_process(tmp_path, reader):
        for start in range(0, 12_000, 100):  # 24 MB through a map of 17 MiB, none of it to be used twice
            backend.set_many(many(100, start=start), None)
    assert backend.get(key(11_999)) is not None
    backend.close()


def test_a_map_that_another_process_has_made_larger(tmp_path: Path) -> None:
    backend = LmdbBackend(path=tmp_path, max_bytes=1 * MIB, sync=False)
    backend.set_many({key(1): b"one"}, None)
    writer = """
        for start in range(0, 60):
            backend.set_many({f"eo1.other.{start}.{n}": bytes(10_000) for n in range(100)}, None)
        print("ready", flush=True)
        sys.stdin.read()
    """
    with another_process(tmp_path, writer):
        assert backend.get_many(["eo1.other.59.99", key(1)]) == {"eo1.other.59.99": bytes(10_000), key(1): b"one"}
    backend.close()


def test_a_value_that_is_too_large_is_refused(tmp_path: Path) -> None:
    backend = LmdbBackend(path=tmp_path, max_bytes=1 * MIB)
    with pytest.raises(ValueError, match="the largest is 65536"):
        backend.set_many({key(1): bytes(65537)}, None)
    backend.close()


def test_a_key_that_lmdb_cannot_hold_is_refused(tmp_path: Path) -> None:
    backend = LmdbBackend(path=tmp_path)
    with pytest.raises(TierError, match=str(tmp_path)):
        backend.set_many({"k" * 512: b""}, None)
    backend.set_many({"k" * 511: b"there"}, None)
    assert backend.get("k" * 511) == b"there"
    backend.close()


# --- other processes, and their ends --------------------------------------------------------------


def test_a_writer_that_stands_still_is_left_by_the_deadline(tmp_path: Path) -> None:
    backend = LmdbBackend(path=tmp_path, max_bytes=256 * MIB, sync=False)
    backend.set_many({key(1): b"one"}, None)
    writer = """
        def stand(opened, transaction):
            print("ready", flush=True)
            sys.stdin.read()
        backend._shared.write(stand)
    """
    with another_process(tmp_path, writer) as child:
        said = ""
        for seconds in (0.1, 1.0, 10.0, 60.0):  # a busy machine may need the first ones to come to the lock at all
            with deadline(seconds), pytest.raises(TierTimeout) as caught:
                backend.set_many({key(2): b"two"}, None)
            said = str(caught.value)
            if "another process writes" in said:
                break
        assert "another process writes" in said
        assert backend.get(key(1)) == b"one", "a reader waits for nobody"
        child.kill()
        child.wait()
        backend.set_many({key(2): b"two"}, None)
    assert backend.get(key(2)) == b"two"
    backend.close()


def test_a_killed_writer_leaves_whole_batches_alone(tmp_path: Path) -> None:
    writer = """
        print("ready", flush=True)
        for batch in itertools.cycle(range(1000)):  # however late it is killed, nothing has to make room
            backend.set_many({f"eo1.batch.{batch}.{n}": b"%d" % n * 300 for n in range(50)}, None)
    """
    backend = LmdbBackend(path=tmp_path, max_bytes=256 * MIB, sync=False)
    for _ in range(3):
        before = backend.count("")
        with another_process(tmp_path, writer) as child:
            while backend.count("") < before + 100:
                os.sched_yield()
            child.send_signal(signal.SIGKILL)
        there = set(backend.scan("eo1.batch."))
        batches = {name.rpartition(".")[0] for name in there}
        assert there == {f"{batch}.{n}" for batch in batches for n in range(50)}, "a batch is there in part"
        assert all(
            value == b"%d" % int(name.rpartition(".")[2]) * 300 for name, value in backend.get_many(list(there)).items()
        )
        backend.delete_many(list(there))
    backend.close()


def test_a_killed_reader_gives_its_place_back(tmp_path: Path) -> None:
    backend = LmdbBackend(path=tmp_path, max_bytes=256 * MIB, sync=False)
    backend.set_many({key(1): b"one"}, None)
    reader = """
        import lmdb
        backend.get("eo1.x")
        held = []
        try:
            while True:
                held.append(backend._shared._opened.handle.begin())
        except lmdb.ReadersFullError:
            print("ready", flush=True)
        sys.stdin.read()
    """
    with another_process(tmp_path, reader), pytest.raises(TierBusy, match="all 1024 places"):
        backend.get(key(1))
    assert backend.get(key(1)) == b"one"
    backend.close()


# --- damage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_a_file_that_was_cut_short_is_an_error(tmp_path: Path, share: float) -> None:
    """Without care it is the end of the process: a page of the map without a file behind it cannot be touched."""
    backend = LmdbBackend(path=tmp_path, sync=False)
    backend.set_many(many(1000), None)
    backend.close()
    os.truncate(tmp_path / "data.mdb", int(share * (tmp_path / "data.mdb").stat().st_size))
    again = LmdbBackend(path=tmp_path)
    with pytest.raises(TierError, match="remove the folder"):
        again.get_many(list(again.scan("")))
    again.close()


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"something else" * 1000)
    backend = LmdbBackend(path=tmp_path)
    with pytest.raises(TierError, match="remove the folder"):
        backend.get(key(1))
    backend.close()


def test_a_folder_that_was_removed_is_made_anew(tmp_path: Path) -> None:
    backend = LmdbBackend(path=tmp_path / "vectors", sync=False)
    backend.set_many({key(1): b"one"}, None)
    shutil.rmtree(tmp_path / "vectors")
    backend.set_many({key(2): b"two"}, None)
    assert backend.get_many([key(1), key(2)]) == {key(2): b"two"}
    assert (tmp_path / "vectors" / "data.mdb").exists()
    backend.close()


def test_a_path_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    backend = LmdbBackend(path=tmp_path / "file" / "vectors")
    with pytest.raises(TierError, match=r"vectors cannot be opened for writing \(Not a directory\)"):
        backend.get(key(1))
    backend.close()


def test_what_is_returned_outlives_its_transaction(tmp_path: Path) -> None:
    backend = LmdbBackend(path=tmp_path, max_bytes=1 * MIB, sync=False)
    backend.set_many(many(50), None)
    found = backend.get_many(list(many(50)))
    for start in range(100, 3000, 100):  # writes over the pages that it was read from
        backend.set_many(many(100, start=start), None)
    backend.close()
    assert found == many(50)
