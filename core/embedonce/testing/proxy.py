"""A TCP proxy on loopback that does what networks do: it delays, drips, swallows, refuses, resets, cuts, garbles.

Put it between a client and a real server, and say what goes wrong while both run::

    with FaultProxy("127.0.0.1", 6379) as proxy:
        client = Client(proxy.url_port)
        proxy.fault = NetworkFault("black_hole")
        ...
        proxy.heal()

The standard library only; the proxy runs in one thread of its own.
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

BOUND = 60.0
"""Seconds after which the proxy's own thread counts as one that hangs."""
CHUNK = 2**16
"""Most bytes that are passed on at once."""
RESET = struct.pack("ii", 1, 0)
"""``SO_LINGER`` of a socket that is closed without a word of goodbye."""
KEEPS_PORTS = sys.platform == "linux"
"""Whether two sockets may have one port, and clients reach the one that listens."""
PIECES_PER_SECOND = 50
"""Most pieces in which a narrow line delivers."""


@dataclass(frozen=True, slots=True)
class NetworkFault:
    """One thing that goes wrong between a client and its server.

    ==============  =================================================================================
    ``latency``     each chunk is passed on ``seconds`` after it came
    ``bandwidth``   ``bytes_per_second`` get through: a few drip a byte at a time
    ``black_hole``  connecting works, and then nothing gets through; what was sent meanwhile arrives
                    when the fault ends, late, as TCP would send it again
    ``refuse``      nobody listens: connecting is refused, and live connections are reset
    ``reset``       live connections are reset, and new ones as soon as they are made; with ``after``,
                    each is reset when so many bytes of its replies have been passed on
    ``cut``         each connection is closed after ``after`` bytes of its replies
    ``garbage``     the bytes of replies are random ones, from byte ``after`` on
    ``half_open``   the server's side of each live connection is gone, and the client is not told: it
                    hears nothing for ever. New connections work
    ==============  =================================================================================

    Bytes of replies are counted for each connection, from when the fault is set or the connection
    is made. ``direction`` is that of ``latency``, ``bandwidth`` and ``black_hole``: with
    ``"replies"`` the server does what is asked, and the client does not hear of it.
    """

    kind: NetworkKind
    seconds: float = field(default=0.1, kw_only=True)
    bytes_per_second: float = field(default=10.0, kw_only=True)
    after: int | None = field(default=None, kw_only=True)
    direction: Direction = field(default="both", kw_only=True)

    def concerns(self, direction: Direction) -> bool:
        """Tell whether what goes this way is delayed or held up."""
        return self.direction in ("both", direction)


class FaultProxy:
    """Listens on 127.0.0.1 and passes everything on to a server, except as its ``fault`` says.

    ``host`` may be the path of a Unix socket; ``port`` is then None. A server that is down shows as a
    reset, since the client is connected before the proxy is.

    Use it as a context manager, or :meth:`close` it. Any thread may set :attr:`fault`, at any time.
    """

    def __init__(self, host: str, port: int | None = None) -> None:
        self._upstream = (host, port)
        self._fault: NetworkFault | None = None
        self._links: set[_Link] = set()
        self._changed = asyncio.Event()
        self._listening: socket.socket | None = None
        self._kept: socket.socket | None = None
        self._port = 0
        self.accepted = 0
        """How many connections were made to it so far."""
        self._loop = asyncio.SelectorEventLoop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="embedonce-proxy", daemon=True)
        self._thread.start()
        try:
            self._run(self._listen())
        except BaseException:
            self._end()
            raise

    @property
    def address(self) -> tuple[str, int]:
        """Host and port for a client; they stay the same."""
        return "127.0.0.1", self._port

    @property
    def url_port(self) -> str:
        """The same as ``host:port``, as it stands in a URL."""
        return f"127.0.0.1:{self._port}"

    @property
    def connections(self) -> int:
        """How many connections there are now, silent ones included."""
        return len(self._links)

    @property
    def fault(self) -> NetworkFault | None:
        """What goes wrong now; None: nothing. Set, it strikes live connections at once."""
        return self._fault

    @fault.setter
    def fault(self, fault: NetworkFault | None) -> None:
        self._run(self._set(fault))

    def heal(self) -> None:
        """End the fault. Connections that it has ended or silenced stay so."""
        self.fault = None

    def close(self) -> None:
        """End every connection and stop listening. Calling it twice does nothing."""
        if not self._loop.is_closed():
            self._run(self._stop())
            self._end()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- on the proxy's own loop ----------------------------------------------------------------

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if self._loop.is_closed():
            coroutine.close()
            raise RuntimeError("the proxy is closed")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(BOUND)

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(BOUND)
        self._loop.close()
        if self._kept is not None:
            self._kept.close()

    async def _listen(self) -> None:
        if self._kept is None and KEEPS_PORTS:
            # Does not listen, and so refuses: while nobody listens, no other program is given the port.
            self._kept = socket.socket()
            self._kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            self._kept.bind(("127.0.0.1", 0))
            self._port = self._kept.getsockname()[1]
        if self._listening is None:
            self._listening = socket.create_server(("127.0.0.1", self._port), backlog=100, reuse_port=KEEPS_PORTS)
            self._listening.setblocking(False)
            self._port = self._listening.getsockname()[1]
            self._loop.add_reader(self._listening, self._accept, self._listening)

    def _accept(self, listening: socket.socket) -> None:
        # Not through a task: whatever ends one between accepting and what follows would leave a client without an end.
        with contextlib.suppress(OSError):  # it has gone again
            client, _ = listening.accept()
            client.setblocking(False)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.accepted += 1
            link = _Link(self, client)
            self._links.add(link)
            link.task.add_done_callback(lambda _: self._links.discard(link))

    async def _set(self, fault: NetworkFault | None) -> None:
        self._fault = fault
        self._changed.set()
        self._changed = asyncio.Event()
        refuses = fault is not None and fault.kind == "refuse"
        if refuses:
            self._stop_listening()
        links = list(self._links)
        for link in links:
            link.struck(fault)
        if _resets(fault) and links:
            await asyncio.wait([link.task for link in links])
        if not refuses:
            await self._listen()

    def _stop_listening(self) -> None:
        listening, self._listening = self._listening, None
        if listening is not None:
            self._loop.remove_reader(listening)
            with contextlib.suppress(OSError):  # a forked child may hold a copy: closing alone would not do
                listening.shutdown(socket.SHUT_RDWR)
            listening.close()

    async def _stop(self) -> None:
        await self._set(NetworkFault("refuse"))

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to the server."""
        host, port = self._upstream
        if port is None:
            return await asyncio.open_unix_connection(host)
        return await asyncio.open_connection(host, port)

    async def unchanged_for(self, seconds: float | None) -> bool:
        """Wait, and return True if the fault is still the same; False as soon as it is not."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), seconds)
            return False
        return True


