"""Connections to Redis: each call ends by its deadline, and no connection is shared with a forked child.

A connection is redis-py's. Its pools are not: they know no deadline, and nothing tells an exhausted one from a
server that is down.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet

import redis
import redis.asyncio
from redis.connection import DefaultParser
from redis.exceptions import ConnectionError, InvalidResponse, ResponseError

from embedonce.contracts import deadline, time_left
from embedonce.errors import CacheClosed, TierBusy, TierTimeout
from embedonce_backends._pages import page

from .plans import ROLE, Node, Plan, Reply, Trip, is_master
from .url import Address, Place

if TYPE_CHECKING:
    from ssl import SSLContext

T = TypeVar("T")

CLOSED = "the redis backend is closed"
BUSY = "all connections to Redis are in use (max_connections = {})"
SLOW = "Redis did not answer in time"

IDLE_SECONDS = 300.0
"""A connection that was not used for so long is not used again: load balancers forget it without a word."""
SHARE = 0.75
"""Of the time that is left, what one of several nodes may take."""
READ_BYTES = 2**18
"""Read at once. A batch of 256 frames of 384 dimensions has 400 kB."""


class Settings:
    """What every connection is made with."""

    def __init__(
        self,
        place: Place,
        *,
        username: str | None,
        password: str | None,
        sentinel_username: str | None,
        sentinel_password: str | None,
        tls: SSLContext | None,
        most: int,
    ) -> None:
        self.db = place.db
        self.tls = tls
        self.most = most
        self._login = {"username": username, "password": password}
        self._sentinel_login = {"username": sentinel_username, "password": sentinel_password}

    def options(self, node: Node) -> dict[str, Any]:
        """Return redis-py's options for a connection to a node."""
        sentinel = node.role == "sentinel"
        return {
            **(self._sentinel_login if sentinel else self._login),
            "db": 0 if sentinel else self.db,
            # Deadlines are of the whole call, and here: see _Parser. Retries are the engine's.
            "socket_timeout": None,
            "socket_connect_timeout": None,
            # RESP2 needs no HELLO, and values look the same. CLIENT SETINFO would be two more trips.
            "protocol": 2,
            "driver_info": None,
            "socket_read_size": READ_BYTES,
        }


# --- one connection, blocking ---------------------------------------------------------------------


class _Parser(DefaultParser):  # type: ignore[misc, valid-type]
    """Reads until the call's deadline: a socket's own timeout starts again with every byte."""

    def read_from_socket(self, *args: Any, **kwargs: Any) -> bool:
        if self._sock is not None:
            self._sock.settimeout(time_left())
        read: bool = super().read_from_socket(*args, **kwargs)
        return read


class Connection(redis.Connection):
    """A blocking connection whose connecting, sending and reading end by the deadline of the call."""

    idle_since = 0.0

    def __init__(self, node: Node, settings: Settings) -> None:
        self._node = node
        self._tls = settings.tls
        super().__init__(
            host=node.address.host,
            port=node.address.port,
            parser_class=_Parser,
            **settings.options(node),
        )

    def _connect(self) -> socket.socket:
        problem: OSError = OSError("the name of the host stands for no address")
        for family, target in _resolved(self._node.address):
            try:
                return self._connected(family, target)
            except TimeoutError:
                raise
            except OSError as error:
                problem = error
        raise problem

    def _connected(self, family: int, target: Any) -> socket.socket:
        found = socket.socket(family, socket.SOCK_STREAM)
        try:
            if family != socket.AF_UNIX:
                found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            found.settimeout(time_left())
            found.connect(target)
            if self._tls is not None:
                found.settimeout(time_left())
                found = self._tls.wrap_socket(found, server_hostname=self._node.address.host)
        except BaseException:
            found.close()
            raise
        return found

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        """Send pieces of bytes; redis-py's own handshake does so, too."""
        found: socket.socket | None = self._sock
        if found is not None:
            found.settimeout(time_left())
        super().send_packed_command(command, check_health)

    def send(self, trip: Trip) -> None:
        """Send the commands of a trip, in one piece: the time that it takes is then counted as a whole."""
        self.send_packed_command([trip.packed()])

    def read(self, trip: Trip) -> list[Reply]:
        """Return one reply per command; error replies are among them. After anything that is raised, drop it."""
        replies = []
        # redis-py's own read_response adds what is not needed here, for more than the reply itself costs.
        read, check = self._parser.read_response, trip.check
        for _ in trip.commands:
            reply = read()
            if not check(reply) and not isinstance(reply, ResponseError):
                raise InvalidResponse("a reply is not of the kind that was asked for")
            replies.append(reply)
        return replies

    def open(self) -> None:
        """Connect, log in, and see that a master is one."""
        self.connect()
        if self._node.role == "master":
            (reply,) = self.ask(Trip(self._node, [ROLE], lambda _: True))
            check_role(reply)

    def begin(self, trip: Trip) -> None:
        """Connect where that is to be done, and send the commands of a trip."""
        if not self.is_connected:
            self.open()
        self.send(trip)

    def ask(self, trip: Trip) -> list[Reply]:
        """Send the commands of a trip and read the replies."""
        self.send(trip)
        return self.read(trip)

    def is_quiet(self) -> bool:
        """Say whether it is as it was left: one that the server closed, or wrote to, can be read from."""
        try:
            return not self.can_read(0)
        except (redis.RedisError, OSError):
            return False


