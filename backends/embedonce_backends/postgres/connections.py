"""Connections to Postgres. Each call ends by its deadline. A forked child does not use its parent's connections.

This module has two small pools of its own, because psycopg's pool is not suitable. psycopg's pool connects in threads
that have no deadline and do not exist in a forked child. It also raises the same ``PoolTimeout`` for a server that is
down and for an exhausted pool.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar
from weakref import WeakSet

import psycopg
from psycopg.adapt import AdaptersMap, Transformer
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import TransactionStatus
from psycopg.types.numeric import Int8BinaryLoader
from psycopg.types.string import TextBinaryLoader

from embedonce.contracts import time_left
from embedonce.errors import CacheClosed, ConfigError, LoopBusy, TierBusy, TierTimeout
from embedonce.event_loops import async_deadline
from embedonce_backends._sockets import SocketWaiter

from .errors import name_connection_error

log = logging.getLogger("embedonce.postgres")

CLOSED = "the postgres backend is closed"
SLOW = "could not connect to Postgres in time"
BUSY = "all connections to Postgres are in use (max_connections = {})"

CONNECT_SECONDS = 10
"""Time limit in seconds for one connection attempt, unless the URL has a ``connect_timeout``."""
CANCEL_SECONDS = 2.0
"""Time limit in seconds for the request to cancel a query whose call has ended."""
NEXT_HOST_SECONDS = 0.04
"""Seconds without an answer after which the next host of the URL is tried in parallel."""
IDLE_SECONDS = 300.0
"""Seconds after which an idle connection is closed."""


OTHER_OPTIONS: Mapping[str, str] = {
    "ssl": "write sslmode=require, or sslmode=verify-full with sslrootcert",
    "schema|search_path|currentSchema": "set schema in the table of the tier",
    "(connection_limit|pool_?size|max_?pool_?size|pool_max_conns|max_overflow|maxPoolSize)": (
        "set max_connections in the table of the tier"
    ),
    "(socket_|pool_|command_|statement_|query_)?timeout|socketTimeout|connectTimeout|loginTimeout|pool_timeout": (
        "set timeout in the table of the tier"
    ),
    "pgbouncer|(prepared_)?statement_cache\\w*|prepare_?threshold|autocommit|server_settings|pool_\\w+|charset": (
        "remove it; embedonce sets this by itself"
    ),
}
"""Patterns of options that URLs for other clients of Postgres have, and what to do instead."""


def parse_url(url: str) -> dict[str, Any]:
    """Return libpq's connection parameters for a URL.

    Raises:
        ConfigError: the URL is invalid. The message does not quote the URL, because it may contain a password.
    """
    found: dict[str, Any] | None = None
    # psycopg's error quotes the URL. So psycopg's error must not become the context of the ConfigError below.
    with suppress(psycopg.Error):
        found = dict(conninfo_to_dict(url))
    if found is None:
        raise ConfigError(_explain_url(url))
    if "PGCONNECT_TIMEOUT" not in os.environ:
        found.setdefault("connect_timeout", CONNECT_SECONDS)
    found.setdefault("fallback_application_name", "embedonce")
    found["client_encoding"] = "UTF8"
    split_hosts(found)
    return found


def _explain_url(url: str) -> str:
    """Return a message for a URL that libpq refuses. It repeats only well-known words of the URL."""
    match = re.match(r"(postgres|postgresql)\+(psycopg2?|psycopg_async|asyncpg|pg8000|psycopg2cffi)://", url.strip())
    if match is not None:
        return f"url must begin with postgresql://, without +{match[2]}"
    for name in re.findall(r"[?&]([A-Za-z_]+)=", url):
        for pattern, advice in OTHER_OPTIONS.items():
            if re.fullmatch(pattern, name, re.IGNORECASE):
                return f"url has the option {name}, which libpq does not have: {advice}"
    return (
        "url is not a Postgres URL, or has an option that libpq does not have; expected a URL such as "
        "postgresql://user@host:5432/database"
    )


def split_hosts(parameters: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the connection parameters of each host of a URL, in the order in which to try the hosts.

    Raises:
        ConfigError: the URL lists several hosts and several ports, but not one port per host.
    """
    lists = {name: str(parameters[name]).split(",") for name in ("host", "hostaddr", "port") if parameters.get(name)}
    count = max(map(len, lists.values()), default=1)
    if count == 1:
        return [parameters]
    lists = {name: values * count if len(values) == 1 else values for name, values in lists.items()}
    if any(len(values) != count for values in lists.values()):
        raise ConfigError("url must have one port, or as many ports as hosts")
    hosts = [{**parameters, **{name: values[index] for name, values in lists.items()}} for index in range(count)]
    if parameters.get("load_balance_hosts") == "random":
        random.shuffle(hosts)
    # Each host is tried alone, and for a single host, libpq treats "prefer-standby" as "any". So try every host as a
    # standby first.
    if parameters.get("target_session_attrs") == "prefer-standby":
        return [{**host, "target_session_attrs": wanted} for wanted in ("standby", "any") for host in hosts]
    return list(hosts)


