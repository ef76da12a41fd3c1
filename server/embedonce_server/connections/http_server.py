"""uvicorn's server with bounded connections, without its signal handlers, and with a drain at the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn

from .protocol import BoundedProtocol, Limits, WorkerState

log = logging.getLogger("embedonce.serve")

LINGER_SECONDS = 0.25
"""Time for which idle connections stay open in a drain. A client may have sent a request on one of them just now."""
POLL_SECONDS = 0.02
CANCEL_SECONDS = 0.5
"""Time that cancelled requests get to end."""
REPORT_SECONDS = 60.0
"""Minimum time between two log lines about refused requests."""

MIN_DESCRIPTORS = 8192
"""Number of files and sockets that a worker may have open, if the system allows that."""
OTHER_DESCRIPTORS = 256
"""Files and sockets beside the connections of clients."""


class WorkerServer(uvicorn.Server):
    """uvicorn's server with bounded connections, without its own signal handlers, and with a drain."""

    def __init__(
        self, app: Any, *, limits: Limits | None = None, private: Path | None = None, on_start: Callable[[], None]
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=BoundedProtocol,
                ws="none",
                lifespan="on",
                interface="asgi3",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
            )
        )
        self.state = WorkerState(limits)
        self.server_state = self.state
        self.deadline = 0.0
        """End of the drain on ``time.monotonic``."""
        self._private = private
        self._on_start = on_start
        self._reported: Counter[str] = Counter()
        self._reported_at = -REPORT_SECONDS
        self.sweeps = 0
        """Number of times that all connections were checked."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to the worker."""
        yield

    def begin_drain(self, timeout: float) -> None:
        """Accept no more connections, and answer what is under way within ``timeout`` seconds."""
        self.deadline = time.monotonic() + timeout
        self.state.is_draining = True
        for connection in self.state.connections:
            connection.shutdown()
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        private = []
        if self._private is not None:
            # This comes first, so that the other workers can reach each worker that answers requests. Otherwise an
            # erasure could leave out a memory tier that has an entry already.
            listener = _bind_private(self._private)
            private.append(await loop.create_unix_server(self._make_private_connection, sock=listener))
        await super().startup(sockets)
        self.servers += private
        self._sweep_at(loop, loop.time())
        self._on_start()

    def _make_private_connection(self) -> BoundedProtocol:
        connection = BoundedProtocol(self.config, self.server_state, self.lifespan.state)
        connection.is_private = True
        return connection

    def _sweep_at(self, loop: asyncio.AbstractEventLoop, before: float) -> None:
        loop.call_later(self.state.limits.sweep_seconds, self._sweep, loop, before)

    def _sweep(self, loop: asyncio.AbstractEventLoop, before: float) -> None:
        now = loop.time()
        for connection in list(self.state.connections):
            if isinstance(connection, BoundedProtocol):
                connection.check_time(now, now - before)
        self._report_refused(now)
        self.sweeps += 1
        self._sweep_at(loop, now)

    def _report_refused(self, now: float) -> None:
        """Log how many requests were refused, at most once per minute, because clients could fill the log."""
        new = self.state.refused - self._reported
        if new and now - self._reported_at >= REPORT_SECONDS:
            counts = ", ".join(f"{count} x {reason}" for reason, count in sorted(new.items()))
            log.warning("refused requests and connections since the last line like this: %s", counts)
            self._reported, self._reported_at = self.state.refused.copy(), now

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what is under way until the deadline, then close all connections."""
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        idle_until = time.monotonic() + LINGER_SECONDS
        while time.monotonic() < self.deadline and (self._count_active() or time.monotonic() < idle_until):
            await asyncio.sleep(POLL_SECONDS)
        if active := self._count_active():
            cut = (
                "1 request was cut off, because it"
                if active == 1
                else f"{active:,} requests were cut off, because they"
            )
            log.warning("%s took longer than drain_timeout", cut)
        for task in list(self.state.tasks):
            task.cancel()
        if self.state.tasks:
            await asyncio.wait(list(self.state.tasks), timeout=CANCEL_SECONDS)
        for connection in list(self.state.connections):
            connection.transport.close()
        await self.lifespan.shutdown()

    def _count_active(self) -> int:
        """Return the number of requests that are being received or answered."""
        receiving = sum(
            isinstance(connection, BoundedProtocol) and not connection.is_waiting
            for connection in self.state.connections
        )
        return max(receiving, len(self.state.tasks))


def _bind_private(path: Path) -> socket.socket:
    """Return a listening Unix socket that only this user can connect to."""
    path.unlink(missing_ok=True)  # an earlier worker with this number may have been killed
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(128)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def choose_limits() -> Limits:
    """Let this process open enough sockets, and return limits that fit what the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MIN_DESCRIPTORS:
        wanted = MIN_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(MIN_DESCRIPTORS, hard)
        with contextlib.suppress(OSError, ValueError):  # the system has another limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    limits = Limits()
    if soft != resource.RLIM_INFINITY and soft < 2 * limits.connections + OTHER_DESCRIPTORS:
        connections = max((soft - OTHER_DESCRIPTORS) // 2, 16)
        log.warning(
            "the system allows %d open files, so a worker has at most %d connections; raise the limit with ulimit -n",
            soft,
            connections,
        )
        return Limits(connections=connections)
    return limits
