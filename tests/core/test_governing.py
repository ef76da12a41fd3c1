"""Chains that a governor governs: what it is told while it records, and what a call may read while it replays."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from import_doubles import TEXTS, Model, open_cache, store_of

from embedonce import Cache, Import, KeyPolicy, ReplayMiss, Tier
from embedonce.encryption import Encryption
from embedonce.governing import STORE, Answered, govern_chains
from embedonce.testing import CountingProvider, DictBackend
from embedonce_backends.memory import MemoryBackend


class Notebook:
    """Keeps the answers that it is told, or replays what its store has."""

    def __init__(self, *, replays: bool = False, store: Any = None) -> None:
        self.replays = replays
        self.store = DictBackend(scope="host", holds="either") if store is None else store
        self.answers: list[Answered] = []
        self.missing: list[dict[str, int]] = []

    def take_answer(self, answered: Answered) -> None:
        self.answers.append(answered)

    def explain_misses(self, answered: Answered) -> ReplayMiss:
        self.missing.append(dict(answered.missing))
        return ReplayMiss(f"{len(answered.missing)} are not recorded")

    def take_keys(self) -> set[str]:
        keys = {key for answered in self.answers for key in answered.entries}
        self.answers.clear()
        return keys


@pytest.fixture
def notebook() -> Iterator[Notebook]:
    notebook = Notebook()
    with govern_chains(lambda: notebook):
        yield notebook


async def read_stream(cache: Cache) -> None:
    async for _ in cache.aembed_iter(iter(["one", "two"]), batch=1):
        pass


CALLS: dict[str, Callable[[Cache], Any]] = {
    "embed": lambda cache: [cache.embed(text) for text in ("one", "two")],
    "embed_batch": lambda cache: cache.embed_batch(["one", "two", "one"]),
    "fetch": lambda cache: cache.fetch(["one", "two"]),
    "without storing": lambda cache: cache.fetch(["one", "two"], store=False),
    "fresh": lambda cache: cache.fetch(["one", "two"], fresh=True),
    "embed_iter": lambda cache: list(cache.embed_iter(iter(["one", "two"]), batch=1)),
    "aembed": lambda cache: [asyncio.run(cache.aembed(text)) for text in ("one", "two")],
    "aembed_batch": lambda cache: asyncio.run(cache.aembed_batch(["one", "two"])),
    "aembed_iter": lambda cache: asyncio.run(read_stream(cache)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_governor_is_told_what_every_call_answers_and_also_the_hits(
    notebook: Notebook, call: Callable[[Cache], Any]
) -> None:
    with Cache(CountingProvider(), [Tier(MemoryBackend(), ttl=60.0)]) as cache:
        wanted = set(cache.keys(["one", "two"]))
        for _ in range(2):
            call(cache)
            entries = [entry for answered in notebook.answers for entry in answered.entries.values()]
            assert all(entry.expires is None for entry in entries)
            assert notebook.take_keys() == wanted
        cache.embed_batch(["one", "two"])
        notebook.answers.clear()
        cache.lookup(["one", "never computed"])
        assert notebook.take_keys() == set(cache.keys(["one"]))


def test_a_governor_is_told_the_scope_and_the_card_of_each_space(notebook: Notebook) -> None:
    with Cache(CountingProvider(model="small")) as cache:
        cache.embed("one")
        cache.for_provider(CountingProvider(model="large")).embed("one")
        cache.for_namespace("other").embed("one")
    assert [answered.card["model"] for answered in notebook.answers] == ["small", "large", "small"]
    assert len({answered.scope for answered in notebook.answers}) == 3
    for answered in notebook.answers:
        assert all(key.startswith(f"eo1.{answered.scope}.") for key in answered.entries)


def test_a_store_that_has_a_text_is_asked_before_the_provider_and_nothing_is_written_to_it(notebook: Notebook) -> None:
    with Cache(CountingProvider(), [MemoryBackend()]) as cache:
        cache.embed("one")
        (answered,) = notebook.answers
        notebook.store.set_many(answered.entries, None)
        assert cache.tiers == ("memory", STORE)
    before = set(notebook.store.scan(""))
    model = CountingProvider()
    with Cache(model, [MemoryBackend()]) as cache:
        assert cache.fetch(["one", "two"]).sources == [STORE, "provider"]
        assert model.texts == 1
    assert set(notebook.store.scan("")) == before


def test_the_first_encryption_of_a_chain_is_told(notebook: Notebook) -> None:
    encryption = Encryption(bytes(range(32)))
    tiers = [MemoryBackend(), Tier(DictBackend(scope="host"), encryption=encryption)]
    with Cache(CountingProvider(), tiers, key=KeyPolicy(secret="a secret of this test")) as cache:
        cache.embed("one")
    assert notebook.answers[0].encryption is encryption


def test_a_cache_that_the_governor_does_not_want_and_one_of_before_work_as_usual() -> None:
    before = Cache(CountingProvider(), [MemoryBackend()])
    with govern_chains(lambda: None):
        inside = Cache(CountingProvider(), [MemoryBackend()])
    with govern_chains(lambda: Notebook(replays=True)), before, inside:
        assert before.fetch(["one"]).sources == inside.fetch(["one"]).sources == ["provider"]
        assert before.tiers == inside.tiers == ("memory",)


def test_replay_computes_nothing_and_the_governor_explains_which_positions_are_missing() -> None:
    recorder = Notebook()
    with govern_chains(lambda: recorder), Cache(CountingProvider()) as cache:
        vectors = cache.embed_batch(["one", "two"])
        recorder.store.set_many(recorder.answers[0].entries, None)
    replayer, model = Notebook(replays=True, store=recorder.store), CountingProvider()
    disk = DictBackend(scope="host")
    with govern_chains(lambda: replayer), Cache(model, [MemoryBackend(), disk], mode="read-through") as cache:
        assert cache.tiers == ("memory", STORE)
        assert np.array_equal(cache.embed_batch(["one", "two"]), vectors)
        assert np.array_equal(cache.fetch(["one"], fresh=True).vectors, vectors[:1])
        for call in (cache.embed_batch, lambda texts: asyncio.run(cache.aembed_batch(texts))):
            with pytest.raises(ReplayMiss, match="2 are not recorded"):
                call(["one", "new", "two", "newer", "new"])
        assert [list(missing.values()) for missing in replayer.missing] == [[1, 3], [1, 3]]
        with pytest.raises(ReplayMiss, match="1 are not recorded"):
            list(cache.embed_iter(iter(["one", "two", "new"]), batch=2))
        assert list(replayer.missing[-1].values()) == [2]
        with pytest.raises(ReplayMiss):
            cache.embed("new")
        assert not list(disk.scan("")), "a tier that replay replaces gets no entries"
    assert model.texts == 0
    assert replayer.answers == []


def test_replay_asks_no_importer_and_closes_it_with_the_cache() -> None:
    model, imports = Model(), store_of(TEXTS)
    with govern_chains(lambda: Notebook(replays=True)), open_cache(model, Import(imports, verify=0)) as cache:
        with pytest.raises(ReplayMiss):
            cache.embed_batch(TEXTS)
        assert imports.asked == model.texts == []
    assert imports.is_closed


def test_a_tier_that_has_the_name_of_the_store_keeps_it(notebook: Notebook) -> None:
    with Cache(CountingProvider(), [Tier(MemoryBackend(), name=STORE)]) as cache:
        assert cache.tiers == (STORE, f"{STORE}-2")
        cache.embed("one")
    assert len(notebook.take_keys()) == 1
