"""Async connections to Redis. Each call ends by its deadline. A forked child does not use its parent's connections.

The connections are redis-py's, but redis-py's pools are not used; :mod:`.connections` gives the reasons.
"""

from __future__ import annotations

import asyncio
import os
import selectors
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar
from weakref import WeakSet

import redis
import redis.asyncio
from redis.exceptions import ConnectionError, InvalidResponse, ResponseError

from embedonce.contracts import time_left
from embedonce.errors import CacheClosed, LoopBusy, TierBusy
from embedonce.event_loops import async_deadline

from .connections import (
    BUSY,
    CLOSED,
    IDLE_SECONDS,
    READ_BYTES,
    UNEXPECTED_REPLY,
    Settings,
    check_role,
    get_trip_time,
    insert_errors,
)
from .errors import AsyncParser, explain_end, translate_error
from .plans import ROLE, Node, Plan, Reply, Trip

T = TypeVar("T")
CONNECT_GRACES = 20
"""How often connecting gets its time again because other tasks blocked the event loop."""


class AsyncConnection(redis.asyncio.Connection):
    """A connection that belongs to an event loop. If a call is cancelled, the call's I/O ends."""

    idle_since = 0.0

    def __init__(self, node: Node, settings: Settings) -> None:
        self._node = node
        self._tls = settings.tls
        self._has_answered = False
        super().__init__(
            host=node.address.host,
            port=node.address.port,
            parser_class=AsyncParser,
            **settings.make_options(node),
        )
        _connections.add(self)

    def _connection_arguments(self) -> Mapping[str, Any]:
        tls = {} if self._tls is None else {"ssl": self._tls, "server_hostname": self._node.address.host}
        return {**super()._connection_arguments(), **tls, "limit": READ_BYTES}

    async def _connect(self) -> None:
        if self._node.address.port:
            await super()._connect()
        else:
            path = self._node.address.host
            self._reader, self._writer = await asyncio.open_unix_connection(path, limit=READ_BYTES)

    async def open(self) -> None:
        """Connect and log in. If the node is expected to be a master, check that it is one."""
        await self.connect()
        if self._node.role == "master":
            (reply,) = await self.ask(Trip(self._node, [ROLE], lambda _: True))
            check_role(reply)

    async def ask(self, trip: Trip) -> list[Reply]:
        """Send the commands of a trip and return one reply per command; a reply can be an error."""
        await self.send_packed_command([trip.pack()])
        replies = []
        for _ in trip.commands:
            try:
                reply = await self.read_response()
            except ResponseError as error:
                reply = error
            except (ConnectionError, OSError) as error:
                explained = explain_end(error, has_answered=self._has_answered, tls=self._tls)
                if explained is None:
                    raise
                raise explained from error
            else:
                self._has_answered = True
                if not trip.check(reply):
                    raise InvalidResponse(UNEXPECTED_REPLY)
            replies.append(reply)
        return replies

    async def is_usable(self) -> bool:
        """Return whether the idle connection is usable.

        A readable connection is not usable. An idle connection becomes readable only if the server has closed the
        connection or sent an error.
        """
        try:
            # Also check the socket, because the event loop may not have read from it yet.
            return self.is_connected and not await self.can_read() and not _is_readable(self._writer)
        except (redis.RedisError, OSError):
            return False

    async def drop(self) -> None:
        """Close the connection, without waiting until its socket is closed."""
        await self.disconnect(nowait=True)


def _is_readable(writer: asyncio.StreamWriter | None) -> bool:
    if writer is None or writer.is_closing():
        return True
    with _Selector() as selector:
        selector.register(writer.get_extra_info("socket"), selectors.EVENT_READ)
        return bool(selector.select(0))


# For a single descriptor, poll and select are faster than making an epoll object.
_Selector: type[selectors.BaseSelector] = getattr(selectors, "PollSelector", selectors.SelectSelector)


