"""One LMDB environment per folder and process: opened late, shared, let go of in a fork, written by one at a time.

LMDB locks by ``fcntl``, whose locks belong to the process: a folder that is opened twice in one process
loses them when the first is closed. So every backend of a folder shares one :class:`Environment`.
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
READERS = 1024
"""Reads at once, of all processes together; each has a slot of 64 bytes in the lock file."""
PATIENCE = 60.0
"""Seconds that a call without a deadline waits for another's write."""
FORK_SECONDS = 5.0
"""How long a fork, or a close, waits for the calls that are under way in other threads."""


class Settings(NamedTuple):
    """What all who share a folder in one process have to agree on."""

    max_bytes: int
    sync: bool


@dataclass(frozen=True, slots=True)
class Opened:
    """The open files."""

    handle: lmdb.Environment
    frames: lmdb._Database
    """key -> when it expires and its number (16 bytes), then the frame."""
    order: lmdb._Database
    """number -> key: what was stored first comes first."""
    due: lmdb._Database
    """when it expires and its number -> key, for entries that expire."""
    lock: int
    """Descriptor of the file whose lock a writer holds."""
    inode: int

    def used(self, transaction: lmdb.Transaction) -> int:
        """Return the bytes of all pages that hold something; the rest of the file is for writes to come."""
        found = [transaction.stat(database) for database in (self.frames, self.order, self.due)]
        return sum(one["psize"] * (one["branch_pages"] + one["leaf_pages"] + one["overflow_pages"]) for one in found)


