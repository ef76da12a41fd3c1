"""A provider behind a memory and a disk tier, asked for hits and misses at once while its API misbehaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from embedonce import Cache, Tier
from embedonce.contracts import AnyProvider
from embedonce_backends.disk import DiskBackend
from embedonce_backends.memory import MemoryBackend

Face = Literal["blocking", "async"]

KNOWN = [f"known text number {number}" for number in range(6)]
FRESH = [f"fresh text number {number}" for number in range(7)]
MIXED = [text for pair in zip(FRESH, [*KNOWN, KNOWN[0]], strict=True) for text in pair] + [FRESH[2], KNOWN[3]]


def chain(provider: AnyProvider, folder: Path) -> Cache:
    disk = Tier(DiskBackend(path=folder / "disk"), timeout=60.0)  # a busy machine is no fault of the tier's
    return Cache(provider, [MemoryBackend(max_entries=100), disk])


def ask(cache: Cache, face: Face, texts: Sequence[str]) -> Any:
    """Fetch with either face, and close the cache with the same."""
    if face == "blocking":
        with cache:
            return cache.fetch(list(texts))

    async def fetch() -> Any:
        async with cache:
            return await cache.afetch(list(texts))

    return asyncio.run(fetch())


def never_wrong(
    face: Face,
    folder: Path,
    *,
    make: Callable[[], AnyProvider],
    hasty: Callable[[], AnyProvider],
    spoil: Callable[[], None],
    heal: Callable[[], None],
    vector_of: Callable[[str], NDArray[np.float32]],
) -> dict[int, Exception]:
    """Ask for known and fresh texts while the API misbehaves, and look at every row, then and after a restart.

    ``hasty`` is asked while it does; it may have a short timeout, which a busy machine must not meet otherwise.
    Returns what failed, by place in :data:`MIXED`.
    """
    assert ask(chain(make(), folder), face, KNOWN).sources == ["provider"] * len(KNOWN)
    spoil()
    mixed = ask(chain(hasty(), folder), face, MIXED)
    heal()
    for text, row, source, place in zip(MIXED, mixed.rows, mixed.sources, range(len(MIXED)), strict=True):
        assert (row is None) == (place in mixed.failed) == (source is None)
        assert row is None or np.array_equal(row, vector_of(text))
        assert text in FRESH or source == "disk"
    with chain(make(), folder) as cache:
        stored = cache.lookup(MIXED)
        for text, row, before in zip(MIXED, stored.rows, mixed.rows, strict=True):
            assert (row is None) == (before is None)
            assert row is None or np.array_equal(row, vector_of(text))
    again = ask(chain(make(), folder), face, MIXED)
    assert np.array_equal(again.vectors, np.stack([vector_of(text) for text in MIXED]))
    return dict(mixed.failed)
