"""``embedonce serve`` in a process of its own, for tests with real clients."""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from servers import wait_until


class ServerProcess:
    """The command with a configuration, on a free port. It logs every request."""

    def __init__(self, folder: Path, configuration: str, *arguments: str) -> None:
        self.folder = folder
        self.arguments = arguments
        self._marks = 0
        (folder / "embedonce.toml").write_text(configuration)

    @property
    def base_url(self) -> str:
        """URL that clients are configured with, such as ``http://127.0.0.1:12345/v1``."""
        return re.findall(r"^  base_url: (\S+)$", self.read_log(), re.MULTILINE)[0]

    def read_log(self) -> str:
        """Return what the command has printed."""
        return (self.folder / "log").read_text()

    def count_answers(self, status: int) -> int:
        """Return the number of requests for vectors that the server, which has one worker, has answered with a status.

        A request is logged after its answer was sent, so this method first sends one more request and waits until the
        log has it.
        """
        self._marks += 1
        connection = http.client.HTTPConnection(urlsplit(self.base_url).netloc, timeout=60)
        try:
            connection.request("GET", "/v1/embeddings", headers={"Connection": "close"})
            connection.getresponse().read()
        finally:
            connection.close()
        wait_until(lambda: self.read_log().count("GET /v1/embeddings 405 ") == self._marks, "the log is complete")
        return self.read_log().count(f"POST /v1/embeddings {status} ")

    def read_workers(self) -> list[str]:
        """Return the number of the worker that answered each request, if there are several workers."""
        return re.findall(r" worker (\d+): .* POST /v1/embeddings ", self.read_log())

    def __enter__(self) -> Self:
        words = [sys.executable, "-m", "embedonce", "serve", "--config", "embedonce.toml", "--port", "0"]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [*words, "--access-log", *self.arguments],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            wait_until(lambda: self.process.poll() is not None or "base_url:" in self.read_log(), "the server answers")
            assert self.process.poll() is None, self.read_log()
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        assert code == 0, self.read_log()
