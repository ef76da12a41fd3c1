"""Starts several worker processes that share the listening sockets, watches them, and passes signals on to them."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from embedonce.config import Config
from embedonce.errors import ConfigError, Problem

from .launch import MAX_MESSAGE, Launch, Source, decode_problems, encode_message
from .reloading import Reloads
from .terminal import Terminal

log = logging.getLogger("embedonce.serve")

FIRST_PAUSE, LAST_PAUSE = 0.25, 30.0
"""Seconds before a worker is started again that has ended soon after its start. The pause doubles each time."""
SOON = 10.0
"""Seconds after its start until a worker counts as one that works."""
KILL_MARGIN = 4.0
"""Seconds after the drain timeout until a worker that still runs is killed. It should have ended itself before."""


class Supervisor:
    """The parent process of all workers. It answers no requests itself."""

    def __init__(
        self,
        launch: Launch,
        config: Config,
        sockets: Sequence[socket.socket],
        reloads: Reloads,
        announce: Callable[[Sequence[str]], None],
    ) -> None:
        self._launch = launch
        self._drain_timeout = config.serve.drain_timeout
        self._sockets = list(sockets)
        self._reloads = reloads
        self._announce = announce
        self._processes: dict[int, _Process] = {}
        """The running processes by the number of the worker."""
        self._signals: list[int] = []
        self._stop = asyncio.Event()
        self._hung_up = asyncio.Event()
        self._terminal = Terminal()

    def run(self) -> Sequence[int]:
        """Serve until a signal ends that. Return the numbers of the signals; a second one ends the server at once.

        Raises:
            ConfigError: a worker could not start, for example because a tier refuses its options.
        """
        asyncio.run(self._run())
        return self._signals

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._handle_stop, number)
        loop.add_signal_handler(signal.SIGHUP, self._hung_up.set)
        numbers = range(1, self._launch.workers + 1)
        keepers: list[asyncio.Task[None]] = []
        reloader: asyncio.Task[None] | None = None
        try:
            models = await self._start_all(numbers)
            if not self._stop.is_set():
                self._announce(models)
            keepers = [asyncio.create_task(self._keep(number)) for number in numbers]
            reloader = asyncio.create_task(self._reload_on_hang_up())
            await self._stop.wait()
        finally:
            if reloader is not None:
                reloader.cancel()
            await self._end_all(keepers)

    def _handle_stop(self, number: int) -> None:
        if self._signals:
            for process in self._processes.values():
                process.send_signal(signal.SIGKILL)
        self._signals.append(number)
        self._stop.set()

    # --- starting and watching ---

    async def _start_all(self, numbers: Sequence[int]) -> Sequence[str]:
        """Start all workers, and return the names of the models once all are ready.

        Raises:
            ConfigError: a worker could not start. All have the same configuration, so one error is enough.
        """
        started = [asyncio.create_task(self._start(number)) for number in numbers]
        stopped = asyncio.create_task(self._stop.wait())
        models: Sequence[str] = ()
        try:
            waiting = set(started)
            while waiting and not stopped.done():
                await asyncio.wait({*waiting, stopped}, return_when=asyncio.FIRST_COMPLETED)
                for ready in [start for start in waiting if start.done()]:
                    models = ready.result()
                    waiting.remove(ready)
        finally:
            for task in (*started, stopped):
                task.cancel()
            await asyncio.wait([*started, stopped])
        return models

    async def _start(self, number: int) -> Sequence[str]:
        """Start a worker, and return the names of its models once it is ready.

        Raises:
            ConfigError: it could not start.
        """
        process = self._processes[number] = await _Process.start(replace(self._launch, worker=number))
        answer = await process.read_answer()
        if "ready" not in answer:
            if "problems" in answer:
                raise decode_problems(answer["problems"])
            code = await process.wait()
            raise ConfigError([Problem(f"worker {number} {_describe_exit(code)} before it was ready")])
        process.is_ready = True
        log.info("worker %d (process %d) is ready", number, process.pid)
        if process.launch.latest is not self._launch.latest and self._launch.latest is not None:
            await self._reload_process(process, self._launch.latest)  # there was a reload while it started
        models: Sequence[str] = answer["ready"]["models"]
        return models

    async def _keep(self, number: int) -> None:
        """Start a worker again each time that it ends."""
        pause = 0.0
        while True:
            process = self._processes[number]
            code = await process.wait()
            if self._stop.is_set():
                return
            end = f"worker {number} (process {process.pid}) {_describe_exit(code)}"
            pause = 0.0 if process.age > SOON else _lengthen(pause)
            log.error("%s; starting it again%s", end, f" in {pause:g} s" if pause else "")
            while not await self._restart(number, pause):
                if self._stop.is_set():
                    return
                pause = _lengthen(pause)

    async def _restart(self, number: int, pause: float) -> bool:
        """Start a worker after a pause, and return whether there is a process, even if it cannot serve."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), max(pause, 0.001))
        if self._stop.is_set():
            return False
        try:
            await self._start(number)
        except ConfigError as error:
            for problem in error.problems:
                log.error("worker %d cannot start: %s", number, problem)
        except OSError as error:  # the system has no memory or no processes left
            log.error("worker %d cannot start: %s", number, error.strerror)
            return False
        return True

    # --- reloading ---

    async def _reload_on_hang_up(self) -> None:
        async for config in self._reloads.follow(self._hung_up, self._terminal):
            await self._reload_all(config)
        self._handle_stop(signal.SIGHUP)

    async def _reload_all(self, config: Config) -> None:
        """Let all workers use a configuration, or none.

        The first worker tries it. If another worker refuses what the first one uses, it is replaced by a new process.
        """
        source = Source.of(config)
        first: _Process | None = None
        for process in [process for process in self._processes.values() if process.is_ready]:
            answer = await process.reload(source)
            if "problems" in answer:
                self._reloads.report_refusal(decode_problems(answer["problems"]))
                return
            if "reloaded" in answer:
                first = process
                break
        if first is None:
            log.error("no worker is ready, so nothing was reloaded; send SIGHUP again")
            return
        self._launch = replace(self._launch, latest=source)
        self._drain_timeout = config.serve.drain_timeout
        others = [other for other in self._processes.values() if other.is_ready and other is not first]
        await asyncio.gather(*(self._reload_process(other, source) for other in others))
        self._reloads.report_success(config)

    async def _reload_process(self, process: _Process, source: Source) -> None:
        answer = await process.reload(source)
        if "problems" in answer:
            number = process.launch.worker
            for problem in decode_problems(answer["problems"]).problems:
                log.error("worker %d: %s", number, problem)
            log.error("worker %d could not reload; restarting it", number)
            process.send_signal(signal.SIGTERM)

    # --- the end ---

    async def _end_all(self, keepers: Sequence[asyncio.Task[None]]) -> None:
        """Stop accepting, and let all workers end; kill those that do not."""
        self._stop.set()
        for listener in self._sockets:
            listener.close()
        processes = list(self._processes.values())
        for process in processes:
            process.send_signal(signal.SIGTERM)
        ends = [asyncio.create_task(process.wait()) for process in processes]
        if ends:
            _, late = await asyncio.wait(ends, timeout=self._drain_timeout + KILL_MARGIN)
            if late:
                log.error("%d workers have not ended within drain_timeout; killing them", len(late))
            for process in processes:
                process.send_signal(signal.SIGKILL)
            await asyncio.wait(ends)
        for keeper in keepers:
            if not keeper.done():
                await asyncio.wait([keeper])
        for process in processes:
            process.close()


