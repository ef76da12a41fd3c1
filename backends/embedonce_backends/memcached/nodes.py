"""Connections to memcached: sockets that keep a deadline, a client in a pool per node, and whether a node answers."""

from __future__ import annotations

import logging
import random
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
    MemcacheUnknownError,
)

from embedonce.contracts import time_left
from embedonce.errors import TierBusy

P = TypeVar("P")
R = TypeVar("R")

log = logging.getLogger("embedonce.memcached")

RECEIVE = 24 * 1024
"""Bytes asked of a socket at once. pymemcache asks for 4 KiB, and with every value copies what is left: fewer bytes
are more calls, more are larger copies. Measured for 384 to 3,072 dimensions."""
PATIENCE = 60.0
"""Seconds that a call without a deadline waits for a node."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
"""Seconds for which a node that failed is left out; they double as long as it fails."""
LOST_TRY = 30.0
"""Seconds after which a call that tries a node again counts as one that never comes back."""

_now = time.monotonic


# --- sockets ----------------------------------------------------------------------------------


def remaining() -> float:
    """Return the seconds that the call under way may still wait.

    Raises:
        TierTimeout: none.
    """
    left = time_left()
    return PATIENCE if left is None else min(left, PATIENCE)


class _Socket(socket.socket):
    """A socket that keeps the deadline of the call under way; pymemcache's own timeout starts anew with every read."""

    __slots__ = ()

    def connect(self, address: Any) -> None:
        self.settimeout(remaining())
        super().connect(address)

    def sendall(self, data: Any, flags: int = 0) -> None:
        self.settimeout(remaining())  # of all of it: the one call whose timeout is not per packet
        super().sendall(data, flags)

    def recv(self, size: int, flags: int = 0) -> bytes:
        self.settimeout(remaining())
        return super().recv(RECEIVE, flags)


def _addresses(host: str, port: int, family: int, kind: int, protocol: int) -> list[Any]:
    """Return what ``socket.getaddrinfo`` does, IPv4 first; looking a name up cannot outlast the deadline."""
    try:
        found = socket.getaddrinfo(host, port, family, kind, protocol, socket.AI_NUMERICHOST)
    except socket.gaierror:  # a name
        found = _in_time(lambda: socket.getaddrinfo(host, port, family, kind, protocol))
    # pymemcache takes the first alone, and memcached listens on IPv4 unless it is told otherwise.
    return sorted(found, key=lambda info: info[0] != socket.AF_INET)


def _in_time(call: Callable[[], R]) -> R:
    """Return ``call()``, made in a thread that is left behind when the deadline passes."""
    future: Future[R] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001  (it reaches whoever waits)
            future.set_exception(error)

    threading.Thread(target=run, name="embedonce-resolver", daemon=True).start()
    return future.result(remaining())


_SOCKETS: Any = SimpleNamespace(**{**vars(socket), "socket": _Socket, "getaddrinfo": _addresses})


# --- one connection ---------------------------------------------------------------------------