def _resets(fault: NetworkFault | None) -> bool:
    """Tell whether a fault ends connections at once."""
    return fault is not None and (fault.kind == "refuse" or (fault.kind == "reset" and fault.after is None))


class _Reset(Exception):
    """A connection is to be reset."""


class _Cut(Exception):
    """A connection is to be closed."""


class _Link:
    """One connection of a client, and that to the server which belongs to it."""

    def __init__(self, proxy: FaultProxy, client: socket.socket) -> None:
        self._proxy = proxy
        self._sockets = [client]
        self._writers: list[asyncio.StreamWriter] = []
        self._replies: asyncio.Task[None] | None = None
        self._random = random.Random(0)
        self._replied = 0
        self._silent = False
        self.task = asyncio.create_task(self._run())
        """Ends when both sockets are closed."""
        self.task.add_done_callback(lambda _: client.close())  # it may be cancelled before it has begun
        if _resets(proxy.fault):
            self._reset()

    def struck(self, fault: NetworkFault | None) -> None:
        """Count replies anew; end or go silent where the fault says so."""
        self._replied = 0
        if _resets(fault):
            self._reset()
        elif fault is not None and fault.kind == "half_open" and self._replies is not None:
            self._silent = True
            self._replies.cancel()
            self._writers[1].transport.abort()

    def _reset(self) -> None:
        """End with both sockets closed without a goodbye, whatever is still to be sent."""
        for one in self._sockets:
            with contextlib.suppress(OSError):  # closed already
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        for writer in self._writers:
            writer.transport.abort()
        self.task.cancel()

    async def _run(self) -> None:
        """Pass on both ways until both have come to an end."""
        pumps: list[asyncio.Task[None]] = []
        try:
            client = await self._opened(asyncio.open_connection(sock=self._sockets[0]))
            server = await self._opened(self._proxy.connect())
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

    async def _opened(
        self, opening: Coroutine[Any, Any, tuple[asyncio.StreamReader, asyncio.StreamWriter]]
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await opening
        self._writers.append(writer)
        self._sockets.append(writer.get_extra_info("socket"))
        return reader, writer

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Direction) -> None:
        while chunk := await reader.read(CHUNK):
            while chunk and not self._silent:
                chunk = await self._deliver(chunk, writer, direction)
        while (fault := self._proxy.fault) is not None and fault.kind == "black_hole" and fault.concerns(direction):
            await self._proxy.unchanged_for(None)
        if not self._silent:
            writer.write_eof()

    async def _deliver(self, chunk: bytes, writer: asyncio.StreamWriter, direction: Direction) -> bytes:
        """Pass on what the fault lets through, and return what is left; or wait until it is another fault."""
        fault = self._proxy.fault
        piece = chunk
        if fault is not None and fault.concerns(direction):
            if fault.kind == "black_hole":
                await self._proxy.unchanged_for(None)
                return chunk
            pause = 0.0
            if fault.kind == "latency":
                pause = fault.seconds
            elif fault.kind == "bandwidth":
                piece = chunk[: max(1, int(fault.bytes_per_second / PIECES_PER_SECOND))]
                pause = len(piece) / fault.bytes_per_second
            if pause and not await self._proxy.unchanged_for(pause):
                return chunk
        if fault is not None and direction == "replies":
            piece = self._reply(fault, piece)
        if self._silent:
            return b""
        writer.write(piece)
        await writer.drain()
        if fault is not None and direction == "replies":
            self._end_reply(fault)
        return chunk[len(piece) :]

    def _reply(self, fault: NetworkFault, piece: bytes) -> bytes:
        """Return what of a reply's piece the client gets."""
        left = max(0, (fault.after or 0) - self._replied)
        if fault.kind == "garbage":
            piece = piece[:left] + self._random.randbytes(len(piece[left:]))
        elif fault.kind in ("cut", "reset"):
            piece = piece[:left]
        self._replied += len(piece)
        return piece

    def _end_reply(self, fault: NetworkFault) -> None:
        if fault is self._proxy.fault and self._replied >= (fault.after or 0):
            if fault.kind == "cut":
                raise _Cut
            if fault.kind == "reset":
                raise _Reset
