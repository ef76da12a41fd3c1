"""Connections to Postgres: each ends by the deadline of the call, and none is shared with a forked child.

psycopg's own pool connects in threads that a fork leaves behind and that know no deadline, and it tells
a server that is down by the same ``PoolTimeout`` as a pool that is exhausted. So here are two small ones.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import select
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar
from weakref import WeakSet

import psycopg
from psycopg import AsyncRawCursor, RawCursor, waiting
from psycopg.abc import PQGen
from psycopg.adapt import AdaptersMap, Dumper
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import Format, TransactionStatus

from embedonce.contracts import time_left
from embedonce.errors import CacheClosed, ConfigError, TierBusy, TierTimeout

T = TypeVar("T")

log = logging.getLogger("embedonce.postgres")

CLOSED = "the postgres backend is closed"
SLOW = "no connection to Postgres could be made in time"
BUSY = "all connections to Postgres are in use (max_connections = {})"

CONNECT_SECONDS = 10
"""A connection that takes longer is given up, where the URL has no ``connect_timeout``."""
CANCEL_SECONDS = 2.0
"""How long the server is asked to stop a query that nobody waits for any more."""
NEXT_HOST_SECONDS = 0.04
"""Where the URL names several hosts and one has not answered for so long, the next one is tried beside it."""
TICK = 0.01
"""Seconds after which a call that waits looks at its deadline."""
IDLE_SECONDS = 300.0
"""A connection that was not used for so long is closed."""


class Binary:
    """A parameter that is encoded already; its type is what the statement casts it to."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data


class _BinaryDumper(Dumper):
    format = Format.BINARY

    def dump(self, obj: Binary) -> bytes:
        return obj.data


ADAPTERS = AdaptersMap(psycopg.adapters)
ADAPTERS.register_dumper(Binary, _BinaryDumper)


def parameters(url: str) -> dict[str, Any]:
    """Return libpq's connection parameters of a URL.

    Raises:
        ConfigError: it is none. The message does not repeat it: it may hold a password.
    """
    found: dict[str, Any] | None = None
    with suppress(psycopg.Error):  # whose message repeats it, and would be the context of ours
        found = dict(conninfo_to_dict(url))
    if found is None:
        raise ConfigError("url is not one of Postgres, such as postgresql://user@host:5432/database")
    if "PGCONNECT_TIMEOUT" not in os.environ:
        found.setdefault("connect_timeout", CONNECT_SECONDS)
    found.setdefault("fallback_application_name", "embedonce")
    found["client_encoding"] = "UTF8"
    hosts_of(found)
    return found


