"""Connections to one SQLite file: shared by threads, let go of before a fork, patient up to the deadline."""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar
from weakref import WeakSet, ref

from embedonce.contracts import time_left
from embedonce.errors import CacheClosed, TierError, TierTimeout

T = TypeVar("T")

PATIENCE = 60.0
"""Seconds that a call without a deadline waits for another process's lock."""

FORK_SECONDS = 5.0
"""How long a fork waits for the calls that are under way in other threads."""

IDLE = 4
"""Connections that are kept open between calls; each holds a page cache."""

STEPS = 100_000
"""SQLite's virtual machine looks at the deadline this often: under a millisecond apart."""


FORKED = (
    "this process was forked while the cache's file was in use, and SQLite cannot go on in it; "
    "fork earlier, or start processes with spawn"
)


class Lock(Protocol):
    """A lock of :mod:`threading`."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool: ...

    def release(self) -> None: ...


class Connection(sqlite3.Connection):
    """A connection that knows which opening of the file it belongs to."""

    generation = 0

    def close(self) -> None:
        """Close it, unless it is a parent's and this is a forked child that may not touch it."""
        if _stranded:
            _abandoned.append(self)
            return
        # The last one to be closed writes the log back and removes it. Of two that are closed at one moment each takes
        # the other for one that stays.
        with _closing:
            super().close()


def remaining() -> float:
    """Return the seconds that the call under way may still wait.

    Raises:
        TierTimeout: none.
    """
    left = time_left()
    return PATIENCE if left is None else min(left, PATIENCE)


def patiently(call: Callable[[], T]) -> T:
    """Return ``call()``, tried again while another connection holds the lock that it needs.

    SQLite's own waiting takes one fixed time per connection, and some statements ignore it.

    Raises:
        TierTimeout: the lock was not to be had in time.
    """
    end = time.monotonic() + remaining()
    pause = 0.0002
    while True:
        try:
            return call()
        except sqlite3.OperationalError as error:
            if primary_code(error) != sqlite3.SQLITE_BUSY:
                raise
            if time.monotonic() + pause >= end:
                raise TierTimeout("the database is locked by another process") from error
        time.sleep(pause)
        pause = min(pause * 2, 0.005)


def primary_code(error: Exception) -> int:
    """Return SQLite's result code without its extension, 0 where Python raised the error itself."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF


def rows(connection: sqlite3.Connection, sql: str, values: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
    """Return all rows of one statement, which waits for locks."""
    if _stranded:  # the call that forked goes on here, with its parent's connection
        raise TierError(FORKED)
    time_left()
    try:
        return connection.execute(sql, values).fetchall()
    except sqlite3.OperationalError as error:
        if primary_code(error) != sqlite3.SQLITE_BUSY:
            raise
    return patiently(lambda: connection.execute(sql, values).fetchall())


def explained(error: Exception, file: Path) -> Exception:
    """Return the exception that says what is wrong with ``file`` and what to do, for SQLite's own."""
    code = primary_code(error)
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_INTERRUPT):
        return TierTimeout(f"{file}: not done in time ({error})")
    if code == sqlite3.SQLITE_FULL:
        return OSError(errno.ENOSPC, f"no room to write ({error}); free some space or lower max_bytes", str(file))
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return OSError(errno.EACCES, f"cannot be opened for writing ({error}); check its folder", str(file))
    if code == sqlite3.SQLITE_IOERR:
        return OSError(errno.EIO, f"cannot be read or written ({error})", str(file))
    # Where a damaged schema is quoted in SQLite's message, Python may fail to decode that message.
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or isinstance(error, UnicodeDecodeError):
        return sqlite3.DatabaseError(f"{file}: {error}; remove its folder, what it held is computed again")
    return error


@contextmanager
def holding(lock: Lock) -> Iterator[None]:
    """Hold a lock.

    Raises:
        TierTimeout: it was not to be had in time.
    """
    if not lock.acquire(timeout=remaining()):
        raise TierTimeout("other threads are using the database")
    try:
        yield
    finally:
        lock.release()


