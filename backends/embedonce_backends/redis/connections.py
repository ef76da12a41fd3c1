"""Blocking connections to Redis. Each call ends by its deadline. A forked child does not use its parent's connections.

The connections are redis-py's. redis-py's pools are not used, because they have no deadlines, and because an exhausted
pool raises the same error as a server that is down.
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
from redis.exceptions import ConnectionError, InvalidResponse, ResponseError

from embedonce.contracts import deadline, time_left
from embedonce.errors import CacheClosed, TierBusy, TierTimeout
from embedonce_backends._call_slots import CallSlots
from embedonce_backends._pages import limit_page_time
from embedonce_backends._sockets import SocketWaiter, send_all

from .errors import Parser, explain_end, translate_error
from .plans import ROLE, Node, Plan, Reply, Trip, is_master
from .url import Address, Place

if TYPE_CHECKING:
    from ssl import SSLContext

T = TypeVar("T")

CLOSED = "the redis backend is closed"
BUSY = "all connections to Redis are in use (max_connections = {})"
UNEXPECTED_REPLY = "the server sent a reply of an unexpected type"
NO_HANDSHAKE = "the TLS handshake did not end in time; if this port has no TLS, write redis instead of rediss in url"

IDLE_SECONDS = 300.0
"""Seconds after which an idle connection is not used again, because load balancers silently drop idle connections."""
TRIP_SHARE = 0.75
"""Share of the remaining time that each of several simultaneous trips may take."""
READ_BYTES = 2**18
"""Maximum number of bytes per read from a socket. For comparison, 256 frames of 384 dimensions take 400 kB."""


class Settings:
    """The settings that all connections of a backend share."""

    def __init__(
        self,
        place: Place,
        *,
        username: str | None,
        password: str | None,
        sentinel_username: str | None,
        sentinel_password: str | None,
        tls: SSLContext | None,
        max_connections: int,
    ) -> None:
        self.db = place.db
        self.tls = tls
        self.max_connections = max_connections
        self._login = {"username": username, "password": password}
        self._sentinel_login = {"username": sentinel_username, "password": sentinel_password}

    def make_options(self, node: Node) -> dict[str, Any]:
        """Return redis-py's options for a connection to a node."""
        is_sentinel = node.role == "sentinel"
        return {
            **(self._sentinel_login if is_sentinel else self._login),
            "db": 0 if is_sentinel else self.db,
            # redis-py's timeouts are off, because the connections enforce the deadline of the whole call themselves.
            # redis-py does not retry either, because the engine decides whether to retry.
            "socket_timeout": None,
            "socket_connect_timeout": None,
            # RESP2 needs no HELLO command and returns the same values. ``driver_info: None`` keeps redis-py from
            # sending two CLIENT SETINFO commands on each new connection.
            "protocol": 2,
            "driver_info": None,
            "socket_read_size": READ_BYTES,
        }


# --- one connection, blocking ---------------------------------------------------------------------


class _Parser(Parser):
    """Ends every read by the deadline of the call. A socket's own timeout would start again with every read."""

    waiter: SocketWaiter | None = None
    """Waits for the socket if it does not block."""

    def read_from_socket(self, *args: Any, **kwargs: Any) -> bool:
        if self.waiter is not None:
            self.waiter.wait_until_readable()
        elif self._sock is not None:
            self._sock.settimeout(time_left())
        read: bool = super().read_from_socket(*args, **kwargs)
        return read

    def can_read(self, timeout: float = 0) -> bool:
        if self.waiter is None or self._reader is None:
            return bool(super().can_read(timeout))
        return bool(self._reader.has_data()) or self.waiter.is_readable()

    def on_disconnect(self) -> None:
        super().on_disconnect()
        self.waiter = None