# Autocommit is on and statements are not prepared, because a transaction pooler may send the next statement to another
# session.
_OPTIONS: Mapping[str, Any] = {"autocommit": True, "prepare_threshold": None}


LOADERS = AdaptersMap(psycopg.adapters)
"""How the values of a row become Python objects."""
LOADERS.register_loader("json", TextBinaryLoader)  # the text, which is parsed later
LOADERS.register_loader("timestamptz", Int8BinaryLoader)  # microseconds since the year 2000


class Connection(psycopg.Connection[Any]):
    """A connection for blocking calls."""

    idle_since = 0.0

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.pid = os.getpid()
        self.waiter = SocketWaiter(self.pgconn.socket)
        self.transformer = Transformer(LOADERS)


class AsyncConnection(psycopg.AsyncConnection[Any]):
    """A connection that belongs to an event loop."""

    idle_since = 0.0

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.pid = os.getpid()
        self.waiter = SocketWaiter(self.pgconn.socket)
        self.transformer = Transformer(LOADERS)


AnyConnection = TypeVar("AnyConnection", Connection, AsyncConnection)


def is_usable(connection: AnyConnection) -> bool:
    """Return whether an idle connection is usable.

    A readable connection is not usable. An idle connection becomes readable only if the server has closed the
    connection or sent an error.
    """
    return not connection.closed and not connection.waiter.is_readable()


def is_reusable(connection: AnyConnection, error: BaseException) -> bool:
    """Return whether the server's error reply was read completely, so that the connection can be used again."""
    return isinstance(error, psycopg.Error) and connection.pgconn.transaction_status == TransactionStatus.IDLE


def close_connection(connection: AnyConnection) -> None:
    """Close a connection. A forked child only puts it aside, because closing it would end the parent's session."""
    if connection.pid == os.getpid():
        connection.pgconn.finish()
    else:
        _inherited.append(connection)


def close_all(idle: list[Any]) -> None:
    """Close the idle connections and empty the list."""
    while idle:
        close_connection(idle.pop())


def cancel_and_close(connection: AnyConnection) -> None:
    """Close a connection; if its query is still running, a thread first asks the server to cancel the query."""
    is_busy = connection.pid == os.getpid() and connection.pgconn.transaction_status == TransactionStatus.ACTIVE
    # With libpq before 17, a request would block the whole process until the server answers, so no request is sent.
    if not (is_busy and psycopg.capabilities.has_cancel_safe()) or not _start_thread(lambda: _cancel(connection)):
        close_connection(connection)


def _cancel(connection: AnyConnection) -> None:
    # This thread cannot await the cancel_safe of an async connection. So make a blocking connection that uses the same
    # session.
    blocking = psycopg.Connection(connection.pgconn)
    try:
        blocking.cancel_safe(timeout=CANCEL_SECONDS)
    except psycopg.Error:
        log.debug("the server did not answer a request to cancel a query")
    finally:
        close_connection(connection)


