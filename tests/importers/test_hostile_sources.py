"""No importer reads anything but the files of its store: no links, pipes, sockets or devices, and it never hangs."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedonce.errors import SourceError

from .hostile import STORES, each_store, make_importer, read

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes"),
    pytest.mark.timeout(60),  # a pipe that is opened for reading blocks for ever
]

TEXTS = ["one text", "another text", "a third text"]
OURS = np.full((3, 8), 2.0, np.float32) + np.arange(3, dtype=np.float32)[:, None]
SECRET = -OURS
SPARSE_BYTES = 1 << 36


@contextmanager
def open_importer(importer: str, options: dict[str, Any]) -> Iterator[Any]:
    made = make_importer(importer, **options)
    try:
        yield made
    finally:
        made.close()


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        folder = os.open(path.parent, os.O_RDONLY)
        before = os.open(".", os.O_RDONLY)
        try:
            os.fchdir(folder)  # the path of a socket must be short
            server.bind(path.name)
        finally:
            os.fchdir(before)
            os.close(folder)
            os.close(before)


def make_sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(SPARSE_BYTES)


def make_link_to(target: str | Path) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def make_folder_of_junk(path: Path) -> None:
    path.mkdir()
    (path / "note.txt").write_text("secret note")
    (path / "cache.db").write_text("secret note")
    (path / "sub").mkdir()


KINDS: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "pipe": os.mkfifo,
    "socket": make_socket,
    "link-to-zeros": make_link_to("/dev/zero"),
    "link-to-nothing": make_link_to("nowhere"),
    "empty-file": Path.touch,
    "sparse-file": make_sparse,
    "file-of-noise": lambda path: path.write_bytes(np.random.default_rng(5).bytes(5000)),
    "file-of-text": lambda path: path.write_text("secret note\n" * 100),
    "empty-folder": Path.mkdir,
    "folder-of-junk": make_folder_of_junk,
}


# pyarrow decodes an invalid row before it calls the handler that skips the row, and reports that it cannot.
ignore_undecodable_rows = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@ignore_undecodable_rows
@each_store()
def test_what_is_no_store_is_an_error_of_check_and_gives_nothing(name: str, tmp_path: Path) -> None:
    store = STORES[name]
    options = store.write(tmp_path / "real", TEXTS, OURS)
    for kind, make in KINDS.items():
        path = tmp_path / f"{kind}{store.suffix}"
        make(path)
        with open_importer(store.importer, options | {"path": path}) as importer:
            with pytest.raises(SourceError) as caught:
                importer.check()
            assert str(path) in str(caught.value)
            assert "secret" not in str(caught.value)
            with suppress(SourceError):
                assert read(importer, TEXTS)[0] == {}, kind


@pytest.mark.skipif(not Path("/dev/zero").is_char_device(), reason="this system has no devices")
@each_store()
def test_a_device_is_not_read(name: str, tmp_path: Path) -> None:
    store = STORES[name]
    options = store.write(tmp_path / "real", TEXTS, OURS)
    with open_importer(store.importer, options | {"path": Path("/dev/zero")}) as importer:
        with pytest.raises(SourceError, match="/dev/zero is a device"):
            importer.check()
        with pytest.raises(SourceError):
            read(importer, TEXTS)


@each_store()
def test_a_link_in_place_of_the_store_is_not_followed_but_a_link_above_it_is(name: str, tmp_path: Path) -> None:
    store = STORES[name]
    options = store.write(tmp_path / "real", TEXTS, OURS)
    path = options["path"]
    link = tmp_path / f"link{store.suffix}"
    link.symlink_to(path)
    with open_importer(store.importer, options | {"path": link}) as importer:
        with pytest.raises(SourceError, match="symbolic link"):
            importer.check()
        with pytest.raises(SourceError, match="symbolic link"):
            read(importer, TEXTS)
    # The path comes from the user's configuration, so its parents may be links.
    above = tmp_path / "above"
    above.symlink_to(path.parent)
    with open_importer(store.importer, options | {"path": above / path.name}) as importer:
        importer.check()
        check_ours(read(importer, TEXTS)[0], count=3)


def check_ours(found: dict[str, Any], *, count: int | None = None) -> None:
    """Check that all vectors are those of this store, and not those of the store that must not be read."""
    if count is not None:
        assert len(found) == count
    for text, vector in found.items():
        np.testing.assert_array_equal(vector, OURS[TEXTS.index(text)])


def list_below(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


def replace(path: Path, make: Callable[[Path], object]) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
    make(path)


@each_store(is_folder=True)
@pytest.mark.parametrize("kind", ["link", "pipe", "sparse-file"])
def test_nothing_inside_a_store_leads_out_of_it_or_blocks(kind: str, name: str, tmp_path: Path) -> None:
    store = STORES[name]
    options = store.write(tmp_path / "ours", TEXTS, OURS)
    secret = store.write(tmp_path / "secret", TEXTS, SECRET)["path"]
    folder = options["path"]
    others = {path.suffix or path.name[:2]: path for path in list_below(secret) if (secret / path).is_file()}
    for number, inner in enumerate(list_below(folder)):
        copy = tmp_path / f"copy-{number}"
        shutil.copytree(folder, copy)
        # Names may be random, so the secret file is one of the same kind.
        target = (
            secret / inner if (secret / inner).exists() else secret / others.get(inner.suffix or inner.name[:2], "")
        )
        replace(copy / inner, make_link_to(target) if kind == "link" else KINDS[kind])
        with open_importer(store.importer, options | {"path": copy}) as importer, suppress(SourceError):
            importer.check()
            check_ours(read(importer, TEXTS)[0])


@each_store()
def test_a_store_that_is_swapped_for_a_link_after_the_check_is_not_read(name: str, tmp_path: Path) -> None:
    store = STORES[name]
    options = store.write(tmp_path / "ours", TEXTS, OURS)
    secret = store.write(tmp_path / "secret", TEXTS, SECRET)["path"]
    path = options["path"]
    with open_importer(store.importer, options) as importer:
        importer.check()
        path.rename(tmp_path / "moved")
        path.symlink_to(secret)
        with suppress(SourceError):
            check_ours(read(importer, TEXTS)[0])


@each_store(is_folder=True)
def test_a_folder_that_is_swapped_for_a_link_while_the_store_is_read_is_not_followed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folders below are swapped right after a check of a path."""
    from embedonce_importers import _files

    store = STORES[name]
    options = store.write(tmp_path / "ours", TEXTS, OURS)
    secret = store.write(tmp_path / "secret", TEXTS, SECRET)["path"]
    folders = [path for path in list_below(options["path"]) if (options["path"] / path).is_dir()]
    original = _files._refuse_other_kinds
    for moment in (0, 1, 3):
        for number, inner in enumerate(folders):
            copy = tmp_path / f"copy-{moment}-{number}"
            shutil.copytree(options["path"], copy)
            target = secret / inner
            swap = make_swap(original, moment, copy / inner, target)
            monkeypatch.setattr(_files, "_refuse_other_kinds", swap)
            with open_importer(store.importer, options | {"path": copy}) as importer, suppress(SourceError):
                check_ours(read(importer, TEXTS)[0])


