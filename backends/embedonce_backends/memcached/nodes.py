"""Connections to memcached: sockets with a deadline, a pool of connections per node, and the state of each node."""

from __future__ import annotations

import logging
import math
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, TypeVar

from pymemcache.client.base import Client, normalize_server_spec  # type: ignore[import-untyped]
from pymemcache.exceptions import (  # type: ignore[import-untyped]
    MemcacheClientError,
    MemcacheServerError,
    MemcacheUnexpectedCloseError,
    MemcacheUnknownCommandError,
    MemcacheUnknownError,
)

from embedonce.contracts import time_left
from embedonce.errors import TierBusy, TierError
from embedonce_backends._call_slots import CallSlots
from embedonce_backends._error_names import LOCAL_ERRORS, find_local_error, name_local_error
from embedonce_backends._sockets import SocketWaiter, send_all

P = TypeVar("P")
R = TypeVar("R")

log = logging.getLogger("embedonce.memcached")

RECEIVE_BYTES = 64 * 1024
"""Maximum number of bytes per read from a socket. Larger reads make the memory allocator slower."""
DEFAULT_SECONDS = 60.0
"""Maximum number of seconds that a call without a deadline waits for a node."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
"""Seconds for which a node is skipped: ``FIRST_WAIT`` after its first failure, and twice as long after each further
failure, up to ``LONGEST_WAIT``."""
PROBE_SECONDS = 30.0
"""Seconds after which the probe of a failed node counts as lost, so that another call may probe the node."""

MAX_RELATIVE_TTL = 30 * 86_400
"""Longest ttl that is sent as a number of seconds. memcached reads a larger number as a date, in seconds since 1970."""
LAST_DATE = 2**31 - 1
"""Last date that memcached can represent; a later date wraps around into the past."""
CLOCK_SECONDS = 600.0
"""Seconds after which a connection reads the server's time again."""

_now = time.monotonic


# --- errors ---------------------------------------------------------------------------------


class SeveralAddresses(TierError):
    """Raised if the name of a node has several addresses.

    If each connection chose an address by itself, the servers would hold different keys at different times, and
    ``forget`` would not reach all of them.
    """


class OutOfMemory(MemcacheServerError):  # type: ignore[misc]
    """The server is full, and it does not evict, or it has no memory for values of this size."""


class ValueTooLarge(MemcacheServerError):  # type: ignore[misc]
    """A value is larger than the server's limit for an item."""


_REFUSALS: Mapping[bytes, type[Exception]] = {b"out of memory": OutOfMemory, b"object too large": ValueTooLarge}


def name_error(error: BaseException) -> BaseException:
    """Return an error whose class says what is wrong, or ``error`` itself if nothing better is known."""
    if isinstance(error, socket.gaierror):
        missing = find_local_error()
        return error if missing is None else name_local_error(missing)
    if isinstance(error, OSError) and error.errno in LOCAL_ERRORS:
        return name_local_error(error)
    if type(error) is MemcacheServerError and error.args and isinstance(error.args[0], bytes):
        words = error.args[0]
        for start, kind in _REFUSALS.items():
            if words.startswith(start):
                return kind(words.decode("utf-8", "replace"))
    return error


# --- sockets ----------------------------------------------------------------------------------


def get_remaining_seconds() -> float:
    """Return the seconds that the current call may still wait.

    Raises:
        TierTimeout: no time is left.
    """
    left = time_left()
    return DEFAULT_SECONDS if left is None else min(left, DEFAULT_SECONDS)


class _Socket(socket.socket):
    """A socket that enforces the call's deadline. pymemcache's own timeout would start again with every read."""

    __slots__ = ("_waiter",)

    def connect(self, address: Any) -> None:
        super().settimeout(get_remaining_seconds())
        super().connect(address)
        self.setblocking(False)
        self._waiter = SocketWaiter(self.fileno(), DEFAULT_SECONDS)

    def settimeout(self, seconds: float | None) -> None:
        """Do nothing. pymemcache sets a timeout, but here only the deadline of the call counts."""

    def sendall(self, data: Any, flags: int = 0) -> None:
        send_all(self, self._waiter, data)

    def recv(self, size: int, flags: int = 0) -> bytes:
        self._waiter.wait_until_readable()
        return super().recv(RECEIVE_BYTES, flags)


def _resolve(host: str, port: int, family: int, kind: int, protocol: int) -> list[Any]:
    """Return the address of a host, in the form of ``socket.getaddrinfo``. A name lookup ends by the deadline.

    If a name has addresses of both kinds, only the IPv4 address is returned, because memcached listens on IPv4 by
    default, and both addresses usually lead to the same server.

    Raises:
        SeveralAddresses: the name has several IPv4 addresses, or no IPv4 address and several IPv6 addresses.
    """
    try:
        found = socket.getaddrinfo(host, port, family, kind, protocol, socket.AI_NUMERICHOST)
    except socket.gaierror:  # the host is a name, not a number
        found = _call_in_thread(lambda: socket.getaddrinfo(host, port, family, kind, protocol))
    preferred = [info for info in found if info[0] == socket.AF_INET] or found
    addresses = {info[4] for info in preferred}
    if len(addresses) > 1:
        raise SeveralAddresses(
            f"the name {host!r} has {len(addresses)} addresses, and each may be a different server; "
            "write every address into servers"
        )
    return preferred[:1]


