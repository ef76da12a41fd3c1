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

    def take(self, size: int) -> None:
        """Count bytes of a body.

        Raises:
            ApiError: there are too many; nothing is counted.
        """
        if self.bytes + size > MAX_BODIES:
            message = "the server has too many large requests at the moment"
            raise ApiError(503, message, kind="server_error", code="overloaded", retry_after=1)
        self.bytes += size


async def read_body(memory: BodyMemory, headers: Mapping[bytes, bytes], receive: Receive, limit: int) -> bytes:
    """Return the body of a request. Its bytes count in ``memory`` from then on, until the caller takes them off.

    Raises:
        ApiError: the body is too large.
        ClientGone: the client has closed the connection.
    """
    length = headers.get(b"content-length")
    if length is None:
        _check_coding(headers.get(b"transfer-encoding"))
    elif length.isdigit() and int(length[:20]) > limit:
        raise _make_too_large(limit)
    parts: list[bytes] = []
    size = 0
    try:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            if size + len(part) > limit:
                raise _make_too_large(limit)
            memory.take(len(part))
            size += len(part)
            if not message.get("more_body"):
                return b"".join([*parts, part]) if parts else part
            parts.append(part)
    except BaseException:
        memory.bytes -= size
        raise


def _check_coding(coding: bytes | None) -> None:
    """Check that a body is not compressed on its way (RFC 9112, section 6.1).

    Raises:
        ApiError: it is in another coding than ``chunked``.
    """
    if coding is not None and coding.strip().lower() != b"chunked":
        raise ApiError(501, "send the body with no other Transfer-Encoding than chunked", code="not_implemented")


def _make_too_large(limit: int) -> ApiError:
    message = f"the body is larger than {limit:,} bytes (max_body in [serve]); send fewer inputs in one request"
    return ApiError(413, message, code="body_too_large", headers={"connection": "close"})
