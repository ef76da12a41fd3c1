"""An embedding service with a cache in Redis in front of its model, configured in embedonce.toml.

    REDIS_URL=redis://localhost:6379/0 EMBED_TTL=1h python examples/service/service.py --port 8000

``POST /embed`` accepts ``{"texts": ["…"], "task": "document"}``. ``GET /metrics`` is for Prometheus.
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import embedonce
from embedonce.metrics import register

CONFIG = Path(__file__).with_name("embedonce.toml")
MAX_TEXTS = 2048


def create_app(config: Any = CONFIG) -> Starlette:
    """Return the service. It opens its cache at startup and closes it at shutdown."""
    registry = CollectorRegistry()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with embedonce.open(config) as app.state.cache:
            register(app.state.cache, registry=registry)
            yield

    def metrics(request: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return Starlette(routes=[Route("/embed", embed, methods=["POST"]), Route("/metrics", metrics)], lifespan=lifespan)


async def embed(request: Request) -> Response:
    """Answer with the vector and source of each text. Errors give the position of a text, never the text itself."""
    try:
        body = await request.json()
        texts, task = body["texts"], body.get("task", "document")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return JSONResponse({"error": 'the body must be JSON of the form {"texts": [...]}'}, 400)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts) or len(texts) > MAX_TEXTS:
        return JSONResponse({"error": f"texts must be a list of at most {MAX_TEXTS} strings"}, 400)
    if task not in ("document", "query"):
        return JSONResponse({"error": 'task must be "document" or "query"'}, 400)
    fetched = await request.app.state.cache.afetch(texts, task)
    if fetched.failed:
        failed = {position: type(error).__name__ for position, error in fetched.failed.items()}
        is_invalid = all(isinstance(error, embedonce.TextError) for error in fetched.failed.values())
        return JSONResponse({"error": "some texts have no vector", "failed": failed}, 400 if is_invalid else 502)
    seconds = sum(fetched.seconds.values())
    return JSONResponse(
        {"vectors": fetched.vectors.tolist(), "sources": fetched.sources},
        headers={"Server-Timing": f"embed;dur={seconds * 1e3:.3f}"},
    )


def main() -> None:
    """Serve until the process receives a signal."""
    parser = argparse.ArgumentParser(description="An embedding service with a cache in Redis.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    uvicorn.run(create_app(), host=options.host, port=options.port)


if __name__ == "__main__":
    main()