def make_swap(
    check: Callable[[Path, int], None], moment: int, folder: Path, target: Path
) -> Callable[[Path, int], None]:
    """Return a function that calls ``check``, and swaps ``folder`` for a link to ``target`` after call ``moment``."""
    calls = itertools.count()

    def swap(path: Path, mode: int, /) -> None:
        check(path, mode)
        if next(calls) == moment and target.exists():
            replace(folder, make_link_to(target))

    return swap


@each_store()
def test_reading_does_not_change_the_store(name: str, tmp_path: Path) -> None:
    store = STORES[name]
    options = store.write(tmp_path / "ours", TEXTS, OURS)

    def snapshot() -> dict[Path, tuple[int, bytes]]:
        files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.endswith(("-shm", "-wal"))]
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before = snapshot()
    with open_importer(store.importer, options) as importer:
        importer.check()
        check_ours(read(importer, TEXTS)[0], count=3)
    assert snapshot() == before


@ignore_undecodable_rows
@each_store()
def test_a_damaged_store_gives_errors_and_counts_but_never_crashes(name: str, tmp_path: Path) -> None:
    """One byte in ten thousand is another one, or the file is cut. A changed number is not noticed, but a text is."""
    store = STORES[name]
    options = store.write(tmp_path / "ours", TEXTS, OURS)
    root = options["path"]
    files = [root] if root.is_file() else [path for path in root.rglob("*") if path.is_file()]
    generator = np.random.default_rng(7)
    for file in files:
        content = file.read_bytes()
        if not content:
            continue
        for attempt in range(4):
            damaged = bytearray(content)
            for at in generator.integers(0, len(content), 1 + len(content) // 10_000):
                damaged[at] = int(generator.integers(0, 256))
            if attempt % 2:
                damaged = damaged[: int(generator.integers(0, len(content)))]
            file.write_bytes(damaged)
            # SQLite may say itself what is damaged.
            with open_importer(store.importer, options) as importer, suppress(SourceError, sqlite3.DatabaseError):
                importer.check()
                read(importer, TEXTS)
        file.write_bytes(content)
