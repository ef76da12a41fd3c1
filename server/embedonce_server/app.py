"""The ASGI application. The hot endpoint is raw ASGI, and Starlette serves everything else."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from itertools import count
from typing import Any, TypeAlias

from embedonce.config import Tenant

from . import access_log
from .answered import Embeddings
from .api.api_errors import ApiError, make_stopping, render
from .api.guards import check_json, check_sender, read_headers
from .api.incoming import ClientGone, read_body
from .embedding import embed, find_hit, read_asked
from .operations.endpoints import Operations, name_endpoint
from .service import Generation, Service
from .tenants.keyring import find_tenant

log = logging.getLogger("embedonce.serve")

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Application: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

EMBEDDINGS = "/v1/embeddings"
JSON = b"application/json"
HEALTH = "/health/"


class App:
    """The application that serves a service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._others = Operations(service)
        self.metrics = self._others.metrics
        self._id_format = secrets.token_hex(6).encode() + b"-%x"
        self._numbers = count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._others.live(scope, receive, send)
            return
        generation = self._service.generation
        generation.active += 1
        answer = self._answer_embeddings if scope["path"] == EMBEDDINGS else self._answer_other
        try:
            await answer(generation, scope, receive, send)
        except ClientGone:
            pass
        except asyncio.CancelledError:
            # The answer has begun, so it cannot become an error. uvicorn closes the connection.
            if self._service.state != "draining":
                raise
        finally:
            generation.active -= 1

    async def _answer_embeddings(self, generation: Generation, scope: Scope, receive: Receive, send: Send) -> None:
        start = time.perf_counter()
        service = self._service
        request_id = self._id_format % next(self._numbers)
        tenant: Tenant | None = None
        outcome: Embeddings | ApiError
        try:
            headers = read_headers(scope["headers"])
            check_sender(generation.hosts, headers)
            if scope["method"] != "POST":
                raise ApiError(405, "use POST for this path", code="method_not_allowed", headers={"allow": "POST"})
            tenant = find_tenant(generation.keyring, headers)
            if headers.get(b"content-type") != JSON or b"content-encoding" in headers:  # a call less for most requests
                check_json(headers)
            if tenant is not None and tenant.requests_per_minute is not None:
                check_rate(service, tenant)
            body = await read_body(service.bodies, headers, receive, generation.settings.max_body)
            try:
                asked = read_asked(generation, tenant, headers.get(b"cache-control"), body)
                outcome = find_hit(service, asked) or await embed(service, tenant, asked)
            finally:
                service.bodies.bytes -= len(body)
        except BaseException as error:  # noqa: BLE001
            outcome = self._explain(error, EMBEDDINGS, request_id)
        if isinstance(outcome, ApiError):
            await _send_error(outcome, request_id, send)
        else:
            outcome.headers.append((b"x-request-id", request_id))
            if outcome.body is None:
                await self._send_parts(outcome, send)
            else:
                await send({"type": "http.response.start", "status": 200, "headers": outcome.headers})
                await send({"type": "http.response.body", "body": outcome.body})
        seconds = time.perf_counter() - start
        # Nothing is awaited between the last message and this line, so a scrape that follows the answer shows it.
        service.counters.count_embeddings(tenant, outcome, seconds)
        if access_log.is_on:
            access_log.write(scope, outcome, seconds, tenant=tenant, request_id=request_id)

    async def _send_parts(self, found: Embeddings, send: Send) -> None:
        """Send a long answer, and give back the memory of each part when it is sent.

        ``send`` waits until the client has read most of the part before. So a slow client holds little memory beside
        the parts that are counted.
        """
        memory, parts = self._service.answers, found.parts
        parts.reverse()
        try:
            await send({"type": "http.response.start", "status": 200, "headers": found.headers})
            while parts:
                await send({"type": "http.response.body", "body": parts[-1], "more_body": len(parts) > 1})
                memory.give(len(parts.pop()))
        finally:
            if parts:
                memory.give(sum(map(len, parts)))

    async def _answer_other(self, generation: Generation, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request to another path. Requests of other workers are part of a request to one of them."""
        start = time.perf_counter()
        path: str = scope["path"]
        request_id = self._id_format % next(self._numbers)
        try:
            headers = read_headers(scope["headers"])
            if not path.startswith(HEALTH):
                check_sender(generation.hosts, headers)
            status = await self._others.serve(generation, scope, headers, receive, send, request_id)
        except BaseException as error:  # noqa: BLE001
            refused = self._explain(error, name_endpoint(path), request_id)
            status = refused.status
            await _send_error(refused, request_id, send)
        if self._service.siblings.has_sent(scope):
            return
        seconds = time.perf_counter() - start
        self._service.counters.count_other(name_endpoint(path), status, seconds)
        if access_log.is_on:
            access_log.write(scope, status, seconds, tenant=None, request_id=request_id)

    def _explain(self, error: BaseException, endpoint: str, request_id: bytes) -> ApiError:
        """Return the answer to a request that has failed with an exception.

        Raises:
            BaseException: the exception itself, if there is nobody to answer.
        """
        if isinstance(error, ApiError):
            return error
        if isinstance(error, asyncio.CancelledError) and self._service.state == "draining":
            return make_stopping()  # the request has taken longer than drain_timeout
        if isinstance(error, ClientGone) or not isinstance(error, Exception):
            raise error
        # The message of an unexpected error may have a text, so the log has only its class and its place.
        place, name = "".join(traceback.format_tb(error.__traceback__)), type(error).__name__
        log.error("a request to %s failed (id=%s): %s\n%s", endpoint, request_id.decode(), name, place)
        return ApiError(500, f"the server failed ({name})", kind="server_error", code="internal_error")


async def _send_error(error: ApiError, request_id: bytes, send: Send) -> None:
    body, pairs = render(error)
    headers = [*pairs, (b"x-request-id", request_id)]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def check_rate(service: Service, tenant: Tenant) -> None:
    """Count a request of a tenant.

    Raises:
        ApiError: the tenant has sent too many requests.
    """
    seconds = service.rates.admit(tenant)
    if seconds > 0:
        service.counters.count_refused(tenant, "rate")
        limit = f"{tenant.requests_per_minute:,g} request{'s' if tenant.requests_per_minute != 1 else ''} per minute"
        message = f'the limit of tenant "{tenant.name}" is {limit}; try again in {math.ceil(seconds)} s'
        raise ApiError(429, message, kind="rate_limit_error", code="requests_per_minute_exceeded", retry_after=seconds)
