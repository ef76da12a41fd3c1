"""The lmdb backend passes the contract and behaves as its README says."""

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

import lmdb
import pytest
from embedonce_lmdb._names import decode_name, encode_key, encode_keys, find_ranges
from embedonce_lmdb.backend import LmdbBackend
from hypothesis import given
from hypothesis import strategies as st

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
        # Do not wait for the disk, because hypothesis writes thousands of times.
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
    """Run ``code`` with a ``backend`` on ``path`` until the block ends. The block begins once it prints "ready"."""
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


def test_backends_of_one_folder_share_it(tmp_path: Path) -> None:
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


def test_a_backend_that_was_never_closed_releases_its_folder(tmp_path: Path) -> None:
    LmdbBackend(path=tmp_path, max_bytes=8 * MIB).set_many({key(1): b"one"}, None)
    again = LmdbBackend(path=tmp_path, max_bytes=16 * MIB)
    assert again.get(key(1)) == b"one"
    again.close()


def test_nothing_is_created_before_the_first_use(tmp_path: Path) -> None:
    backend = LmdbBackend(path=tmp_path / "vectors")
    assert not (tmp_path / "vectors").exists()
    assert backend.get_many([key(1)]) == {}
    assert (tmp_path / "vectors").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "vectors" / "data.mdb").stat().st_mode & 0o777 == 0o600
    backend.close()


# --- names ---------------------------------------------------------------------------------------

digits = st.text("0123456789abcdef", min_size=80, max_size=80)
own_keys = digits.map(lambda text: f"eo1.{text[:16]}.{text[16:]}")
odd_keys = st.one_of(
    st.text("eo1.0f g", min_size=1, max_size=90),
    own_keys.map(str.upper),
    own_keys.map(lambda key: key.replace("0", " ")),
    own_keys.map(lambda key: key[:-1]),
    own_keys.map(lambda key: key + "0"),
)


@given(st.lists(st.one_of(own_keys, odd_keys), unique=True))
def test_every_key_has_its_own_name(keys: list[str]) -> None:
    names = encode_keys(keys)
    assert names == [encode_key(one) for one in keys]
    assert [decode_name(name) for name in names] == keys
    assert len(set(names)) == len(keys)


@given(own_keys)
def test_keys_of_embedonce_take_41_bytes(own: str) -> None:
    assert len(encode_key(own)) == 41


@given(st.lists(st.one_of(own_keys, odd_keys), min_size=1), st.data())
def test_the_ranges_of_a_prefix_have_its_keys_and_no_others(keys: list[str], data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from(keys))
    prefix = whole[: data.draw(st.integers(0, len(whole)))]
    ranges = find_ranges(prefix)
    for one in keys:
        matches = [first <= encode_key(one) <= last for first, last in ranges]
        assert sum(matches) == one.startswith(prefix)


def test_a_scan_lists_all_keys_in_their_order(tmp_path: Path) -> None:
    backend = LmdbBackend(path=tmp_path, sync=False)
    keys = [key(number) for number in range(1500)] + [f"eo1.{number:016x}.x" for number in range(600)] + ["a", "z"]
    backend.set_many(dict.fromkeys(keys, b"frame"), None)
    assert list(backend.scan("")) == sorted(keys)
    assert list(backend.scan("eo1.0")) == sorted(one for one in keys if one.startswith("eo1.0"))
    assert [backend.count(prefix) for prefix in ("", "eo1.", key(7), "b")] == [2102, 2100, 1, 0]
    backend.close()


def test_the_databases_of_an_earlier_version_are_removed(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path), max_dbs=3, map_size=64 * MIB) as handle:
        for name in (b"frames", b"order", b"due"):
            database = handle.open_db(name)
            with handle.begin(write=True) as transaction:
                for number in range(2000):
                    transaction.put(key(number).encode(), bytes(1600), db=database)
    backend = LmdbBackend(path=tmp_path, max_bytes=64 * MIB, sync=False)
    assert backend.get(key(1)) is None
    assert list(backend.scan("")) == []
    before = (tmp_path / "data.mdb").stat().st_size
    backend.set_many(many(2000), None)
    assert backend.get_many(list(many(2000))) == many(2000)
    assert (tmp_path / "data.mdb").stat().st_size == before, "the pages of the earlier version were not reused"
    backend.close()


# --- space ---------------------------------------------------------------------------------------


def test_the_oldest_entries_are_evicted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backend = LmdbBackend(path=tmp_path, max_bytes=4 * MIB, sync=False)
    with caplog.at_level(logging.WARNING, "embedonce.lmdb"):
        for start in range(0, 8000, 200):
            backend.set_many(many(200, start=start), None)
    held = [number for number in range(8000) if backend.get(key(number)) is not None]
    assert held == list(range(held[0], 8000)), "other entries than the oldest were evicted"
    assert len(held) > 1000
    assert (tmp_path / "data.mdb").stat().st_size < 24 * MIB
    assert len(caplog.records) == 1
    assert "max_bytes" in caplog.text
    assert backend.get_many([key(7999)]) == many(1, start=7999)
    backend.close()


def test_storing_an_entry_again_takes_no_space_and_makes_it_the_newest(tmp_path: Path) -> None:
    backend = LmdbBackend(path=tmp_path, max_bytes=4 * MIB, sync=False)
    for start in range(0, 8000, 200):
        backend.set_many({**many(200, start=start), key(0): b"again"}, None)
    assert backend.get(key(0)) == b"again"
    backend.close()


