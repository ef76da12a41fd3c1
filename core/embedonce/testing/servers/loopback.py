"""The base of the loopback servers. It serves HTTP in a thread, injects faults, and makes vectors from hashes."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Generic, TypeVar
from urllib.parse import parse_qs, urlsplit

import numpy as np

from embedonce.vectors import Vector

KindT = TypeVar("KindT", bound=str)
ServerT = TypeVar("ServerT", bound="LoopbackServer[Any]")


@dataclass(frozen=True, slots=True)
class Request:
    """A request as received."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    """The headers of the request; their names are in lower case."""
    body: Any
    """The decoded JSON, or None if the request had no body."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply. ``content`` is sent unchanged if it is bytes, else as JSON, which may contain NaN and infinity."""

    status: int
    content: Any
    headers: Mapping[str, str] = field(default_factory=dict)

    def encode(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else json.dumps(self.content).encode()


class RequestRefused(Exception):
    """Raised to refuse a request with a reply."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(f"status {reply.status}")
        self.reply = reply


@dataclass(frozen=True, slots=True)
class Item:
    """A vector of an answer, and its index in the answer."""

    index: int
    vector: Vector | None
    """The vector, or None for a row that is null."""


@dataclass(slots=True)
class ActiveFault:
    """A fault that :meth:`LoopbackServer.misbehave` started."""

    kind: str
    times: int | None = 1
    seconds: float = 0.05
    message: str | None = None
    where: Callable[[Any], bool] | None = None

    def find_struck(self, inputs: Sequence[Any]) -> list[int]:
        """Return the positions of the inputs that the fault strikes: those that match ``where``, or the first one."""
        return [place for place, one in enumerate(inputs) if (not place if self.where is None else self.where(one))]

    def write_message(self, default: str, inputs: Sequence[Any]) -> str:
        """Return the message of an error reply, with the first input that the fault strikes in place of ``{text}``.

        ``{text!r}`` becomes the input as Python writes it.
        """
        struck = self.find_struck(inputs)
        text = inputs[struck[0]] if struck else ""
        return (self.message or default).replace("{text}", str(text)).replace("{text!r}", repr(text))


@dataclass(slots=True)
class _RateLimit:
    """The number of requests that are allowed in a window. A window begins with its first request."""

    requests: int
    seconds: float
    kind: str
    clock: Callable[[], float]
    begun: float = -math.inf
    used: int = 0

    def take(self) -> ActiveFault | None:
        """Count a request. Return the fault to answer with if the window has no room for the request."""
        now = self.clock()
        if now - self.begun >= self.seconds:
            self.begun, self.used = now, 0
        self.used += 1
        return ActiveFault(self.kind, seconds=self.begun + self.seconds - now) if self.used > self.requests else None


class LoopbackServer(Generic[KindT]):
    """Serves one API on a free port of 127.0.0.1, from construction until :meth:`close`."""

    KINDS: tuple[str, ...] = ()

    def __init__(self, *, model: str, dimensions: int, api_key: str | None) -> None:
        self.model = model
        """Default model of :meth:`vector_of`."""
        self.dimensions = dimensions
        """Number of dimensions of the vectors, unless a request asks for fewer."""
        self.api_key = api_key
        """The key that requests must have; None accepts any key, or no key."""
        self.requests: list[Request] = []
        """Every request, in order of arrival."""
        self.count: Counter[Any] = Counter()
        """Number of times that each input (a text or a tuple of tokens) was embedded."""
        self._faults: deque[ActiveFault] = deque()
        self._rate_limit: _RateLimit | None = None
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._hanging = threading.Semaphore(0)
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.loopback = self
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True, name=type(self).__name__
        )
        self._thread.start()

    @property
    def url(self) -> str:
        """Scheme, host and port."""
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def texts(self) -> int:
        """Number of inputs that were embedded, including repeated inputs."""
        with self._lock:
            return self.count.total()

    def misbehave(
        self,
        kind: KindT,
        *,
        times: int | None = 1,
        seconds: float = 0.05,
        where: Callable[[Any], bool] | None = None,
        message: str | None = None,
    ) -> None:
        """Misbehave in the next ``times`` requests for vectors; None means every request until :meth:`heal`.

        ``where`` limits the fault to requests with a matching input (a text or a list of tokens). A fault that damages
        one vector then damages the vector of each matching input. Otherwise it damages the first vector.

        If several faults apply to a request, the fault that was set first is used. ``seconds`` is the time to wait
        that a rate limit names and, for the kind ``drip``, the time between two bytes of the body. ``message``
        replaces the message of an error reply; ``{text}`` in it becomes the first matching input, and ``{text!r}`` the
        input as Python writes it.
        """
        self._check_kind(kind)
        with self._lock:
            self._faults.append(ActiveFault(kind, times, seconds, message, where))

    def limit_rate(
        self,
        requests: int,
        seconds: float,
        *,
        kind: str = "rate_limit",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Answer at most this many requests for vectors in a window of ``seconds``, until :meth:`heal`.

        A window begins with its first request. Further requests get the reply of ``kind``, which names the rest of the
        window if it names a time. ``clock`` returns the time in seconds.
        """
        self._check_kind(kind)
        with self._lock:
            self._rate_limit = _RateLimit(requests, seconds, kind, clock)

    def _check_kind(self, kind: str) -> None:
        if kind not in self.KINDS:
            raise ValueError(f"kind must be one of {', '.join(self.KINDS)}, got {kind!r}")

    def heal(self) -> None:
        """End all faults and the rate limit, answer the requests that hang, and send the rest of unfinished replies."""
        with self._lock:
            self._faults.clear()
            self._rate_limit = None
            released, self._released = self._released, threading.Event()
        released.set()

    def until_hanging(self) -> None:
        """Block until a request hangs. The next call of this method waits until another request hangs.

        Raises:
            TimeoutError: no request hangs after 60 seconds.
        """
        if not self._hanging.acquire(timeout=60):
            raise TimeoutError("expected a hanging request within 60 s, got none")

    def close(self) -> None:
        """Stop serving, and release the requests that hang."""
        self.heal()
        self._released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self: ServerT) -> ServerT:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- methods that each API implements -----------------------------------------------------

    def route(self, request: Request) -> Reply | None:
        """Return the reply to a request, or None if the request is for vectors."""
        raise NotImplementedError

    def inputs_of(self, request: Request) -> list[Any]:
        """Return the inputs of a request for vectors, or an empty list if the request is invalid."""
        raise NotImplementedError

    def embed(self, request: Request, fault: ActiveFault | None) -> Reply:
        """Return the vectors, damaged by the fault.

        Raises:
            RequestRefused: the API would refuse the request.
        """
        raise NotImplementedError

    def failure(self, fault: ActiveFault, inputs: Sequence[Any]) -> Reply | None:
        """Return the error reply of a fault, or None if its kind is not an error reply."""
        raise NotImplementedError

    # --- one request --------------------------------------------------------------------------

    def handle(self, handler: _Handler, request: Request) -> None:
        """Answer a request, or apply the next fault to it."""
        with self._lock:
            self.requests.append(request)
        reply = self.route(request)
        if reply is not None:
            handler.send(reply)
            return
        inputs = self.inputs_of(request)
        with self._lock:
            fault = self._take_fault(inputs)
            released = self._released
        kind = None if fault is None else fault.kind
        if kind == "hang":
            self._hanging.release()
            released.wait()
        if kind == "disconnect":
            handler.hang_up()
            return
        try:
            failure = None if fault is None else self.failure(fault, inputs)
            reply = failure or self.embed(request, fault)
        except RequestRefused as refused:
            reply = refused.reply
        if fault is not None and kind == "drip":
            handler.send(reply, drip=(fault.seconds, released))
        else:
            handler.send(reply, truncated=kind == "truncated")

    def _take_fault(self, inputs: Sequence[Any]) -> ActiveFault | None:
        """Return the first fault that applies to a request with these inputs."""
        limited = self._rate_limit and self._rate_limit.take()
        if limited:
            return limited
        fault = next((one for one in self._faults if one.where is None or one.find_struck(inputs)), None)
        if fault is not None and fault.times is not None:
            fault.times -= 1
            if fault.times <= 0:
                self._faults.remove(fault)
        return fault

    def count_inputs(self, inputs: Sequence[Any]) -> None:
        """Add inputs to ``count``."""
        with self._lock:
            self.count.update(inputs)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # close() must not wait for the threads of connections, because clients may keep their connections open.
    block_on_close = False
    # The default of 5 is too small, because many clients may connect at the same time.
    request_queue_size = 128
    loopback: LoopbackServer[Any]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print the error, unless the client closed its connection."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Header and body are sent separately; with Nagle's algorithm each reply would wait 40 ms for an ACK.
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def _handle(self) -> None:
        split = urlsplit(self.path)
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = Request(
            method=self.command,
            path=split.path,
            query={name: values[-1] for name, values in parse_qs(split.query).items()},
            headers={name.lower(): value for name, value in self.headers.items()},
            body=json.loads(raw) if raw else None,
        )
        server: Any = self.server
        server.loopback.handle(self, request)

    def send(self, reply: Reply, *, truncated: bool = False, drip: tuple[float, threading.Event] | None = None) -> None:
        """Send a reply: complete, truncated to half, or one byte at a time."""
        content = reply.encode()
        self.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if truncated:
            self.wfile.write(content[: len(content) // 2])
            self.hang_up()
            return
        sent = 0
        if drip is not None:
            seconds, released = drip
            while sent < len(content) and not released.wait(seconds):
                self.wfile.write(content[sent : sent + 1])
                sent += 1
        self.wfile.write(content[sent:])

    def hang_up(self) -> None:
        """Close the connection without sending more bytes."""
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing; the requests are in ``requests``."""


def make_vector(about: Any, dimensions: int) -> Vector:
    """Return a vector of unit length with ``dimensions`` values.

    ``about`` is a JSON value. Every ``about`` gives a different vector.
    """
    seed = json.dumps([about, dimensions], sort_keys=True).encode()
    # Setting the lowest bit makes every value nonzero.
    integers = np.frombuffer(hashlib.shake_256(seed).digest(4 * dimensions), "<i4") | 1
    values = integers / 2**31
    return (values / np.linalg.norm(values)).astype(np.float32)


def estimate_tokens(text: str) -> int:
    """Estimate the tokens of a text: the number of words and punctuation marks, but at least a quarter of the bytes."""
    return max(1, len(re.findall(r"\w+|[^\w\s]", text)), len(text.encode()) // 4)


def damage_items(vectors: Sequence[Vector], fault: ActiveFault | None, inputs: Sequence[Any]) -> list[Item]:
    """Return the items of an answer, damaged by a fault; some kinds of faults do not change the items."""
    items = [Item(index, vector) for index, vector in enumerate(vectors)]
    if fault is None:
        return items
    match fault.kind:
        case "short":  # a client that relies on the order gives each text the vector of the next text
            return [Item(item.index - 1, item.vector) for item in items[1:]]
        case "long":
            return [Item(0, -vectors[0]), *(Item(item.index + 1, item.vector) for item in items)]
        case "empty":
            return []
        case "dimension":
            return [Item(index, vector[:-1]) for index, vector in enumerate(vectors)]
        case "out_of_order":
            return list(reversed(items))
        case "duplicate_index":
            return [*items[:-1], Item(len(items) % max(len(items), 2), items[-1].vector)]
        case kind:
            for place in fault.find_struck(inputs):
                items[place] = Item(place, _damage_vector(vectors[place], kind))
            return items


def _damage_vector(vector: Vector, kind: str) -> Vector | None:
    match kind:
        case "null":
            return None
        case "nan":
            return _replace_middle_value(vector, np.nan)
        case "infinity":
            return _replace_middle_value(vector, np.inf)
        case "zeros":
            return np.zeros_like(vector)
        case "ragged":
            return vector[:-1]
        case "no_values":
            return vector[:0]
        case _:
            return vector


def _replace_middle_value(vector: Vector, value: float) -> Vector:
    damaged = vector.copy()
    damaged[len(damaged) // 2] = value
    return damaged
