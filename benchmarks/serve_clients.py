"""The processes around the server in ``serve_load.py``: the clients that check every answer, and the model's API."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import os
import random
import time
from collections import Counter
from itertools import accumulate
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import orjson
import uvloop

from embedonce.testing.servers.loopback import ActiveFault, Reply, Request
from embedonce.testing.servers.openai import OpenAIServer
from embedonce.vectors import Vector

TENANTS = {"north": "key-of-the-tenant-north", "south": "key-of-the-tenant-south"}
MODELS = {"small": "text-embedding-3-small", "large": "text-embedding-3-large"}
"""The models of the server, and their names at the API."""
DIMENSIONS, FEWER_DIMENSIONS = 256, 64

POPULAR = 5_000
"""Number of texts that are drawn from Zipf's distribution."""
REPEATED = 200
"""Number of texts of each kind of request that computes them again each time."""
MAX_INPUTS = 32
REQUESTS_PER_CONNECTION = 100
"""Mean number of requests after which a client opens another connection."""
LONGEST_WAIT = 120.0
"""Seconds after which a client gives up."""

NO_ANSWER, REFUSED = 0, -1
"""In place of a status: the connection was closed, or it could not be opened."""

Key = tuple[str, int, str]
"""What the API computes: its name of the model, the dimensions and the text."""


class Sent(NamedTuple):
    """One request and its answer."""

    start: float
    """Time on ``time.monotonic``, which is the same in all processes."""
    seconds: float
    status: int
    kind: str
    tenant: str
    model: str
    inputs: int
    hits: int = 0
    computed: int = 0
    tokens: int = 0
    saved: int = 0
    worker: str = ""
    """Start of the number of the request. It is the same for all requests that one process has answered."""

    @property
    def end(self) -> float:
        return self.start + self.seconds


class Report(NamedTuple):
    """What the clients of one process have seen."""

    sent: list[Sent]
    asked: dict[Key, set[str]]
    """The tenants that asked for a vector which is computed once for each."""
    answered: dict[Key, set[str]]
    """Those of them that got it."""
    repeated: Counter[Key]
    """How often a vector was asked for with ``no-cache`` or ``no-store``."""
    unasked: set[Key]
    """Vectors that were only asked for with ``only-if-cached``."""
    lost: Counter[Key]
    """Vectors of the requests that got no answer."""
    faults: Counter[str]


# --- the API of the models ------------------------------------------------------------------------


class RecordingServer(OpenAIServer):
    """Notes the time of each call, of each failure, and of each vector that it computes."""

    def __init__(self) -> None:
        super().__init__(dimensions=DIMENSIONS)
        self.calls: list[float] = []
        self.failures: list[float] = []
        self.computed: list[tuple[float, Key]] = []

    def handle(self, handler: Any, request: Request) -> None:
        self.calls.append(time.monotonic())
        super().handle(handler, request)

    def failure(self, fault: ActiveFault, inputs: Any) -> Reply | None:
        self.failures.append(time.monotonic())
        return super().failure(fault, inputs)

    def embed(self, request: Request, fault: ActiveFault | None) -> Reply:
        reply = super().embed(request, fault)
        now, body = time.monotonic(), request.body
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        dimensions = body.get("dimensions", DIMENSIONS)
        self.computed += [(now, (body["model"], dimensions, text)) for text in texts]
        return reply


def run_api(pipe: Connection) -> None:
    """Serve the API until the message "end", which is answered with what the API has noted."""
    with RecordingServer() as server:
        pipe.send(server.base_url)
        while (message := pipe.recv()) != "end":
            server.heal()
            if message != "heal":
                server.misbehave(message, times=None, seconds=0.5)
            pipe.send(None)
        pipe.send((server.calls, server.failures, server.computed))


# --- the clients ----------------------------------------------------------------------------------


