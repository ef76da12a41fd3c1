"""A server of ``embedonce_server`` in a thread, with a small application, and a client that sends raw bytes."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvloop
from patience import LONG_TIMEOUT, wait_until

from embedonce_server.connections.http_server import WorkerServer
from embedonce_server.connections.listening import Address, bind_addresses
from embedonce_server.connections.protocol import Limits

PATIENT = Limits(
    head_seconds=LONG_TIMEOUT,
    body_seconds=LONG_TIMEOUT,
    pause_seconds=LONG_TIMEOUT,
    discard_seconds=LONG_TIMEOUT,
    unread_seconds=LONG_TIMEOUT,
    idle_seconds=LONG_TIMEOUT,
    sweep_seconds=0.005,
)
"""Limits of a server in tests: no time is short. A test shortens those that it is about."""


class Client:
    """A connection that sends and receives bytes."""

    def __init__(self, place: Any) -> None:
        family = socket.AF_UNIX if isinstance(place, str) else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        self.socket.settimeout(LONG_TIMEOUT)
        try:
            self.socket.connect(place)
        except OSError:
            self.socket.close()
            raise
        self._data = b""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *args: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def send_until_refused(self, data: bytes, times: int) -> None:
        """Send data many times, until the server does not read any more."""
        try:
            for _ in range(times):
                self.socket.sendall(data)
        except OSError:
            pass

    def get(self, path: str, *headers: str) -> None:
        self.send(make_request("GET", path, *headers))

    def read_answer(self) -> tuple[int, dict[str, str], bytes]:
        """Return the status, the headers and the body of the next answer."""
        while b"\r\n\r\n" not in self._data:
            self._receive()
        head, _, self._data = self._data.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        status = int(first.split()[1])
        if status < 200:
            return status, headers, b""
        length = int(headers["content-length"])
        while len(self._data) < length:
            self._receive()
        body, self._data = self._data[:length], self._data[length:]
        return status, headers, body

    def _receive(self) -> None:
        part = self.socket.recv(1 << 16)
        assert part, f"the server has closed the connection after {self._data[-200:]!r}"
        self._data += part

    def read_to_end(self) -> bytes:
        """Return everything up to the end of the connection. A reset is an end, too."""
        data, self._data = self._data, b""
        try:
            while part := self.socket.recv(1 << 20):
                data += part
        except ConnectionError:
            pass
        return data


def make_request(method: str, path: str, *headers: str, body: bytes = b"") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: x", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


class SmallApp:
    """Answers ``/`` at once, ``/echo`` with the body, ``/early`` before the body, ``/hold`` when told to, …"""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.holding = 0
        self.listening = 0
        self.cancelled = 0
        self.disconnected = 0
        self.scopes: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        self.scopes.append(scope)
        path, body, status = scope["path"], b"ok", 200
        if path == "/echo":
            body = await self._read(receive)
        elif path == "/early":
            status = 413
        elif path == "/hold":
            await self._hold()
        elif path == "/gone":
            while (await receive())["type"] != "http.disconnect":
                self.listening += 1
            self.disconnected += 1
            return
        elif path.startswith("/big/"):
            body = b"x" * int(path[5:])
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _hold(self) -> None:
        self.holding += 1
        try:
            while not self.release.is_set():
                await asyncio.sleep(0.002)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.holding -= 1

    async def _read(self, receive: Any) -> bytes:
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.disconnected += 1
                return b""
            body += message["body"]
            if not message["more_body"]:
                return body

    async def _live(self, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})


class ThreadedServer:
    """A server in a thread of this process."""

    def __init__(self, limits: Limits, private: Path | None = None) -> None:
        self.app = SmallApp()
        self._ready = threading.Event()
        listeners = bind_addresses([Address(socket.AF_INET, ("127.0.0.1", 0))], 0)
        self.place = listeners[0].getsockname()
        self.server = WorkerServer(self.app, limits=limits, private=private, on_start=self._ready.set)
        self._thread = threading.Thread(target=self._run, args=(listeners,))
        self._thread.start()
        assert self._ready.wait(LONG_TIMEOUT)

    def _run(self, listeners: list[socket.socket]) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            self.loop = runner.get_loop()
            runner.run(self.server.serve(listeners))

    def connect(self) -> Client:
        return Client(self.place)

    def begin_drain(self, timeout: float) -> None:
        self.loop.call_soon_threadsafe(self.server.begin_drain, timeout)

    def join(self) -> None:
        self._thread.join(LONG_TIMEOUT)
        assert not self._thread.is_alive()

    def close(self) -> None:
        self.app.release.set()
        if self._thread.is_alive():
            self.begin_drain(0.0)
            self.join()

    @property
    def connections(self) -> int:
        return len(self.server.state.connections)

    def wait_for_connections(self, count: int) -> None:
        wait_until(lambda: self.connections == count)


@contextmanager
def run_server(limits: Limits = PATIENT, private: Path | None = None) -> Iterator[ThreadedServer]:
    server = ThreadedServer(limits, private)
    try:
        yield server
    finally:
        server.close()
