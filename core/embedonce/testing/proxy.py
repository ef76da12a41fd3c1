"""A TCP proxy on loopback that injects network faults: latency, low bandwidth, loss, refusal, resets, cuts, garbage.

Put the proxy between a client and a real server, and set a fault while both run::

    with FaultProxy("127.0.0.1", 6379) as proxy:
        client = Client(proxy.url_port)
        proxy.fault = NetworkFault("black_hole")
        ...
        proxy.heal()

The proxy requires only the standard library, and runs in a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import sys
import threading
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar

T = TypeVar("T")

NetworkKind: TypeAlias = Literal[
    "latency",
    "bandwidth",
    "black_hole",
    "refuse",
    "reset",
    "cut",
    "garbage",
    "half_open",
]
Direction: TypeAlias = Literal["both", "requests", "replies"]

THREAD_TIMEOUT = 60.0
"""Seconds after which the proxy's own thread counts as hung."""
CHUNK = 2**16
"""Maximum number of bytes that are read and forwarded at a time."""
RESET = struct.pack("ii", 1, 0)
"""Value of ``SO_LINGER`` with which a socket sends a reset (RST) when it is closed."""
CAN_SHARE_PORT = sys.platform == "linux"
"""Whether two sockets can share a port: one that reserves the port, and one that listens."""
PIECES_PER_SECOND = 50
"""Maximum number of pieces per second that are forwarded when the bandwidth is limited."""


@dataclass(frozen=True, slots=True)
class NetworkFault:
    """One network fault between a client and its server.

    ==============  =================================================================================
    ``latency``     each chunk is held back for ``seconds`` and then forwarded
    ``bandwidth``   ``bytes_per_second`` is the maximum rate; below 100, each byte is sent separately
    ``black_hole``  connecting works, but nothing gets through until the fault ends. After the fault,
                    the data that was sent during the fault arrives, as if TCP had resent the data
    ``refuse``      nothing listens: new connections are refused, and live connections are reset
    ``reset``       live connections are reset immediately, and new connections as soon as they are made.
                    With ``after``, a connection is reset when that many bytes of its replies have
                    been forwarded
    ``cut``         a connection is closed when ``after`` bytes of its replies have been forwarded
    ``garbage``     all bytes of replies are random, except the first ``after`` bytes
    ``half_open``   the server's side of each live connection disappears without notice, so that the
                    client never gets a reply. New connections work
    ==============  =================================================================================

    The bytes of replies are counted per connection. Each count starts at 0 when the fault is set or
    when the connection is made, whichever is later. ``direction`` applies to ``latency``, ``bandwidth`` and
    ``black_hole``. With ``"replies"``, the server gets every request immediately, and only replies are
    delayed or held back.
    """

    kind: NetworkKind
    seconds: float = field(default=0.1, kw_only=True)
    bytes_per_second: float = field(default=10.0, kw_only=True)
    after: int | None = field(default=None, kw_only=True)
    direction: Direction = field(default="both", kw_only=True)

    def affects(self, direction: Direction) -> bool:
        """Return whether traffic in this direction is delayed or held back."""
        return self.direction in ("both", direction)


