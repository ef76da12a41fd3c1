"""HTTP/1.1 connections with bounds on bytes, time and number.

uvicorn's protocol bounds none of these: it keeps unfinished headers of any size in memory, and waits for ever for a
slow client. One sweep per worker checks all connections, because a timer per request would cost more than the request's
parsing.
"""

from __future__ import annotations

import asyncio
import http
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, cast

import httptools
from uvicorn import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from embedonce_server.api.api_errors import ApiError

SLICE = 8 * 1024
"""Bytes that are parsed at once. If they have several requests, later slices wait until these are answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of the connections of one worker. Sizes are in bytes, times in seconds."""

    connections: int = 1024
    target: int = 8 * 1024
    """Size of the path and the query of a request."""
    headers: int = 100
    head: int = 64 * 1024
    """Size of a request's head, and of anything in a body that is not content, such as the names of chunks."""
    discarded: int = 1024 * 1024
    """Bytes that are read and discarded after an answer that closes the connection."""
    head_seconds: float = 10.0
    """From the first byte of a request, or from the connection, to the end of the head."""
    body_seconds: float = 60.0
    """From the end of the head to the end of the body."""
    pause_seconds: float = 10.0
    """Between two parts of a body."""
    discard_seconds: float = 5.0
    """From an answer to the end of the body, if the answer came before that end; or to the end of the connection."""
    unread_seconds: float = 30.0
    """Without any progress, while a client does not read its answer."""
    idle_seconds: float = 75.0
    """From an answer to the first byte of the next request."""
    sweep_seconds: float = 1.0
    """Between two checks of all connections. A time above may be longer by this much."""


class WorkerState(ServerState):
    """What the connections of one worker share."""

    def __init__(self, limits: Limits | None = None) -> None:
        super().__init__()
        self.limits = limits or Limits()
        self.is_draining = False
        """Whether the worker stops. Each answer closes its connection then."""
        self.refused: Counter[str] = Counter()
        """Number of refused requests and dropped connections, by the reason."""


class Phase(IntEnum):
    """What the newest request of a connection waits for."""

    NEW = 0
    """The first byte of the first request."""
    IDLE = 1
    """The first byte of another request."""
    HEAD = 2
    """The end of the head."""
    BODY = 3
    """The end of the body."""
    ANSWER = 4
    """The answer of the application."""
    REST = 5
    """The end of the body, although the request is answered."""
    ENDING = 6
    """The end of the connection. What arrives is discarded."""


NEW, IDLE, HEAD, BODY, ANSWER, REST, ENDING = Phase
WAITING = (NEW, IDLE, REST, ENDING)
"""Phases in which no request is under way."""


FRAMING = (b"content-length", b"transfer-encoding")
"""Headers that say where a body ends."""


def _make_answer(code: str, status: int, message: str, retry_after: float | None = None) -> tuple[str, bytes]:
    error = ApiError(
        status, message, kind="server_error" if status >= 500 else "invalid_request_error", code=code,
        retry_after=retry_after,
    )  # fmt: skip
    body = error.to_body()
    lines = [
        f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
        *(f"{name}: {value}" for name, value in error.headers.items()),
    ]
    return code, "\r\n".join([*lines, "", ""]).encode("ascii") + body


_LIMITS = Limits()
INVALID = _make_answer("invalid_http", 400, "the request is not valid HTTP/1.1")
LONG_TARGET = _make_answer("target_too_long", 414, f"the path is longer than {_LIMITS.target:,} bytes")
LONG_HEAD = _make_answer("headers_too_large", 431, f"the headers have more than {_LIMITS.head:,} bytes")
MANY_HEADERS = _make_answer("too_many_headers", 431, f"the request has more than {_LIMITS.headers} headers")
LONG_OVERHEAD = _make_answer("overhead_too_large", 400, "the body has too many bytes that are not its content")
SLOW_HEAD = _make_answer("slow_headers", 408, "the headers did not arrive in time")
SLOW_BODY = _make_answer("slow_body", 408, "the body did not arrive in time")
FULL = _make_answer("too_many_connections", 503, "the server has too many connections; try again", retry_after=1)