class _Process:
    """A worker process, and the connection to it."""

    def __init__(
        self,
        launch: Launch,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.launch = launch
        self.pid = process.pid
        self.is_ready = False
        self._process = process
        self._reader = reader
        self._writer = writer
        self._started = time.monotonic()
        self._turn = asyncio.Lock()

    @classmethod
    async def start(cls, launch: Launch) -> _Process:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    *_list_flags(),
                    "-m",
                    "embedonce_server.processes.worker",
                    stdin=theirs.fileno(),
                    pass_fds=(*launch.listeners, *launch.locks),
                )
            except BaseException:
                ours.close()
                raise
        reader, writer = await asyncio.open_connection(sock=ours, limit=MAX_MESSAGE)
        writer.write(launch.encode())
        return cls(launch, process, reader, writer)

    @property
    def age(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    async def read_answer(self) -> Mapping[str, Any]:
        """Return the next message of the worker; an empty one if the worker has ended."""
        try:
            line = await self._reader.readline()
        except OSError:
            line = b""
        answer: Mapping[str, Any] = json.loads(line) if line.endswith(b"\n") else {}
        return answer

    async def reload(self, source: Source) -> Mapping[str, Any]:
        """Let the worker use a configuration, and return its answer; an empty one if the worker has ended."""
        async with self._turn:
            self._writer.write(encode_message({"reload": source.to_dict()}))
            return await self.read_answer()

    async def wait(self) -> int:
        code = await self._process.wait()
        self.is_ready = False
        return code

    def send_signal(self, number: int) -> None:
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    def close(self) -> None:
        self._writer.close()


def _describe_exit(code: int) -> str:
    """Say how a process has ended. ``code`` is its exit code, or the negative number of the signal that killed it."""
    if code >= 0:
        return f"ended with exit code {code}"
    with suppress(ValueError):
        return f"was ended by {signal.Signals(-code).name}"
    return f"was ended by signal {-code}"


def _lengthen(pause: float) -> float:
    return min(max(2 * pause, FIRST_PAUSE), LAST_PAUSE)


def _list_flags() -> list[str]:
    """Return options of Python for a worker, so that it finds modules where this process finds them."""
    if sys.flags.isolated:
        return ["-I"]
    # Without -P, Python would look for modules in the current folder first.
    return [] if os.getcwd() in sys.path or "" in sys.path else ["-P"]
