"""The ASGI application. The hot endpoint is raw ASGI, and Starlette serves everything else."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from itertools import count
from typing import Any, TypeAlias

from embedonce.config import Tenant

from . import access_log
from .api_errors import ApiError
from .embedding import Embeddings, embed
from .guards import check_json, check_origin, read_headers
from .operations import create_operations
from .service import Generation, Service
from .tenants import read_bearer

log = logging.getLogger("embedonce.serve")

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Application: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
Pairs: TypeAlias = list[tuple[bytes, bytes]]

EMBEDDINGS = "/v1/embeddings"
HEALTH = "/health/"

MAX_BODIES = 256 * 1024 * 1024
"""Bytes of request bodies that one worker keeps in memory at the same time."""


class ClientGone(Exception):
    """The client has closed the connection before its request was complete."""


def create_app(service: Service) -> Application:
    """Return the application that serves a service."""
    return _App(service)


class _App:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._others = create_operations(service)
        prefix = secrets.token_hex(6)
        self._ids: Iterator[bytes] = (b"%b-%x" % (prefix.encode(), number) for number in count(1))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._others(scope, receive, send)
            return
        generation = self._service.generation
        generation.active += 1
        try:
            await self._answer(generation, scope, receive, send)
        except ClientGone:
            pass
        finally:
            generation.active -= 1

    async def _answer(self, generation: Generation, scope: Scope, receive: Receive, send: Send) -> None:
        start = time.perf_counter()
        path: str = scope["path"]
        tenant: Tenant | None = None
        found: Embeddings | None = None
        request_id = next(self._ids)
        try:
            headers = read_headers(scope["headers"])
            if not path.startswith(HEALTH):
                host = headers.get(b"host")
                generation.hosts.check(host)
                check_origin(headers.get(b"origin"), host)
            if path != EMBEDDINGS:
                await self._others(scope, receive, send)
                return
            if scope["method"] != "POST":
                raise ApiError(
                    405, "send a POST request to this path", code="method_not_allowed", headers={"allow": "POST"}
                )
            tenant = find_tenant(generation, headers)
            check_json(headers)
            if tenant is not None and tenant.requests_per_minute is not None:
                check_rate(self._service, tenant)
            body = await self._read_body(generation, headers, receive)
            try:
                found = await embed(self._service, generation, tenant, headers.get(b"cache-control"), body)
            finally:
                self._service.body_bytes -= len(body)
            status, answer, pairs = 200, found.body, found.headers
        except ApiError as error:
            status, answer, pairs = _render(error)
        except ClientGone:
            raise
        except Exception as error:
            log.exception("a request to %s failed", path if path == EMBEDDINGS else "another path")
            status, answer, pairs = _render(
                ApiError(500, f"the server failed ({type(error).__name__})", kind="server_error", code="internal_error")
            )
        pairs.append((b"x-request-id", request_id))
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        await send({"type": "http.response.body", "body": answer})
        seconds = time.perf_counter() - start
        self._service.metrics.count_embeddings(tenant, found, status, seconds)
        if access_log.is_on:
            access_log.write(scope, status, seconds, tenant=tenant, found=found, request_id=request_id)

    async def _read_body(self, generation: Generation, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """Return the body of a request. Its bytes count in ``body_bytes`` of the service from then on.

        Raises:
            ApiError: the body is too large.
            ClientGone: the client has closed the connection.
        """
        limit, service = generation.settings.max_body, self._service
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > limit:
            raise _make_too_large(limit)
        message = await receive()
        parts: list[bytes] = []
        size = 0
        try:
            while True:
                if message["type"] == "http.disconnect":
                    raise ClientGone
                part = message.get("body", b"")
                size += len(part)
                service.body_bytes += len(part)
                if size > limit:
                    raise _make_too_large(limit)
                if service.body_bytes > MAX_BODIES:
                    text = "the server has too many large requests at the moment"
                    raise ApiError(503, text, kind="server_error", code="overloaded", retry_after=1)
                parts.append(part)
                if not message.get("more_body"):
                    return b"".join(parts) if len(parts) > 1 else part
                message = await receive()
        except BaseException:
            service.body_bytes -= size
            raise


def find_tenant(generation: Generation, headers: dict[bytes, bytes]) -> Tenant | None:
    """Return the tenant whose key a request has; None if the server has no tenants.

    Raises:
        ApiError: the key is missing or unknown.
    """
    if not generation.settings.tenants:
        return None
    key = read_bearer(headers.get(b"authorization", b"")) or headers.get(b"api-key")
    tenant = None if key is None else generation.keyring.find_tenant(key)
    if tenant is None:
        what = "the request has no key" if key is None else "the key is not valid"
        message = f"{what}; send a key of this server as Authorization: Bearer …"
        headers_ = {"www-authenticate": "Bearer"}
        raise ApiError(401, message, kind="authentication_error", code="invalid_api_key", headers=headers_)
    return tenant


def check_rate(service: Service, tenant: Tenant) -> None:
    """Count a request of a tenant.

    Raises:
        ApiError: the tenant has sent too many requests.
    """
    seconds = service.rates.admit(tenant)
    if seconds > 0:
        message = f"more than {tenant.requests_per_minute:g} requests per minute; try again in {seconds:.1f} s"
        raise ApiError(429, message, kind="rate_limit_error", code="rate_limit_exceeded", retry_after=seconds)


def _make_too_large(limit: int) -> ApiError:
    message = f"the body is larger than {limit:,} bytes (max_body in [serve]); send fewer inputs in one request"
    return ApiError(413, message, code="body_too_large", headers={"connection": "close"})


def _render(error: ApiError) -> tuple[int, bytes, Pairs]:
    body = error.to_body()
    pairs = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    pairs += [(name.encode(), value.encode("latin-1")) for name, value in error.headers.items()]
    return error.status, body, pairs
