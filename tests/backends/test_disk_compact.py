"""``compact`` of the disk tier: it gives unused space back, loses nothing, and can be interrupted."""

from __future__ import annotations

import os
import random
import sqlite3
from collections import Counter
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import pytest

from embedonce_backends.disk import DiskBackend, compaction, file
from embedonce_backends.disk.database import INDEX_BYTES, Database, estimate_row_bytes
from embedonce_backends.disk.errors import LogTooLarge
from embedonce_backends.disk.stored_keys import encode_key


def make_items(count: int) -> dict[str, bytes]:
    return {f"eo1.0123456789abcdef.{number:064x}": os.urandom(1600) for number in range(count)}


def make_key(number: int, prefix: str = "eo1.") -> str:
    return f"{prefix}0123456789abcdef.{sha256(b'%d' % number).hexdigest()}"


def change_file(folder: Path, sql: str, values: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(folder / "cache.db", isolation_level=None)) as connection:
        return connection.execute(sql, values).fetchall()


PLANT = "INSERT INTO Cache (key, raw, store_time, mode, value) VALUES (?, 1, 0, 1, ?)"


def measure_folder(folder: Path) -> int:
    return sum(one.stat().st_size for one in folder.iterdir() if not one.name.endswith("-shm"))


def test_compact_gives_the_space_of_removed_entries_back(tmp_path: Path) -> None:
    items = make_items(2000)
    keys = list(items)
    with closing(DiskBackend(path=tmp_path)) as backend:
        backend.set_many(items, None)
        backend.delete_many(keys[::4])  # a quarter of the file, which removing does not give back
        before = measure_folder(tmp_path)
        done = backend.compact()
        after = measure_folder(tmp_path)
        assert after < 0.85 * before
        assert done == f"{after / 2**20:.1f} MiB, was {before / 2**20:.1f} MiB"
        assert backend.get_many(keys) == {key: items[key] for key in keys if key not in keys[::4]}
    with closing(sqlite3.connect(tmp_path / "cache.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_compact_keeps_the_order_in_which_entries_are_evicted(tmp_path: Path) -> None:
    items = make_items(1500)
    keys = list(items)
    with closing(DiskBackend(path=tmp_path, max_bytes=2**21)) as backend:
        backend.set_many(dict(list(items.items())[:800]), None)
        backend.delete_many(keys[:100])
        backend.compact()
        backend.set_many(dict(list(items.items())[800:1200]), None)
        found = backend.get_many(keys[:1200])
    assert list(found) == keys[1200 - len(found) : 1200]


def test_ctrl_c_interrupts_compact_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = make_items(500)
    with closing(DiskBackend(path=tmp_path)) as backend:
        backend.set_many(items, None)

    def interrupt() -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(file, "PROGRESS_STEPS", 500)
    monkeypatch.setattr(file, "is_out_of_time", interrupt)
    with closing(DiskBackend(path=tmp_path)) as backend, pytest.raises(KeyboardInterrupt):
        backend.compact()
    monkeypatch.undo()
    with closing(DiskBackend(path=tmp_path)) as backend:
        assert backend.get_many(list(items)) == items
        backend.compact()
        assert backend.get_many(list(items)) == items


def test_compact_moves_the_entries_after_many_were_overwritten_with_smaller_ones(tmp_path: Path) -> None:
    items = make_items(2000)
    smaller = {key: value[:448] for key, value in items.items()}
    with closing(DiskBackend(path=tmp_path)) as backend:
        backend.set_many(items, None)
        backend.set_many(smaller, None)
        backend.compact()
        assert (tmp_path / "cache.db").stat().st_size < 1.2 * 2000 * estimate_row_bytes(448, 16384)
        assert backend.get_many(list(items)) == smaller


@pytest.mark.parametrize("run", [2, 60, 90])
def test_compact_finds_gaps_of_any_length(tmp_path: Path, run: int) -> None:
    keys = [make_key(number) for number in range(12000)]
    with closing(DiskBackend(path=tmp_path)) as backend:
        backend.set_many(dict.fromkeys(keys, b"v" * 256), None)
        backend.delete_many([key for number, key in enumerate(keys) if number // run % 2])
        backend.compact()
        assert (tmp_path / "cache.db").stat().st_size < 6000 * (1.1 * estimate_row_bytes(256, 16384) + INDEX_BYTES)


def test_compact_moves_nothing_if_the_file_has_no_unused_space(tmp_path: Path) -> None:
    with closing(DiskBackend(path=tmp_path)) as backend:
        backend.set_many(make_items(2000), None)
        backend.compact()
        assert change_file(tmp_path, "SELECT MIN(rowid), MAX(rowid) FROM Cache") == [(1, 2000)]


def test_compact_deletes_leases_of_an_earlier_version(tmp_path: Path) -> None:
    """A lease has the digits of the entry. Its token must not become the entry's frame."""
    with closing(DiskBackend(path=tmp_path)) as backend:
        backend.set_many({make_key(1): b"one"}, None)
        change_file(tmp_path, PLANT, (make_key(1, "eo1.lease."), b"token"))
        change_file(tmp_path, PLANT, (make_key(2, "eo1.lease."), b"token"))
        change_file(tmp_path, PLANT, (make_key(3), b"three"))
        backend.compact()
        assert list(backend.scan("")) == sorted([make_key(1), make_key(3)])
        assert backend.get_many([make_key(1), make_key(2), make_key(3)]) == {make_key(1): b"one", make_key(3): b"three"}


def test_compact_keeps_the_entry_in_the_form_of_today(tmp_path: Path) -> None:
    change_after = {make_key(1): b"new", make_key(2): b"new"}
    with closing(DiskBackend(path=tmp_path)) as backend:
        backend.set_many({make_key(1): b"new"}, None)
        change_file(tmp_path, PLANT, (make_key(1), b"old"))
        change_file(tmp_path, PLANT, (make_key(2), b"old"))
        change_file(tmp_path, PLANT, (encode_key(make_key(2))[1], b"new"))
        backend.compact()
        assert backend.get_many(list(change_after)) == change_after
        assert change_file(tmp_path, "SELECT COUNT(*) FROM Cache") == [(2,)]


def test_compact_keeps_a_key_that_is_invalid_utf8(tmp_path: Path) -> None:
    keys = [make_key(number) for number in range(500)]
    with closing(DiskBackend(path=tmp_path)) as backend:
        backend.set_many({key: os.urandom(1600) for key in keys}, None)
        change_file(tmp_path, PLANT.replace("?", "CAST(x'ff41' AS TEXT)", 1), (b"value",))
        change_file(tmp_path, PLANT, (make_key(1000), b"text"))
        before = change_file(tmp_path, "SELECT CAST(key AS BLOB), value FROM Cache WHERE value = x'76616c7565'")
        backend.delete_many(keys[::2])
        backend.compact()
        after = change_file(tmp_path, "SELECT CAST(key AS BLOB), value FROM Cache WHERE value = x'76616c7565'")
        assert before == after == [(b"\xff\x41", b"value")]
        assert backend.get(make_key(1000)) == b"text"
        assert backend.count("") == len(list(backend.scan(""))) == 252


def test_compact_ends_in_a_file_that_cannot_give_pages_back(tmp_path: Path) -> None:
    keys = [make_key(number) for number in range(300)]
    with closing(DiskBackend(path=tmp_path)) as backend:
        backend.set_many({key: b"v" * 1600 for key in keys}, None)
    with closing(sqlite3.connect(tmp_path / "cache.db", isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
        for pragma in ("auto_vacuum = NONE", "page_size = 4096"):
            connection.execute(f"PRAGMA {pragma}")
        connection.execute("VACUUM")
        assert connection.execute("PRAGMA auto_vacuum").fetchall() == [(0,)]
    with closing(DiskBackend(path=tmp_path)) as backend:
        backend.delete_many(keys[::2])
        backend.compact()
        backend.compact()
        assert backend.get_many(keys) == dict.fromkeys(keys[1::2], b"v" * 1600)
        assert change_file(tmp_path, "PRAGMA freelist_count") > [(0,)]


def test_compact_stops_while_a_reader_keeps_the_log_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [make_key(number) for number in range(4000)]
    sizes: list[int] = []
    open_transaction = Database.open_transaction

    def note_size(database: Database, max_log_bytes: int | None = None) -> object:
        sizes.append(database.log.get_bytes())
        return open_transaction(database, max_log_bytes)

    monkeypatch.setattr(compaction, "LOG_SECONDS", 0.0)
    monkeypatch.setattr(compaction, "LOG_BYTES", 2**20)
    with closing(DiskBackend(path=tmp_path)) as backend:
        backend.set_many({key: os.urandom(1600) for key in keys}, None)
        backend.delete_many(keys[::2])
        with closing(sqlite3.connect(tmp_path / "cache.db", isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT COUNT(*) FROM Cache").fetchall()
            monkeypatch.setattr(Database, "open_transaction", note_size)
            with pytest.raises(LogTooLarge, match="no entry is lost"):
                backend.compact()
        assert sizes
        assert max(sizes) <= 2**20
        monkeypatch.undo()
        assert len(backend.get_many(keys)) == 2000
        backend.compact()
        assert len(backend.get_many(keys)) == 2000


def test_compact_never_goes_on_while_the_log_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others keep the log from being emptied at most of the attempts, and the log must be small at each step."""
    keys = [make_key(number) for number in range(4000)]
    sizes: list[int] = []
    attempts: Counter[bool] = Counter()
    chance = random.Random(1)
    with closing(DiskBackend(path=tmp_path)) as backend:
        backend.set_many({key: os.urandom(1600) for key in keys}, None)
        backend.delete_many(keys[::2])
        log = backend._database.log
        empty, open_transaction = log._empty, backend._database.open_transaction

        def empty_sometimes(connection: object, is_waiting: bool) -> bool:
            is_lucky = chance.random() < 0.2
            attempts[is_lucky] += 1
            return is_lucky and empty(connection, is_waiting)  # type: ignore[arg-type]

        def note_size(max_log_bytes: int | None = None) -> object:
            sizes.append(log.get_bytes())
            return open_transaction(max_log_bytes)

        monkeypatch.setattr(compaction, "LOG_BYTES", 2**20)
        monkeypatch.setattr(log, "_empty", empty_sometimes)
        monkeypatch.setattr(backend._database, "open_transaction", note_size)
        backend.compact()
        assert attempts[False] > 0
        assert max(sizes) <= 2**20
        assert len(backend.get_many(keys)) == 2000


@pytest.mark.parametrize("size", [100, 1600, 4200, 6208, 8256, 16300, 16400, 40000])
def test_the_estimate_of_a_row_is_what_sqlite_needs(tmp_path: Path, size: int) -> None:
    count = 1200
    with closing(DiskBackend(path=tmp_path)) as backend:
        backend.set_many({make_key(number): os.urandom(size) for number in range(count)}, None)
    real = (tmp_path / "cache.db").stat().st_size - 5 * 16384
    assert 0.95 * real < count * estimate_row_bytes(size, 16384) < 1.05 * real + 20 * count


@pytest.mark.parametrize("size", [200, 1600, 4200, 8256, 40000])
def test_max_bytes_holds_whatever_fits_a_page(tmp_path: Path, size: int) -> None:
    max_bytes = 2**24
    with closing(DiskBackend(path=tmp_path, max_bytes=max_bytes)) as backend:
        for start in range(0, 2 * max_bytes // size, 256):
            backend.set_many({make_key(number): b"v" * size for number in range(start, start + 256)}, None)
            assert (tmp_path / "cache.db").stat().st_size <= max_bytes
        assert backend.count("") * estimate_row_bytes(size, 16384) > 0.6 * max_bytes
