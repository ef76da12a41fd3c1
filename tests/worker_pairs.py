"""Several workers of one server in the process of the test. They reach each other through their Unix sockets."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from patience import wait_until_async
from serving import Served

from embedonce import config
from embedonce_server.connections.http_server import WorkerServer
from embedonce_server.run_folder import RunFolder
from embedonce_server.service import Service


class Worker(Served):
    """One worker, whose application the test calls. Only its siblings use its socket."""

    def __init__(self, service: Service) -> None:
        super().__init__(service)
        self._server = WorkerServer(self.app, private=service.run.get_socket(service.worker), on_start=lambda: None)

    async def start(self) -> None:
        self._serving = asyncio.create_task(self._server.serve([]))
        await wait_until_async(lambda: self._server.started)
        self.service.state = "ready"

    async def stop_listening(self) -> None:
        """End as a killed worker does: the socket stays, but nobody answers."""
        path = self.service.run.get_socket(self.service.worker)
        self._server.begin_drain(0.0)
        await self._serving
        if not path.exists():
            path.touch()

    async def close(self) -> None:
        self._server.begin_drain(0.0)
        await self._serving
        await self.service.close(1.0)
        self.app.metrics.close()


@asynccontextmanager
async def serve_workers(settings: Mapping[str, Any], folder: Path, count: int = 2) -> AsyncIterator[list[Worker]]:
    """Serve a configuration with several workers, and close them afterwards."""
    short = Path(tempfile.mkdtemp(prefix="eo-"))  # the name of a Unix socket must be short
    run = RunFolder(short, folder)
    workers: list[Worker] = []
    try:
        for number in range(1, count + 1):
            worker = Worker(Service(config.load(settings), run=run, worker=number))
            workers.append(worker)
            await worker.start()
        yield workers
    finally:
        await asyncio.gather(*(worker.close() for worker in workers))
        shutil.rmtree(short)
