"""A gateway with two layers, this process's memory in front of Postgres, both configured in embedonce.toml.

    GATEWAY_POSTGRES_URL=postgresql://user@host/database python examples/gateway/gateway.py

The script shows how long one text takes in each layer, what survives a restart, and what happens if the model or
Postgres fails.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import embedonce

CONFIG = Path(__file__).with_name("embedonce.toml")
NOWHERE = "postgresql://postgres@127.0.0.1:1/postgres"
"""An address at which no server listens."""


def time_call(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return the answer of a call, and the seconds it took."""
    start = time.perf_counter()
    answer = call()
    return answer, time.perf_counter() - start


def time_hit(cache: embedonce.Cache, text: str, calls: int = 20_000) -> float:
    """Return the seconds that one hit in memory takes, as the best of five runs."""
    embed = cache.embed
    runs = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            embed(text)
        runs.append((time.perf_counter() - start) / calls)
    return min(runs)


@contextmanager
def break_provider(cache: embedonce.Cache) -> Iterator[None]:
    """Make the provider fail as if its host were unreachable."""
    with patch.object(cache.provider, "embed", side_effect=ConnectionError("the model is not reachable")):
        yield


def main() -> None:
    """Run all steps with a text that no earlier run has embedded."""
    logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(name)s: %(message)s")
    text = f"What may a gateway keep, and for how long? (asked at {time.time()})"

    with embedonce.open(CONFIG) as cache:
        answer, seconds = time_call(lambda: cache.fetch([text]))
        print(f"first      from {answer.sources[0]}, {seconds * 1e3:.2f} ms")
        print(f"again      from {cache.fetch([text]).sources[0]}, {time_hit(cache, text) * 1e6:.2f} µs")

    with embedonce.open(CONFIG) as cache:
        cache.lookup(["connects, and looks at the table"])
        answer, seconds = time_call(lambda: cache.fetch([text]))
        print(f"restarted  from {answer.sources[0]}, {seconds * 1e3:.2f} ms")
        print(f"again      from {cache.fetch([text]).sources[0]}: it was promoted")

        with break_provider(cache):
            answer = cache.fetch([f"{text} Without the model?"])
            space = answer.space
            print(f"no model   from {answer.sources[0]}, in another space: {space.dimensions} dimensions")
            print(f"           what is cached is still served: from {cache.fetch([text]).sources[0]}")

    with patch.dict(os.environ, GATEWAY_POSTGRES_URL=NOWHERE), embedonce.open(CONFIG) as cache:
        for number in range(4):
            answer, seconds = time_call(lambda number=number: cache.fetch([f"{text} Call {number}."]))
            cache.flush()  # so that a warning is printed before the line, not in the middle of it
            print(f"no store   from {answer.sources[0]}, {seconds * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
