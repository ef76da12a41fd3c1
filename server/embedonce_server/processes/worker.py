"""One worker process: its service, its HTTP server, and its end.

Only the supervisor starts ``python -m embedonce_server.processes.worker``. It is connected to its standard input.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import uvloop

from embedonce.config import Config
from embedonce.errors import EmbedonceError
from embedonce_server import access_log
from embedonce_server.app import App
from embedonce_server.connections.http_server import WorkerServer, choose_limits
from embedonce_server.service import Service

from .launch import MAX_MESSAGE, Launch, Source, encode_message, encode_problems
from .logs import set_up_logging

log = logging.getLogger("embedonce.serve")

PREPARE_SECONDS = 30.0
"""Maximum number of seconds that a worker waits for its providers before it answers requests. They go on after that."""

END_MARGIN = 2.0
"""Seconds after the drain timeout until a worker that still runs is ended."""


class Worker:
    """One process that answers requests."""

    def __init__(self, launch: Launch, config: Config, sockets: Sequence[socket.socket]) -> None:
        """Compose the tiers and the models.

        Raises:
            ConfigError: the configuration cannot be used.
        """
        access_log.is_on = launch.has_access_log
        self.launch = launch
        self.service = Service(config, run=launch.folder, worker=launch.worker)
        self._sockets = list(sockets)
        self._signals: list[int] = []
        self._timeouts: SimpleQueue[float] = SimpleQueue()
        """Gets the drain timeout when the end begins."""
        self._preparing: asyncio.Task[None] | None = None
        self._app = App(self.service)
        self._server = WorkerServer(
            self._app,
            limits=choose_limits(),
            private=launch.folder.get_socket(launch.worker),
            on_start=self._be_ready,
        )

    def run(self) -> Sequence[int]:
        """Serve until a signal or the end of the supervisor. Return the numbers of the signals."""
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve())
        return self._signals

    def stop(self, number: int, frame: object = None) -> None:
        """Stop within the drain timeout because of a signal. A second signal ends the process at once.

        It is a handler of ``signal.signal``, because those of the event loop do not run while a system call blocks the
        loop. It may interrupt any code, so a first signal waits for no lock.
        """
        if self._signals:
            self.end_now(128 + number)
        self._signals.append(number)
        self._timeouts.put(self.service.generation.settings.drain_timeout)
        with contextlib.suppress(RuntimeError):  # the loop is closed, so the worker is ending already
            self._loop.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Stop within the drain timeout."""
        if self.service.state == "draining":
            return
        self.service.state = "draining"
        if self._preparing is not None:
            self._preparing.cancel()
        timeout = self.service.generation.settings.drain_timeout
        log.info("stopping: waiting up to %g s for the current requests", timeout)
        self._server.begin_drain(timeout)
        self._timeouts.put(timeout)

    def end_now(self, code: int) -> None:
        """End the process at once, without waiting for its threads."""
        logging.shutdown()  # it writes the last lines
        os._exit(code)

    def reload(self, config: Config) -> None:
        """Use ``[serve]`` of another configuration.

        Raises:
            ConfigError: it cannot be used; nothing has changed.
        """
        self.service.reload(config)
        if self.service.state != "draining":
            self._prepare_models()

    async def prepare(self) -> None:
        """Do what must be done on the event loop before the first request."""

    async def wait_to_listen(self) -> None:
        """Wait until the worker may listen."""

    async def watch(self) -> None:
        """Run beside the server."""

    def on_ready(self) -> None:
        """Report that requests are being answered."""

    def _limit_end(self) -> None:
        """End the process if it still runs after the drain timeout.

        A thread that hangs, for example in a client of a tier, would keep it from ending, and so would a callback that
        blocks the event loop.
        """
        time.sleep(self._timeouts.get() + END_MARGIN)
        self._give_up()

    def _give_up(self) -> None:
        log.error("the worker has not ended within drain_timeout; ending it now")
        self.end_now(1)

    def _be_ready(self) -> None:
        if self.service.state == "starting":
            self.service.state = "ready"
        self.on_ready()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._limit_end, name="embedonce end", daemon=True).start()
        await self.prepare()
        beside = asyncio.create_task(self._watch())
        try:
            if self.service.state == "starting":
                await asyncio.wait([self._prepare_models()], timeout=PREPARE_SECONDS)
            if self.service.state == "starting":
                await self.wait_to_listen()
            if self.service.state == "starting":
                await self._server.serve(self._sockets)
        finally:
            self.service.state = "draining"
            beside.cancel()
            await asyncio.wait([beside])
            try:
                await self.service.close(max(self._server.deadline - time.monotonic(), 0.0))
            finally:
                self._app.metrics.close()

    def _prepare_models(self) -> asyncio.Task[None]:
        """Prepare the models in a thread, because importing a library would block the event loop."""
        self._preparing = asyncio.create_task(asyncio.to_thread(self.service.generation.models.prepare))
        return self._preparing

    async def _watch(self) -> None:
        try:
            await self.watch()
        except Exception:
            log.exception("the worker stops because of an unexpected error")
            self.drain()