def _start_thread(call: Callable[[], None]) -> bool:
    """Start a thread that makes the call; return False if the interpreter is shutting down."""
    try:
        threading.Thread(target=call, name="embedonce-postgres", daemon=True).start()
    except RuntimeError:
        return False
    return True


def _keep_idle(idle: list[Any], connection: AnyConnection) -> int:
    """Add an idle connection, close connections that have been idle too long, and return how many were closed."""
    now = connection.idle_since = time.monotonic()
    idle.append(connection)
    expired = 0
    while idle[expired].idle_since < now - IDLE_SECONDS:  # stops at `connection`, whose idle_since is now
        expired += 1
    stale = idle[:expired]
    del idle[:expired]
    close_all(stale)
    return expired


class _Attempt:
    """One attempt to connect. It succeeds with the first host that answers."""

    is_done = False
    error: BaseException | None = None

    def __init__(self, hosts: int) -> None:
        self.hosts_left = hosts
        """Number of hosts that may still answer."""
        self.next_host_due = threading.Event()
        """Event that is set when a host has failed or answered. It ends the wait between two hosts.

        If a host failed, the next host is tried immediately. If a host answered, no other host is tried.
        """


class Pool:
    """Lends at most ``max_connections`` connections to calls, the most recently used first.

    Connections are made in threads, because a name lookup has no timeout. If the call that needs a connection reaches
    its deadline first, the connection is kept for the next call.
    """

    def __init__(self, parameters: Mapping[str, Any], max_connections: int) -> None:
        self._parameters = parameters
        self._max_connections = max_connections
        self._closed = False
        self._idle: list[Connection] = []
        self.reset()
        _pools.add(self)
        weakref.finalize(self, close_all, self._idle)

    def reset(self) -> None:
        """Forget all connections. A forked child calls this, because the open connections belong to its parent."""
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._waiting_count = 0
        close_all(self._idle)
        self._open_count = 0
        self._connecting_count = 0

    def take(self) -> Connection:
        """Return a connection that no other call uses until :meth:`give` or :meth:`drop`.

        This waits for at most half of the call's remaining time, so that enough time is left for the query. If the
        query timed out, its new connection would have to be closed.

        Raises:
            TierBusy: all connections stayed in use during the wait.
            TierTimeout: no connection was made in time.
            psycopg.Error: the server cannot be reached, or refuses the connection.
        """
        connection = self._pop_idle(is_first=True)
        if connection is not None:
            return connection
        with self._lock:
            return self._wait_for_connection()

    def _wait_for_connection(self) -> Connection:
        left = time_left()
        end = None if left is None else time.monotonic() + left / 2
        attempt: _Attempt | None = None
        is_first = True
        while True:
            if self._closed:
                raise CacheClosed(CLOSED)
            if (connection := self._pop_idle(is_first=is_first)) is not None:
                return connection
            is_first = False
            if attempt is not None and attempt.error is not None:
                raise attempt.error
            if (attempt is None or attempt.is_done) and self._open_count < self._max_connections:
                attempt = self._start_attempt()
            else:
                self._wait_for_change(end)

    def give(self, connection: Connection) -> None:
        """Take back a connection whose call has ended, and keep it for later calls."""
        with self._lock:
            if self._closed or connection.closed:
                self._discard(connection)
            else:
                self._open_count -= _keep_idle(self._idle, connection)
            if self._waiting_count:
                self._changed.notify()

    def drop(self, connection: Connection) -> None:
        """Take back a connection that must not be used again, and close it."""
        cancel_and_close(connection)
        with self._lock:
            self._open_count -= 1
            self._changed.notify()

    def close(self) -> None:
        """Close the idle connections now, and each connection in use when it is given back."""
        with self._lock:
            self._closed = True
            close_all(self._idle)
            self._changed.notify_all()

    def _discard(self, connection: Connection) -> None:
        self._open_count -= 1
        close_connection(connection)

    def _pop_idle(self, *, is_first: bool = False) -> Connection | None:
        """Return a usable idle connection.

        On its ``is_first`` look, a call leaves a connection to each call that waits. A thread that gives a connection
        back and takes one again would otherwise be faster than the threads that it has woken, time after time.
        """
        while True:
            with self._lock:
                if len(self._idle) <= (self._waiting_count if is_first else 0):
                    return None
                connection = self._idle.pop()
            # The check lets other threads run. If this thread held the lock meanwhile, they would wait for it.
            if is_usable(connection):
                return connection
            with self._lock:
                self._discard(connection)

    def _wait_for_change(self, end: float | None) -> None:
        left = None if end is None else end - time.monotonic()
        if left is not None and left <= 0:
            raise TierTimeout(SLOW) if self._connecting_count else TierBusy(BUSY.format(self._max_connections))
        self._waiting_count += 1
        try:
            self._changed.wait(left)
        except BaseException:  # Ctrl-C, after this call may have been woken instead of another one
            self._changed.notify()
            raise
        finally:
            self._waiting_count -= 1

    def _start_attempt(self) -> _Attempt:
        self._open_count += 1
        self._connecting_count += 1
        hosts = split_hosts(self._parameters)
        attempt = _Attempt(len(hosts))
        if not _start_thread(lambda: self._try_hosts(attempt, hosts)):
            for host in hosts:
                self._try_host(attempt, host)
        return attempt

    def _try_hosts(self, attempt: _Attempt, hosts: Sequence[Mapping[str, Any]]) -> None:
        """Try the hosts in order, each in a thread, so that a host without an answer does not delay the next host."""
        for host in hosts[:-1]:
            attempt.next_host_due.clear()
            if not attempt.is_done and _start_thread(lambda host=host: self._try_host(attempt, host)):  # type: ignore[misc]
                attempt.next_host_due.wait(NEXT_HOST_SECONDS)
        self._try_host(attempt, hosts[-1])

    def _try_host(self, attempt: _Attempt, host: Mapping[str, Any]) -> None:
        if attempt.is_done:
            return
        connection: Connection | None = None
        problem: BaseException | None = None
        try:
            connection = Connection.connect(**host, **_OPTIONS)
        except psycopg.errors.ConnectionTimeout:
            problem = TierTimeout(SLOW)
        except BaseException as error:  # noqa: BLE001  (the call that waits for the connection raises it)
            problem = name_connection_error(error)
        with self._lock:
            attempt.hosts_left -= 1
            attempt.next_host_due.set()
            if attempt.is_done:  # another host answered first
                if connection is not None:
                    close_connection(connection)
                return
            if connection is None and attempt.hosts_left:
                return
            attempt.is_done, attempt.error = True, problem
            self._connecting_count -= 1
            if connection is None:
                self._open_count -= 1
            elif self._closed:
                self._discard(connection)
            else:
                self._open_count -= _keep_idle(self._idle, connection)
            self._changed.notify_all()


