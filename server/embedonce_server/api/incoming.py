"""Reading the bodies of requests into memory, within bounds."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, TypeAlias

from .api_errors import ApiError

Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]

MAX_BODIES = 256 * 1024 * 1024
"""Bytes of request bodies that one worker keeps in memory at the same time."""


class ClientGone(Exception):
    """The client has closed the connection before its request was complete."""


class BodyMemory:
    """Counts the bytes of the bodies that one worker has in memory."""

    __slots__ = ("bytes",)

    def __init__(self) -> None:
        self.bytes = 0


async def read_body(memory: BodyMemory, headers: Mapping[bytes, bytes], receive: Receive, *, limit: int) -> bytes:
    """Return the body of a request. Its bytes count in ``memory`` from then on, until the caller takes them off.

    Raises:
        ApiError: the body is too large.
        ClientGone: the client has closed the connection.
    """
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
            memory.bytes += len(part)
            if size > limit:
                raise _make_too_large(limit)
            if memory.bytes > MAX_BODIES:
                text = "the server has too many large requests at the moment"
                raise ApiError(503, text, kind="server_error", code="overloaded", retry_after=1)
            parts.append(part)
            if not message.get("more_body"):
                return b"".join(parts) if len(parts) > 1 else part
            message = await receive()
    except BaseException:
        memory.bytes -= size
        raise


def _make_too_large(limit: int) -> ApiError:
    message = f"the body is larger than {limit:,} bytes (max_body in [serve]); send fewer inputs in one request"
    return ApiError(413, message, code="body_too_large", headers={"connection": "close"})
