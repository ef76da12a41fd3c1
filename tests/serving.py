"""The server's application in the process of the test, called as an ASGI server calls it."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedonce import config
from embedonce_server.app import App
from embedonce_server.run_folder import RunFolder
from embedonce_server.service import Service

KEY = "key-of-the-search-team"
ADMIN_KEY = "key-of-the-administrator"


@dataclass(frozen=True)
class Answer:
    """An answer of the application."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.json["error"]
        assert set(error) >= {"message", "type", "param", "code"}
        return error

    @property
    def vectors(self) -> list[np.ndarray]:
        """The vectors in the order of the inputs, whatever their encoding."""
        data = self.json["data"]
        assert [item["index"] for item in data] == list(range(len(data)))
        return [read_embedding(item["embedding"]) for item in data]

    @property
    def cache(self) -> tuple[str, int, int]:
        """What the headers say: hit, partial or miss; the inputs that were hits; the other inputs."""
        state = self.headers["x-embedonce-cache"]
        return state, int(self.headers["x-embedonce-hits"]), int(self.headers["x-embedonce-computed"])


def read_embedding(embedding: Any) -> np.ndarray:
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding, validate=True), "<f4")
    return np.array(embedding, np.float64).astype(np.float32)


class Served:
    """A service, and calls to its application."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.app = App(service)

    async def embed(self, input: Any, *, headers: Mapping[str, str] = {}, **fields: Any) -> Answer:
        """Ask for vectors. The model is the first one, unless it is given."""
        model = self.service.generation.models.names[0]
        return await self.call("POST", "/v1/embeddings", {"model": model, "input": input, **fields}, headers)

    async def call(self, method: str, path: str, body: Any = b"", headers: Mapping[str, str] | None = None) -> Answer:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"host": "localhost", "content-type": "application/json", "content-length": str(len(body))}
        return await self.send(method, path, [body], {**given, **(headers or {})})

    async def send(self, method: str, path: str, parts: list[bytes | None], headers: Mapping[str, str]) -> Answer:
        """Send a request whose body comes in parts. None stands for a client that has gone."""
        messages = [
            {"type": "http.disconnect"}
            if part is None
            else {"type": "http.request", "body": part, "more_body": i < len(parts) - 1}
            for i, part in enumerate(parts)
        ]
        sent: list[Any] = []

        async def receive() -> Any:
            return messages.pop(0) if messages else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path.partition("?")[0],
            "raw_path": path.partition("?")[0].encode(),
            "query_string": path.partition("?")[2].encode(),
            "root_path": "",
            "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()],
            "client": ("127.0.0.1", 12345),
            "server": ("127.0.0.1", 8080),
            "state": {},
        }
        await self.app(scope, receive, send)
        if not sent:
            return Answer(0, {}, b"")
        pairs = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return Answer(sent[0]["status"], pairs, b"".join(message.get("body", b"") for message in sent[1:]))


@asynccontextmanager
async def serve(settings: Mapping[str, Any], folder: Path) -> AsyncIterator[Served]:
    """Serve a configuration in this process, and close it afterwards."""
    service = Service(config.load(settings), run=RunFolder(folder / "run", folder))
    served = Served(service)
    try:
        service.state = "ready"
        yield served
    finally:
        served.app.metrics.close()
        await service.close(1.0)
