"""The service example behaves as its README says, with a real Redis and over HTTP."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from servers import HOST, RedisServer, find_free_port, wait_until

SCRIPT = Path(__file__).parents[2] / "examples" / "service" / "service.py"
PREFIX = "embed:v1:"
HOUR = 3600.0
SECRET = "the patient's name is Ottokar"
TEXTS = [f"{SECRET}, file {i}" for i in range(20)]


class Service:
    """The example in its own process."""

    def __init__(self, redis: RedisServer, log: Path, **environment: str) -> None:
        self.port = find_free_port()
        self.log = log
        self.environment = {**os.environ, "REDIS_URL": redis.url, "EMBED_TIMEOUT": "60s", **environment}
        self.environment["EMBEDONCE__CACHE__FLUSH_TIMEOUT"] = "60s"
        self.environment.pop("PYTHONWARNINGS", None)

    def __enter__(self) -> Self:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, SCRIPT, "--port", str(self.port)], env=self.environment, stdout=log, stderr=log
            )
        try:
            wait_until(lambda: self.process.poll() is not None or self.metrics(), "the service answers")
            assert self.process.poll() is None, self.log.read_text()
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) in (0, -signal.SIGTERM), self.log.read_text()

    def request(self, method: str, path: str, body: bytes | None = None) -> tuple[http.client.HTTPResponse, bytes]:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=60)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response, response.read()
        finally:
            connection.close()

    def embed(self, texts: Any, **more: Any) -> tuple[int, dict[str, Any]]:
        response, body = self.request("POST", "/embed", json.dumps({"texts": texts, **more}).encode())
        answer = json.loads(body)
        answer["ms"] = response.getheader("Server-Timing")
        return response.status, answer

    def sources(self, texts: list[str]) -> list[str]:
        status, answer = self.embed(texts)
        assert status == 200
        assert np.array(answer["vectors"]).shape == (len(texts), 384)
        return list(answer["sources"])

    def metrics(self) -> dict[str, float]:
        _, body = self.request("GET", "/metrics")
        return {
            name: float(value) for name, value in re.findall(r"^(embed_cache\S+) (\S+)$", body.decode(), re.MULTILINE)
        }


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    """Start a Redis for this test only, because the test kills it."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def read_keys(redis: RedisServer) -> list[bytes]:
    return list(redis.call("KEYS", "*"))


def read_vector_keys(redis: RedisServer) -> list[bytes]:
    """Return the keys of vectors, without those of space cards."""
    return [key for key in read_keys(redis) if b".card." not in key]


def wait_for_vectors(redis: RedisServer, count: int) -> None:
    wait_until(lambda: len(read_vector_keys(redis)) == count, f"{count} vectors are in Redis")


