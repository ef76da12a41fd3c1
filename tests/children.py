"""What child processes of the tests run: a module of its own, as a spawned child must be able to import it."""

from __future__ import annotations

from pathlib import Path

from embedonce import Cache, Tier
from embedonce.testing.fakes import CountingProvider
from embedonce.testing.faults import Fault, FaultyBackend
from embedonce_backends.disk import DiskBackend

GENEROUS = 20.0


def write_in_background(folder: str) -> None:
    """Compute ten texts whose writes take a while, and end without closing the cache."""
    backend = FaultyBackend(DiskBackend(path=Path(folder)), [Fault("slow", on="set", seconds=0.02)])
    cache = Cache(CountingProvider(max_batch=1), [Tier(backend, name="d", write="background", timeout=GENEROUS)])
    cache.embed_batch([str(i) for i in range(10)])