class AsyncPool:
    """Lends connections to one node within one event loop, as :class:`.connections.Pool` does for threads."""

    def __init__(self, node: Node, settings: Settings) -> None:
        self._node = node
        self._settings = settings
        self._slots = asyncio.Semaphore(settings.max_connections)
        self._idle: list[AsyncConnection] = []
        self._late: set[asyncio.Task[AsyncConnection]] = set()
        """The tasks that connect although their call has ended."""
        self._closed = False

    async def ask(self, trip: Trip) -> list[Reply]:
        """Carry out one trip; if it fails, close its connection."""
        connection = await self._take()
        try:
            replies = await connection.ask(trip)
        except BaseException:
            await connection.drop()
            self._slots.release()
            raise
        await self._give(connection)
        return replies

    async def _take(self) -> AsyncConnection:
        """Return a connection that no other call uses until :meth:`_give`."""
        await self._acquire_slot()
        task: asyncio.Task[AsyncConnection] | None = None
        try:
            connection = await self._pop_idle()
            if connection is None:
                task = asyncio.create_task(self._connect())
                connection = await asyncio.shield(task)
            return connection
        except BaseException as error:
            if task is not None and isinstance(error, asyncio.CancelledError):
                self._late.add(task)
                task.add_done_callback(self._keep_late_connection)
            else:
                self._slots.release()
            raise

    async def _connect(self) -> AsyncConnection:
        connection = AsyncConnection(self._node, self._settings)
        try:
            # Connecting takes several turns of the loop. If other tasks block the loop so much that the call ends
            # first, the connection is kept for the next call, which could not make it in time either.
            async with async_deadline(time_left(), graces=CONNECT_GRACES):
                await connection.open()
        except BaseException:
            await connection.drop()
            raise
        return connection

    def _keep_late_connection(self, task: asyncio.Task[AsyncConnection]) -> None:
        self._late.discard(task)
        if not task.cancelled() and task.exception() is None and not self._closed:
            connection = task.result()
            connection.idle_since = time.monotonic()
            self._idle.append(connection)
        self._slots.release()

    async def _acquire_slot(self) -> None:
        if not self._slots.locked():
            await self._slots.acquire()
            return
        left = time_left()
        try:
            async with async_deadline(None if left is None else left / 2):
                await self._slots.acquire()
        except LoopBusy:
            raise
        except TimeoutError:
            raise TierBusy(BUSY.format(self._settings.max_connections)) from None

    async def _pop_idle(self) -> AsyncConnection | None:
        if self._closed:
            raise CacheClosed(CLOSED)
        oldest = time.monotonic() - IDLE_SECONDS
        while self._idle:
            connection = self._idle.pop()
            if connection.idle_since > oldest and await connection.is_usable():
                return connection
            await connection.drop()
        return None

    async def _give(self, connection: AsyncConnection) -> None:
        try:
            if self._closed:
                await connection.drop()
                return
            connection.idle_since = time.monotonic()
            self._idle.append(connection)
        finally:
            self._slots.release()

    async def close(self) -> None:
        """Close the idle connections now, and each connection in use when its call ends."""
        self._closed = True
        late = tuple(self._late)
        for task in late:
            task.cancel()
        # A task that has just made its connection is not cancelled any more.
        made = await asyncio.gather(*late, return_exceptions=True)
        idle, self._idle = self._idle, []
        for connection in (*idle, *(one for one in made if isinstance(one, AsyncConnection))):
            await connection.disconnect()


class AsyncClient:
    """Carries out plans on the running event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._pools: dict[Node, AsyncPool] = {}
        self._closed = False

    async def run(self, plan: Plan[T]) -> T:
        """Carry out a plan and return its result. This raises the same errors as :meth:`.connections.Client.run`."""
        async with async_deadline(time_left()):
            try:
                trips = next(plan)
                while True:
                    try:
                        replies = await self._exchange_trips(trips)
                    except BaseException as error:  # noqa: BLE001  (a plan also handles cancellation)
                        trips = plan.throw(translate_error(error))
                    else:
                        trips = plan.send(replies)
            except StopIteration as done:
                result: T = done.value
                return result

    async def close(self) -> None:
        """Close the idle connections now, and each connection in use when its call ends."""
        self._closed = True
        for pool in self._pools.values():
            await pool.close()

    async def _exchange_trips(self, trips: Sequence[Trip]) -> Sequence[Sequence[Reply]]:
        if len(trips) == 1:
            return [await self._get_pool(trips[0].node).ask(trips[0])]
        pools = [self._get_pool(trip.node) for trip in trips]

        async def ask(pool: AsyncPool, trip: Trip) -> list[Reply]:
            async with async_deadline(get_trip_time(len(trips))):
                return await pool.ask(trip)

        # Cancelling the gather cancels all trips and waits until they have closed their connections.
        results = await asyncio.gather(*map(ask, pools, trips), return_exceptions=True)
        errors: dict[int, Exception] = {}
        for index, result in enumerate(results):
            if isinstance(result, Exception):
                errors[index] = result
            elif isinstance(result, BaseException):
                raise result
        return insert_errors(trips, [[] if isinstance(r, BaseException) else r for r in results], errors)

    def _get_pool(self, node: Node) -> AsyncPool:
        if self._closed:
            raise CacheClosed(CLOSED)
        pool = self._pools.get(node)
        if pool is None:
            pool = self._pools[node] = AsyncPool(node, self._settings)
        return pool


_connections: WeakSet[AsyncConnection] = WeakSet()
_inherited: list[AsyncConnection] = []
"""Connections of the parent's event loops, kept alive in a forked child. If the garbage collector closed such a
connection in the child, its socket would be removed from the epoll that the child shares with its parent. The parent
would then wait for the socket forever."""


def _keep_inherited() -> None:
    _inherited.extend(_connections)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_inherited)
