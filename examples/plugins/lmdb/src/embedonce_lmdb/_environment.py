"""One LMDB environment per folder and process: opened at first use, shared, closed in a fork, one writer at a time.

LMDB uses ``fcntl`` locks, which belong to the process. If a folder were opened twice in one process, closing one of the
two would drop the locks of the other. So all backends of a folder share one :class:`Environment`.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import lmdb

from embedonce.contracts import time_left
from embedonce.errors import CacheClosed, ConfigError, TierBusy, TierError, TierTimeout

T = TypeVar("T")
W = TypeVar("W")

MIB = 2**20
DATABASES = (b"frames by name", b"order by name", b"due by name")
EARLIER_DATABASES = (b"frames", b"order", b"due")
"""Databases of an earlier version, which had keys as text instead of names."""
MAX_READERS = 1024
"""Maximum concurrent reads in all processes together. Each takes a slot of 64 bytes in the lock file."""
DEFAULT_WAIT_SECONDS = 60.0
"""Seconds that a call without a deadline waits for another writer."""
FORK_SECONDS = 5.0
"""Seconds that a fork, or a close, waits for calls in flight in other threads."""


class Settings(NamedTuple):
    """The settings that all backends of a folder in one process must share."""

    max_bytes: int
    sync: bool


@dataclass(frozen=True, slots=True)
class Opened:
    """The open files of a folder."""

    handle: lmdb.Environment
    frames: lmdb._Database
    """Maps a name to its expiry time and number (16 bytes), followed by the frame."""
    order: lmdb._Database
    """Maps a number to its name, in the order of storing."""
    due: lmdb._Database
    """Maps an expiry time and number to the name, for entries that expire."""
    lock: int
    """Descriptor of the file that a writer locks."""
    inode: int

    def count_used_bytes(self, transaction: lmdb.Transaction) -> int:
        """Return the bytes of all pages in use. The rest of the file is free for later writes."""
        found = [transaction.stat(database) for database in (self.frames, self.order, self.due)]
        return sum(one["psize"] * (one["branch_pages"] + one["leaf_pages"] + one["overflow_pages"]) for one in found)


class Environment:
    """The environment of one folder in this process."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        self.settings = settings
        self.users = 0
        """Number of backends that share it. ``_registry`` guards this value."""
        self._opened: Opened | None = None
        self._is_unusable = False
        self._renew_locks()

    def _renew_locks(self) -> None:
        self._lock = threading.RLock()
        self._gate = threading.Condition(self._lock)
        self._active_calls = 0
        self._is_gate_closed = False
        self._write_lock = threading.Lock()

    # --- transactions -------------------------------------------------------------------------

    def read(self, work: Callable[[Opened, lmdb.Transaction[bytes]], T]) -> T:
        """Return the result of ``work`` in one read transaction, which sees one state of the store throughout."""
        return self._run_with_repair(self._read, work)

    def _read(self, work: Callable[[Opened, lmdb.Transaction[bytes]], T]) -> T:
        opened = self._enter()
        try:
            with _begin_read(opened) as transaction:
                return work(opened, transaction)
        finally:
            self._leave()

    def write(self, work: Callable[[Opened, lmdb.Transaction[memoryview]], T]) -> T:
        """Return the result of ``work`` in one write transaction. If ``work`` raises, nothing is stored."""
        return self._run_with_repair(self._write, work)

    def _write(self, work: Callable[[Opened, lmdb.Transaction[memoryview]], T]) -> T:
        opened = self._enter()
        try:
            # Values are views, because a write needs only the first 16 bytes of existing values.
            with self._lock_writers(opened), opened.handle.begin(write=True, buffers=True) as transaction:
                return work(opened, transaction)
        finally:
            self._leave()

    def _run_with_repair(self, call: Callable[[W], T], work: W) -> T:
        """Return ``call(work)``. If the map is too small, enlarge it and try once more.

        Raises:
            TierError: LMDB failed. The message has its reason and the folder.
        """
        try:
            try:
                return call(work)
            except lmdb.MapResizedError:  # another process has enlarged the map
                self._resize(0)
            except lmdb.MapFullError:  # readers still use pages that were freed
                self._resize(self._map_size() + self.settings.max_bytes // 4 + 16 * MIB)
            return call(work)
        except lmdb.ReadersFullError as error:
            raise TierBusy(f"{self.path}: all {MAX_READERS} slots for readers are in use") from error
        except lmdb.Error as error:
            raise TierError(f"{self.path}: {error}{_hint(error)}") from error

    # --- admitting calls ----------------------------------------------------------------------

    def _enter(self) -> Opened:
        with self._lock:
            opened = self._opened
            if opened is None or self._is_gate_closed:
                opened = self._wait_and_open()
            self._active_calls += 1
            return opened

    def _wait_and_open(self) -> Opened:
        left = time_left()
        if not self._gate.wait_for(lambda: not self._is_gate_closed, DEFAULT_WAIT_SECONDS if left is None else left):
            raise TierTimeout("this process is forking, or the map is being resized")
        if self._is_unusable:
            raise TierError(
                "this process was forked while the store was in use, and LMDB does not work in such a process; "
                "fork before the first use, or start processes with spawn"
            )
        if not self.users:
            raise CacheClosed("the lmdb backend is closed")
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _leave(self) -> None:
        with self._lock:
            self._active_calls -= 1
            if self._is_gate_closed and not self._active_calls:
                self._gate.notify_all()

    @contextmanager
    def _close_gate(self, seconds: float) -> Iterator[bool]:
        """Keep new calls out, wait for active ones, and yield whether all of them have ended."""
        with self._gate:
            self._gate.wait_for(lambda: not self._is_gate_closed, seconds)
            self._is_gate_closed = True
            is_empty = self._gate.wait_for(lambda: not self._active_calls, seconds)
        try:
            yield is_empty
        finally:
            with self._gate:
                self._is_gate_closed = False
                self._gate.notify_all()

    @contextmanager
    def _lock_writers(self, opened: Opened) -> Iterator[None]:
        """Hold the lock of writers.

        LMDB's own lock has no time limit. Every writer takes this lock first, so no call ever waits for LMDB's.
        """
        left = time_left()
        end = time.monotonic() + (DEFAULT_WAIT_SECONDS if left is None else left)
        if not self._write_lock.acquire(timeout=max(0.0, end - time.monotonic())):
            raise TierTimeout("another thread is writing")
        try:
            _lock_file(opened.lock, end)
            try:
                yield
            finally:
                fcntl.flock(opened.lock, fcntl.LOCK_UN)
        finally:
            self._write_lock.release()

    # --- the files ----------------------------------------------------------------------------

    def _open(self) -> Opened:
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(self.path / "write.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise TierError(f"cannot open {self.path} for writing: {error.strerror}") from error
        try:
            # Creating a new file is a write, and LMDB would wait for another writer without a time limit.
            _lock_file(lock, time.monotonic() + (DEFAULT_WAIT_SECONDS if (left := time_left()) is None else left))
            try:
                return self._open_databases(lock)
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)
        except BaseException:
            os.close(lock)
            raise

    def _open_databases(self, lock: int) -> Opened:
        handle = lmdb.open(
            str(self.path),
            # Live entries stay below max_bytes. Writes need further space, and so do the old pages that readers use.
            map_size=self.settings.max_bytes + self.settings.max_bytes // 4 + 16 * MIB,
            mode=0o600,
            create=False,
            max_dbs=len(DATABASES) + len(EARLIER_DATABASES),
            max_readers=MAX_READERS,
            metasync=False,
            sync=self.settings.sync,
            # Reads of a cache are random, so the neighbours of an entry are of no use.
            readahead=False,
        )
        try:
            self._extend_file(handle)
            handle.reader_check()
            _drop_earlier_layout(handle)
            frames, order, due = (handle.open_db(name) for name in DATABASES)
            return Opened(handle, frames, order, due, lock, self._inode())
        except BaseException:
            handle.close()
            raise

    def _extend_file(self, handle: lmdb.Environment) -> None:
        """Extend the file to cover every page of the map, because access to a page beyond its end kills the process.

        After a writer was killed, only pages without content may be missing. If the file was truncated, LMDB now finds
        zeros and reports the damage.
        """
        needed = (handle.info()["last_pgno"] + 1) * handle.stat()["psize"]
        if (self.path / "data.mdb").stat().st_size < needed:
            os.truncate(self.path / "data.mdb", needed)

    def _inode(self) -> int:
        try:
            return (self.path / "data.mdb").stat().st_ino
        except OSError:
            return 0

    def reopen_if_replaced(self) -> None:
        """Close the files if they were removed or replaced on disk. The next call opens the new ones."""
        opened = self._opened
        if opened is not None and opened.inode != self._inode():
            with self._close_gate(FORK_SECONDS) as is_empty:
                if is_empty and self._opened is opened:
                    self._close_files()

    def _map_size(self) -> int:
        opened = self._enter()
        try:
            return opened.handle.info()["map_size"]
        finally:
            self._leave()

    def _resize(self, size: int) -> None:
        """Set the size of the map. 0 takes the size that another process has set."""
        with self._close_gate(FORK_SECONDS) as is_empty:
            if not is_empty:
                raise TierTimeout(f"{self.path}: cannot resize the map, because another call has not ended")
            if self._opened is not None:
                self._opened.handle.reader_check()
                self._opened.handle.set_mapsize(size)

    def _close_files(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.handle.close()
            os.close(opened.lock)

    def close(self) -> None:
        """Close the files after the calls in flight have ended."""
        with self._close_gate(FORK_SECONDS) as is_empty:
            if is_empty:
                self._close_files()

    # --- forks --------------------------------------------------------------------------------

    def before_fork(self) -> None:
        """Keep new calls out and wait for active ones, because a forked copy of a transaction cannot be used."""
        with self._gate:
            self._gate.wait_for(lambda: not self._is_gate_closed, FORK_SECONDS)
            self._is_gate_closed = True
            self._gate.wait_for(lambda: not self._active_calls, FORK_SECONDS)

    def after_in_parent(self) -> None:
        """Admit calls again."""
        with self._gate:
            self._is_gate_closed = False
            self._gate.notify_all()

    def after_in_child(self) -> None:
        """Close the parent's files at once. Closing them after opening the child's would release the child's locks."""
        self._is_unusable = self._is_unusable or self._active_calls > 0
        self._renew_locks()
        if self._is_unusable:
            self._opened = None
        else:
            self._close_files()


def _begin_read(opened: Opened) -> lmdb.Transaction[bytes]:
    """Begin a read transaction."""
    try:
        return opened.handle.begin()
    except lmdb.ReadersFullError:
        opened.handle.reader_check()  # free the slots of processes that were killed
        return opened.handle.begin()


def _lock_file(descriptor: int, end: float) -> None:
    """Lock a file by polling, because ``flock`` has no time limit.

    Raises:
        TierTimeout: another process holds the lock until ``end``.
    """
    pause = 0.0002
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() + pause >= end:
                raise TierTimeout("another process is writing") from None
        time.sleep(pause)
        pause = min(pause * 2, 0.005)


def _drop_earlier_layout(handle: lmdb.Environment) -> None:
    """Remove the databases of an earlier version. Their vectors will be computed again."""
    for name in EARLIER_DATABASES:
        try:
            database = handle.open_db(name, create=False)
        except lmdb.NotFoundError:
            continue
        with handle.begin(write=True) as transaction:
            transaction.drop(database)


def _hint(error: lmdb.Error) -> str:
    """Return advice for an error of LMDB, "" if there is none."""
    if isinstance(error, lmdb.CorruptedError | lmdb.PageNotFoundError | lmdb.InvalidError | lmdb.VersionMismatchError):
        return "; remove the folder, its vectors will be computed again"
    return ""


# --- the environments of this process -------------------------------------------------------------

_registry = threading.RLock()  # reentrant: garbage collection may release a backend while this thread holds the lock
_environments: dict[Path, Environment] = {}


def acquire(path: Path, settings: Settings) -> Environment:
    """Return the environment of a folder, and count one more backend that uses it.

    Raises:
        ConfigError: the folder is in use in this process with other settings.
    """
    with _registry:
        environment = _environments.setdefault(path, Environment(path, settings))
        if environment.settings != settings:
            raise ConfigError(
                f"{path} is already in use in this process with another max_bytes or sync; use the same values in both"
            )
        environment.users += 1
        return environment


def release(environment: Environment) -> None:
    """Count one backend less that uses an environment, and close it after the last one."""
    with _registry:
        environment.users -= 1
        if environment.users:
            return
        _environments.pop(environment.path, None)
        environment.close()


def _before_fork() -> None:
    _registry.acquire()
    for environment in list(_environments.values()):
        environment.before_fork()


def _after_in_parent() -> None:
    for environment in list(_environments.values()):
        environment.after_in_parent()
    _registry.release()


def _after_in_child() -> None:
    global _registry
    _registry = threading.RLock()
    for environment in list(_environments.values()):
        environment.after_in_child()


os.register_at_fork(before=_before_fork, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