def test_writes_remove_expired_entries(tmp_path: Path) -> None:
    backend = LmdbBackend(path=tmp_path, max_bytes=64 * MIB, sync=False)
    backend.clock = clock = ManualClock()
    backend.set_many(many(1000), 60.0)
    clock.advance(61.0)
    assert backend.count("") == 1000
    for start in range(1000, 1020):
        backend.set_many(many(1, start=start), None)
    assert backend.count("") == 20, "expired entries still take space"
    backend.close()


def test_a_map_that_readers_keep_full_is_enlarged(tmp_path: Path) -> None:
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
        for start in range(0, 12_000, 100):  # 24 MB through a map of 17 MiB whose pages cannot be reused
            backend.set_many(many(100, start=start), None)
    assert backend.get(key(11_999)) is not None
    backend.close()


def test_a_map_that_another_process_has_enlarged_is_readable(tmp_path: Path) -> None:
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
    with pytest.raises(ValueError, match="the maximum is 65536"):
        backend.set_many({key(1): bytes(65537)}, None)
    backend.close()


def test_a_key_that_lmdb_cannot_hold_is_refused(tmp_path: Path) -> None:
    backend = LmdbBackend(path=tmp_path)
    with pytest.raises(TierError, match=str(tmp_path)):
        backend.set_many({"k" * 511: b""}, None)
    backend.set_many({"k" * 510: b"there"}, None)
    assert backend.get("k" * 510) == b"there"
    backend.close()


# --- other processes that hang or are killed ------------------------------------------------------


def test_a_call_does_not_wait_for_a_hanging_writer_beyond_its_deadline(tmp_path: Path) -> None:
    backend = LmdbBackend(path=tmp_path, max_bytes=256 * MIB, sync=False)
    backend.set_many({key(1): b"one"}, None)
    writer = """
        def hang(opened, transaction):
            print("ready", flush=True)
            sys.stdin.read()
        backend._shared.write(hang)
    """
    with another_process(tmp_path, writer) as child:
        message = ""
        for seconds in (0.1, 1.0, 10.0, 60.0):  # on a busy machine, the first ones may end before they reach the lock
            with deadline(seconds), pytest.raises(TierTimeout) as caught:
                backend.set_many({key(2): b"two"}, None)
            message = str(caught.value)
            if "another process is writing" in message:
                break
        assert "another process is writing" in message
        assert backend.get(key(1)) == b"one", "a reader never waits"
        child.kill()
        child.wait()
        backend.set_many({key(2): b"two"}, None)
    assert backend.get(key(2)) == b"two"
    backend.close()


def test_a_killed_writer_leaves_only_complete_batches(tmp_path: Path) -> None:
    writer = """
        print("ready", flush=True)
        for batch in itertools.cycle(range(1000)):  # few enough that nothing is evicted, however late it is killed
            backend.set_many({f"eo1.batch.{batch}.{n}": b"%d" % n * 300 for n in range(50)}, None)
    """
    backend = LmdbBackend(path=tmp_path, max_bytes=256 * MIB, sync=False)
    for _ in range(3):
        before = backend.count("")
        with another_process(tmp_path, writer) as child:
            while backend.count("") < before + 100:
                os.sched_yield()
            child.send_signal(signal.SIGKILL)
        found = set(backend.scan("eo1.batch."))
        batches = {name.rpartition(".")[0] for name in found}
        assert found == {f"{batch}.{n}" for batch in batches for n in range(50)}, "a batch is incomplete"
        assert all(
            value == b"%d" % int(name.rpartition(".")[2]) * 300 for name, value in backend.get_many(list(found)).items()
        )
        backend.delete_many(list(found))
    backend.close()


def test_the_slots_of_a_killed_reader_are_freed(tmp_path: Path) -> None:
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
    with another_process(tmp_path, reader), pytest.raises(TierBusy, match="all 1024 slots"):
        backend.get(key(1))
    assert backend.get(key(1)) == b"one"
    backend.close()


# --- damage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_a_truncated_file_is_an_error(tmp_path: Path, share: float) -> None:
    """Access to a page of the map beyond the end of the file would kill the process."""
    backend = LmdbBackend(path=tmp_path, sync=False)
    backend.set_many(many(1000), None)
    backend.close()
    os.truncate(tmp_path / "data.mdb", int(share * (tmp_path / "data.mdb").stat().st_size))
    again = LmdbBackend(path=tmp_path)
    with pytest.raises(TierError, match="remove the folder"):
        again.get_many(list(again.scan("")))
    again.close()


def test_a_file_that_is_not_lmdb_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"something else" * 1000)
    backend = LmdbBackend(path=tmp_path)
    with pytest.raises(TierError, match="remove the folder"):
        backend.get(key(1))
    backend.close()


def test_a_removed_folder_is_created_again(tmp_path: Path) -> None:
    backend = LmdbBackend(path=tmp_path / "vectors", sync=False)
    backend.set_many({key(1): b"one"}, None)
    shutil.rmtree(tmp_path / "vectors")
    backend.set_many({key(2): b"two"}, None)
    assert backend.get_many([key(1), key(2)]) == {key(2): b"two"}
    assert (tmp_path / "vectors" / "data.mdb").exists()
    backend.close()


def test_a_path_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    backend = LmdbBackend(path=tmp_path / "file" / "vectors")
    with pytest.raises(TierError, match=r"cannot open .*vectors for writing: Not a directory"):
        backend.get(key(1))
    backend.close()


def test_frames_outlive_their_transaction(tmp_path: Path) -> None:
    backend = LmdbBackend(path=tmp_path, max_bytes=1 * MIB, sync=False)
    backend.set_many(many(50), None)
    found = backend.get_many(list(many(50)))
    for start in range(100, 3000, 100):  # overwrite the pages that they were read from
        backend.set_many(many(100, start=start), None)
    backend.close()
    assert found == many(50)