class Connection(redis.Connection):
    """A blocking connection. It stops connecting, sending or reading at the deadline of the call."""

    idle_since = 0.0

    def __init__(self, node: Node, settings: Settings) -> None:
        self._node = node
        self._tls = settings.tls
        self._has_answered = False
        super().__init__(
            host=node.address.host,
            port=node.address.port,
            parser_class=_Parser,
            **settings.make_options(node),
        )

    def _connect(self) -> socket.socket:
        problem: OSError = OSError("the host name has no address")
        for family, target in _resolve(self._node.address):
            try:
                return self._connect_to(family, target)
            except TimeoutError:
                raise
            except OSError as error:
                problem = error
        raise problem

    def _connect_to(self, family: int, target: Any) -> socket.socket:
        opened = socket.socket(family, socket.SOCK_STREAM)
        try:
            if family != socket.AF_UNIX:
                opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            opened.settimeout(time_left())
            opened.connect(target)
            if self._tls is not None:
                opened = self._start_tls(opened, self._tls)
        except BaseException:
            opened.close()
            raise
        return opened

    def _start_tls(self, opened: socket.socket, tls: SSLContext) -> socket.socket:
        opened.settimeout(time_left())
        try:
            return tls.wrap_socket(opened, server_hostname=self._node.address.host)
        except TimeoutError:
            raise TierTimeout(NO_HANDSHAKE) from None

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        """Send an encoded command by the deadline of the call. redis-py itself uses this method to log in."""
        opened: socket.socket | None = self._sock
        if opened is not None:
            opened.settimeout(time_left())
        super().send_packed_command(command, check_health)

    def send(self, trip: Trip) -> None:
        """Send the commands of a trip in one piece, so that a socket's timeout covers all of them together."""
        waiter = self._parser.waiter
        if waiter is None or self._sock is None:
            self.send_packed_command([trip.pack()])
            return
        try:
            send_all(self._sock, waiter, trip.pack())
        except TimeoutError:
            raise
        except OSError as error:
            raise ConnectionError(f"cannot send to Redis: {error.strerror}") from error

    def read(self, trip: Trip) -> list[Reply]:
        """Return one reply per command; a reply can be an error. If this raises, the connection must be closed."""
        replies: list[Reply] = []
        # Use the parser directly. redis-py's read_response does additional work that is not needed here and takes
        # longer than parsing the reply itself.
        read, check = self._parser.read_response, trip.check
        for _ in trip.commands:
            try:
                reply = read()
            except (ConnectionError, OSError) as error:
                explained = explain_end(error, has_answered=self._has_answered, tls=self._tls)
                if explained is None:
                    raise
                raise explained from error
            self._has_answered = True
            if not check(reply) and not isinstance(reply, ResponseError):
                raise InvalidResponse(UNEXPECTED_REPLY)
            replies.append(reply)
        return replies

    def open(self) -> None:
        """Connect and log in. If the node is expected to be a master, check that it is one."""
        self.connect()
        opened: socket.socket | None = self._sock
        if opened is not None and self._tls is None:  # redis-py logs in with a timeout, and a TLS socket needs one
            opened.setblocking(False)
            self._parser.waiter = SocketWaiter(opened.fileno())
        if self._node.role == "master":
            (reply,) = self.ask(Trip(self._node, [ROLE], lambda _: True))
            check_role(reply)

    def begin(self, trip: Trip) -> None:
        """Connect if necessary and send the commands of a trip."""
        if not self.is_connected:
            self.open()
        self.send(trip)

    def ask(self, trip: Trip) -> list[Reply]:
        """Send the commands of a trip and read the replies."""
        self.send(trip)
        return self.read(trip)

    def is_usable(self) -> bool:
        """Return whether the idle connection is usable.

        A readable connection is not usable. An idle connection becomes readable only if the server has closed the
        connection or sent an error.
        """
        try:
            return not self._parser.can_read(0)
        except (redis.RedisError, OSError):
            return False


def check_role(reply: Reply) -> None:
    """Raise ConnectionError if the reply to ROLE does not come from a master."""
    if not is_master(reply):
        raise ConnectionError("the sentinels named a server that is no longer the master")


