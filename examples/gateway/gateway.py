"""A gateway's two layers: this process's memory before Postgres, all of it from embedonce.toml.

    GATEWAY_POSTGRES_URL=postgresql://user@host/database python examples/gateway/gateway.py

Shows what one text costs in each layer, what a restart leaves, and what happens without the model and without Postgres.
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
"""Nobody listens there."""


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return the answer and how many seconds it took."""
    start = time.perf_counter()
    answer = call()
    return answer, time.perf_counter() - start


def seconds_per_hit(cache: embedonce.Cache, text: str, calls: int = 20_000) -> float:
    """Return what one hit in memory takes, the best of five runs."""
    embed = cache.embed
    runs = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            embed(text)
        runs.append((time.perf_counter() - start) / calls)
    return min(runs)


@contextmanager
def outage(cache: embedonce.Cache) -> Iterator[None]:
    """Let the provider fail as one does whose host is not reachable."""
    with patch.object(cache.provider, "embed", side_effect=ConnectionError("the model is not reachable")):
        yield


def main() -> None:
    """Show it all, on a text that no run before has asked for."""
    logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(name)s: %(message)s")
    text = f"What may a gateway keep, and for how long? (asked at {time.time()})"

    with embedonce.open(CONFIG) as cache:
        answer, seconds = timed(lambda: cache.fetch([text]))
        print(f"first      from {answer.sources[0]}, {seconds * 1e3:.2f} ms")
        print(f"again      from {cache.fetch([text]).sources[0]}, {seconds_per_hit(cache, text) * 1e6:.2f} µs")

    with embedonce.open(CONFIG) as cache:
        cache.lookup(["connects, and looks at the table"])
        answer, seconds = timed(lambda: cache.fetch([text]))
        print(f"restarted  from {answer.sources[0]}, {seconds * 1e3:.2f} ms")
        print(f"again      from {cache.fetch([text]).sources[0]}: it was promoted")

        with outage(cache):
            answer = cache.fetch([f"{text} Without the model?"])
            space = answer.space
            print(f"no model   from {answer.sources[0]}, in another space: {space.dimensions} dimensions")
            print(f"           what is cached is still served: from {cache.fetch([text]).sources[0]}")

    with patch.dict(os.environ, GATEWAY_POSTGRES_URL=NOWHERE), embedonce.open(CONFIG) as cache:
        for number in range(4):
            answer, seconds = timed(lambda number=number: cache.fetch([f"{text} Call {number}."]))
            cache.flush()  # only so that a warning is printed before the line, not in the midst of it
            print(f"no store   from {answer.sources[0]}, {seconds * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