def check_role(reply: Reply) -> None:
    if not is_master(reply):
        raise ConnectionError("the server that the sentinels named is not the master any more")


def _resolved(address: Address) -> Sequence[tuple[int, Any]]:
    """Return family and target of each address that a host's name stands for."""
    if not address.port:
        return [(socket.AF_UNIX, address.host)]
    for family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError):
            socket.inet_pton(family, address.host)
            return [(family, (address.host, address.port))]
    found = _within_deadline(
        lambda: socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM), "a host's name"
    )
    return [(family, target) for family, _, _, _, target in found]


def _within_deadline(call: Callable[[], T], what: str) -> T:
    """Return ``call()``, made in a thread that is left behind when the deadline passes: name servers know none."""
    left = time_left()
    if left is None:
        return call()
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001  (raised where the result is wanted)
            errors.append(error)

    thread = threading.Thread(target=run, name="embedonce-redis", daemon=True)
    thread.start()
    thread.join(left)
    if errors:
        raise errors[0]
    if not results:
        raise TierTimeout(f"{what} was not looked up in time")
    return results[0]


# --- pools, blocking --------------------------------------------------------------------------------


class Pool:
    """Lends connections to one node, the one used last first; up to ``most`` at once."""

    def __init__(self, node: Node, settings: Settings) -> None:
        self._node = node
        self._settings = settings
        self._idle: list[Connection] = []
        self._closed = False
        self.reset()

    def reset(self) -> None:
        """Start anew, as in a forked child: what is open is the parent's."""
        self._changed = threading.Condition()
        self._idle.clear()  # redis-py closes the child's descriptor alone, without a word to the server
        self._lent = 0

    def take(self) -> Connection:
        """Return a connection that is this call's alone until :meth:`give`.

        Raises:
            TierBusy: all connections stayed in use for half of the time that the call has.
        """
        with self._changed:
            if self._lent >= self._settings.most and not self._closed:
                self._wait()
            if self._closed:
                raise CacheClosed(CLOSED)
            self._lent += 1
            idle = self._pop()
        return Connection(self._node, self._settings) if idle is None else idle

    def _wait(self) -> None:
        left = time_left()
        patience = None if left is None else left / 2
        if not self._changed.wait_for(lambda: self._closed or self._lent < self._settings.most, patience):
            raise TierBusy(BUSY.format(self._settings.most))

    def _pop(self) -> Connection | None:
        oldest = time.monotonic() - IDLE_SECONDS
        while self._idle:
            connection = self._idle.pop()
            if connection.idle_since > oldest and connection.is_quiet():
                return connection
            connection.disconnect()
        return None

    def give(self, connection: Connection, *, sound: bool) -> None:
        """Take a connection back; it is closed unless it is ``sound``."""
        if not sound:
            connection.disconnect()
        connection.idle_since = time.monotonic()
        with self._changed:
            self._lent -= 1
            if sound and not self._closed:
                self._idle.append(connection)
            self._changed.notify()
        if self._closed:
            connection.disconnect()

    def close(self) -> None:
        """Close what is idle, and later what comes back."""
        with self._changed:
            self._closed = True
            idle, self._idle = self._idle, []
            self._changed.notify_all()
        for connection in idle:
            connection.disconnect()