class Environment:
    """The environment of one folder in this process."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        self.settings = settings
        self.users = 0
        """How many backends share it; guarded by ``_registry``."""
        self._opened: Opened | None = None
        self._stranded = False
        self._renew_locks()

    def _renew_locks(self) -> None:
        self._lock = threading.RLock()
        self._gate = threading.Condition(self._lock)
        self._inside = 0
        self._shut = False
        self._writing = threading.Lock()

    # --- transactions -------------------------------------------------------------------------

    def read(self, work: Callable[[Opened, lmdb.Transaction[bytes]], T]) -> T:
        """Return ``work(…)`` of one read transaction. It sees one state of the store, whatever others write."""
        return self._patched(self._read, work)

    def _read(self, work: Callable[[Opened, lmdb.Transaction[bytes]], T]) -> T:
        opened = self._enter()
        try:
            with _begun(opened) as transaction:
                return work(opened, transaction)
        finally:
            self._leave()

    def write(self, work: Callable[[Opened, lmdb.Transaction[memoryview]], T]) -> T:
        """Return ``work(…)`` of one write transaction, which is stored as a whole or, where it raises, not at all."""
        return self._patched(self._write, work)

    def _write(self, work: Callable[[Opened, lmdb.Transaction[memoryview]], T]) -> T:
        opened = self._enter()
        try:
            # Values as views: of those that are there a write looks at the first 16 bytes only.
            with self._alone(opened), opened.handle.begin(write=True, buffers=True) as transaction:
                return work(opened, transaction)
        finally:
            self._leave()

    def _patched(self, call: Callable[[W], T], work: W) -> T:
        """Return ``call(work)``, tried once more after what stood in its way was put right.

        Raises:
            TierError: with what LMDB says, and where.
        """
        try:
            try:
                return call(work)
            except lmdb.MapResizedError:  # another process has a larger map
                self._resize(0)
            except lmdb.MapFullError:  # readers hold on to pages that were let go of
                self._resize(self._map_size() + self.settings.max_bytes // 4 + 16 * MIB)
            return call(work)
        except lmdb.ReadersFullError as error:
            raise TierBusy(f"{self.path}: all {READERS} places for readers are taken") from error
        except lmdb.Error as error:
            raise TierError(f"{self.path}: {error}{_hint(error)}") from error

    # --- who may go in ------------------------------------------------------------------------

    def _enter(self) -> Opened:
        with self._lock:
            opened = self._opened
            if opened is None or self._shut:
                opened = self._enter_late()
            self._inside += 1
            return opened

    def _enter_late(self) -> Opened:
        left = time_left()
        if not self._gate.wait_for(lambda: not self._shut, PATIENCE if left is None else left):
            raise TierTimeout("this process is forking, or the map is being resized")
        if self._stranded:
            raise TierError(
                "this process was forked while the store was in use, and LMDB cannot go on in it; "
                "fork earlier, or start processes with spawn"
            )
        if not self.users:
            raise CacheClosed("the lmdb backend is closed")
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._shut and not self._inside:
                self._gate.notify_all()

    @contextmanager
    def _emptied(self, seconds: float) -> Iterator[bool]:
        """Keep calls out, wait for those inside, and yield whether all have left."""
        with self._gate:
            self._gate.wait_for(lambda: not self._shut, seconds)
            self._shut = True
            empty = self._gate.wait_for(lambda: not self._inside, seconds)
        try:
            yield empty
        finally:
            with self._gate:
                self._shut = False
                self._gate.notify_all()

    @contextmanager
    def _alone(self, opened: Opened) -> Iterator[None]:
        """Hold the lock of writers.

        LMDB's own has no time limit, so nobody may have to wait for it: whoever begins to write holds this one.
        """
        left = time_left()
        end = time.monotonic() + (PATIENCE if left is None else left)
        if not self._writing.acquire(timeout=max(0.0, end - time.monotonic())):
            raise TierTimeout("another thread writes")
        try:
            _take(opened.lock, end)
            try:
                yield
            finally:
                fcntl.flock(opened.lock, fcntl.LOCK_UN)
        finally:
            self._writing.release()

    # --- the files ----------------------------------------------------------------------------

    def _open(self) -> Opened:
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(self.path / "write.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise TierError(f"{self.path} cannot be opened for writing ({error.strerror})") from error
        try:
            # Laying out a new file is a write, and LMDB would wait for another's without an end.
            _take(lock, time.monotonic() + (PATIENCE if (left := time_left()) is None else left))
            try:
                return self._laid_out(lock)
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)
        except BaseException:
            os.close(lock)
            raise

    def _laid_out(self, lock: int) -> Opened:
        handle = lmdb.open(
            str(self.path),
            # What is live stays below max_bytes; a write needs room beside it, and so do readers of older states.
            map_size=self.settings.max_bytes + self.settings.max_bytes // 4 + 16 * MIB,
            mode=0o600,
            create=False,
            max_dbs=3,
            max_readers=READERS,
            metasync=False,
            sync=self.settings.sync,
            # A cache is read at random: what stands beside an entry is of no use.
            readahead=False,
        )
        try:
            self._fill_up(handle)
            handle.reader_check()
            frames, order, due = (handle.open_db(name) for name in (b"frames", b"order", b"due"))
            return Opened(handle, frames, order, due, lock, self._inode())
        except BaseException:
            handle.close()
            raise

    def _fill_up(self, handle: lmdb.Environment) -> None:
        """Give every page of the map a file behind it: touching one without ends the process.

        A writer that was killed leaves out pages that nobody needs; where somebody cut the file short, LMDB now
        finds zeros and says that it is damaged.
        """
        needed = (handle.info()["last_pgno"] + 1) * handle.stat()["psize"]
        if (self.path / "data.mdb").stat().st_size < needed:
            os.truncate(self.path / "data.mdb", needed)

    def _inode(self) -> int:
        try:
            return (self.path / "data.mdb").stat().st_ino
        except OSError:
            return 0

    def renew(self) -> None:
        """Open the files anew where somebody has removed or replaced them."""
        opened = self._opened
        if opened is not None and opened.inode != self._inode():
            with self._emptied(FORK_SECONDS) as empty:
                if empty and self._opened is opened:
                    self._close()

    def _map_size(self) -> int:
        opened = self._enter()
        try:
            return opened.handle.info()["map_size"]
        finally:
            self._leave()

    def _resize(self, size: int) -> None:
        """Make the map larger; 0: as large as another process has made it."""
        with self._emptied(FORK_SECONDS) as empty:
            if not empty:
                raise TierTimeout(f"{self.path}: the map is to be resized, and a call does not end")
            if self._opened is not None:
                self._opened.handle.reader_check()
                self._opened.handle.set_mapsize(size)

    def _close(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.handle.close()
            os.close(opened.lock)

    def close(self) -> None:
        """Let go of the files, after the calls that are under way."""
        with self._emptied(FORK_SECONDS) as empty:
            if empty:
                self._close()

    # --- forks --------------------------------------------------------------------------------

    def before_fork(self) -> None:
        """Keep calls out and wait for those inside: a transaction that is copied belongs to nobody."""
        with self._gate:
            self._gate.wait_for(lambda: not self._shut, FORK_SECONDS)
            self._shut = True
            self._gate.wait_for(lambda: not self._inside, FORK_SECONDS)

    def after_in_parent(self) -> None:
        """Go on."""
        with self._gate:
            self._shut = False
            self._gate.notify_all()

    def after_in_child(self) -> None:
        """Let go of the parent's files before opening them: closing them later would release the child's own locks."""
        self._stranded = self._stranded or self._inside > 0
        self._renew_locks()
        if self._stranded:
            self._opened = None
        else:
            self._close()


def _begun(opened: Opened) -> lmdb.Transaction[bytes]:
    """Begin to read."""
    try:
        return opened.handle.begin()
    except lmdb.ReadersFullError:
        opened.handle.reader_check()  # a process that was killed leaves its places behind
        return opened.handle.begin()


def _take(descriptor: int, end: float) -> None:
    """Take the lock of a file, trying again and again: ``flock`` itself has no time limit.

    Raises:
        TierTimeout: another process has it all the time.
    """
    pause = 0.0002
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() + pause >= end:
                raise TierTimeout("another process writes") from None
        time.sleep(pause)
        pause = min(pause * 2, 0.005)


def _hint(error: lmdb.Error) -> str:
    """Return what to do about it."""
    if isinstance(error, lmdb.CorruptedError | lmdb.PageNotFoundError | lmdb.InvalidError | lmdb.VersionMismatchError):
        return "; remove the folder, what it held is computed again"
    return ""


# --- the environments of this process -------------------------------------------------------------

_registry = threading.RLock()  # a backend that is collected is released wherever its thread is, also in here
_environments: dict[Path, Environment] = {}


def shared(path: Path, settings: Settings) -> Environment:
    """Return the environment of a folder, for one more backend.

    Raises:
        ConfigError: it is in use in this process with other settings.
    """
    with _registry:
        environment = _environments.setdefault(path, Environment(path, settings))
        if environment.settings != settings:
            raise ConfigError(f"{path} is in use in this process with another max_bytes or sync; give both the same")
        environment.users += 1
        return environment


def release(environment: Environment) -> None:
    """Take note that one backend less uses it, and close it after the last."""
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