def _call_in_thread(look_up: Callable[[], R]) -> R:
    """Return the result of ``look_up``, which runs in a thread. At the deadline, that thread is abandoned."""
    future: Future[R] = Future()

    def run() -> None:
        try:
            future.set_result(look_up())
        except BaseException as error:  # noqa: BLE001  (future.result() raises it in the calling thread)
            future.set_exception(error)

    threading.Thread(target=run, name="embedonce-resolver", daemon=True).start()
    return future.result(get_remaining_seconds())


_SOCKET_MODULE: Any = SimpleNamespace(**{**vars(socket), "socket": _Socket, "getaddrinfo": _resolve})


_VALID_KEY = re.compile(rb"[!-~]{1,250}").fullmatch
_VALUE_LINE = re.compile(rb"VALUE (\S+) \d+ (\d+)").fullmatch

# --- one connection ---------------------------------------------------------------------------


class Connection(Client):  # type: ignore[misc]  # pymemcache has no types
    """One connection. Each method makes one round trip for all of its keys and waits for all replies.

    An error or an unexpected reply closes the connection, so that no later call reads the reply to an earlier call.
    """

    _clock_offset = 0.0
    """Seconds that the server's time is ahead of this process's monotonic clock."""
    _clock_read_again = -math.inf

    def get_all(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Return the values that are stored under ``keys``.

        This does not use pymemcache's ``get_many``, which takes three times as long.
        """
        names = self._encode_keys(keys)
        if self.sock is None:
            self._connect()
        connected: Any = self.sock
        connected.sendall(b"get " + b" ".join(names) + b"\r\n")
        return self._read_values(dict(zip(names, keys, strict=True)))

    def _encode_keys(self, keys: Sequence[str]) -> list[bytes]:
        """Return the keys with their prefix, as memcached gets them.

        Raises:
            MemcacheIllegalInputError: memcached does not allow such a key.
        """
        names = [self.key_prefix + key.encode("ascii", "replace") for key in keys]
        if not all(map(_VALID_KEY, names)) or not all(map(str.isascii, keys)):
            return [self.check_key(key, self.key_prefix) for key in keys]
        return names

    def _read_values(self, keys: Mapping[bytes, str]) -> dict[str, bytes]:
        """Read the reply to a get. ``keys`` has the requested key for each name that was sent."""
        found: dict[str, bytes] = {}
        data, at = b"", 0
        while True:
            end = data.find(b"\r\n", at)
            if end < 0:
                data, at = data[at:] + self._receive(), 0
                continue
            line = data[at:end]
            if line == b"END" and end + 2 == len(data):
                return found
            match = _VALUE_LINE(line)
            if match is None or match[1] not in keys:
                self._raise_errors(line, b"get")
                raise MemcacheUnknownError("the server sent an invalid reply to get")
            start = end + 2
            stop = start + int(match[2])
            if stop + 2 > len(data):
                data, start, stop = self._receive_rest(data[start:], stop + 2 - start), 0, stop - start
            if data[stop : stop + 2] != b"\r\n":
                raise MemcacheUnknownError("a value does not have the size that the server announced")
            found[keys[match[1]]] = data[start:stop]
            at = stop + 2

    def _receive_rest(self, beginning: bytes, size: int) -> bytes:
        """Receive until at least ``size`` bytes are there, and return all bytes."""
        parts, missing = [beginning], size - len(beginning)
        while missing > 0:
            parts.append(self._receive())
            missing -= len(parts[-1])
        return b"".join(parts)

    def _receive(self) -> bytes:
        connected: Any = self.sock
        received: bytes = connected.recv(RECEIVE_BYTES)
        if not received:
            raise MemcacheUnexpectedCloseError
        return received

    def set_all(self, items: Mapping[str, bytes], ttl: float | None) -> Sequence[str]:
        """Store the items, and return the keys of the items that the server refused."""
        values: Any = items
        refused: Any = self.set_many(values, self._make_exptime(ttl), noreply=False)
        return refused  # type: ignore[no-any-return]

    def add_all(self, items: Mapping[str, bytes], ttl: float | None) -> set[str]:
        """Store the items whose key is missing and return those keys.

        This does not use pymemcache's ``add``, which takes only one key.
        """
        values: Any = items
        stored: Any = self._store_cmd(b"add", values, self._make_exptime(ttl), False)
        return {key for key in items if stored[key]}

    def _make_exptime(self, ttl: float | None) -> int:
        """Return memcached's ``exptime``: seconds up to thirty days, a date for a longer ttl, or 0 for no expiry."""
        if ttl is None:
            return 0
        if ttl <= MAX_RELATIVE_TTL:
            return max(1, math.ceil(ttl))
        date = math.ceil(self._read_server_time() + ttl)
        return date if date <= LAST_DATE else 0

    def _read_server_time(self) -> float:
        """Return the server's time. The clock of this host may be wrong, and would then give a wrong date.

        A server that does not tell its time is assumed to have this host's time.
        """
        now = _now()
        if now >= self._clock_read_again:
            try:
                offset = int(self.stats()[b"time"]) - now
            except (MemcacheUnknownCommandError, MemcacheClientError, MemcacheServerError, KeyError, ValueError):
                offset = time.time() - now
            self._clock_offset, self._clock_read_again = offset, now + CLOCK_SECONDS
        return now + self._clock_offset

    def delete_all(self, keys: Iterable[str]) -> None:
        """Remove the keys. This does not use pymemcache's ``delete_many``, which accepts any reply as a success."""
        commands = [b"delete %b\r\n" % self.check_key(key, self.key_prefix) for key in keys]
        replies = self._misc_cmd(commands, b"delete", False)
        if not {b"DELETED", b"NOT_FOUND"}.issuperset(replies):
            self.close()
            raise MemcacheUnknownError("the server sent an invalid reply to delete")


# --- one node ---------------------------------------------------------------------------------


class Node:
    """One memcached server, with its connections and a record of its failures."""

    def __init__(self, name: str, *, prefix: str, max_connections: int, is_only_node: bool) -> None:
        self.name = name
        self._prefix = prefix.encode("ascii")
        self._max_connections = max_connections
        self._is_only_node = is_only_node
        self._idle: list[Connection] = []
        self._closed = False
        self.reset()

    def reset(self) -> None:
        """Close the idle connections and forget all failures.

        A forked child calls this, because it must not use its parent's connections.
        """
        idle, self._idle = self._idle, []
        self._lock = threading.Lock()
        self._slots = CallSlots(self._max_connections)
        self.is_up = True
        self._wait_seconds = 0.0
        self._skip_until = 0.0
        self._probe_until = 0.0
        for connection in idle:
            connection.close()

    def run(self, call: Callable[[Connection, P], R], part: P, *, may_retry: bool) -> R:
        """Return ``call(connection, part)`` with a connection that only this call uses. An error closes the connection.

        The server may have closed an idle connection, for example during a restart. In that case, if ``may_retry`` is
        true, the call is repeated once with a new connection.

        Raises:
            TierBusy: all connections stayed in use until the deadline.
        """
        slots = self._slots
        if not slots.take(get_remaining_seconds):
            raise TierBusy(
                f"memcached {self.name}: all connections are in use (max_connections = {self._max_connections})"
            )
        try:
            connection = self._take()
            is_reused = connection.sock is not None
            try:
                try:
                    answer = call(connection, part)
                except (ConnectionError, MemcacheUnexpectedCloseError):
                    if not (is_reused and may_retry):
                        raise
                    self._drop_idle()
                    connection.close()
                    answer = call(connection, part)
            except BaseException as error:
                connection.close()
                named = name_error(error)
                if named is error:
                    raise
                raise named from error
            self._give(connection)
            return answer
        finally:
            slots.free()

    def _take(self) -> Connection:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return Connection(
            normalize_server_spec(self.name),
            no_delay=True,
            default_noreply=False,
            key_prefix=self._prefix,
            socket_module=_SOCKET_MODULE,
        )

    def _give(self, connection: Connection) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(connection)
                return
        connection.close()

    def _drop_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def close(self) -> None:
        """Close the idle connections now, and each connection in use when its call ends."""
        self._closed = True
        self._drop_idle()

    # is the node up?

    def admits_call(self) -> bool:
        """Return whether the node is up. If it is down, return whether it is time for this call to probe the node."""
        if self.is_up:
            return True
        with self._lock:
            now = _now()
            if now < max(self._skip_until, self._probe_until):
                return False
            self._probe_until = now + PROBE_SECONDS
            return True

    def mark_failed(self, error: Exception) -> None:
        """Skip the node for some time, which doubles with each failure up to a maximum."""
        with self._lock:
            now = _now()
            was_up, self.is_up = self.is_up, False
            if was_up or now >= self._skip_until:  # calls that fail at the same time count as one failure
                self._wait_seconds = min(LONGEST_WAIT, self._wait_seconds * 2 or FIRST_WAIT)
                self._skip_until = now + self._wait_seconds * random.uniform(0.75, 1.25)
                self._probe_until = 0.0
        self._drop_idle()
        if was_up and not self._is_only_node:
            cause = "timeout" if isinstance(error, TimeoutError) else type(error).__name__
            log.warning("memcached %s does not answer (%s); skipping it until a probe succeeds", self.name, cause)

    def mark_answered(self) -> None:
        """Use the node again from now on."""
        if self.is_up:
            return
        with self._lock:
            was_up, self.is_up = self.is_up, True
            self._wait_seconds = 0.0
        if not was_up and not self._is_only_node:
            log.warning("memcached %s answers again", self.name)


def is_node_failure(error: Exception) -> bool:
    """Return whether an error means that the node is down. A server's refusal or a full pool does not mean that."""
    if isinstance(error, MemcacheUnexpectedCloseError):
        return True
    return not isinstance(error, TierBusy | MemcacheServerError | MemcacheClientError)