class Plan(NamedTuple):
    """A request that is about to be sent."""

    kind: str
    tenant: str
    model: str
    dimensions: int | None
    texts: list[str]
    encoding: str

    def list_keys(self) -> set[Key]:
        return {(MODELS[self.model], self.dimensions or DIMENSIONS, text) for text in self.texts}

    def encode(self) -> bytes:
        body: dict[str, Any] = {"model": self.model, "encoding_format": self.encoding}
        body["input"] = self.texts[0] if len(self.texts) == 1 else self.texts
        if self.dimensions is not None:
            body["dimensions"] = self.dimensions
        content = orjson.dumps(body)
        control = "" if self.kind == "plain" else f"cache-control: {self.kind}\r\n"
        return (
            f"POST /v1/embeddings HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            f"authorization: Bearer {TENANTS[self.tenant]}\r\n{control}content-length: {len(content)}\r\n\r\n"
        ).encode() + content


class Planner:
    """Chooses requests at random. Texts of the kinds of requests that compute them again are not those of others."""

    KINDS = ("plain", "no-cache", "no-store", "only-if-cached")
    WEIGHTS = (88, 3, 3, 6)

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._name = f"{seed:x}"
        self._serial = 0
        self._sums = list(accumulate(1 / rank for rank in range(1, POPULAR + 1)))
        self._ranks = range(POPULAR)

    def plan(self) -> Plan:
        rng = self._rng
        kind = rng.choices(self.KINDS, self.WEIGHTS)[0]
        count = 1 if rng.random() < 0.6 else rng.randint(2, MAX_INPUTS)
        if kind in ("no-cache", "no-store"):
            texts = [f"text {rng.randrange(REPEATED)} with {kind}" for _ in range(count)]
        else:
            texts = [f"text number {rank}" for rank in rng.choices(self._ranks, cum_weights=self._sums, k=count)]
            if rng.random() < 0.15:
                self._serial += 1
                word = "new" if kind == "plain" else "unasked"
                texts[-1] = f"{word} text {self._name}-{self._serial}"
        return Plan(
            kind,
            rng.choice(list(TENANTS)),
            rng.choice(list(MODELS)),
            FEWER_DIMENSIONS if rng.random() < 0.25 else None,
            texts,
            rng.choice(["float", "base64"]),
        )