class Client:
    """Carries out plans, blocking."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._pools: dict[Node, Pool] = {}
        self._closed = False
        self.reset()
        _clients.add(self)
        weakref.finalize(self, _close_all, self._pools)

    def reset(self) -> None:
        """Start anew, as in a forked child."""
        self._lock = threading.Lock()
        for pool in self._pools.values():
            pool.reset()

    def run(self, plan: Plan[T]) -> T:
        """Carry a plan out and return its result.

        Raises:
            TierTimeout: the deadline has passed.
            TierBusy: no connection was free.
            redis.RedisError: what the server, or redis-py, has to say.
        """
        try:
            trips = next(plan)
            while True:
                try:
                    replies = self._exchange(trips)
                except BaseException as error:  # noqa: BLE001  (the plan knows what it means)
                    trips = plan.throw(in_our_words(error))
                else:
                    trips = plan.send(replies)
        except StopIteration as done:
            result: T = done.value
            return result

    @contextmanager
    def alone(self, node: Node) -> Iterator[Connection]:
        """Lend a new connection that is closed afterwards: for what must not go on with another server unnoticed."""
        if self._closed:
            raise CacheClosed(CLOSED)
        connection = Connection(node, self._settings)
        try:
            with page():
                connection.open()
            yield connection
        except Exception as error:
            ours = in_our_words(error)
            if ours is error:
                raise
            raise ours from error
        finally:
            connection.disconnect()

    def close(self) -> None:
        """Close every connection, those in use when their call ends."""
        with self._lock:
            self._closed = True
            _close_all(self._pools)

    def _pool(self, node: Node) -> Pool:
        pool = self._pools.get(node)
        if pool is None:
            with self._lock:
                if self._closed:
                    raise CacheClosed(CLOSED)
                pool = self._pools.setdefault(node, Pool(node, self._settings))
        return pool

    def _exchange(self, trips: Sequence[Trip]) -> Sequence[Sequence[Reply]]:
        """Send all trips, then read all replies. A trip that fails beside others has its error for every reply.

        Raises:
            Exception: of the first trip, where all have failed.
        """
        time_left()
        # Everybody takes connections in the same order: two calls never wait for each other's.
        ways = {index: self._pool(trip.node) for index, trip in enumerate(trips)}
        lent: dict[int, Connection] = {}
        done: set[int] = set()
        replies: list[list[Reply]] = [[] for _ in trips]
        errors: dict[int, Exception] = {}
        try:
            for index in sorted(ways, key=lambda index: trips[index].node):
                lent[index] = ways[index].take()
            for index, connection in lent.items():
                try:
                    with deadline(share_of_deadline(len(trips))):
                        connection.begin(trips[index])
                except Exception as error:  # noqa: BLE001  (raised below, unless others answer)
                    errors[index] = error
            for index, connection in lent.items():
                if index in errors:
                    continue
                try:
                    with deadline(share_of_deadline(len(trips))):
                        replies[index] = connection.read(trips[index])
                    done.add(index)
                except Exception as error:  # noqa: BLE001  (as above)
                    errors[index] = error
        finally:
            for index, connection in lent.items():
                ways[index].give(connection, sound=index in done)
        return with_errors(trips, replies, errors)


def share_of_deadline(trips: int) -> float | None:
    """Return the seconds that one of several trips may take of what is left: the others' replies are read after it."""
    left = time_left()
    return left if left is None or trips == 1 else left * SHARE


def with_errors(
    trips: Sequence[Trip], replies: Sequence[Sequence[Reply]], errors: Mapping[int, Exception]
) -> Sequence[Sequence[Reply]]:
    """Put the error of a trip in the place of each of its replies; raise where all trips have failed."""
    if not errors:
        return replies
    if len(errors) == len(trips):
        raise errors[min(errors)]
    words = {index: in_our_words(error) for index, error in errors.items()}
    return [
        [words[index]] * len(trip.commands) if index in words else replies[index] for index, trip in enumerate(trips)
    ]


def in_our_words(error: BaseException) -> BaseException:
    """Return what the engine knows for redis-py's timeout and the standard library's; other errors as they are."""
    if isinstance(error, redis.TimeoutError) or (isinstance(error, TimeoutError) and type(error) is not TierTimeout):
        ours = TierTimeout(SLOW)
        ours.__cause__ = error
        return ours
    return error


def _close_all(pools: Mapping[Any, Any]) -> None:
    for pool in list(pools.values()):
        pool.close()


# --- the same for an event loop ---------------------------------------------------------------------


# --- after a fork -----------------------------------------------------------------------------------

_clients: WeakSet[Client] = WeakSet()


def _after_in_child() -> None:
    for client in list(_clients):
        client.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_in_child)