def _resolve(address: Address) -> Sequence[tuple[int, Any]]:
    """Return the socket family and the socket address for each address of a host."""
    if not address.port:
        return [(socket.AF_UNIX, address.host)]
    for family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError):
            socket.inet_pton(family, address.host)
            return [(family, (address.host, address.port))]
    found = _call_in_thread(lambda: socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM))
    return [(family, target) for family, _, _, _, target in found]


def _call_in_thread(look_up: Callable[[], T]) -> T:
    """Return the result of ``look_up``.

    ``look_up`` has no timeout, so it runs in a thread that is abandoned at the deadline.
    """
    left = time_left()
    if left is None:
        return look_up()
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(look_up())
        except BaseException as error:  # noqa: BLE001  (raised below, in the calling thread)
            errors.append(error)

    thread = threading.Thread(target=run, name="embedonce-redis", daemon=True)
    thread.start()
    thread.join(left)
    if errors:
        raise errors[0]
    if not results:
        raise TierTimeout("the host name was not resolved in time")
    return results[0]


def _get_half_of_time() -> float | None:
    left = time_left()
    return None if left is None else left / 2


# --- pools, blocking --------------------------------------------------------------------------------


class Pool:
    """Lends connections to one node, the most recently used first, up to ``max_connections`` at the same time."""

    def __init__(self, node: Node, settings: Settings) -> None:
        self._node = node
        self._settings = settings
        self._idle: list[Connection] = []
        self._closed = False
        self.reset()

    def reset(self) -> None:
        """Forget all connections. A forked child calls this, because the open connections belong to its parent."""
        self._lock = threading.Lock()
        self._slots = CallSlots(self._settings.max_connections)
        self._idle.clear()  # in the child, redis-py closes only the descriptor and sends the server nothing

    def take(self) -> Connection:
        """Return a connection that no other call uses until :meth:`give`.

        Raises:
            TierBusy: all connections stayed in use for half of the call's remaining time.
        """
        if not self._slots.take(_get_half_of_time):
            raise TierBusy(BUSY.format(self._settings.max_connections))
        try:
            if self._closed:
                raise CacheClosed(CLOSED)
            return self._pop_idle() or Connection(self._node, self._settings)
        except BaseException:
            self._slots.free()
            raise

    def _pop_idle(self) -> Connection | None:
        oldest = time.monotonic() - IDLE_SECONDS
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection = self._idle.pop()
            # The check lets other threads run. If this thread held the lock meanwhile, they would wait for it.
            if connection.idle_since > oldest and connection.is_usable():
                return connection
            connection.disconnect()

    def give(self, connection: Connection, *, is_reusable: bool) -> None:
        """Take a connection back, and close it unless ``is_reusable``."""
        connection.idle_since = time.monotonic()
        with self._lock:
            is_kept = is_reusable and not self._closed
            if is_kept:
                self._idle.append(connection)
        self._slots.free()
        if not is_kept:
            connection.disconnect()

    def close(self) -> None:
        """Close the idle connections now, and each connection in use when it is given back."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        self._slots.close()
        for connection in idle:
            connection.disconnect()


class Client:
    """Carries out plans with blocking connections."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._pools: dict[Node, Pool] = {}
        self._closed = False
        self.reset()
        _clients.add(self)
        weakref.finalize(self, _close_all, self._pools)

    def reset(self) -> None:
        """Forget all connections. A forked child calls this."""
        self._lock = threading.Lock()
        for pool in self._pools.values():
            pool.reset()

    def run(self, plan: Plan[T]) -> T:
        """Carry out a plan and return its result.

        Raises:
            TierTimeout: the deadline has passed.
            TierBusy: no connection was free.
            redis.RedisError: an error of the server or of redis-py.
        """
        try:
            trips = next(plan)
            while True:
                try:
                    replies = self._exchange_trips(trips)
                except BaseException as error:  # noqa: BLE001  (the plan handles it or raises it again)
                    trips = plan.throw(translate_error(error))
                else:
                    trips = plan.send(replies)
        except StopIteration as done:
            result: T = done.value
            return result

    @contextmanager
    def open_connection(self, node: Node) -> Iterator[Connection]:
        """Lend a new connection outside the pool, and close it afterwards."""
        if self._closed:
            raise CacheClosed(CLOSED)
        connection = Connection(node, self._settings)
        try:
            with limit_page_time():
                connection.open()
            yield connection
        except Exception as error:
            translated = translate_error(error)
            if translated is error:
                raise
            raise translated from error
        finally:
            connection.disconnect()

    def close(self) -> None:
        """Close the idle connections now, and each connection in use when its call ends."""
        with self._lock:
            self._closed = True
            _close_all(self._pools)

    def _get_pool(self, node: Node) -> Pool:
        pool = self._pools.get(node)
        if pool is None:
            with self._lock:
                if self._closed:
                    raise CacheClosed(CLOSED)
                pool = self._pools.setdefault(node, Pool(node, self._settings))
        return pool

    def _exchange_trip(self, trip: Trip) -> list[Reply]:
        pool = self._get_pool(trip.node)
        connection = pool.take()
        is_done = False
        try:
            connection.begin(trip)
            replies = connection.read(trip)
            is_done = True
            return replies
        finally:
            pool.give(connection, is_reusable=is_done)

    def _exchange_trips(self, trips: Sequence[Trip]) -> Sequence[Sequence[Reply]]:
        """Send the commands of all trips, then read all replies.

        If a trip fails, the trip's error takes the place of each of its replies.

        Raises:
            Exception: every trip failed; the exception is the first trip's error.
        """
        time_left()
        if len(trips) == 1:
            return [self._exchange_trip(trips[0])]
        pools = {index: self._get_pool(trip.node) for index, trip in enumerate(trips)}
        lent: dict[int, Connection] = {}
        done: set[int] = set()
        replies: list[list[Reply]] = [[] for _ in trips]
        errors: dict[int, Exception] = {}
        try:
            # Every call takes its connections in the order of the nodes. Otherwise, two calls could each hold a
            # connection that the other call waits for.
            for index in sorted(pools, key=lambda index: trips[index].node):
                lent[index] = pools[index].take()
            for index, connection in lent.items():
                try:
                    with deadline(get_trip_time(len(trips))):
                        connection.begin(trips[index])
                except Exception as error:  # noqa: BLE001  (raised below, unless other trips succeed)
                    errors[index] = error
            for index, connection in lent.items():
                if index in errors:
                    continue
                try:
                    with deadline(get_trip_time(len(trips))):
                        replies[index] = connection.read(trips[index])
                    done.add(index)
                except Exception as error:  # noqa: BLE001  (as above)
                    errors[index] = error
        finally:
            for index, connection in lent.items():
                pools[index].give(connection, is_reusable=index in done)
        return insert_errors(trips, replies, errors)


def get_trip_time(trips: int) -> float | None:
    """Return the seconds that each of several simultaneous trips may take.

    If there are at least two trips, each gets only a share of the remaining time. If one of them times out, there is
    still time to read the replies of the other trips.
    """
    left = time_left()
    return left if left is None or trips == 1 else left * TRIP_SHARE


def insert_errors(
    trips: Sequence[Trip], replies: Sequence[Sequence[Reply]], errors: Mapping[int, Exception]
) -> Sequence[Sequence[Reply]]:
    """Return the replies, with the error of a failed trip in place of its replies; raise if all trips failed."""
    if not errors:
        return replies
    if len(errors) == len(trips):
        raise errors[min(errors)]
    translated = {index: translate_error(error) for index, error in errors.items()}
    return [
        [translated[index]] * len(trip.commands) if index in translated else replies[index]
        for index, trip in enumerate(trips)
    ]


def _close_all(pools: Mapping[Any, Any]) -> None:
    for pool in list(pools.values()):
        pool.close()


# --- after a fork -----------------------------------------------------------------------------------

_clients: WeakSet[Client] = WeakSet()


def _reset_after_fork() -> None:
    for client in list(_clients):
        client.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)
