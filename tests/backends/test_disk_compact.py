"""``compact`` of the disk tier: it gives unused space back, loses nothing, and can be interrupted."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from embedonce_backends.disk import DiskBackend, file


def make_items(count: int) -> dict[str, bytes]:
    return {f"eo1.0123456789abcdef.{number:064x}": os.urandom(1600) for number in range(count)}


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
