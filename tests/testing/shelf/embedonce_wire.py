"""A store behind TCP: a short server, and a backend that handles its connection as a network backend must."""

from __future__ import annotations

import json
import os
import socket
import socketserver
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from embedonce.contracts import Capabilities, time_left

MAX_BYTES = 2**26


class Server(socketserver.ThreadingTCPServer):
    """Holds values by store and key; each message is four bytes of length and JSON."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.stores: dict[str, dict[str, str]] = {}
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class _Handler(socketserver.BaseRequestHandler):
    server: Server

    def handle(self) -> None:
        try:
            while True:
                request = receive(self.request)
                store = self.server.stores.setdefault(request["store"], {})
                store.update(request.get("set", {}))
                send(self.request, {key: store[key] for key in request.get("get", ()) if key in store})
        except (OSError, ValueError):
            return


def send(connection: socket.socket, message: Any) -> None:
    data = json.dumps(message).encode()
    connection.sendall(len(data).to_bytes(4, "big") + data)


def receive(connection: socket.socket) -> Any:
    length = int.from_bytes(_receive_exactly(connection, 4), "big")
    if length > MAX_BYTES:
        raise ValueError("invalid length of a reply")
    return json.loads(_receive_exactly(connection, length))


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionError("the connection has ended")
        data += part
    return data


class WireBackend:
    """One connection, guarded by a lock; a call that fails drops it, and a forked child makes its own."""

    capabilities = Capabilities(scope="network", deadline=True)
    call_timeout = 60.0
    """Seconds that a call without a deadline waits."""

    def __init__(self, *, host: str, port: int, store: str) -> None:
        self.host, self.port, self.store = host, port, store
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        self._process = os.getpid()
        self._closed = False

    def get_many(self, keys: Sequence[str], /) -> Mapping[str, bytes]:
        found = self._call({"get": list(keys)})
        return {key: bytes.fromhex(value) for key, value in found.items()}

    def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        self._call({"set": {key: value.hex() for key, value in items.items()}})

    def close(self) -> None:
        self._closed = True
        self._drop()

    def _call(self, request: dict[str, Any]) -> Any:
        with self._lock:
            if self._closed:
                raise RuntimeError("this backend is closed")
            if self._process != os.getpid():
                self._leave_connection_to_parent()
            try:
                left = time_left()
                connection = self._connect(self.call_timeout if left is None else left)
                send(connection, {"store": self.store, **request})
                return self._receive(connection)
            except BaseException:
                self._drop()
                raise

    def _receive(self, connection: socket.socket) -> Any:
        return receive(connection)

    def _connect(self, timeout: float) -> socket.socket:
        if self._connection is None:
            self._connection = socket.create_connection((self.host, self.port), timeout)
        self._connection.settimeout(timeout)
        return self._connection

    def _leave_connection_to_parent(self) -> None:
        """Leave the connection to the parent. Closing the child's copy of the socket does not end it."""
        self._process = os.getpid()
        self._drop()

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class SharesItsConnectionAfterAFork(WireBackend):
    """Uses the parent's connection in a forked child, so that both read each other's replies."""

    call_timeout = 2.0  # seconds to wait for a reply that the other process has read

    def _leave_connection_to_parent(self) -> None:
        return

    def _receive(self, connection: socket.socket) -> Any:
        if self._process != os.getpid():
            time.sleep(0.01)  # so that the parent reads first in at least one call
        return super()._receive(connection)


class EndsTheConnectionOfItsChild(WireBackend):
    """Uses the parent's connection in a forked child; the parent's `close` ends it for both."""

    def _leave_connection_to_parent(self) -> None:
        return

    def close(self) -> None:
        if self._connection is not None:
            with suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
        super().close()
