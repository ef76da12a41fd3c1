"""Connections to Redis for an event loop: each call ends by its deadline, and no connection is shared with a child.

A connection is redis-py's; its pools are not, for the reasons that :mod:`.connections` gives.
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
from redis.exceptions import InvalidResponse, ResponseError

from embedonce.contracts import time_left
from embedonce.errors import CacheClosed, TierBusy

from .connections import (
    BUSY,
    CLOSED,
    IDLE_SECONDS,
    READ_BYTES,
    Settings,
    check_role,
    in_our_words,
    share_of_deadline,
    with_errors,
)
from .plans import ROLE, Node, Plan, Reply, Trip

T = TypeVar("T")


class AsyncConnection(redis.asyncio.Connection):
    """A connection of an event loop. Cancelling a call ends what it does."""

    idle_since = 0.0

    def __init__(self, node: Node, settings: Settings) -> None:
        self._node = node
        self._tls = settings.tls
        super().__init__(host=node.address.host, port=node.address.port, **settings.options(node))
        _made.add(self)

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
        """Connect, log in, and see that a master is one."""
        await self.connect()
        if self._node.role == "master":
            (reply,) = await self.ask(Trip(self._node, [ROLE], lambda _: True))
            check_role(reply)

    async def ask(self, trip: Trip) -> list[Reply]:
        """Send the commands of a trip, and return one reply per command; error replies are among them."""
        await self.send_packed_command([trip.packed()])
        replies = []
        for _ in trip.commands:
            try:
                reply = await self.read_response()
            except ResponseError as error:
                reply = error
            else:
                if not trip.check(reply):
                    raise InvalidResponse("a reply is not of the kind that was asked for")
            replies.append(reply)
        return replies

    async def is_quiet(self) -> bool:
        """Say whether it is as it was left: one that the server closed, or wrote to, can be read from."""
        try:
            # The socket as well: the loop may not have looked at it since.
            return self.is_connected and not await self.can_read() and not _readable(self._writer)
        except (redis.RedisError, OSError):
            return False

    async def drop(self) -> None:
        """Close it at once: nothing that comes later is read."""
        await self.disconnect(nowait=True)


def _readable(writer: asyncio.StreamWriter | None) -> bool:
    if writer is None or writer.is_closing():
        return True
    with _Selector() as selector:
        selector.register(writer.get_extra_info("socket"), selectors.EVENT_READ)
        return bool(selector.select(0))


# One descriptor, so poll or select cost less than making an epoll.
_Selector: type[selectors.BaseSelector] = getattr(selectors, "PollSelector", selectors.SelectSelector)


class AsyncPool:
    """The same as :class:`Pool` for one event loop."""

    def __init__(self, node: Node, settings: Settings) -> None:
        self._node = node
        self._settings = settings
        self._slots = asyncio.Semaphore(settings.most)
        self._idle: list[AsyncConnection] = []
        self._closed = False

    async def ask(self, trip: Trip) -> list[Reply]:
        """Carry out one trip; a connection that did not come to its end is dropped."""
        await self._slot()
        try:
            connection = await self._pop() or AsyncConnection(self._node, self._settings)
            try:
                if not connection.is_connected:
                    await connection.open()
                replies = await connection.ask(trip)
            except BaseException:
                await connection.drop()
                raise
            await self._keep(connection)
            return replies
        finally:
            self._slots.release()

    async def _slot(self) -> None:
        if not self._slots.locked():
            await self._slots.acquire()
            return
        left = time_left()
        try:
            async with asyncio.timeout(None if left is None else left / 2):
                await self._slots.acquire()
        except TimeoutError:
            raise TierBusy(BUSY.format(self._settings.most)) from None

    async def _pop(self) -> AsyncConnection | None:
        if self._closed:
            raise CacheClosed(CLOSED)
        oldest = time.monotonic() - IDLE_SECONDS
        while self._idle:
            connection = self._idle.pop()
            if connection.idle_since > oldest and await connection.is_quiet():
                return connection
            await connection.drop()
        return None

    async def _keep(self, connection: AsyncConnection) -> None:
        if self._closed:
            await connection.drop()
            return
        connection.idle_since = time.monotonic()
        self._idle.append(connection)

    async def close(self) -> None:
        """Close what is idle, and later what comes back."""
        self._closed = True
        idle, self._idle = self._idle, []
        for connection in idle:
            await connection.disconnect()


class AsyncClient:
    """Carries out plans on the running event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._pools: dict[Node, AsyncPool] = {}
        self._closed = False

    async def run(self, plan: Plan[T]) -> T:
        """Carry a plan out and return its result; raises as :meth:`Client.run`."""
        async with asyncio.timeout(time_left()):
            try:
                trips = next(plan)
                while True:
                    try:
                        replies = await self._exchange(trips)
                    except BaseException as error:  # noqa: BLE001  (cancelled as well: the plan takes note of it)
                        trips = plan.throw(in_our_words(error))
                    else:
                        trips = plan.send(replies)
            except StopIteration as done:
                result: T = done.value
                return result

    async def close(self) -> None:
        """Close every connection, those in use when their call ends."""
        self._closed = True
        for pool in self._pools.values():
            await pool.close()

    async def _exchange(self, trips: Sequence[Trip]) -> Sequence[Sequence[Reply]]:
        if len(trips) == 1:
            return [await self._pool(trips[0].node).ask(trips[0])]
        pools = [self._pool(trip.node) for trip in trips]

        async def ask(pool: AsyncPool, trip: Trip) -> list[Reply]:
            async with asyncio.timeout(share_of_deadline(len(trips))):
                return await pool.ask(trip)

        # Cancelling this cancels all of them, and waits until they have dropped their connections.
        results = await asyncio.gather(*map(ask, pools, trips), return_exceptions=True)
        errors: dict[int, Exception] = {}
        for index, result in enumerate(results):
            if isinstance(result, Exception):
                errors[index] = result
            elif isinstance(result, BaseException):
                raise result
        return with_errors(trips, [[] if isinstance(r, BaseException) else r for r in results], errors)

    def _pool(self, node: Node) -> AsyncPool:
        if self._closed:
            raise CacheClosed(CLOSED)
        pool = self._pools.get(node)
        if pool is None:
            pool = self._pools[node] = AsyncPool(node, self._settings)
        return pool


_made: WeakSet[AsyncConnection] = WeakSet()
_inherited: list[AsyncConnection] = []
"""Connections of the parent's event loops. Collecting one in the child would take it out of the epoll that the
child shares with its parent, who would wait for ever."""


def _after_in_child() -> None:
    _inherited.extend(_made)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_in_child)
