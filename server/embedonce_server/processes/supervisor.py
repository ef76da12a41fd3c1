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
START_SECONDS = 120.0
"""Seconds until a worker that is not ready is killed. It waits up to 30 s for its providers, and imports libraries."""
ANSWER_SECONDS = 10.0
"""Seconds until a worker that does not answer a reload is killed, because it would go on with the former keys."""
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
        self._is_reload_due = False
        """Whether a reload waits for a worker that can use it."""
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
        answer = await process.read_answer(START_SECONDS)
        if "prepared" in answer:
            process.can_reload = True
            await self._update(process)  # there may have been a reload while it started
            self._resume_reload()
            answer = await process.listen()
        if "ready" not in answer:
            if "problems" in answer:
                raise decode_problems(answer["problems"])
            code = await process.wait()
            raise ConfigError([Problem(f"worker {number} {_describe_exit(code)} before it was ready")])
        log.info("worker %d (process %d) is ready", number, process.pid)
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
        """Let all workers use a configuration.

        All are asked at the same time, so that a worker that hangs delays no other one. They check the configuration
        in the same way, so if it is invalid, all of them refuse it and keep their settings.
        """
        source = Source.of(config)
        asked = [process for process in self._processes.values() if process.can_reload]
        answers = await asyncio.gather(*(process.reload(source) for process in asked))
        if not any("reloaded" in answer for answer in answers):
            if problems := next((answer["problems"] for answer in answers if "problems" in answer), None):
                self._reloads.report_refusal(decode_problems(problems))
                return
            log.error("no worker answers, so nothing was reloaded yet; the reload follows once a worker has started")
            self._is_reload_due = True
            self._resume_reload()
            return
        self._launch = replace(self._launch, latest=source)
        self._drain_timeout = config.serve.drain_timeout
        await asyncio.gather(*(self._update(process) for process in list(self._processes.values())))
        self._reloads.report_success(config)

    def _resume_reload(self) -> None:
        """Read the configuration again if a reload is due and a worker can use it."""
        if self._is_reload_due and any(process.can_reload for process in self._processes.values()):
            self._is_reload_due = False
            self._hung_up.set()

    async def _update(self, process: _Process) -> None:
        """Let a worker use the configuration of the last reload, unless it does. Restart it if it refuses that."""
        latest = self._launch.latest
        if not process.can_reload or latest is None or process.latest is latest:
            return
        answer = await process.reload(latest)
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
        self.can_reload = False
        """Whether the worker runs and answers reloads. It does so before it listens, so that it never uses old keys."""
        self.latest = launch.latest
        """The configuration of the last reload that the worker uses."""
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

    async def read_answer(self, timeout: float) -> Mapping[str, Any]:
        """Return the next message of the worker; an empty one if the worker has ended.

        A worker that sends none within ``timeout`` seconds is killed, and counts as ended.
        """
        line = b""
        try:
            async with asyncio.timeout(timeout):
                line = await self._reader.readline()
        except TimeoutError:
            log.error(
                "worker %d (process %d) has not answered within %g s; killing it", self.launch.worker, self.pid, timeout
            )
            self.can_reload = False
            self.send_signal(signal.SIGKILL)
        except OSError:  # it was killed
            pass
        answer: Mapping[str, Any] = json.loads(line) if line.endswith(b"\n") else {}
        return answer

    async def reload(self, source: Source) -> Mapping[str, Any]:
        """Let the worker use a configuration, and return its answer; an empty one if the worker has ended."""
        answer = await self._ask({"reload": source.to_dict()})
        if "reloaded" in answer:
            self.latest = source
        return answer

    async def listen(self) -> Mapping[str, Any]:
        """Let the worker answer requests, and return its answer; an empty one if the worker has ended."""
        return await self._ask({"listen": True})

    async def _ask(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        async with self._turn:
            self._writer.write(encode_message(message))
            return await self.read_answer(ANSWER_SECONDS)

    async def wait(self) -> int:
        code = await self._process.wait()
        self.can_reload = False
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
