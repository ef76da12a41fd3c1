"""Starts ``embedonce serve`` as a process, for tests of signals, reloads and several workers."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from patience import LONG_TIMEOUT, wait_until

COMMAND = "import signal; signal.signal(2, signal.default_int_handler); from embedonce.cli import main; main()"
"""Obeys Ctrl-C, however the tests were started."""

MODEL = "text-embedding-3-small"


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: Any

    @property
    def worker(self) -> str:
        """A part of the request's id that all requests of a worker process share."""
        return self.headers["x-request-id"].partition("-")[0]


class ServeProcess:
    """A running ``embedonce serve``. ``code`` runs before it in its process, for example to shorten a timeout."""

    def __init__(self, *arguments: str | Path, folder: Path, code: str = "", **options: Any) -> None:
        command = [sys.executable, "-P", "-c", f"{code}\n{COMMAND}", "serve", "--port", "0", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, **options
        )
        self.lines: list[str] = []
        self.may_read = threading.Event()
        """Clear it to stop reading the standard error of the server."""
        self.may_read.set()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            for line in stream:
                self.lines.append(line.rstrip())
                self.may_read.wait()

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    def wait_for_log(self, pattern: str, times: int = 1) -> re.Match[str]:
        """Wait until a pattern is so many times in what the server has printed, and return the last match."""

        def is_there() -> bool:
            assert self.process.poll() is None or self._reader.is_alive() or len(find()) >= times, self.log
            return len(find()) >= times

        def find() -> list[re.Match[str]]:
            return list(re.finditer(pattern, self.log))

        wait_until(is_there)
        return find()[-1]

    def wait_until_ready(self) -> None:
        self.port = int(self.wait_for_log(r"base_url: http://127\.0\.0\.1:(\d+)/v1")[1])

    @property
    def base_url(self) -> str:
        """URL for clients, such as ``http://127.0.0.1:12345/v1``."""
        return f"http://127.0.0.1:{self.port}/v1"

    def count_answers(self, status: int) -> int:
        """Return the number of requests for vectors that the server has answered with a status.

        The server has one worker and an access log. A request is logged after its answer was sent, so this method first
        sends one more request and waits until the log has it.
        """
        marks = self.log.count("GET /v1/embeddings 405 ")
        with closing(self.connect()) as connection:
            connection.request("GET", "/v1/embeddings")
            connection.getresponse().read()
            wait_until(lambda: self.log.count("GET /v1/embeddings 405 ") > marks)
        return self.log.count(f"POST /v1/embeddings {status} ")

    @property
    def workers(self) -> dict[int, int]:
        """The process ids of the workers that have started last, by their numbers."""
        return {
            int(number): int(pid) for number, pid in re.findall(r"worker (\d+) \(process (\d+)\) is ready", self.log)
        }

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=LONG_TIMEOUT)

    def accepts_connections(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), LONG_TIMEOUT).close()
        except ConnectionRefusedError:
            return False
        return True

    def embed(
        self, *texts: str, key: str | None = None, connection: http.client.HTTPConnection | None = None
    ) -> Answer:
        own = connection or self.connect()
        try:
            headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
            own.request("POST", "/v1/embeddings", json.dumps({"model": MODEL, "input": texts}), headers)
            return read_answer(own)
        finally:
            if connection is None:
                own.close()

    def embed_later(
        self, *texts: str, key: str | None = None, connection: http.client.HTTPConnection | None = None
    ) -> Future[Answer]:
        """Send a request in a thread."""
        future: Future[Answer] = Future()

        def run() -> None:
            try:
                future.set_result(self.embed(*texts, key=key, connection=connection))
            except Exception as error:
                future.set_exception(error)

        threading.Thread(target=run).start()
        return future

    def send_signal(self, number: int, pid: int | None = None) -> None:
        os.kill(self.process.pid if pid is None else pid, number)

    def wait(self) -> int:
        """Wait until the server and all its workers have ended, and return the exit code."""
        code = self.process.wait(LONG_TIMEOUT)
        self._reader.join(LONG_TIMEOUT)  # the workers have the same standard error
        assert not self._reader.is_alive()
        return code

    def close(self) -> None:
        self.may_read.set()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.send_signal(signal.SIGTERM)
        self.wait()

    def __enter__(self) -> ServeProcess:
        self.wait_until_ready()
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


def read_answer(connection: http.client.HTTPConnection) -> Answer:
    response = connection.getresponse()
    body = response.read()
    return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, json.loads(body))


def write_config(
    file: Path, base_url: str, *, tiers: str = "", tenants: Sequence[tuple[str, str]] = (), serve: str = ""
) -> None:
    """Write a configuration with a provider that calls an API on loopback. ``tenants`` are names and keys."""
    file.write_text(
        f"""
[provider]
type = "openai"
model = "{MODEL}"
base_url = "{base_url}"
api_key = "any"
{tiers or TIERS}
[serve]
{serve}
"""
        + "".join(f'[[serve.tenants]]\nname = "{name}"\nkeys = ["{key}"]\n' for name, key in tenants)
    )


TIERS = """
[[tiers]]
type = "memory"
[[tiers]]
type = "disk"
path = "vectors"
write = "background"
timeout = "60s"
"""
