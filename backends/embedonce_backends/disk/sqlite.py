"""Connections to one SQLite file. Threads share them, a fork waits until they are closed, and calls have deadlines."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias, TypeVar
from weakref import WeakSet, ref

from embedonce.contracts import time_left
from embedonce.errors import CacheClosed, TierError, TierTimeout

from .errors import get_primary_code

T = TypeVar("T")

Stamp: TypeAlias = tuple[int, int, int, int]
"""Inode, time of the last change in nanoseconds and size in bytes of a file, and the size of its log."""

DEFAULT_SECONDS = 60.0
"""Maximum number of seconds that a call without a deadline waits for a lock."""

FORK_SECONDS = 5.0
"""Maximum number of seconds that a fork waits for calls in other threads to end."""

MAX_IDLE = 4
"""Maximum number of connections that stay open between calls. Each of them keeps a page cache in memory."""

PROGRESS_STEPS = 100_000
"""Number of steps of SQLite's virtual machine between two checks of the deadline. These steps take less than a
millisecond."""


FORKED = (
    "this process was forked while the disk tier was in use, so this process cannot use SQLite safely; "
    "fork earlier, or start processes with spawn"
)


class Lock(Protocol):
    """A lock of :mod:`threading`."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool: ...

    def release(self) -> None: ...


class Connection(sqlite3.Connection):
    """A connection and its generation.

    :meth:`Connections.renew` begins a new generation, and closes the connections of older generations.
    """

    generation = 0
    """Number of :meth:`Connections.renew` calls before this connection was opened."""
    stamp: Stamp | None = None
    """State of the file when this connection opened it as immutable; None if SQLite itself notices changes."""
    is_lent = False
    """Whether a call uses this connection, or is closing it."""

    def close(self) -> None:
        """Close the connection. A forked child that must not use SQLite keeps the connection open instead."""
        if _is_stranded:
            _abandoned.append(self)
            return
        # Closing the last connection writes the log back into the file and removes the log. If the last two connections
        # were closed at the same time, each would find the other connection open, and the log would not be written
        # back.
        with _close_lock:
            super().close()


def get_remaining_seconds() -> float:
    """Return the seconds that the current call may still wait.

    Raises:
        TierTimeout: no time is left.
    """
    left = time_left()
    return DEFAULT_SECONDS if left is None else min(left, DEFAULT_SECONDS)


def retry_while_locked(call: Callable[[], T]) -> T:
    """Return ``call()``, retrying it while another connection holds the lock that the call needs.

    SQLite's own busy timeout is not used, because it is a setting of the connection, but every call has its own
    deadline. In addition, some statements ignore the busy timeout.

    Raises:
        TierTimeout: another connection held the lock until the deadline.
    """
    end = time.monotonic() + get_remaining_seconds()
    pause = 0.0002
    while True:
        try:
            return call()
        except sqlite3.OperationalError as error:
            if get_primary_code(error) != sqlite3.SQLITE_BUSY:
                raise
            if time.monotonic() + pause >= end:
                raise TierTimeout("the database is locked by another process") from error
        time.sleep(pause)
        pause = min(pause * 2, 0.005)