class Clients:
    """The connections of one process."""

    def __init__(self, pipe: Connection, port: int, connections: int, think: float, seed: int) -> None:
        self._pipe = pipe
        self._port = port
        self._connections = connections
        self._think = think
        self._seed = seed
        self._report = Report([], {}, {}, Counter(), set(), Counter(), Counter())
        self._reference = OpenAIServer(dimensions=DIMENSIONS)
        self._compute = functools.lru_cache(maxsize=100_000)(self._compute_vector)
        self._going = asyncio.Event()
        self._busy = 0
        self._has_to_tell = False
        self._is_ending = False

    async def run(self) -> Report:
        asyncio.get_running_loop().add_reader(self._pipe.fileno(), self._obey)
        self._pipe.send("ready")
        await asyncio.gather(*(self._talk(self._seed * 1000 + number) for number in range(self._connections)))
        asyncio.get_running_loop().remove_reader(self._pipe.fileno())
        self._reference.close()
        return self._report

    def _compute_vector(self, model: str, dimensions: int, text: str) -> Vector:
        return self._reference.vector_of(text, model=model, dimensions=dimensions)

    def _obey(self) -> None:
        match self._pipe.recv():
            case "pause":
                self._going.clear()
                self._has_to_tell = True
                self._tell_if_idle()
            case "resume":
                self._going.set()
            case "end":
                self._is_ending = True
                self._going.set()

    def _tell_if_idle(self) -> None:
        if self._has_to_tell and not self._busy:
            self._has_to_tell = False
            self._pipe.send("paused")

    async def _talk(self, seed: int) -> None:
        rng, planner = random.Random(seed), Planner(seed)
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        while not self._is_ending:
            await asyncio.sleep(rng.uniform(0, 2 * self._think))
            await self._going.wait()
            self._busy += 1
            streams = await self._send(planner.plan(), streams)
            self._busy -= 1
            self._tell_if_idle()
            if streams is not None and rng.random() < 1 / REQUESTS_PER_CONNECTION:
                streams = await _close(streams)
        if streams is not None:
            await _close(streams)

    async def _send(self, plan: Plan, streams: Any) -> Any:
        """Send a request and check its answer. Return the connection, or None if it was closed."""
        self._note_plan(plan)
        start = time.monotonic()
        status, headers, body = NO_ANSWER, {}, b""
        try:
            async with asyncio.timeout(LONGEST_WAIT):
                if streams is None:
                    streams = await self._connect()
                status, headers, body = await _exchange(streams, plan.encode())
        except ConnectionRefusedError:
            status = REFUSED
        except (ConnectionError, asyncio.IncompleteReadError):
            status = NO_ANSWER
        except TimeoutError:
            self._report.faults[f"a request had no answer after {LONGEST_WAIT:g} s"] += 1
        seconds = time.monotonic() - start
        sent = Sent(start, seconds, status, plan.kind, plan.tenant, plan.model, len(plan.texts))
        sent = sent._replace(worker=headers.get("x-request-id", "").partition("-")[0])
        if status == 200:
            sent = self._check(plan, sent, headers, orjson.loads(body))
        elif status > 0:
            self._check_error(plan, body)
        else:
            self._report.lost.update(plan.list_keys())
        self._report.sent.append(sent)
        if streams is not None and (status <= 0 or headers.get("connection") == "close"):
            return await _close(streams)
        return streams

    async def _connect(self) -> Any:
        # All clients may start at the same moment.
        return await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 20)

    def _note_plan(self, plan: Plan) -> None:
        report, keys = self._report, plan.list_keys()
        if plan.kind == "plain":
            for key in keys:
                report.asked.setdefault(key, set()).add(plan.tenant)
        elif plan.kind == "only-if-cached":
            report.unasked.update(key for key in keys if key[2].startswith("unasked"))
        else:
            report.repeated.update(keys)

    def _check(self, plan: Plan, sent: Sent, headers: dict[str, str], answer: Any) -> Sent:
        report, dimensions = self._report, plan.dimensions or DIMENSIONS
        if [item["index"] for item in answer["data"]] != list(range(len(plan.texts))):
            report.faults["an answer has not one vector for each input"] += 1
            return sent
        for text, item in zip(plan.texts, answer["data"], strict=True):
            given = item["embedding"]
            if isinstance(given, str):
                vector = np.frombuffer(base64.b64decode(given), "<f4")
            else:
                vector = np.array(given, np.float32)
            if not np.array_equal(vector, self._compute(MODELS[plan.model], dimensions, text)):
                report.faults["an answer has a wrong vector"] += 1
        if plan.kind == "plain":
            for key in plan.list_keys():
                report.answered.setdefault(key, set()).add(plan.tenant)
        hits, computed = int(headers["x-embedonce-hits"]), int(headers["x-embedonce-computed"])
        if hits + computed != len(plan.texts):
            report.faults["the headers of an answer do not count each input"] += 1
        if plan.kind == "only-if-cached" and computed:
            report.faults["only-if-cached has computed a vector"] += 1
        if plan.kind == "no-cache" and hits:
            report.faults["no-cache has answered from a tier"] += 1
        return sent._replace(
            hits=hits,
            computed=computed,
            tokens=answer["usage"]["prompt_tokens"],
            saved=int(headers["x-embedonce-saved-tokens"]),
        )

    def _check_error(self, plan: Plan, body: bytes) -> None:
        error = orjson.loads(body)["error"]
        if not {"message", "type", "param", "code"} <= error.keys():
            self._report.faults["an error has not OpenAI's form"] += 1
        if any(text in body.decode() for text in plan.texts):
            self._report.faults["an error shows a text"] += 1


async def _exchange(streams: Any, request: bytes) -> tuple[int, dict[str, str], bytes]:
    reader, writer = streams
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.split("\r\n")[:-2]
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers["content-length"]))
    return int(first.split()[1]), headers, body


async def _close(streams: Any) -> None:
    streams[1].close()
    with contextlib.suppress(ConnectionError):
        await streams[1].wait_closed()


def run_clients(pipe: Connection, port: int, connections: int, think: float, seed: int) -> None:
    """Send requests until the message "end", and send the report."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:

        async def run() -> Report:
            return await Clients(pipe, port, connections, think, seed).run()

        report = runner.run(run())
    os.set_blocking(pipe.fileno(), True)  # uvloop has changed that
    pipe.send(report)