class AsyncPool:
    """Lends connections within one event loop, as :class:`Pool` does for threads. Connections are made in tasks."""

    def __init__(self, parameters: Mapping[str, Any], max_connections: int) -> None:
        self._parameters = parameters
        self._max_connections = max_connections
        self._closed = False
        self._idle: list[AsyncConnection] = []
        self._slots = asyncio.Semaphore(max_connections)
        self._connecting: set[asyncio.Task[AsyncConnection]] = set()
        """The asyncio tasks that are making a connection."""
        self._late: set[asyncio.Task[AsyncConnection]] = set()
        """The tasks in ``_connecting`` whose call ended before the connection was made."""
        weakref.finalize(self, close_all, self._idle)

    async def take(self) -> AsyncConnection:
        """Return a connection that no other call uses until :meth:`give` or :meth:`drop`.

        This waits for at most half of the call's remaining time, and raises the same errors as :meth:`Pool.take`.
        """
        if self._closed:
            raise CacheClosed(CLOSED)
        left = time_left()
        has_slot = False
        if not self._slots.locked():
            has_slot = await self._slots.acquire()  # does not wait
            connection = self._pop_idle()
            if connection is not None:
                return connection
        try:
            async with async_deadline(None if left is None else left / 2):
                if not has_slot:
                    has_slot = await self._slots.acquire()
                return self._pop_idle() or await self._make_connection()
        except LoopBusy:
            raise
        except TimeoutError:
            if has_slot or self._connecting:
                raise TierTimeout(SLOW) from None
            raise TierBusy(BUSY.format(self._max_connections)) from None

    def _pop_idle(self) -> AsyncConnection | None:
        while self._idle:
            connection = self._idle.pop()
            if is_usable(connection):
                return connection
            close_connection(connection)
        return None

    async def _make_connection(self) -> AsyncConnection:
        task = asyncio.create_task(self._try_hosts())
        self._connecting.add(task)
        try:
            connection = await asyncio.shield(task)
        except asyncio.CancelledError:
            self._late.add(task)
            task.add_done_callback(self._keep_late_connection)
            raise
        except BaseException:
            self._connecting.discard(task)
            self._slots.release()
            raise
        self._connecting.discard(task)
        return connection

    async def _try_hosts(self) -> AsyncConnection:
        """Try the hosts in order; a host that does not answer does not delay the next host."""
        hosts = split_hosts(self._parameters)
        tasks: set[asyncio.Task[AsyncConnection]] = set()
        problem: BaseException = TierTimeout(SLOW)
        try:
            while hosts or tasks:
                if hosts:
                    tasks.add(asyncio.create_task(_connect(hosts.pop(0))))
                timeout = NEXT_HOST_SECONDS if hosts else None
                done, tasks = await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if (error := task.exception()) is None:
                        tasks.update(done - {task})
                        return task.result()
                    problem = error
            raise problem
        finally:
            for task in tasks:
                task.add_done_callback(_close_late_connection)
                task.cancel()

    def _keep_late_connection(self, task: asyncio.Task[AsyncConnection]) -> None:
        """Keep the connection for the next call, because the call that it was made for has ended."""
        self._connecting.discard(task)
        self._late.discard(task)
        if task.cancelled() or task.exception() is not None:
            self._slots.release()
        else:
            self.give(task.result())

    def give(self, connection: AsyncConnection) -> None:
        """Take back a connection whose call has ended, and keep it for later calls."""
        if self._closed or connection.closed:
            close_connection(connection)
        else:
            _keep_idle(self._idle, connection)
        self._slots.release()

    def drop(self, connection: AsyncConnection) -> None:
        """Take back a connection that must not be used again, and close it."""
        cancel_and_close(connection)
        self._slots.release()

    def close(self) -> None:
        """Close the idle connections now, and each connection in use when it is given back."""
        self._closed = True
        close_all(self._idle)
        for task in self._late:
            task.cancel()


async def _connect(host: Mapping[str, Any]) -> AsyncConnection:
    try:
        return await AsyncConnection.connect(**host, **_OPTIONS)
    except psycopg.errors.ConnectionTimeout:
        raise TierTimeout(SLOW) from None
    except psycopg.OperationalError as error:
        name_connection_error(error)
        raise


def _close_late_connection(task: asyncio.Task[AsyncConnection]) -> None:
    """Close the connection of a task that finished after another host had answered."""
    if not task.cancelled() and task.exception() is None:
        close_connection(task.result())


_pools: WeakSet[Pool] = WeakSet()
_inherited: list[Any] = []
"""The parent's connections in a forked child. They are kept alive, so that the garbage collector does not end the
parent's sessions."""


def _reset_after_fork() -> None:
    for pool in list(_pools):
        pool.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)