def fetch_rows(connection: sqlite3.Connection, sql: str, values: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
    """Run one statement, waiting for locks if necessary, and return all of its rows."""
    # If the process forks in the middle of a call, the call continues in the child too. The child must not use the
    # parent's connection, so this raises an error in the child.
    if _is_stranded:
        raise TierError(FORKED)
    time_left()
    try:
        return connection.execute(sql, values).fetchall()
    except sqlite3.OperationalError as error:
        if get_primary_code(error) == sqlite3.SQLITE_INTERRUPT:
            time_left()
            # There is time left, so a signal handler has raised an exception in the progress handler, and sqlite3 has
            # dropped this exception.
            raise KeyboardInterrupt from error
        if get_primary_code(error) != sqlite3.SQLITE_BUSY:
            raise
    return retry_while_locked(lambda: connection.execute(sql, values).fetchall())


@contextmanager
def hold_lock(lock: Lock) -> Iterator[None]:
    """Hold a lock during the block.

    Raises:
        TierTimeout: another thread held the lock until the deadline.
    """
    if not lock.acquire(timeout=get_remaining_seconds()):
        raise TierTimeout("other threads are using the database")
    try:
        yield
    finally:
        lock.release()


class Connections:
    """Lends connections, each to one call at a time.

    No connection belongs to a thread, so ``close`` can close the connections of all threads.
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
        # A fork waits until none of these is lent. The references are weak, because a call that Ctrl-C has interrupted
        # may end without giving its connection back.
        self._open: WeakSet[Connection] = WeakSet()
        self._lock = threading.RLock()
        self._open_lock = threading.Lock()
        self.write_lock = threading.RLock()
        """Lock that lets only one thread of this process write at a time. Without this lock, the threads would have to
        poll SQLite's own lock, as different processes do."""

    def take(self) -> Connection:
        """Return a connection that no other call uses until :meth:`give`.

        Raises:
            CacheClosed: after ``close``.
            TierError: this process is a forked child that must not use SQLite.
        """
        while True:
            if _forking_threads or _is_stranded or self._closed or self._pid != os.getpid():
                self._check_usable()
            with self._lock:
                if self._idle and not _forking_threads:
                    self._idle[-1].is_lent = True
                    return self._idle.pop()
                generation = self._generation
            # A fork waits for this lock, so no fork happens while a file is being opened. If a fork began before this
            # thread got the lock, wait for the end of the fork.
            with hold_lock(self._open_lock):
                if _forking_threads:
                    continue
                connection = self._connect()
                connection.generation = generation
                connection.is_lent = True
                with self._lock:
                    self._open.add(connection)
                return connection

    def _check_usable(self) -> None:
        """Wait until no other thread is forking, and raise an error if this process must not use a connection."""
        if _forking_threads:
            end = time.monotonic() + get_remaining_seconds()
            while _forking_threads:
                # The forking thread itself may make a call, for example in a signal handler. That call must not wait
                # for the fork, because the fork continues only after the call has ended.
                if threading.get_ident() in _forking_threads or time.monotonic() >= end:
                    raise TierTimeout("this process is forking")
                time.sleep(0.001)
        if self._closed:
            raise CacheClosed("the disk backend is closed")
        if _is_stranded or self._pid != os.getpid():
            raise TierError(FORKED)

    def give(self, connection: Connection, is_reusable: bool) -> None:
        """Take a connection back, and close it unless ``is_reusable``."""
        with self._lock:
            if is_reusable and connection.generation == self._generation and self._may_keep():
                self._idle.append(connection)
                connection.is_lent = False
                return
        self._close_connection(connection)

    def _close_connection(self, connection: Connection) -> None:
        try:
            connection.close()
        finally:
            connection.is_lent = False

    def _may_keep(self) -> bool:
        return not (self._closed or _forking_threads or _is_stranded) and len(self._idle) < MAX_IDLE

    def renew(self) -> None:
        """Close the idle connections now, and each connection in use when its call ends.

        The next call opens the file again.
        """
        with self._lock:
            self._generation += 1
            for connection in self._idle:
                connection.is_lent = True  # so that a fork waits until the idle connections are closed
            idle, self._idle = self._idle, []
        for connection in idle:
            self._close_connection(connection)

    def close(self) -> None:
        """Close the idle connections now, and each connection in use when its call ends."""
        self._closed = True
        self.renew()

    def wait_until_unused(self, until: float) -> bool:
        """Wait until no call opens, uses or closes a connection.

        ``until`` is a time of the monotonic clock. If a call still opens, uses or closes a connection at that time,
        return False.
        """
        while self._open_lock.locked() or self._is_lending(until):
            if time.monotonic() >= until:
                return False
            time.sleep(0.001)
        return True

    def _is_lending(self, until: float) -> bool:
        # The timeout ends the wait at `until` even if another thread still holds the lock.
        if not self._lock.acquire(timeout=max(0.0, until - time.monotonic())):
            return True
        try:
            return self._has_lent()
        finally:
            self._lock.release()

    def has_open(self) -> bool:
        """Return whether a connection is open or is being opened.

        A forked child calls this before :meth:`restart`, to find out whether a connection was open at the fork.
        """
        return bool(self._idle) or self._has_lent() or self._open_lock.locked()

    def _has_lent(self) -> bool:
        return any(connection.is_lent for connection in self._open)

    def restart(self) -> None:
        """In a forked child, start without connections and with new locks.

        A thread of the parent may have held an old lock at the fork. That thread does not exist in the child, so the
        lock would never be released.
        """
        _abandoned.extend(self._idle)
        self._idle = []
        self._reset_locks()


# SQLite keeps a table of its POSIX locks in the memory of the process. A forked child inherits the table but not the
# locks. The child's own connections to the same file would rely on locks that the child does not hold, and writes
# would be lost. The child also inherits SQLite's mutexes, which are global to the library. A mutex that another thread
# held during the fork would stay locked in the child forever. To avoid both problems, every connection of every backend
# is closed before a fork, and the fork waits for connections that are being opened or closed. If the wait takes too
# long, the fork happens anyway, and the child must not use SQLite at all.
#
# A fork holds no lock while it waits, and the wait has a time limit. So a fork always ends, even in a signal handler,
# in a finalizer, at the same time as another fork, or in the middle of a call. After the fork, the child checks
# whether a connection was open at the moment of the fork. If so, the child must not use SQLite.

_all: set[ref[Connections]] = set()
_forking_threads: list[int] = []
"""Ids of the threads that are forking. While a thread is forking, no backend opens or lends a connection, not even a
backend that is made in the meantime."""
_close_lock = threading.RLock()
_is_stranded = False
"""Whether this process is a child that was forked while SQLite was in use, and so must not use SQLite."""
_abandoned: list[Connection] = []
"""The parent's connections in a forked child. They are kept alive, so that garbage collection does not close them."""


def _list_alive() -> list[Connections]:
    return [connections for found in list(_all) if (connections := found()) is not None]


def _before_fork() -> None:
    until = time.monotonic() + FORK_SECONDS
    _forking_threads.append(threading.get_ident())
    # This thread is registered as forking before the backends are listed. So if a backend is made after the listing,
    # the backend sees that a fork is in progress.
    everyone = _list_alive()
    if all(connections.wait_until_unused(until) for connections in everyone):
        for connections in everyone:
            connections.renew()
        # Wait again, because another thread may have started to close a backend meanwhile.
        all(connections.wait_until_unused(until) for connections in everyone)


def _after_fork_in_parent() -> None:
    if threading.get_ident() in _forking_threads:
        _forking_threads.remove(threading.get_ident())


def _after_fork_in_child() -> None:
    global _close_lock, _is_stranded
    everyone = _list_alive()
    _is_stranded = _is_stranded or any(connections.has_open() for connections in everyone)
    _close_lock = threading.RLock()
    _forking_threads.clear()
    for connections in everyone:
        connections.restart()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


def is_out_of_time() -> bool:
    """Return whether the current call's deadline has passed. SQLite calls this as its progress handler."""
    try:
        time_left()
    except TierTimeout:
        return True
    return False
