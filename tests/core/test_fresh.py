"""Calls that compute their texts anew, and the work that each call reports."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from patience import LONG_TIMEOUT, count_followers, wait_until

from embedonce import Cache, Embedded, Fetched, Limits, ReplayMiss, TextRefused, Tier, VectorSpace
from embedonce.testing.fakes import DictBackend
from embedonce.vectors import NO_WORK, Cost, Work
from embedonce_backends.memory import MemoryBackend


class Drifting:
    """A provider whose vectors turn by ``angle`` with each call. It charges 10 tokens per text."""

    limits = Limits()

    def __init__(self, angle: float = 0.0) -> None:
        self.angle = angle
        self.calls: list[list[str]] = []

    def space(self, task: str) -> VectorSpace:
        return VectorSpace(provider="drifting", model="m", dimensions=2)

    def embed(self, texts: Sequence[str], task: str) -> Embedded:
        if "refused" in texts:
            raise TextRefused("this text is refused", [texts.index("refused")])
        angle = self.angle * len(self.calls)
        self.calls.append(list(texts))
        return Embedded([[np.cos(angle), np.sin(angle)]] * len(texts), tokens=10 * len(texts))

    def close(self) -> None: ...


def fetch(cache: Cache, texts: list[str], face: str, **options: Any) -> Fetched:
    if face == "async":
        return asyncio.run(cache.afetch(texts, **options))
    return cache.fetch(texts, **options)


both_faces = pytest.mark.parametrize("face", ["blocking", "async"])


@both_faces
def test_fresh_vectors_are_returned_and_the_stored_entry_stays(face: str) -> None:
    provider = Drifting(angle=0.5)
    with Cache(provider, [DictBackend()]) as cache:
        first = cache.embed("text")
        found = fetch(cache, ["text", "new", "text"], face, fresh=True)
        assert found.sources == ["provider"] * 3
        assert found.vectors[0].tolist() != first.tolist()
        assert found.changed == {0, 2}
        assert (found.computed.texts, found.computed.tokens, found.saved) == (2, 20, NO_WORK)
        assert cache.embed("text").tolist() == first.tolist()
        assert cache.lookup(["new"]).vectors[0].tolist() == found.vectors[1].tolist()
        # Reading the stored entry for the comparison saves nothing.
        assert cache.stats().saved.texts == 2


@both_faces
def test_equal_vectors_have_not_changed(face: str) -> None:
    with Cache(Drifting(), [DictBackend()]) as cache:
        cache.embed("text")
        assert fetch(cache, ["text"], face, fresh=True).changed == frozenset()


def test_a_fresh_call_that_stores_nothing_still_compares() -> None:
    backend = DictBackend()
    with Cache(Drifting(angle=0.5), [backend]) as cache:
        cache.embed("text")
        keys = list(backend.scan(""))
        assert cache.fetch(["text", "new"], fresh=True, store=False).changed == {0}
        assert list(backend.scan("")) == keys


@both_faces
def test_a_fresh_call_that_stores_nothing_copies_nothing_to_a_faster_tier(face: str) -> None:
    fast, slow = DictBackend(), DictBackend()
    with Cache(Drifting(), [slow]) as cache:
        cache.embed("text")
    with Cache(Drifting(), [Tier(fast, name="fast"), Tier(DictBackend(store=slow), name="slow")]) as cache:
        assert fetch(cache, ["text"], face, fresh=True, store=False).changed == frozenset()
        assert len(fast) == 0


def test_a_text_that_fails_fails_alone_and_keeps_its_stored_entry() -> None:
    with Cache(Drifting(), [DictBackend()]) as cache:
        cache.put(["refused"], [[1.0, 0.0]])
        found = cache.fetch(["good", "refused", "\ud800"], fresh=True)
        assert set(found.failed) == {1, 2}
        assert isinstance(found.failed[1], TextRefused)
        assert found.failed[1].positions == (1,)
        assert found.sources == ["provider", None, None]
        assert cache.lookup(["refused"]).sources == ["dict"]


def test_replay_computes_nothing_anew() -> None:
    backend = DictBackend()
    Cache(Drifting(), [backend]).embed("text")
    with Cache(Drifting(), [backend], mode="replay") as cache:
        assert isinstance(cache.fetch(["text"], fresh=True).failed[0], ReplayMiss)
        assert cache.fetch(["text"]).sources == ["dict"]


def test_metadata_of_a_fresh_call_is_stored_with_new_entries_only() -> None:
    with Cache(Drifting(), [DictBackend()]) as cache:
        cache.fetch(["old"], metadata=[{"n": 1}])
        found = cache.fetch(["old", "new"], fresh=True, metadata=[{"n": 2}, {"n": 3}])
        assert found.metadata == [{"n": 2}, {"n": 3}]
        assert cache.lookup(["old", "new"]).metadata == [{"n": 1}, {"n": 3}]


# --- work of one call -----------------------------------------------------------------------------


@both_faces
def test_a_call_reports_what_it_computed_and_what_the_tiers_saved(face: str) -> None:
    with Cache(Drifting(), [DictBackend()]) as cache:
        cache.put(["known"], [[1.0, 0.0]], costs=[Cost(7, 0.5)])
        cache.put(["unknown"], [[1.0, 0.0]])
        found = fetch(cache, ["known", "new", "unknown", "known", "new"], face)
        assert (found.computed.texts, found.computed.tokens) == (1, 10)
        assert found.saved == Work(2, 7, 0.5, 1, 1)


@both_faces
def test_the_fast_path_reports_the_same_work(face: str) -> None:
    with Cache(Drifting(), [MemoryBackend()]) as cache:
        cache.put(["known"], [[1.0, 0.0]], costs=[Cost(7, 0.5)])
        cache.lookup(["known"])
        for _ in range(2):
            assert fetch(cache, ["known", "known"], face).saved == Work(1, 7, 0.5)
            assert fetch(cache, ["known"], face).computed == NO_WORK


def test_a_call_that_follows_another_computes_and_saves_nothing() -> None:
    class Slow(Drifting):
        def embed(self, texts: Sequence[str], task: str) -> Embedded:
            started.set()
            assert go.wait(LONG_TIMEOUT)
            return super().embed(texts, task)

    started, go = threading.Event(), threading.Event()
    with Cache(Slow(), [DictBackend()]) as cache:
        found: list[Fetched] = []
        leader = threading.Thread(target=lambda: found.append(cache.fetch(["text"])))
        leader.start()
        assert started.wait(LONG_TIMEOUT)
        follower = threading.Thread(target=lambda: found.append(cache.fetch(["text"])))
        follower.start()
        wait_until(lambda: count_followers(cache) == 1)
        go.set()
        leader.join()
        follower.join()
    assert sorted(one.computed.texts for one in found) == [0, 1]
    assert [one.saved for one in found] == [NO_WORK, NO_WORK]
