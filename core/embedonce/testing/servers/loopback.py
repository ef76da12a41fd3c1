"""What the loopback servers share: a thread that serves HTTP on 127.0.0.1, faults on demand, vectors from a hash."""

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
from numpy.typing import NDArray

KindT = TypeVar("KindT", bound=str)
ServerT = TypeVar("ServerT", bound="LoopbackServer[Any]")


@dataclass(frozen=True, slots=True)
class Request:
    """A request as it came in."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    """Names are in lower case."""
    body: Any
    """The decoded JSON; None where there was none."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What goes back: ``content`` is sent as JSON, NaN and infinity included, unless it is bytes."""

    status: int
    content: Any
    headers: Mapping[str, str] = field(default_factory=dict)

    def encoded(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else json.dumps(self.content).encode()


class Refused(Exception):
    """The request is refused with this reply."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(f"status {reply.status}")
        self.reply = reply


@dataclass(frozen=True, slots=True)
class Item:
    """A vector of an answer, with the index that the answer gives it."""

    index: int
    vector: NDArray[np.float32]


@dataclass(slots=True)
class _Fault:
    kind: str
    times: int | None
    seconds: float


class LoopbackServer(Generic[KindT]):
    """Serves one API on a free port of 127.0.0.1, from when it is made until it is closed."""

    KINDS: tuple[str, ...] = ()

    def __init__(self, *, model: str, dimensions: int, api_key: str | None) -> None:
        self.model = model
        """The model of :meth:`vector_of`, unless it is told another one."""
        self.dimensions = dimensions
        """Dimensions of vectors, unless a request asks for fewer."""
        self.api_key = api_key
        """The key that requests must have; None: any, or none at all."""
        self.requests: list[Request] = []
        """Every request, in the order in which they came."""
        self.count: Counter[Any] = Counter()
        """How often each input was embedded: texts, and tuples of tokens."""
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
        """How many inputs were embedded, repeated ones included."""
        with self._lock:
            return self.count.total()

    def misbehave(self, kind: KindT, *, times: int | None = 1, seconds: float = 0.05) -> None:
        """Strike the next ``times`` requests for vectors; with None all of them, until :meth:`heal`.

        A second call strikes those that come after. ``seconds`` is what ``Retry-After`` says, and the
        time between two bytes of a body that drips.
        """
        if kind not in self.KINDS:
            raise ValueError(f"{kind!r} is not one of {', '.join(self.KINDS)}")
        with self._lock:
            self._faults.append(_Fault(kind, times, seconds))

    def heal(self) -> None:
        """End all faults, and answer the requests that hang or drip."""
        with self._lock:
            self._faults.clear()
            released, self._released = self._released, threading.Event()
        released.set()

    def until_hanging(self) -> None:
        """Return as soon as one more request hangs.

        Raises:
            TimeoutError: none did within 60 seconds.
        """
        if not self._hanging.acquire(timeout=60):
            raise TimeoutError("no request hangs")

    def close(self) -> None:
        """Stop serving. Requests that hang are let go."""
        self.heal()
        self._released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self: ServerT) -> ServerT:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- what an API's own server says --------------------------------------------------------

    def route(self, request: Request) -> Reply | None:
        """Return the reply to a request that is not for vectors; None for one that is."""
        raise NotImplementedError

    def embed(self, request: Request, kind: str | None) -> Reply:
        """Return the vectors, spoilt in the way that ``kind`` says.

        Raises:
            Refused: the API would not take the request.
        """
        raise NotImplementedError

    def failure(self, kind: str, seconds: float) -> Reply | None:
        """Return the reply of a kind that is an error, None of any other."""
        raise NotImplementedError

    # --- one request --------------------------------------------------------------------------

    def handle(self, handler: _Handler, request: Request) -> None:
        """Answer a request, or fail to."""
        with self._lock:
            self.requests.append(request)
        reply = self.route(request)
        if reply is not None:
            handler.send(reply)
            return
        with self._lock:
            fault = self._next_fault()
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
        except Refused as refused:
            reply = refused.reply
        if fault is not None and kind == "drip":
            handler.send(reply, drip=(fault.seconds, released))
        else:
            handler.send(reply, truncated=kind == "truncated")

    def _next_fault(self) -> _Fault | None:
        if not self._faults:
            return None
        fault = self._faults[0]
        if fault.times is not None:
            fault.times -= 1
            if fault.times <= 0:
                self._faults.popleft()
        return fault

    def counted(self, inputs: Sequence[Any]) -> None:
        """Count inputs that are embedded."""
        with self._lock:
            self.count.update(inputs)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # A thread of a client that keeps its connection would hold up close.
    block_on_close = False
    # Many clients may connect at once; the default is 5.
    request_queue_size = 128
    loopback: LoopbackServer[Any]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print what went wrong, unless it is the client who went away."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body are sent apart: without this each reply waits 40 ms for an acknowledgement.
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
        """Send a reply: whole, up to its middle, or a byte at a time."""
        content = reply.encoded()
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
        """Close the connection after what was sent so far."""
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet: what came is in ``requests``."""


def vector_from(about: Any, dimensions: int) -> NDArray[np.float32]:
    """Return a vector of length 1 that is another one for any other ``about`` (JSON), shape (dimensions,)."""
    seed = json.dumps([about, dimensions], sort_keys=True).encode()
    # The set bit keeps every value from being zero.
    integers = np.frombuffer(hashlib.shake_256(seed).digest(4 * dimensions), "<i4") | 1
    values = integers / 2**31
    return (values / np.linalg.norm(values)).astype(np.float32)


def tokens_in(text: str) -> int:
    """Return roughly how many tokens a text has: words and marks, and at least a quarter of its bytes."""
    return max(1, len(re.findall(r"\w+|[^\w\s]", text)), len(text.encode()) // 4)


def spoilt(items: Sequence[Item], kind: str | None) -> list[Item]:
    """Return the items of an answer as ``kind`` leaves them; kinds that are not about items leave them alone."""
    first, *others = items
    count = len(items)
    match kind:
        case "short":  # and who trusts the order takes the next text's vector
            return [Item(item.index - 1, item.vector) for item in others]
        case "long":
            return [Item(0, -first.vector), *(Item(item.index + 1, item.vector) for item in items)]
        case "empty":
            return []
        case "nan":
            return [_with(first, np.nan), *others]
        case "infinity":
            return [_with(first, np.inf), *others]
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


def _with(item: Item, value: float) -> Item:
    vector = item.vector.copy()
    vector[len(vector) // 2] = value
    return replace(item, vector=vector)
