"""A provider behind a memory and a disk tier gets batches of hits and misses while its API misbehaves."""

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


def make_chain(provider: AnyProvider, folder: Path) -> Cache:
    disk = Tier(DiskBackend(path=folder / "disk"), timeout=60.0)  # long enough for a busy machine
    return Cache(provider, [MemoryBackend(max_entries=100), disk])


def ask(cache: Cache, face: Face, texts: Sequence[str]) -> Any:
    """Fetch through the blocking or the async interface, and close the cache through the same one."""
    if face == "blocking":
        with cache:
            return cache.fetch(list(texts))

    async def fetch() -> Any:
        async with cache:
            return await cache.afetch(list(texts))

    return asyncio.run(fetch())


def check_only_own_vectors(
    face: Face,
    folder: Path,
    *,
    make: Callable[[], AnyProvider],
    make_hasty: Callable[[], AnyProvider],
    break_api: Callable[[], None],
    heal: Callable[[], None],
    vector_of: Callable[[str], NDArray[np.float32]],
) -> dict[int, Exception]:
    """Fetch known and fresh texts while the API misbehaves, and check every row, then and after a restart.

    ``make_hasty`` makes the provider that is used while the API misbehaves. It may have a short timeout, which a busy
    machine might exceed at any other time.

    Returns:
        The errors, by position in :data:`MIXED`.
    """
    assert ask(make_chain(make(), folder), face, KNOWN).sources == ["provider"] * len(KNOWN)
    break_api()
    mixed = ask(make_chain(make_hasty(), folder), face, MIXED)
    heal()
    for text, row, source, place in zip(MIXED, mixed.rows, mixed.sources, range(len(MIXED)), strict=True):
        assert (row is None) == (place in mixed.failed) == (source is None)
        assert row is None or np.array_equal(row, vector_of(text))
        assert text in FRESH or source == "disk"
    with make_chain(make(), folder) as cache:
        stored = cache.lookup(MIXED)
        for text, row, before in zip(MIXED, stored.rows, mixed.rows, strict=True):
            assert (row is None) == (before is None)
            assert row is None or np.array_equal(row, vector_of(text))
    again = ask(make_chain(make(), folder), face, MIXED)
    assert np.array_equal(again.vectors, np.stack([vector_of(text) for text in MIXED]))
    return dict(mixed.failed)