def test_a_hit_needs_no_model_and_is_counted(redis: RedisServer, log: Path) -> None:
    with Service(redis, log) as service:
        assert service.sources(TEXTS) == ["provider"] * 20
        found = service.metrics()
        assert found["embed_cache_misses_total"] == 20
        assert found['embed_cache_hits_total{tier="redis"}'] == 0
        wait_for_vectors(redis, 20)
        assert service.sources([*TEXTS[:7], f"  {TEXTS[7]} "]) == ["redis"] * 8
        found = service.metrics()
        assert found["embed_cache_misses_total"] == 20
        assert found['embed_cache_hits_total{tier="redis"}'] == 8
        assert found['embed_cache_provider_texts_total{provider="ngram"}'] == 20
    with Service(redis, log) as service:  # another process
        _, first = service.embed(TEXTS)
        timed = [service.embed([text])[1] for text in TEXTS]
        assert {source for answer in (first, *timed) for source in answer["sources"]} == {"redis"}
        assert [answer["vectors"][0] for answer in timed] == first["vectors"]
        assert service.metrics()["embed_cache_misses_total"] == 0
        print("a hit of one text:", sorted(answer["ms"] for answer in timed)[len(timed) // 2])


@pytest.mark.parametrize(("ttl", "seconds"), [(None, HOUR), ("90s", 90.0), ("2d", 2 * 86_400.0)])
def test_the_ttl_is_an_hour_or_the_value_of_the_environment(
    ttl: str | None, seconds: float, redis: RedisServer, log: Path
) -> None:
    with Service(redis, log, **({"EMBED_TTL": ttl} if ttl else {})) as service:
        start = time.monotonic()
        service.sources(TEXTS)
        wait_for_vectors(redis, 20)
        left = [redis.call("PTTL", key) / 1000 for key in read_vector_keys(redis)]
        gone = time.monotonic() - start
    assert max(left) <= seconds
    assert min(left) > 0.95 * seconds - gone - 1  # TTLs are spread over 5 %, so that not all entries expire together


def test_neither_redis_nor_the_log_contains_a_text(redis: RedisServer, log: Path) -> None:
    with Service(redis, log) as service:
        service.sources(TEXTS)
        wait_for_vectors(redis, 20)
        service.sources(TEXTS)
        assert service.embed([SECRET, 7])[0] == 400
        assert service.embed([SECRET + "\ud800"])[0] == 400
        assert service.embed(SECRET)[0] == 400
        assert service.embed([SECRET], task=SECRET)[0] == 400
        assert service.request("POST", "/embed", f'{{"texts": ["{SECRET}"'.encode())[0].status == 400
        assert service.request("POST", "/embed", b"\xff" + SECRET.encode())[0].status == 400
        assert service.request("POST", "/embed", b"[" * 100_000)[0].status == 400
        assert service.request("POST", "/embed", b"1" * 10_000)[0].status == 400
        redis.kill()
        service.sources([f"{SECRET}, {i}" for i in range(5)])
        redis.restart()
    logged = log.read_bytes()
    assert logged.count(b"POST /embed") > 5
    with RedisServer() as fresh:  # the first Redis lost its entries when it was killed
        with Service(fresh, log) as service:
            service.sources(TEXTS)
            wait_for_vectors(fresh, 20)
        held = [part for key in read_keys(fresh) for part in (key, fresh.call("GET", key))]
    assert len(held) == 44, "20 vectors, a space card and a record of savings"
    assert all(key.startswith(PREFIX.encode()) for key in held[::2])
    for part in (*held, log.read_bytes()):
        for word in (SECRET, "patient", "Ottokar"):
            assert word.encode() not in part


def test_without_redis_it_answers_and_a_restarted_redis_is_used(redis: RedisServer, log: Path) -> None:
    with Service(redis, log) as service:
        service.sources(TEXTS)
        wait_for_vectors(redis, 20)
        redis.kill()
        start = time.monotonic()
        for number in range(20):
            assert service.sources([TEXTS[number], f"new {number}"]) == ["provider"] * 2
        print(f"20 calls without Redis: {(time.monotonic() - start) * 1e3:.0f} ms")
        found = service.metrics()
        errors = sum(value for name, value in found.items() if name.startswith("embed_cache_errors_total"))
        assert errors >= 3
        assert found['embed_cache_skipped_total{tier="redis"}'] > 0, "the tier is skipped while it is down"
        assert found["embed_cache_misses_total"] == 60
        redis.restart()
        number = iter(range(100_000))

        def used() -> bool:
            service.sources(["back?", f"back {next(number)}?"])
            return service.sources(["back?"]) == ["redis"]

        wait_until(used, "Redis is used again")
    assert len(re.findall("tier 'redis': reads are failing", log.read_text())) == 1


def test_it_starts_without_redis(redis: RedisServer, log: Path) -> None:
    redis.kill()
    with Service(redis, log) as service:
        assert service.sources(TEXTS) == ["provider"] * 20


def test_a_hanging_redis_costs_its_timeout_once(redis: RedisServer, log: Path) -> None:
    with Service(redis, log, EMBED_TIMEOUT="250ms") as service:
        redis.pause()
        try:
            start = time.monotonic()
            for number in range(50):
                assert service.sources([f"new {number}"]) == ["provider"]
            took = time.monotonic() - start
            found = service.metrics()
        finally:
            redis.resume()
        print(f"50 calls with a Redis that hangs, timeout 250 ms: {took * 1e3:.0f} ms")
        errors = {name: value for name, value in found.items() if name.startswith("embed_cache_errors_total") and value}
        assert list(errors.values()) == [1], f"only one call waited: {errors}"
        assert found['embed_cache_skipped_total{tier="redis"}'] == 49


def test_concurrent_requests_compute_a_text_once(redis: RedisServer, log: Path) -> None:
    """Redis is the only tier and is written in the background. Vectors on their way must not be computed again."""
    with Service(redis, log) as service, ThreadPoolExecutor(8) as pool:
        for number in range(10):
            texts = [f"{TEXTS[0]}, call {number}"]
            assert all(pool.map(service.sources, [texts] * 8))
            assert all(service.sources(texts) for _ in range(4))
        assert service.metrics()["embed_cache_misses_total"] == 10


def test_an_empty_batch_is_answered(redis: RedisServer, log: Path) -> None:
    with Service(redis, log) as service:
        assert service.embed([])[1]["vectors"] == []
