"""If the system allows no more threads, calls go on in the threads there are, or in the caller's thread."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from embedonce import Cache, Tier
from embedonce.testing.fakes import CountingProvider, DictBackend


@pytest.mark.parametrize("allowed", [0, 1, 3])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("write", ["inline", "background"])
def test_calls_go_on_without_new_threads(
    allowed: int, asynchronous: bool, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = 0
    start = threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        nonlocal started
        started += 1
        if started > allowed:
            raise RuntimeError("can't start new thread")
        start(thread)

    provider = CountingProvider(max_batch=5, concurrency=8)
    texts = [f"{number}" for number in range(100)]
    with Cache(provider, [Tier(DictBackend(scope="network"), name="far", write=write)]) as cache:
        monkeypatch.setattr(threading.Thread, "start", limited)
        fetched = asyncio.run(cache.afetch(texts)) if asynchronous else cache.fetch(texts)
        assert fetched.failed == {}
        assert cache.flush(60)
        assert cache.lookup(texts).sources == ["far"] * 100
