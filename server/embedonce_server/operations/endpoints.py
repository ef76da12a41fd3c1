"""Everything but the embeddings endpoint: models, health, metrics and administration."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, MutableMapping
from contextlib import asynccontextmanager
from typing import Any, Final, TypeAlias

import orjson
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.responses import Response
from starlette.routing import Route, Router

from embedonce_server.api.api_errors import ApiError
from embedonce_server.api.incoming import Receive
from embedonce_server.api.openapi import make_document
from embedonce_server.embedding import find_model, list_models
from embedonce_server.models import Model
from embedonce_server.service import Generation, Service
from embedonce_server.siblings import PREFIX
from embedonce_server.tenants.keyring import check_admin, find_tenant

from . import admin, erasures
from .calls import Call, Scope
from .health import read_health
from .metrics import Metrics

Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]

ADMIN: Final = "/admin"
MODEL: Final = "/v1/models/{model}"
OTHER: Final = "other"
"""The name of all paths that do not exist."""


Handler: TypeAlias = Callable[[Call], Awaitable[Response]]


class _Endpoint:
    """One path: the handler of each method, and who may use it."""

    def __init__(self, check: Callable[[Call], None] | None = None, **handlers: Handler) -> None:
        self._check = check
        self._handlers = {**handlers, **({"HEAD": handlers["GET"]} if "GET" in handlers else {})}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call: Call = scope["embedonce.call"]
        if self._check is not None:
            self._check(call)
        handler = self._handlers.get(scope["method"])
        if handler is None:
            allowed = ", ".join(self._handlers)
            message = f"use {' or '.join(self._handlers)} for this path"
            raise ApiError(405, message, code="method_not_allowed", headers={"allow": allowed})
        response = await handler(call)
        await response(scope, receive, send)


class Operations:
    """Serves all paths but the embeddings endpoint. Errors are raised as :class:`ApiError`."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.metrics = Metrics(service)
        self._router = Router(
            self.make_routes(make_document()), redirect_slashes=False, default=_refuse_path, lifespan=self._live
        )

    @staticmethod
    def make_routes(document: Mapping[str, Any]) -> list[Route]:
        """Return the routes of all paths. ``document`` is the OpenAPI document."""
        encoded = orjson.dumps(document)

        async def show_document(call: Call) -> Response:
            return Response(encoded, media_type="application/json")

        return [
            Route("/health/live", _Endpoint(GET=_show_live)),
            Route("/health/ready", _Endpoint(GET=_show_ready)),
            Route("/v1/models", _Endpoint(GET=_list_models)),
            Route("/v1/models/{model:path}", _Endpoint(GET=_show_model)),
            Route("/metrics", _Endpoint(_check_metrics, GET=_show_metrics)),
            Route("/openapi.json", _Endpoint(GET=show_document)),
            Route("/admin/stats", _Endpoint(GET=_answer(admin.show_stats))),
            Route("/admin/explain", _Endpoint(POST=_answer(admin.explain))),
            Route("/admin/forget", _Endpoint(POST=_answer(erasures.forget))),
            Route("/admin/purge", _Endpoint(POST=_answer(erasures.purge))),
            Route("/admin/check", _Endpoint(POST=_answer(admin.check))),
            Route(f"{PREFIX}metrics", _Endpoint(POST=_copy_metrics)),
            Route(f"{PREFIX}stats", _Endpoint(POST=_answer(admin.show_own_stats))),
            Route(f"{PREFIX}forget", _Endpoint(POST=_answer(erasures.forget_here))),
            Route(f"{PREFIX}purge", _Endpoint(POST=_answer(erasures.purge_here))),
        ]

    async def live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take part in the start and the end of the process."""
        await self._router(scope, receive, send)

    @asynccontextmanager
    async def _live(self, app: object) -> AsyncIterator[None]:
        self.metrics.start()
        yield  # the worker closes the metrics after its last writes, which count too

    async def serve(
        self,
        generation: Generation,
        scope: Scope,
        headers: dict[bytes, bytes],
        receive: Receive,
        send: Send,
        request_id: bytes,
    ) -> int:
        """Answer a request, and return the status. It may be cut off while the server stops, after it has begun.

        Raises:
            ApiError: the request is answered with an error. Nothing has been sent.
        """
        _check_access(self._service, generation, scope, headers)
        scope["embedonce.call"] = Call(self._service, self.metrics, generation, scope, headers, receive)
        status = 0

        async def send_with_id(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        try:
            await self._router(scope, receive, send_with_id)
        except asyncio.CancelledError:
            if not status or self._service.state != "draining":
                raise
        return status


def name_endpoint(path: str) -> str:
    """Return the name of a path in metrics. There are few names, whatever paths clients send."""
    if path in _NAMES:
        return path
    return MODEL if path.startswith("/v1/models/") else OTHER


_NAMES: Final = frozenset(
    {
        *("/health/live", "/health/ready", "/metrics", "/openapi.json", "/v1/models"),
        *("/admin/stats", "/admin/explain", "/admin/forget", "/admin/purge", "/admin/check"),
    }
)


# --- access -----------------------------------------------------------------------------------


def _make_not_found() -> ApiError:
    message = "this path does not exist; the endpoint is /v1/embeddings, and /openapi.json lists all paths"
    return ApiError(404, message, code="not_found")


async def _refuse_path(scope: Scope, receive: Receive, send: Send) -> None:
    raise _make_not_found()


def _check_access(service: Service, generation: Generation, scope: Scope, headers: Mapping[bytes, bytes]) -> None:
    """Check that a path exists for the client, and that the client has the key for it.

    Raises:
        ApiError: it does not.
    """
    path: str = scope["path"]
    if path.startswith(PREFIX) and not service.siblings.has_sent(scope):
        raise _make_not_found()
    if path == ADMIN or path.startswith(f"{ADMIN}/"):
        if generation.settings.admin_key is None:
            raise _make_not_found()
        check_admin(generation.keyring, headers)


def _check_metrics(call: Call) -> None:
    """Check the key for the metrics, which name the tenants."""
    settings = call.generation.settings
    if settings.tenants:
        if settings.admin_key is None:
            raise _make_not_found()
        check_admin(call.generation.keyring, call.headers)


# --- handlers ---------------------------------------------------------------------------------


def answer_json(data: Any, status: int = 200) -> Response:
    """Return an answer. Bytes in it are written as hexadecimal digits."""
    body = orjson.dumps(data, default=_convert, option=orjson.OPT_NON_STR_KEYS)
    return Response(body, status, media_type="application/json")


def _convert(value: Any) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, Collection) else str(value)


def _answer(handler: Callable[[Call], Awaitable[Any]]) -> Handler:
    """Return a handler that answers with the JSON that another function returns."""

    async def handle(call: Call) -> Response:
        return answer_json(await handler(call))

    return handle


async def _show_live(call: Call) -> Response:
    return answer_json({"status": "ok"})


async def _show_ready(call: Call) -> Response:
    health = read_health(call.service)
    return answer_json(health, 200 if health["status"] == "ready" else 503)


async def _list_models(call: Call) -> Response:
    tenant = find_tenant(call.generation.keyring, call.headers)
    models = [find_model(call.generation, tenant, name) for name in list_models(call.generation, tenant)]
    return answer_json({"object": "list", "data": list(map(_describe_model, models))})


async def _show_model(call: Call) -> Response:
    tenant = find_tenant(call.generation.keyring, call.headers)
    return answer_json(_describe_model(find_model(call.generation, tenant, call.scope["path_params"]["model"])))


def _describe_model(model: Model) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": model.provider_config.type}


async def _show_metrics(call: Call) -> Response:
    return Response(await call.metrics.show(), headers={"content-type": CONTENT_TYPE_LATEST})


async def _copy_metrics(call: Call) -> Response:
    call.metrics.copy()
    return answer_json(call.service.read_gauges())
