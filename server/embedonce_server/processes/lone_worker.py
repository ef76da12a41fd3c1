"""A worker without a supervisor, in the process of the command."""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
from collections.abc import Callable, Sequence

from embedonce.config import Config
from embedonce.errors import EmbedonceError

from .launch import Launch
from .reloading import Reloads
from .terminal import Terminal
from .worker import Worker


class LoneWorker(Worker):
    """The only worker of a server. It handles the signals that a supervisor handles otherwise."""

    def __init__(
        self,
        launch: Launch,
        config: Config,
        sockets: Sequence[socket.socket],
        reloads: Reloads,
        announce: Callable[[Sequence[str]], None],
    ) -> None:
        super().__init__(launch, config, sockets)
        self._reloads = reloads
        self._announce = announce
        self._terminal = Terminal()
        self._hung_up = asyncio.Event()

    async def prepare(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.stop)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._hung_up.set)

    async def watch(self) -> None:
        """Reload on SIGHUP."""
        async for config in self._reloads.follow(self._hung_up, self._terminal):
            try:
                self.reload(config)
            except EmbedonceError as error:
                self._reloads.report_refusal(error)
            else:
                self._reloads.report_success(config)
        self.stop(signal.SIGHUP)

    def on_ready(self) -> None:
        self._announce(self.service.generation.models.names)

    def end_now(self, code: int) -> None:
        shutil.rmtree(self.launch.folder.path, ignore_errors=True)
        super().end_now(code)