class Connections:
    """Hands out connections, each to one call at a time.

    Connections do not belong to threads: there are as many as calls under way, and ``close`` reaches them all.
    """

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connect = connect
        self._idle: list[Connection] = []
        self._generation = 0
        self._closed = False
        self._reset_locks()
        _all.add(ref(self, _all.discard))

    def _reset_locks(self) -> None:
        self._pid = os.getpid()
        # Weak: what a call drops when Ctrl-C strikes between two lines is no longer lent.
        self._lent: WeakSet[Connection] = WeakSet()
        self._lock = threading.RLock()
        self._opening = threading.Lock()
        self.writing = threading.RLock()
        """Held by the one thread of this process that writes: threads queue here, processes poll SQLite's lock."""

    def take(self) -> Connection:
        """Return a connection that is this call's alone until :meth:`give`.

        Raises:
            CacheClosed: after ``close``.
            TierError: in a forked child that may not touch the file.
        """
        while True:
            self._admit()
            with self._lock:
                if not _forks and self._idle:
                    connection = self._idle[-1]
                    self._lent.add(connection)
                    return self._idle.pop()
                generation = self._generation
            with holding(self._opening):
                if _forks:  # a fork waits for this lock, so none begins while a file is being opened
                    continue
                connection = self._connect()
                connection.generation = generation
                self._lent.add(connection)
                return connection

    def _admit(self) -> None:
        if _forks:
            end = time.monotonic() + remaining()
            while _forks:
                # What the forking thread itself calls meanwhile, in a signal handler say, would wait for itself.
                if threading.get_ident() in _forks or time.monotonic() >= end:
                    raise TierTimeout("this process is forking")
                time.sleep(0.001)
        if self._closed:
            raise CacheClosed("the disk backend is closed")
        if _stranded or self._pid != os.getpid():
            raise TierError(FORKED)

    def give(self, connection: Connection, sound: bool) -> None:
        """Take a connection back; it is closed unless it is ``sound``."""
        with self._lock:
            if sound and connection.generation == self._generation and self._may_keep():
                self._idle.append(connection)
                self._lent.discard(connection)
                return
        self._end(connection)

    def _end(self, connection: Connection) -> None:
        try:
            connection.close()
        finally:
            self._lent.discard(connection)

    def _may_keep(self) -> bool:
        return not (self._closed or _forks or _stranded) and len(self._idle) < IDLE

    def renew(self) -> None:
        """Close what is idle and what comes back: the next call opens the file anew."""
        with self._lock:
            self._generation += 1
            self._lent.update(self._idle)  # a fork waits for their closing too
            idle, self._idle = self._idle, []
        for connection in idle:
            self._end(connection)

    def close(self) -> None:
        """Close every connection, those lent out when they come back."""
        self._closed = True
        self.renew()

    def rests(self, until: float) -> bool:
        """Wait until no call opens, uses or closes a connection; say whether that came about in time."""
        while self._opening.locked() or self._is_lending(until):
            if time.monotonic() >= until:
                return False
            time.sleep(0.001)
        return True

    def _is_lending(self, until: float) -> bool:
        # Not for ever: a signal handler may fork while its own thread holds the lock.
        if not self._lock.acquire(timeout=max(0.0, until - time.monotonic())):
            return True
        try:
            return bool(self._lent)
        finally:
            self._lock.release()

    def has_open(self) -> bool:
        """Say whether a connection is open, or is being opened; in a child, whether one was when it was forked."""
        return bool(self._lent or self._idle) or self._opening.locked()

    def restart(self) -> None:
        """Go on in the child, whose other threads are gone."""
        _abandoned.extend(self._idle)
        self._idle = []
        self._reset_locks()


# SQLite keeps POSIX locks in tables of the process, and a child inherits the tables without the locks: its own
# connections to the same file would believe in locks that it does not hold, and lose writes. It inherits SQLite's
# mutexes too, which are the whole library's: one that another thread held stays locked for ever. So a fork finds no
# connection open and none being opened or closed, in any backend; where it does, the child uses SQLite no more.
#
# A fork holds no lock, and waits for others until its time is up: it ends in a signal handler, in a finalizer, beside
# another fork and in the middle of a call. What the child may do is decided in the child, by what was open when it was
# forked: why the parent did not get it closed does not matter.

_all: set[ref[Connections]] = set()
_forks: list[int] = []
"""The threads that are forking; while there is one no backend opens or lends a connection, however new it is."""
_closing = threading.RLock()
_stranded = False
"""Whether this process is a child that was forked while SQLite was in use."""
_abandoned: list[Connection] = []
"""A parent's connections in such a child: kept, because letting go of one would close it."""


def _alive() -> list[Connections]:
    return [connections for found in list(_all) if (connections := found()) is not None]


def _before_fork() -> None:
    until = time.monotonic() + FORK_SECONDS
    _forks.append(threading.get_ident())
    # Listed only now: a backend that is not among them finds the fork under way.
    everyone = _alive()
    if all(connections.rests(until) for connections in everyone):
        for connections in everyone:
            connections.renew()
        # Another thread may have begun to close a backend, which needs no leave.
        all(connections.rests(until) for connections in everyone)


def _after_in_parent() -> None:
    if threading.get_ident() in _forks:
        _forks.remove(threading.get_ident())


def _after_in_child() -> None:
    global _closing, _stranded
    everyone = _alive()
    _stranded = _stranded or any(connections.has_open() for connections in everyone)
    _closing = threading.RLock()
    _forks.clear()
    for connections in everyone:
        connections.restart()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_in_parent, after_in_child=_after_in_child)


def interrupted() -> bool:
    """Say whether the statement that runs in this thread is out of time; SQLite's progress handler."""
    try:
        time_left()
    except TierTimeout:
        return True
    return False
