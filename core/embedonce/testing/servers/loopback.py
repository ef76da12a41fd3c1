"""The base of the loopback servers. It serves HTTP in a thread, injects faults, and makes vectors from hashes."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    vector: Vector


@dataclass(slots=True)
class _Fault:
    kind: str
    times: int | None
    seconds: float


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
        self._faults: deque[_Fault] = deque()
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

    def misbehave(self, kind: KindT, *, times: int | None = 1, seconds: float = 0.05) -> None:
        """Misbehave in the next ``times`` requests for vectors; None means every request until :meth:`heal`.

        If an earlier fault is still active, the new fault begins when the earlier fault ends. ``seconds`` is the
        value of ``Retry-After`` and, for the kind ``drip``, the time between two bytes of the body.
        """
        if kind not in self.KINDS:
            raise ValueError(f"kind must be one of {', '.join(self.KINDS)}, got {kind!r}")
        with self._lock:
            self._faults.append(_Fault(kind, times, seconds))

    def heal(self) -> None:
        """End all faults, answer the requests that hang, and send the rest of unfinished replies."""
        with self._lock:
            self._faults.clear()
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

    def embed(self, request: Request, kind: str | None) -> Reply:
        """Return the vectors, damaged according to ``kind``.

        Raises:
            RequestRefused: the API would refuse the request.
        """
        raise NotImplementedError

    def failure(self, kind: str, seconds: float) -> Reply | None:
        """Return the error reply of ``kind``, or None if ``kind`` is not an error reply."""
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
        with self._lock:
            fault = self._take_fault()
            released = self._released
        kind = None if fault is None else fault.kind
        if kind == "hang":
            self._hanging.release()
            released.wait()
        if kind == "disconnect":
            handler.hang_up()
            return
        try:
            failure = None if fault is None else self.failure(fault.kind, fault.seconds)
            reply = failure or self.embed(request, kind)
        except RequestRefused as refused:
            reply = refused.reply
        if fault is not None and kind == "drip":
            handler.send(reply, drip=(fault.seconds, released))
        else:
            handler.send(reply, truncated=kind == "truncated")

    def _take_fault(self) -> _Fault | None:
        if not self._faults:
            return None
        fault = self._faults[0]
        if fault.times is not None:
            fault.times -= 1
            if fault.times <= 0:
                self._faults.popleft()
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


def damage_items(items: Sequence[Item], kind: str | None) -> list[Item]:
    """Return the items of an answer, damaged according to ``kind``; some kinds do not change the items."""
    first, *others = items
    count = len(items)
    match kind:
        case "short":  # a client that relies on the order gives each text the vector of the next text
            return [Item(item.index - 1, item.vector) for item in others]
        case "long":
            return [Item(0, -first.vector), *(Item(item.index + 1, item.vector) for item in items)]
        case "empty":
            return []
        case "nan":
            return [_replace_middle_value(first, np.nan), *others]
        case "infinity":
            return [_replace_middle_value(first, np.inf), *others]
        case "zeros":
            return [replace(first, vector=np.zeros_like(first.vector)), *others]
        case "dimension":
            return [replace(item, vector=item.vector[:-1]) for item in items]
        case "ragged":
            return [replace(first, vector=first.vector[:-1]), *others]
        case "no_values":
            return [replace(first, vector=first.vector[:0]), *others]
        case "out_of_order":
            return list(reversed(items))
        case "duplicate_index":
            return [*items[:-1], Item(count % max(count, 2), items[-1].vector)]
        case _:
            return list(items)


def _replace_middle_value(item: Item, value: float) -> Item:
    vector = item.vector.copy()
    vector[len(vector) // 2] = value
    return replace(item, vector=vector)
