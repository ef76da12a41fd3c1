"""Requests to the other workers of the same host, which are the siblings of a worker.

Each worker also listens on a Unix socket in the run folder, which only the server's user can open. A request that has
come through this socket is trusted. The address of the socket shows it: uvicorn takes it from the system, and no header
changes it. Paths for siblings do not exist for anybody else.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, MutableMapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from .run_folder import RunFolder

PREFIX: Final = "/siblings/"
"""The paths that are served on the Unix socket only."""


@dataclass(frozen=True, slots=True)
class SiblingAnswer:
    """The answer of one worker, or the reason why there is none."""

    worker: int
    body: Any = None
    """The answer's JSON. With an error: the JSON of the error, or None."""
    error: str | None = None
    """Why the worker did not do what it was asked for; None if it did."""


class Siblings:
    """The other workers of one ``embedonce serve``."""

    def __init__(self, run: RunFolder, worker: int) -> None:
        self._run = run
        self._worker = worker
        self._address = (str(run.get_socket(worker)), None)

    def has_sent(self, scope: MutableMapping[str, Any]) -> bool:
        """Return whether a request has come through the Unix socket of this worker."""
        server = scope.get("server")
        return server is not None and tuple(server) == self._address

    def list_workers(self) -> list[int]:
        """Return the numbers of the other workers. A worker that has just been killed is still one of them."""
        own, workers = self._worker, []
        for path in self._run.path.glob("worker-*.sock"):
            number = path.stem.removeprefix("worker-")
            if number.isdigit() and int(number) != own:
                workers.append(int(number))
        return sorted(workers)

    async def call(
        self, method: str, path: str, body: Any = None, *, timeout: float, skip: Collection[int] = ()
    ) -> list[SiblingAnswer]:
        """Send a request to each of the other workers at the same time. A failure is part of the answers.

        ``skip`` has the numbers of workers that are not asked.
        """
        # A text may have a lone surrogate, which orjson does not write.
        content = b"" if body is None else json.dumps(body).encode()
        workers = [worker for worker in self.list_workers() if worker not in skip]
        return await asyncio.gather(*(self._call_worker(worker, method, path, content, timeout) for worker in workers))

    async def _call_worker(self, worker: int, method: str, path: str, content: bytes, timeout: float) -> SiblingAnswer:
        try:
            async with asyncio.timeout(timeout):
                status, answer = await self._exchange(worker, method, path, content)
            data = orjson.loads(answer)
        except TimeoutError:
            return SiblingAnswer(worker, error=f"no answer within {timeout:g} s")
        except (OSError, ValueError, IndexError, EOFError) as error:
            return SiblingAnswer(worker, error=f"it could not be reached ({type(error).__name__})")
        if status != 200:
            message = data["error"]["message"] if isinstance(data, dict) and "error" in data else f"status {status}"
            return SiblingAnswer(worker, data, error=message)
        return SiblingAnswer(worker, data)

    async def _exchange(self, worker: int, method: str, path: str, content: bytes) -> tuple[int, bytes]:
        """Send one request over a new connection, and return the status and the body of the answer."""
        reader, writer = await asyncio.open_unix_connection(str(self._run.get_socket(worker)))
        try:
            head = (
                f"{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                f"content-length: {len(content)}\r\nconnection: close\r\n\r\n"
            )
            writer.write(head.encode() + content)
            status = int((await reader.readline()).split()[1])
            length = None
            while (line := await reader.readline()) not in (b"\r\n", b""):
                name, _, value = line.partition(b":")
                if name.strip().lower() == b"content-length":
                    length = int(value)
            if length is None:
                raise ValueError("the answer has no content-length")
            return status, await reader.readexactly(length)
        finally:
            writer.transport.abort()
