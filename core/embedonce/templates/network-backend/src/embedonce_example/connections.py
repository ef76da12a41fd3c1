"""Connections to the server: a pool for threads, a pool for an event loop, and the protocol that both speak.

A request and a reply are JSON after four bytes with the length. Replace :func:`pack` and :func:`unpack` with the
protocol of your store, or this whole module with the store's own client.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from embedonce.contracts import time_left
from embedonce.errors import TierBusy

LENGTH = struct.Struct(">I")
MAX_REPLY = 256 * 2**20
"""Maximum size of a reply in bytes. A larger length means that the peer does not speak this protocol."""
CONNECT_SECONDS = 5.0
"""Time limit of connecting, for a call without a deadline."""


class Address(NamedTuple):
    """Where the server is."""

    host: str
    port: int


class ServerError(Exception):
    """The server answered with an error. The message is the server's."""


def parse_url(url: str) -> Address:
    """Return the address in ``example://HOST:PORT``.

    Raises:
        ValueError: the URL has another form. The message does not repeat it, because it may contain a password.
    """
    parts = urlsplit(url)
    if parts.scheme != "example" or not parts.hostname or parts.port is None:
        raise ValueError("url must be example://HOST:PORT")
    return Address(parts.hostname, parts.port)


def pack(message: dict[str, Any]) -> bytes:
    """Return a request as bytes."""
    body = json.dumps(message, separators=(",", ":")).encode()
    return LENGTH.pack(len(body)) + body


def unpack(body: bytes) -> Any:
    """Return the result in the body of a reply.

    Raises:
        ServerError: the server answered with an error.
    """
    reply = json.loads(body)
    if "error" in reply:
        raise ServerError(str(reply["error"]))
    return reply["result"]


def read_length(head: bytes) -> int:
    """Return the length of a reply's body.

    Raises:
        ConnectionError: the length is too large, so the peer does not speak this protocol.
    """
    (length,) = LENGTH.unpack(head)
    if length > MAX_REPLY:
        raise ConnectionError("the reply is too large")
    return int(length)


class Pool:
    """At most ``size`` connections that threads share. A call takes one, and gives it back if its reply was read."""

    def __init__(self, address: Address, size: int) -> None:
        self._address = address
        self._size = size
        self._reset()

    def _reset(self) -> None:
        self._free = threading.Semaphore(self._size)
        self._lock = threading.Lock()
        self._idle: list[socket.socket] = []
        self._closed = False
        self._process = os.getpid()

    def call(self, message: dict[str, Any]) -> Any:
        """Send a request and return the result of its reply, within the deadline of the current call.

        Raises:
            OSError: the server cannot be reached, or the connection broke. TimeoutError is an OSError.
            ServerError: the server answered with an error.
        """
        if self._process != os.getpid():  # a forked child must not use its parent's connections
            closed, self._inherited = self._closed, self._idle
            self._reset()
            self._closed = closed
        with self._borrow() as connection:
            connection.settimeout(time_left())
            connection.sendall(pack(message))
            body = _receive(connection, read_length(_receive(connection, LENGTH.size)))
        return unpack(body)

    @contextmanager
    def _borrow(self) -> Iterator[socket.socket]:
        if self._closed:
            raise RuntimeError("the backend is closed")
        if not self._free.acquire(timeout=time_left()):
            raise TierBusy("all connections are in use")
        try:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None or _has_ended(connection):
                connection = socket.create_connection(self._address, time_left() or CONNECT_SECONDS)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                yield connection
            except BaseException:
                connection.close()  # its reply may still arrive, and would answer the next request
                raise
            with self._lock:
                if not self._closed:
                    self._idle.append(connection)
                    return
            connection.close()
        finally:
            self._free.release()

    def close(self) -> None:
        """Close the idle connections now, and each connection in use at the end of its call."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()


def _receive(connection: socket.socket, size: int) -> bytes:
    """Read exactly ``size`` bytes. Each read gets the time that is left, so a slow peer cannot exceed the deadline."""
    received = bytearray()
    while len(received) < size:
        connection.settimeout(time_left())
        part = connection.recv(min(size - len(received), 1 << 20))
        if not part:
            raise ConnectionError("the server closed the connection")
        received += part
    return bytes(received)


def _has_ended(connection: socket.socket) -> bool:
    """Return whether the server has closed an idle connection, and close it on this side too."""
    connection.setblocking(False)
    try:
        connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        pass
    connection.close()  # it has ended, or has a reply that nobody asked for
    return True


class AsyncPool:
    """At most ``size`` connections of one event loop. The engine cancels a call when its timeout has passed."""

    def __init__(self, address: Address, size: int) -> None:
        self._address = address
        self._free = asyncio.Semaphore(size)
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._closed = False

    async def call(self, message: dict[str, Any]) -> Any:
        """Async twin of :meth:`Pool.call`."""
        if self._closed:
            raise RuntimeError("the backend is closed")
        async with self._free:
            reader, writer = await self._take()
            try:
                writer.write(pack(message))
                await writer.drain()
                body = await reader.readexactly(read_length(await reader.readexactly(LENGTH.size)))
            except BaseException:
                writer.close()  # after a cancelled call too, because its reply may still arrive
                raise
            if self._closed:
                writer.close()
            else:
                self._idle.append((reader, writer))
        return unpack(body)

    async def _take(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof() and not writer.is_closing():
                return reader, writer
            writer.close()
        return await asyncio.open_connection(self._address.host, self._address.port, limit=1 << 20)

    async def close(self) -> None:
        """Close every idle connection, and each connection in use at the end of its call."""
        self._closed = True
        while self._idle:
            self._idle.pop()[1].close()
