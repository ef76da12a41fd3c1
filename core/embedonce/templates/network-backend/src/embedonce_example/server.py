"""A small server on the loopback interface, for tests: ``python -m embedonce_example.server``. Not for production.

Start your own store in the tests instead, and delete this module.
"""

from __future__ import annotations

import json
import socketserver
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .connections import LENGTH


class Server(socketserver.ThreadingTCPServer):
    """Keeps values in a dict. Tests set ``offset`` to make its clock run ahead, and ``paused`` to make it hang."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__((host, port), _Handler)
        self.offset = 0.0
        self.running = threading.Event()
        self.running.set()
        self._values: dict[str, tuple[str, float | None]] = {}
        self._lock = threading.Lock()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def answer(self, message: dict[str, Any]) -> Any:
        """Return the result of a request."""
        now = time.time() + self.offset
        with self._lock:
            self._values = {key: item for key, item in self._values.items() if item[1] is None or item[1] > now}
            return getattr(self, f"_{message.pop('do')}")(now, **message)

    def _get(self, now: float, keys: list[str]) -> dict[str, str]:
        return {key: self._values[key][0] for key in keys if key in self._values}

    def _set(self, now: float, items: dict[str, str], ttl: float | None) -> None:
        self._values |= {key: (text, None if ttl is None else now + ttl) for key, text in items.items()}

    def _add(self, now: float, items: dict[str, str], ttl: float | None) -> list[str]:
        absent = {key: text for key, text in items.items() if key not in self._values}
        self._set(now, absent, ttl)
        return list(absent)

    def _delete(self, now: float, keys: list[str]) -> None:
        for key in keys:
            self._values.pop(key, None)

    def _scan(self, now: float, prefix: str, after: str, limit: int) -> list[str]:
        keys = sorted(key for key in self._values if key.startswith(prefix))
        return keys[bisect_right(keys, after) :][:limit]


class _Handler(socketserver.StreamRequestHandler):
    server: Server

    def handle(self) -> None:
        """Answer the requests of one connection until the client closes it."""
        try:
            while head := self.rfile.read(LENGTH.size):
                body = self.rfile.read(*LENGTH.unpack(head))
                self.server.running.wait()
                try:
                    reply = {"result": self.server.answer(json.loads(body))}
                except Exception as error:  # noqa: BLE001
                    reply = {"error": type(error).__name__}
                data = json.dumps(reply).encode()
                self.wfile.write(LENGTH.pack(len(data)) + data)
        except OSError:
            return  # the client broke the connection


@contextmanager
def run_server() -> Iterator[Server]:
    """Run a server on a free port in a thread of this process."""
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.running.set()
            server.shutdown()


if __name__ == "__main__":
    with Server() as running:
        print(f"example://127.0.0.1:{running.port}", flush=True)
        running.serve_forever()
