"""The ASGI application. The hot endpoint is raw ASGI, and Starlette serves everything else."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from itertools import count
from typing import Any, TypeAlias

from embedonce.config import Tenant

from . import access_log
from .answered import Embeddings
from .api.api_errors import ApiError, make_stopping, render
from .api.guards import check_json, check_origin, read_headers
from .api.incoming import ClientGone, read_body
from .embedding import embed
from .operations.endpoints import Operations, name_endpoint
from .service import Generation, Service
from .tenants.keyring import find_tenant

log = logging.getLogger("embedonce.serve")

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Application: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
Pairs: TypeAlias = list[tuple[bytes, bytes]]

EMBEDDINGS = "/v1/embeddings"
HEALTH = "/health/"


class App:
    """The application that serves a service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._others = Operations(service)
        self.metrics = self._others.metrics
        prefix = secrets.token_hex(6)
        self._ids: Iterator[bytes] = (b"%b-%x" % (prefix.encode(), number) for number in count(1))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._others.live(scope, receive, send)
            return
        generation = self._service.generation
        generation.active += 1
        try:
            await self._answer(generation, scope, receive, send)
        except ClientGone:
            pass
        except asyncio.CancelledError:
            # The answer has begun, so it cannot become an error. uvicorn closes the connection.
            if self._service.state != "draining":
                raise
        finally:
            generation.active -= 1

    async def _answer(self, generation: Generation, scope: Scope, receive: Receive, send: Send) -> None:
        start = time.perf_counter()
        path: str = scope["path"]
        answer = b""
        tenant: Tenant | None = None
        found: Embeddings | None = None
        model = ""
        request_id = next(self._ids)
        try:
            headers = read_headers(scope["headers"])
            if not path.startswith(HEALTH):
                host = headers.get(b"host")
                generation.hosts.check(host)
                check_origin(headers.get(b"origin"), host)
            if path != EMBEDDINGS:
                status = await self._others.serve(generation, scope, headers, receive, send, request_id)
                self._finish_other(scope, status, start, request_id)
                return
            if scope["method"] != "POST":
                raise ApiError(
                    405, "send a POST request to this path", code="method_not_allowed", headers={"allow": "POST"}
                )
            tenant = find_tenant(generation.keyring, headers)
            check_json(headers)
            if tenant is not None and tenant.requests_per_minute is not None:
                check_rate(self._service, tenant)
            body = await read_body(self._service.bodies, headers, receive, limit=generation.settings.max_body)
            try:
                found = await embed(self._service, generation, tenant, headers.get(b"cache-control"), body)
            finally:
                self._service.bodies.bytes -= len(body)
            status, pairs = 200, found.headers
        except ApiError as error:
            model = error.model
            status, answer, pairs = render(error)
        except ClientGone:
            raise
        except asyncio.CancelledError:
            if self._service.state != "draining":
                raise
            status, answer, pairs = render(make_stopping())  # the request has taken longer than drain_timeout
        except Exception as error:  # noqa: BLE001
            # The message of an unexpected error may have a text, so the log has only its class and its place.
            place = "".join(traceback.format_tb(error.__traceback__))
            endpoint = EMBEDDINGS if path == EMBEDDINGS else name_endpoint(path)
            log.error(
                "a request to %s failed (id=%s): %s\n%s", endpoint, request_id.decode(), type(error).__name__, place
            )
            status, answer, pairs = render(
                ApiError(500, f"the server failed ({type(error).__name__})", kind="server_error", code="internal_error")
            )
        pairs.append((b"x-request-id", request_id))
        start_message = {"type": "http.response.start", "status": status, "headers": pairs}
        if found is None:
            await send(start_message)
            await send({"type": "http.response.body", "body": answer})
        else:
            await self._send_parts(start_message, found.parts, send)
        if path != EMBEDDINGS:
            self._finish_other(scope, status, start, request_id)
            return
        seconds = time.perf_counter() - start
        # Nothing is awaited between the last message and this line, so a scrape that follows the answer shows it.
        self._service.counters.count_embeddings(tenant, found, status, seconds, model)
        if access_log.is_on:
            access_log.write(scope, status, seconds, tenant=tenant, found=found, request_id=request_id)

    async def _send_parts(self, start: Message, parts: list[bytes], send: Send) -> None:
        """Send an answer, and give back the memory of each part when it is sent.

        ``send`` waits until the client has read most of the part before. So a slow client holds little memory beside
        the parts that are counted.
        """
        memory = self._service.answers
        parts.reverse()
        try:
            await send(start)
            while parts:
                await send({"type": "http.response.body", "body": parts[-1], "more_body": len(parts) > 1})
                memory.give(len(parts.pop()))
        finally:
            memory.give(sum(map(len, parts)))

    def _finish_other(self, scope: Scope, status: int, start: float, request_id: bytes) -> None:
        """Count and log a request to another path. Requests of other workers are part of a request to one of them."""
        if self._service.siblings.has_sent(scope):
            return
        seconds = time.perf_counter() - start
        self._service.counters.count_other(name_endpoint(scope["path"]), status, seconds)
        if access_log.is_on:
            access_log.write(scope, status, seconds, tenant=None, found=None, request_id=request_id)


def check_rate(service: Service, tenant: Tenant) -> None:
    """Count a request of a tenant.

    Raises:
        ApiError: the tenant has sent too many requests.
    """
    seconds = service.rates.admit(tenant)
    if seconds > 0:
        service.counters.count_refused(tenant, "rate")
        message = f"more than {tenant.requests_per_minute:g} requests per minute; try again in {seconds:.1f} s"
        raise ApiError(429, message, kind="rate_limit_error", code="rate_limit_exceeded", retry_after=seconds)
