"""Everything but the embeddings endpoint: models, health, metrics and administration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

if TYPE_CHECKING:
    from .service import Service


def create_operations(service: Service) -> Starlette:
    """Return the application for all paths but the embeddings endpoint."""

    def show_live(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    return Starlette(routes=[Route("/health/live", show_live)])
