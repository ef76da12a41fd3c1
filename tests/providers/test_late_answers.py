"""Answers that have arrived while another task blocked the event loop. The loop's clock jumps, so no test waits."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from http_servers import Handler, HttpServer

pytest.importorskip("openai")
pytest.importorskip("google.genai")

from embedonce import event_loops
from embedonce_providers import _guard
from embedonce_providers.gemini import GeminiProvider
from embedonce_providers.openai import OpenAIProvider

VECTOR = [1.0, 2.0]
OPENAI_ANSWER = b'{"object": "list", "model": "m", "data": [{"object": "embedding", "index": 0, "embedding": [1, 2]}]}'
GEMINI_ANSWER = b'{"embeddings": [{"values": [1, 2]}]}'
WAIT = 60.0
"""Seconds after which a test gives up."""


class Endpoint:
    """Sends its answer in two parts, and waits between them for ``go_on``. A client that asks again gets status 400."""

    def __init__(self, answer: bytes, *, first: int) -> None:
        self.requests = 0
        self.paused, self.go_on, self.done = threading.Event(), threading.Event(), threading.Event()
        endpoint = self

        class EndpointHandler(Handler):
            def do_POST(self) -> None:
                endpoint.requests += 1
                self.rfile.read(int(self.headers["content-length"]))
                status = 200 if endpoint.requests == 1 else 400
                head = f"HTTP/1.1 {status} .\r\ncontent-type: application/json\r\ncontent-length: {len(answer)}\r\n\r\n"
                whole = head.encode() + answer
                part = 0 if first == 0 else len(head) + first
                self.wfile.write(whole[:part])
                endpoint.paused.set()
                endpoint.go_on.wait(WAIT)
                self.wfile.write(whole[part:])
                endpoint.done.set()

        self.server = HttpServer(EndpointHandler)
        self.url = self.server.url

    def close(self) -> None:
        self.go_on.set()
        self.server.close()


@pytest.fixture
def open_endpoint() -> Iterator[Callable[..., Endpoint]]:
    opened: list[Endpoint] = []

    def open_one(answer: bytes, *, first: int) -> Endpoint:
        opened.append(Endpoint(answer, first=first))
        return opened[-1]

    yield open_one
    for endpoint in opened:
        endpoint.close()


class Clock:
    """A clock that also moves when a task says that it has blocked the event loop."""

    def __init__(self) -> None:
        self.blocked = 0.0

    def read(self) -> float:
        return time.monotonic() + self.blocked

    def run(self, main: Any) -> Any:
        with asyncio.Runner() as runner:
            runner.get_loop().time = self.read  # type: ignore[method-assign]
            return runner.run(main)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(event_loops, "monotonic", made.read)
    monkeypatch.setattr(_guard, "time", SimpleNamespace(monotonic=made.read))
    return made


async def wait_in_turns(event: threading.Event) -> None:
    """Wait for an event of another thread, and let the loop read sockets meanwhile."""
    end = time.monotonic() + WAIT
    while not event.is_set() and time.monotonic() < end:
        await asyncio.sleep(0)
    assert event.is_set()


def make_openai(url: str, **options: Any) -> Any:
    return OpenAIProvider(model="m", base_url=f"{url}/v1", api_key="key-of-a-test", **options)


def make_gemini(url: str, **options: Any) -> Any:
    return GeminiProvider(model="m", base_url=url, api_key="key-of-a-test", **options)


makers = pytest.mark.parametrize(
    ("make", "answer"), [(make_openai, OPENAI_ANSWER), (make_gemini, GEMINI_ANSWER)], ids=["openai", "gemini"]
)


@makers
@pytest.mark.parametrize("first", [0, 1, 20], ids=["nothing", "the head and a byte", "half"])
def test_an_answer_that_arrived_while_the_loop_was_blocked_is_read(
    make: Any, answer: bytes, first: int, open_endpoint: Callable[..., Endpoint], clock: Clock
) -> None:
    endpoint = open_endpoint(answer, first=first)
    provider = make(endpoint.url, timeout=100.0, max_retries=2)

    async def block() -> None:
        await wait_in_turns(endpoint.paused)
        for _ in range(5):  # the client reads the first part
            await asyncio.sleep(0.01)
        endpoint.go_on.set()
        assert endpoint.done.wait(WAIT)
        clock.blocked += 1000.0

    async def serve() -> Any:
        blocking = asyncio.ensure_future(block())
        embedded = await provider.aembed(["text"], "document")
        await blocking
        return embedded.vectors

    assert [list(vector) for vector in clock.run(serve())] == [VECTOR]
    assert endpoint.requests == 1


@makers
@pytest.mark.parametrize("first", [0, 20], ids=["nothing", "half"])
@pytest.mark.parametrize("blocked", [False, True])
def test_an_answer_that_does_not_arrive_is_a_timeout(
    make: Any, answer: bytes, first: int, blocked: bool, open_endpoint: Callable[..., Endpoint], clock: Clock
) -> None:
    endpoint = open_endpoint(answer, first=first)
    provider = make(endpoint.url, timeout=5.0, max_retries=0)

    async def let_time_pass() -> None:
        await wait_in_turns(endpoint.paused)
        while True:
            clock.blocked += 4.0 if blocked else 0.03
            await asyncio.sleep(0)

    async def serve() -> None:
        passing = asyncio.ensure_future(let_time_pass())
        try:
            await provider.aembed(["text"], "document")
        finally:
            passing.cancel()

    with pytest.raises(Exception, match=r"timed out|did not arrive in time"):
        clock.run(serve())
    assert endpoint.requests == 1
