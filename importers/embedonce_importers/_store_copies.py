"""Copies a store that its own program can only open for writing, so that the copy is opened instead."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import tempfile
import threading
import weakref
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

from embedonce.errors import SourceError

from ._files import check_file, check_folder, open_file
from ._sqlite import ReadOnlyDatabase

CHUNK = 2**20
"""Number of bytes that are copied at once."""
ATTEMPTS = 3
"""How often a copy is tried if another program writes to the store meanwhile."""

_Stat = tuple[int, int, int]


class StoreCopy:
    """A temporary copy of a folder with an SQLite database, made at the first use and removed by :meth:`close`."""

    def __init__(self, folder: Path, database: str, program: str) -> None:
        self._folder = folder
        self._database = database
        self._program = program
        self._lock = threading.Lock()
        self._copy: Path | None = None
        self._remove: weakref.finalize[[Path, int], StoreCopy] | None = None
        self._pid = os.getpid()

    def get_path(self) -> Path:
        """Return the folder of the copy.

        Raises:
            SourceError: the folder is not such a store, another program is writing to it, there is no space for the
                copy, or the copy was made before a fork.
        """
        with self._lock:
            if self._copy is not None and self._pid != os.getpid():
                raise SourceError(f"{self._folder} was opened before a fork; make a new importer in the child process")
            if self._copy is None:
                self._pid = os.getpid()
                self._copy = self._make()
                self._remove = weakref.finalize(self, _remove_folder, self._copy, self._pid)
            return self._copy

    def close(self) -> None:
        """Remove the copy. A forked child does not remove that of its parent."""
        with self._lock:
            if self._remove is not None:
                self._remove()
            self._copy = None

    def _make(self) -> Path:
        check_folder(self._folder)
        if not os.path.lexists(self._folder / self._database):
            raise SourceError(
                f"{self._folder} has no file {self._database}, so it is not a folder of {self._program}; give the "
                "folder that the client was opened with"
            )
        for _ in range(ATTEMPTS):
            before = self._describe_files()
            copy = Path(tempfile.mkdtemp(prefix="embedonce-import-"))  # only its owner may read it
            try:
                self._check_space(copy, before)
                self._copy_files(copy, before)
            except BaseException:
                shutil.rmtree(copy, ignore_errors=True)
                raise
            if self._describe_files() == before:
                return copy
            shutil.rmtree(copy, ignore_errors=True)
        raise SourceError(
            f"{self._folder} is being written to by another program; stop that program and run the import again"
        )

    def _describe_files(self) -> Mapping[str, _Stat]:
        """Return size, time and number of each file by its path below the folder.

        Raises:
            SourceError: something in the folder is not a regular file.
        """
        found: dict[str, _Stat] = {}
        for parent, folders, files in os.walk(self._folder):
            for name in folders:
                check_folder(Path(parent, name))
            for name in files:
                path = Path(parent, name)
                check_file(path)
                status = os.lstat(path)
                found[str(path.relative_to(self._folder))] = (status.st_size, status.st_mtime_ns, status.st_ino)
        return found

    def _check_space(self, copy: Path, files: Mapping[str, _Stat]) -> None:
        needed = sum(size for size, _, _ in files.values())
        free = shutil.disk_usage(copy).free
        if needed > free:
            raise SourceError(
                f"{self._folder} is copied before it is read, which needs {needed // 2**20:,} MiB, and {copy.parent} "
                f"has {free // 2**20:,} MiB free; set the environment variable TMPDIR to a folder with more space"
            )

    def _copy_files(self, copy: Path, files: Mapping[str, _Stat]) -> None:
        database = ReadOnlyDatabase(self._folder / self._database)
        try:
            # SQLite's own copy includes a log that other files have, and needs no lock of the whole file.
            with database.connect() as source, closing(sqlite3.connect(copy / self._database)) as target:
                source.backup(target)
        finally:
            database.close()
        for name in files:
            if not name.startswith(self._database):  # the database itself, its journal and its log
                (copy / name).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                path = self._folder / name
                with open_file(path, below=self._folder) as source, open(copy / name, "xb") as target:
                    _copy_data(source, target)


def _copy_data(source: BinaryIO, target: BinaryIO) -> None:
    """Copy a file, and leave out the holes of a sparse file, which would fill the disk."""
    if not hasattr(os, "SEEK_DATA"):  # Windows
        shutil.copyfileobj(source, target, CHUNK)
        return
    size = os.fstat(source.fileno()).st_size
    at = 0
    while at < size:
        try:
            at = source.seek(at, os.SEEK_DATA)
            end = source.seek(at, os.SEEK_HOLE)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break  # there is only a hole behind
        source.seek(at)
        target.seek(at)
        while at < end and (block := source.read(min(CHUNK, end - at))):
            target.write(block)
            at += len(block)
        if at < end:  # the file was shortened meanwhile
            break
    target.truncate(size)


def _remove_folder(folder: Path, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)