# --- a worker with a supervisor -----------------------------------------------------------------


class SupervisedWorker(Worker):
    """A worker that a supervisor has started. Its messages come and go through a pair of sockets."""

    def __init__(self, launch: Launch, config: Config, control: socket.socket) -> None:
        sockets = [socket.socket(fileno=descriptor) for descriptor in launch.listeners]
        super().__init__(launch, config, sockets)
        self._control = control
        self._may_listen = asyncio.Event()

    async def prepare(self) -> None:
        signal.signal(signal.SIGTERM, self.stop)
        self._reader, self._writer = await asyncio.open_connection(sock=self._control, limit=MAX_MESSAGE)
        if self.launch.latest is not None:
            self._use(self.launch.latest)

    def drain(self) -> None:
        super().drain()
        self._may_listen.set()

    async def wait_to_listen(self) -> None:
        # The supervisor first sends the configuration of a reload that this worker has missed while it started.
        self._send({"prepared": True})
        await self._may_listen.wait()

    async def watch(self) -> None:
        """Listen and reload when the supervisor says so. Drain when the supervisor has ended."""
        try:
            while line := await self._read_line():
                message = json.loads(line)
                if "listen" in message:
                    self._may_listen.set()
                    continue
                try:
                    self._use(Source(**message["reload"]))
                except EmbedonceError as error:
                    self._send({"problems": encode_problems(error)})
                else:
                    self._send({"reloaded": True})
        finally:
            self._writer.close()
        if self.service.state != "draining":
            log.error("the supervisor has ended, so this worker stops")
        self.drain()

    def on_ready(self) -> None:
        self._send({"ready": {"models": self.service.generation.models.names}})

    def _use(self, source: Source) -> None:
        self.reload(self.launch.apply_options(source.load()))

    async def _read_line(self) -> bytes:
        try:
            return await self._reader.readline()
        except OSError:  # the supervisor was killed
            return b""

    def _send(self, message: dict[str, Any]) -> None:
        self._writer.write(encode_message(message))


def main() -> None:
    """Run the worker that the supervisor describes, and exit."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the supervisor passes it on
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # reloads come from the supervisor
    control = _take_stdin()
    line = _read_first_line(control)
    if not line:
        sys.exit(1)
    launch = Launch.decode(line)
    for descriptor in (*launch.listeners, *launch.locks):
        os.set_inheritable(descriptor, False)
    set_up_logging(worker=launch.worker)
    try:
        worker = SupervisedWorker(launch, launch.apply_options(launch.source.load()), control)
    except EmbedonceError as error:
        control.sendall(encode_message({"problems": encode_problems(error)}))
        sys.exit(1)
    worker.run()
    _remove_abandoned_folder(launch)


def _take_stdin() -> socket.socket:
    """Return the connection to the supervisor, and leave an empty standard input for everything else."""
    control = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return control


def _read_first_line(control: socket.socket) -> bytes:
    """Return the first message, after which the supervisor sends nothing until the worker is ready."""
    data = bytearray()
    while not data.endswith(b"\n"):
        part = control.recv(1 << 16)
        if not part:
            return b""
        data += part
    return bytes(data)


def _remove_abandoned_folder(launch: Launch) -> None:
    """Remove the temporary folder if the supervisor was killed, and this is the last worker to end."""
    folder: Path = launch.folder.path
    launch.folder.get_socket(launch.worker).unlink(missing_ok=True)
    if os.getppid() != launch.supervisor and not any(folder.glob("*.sock")):
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