def hosts_of(given: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the parameters for each host of a URL that names several, in the order in which to try them."""
    lists = {name: str(given[name]).split(",") for name in ("host", "hostaddr", "port") if given.get(name)}
    most = max(map(len, lists.values()), default=1)
    if most == 1:
        return [given]
    lists = {name: values * most if len(values) == 1 else values for name, values in lists.items()}
    if any(len(values) != most for values in lists.values()):
        raise ConfigError("url has not as many ports as hosts")
    hosts = [{**given, **{name: values[place] for name, values in lists.items()}} for place in range(most)]
    if given.get("load_balance_hosts") == "random":
        random.shuffle(hosts)
    if given.get("target_session_attrs") == "prefer-standby":  # of one host it means "any"
        return [{**host, "target_session_attrs": wanted} for wanted in ("standby", "any") for host in hosts]
    return list(hosts)


# Autocommit, and nothing prepared: behind a transaction pooler the next statement may go to another server process.
_OPTIONS: Mapping[str, Any] = {"autocommit": True, "prepare_threshold": None, "context": ADAPTERS}


class Connection(psycopg.Connection[Any]):
    """A connection whose every wait ends by the deadline of the call, however the bytes trickle in."""

    idle_since = 0.0

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.pid = os.getpid()

    def wait(self, gen: PQGen[T], *_: Any, **__: Any) -> T:
        """Run a step of the protocol.

        Raises:
            TierTimeout: the deadline has passed. The connection is of no use then.
        """
        left = time_left()
        return waiting.wait(_timed(gen), self.pgconn.socket, TICK if left is None else min(left, TICK))


def _timed(gen: PQGen[T]) -> PQGen[T]:
    """Do what ``gen`` does, and look at the deadline whenever something has come, and with each tick.

    The waiting itself is psycopg's, in C: an answer of 256 vectors comes in dozens of pieces.
    """
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            time_left()
            wanted = gen.send(ready)
    except StopIteration as done:
        result: T = done.value
        return result


class AsyncConnection(psycopg.AsyncConnection[Any]):
    """A connection whose wait ends at once when it is cancelled; psycopg's goes on until the server has answered."""

    idle_since = 0.0

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.pid = os.getpid()

    async def wait(self, gen: PQGen[T], *_: Any, **__: Any) -> T:
        """Run a step of the protocol."""
        return await waiting.wait_async(gen, self.pgconn.socket, interval=60.0)


AnyConnection = TypeVar("AnyConnection", Connection, AsyncConnection)


def is_quiet(connection: AnyConnection) -> bool:
    """Say whether an idle connection is as it was left: one that the server closed, or wrote to, can be read from."""
    if connection.closed:
        return False
    if not hasattr(select, "poll"):
        return not select.select([connection.pgconn.socket], [], [], 0)[0]
    poll = select.poll()
    poll.register(connection.pgconn.socket, select.POLLIN)
    return not poll.poll(0)


def has_rows(cursor: psycopg.Cursor[Any] | psycopg.AsyncCursor[Any]) -> bool:
    """Say whether a statement gave rows, be they none. (``description`` makes an object per column to say so.)"""
    return cursor.pgresult is not None and cursor.pgresult.nfields > 0


def is_sound(connection: AnyConnection, error: BaseException) -> bool:
    """Say whether a connection can be used after ``error``: the server refused a statement, and said so to the end."""
    return isinstance(error, psycopg.Error) and connection.pgconn.transaction_status == TransactionStatus.IDLE


def finish(connection: AnyConnection) -> None:
    """Close a connection. In a forked child it is the parent's, who would lose it: there it is only put aside."""
    if connection.pid == os.getpid():
        connection.pgconn.finish()
    else:
        _inherited.append(connection)


def finish_all(idle: list[Any]) -> None:
    """Close what is idle, and empty the list."""
    while idle:
        finish(idle.pop())


def abandon(connection: AnyConnection) -> None:
    """Close a connection, after asking the server, in a thread, to stop what it still does for it."""
    busy = connection.pid == os.getpid() and connection.pgconn.transaction_status == TransactionStatus.ACTIVE
    # libpq before 17 has only a way to ask that blocks the whole process for as long as the server does not answer.
    if not (busy and psycopg.capabilities.has_cancel_safe()) or not _in_thread(lambda: _cancel(connection)):
        finish(connection)


def _cancel(connection: AnyConnection) -> None:
    # A blocking client of the same session, whichever kind it is; kept until the session is closed.
    asking = psycopg.Connection(connection.pgconn)
    try:
        asking.cancel_safe(timeout=CANCEL_SECONDS)
    except psycopg.Error:
        log.debug("a server did not answer when it was asked to stop a query")
    finally:
        finish(connection)


def _in_thread(call: Callable[[], None]) -> bool:
    try:
        threading.Thread(target=call, name="embedonce-postgres", daemon=True).start()
    except RuntimeError:  # the interpreter is ending
        return False
    return True


def _keep(idle: list[Any], connection: AnyConnection) -> int:
    """Put a connection on top of the idle ones; close those that have been idle for too long and say how many."""
    now = connection.idle_since = time.monotonic()
    idle.append(connection)
    old = 0
    while idle[old].idle_since < now - IDLE_SECONDS:  # not the last one: that is this moment's
        old += 1
    stale = idle[:old]
    del idle[:old]
    finish_all(stale)
    return old


class _Attempt:
    """One connection being made."""

    done = False
    error: BaseException | None = None

    def __init__(self, hosts: int) -> None:
        self.left = hosts
        """Hosts that may still answer."""
        self.failed = threading.Event()
        """The host that was tried last has failed, or another has answered: nobody need wait for it."""


class Pool:
    """Lends connections to calls, the one used last first. As many are open as calls need, up to ``most``.

    A connection is made in a thread, because looking a name up knows no deadline. The call that wanted it
    leaves by its own; a connection that comes later is kept for the next one.
    """

    def __init__(self, given: Mapping[str, Any], most: int) -> None:
        self._parameters = given
        self._most = most
        self._closed = False
        self._idle: list[Connection] = []
        self.reset()
        _pools.add(self)
        weakref.finalize(self, finish_all, self._idle)

    def reset(self) -> None:
        """Start anew, as in a forked child: what is open is the parent's."""
        self._changed = threading.Condition()
        finish_all(self._idle)
        self._open = 0
        self._connecting = 0

    def take(self) -> Connection:
        """Return a connection that is this call's alone until :meth:`give` or :meth:`drop`.

        It waits for half of the time that the call has: with what is left after a connection that came late, no
        query would be done, and the connection be lost by that.

        Raises:
            TierBusy: all connections stayed in use.
            TierTimeout: none could be made in time.
            psycopg.Error: the server cannot be reached, or refuses.
        """
        left = time_left()
        patience = None if left is None else time.monotonic() + left / 2
        attempt: _Attempt | None = None
        with self._changed:
            while True:
                if self._closed:
                    raise CacheClosed(CLOSED)
                if (connection := self._pop()) is not None:
                    return connection
                if attempt is not None and attempt.error is not None:
                    raise attempt.error
                if (attempt is None or attempt.done) and self._open < self._most:
                    attempt = self._connect()
                else:
                    self._wait(patience)

    def give(self, connection: Connection) -> None:
        """Take a connection back for the next call."""
        with self._changed:
            if self._closed or connection.closed:
                self._lost(connection)
            else:
                self._open -= _keep(self._idle, connection)
            self._changed.notify()

    def drop(self, connection: Connection) -> None:
        """Take a connection back that no call may use any more."""
        abandon(connection)
        with self._changed:
            self._open -= 1
            self._changed.notify()

    def close(self) -> None:
        """Close what is idle, and later what comes back."""
        with self._changed:
            self._closed = True
            finish_all(self._idle)
            self._changed.notify_all()

    def _lost(self, connection: Connection) -> None:
        self._open -= 1
        finish(connection)

    def _pop(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if is_quiet(connection):
                return connection
            self._lost(connection)
        return None

    def _wait(self, patience: float | None) -> None:
        left = None if patience is None else patience - time.monotonic()
        if left is not None and left <= 0:
            raise TierTimeout(SLOW) if self._connecting else TierBusy(BUSY.format(self._most))
        self._changed.wait(left)

    def _connect(self) -> _Attempt:
        self._open += 1
        self._connecting += 1
        hosts = hosts_of(self._parameters)
        attempt = _Attempt(len(hosts))
        if not _in_thread(lambda: self._run(attempt, hosts)):
            for host in hosts:
                self._try(attempt, host)
        return attempt

    def _run(self, attempt: _Attempt, hosts: Sequence[Mapping[str, Any]]) -> None:
        """Try the hosts in turn, each in a thread, so that one that does not answer holds up none."""
        for host in hosts[:-1]:
            attempt.failed.clear()
            if not attempt.done and _in_thread(lambda host=host: self._try(attempt, host)):  # type: ignore[misc]
                attempt.failed.wait(NEXT_HOST_SECONDS)
        self._try(attempt, hosts[-1])

    def _try(self, attempt: _Attempt, host: Mapping[str, Any]) -> None:
        if attempt.done:
            return
        connection: Connection | None = None
        problem: BaseException | None = None
        try:
            connection = Connection.connect(**host, **_OPTIONS, cursor_factory=RawCursor)
        except psycopg.errors.ConnectionTimeout:
            problem = TierTimeout(SLOW)
        except BaseException as error:  # noqa: BLE001  (it reaches the call that wanted the connection)
            problem = error
        with self._changed:
            attempt.left -= 1
            attempt.failed.set()
            if attempt.done:  # another host was first
                if connection is not None:
                    finish(connection)
                return
            if connection is None and attempt.left:
                return
            attempt.done, attempt.error = True, problem
            self._connecting -= 1
            if connection is None:
                self._open -= 1
            elif self._closed:
                self._lost(connection)
            else:
                self._open -= _keep(self._idle, connection)
            self._changed.notify_all()


class AsyncPool:
    """The same for one event loop, with tasks for threads."""

    def __init__(self, given: Mapping[str, Any], most: int) -> None:
        self._parameters = given
        self._most = most
        self._closed = False
        self._idle: list[AsyncConnection] = []
        self._slots = asyncio.Semaphore(most)
        self._connecting: set[asyncio.Task[AsyncConnection]] = set()
        self._late: set[asyncio.Task[AsyncConnection]] = set()
        weakref.finalize(self, finish_all, self._idle)

    async def take(self) -> AsyncConnection:
        """Return a connection that is this call's alone until :meth:`give` or :meth:`drop`; raises as the pool's."""
        if self._closed:
            raise CacheClosed(CLOSED)
        left = time_left()
        has_slot = False
        try:
            async with asyncio.timeout(None if left is None else left / 2):
                has_slot = await self._slots.acquire()
                return self._pop() or await self._made()
        except TimeoutError:
            if has_slot or self._connecting:
                raise TierTimeout(SLOW) from None
            raise TierBusy(BUSY.format(self._most)) from None

    def _pop(self) -> AsyncConnection | None:
        while self._idle:
            connection = self._idle.pop()
            if is_quiet(connection):
                return connection
            finish(connection)
        return None

    async def _made(self) -> AsyncConnection:
        task = asyncio.create_task(self._connect())
        self._connecting.add(task)
        try:
            connection = await asyncio.shield(task)
        except asyncio.CancelledError:
            self._late.add(task)
            task.add_done_callback(self._came_late)
            raise
        except BaseException:
            self._connecting.discard(task)
            self._slots.release()
            raise
        self._connecting.discard(task)
        return connection

    async def _connect(self) -> AsyncConnection:
        """Try the hosts in turn; one that does not answer holds up none."""
        hosts = hosts_of(self._parameters)
        tasks: set[asyncio.Task[AsyncConnection]] = set()
        problem: BaseException = TierTimeout(SLOW)
        try:
            while hosts or tasks:
                if hosts:
                    tasks.add(asyncio.create_task(_connected(hosts.pop(0))))
                patience = NEXT_HOST_SECONDS if hosts else None
                done, tasks = await asyncio.wait(tasks, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if (error := task.exception()) is None:
                        tasks.update(done - {task})
                        return task.result()
                    problem = error
            raise problem
        finally:
            for task in tasks:
                task.add_done_callback(_too_late)
                task.cancel()

    def _came_late(self, task: asyncio.Task[AsyncConnection]) -> None:
        """Keep a connection whose call did not wait for it."""
        self._connecting.discard(task)
        self._late.discard(task)
        if task.cancelled() or task.exception() is not None:
            self._slots.release()
        else:
            self.give(task.result())

    def give(self, connection: AsyncConnection) -> None:
        """Take a connection back for the next call."""
        if self._closed or connection.closed:
            finish(connection)
        else:
            _keep(self._idle, connection)
        self._slots.release()

    def drop(self, connection: AsyncConnection) -> None:
        """Take a connection back that no call may use any more."""
        abandon(connection)
        self._slots.release()

    def close(self) -> None:
        """Close what is idle, and later what comes back."""
        self._closed = True
        finish_all(self._idle)
        for task in self._late:
            task.cancel()


async def _connected(host: Mapping[str, Any]) -> AsyncConnection:
    try:
        return await AsyncConnection.connect(**host, **_OPTIONS, cursor_factory=AsyncRawCursor)
    except psycopg.errors.ConnectionTimeout:
        raise TierTimeout(SLOW) from None


def _too_late(task: asyncio.Task[AsyncConnection]) -> None:
    """Close a connection to a host when another host was first."""
    if not task.cancelled() and task.exception() is None:
        finish(task.result())


_pools: WeakSet[Pool] = WeakSet()
_inherited: list[Any] = []
"""Connections of the parent's: closing them in the child, or letting them be collected, is not the child's to do."""


def _after_in_child() -> None:
    for pool in list(_pools):
        pool.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_in_child)
