"""Writes a collection with qdrant-client, on a server that answers as Qdrant does.

The server is qdrant-client's own local mode, which keeps the points in memory, behind the part of Qdrant's REST
interface that the importer and :func:`write` use.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from http_servers import Handler, HttpServer
from numpy.typing import NDArray


@contextmanager
def serve(api_key: str | None = None) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Serve an empty store. Give its URL, and the list of the requests that it has got: method and path."""
    from qdrant_client import QdrantClient

    store = QdrantClient(":memory:")
    requests: list[tuple[str, str]] = []
    server = HttpServer(_make_handler(store, requests, api_key))
    try:
        yield server.url, requests
    finally:
        server.close()
        store.close()


def write(url: str, texts: Sequence[str], vectors: NDArray[np.floating[Any]]) -> dict[str, object]:
    """Write a collection to the server, and return the options of the importer."""
    return {"url": url, "collection": write_collection(url, "passages", texts, vectors)}


def write_collection(
    url: str,
    name: str,
    texts: Sequence[str],
    vectors: NDArray[np.floating[Any]],
    *,
    payloads: Sequence[dict[str, Any]] | None = None,
    distance: str = "Dot",
    vectors_config: Any = None,
    make_vector: Callable[[list[float]], Any] = lambda row: row,
) -> str:
    """Write a collection as LangChain does, unless ``payloads`` are given. ``make_vector`` may name the vectors."""
    from qdrant_client import QdrantClient, models

    client = QdrantClient(url=url, check_compatibility=False)
    try:
        config = vectors_config or models.VectorParams(size=vectors.shape[1], distance=models.Distance(distance))
        client.create_collection(name, vectors_config=config)
        payloads = payloads or [{"page_content": text, "metadata": {}} for text in texts]
        points = [
            models.PointStruct(id=number, vector=make_vector(row), payload=payload)
            for number, (row, payload) in enumerate(zip(vectors.tolist(), payloads, strict=True))
        ]
        for start in range(0, len(points), 1000):
            client.upsert(name, points[start : start + 1000])
    finally:
        client.close()
    return name


def _make_handler(store: Any, requests: list[tuple[str, str]], api_key: str | None) -> type[Handler]:
    lock = threading.Lock()

    class QdrantHandler(Handler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer("GET")

        def do_POST(self) -> None:
            self._answer("POST")

        def do_PUT(self) -> None:
            self._answer("PUT")

        def _answer(self, method: str) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            requests.append((method, path))
            if api_key is not None and self.headers.get("api-key") != api_key:
                self._send(401, {"status": {"error": "Must provide an API key"}})
                return
            with lock:
                try:
                    result = _call(store, method, path.strip("/").split("/"), json.loads(body or b"{}"))
                except (KeyError, ValueError) as error:
                    self._send(404, {"status": {"error": str(error)}, "time": 0.0})
                    return
            self._send(200, {"result": result, "status": "ok", "time": 0.0})

        def _send(self, status: int, answer: object) -> None:
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return QdrantHandler


def _call(store: Any, method: str, parts: list[str], body: dict[str, Any]) -> Any:
    from qdrant_client import models

    match method, parts:
        case "GET", ["collections"]:
            return store.get_collections().model_dump(mode="json")
        case "GET", ["collections", name, "exists"]:
            return {"exists": store.collection_exists(name)}
        case "GET", ["collections", name]:
            return store.get_collection(name).model_dump(mode="json")
        case "PUT", ["collections", name]:
            request = models.CreateCollection(**body)
            return store.create_collection(name, vectors_config=request.vectors)
        case "PUT", ["collections", name, "points"]:
            store.upsert(name, [models.PointStruct(**point) for point in body["points"]])
            return {"operation_id": 0, "status": "completed"}
        case "POST", ["collections", name, "points", "count"]:
            return store.count(name).model_dump(mode="json")
        case "POST", ["collections", name, "points", "scroll"]:
            found = body.get("filter")
            points, offset = store.scroll(
                name,
                scroll_filter=None if found is None else models.Filter(**found),
                limit=body["limit"],
                offset=body.get("offset"),
                with_payload=body.get("with_payload", True),
                with_vectors=body.get("with_vector", False),
            )
            return {"points": [point.model_dump(mode="json") for point in points], "next_page_offset": offset}
    raise ValueError(f"{method} {'/'.join(parts)} is not served")