class Connection(Client):  # type: ignore[misc]  # pymemcache has no types
    """One connection. Each call is one trip for all of its keys; it waits for the replies, and believes no others
    than there are: any error closes the connection, so that no reply is left in it.
    """

    def get_all(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Return what is there."""
        found: Any = self.get_many(keys)
        return found  # type: ignore[no-any-return]

    def set_all(self, items: Mapping[str, bytes], expire: int) -> Sequence[str]:
        """Store the items, and return the keys of those that were refused."""
        values: Any = items
        refused: Any = self.set_many(values, expire, noreply=False)
        return refused  # type: ignore[no-any-return]

    def add_all(self, items: Mapping[str, bytes], expire: int) -> set[str]:
        """Store what is absent, and return those keys. (pymemcache's ``add`` is for one key.)"""
        values: Any = items
        stored: Any = self._store_cmd(b"add", values, expire, False)
        return {key for key in items if stored[key]}

    def delete_all(self, keys: Iterable[str]) -> None:
        """Remove the keys. (pymemcache's ``delete_many`` takes any reply for a yes.)"""
        commands = [b"delete %b\r\n" % self.check_key(key, self.key_prefix) for key in keys]
        replies = self._misc_cmd(commands, b"delete", False)
        if not {b"DELETED", b"NOT_FOUND"}.issuperset(replies):
            self.close()
            raise MemcacheUnknownError("a reply to delete that memcached does not give")


# --- one node ---------------------------------------------------------------------------------


class Node:
    """One memcached: its connections, and whether it answers."""

    def __init__(self, name: str, *, prefix: str, most: int, alone: bool) -> None:
        self.name = name
        self._prefix = prefix.encode("ascii")
        self._most = most
        self._alone = alone
        self._idle: list[Connection] = []
        self._closed = False
        self.reset()

    def reset(self) -> None:
        """Start anew, as in a forked child: the connections are the parent's."""
        idle, self._idle = self._idle, []
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(self._most)
        self.up = True
        self._wait = 0.0
        self._until = 0.0
        self._tried_until = 0.0
        for connection in idle:
            connection.close()

    def run(self, call: Callable[[Connection, P], R], part: P, *, twice: bool) -> R:
        """Return ``call(connection, part)``, with a connection of its own that is dropped if anything goes wrong.

        A connection that was idle may have been closed by the server meanwhile (a restart): with
        ``twice`` the call is made again over a new one.

        Raises:
            TierBusy: all connections are taken.
        """
        places = self._places
        if not places.acquire(timeout=remaining()):
            raise TierBusy(f"memcached {self.name}: all connections are in use")
        try:
            connection = self._take()
            reused = connection.sock is not None
            try:
                try:
                    answer = call(connection, part)
                except (ConnectionError, MemcacheUnexpectedCloseError):
                    if not (reused and twice):
                        raise
                    self._drop_idle()
                    connection.close()
                    answer = call(connection, part)
            except BaseException:
                connection.close()
                raise
            self._give(connection)
            return answer
        finally:
            places.release()

    def _take(self) -> Connection:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return Connection(
            normalize_server_spec(self.name),
            no_delay=True,
            default_noreply=False,
            key_prefix=self._prefix,
            socket_module=_SOCKETS,
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
        """Close every connection, those in use when they come back."""
        self._closed = True
        self._drop_idle()

    # whether it answers

    def admits(self) -> bool:
        """Tell whether to ask it: it is up, or it is time for one call to try again."""
        if self.up:
            return True
        with self._lock:
            now = _now()
            if now < max(self._until, self._tried_until):
                return False
            self._tried_until = now + LOST_TRY
            return True

    def failed(self, error: Exception) -> None:
        """Leave it out for a while, longer each time."""
        with self._lock:
            now = _now()
            was_up, self.up = self.up, False
            if was_up or now >= self._until:  # calls that were under way beside it fail too, and count once
                self._wait = min(LONGEST_WAIT, self._wait * 2 or FIRST_WAIT)
                self._until = now + self._wait * random.uniform(0.75, 1.25)
                self._tried_until = 0.0
        self._drop_idle()
        if was_up and not self._alone:
            cause = "timeout" if isinstance(error, TimeoutError) else type(error).__name__
            log.warning("memcached %s does not answer (%s); its keys are not served until it does", self.name, cause)

    def answered(self) -> None:
        """Ask it from now on."""
        if self.up:
            return
        with self._lock:
            was_up, self.up = self.up, True
            self._wait = 0.0
        if not was_up and not self._alone:
            log.warning("memcached %s answers again", self.name)


def silences(error: Exception) -> bool:
    """Tell whether an error means that a node is down: not if it answered with a refusal, or was not asked."""
    if isinstance(error, MemcacheUnexpectedCloseError):
        return True
    return not isinstance(error, TierBusy | MemcacheServerError | MemcacheClientError)