class _Flow(FlowControl):
    """Flow control of a connection that can be held. While it is held, no call of the application resumes reading."""

    is_held = False
    has_resumed = False
    """Whether the client has read so much that the application may write again, since the last check."""

    def resume_writing(self) -> None:
        self.has_resumed = True
        super().resume_writing()

    def hold(self) -> None:
        if not self.is_held:
            self.is_held = True
            self.pause_reading()

    def release(self) -> None:
        self.is_held = False
        self.resume_reading()

    def resume_reading(self) -> None:
        if self.read_paused and not self.is_held:
            super().resume_reading()


def _discard(data: bytes) -> None:
    pass


class _Refused(Exception):
    """Ends the parsing of a request. Its answer is in ``_answer`` of the connection."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection. ``server_state`` must be a :class:`WorkerState`."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        assert self.parser is not None
        self.is_private = False
        """Whether only other workers of this server can connect here. Their number has no limit."""
        self._state = cast(WorkerState, server_state)
        self._limits = self._state.limits
        self._now: Callable[[], float] = self.loop.time
        self._feed: Callable[[Any], None] = self.parser.feed_data
        self._phase = NEW
        self._since = 0.0
        """Begin of the phase."""
        self._received = 0.0
        """Time of the last data."""
        self._overhead = 0
        """Bytes of the head, or bytes since the last content of the body."""
        self._seen = 0
        """Bytes of the body that is being received."""
        self._held = bytearray()
        """Data that follow queued requests. They are parsed after these requests were answered."""
        self._active: Any = None
        """The request that the application answers. ``cycle`` is the newest one, which may be queued behind it."""
        self._answer: tuple[str, bytes] | None = None
        """An error that is sent after the answers to earlier requests."""
        self._is_surplus = False
        self._is_resuming = False
        """Whether a new parser reads a head that was read before."""
        self._unread = 0
        """Bytes of answers that the client has not read, at the last check."""
        self._unread_since = 0.0

    # --- the connection ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self.flow = self._flow = _Flow(self.transport)
        self._since = self._received = self._now()
        count, limit = len(self.connections), self._limits.connections
        if count > limit and not self.is_private:
            self._is_surplus = True  # refused after its first data, because some clients read no answer before
            if count > 2 * limit:
                self._state.refused["too_many_connections"] += 1
                self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._active is not None and not self._active.response_complete:
            self._active.disconnected = True
            self._active.message_event.set()
        self.pipeline.clear()
        self._feed = _discard  # the parser refers to this connection

    @property
    def is_waiting(self) -> bool:
        """Whether no request is under way: none is being received, queued or answered."""
        return self._phase in WAITING and self._answer is None

    def shutdown(self) -> None:
        """Close the connection with its next answer. An idle connection stays open, because a request may arrive."""
        if self.cycle is not None:
            self.cycle.keep_alive = False

    # --- data ---

    def data_received(self, data: bytes) -> None:
        if self._phase is ENDING:
            self._overhead += len(data)
            if self._overhead > self._limits.discarded:
                self.transport.abort()
            return
        if self._is_surplus:
            self._refuse(FULL)
            return
        self._received = self._now()
        if self._flow.is_held:
            self._held += data
        elif len(data) <= SLICE:
            self._parse(data)
        else:
            self._parse_slices(data)

    def _parse_slices(self, data: bytes | bytearray) -> None:
        view, start = memoryview(data), 0
        while start < len(data):
            if self._flow.is_held:
                self._held += view[start:]
                return
            if self._phase is ENDING or self.transport.is_closing():
                return
            # No slices are needed inside a body, and its end is known if it is not chunked.
            rest = self._read_length() - self._seen if self._phase is BODY else 0
            end = start + max(rest, SLICE)
            self._parse(view[start:end])
            start = end

    def _read_length(self) -> int:
        """Return the ``content-length`` of the request that is being received; 0 if it has none."""
        # The parser has accepted the value, and accepts only one.
        return next((int(value) for name, value in self.cycle.scope["headers"] if name == b"content-length"), 0)

    def _parse(self, data: bytes | memoryview) -> None:
        seen = self._seen
        try:
            self._feed(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._parse_after_upgrade(data, upgrade)
        except httptools.HttpParserError:
            self._refuse(self._answer or INVALID)
            return
        if self._phase is HEAD:
            self._overhead += len(data)
            if self._overhead > self._limits.head:
                self._refuse(LONG_TARGET if len(self.url) > self._limits.target else LONG_HEAD)
        elif self._phase is BODY:
            self._overhead = self._overhead + len(data) if self._seen == seen else 0
            if self._overhead > self._limits.head:
                self._refuse(LONG_OVERHEAD)

    def _parse_after_upgrade(self, data: bytes | memoryview, upgrade: httptools.HttpParserUpgrade | None) -> None:
        """Parse what follows a request that asks for another protocol. It is answered as if it did not ask.

        Java's client asks for HTTP/2 in the first request to each host. The parser takes what follows the head of such
        a request for the other protocol, although it is the body.
        """
        while upgrade is not None:
            data, upgrade = data[upgrade.args[0] :], None
            try:
                self._resume_body()
                self._feed(data)
            except httptools.HttpParserUpgrade as another:
                upgrade = another
            except httptools.HttpParserError:
                self._refuse(self._answer or INVALID)

    def _resume_body(self) -> None:
        """Let a new parser read the body of the last request, if it has one, as the body of the same request."""
        scope = self.cycle.scope
        framing = [(name, value) for name, value in scope["headers"] if name in FRAMING]
        if not framing:
            return
        self.parser = httptools.HttpRequestParser(self)
        self._feed = self.parser.feed_data
        self._is_resuming = True
        lines = [b"POST / HTTP/" + scope["http_version"].encode(), *(b"%b: %b" % pair for pair in framing), b"", b""]
        self.cycle.more_body = True
        self._phase = BODY
        self._feed(b"\r\n".join(lines))
        self._is_resuming = False

    # --- callbacks of the parser ---

    def on_message_begin(self) -> None:
        if self._is_resuming:
            return
        super().on_message_begin()
        self._phase = HEAD
        self._since = self._received
        self._overhead = 0

    def on_headers_complete(self) -> None:
        if self._is_resuming:
            return
        limits = self._limits
        if len(self.url) > limits.target:
            self._answer = LONG_TARGET
        elif len(self.headers) > limits.headers:
            self._answer = MANY_HEADERS
        elif self._overhead + SLICE > limits.head and _measure(self.url, self.headers) > limits.head:
            self._answer = LONG_HEAD
        elif not self.headers and self.parser is not None and self.parser.get_http_version() == "0.9":
            self._answer = INVALID
        if self._answer is not None:
            raise _Refused
        super().on_headers_complete()
        # Trailers of the body would be added to the headers, which the application may be reading.
        self.headers = []
        self._phase = BODY
        self._since = self._received
        self._overhead = self._seen = 0
        if self.pipeline:
            self._flow.hold()
        else:
            self._active = self.cycle
        if self._state.is_draining:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._seen += len(body)
        cycle = self.cycle
        if not cycle.response_complete:
            cycle.body += body
            if len(cycle.body) > HIGH_WATER_LIMIT:
                self._flow.pause_reading()
            cycle.message_event.set()

    def on_message_complete(self) -> None:
        cycle = self.cycle
        if cycle.response_complete:
            self._phase = IDLE
            self._since = self._received
        else:
            self._phase = ANSWER
            cycle.more_body = False
            cycle.message_event.set()

    # --- answers ---

    def on_response_complete(self) -> None:
        if self.pipeline:
            self._active = self.pipeline[-1][0]
            super().on_response_complete()  # begins the next request
            if not self.pipeline and self._answer is None and not self.transport.is_closing():
                self._parse_held()
            return
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self._flow.resume_reading()
        if self._phase is ANSWER:
            self._phase = IDLE
            self._since = self._now()
        elif self._answer is not None:
            self._send_error()
        elif self._phase is BODY:
            if self.expect_100_continue:
                # The client may not send the body, so what arrives next is either the body or another request.
                self._end()
            else:
                self._phase = REST
                self._since = self._now()

    def _parse_held(self) -> None:
        """Parse what has followed the queued requests, now that the last of them is being answered."""
        self._flow.release()
        if self._held:
            held, self._held = self._held, bytearray()
            self._parse_slices(held)

    def _refuse(self, answer: tuple[str, bytes]) -> None:
        """Send an error after the answers to all earlier requests, and close the connection."""
        self._state.refused[answer[0]] += 1
        phase, self._phase, self._since = self._phase, ENDING, self._now()
        self._answer = answer
        self._held.clear()
        if phase is REST:
            self._answer = None
            self._end()
        elif phase is BODY and not self.pipeline:
            self._active.disconnected = True  # so that the application reads no further, and writes nothing
            self._active.message_event.set()
            if self._active.response_started:
                self.transport.abort()
            else:
                self._send_error()
        else:
            if phase is BODY:
                self.pipeline.popleft()
            if self._active is None or self._active.response_complete:
                self._send_error()
            else:
                self._flow.hold()

    def _send_error(self) -> None:
        answer, self._answer = self._answer, None
        if answer is not None and not self.transport.is_closing():
            self.transport.write(answer[1])
            self._end()

    def _end(self) -> None:
        """End our side of the connection, and discard what arrives until the client ends its side.

        If the connection was closed at once while data arrive, the client's system would discard the answer.
        """
        self._phase, self._since, self._overhead = ENDING, self._now(), 0
        self.transport.write_eof()
        self._flow.release()

    # --- time ---

    def check_time(self, now: float, passed: float) -> None:
        """Drop the connection if something takes too long. ``passed`` are the seconds since the last check."""
        limits = self._limits
        unread = self.transport.get_write_buffer_size()
        # An answer may be written in parts. Then the buffer may be as full as before, although the client reads.
        has_resumed, self._flow.has_resumed = self._flow.has_resumed, False
        if unread and self._unread and unread >= self._unread and not has_resumed:
            if now - self._unread_since > limits.unread_seconds:
                self._state.refused["unread_answer"] += 1
                self.transport.abort()
                return
        else:
            self._unread_since = now
        self._unread = unread
        if self.transport.is_closing():
            return
        phase = self._phase
        if phase is HEAD or phase is BODY:
            if self.flow.read_paused or (phase is BODY and self.cycle.waiting_for_100_continue):
                self._since += passed  # the client waits for us
                self._received = now
            elif phase is HEAD:
                if now - self._since > limits.head_seconds:
                    self._refuse(SLOW_HEAD)
            elif now - self._since > limits.body_seconds or now - self._received > limits.pause_seconds:
                self._refuse(SLOW_BODY)
        elif phase is NEW:
            if now - self._since > limits.head_seconds:
                self.transport.close()
        elif phase is IDLE:
            if now - self._since > limits.idle_seconds:
                self.transport.close()
        elif phase is REST:
            if now - self._since > limits.discard_seconds:
                self.transport.close()
        elif phase is ENDING and self._answer is None and now - self._since > limits.discard_seconds:
            self.transport.abort()


def _measure(target: bytes, headers: Iterable[tuple[bytes, bytes]]) -> int:
    """Return the size of a request's head, without its method and version."""
    return len(target) + sum(len(name) + len(value) + 4 for name, value in headers)