class FaultProxy:
    """Listens on 127.0.0.1 and connects each client to a server. The active :attr:`fault` disturbs these connections.

    ``host`` may be the path of a Unix socket; ``port`` is then None. If the server is down, a client's
    connection is reset instead of refused, because the proxy accepts the connection before it connects to the server.

    Use the proxy as a context manager, or call :meth:`close`. Any thread may set :attr:`fault` at any time.
    """

    def __init__(self, host: str, port: int | None = None) -> None:
        self._upstream = (host, port)
        self._fault: NetworkFault | None = None
        self._links: set[_Link] = set()
        self._changed = asyncio.Event()
        self._listener: socket.socket | None = None
        self._reserved: socket.socket | None = None
        self._port = 0
        self.accepted = 0
        """Number of connections accepted so far."""
        self._loop = asyncio.SelectorEventLoop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="embedonce-proxy", daemon=True)
        self._thread.start()
        try:
            self._run_on_loop(self._listen())
        except BaseException:
            self._stop_thread()
            raise

    @property
    def address(self) -> tuple[str, int]:
        """Host and port for a client; they never change."""
        return "127.0.0.1", self._port

    @property
    def url_port(self) -> str:
        """The address as ``host:port``, for a URL."""
        return f"127.0.0.1:{self._port}"

    @property
    def connections(self) -> int:
        """Number of open connections, including half-open ones."""
        return len(self._links)

    @property
    def fault(self) -> NetworkFault | None:
        """The active fault, or None. Setting this attribute affects live connections immediately."""
        return self._fault

    @fault.setter
    def fault(self, fault: NetworkFault | None) -> None:
        self._run_on_loop(self._set_fault(fault))

    def heal(self) -> None:
        """End the fault. Connections that the fault has closed or silenced do not recover."""
        self.fault = None

    def close(self) -> None:
        """Close every connection and stop listening. A second call does nothing."""
        if not self._loop.is_closed():
            self._run_on_loop(self._stop_serving())
            self._stop_thread()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- on the proxy's own loop ----------------------------------------------------------------

    def _run_on_loop(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if self._loop.is_closed():
            coroutine.close()
            raise RuntimeError("the proxy is closed")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(THREAD_TIMEOUT)

    def _stop_thread(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(THREAD_TIMEOUT)
        self._loop.close()
        if self._reserved is not None:
            self._reserved.close()

    async def _listen(self) -> None:
        if self._reserved is None and CAN_SHARE_PORT:
            # This socket keeps other programs from getting the port. It never listens, so it accepts no connections.
            self._reserved = socket.socket()
            self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            self._reserved.bind(("127.0.0.1", 0))
            self._port = self._reserved.getsockname()[1]
        if self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", self._port), backlog=100, reuse_port=CAN_SHARE_PORT)
            self._listener.setblocking(False)
            self._port = self._listener.getsockname()[1]
            self._loop.add_reader(self._listener, self._accept, self._listener)

    def _accept(self, listening: socket.socket) -> None:
        # This is a callback, not an asyncio task. If a task were cancelled just after accepting a client, nothing would
        # close the client's socket.
        with contextlib.suppress(OSError):  # the client is already gone
            client, _ = listening.accept()
            client.setblocking(False)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.accepted += 1
            link = _Link(self, client)
            self._links.add(link)
            link.task.add_done_callback(lambda _: self._links.discard(link))

    async def _set_fault(self, fault: NetworkFault | None) -> None:
        self._fault = fault
        self._changed.set()
        self._changed = asyncio.Event()
        refuses = fault is not None and fault.kind == "refuse"
        if refuses:
            self._stop_listening()
        links = list(self._links)
        for link in links:
            link.apply_fault(fault)
        if _is_immediate_reset(fault) and links:
            await asyncio.wait([link.task for link in links])
        if not refuses:
            await self._listen()

    def _stop_listening(self) -> None:
        listening, self._listener = self._listener, None
        if listening is not None:
            self._loop.remove_reader(listening)
            # close() is not enough, because the port stays open while a forked child has a copy of the socket.
            with contextlib.suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)
            listening.close()

    async def _stop_serving(self) -> None:
        await self._set_fault(NetworkFault("refuse"))

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to the server."""
        host, port = self._upstream
        if port is None:
            return await asyncio.open_unix_connection(host)
        return await asyncio.open_connection(host, port)

    async def wait_unless_changed(self, seconds: float | None) -> bool:
        """Wait up to ``seconds``; return True after that time, or False as soon as the fault changes."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), seconds)
            return False
        return True


def _is_immediate_reset(fault: NetworkFault | None) -> bool:
    """Return whether a fault resets connections immediately."""
    return fault is not None and (fault.kind == "refuse" or (fault.kind == "reset" and fault.after is None))


class _Reset(Exception):
    """Raised to reset a connection."""


class _Cut(Exception):
    """Raised to close a connection."""


class _Link:
    """A client's connection and the matching connection to the server."""

    def __init__(self, proxy: FaultProxy, client: socket.socket) -> None:
        self._proxy = proxy
        self._sockets = [client]
        self._writers: list[asyncio.StreamWriter] = []
        self._replies: asyncio.Task[None] | None = None
        self._random = random.Random(0)
        self._replied = 0
        self._is_silent = False
        self.task = asyncio.create_task(self._forward())
        """The asyncio task that forwards in both directions; it ends when both sockets are closed."""
        # If the task is cancelled before it starts, only this callback closes the client's socket.
        self.task.add_done_callback(lambda _: client.close())
        if _is_immediate_reset(proxy.fault):
            self._reset()

    def apply_fault(self, fault: NetworkFault | None) -> None:
        """Apply a new fault: count reply bytes from 0 again, and reset or silence the connection if necessary."""
        self._replied = 0
        if _is_immediate_reset(fault):
            self._reset()
        elif fault is not None and fault.kind == "half_open" and self._replies is not None:
            self._is_silent = True
            self._replies.cancel()
            self._writers[1].transport.abort()

    def _reset(self) -> None:
        """Reset both sockets, even if there is data left to send."""
        for one in self._sockets:
            with contextlib.suppress(OSError):  # the socket is already closed
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        for writer in self._writers:
            writer.transport.abort()
        self.task.cancel()

    async def _forward(self) -> None:
        """Forward in both directions until both directions have ended."""
        pumps: list[asyncio.Task[None]] = []
        try:
            client = await self._open_stream(asyncio.open_connection(sock=self._sockets[0]))
            server = await self._open_stream(self._proxy.connect())
            pumps.append(asyncio.create_task(self._pump(client[0], server[1], "requests")))
            self._replies = asyncio.create_task(self._pump(server[0], client[1], "replies"))
            pumps.append(self._replies)
            done, _ = await asyncio.wait(pumps, return_when=asyncio.FIRST_EXCEPTION)
            for pump in done:
                if not pump.cancelled():
                    pump.result()
        except _Cut:
            pass
        except (OSError, _Reset):
            self._reset()
        finally:
            for pump in pumps:
                pump.cancel()
            for writer in self._writers:
                writer.close()
            for writer in self._writers:
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

    async def _open_stream(
        self, opening: Coroutine[Any, Any, tuple[asyncio.StreamReader, asyncio.StreamWriter]]
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await opening
        self._writers.append(writer)
        self._sockets.append(writer.get_extra_info("socket"))
        return reader, writer

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Direction) -> None:
        while chunk := await reader.read(CHUNK):
            while chunk and not self._is_silent:
                chunk = await self._deliver(chunk, writer, direction)
        while (fault := self._proxy.fault) is not None and fault.kind == "black_hole" and fault.affects(direction):
            await self._proxy.wait_unless_changed(None)
        if not self._is_silent:
            writer.write_eof()

    async def _deliver(self, chunk: bytes, writer: asyncio.StreamWriter, direction: Direction) -> bytes:
        """Forward what the fault lets through, and return the rest. In a black hole, wait until the fault changes."""
        fault = self._proxy.fault
        piece = chunk
        if fault is not None and fault.affects(direction):
            if fault.kind == "black_hole":
                await self._proxy.wait_unless_changed(None)
                return chunk
            pause = 0.0
            if fault.kind == "latency":
                pause = fault.seconds
            elif fault.kind == "bandwidth":
                piece = chunk[: max(1, int(fault.bytes_per_second / PIECES_PER_SECOND))]
                pause = len(piece) / fault.bytes_per_second
            if pause and not await self._proxy.wait_unless_changed(pause):
                return chunk
        if fault is not None and direction == "replies":
            piece = self._damage_reply(fault, piece)
        if self._is_silent:
            return b""
        writer.write(piece)
        await writer.drain()
        if fault is not None and direction == "replies":
            self._end_after_reply(fault)
        return chunk[len(piece) :]

    def _damage_reply(self, fault: NetworkFault, piece: bytes) -> bytes:
        """Return ``piece``, a part of a reply, as the client gets it: complete, shortened or with random bytes."""
        left = max(0, (fault.after or 0) - self._replied)
        if fault.kind == "garbage":
            piece = piece[:left] + self._random.randbytes(len(piece[left:]))
        elif fault.kind in ("cut", "reset"):
            piece = piece[:left]
        self._replied += len(piece)
        return piece

    def _end_after_reply(self, fault: NetworkFault) -> None:
        if fault is self._proxy.fault and self._replied >= (fault.after or 0):
            if fault.kind == "cut":
                raise _Cut
            if fault.kind == "reset":
                raise _Reset
