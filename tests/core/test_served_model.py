"""The model that a provider's answers name: the first name is kept with the scope, and a different name is handled."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import embedonce
from embedonce import Cache, DriftError, DriftGuard, Embedded, KeyPolicy, Limits, Tier, VectorSpace
from embedonce.contracts import Task
from embedonce.encryption import Encryption
from embedonce.errors import PartialAnswer
from embedonce.keys import CARD_PREFIX, SERVED_MODEL
from embedonce.testing.fakes import DictBackend
from embedonce.testing.faults import Fault, FaultyBackend
from embedonce_backends.disk import DiskBackend
from embedonce_backends.memory import MemoryBackend

faces = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


class Served:
    """A provider whose answers name the model ``answers``, and whose vectors tell which model made them."""

    def __init__(self, answers: str | None = "bge", *, model: str = "bge", max_batch: int = 256) -> None:
        self.answers = answers
        self.limits = Limits(max_batch=max_batch)
        self.calls = 0
        self._space = VectorSpace(provider="served", model=model, dimensions=2)

    def space(self, task: Task) -> VectorSpace:
        return self._space

    def embed(self, texts: Sequence[str], task: Task) -> Embedded:
        self.calls += 1
        mark = float(sum(map(ord, self.answers or "")) + 1)
        return Embedded([[mark, len(text) + 1.0] for text in texts], model=self.answers)

    def close(self) -> None: ...


class Aliased(Served):
    def __init__(self, answers: str | None, aliases: Any, **options: Any) -> None:
        super().__init__(answers, **options)
        self.answers_as = aliases


def fetch(cache: Cache, asynchronous: bool, texts: list[str], **options: Any) -> Any:
    return asyncio.run(cache.afetch(texts, **options)) if asynchronous else cache.fetch(texts, **options)


def read_cards(cache: Cache) -> list[Any]:
    cache.flush()
    return [held.card for held in cache.contents() if held.card is not None]


# --- a different name is refused --------------------------------------------------------------


@faces
def test_a_different_name_fails_every_text_of_the_answer_and_nothing_of_it_is_stored(asynchronous: bool) -> None:
    provider = Served(max_batch=2)
    with Cache(provider, [MemoryBackend()]) as cache:
        old = fetch(cache, asynchronous, ["a", "b"])
        provider.answers = "e5"
        fetched = fetch(cache, asynchronous, ["a", "b", "c", "d"])
        assert fetched.sources == ["memory", "memory", None, None]
        assert (np.stack(fetched.rows[:2]) == old.vectors).all()
        for position in (2, 3):
            error = fetched.failed[position]
            assert type(error) is DriftError
            for part in ('model "e5"', 'model "bge"', 'set action = "warn" in [drift]', "[key] version"):
                assert part in str(error)
        assert cache.lookup(["c", "d"]).sources == [None, None]
        with pytest.raises(DriftError):
            cache.embed("c")
        provider.answers = "bge"
        assert fetch(cache, asynchronous, ["c"]).sources == ["provider"]


def test_the_message_names_the_option_of_a_provider_that_has_it() -> None:
    provider = Aliased("bge", ())
    with Cache(provider, [MemoryBackend()]) as cache:
        cache.embed("a")
        provider.answers = "e5"
        with pytest.raises(DriftError, match=r'add "e5" to answers_as in \[provider\]'):
            cache.embed("b")


@faces
def test_another_process_knows_the_name_from_the_tier(asynchronous: bool, tmp_path: Path) -> None:
    with Cache(Served(), [DiskBackend(path=tmp_path)]) as cache:
        cache.embed("a")
    with Cache(Served("e5"), [MemoryBackend(), DiskBackend(path=tmp_path)]) as cache:
        assert isinstance(fetch(cache, asynchronous, ["b"]).failed[0], DriftError)
        assert fetch(cache, asynchronous, ["a"]).sources == ["disk"]
    with Cache(Served("bge"), [DiskBackend(path=tmp_path)]) as cache:
        assert fetch(cache, asynchronous, ["b"]).sources == ["provider"]


def test_without_tiers_the_name_is_kept_in_the_process() -> None:
    provider = Served()
    with Cache(provider) as cache:
        cache.embed("a")
        provider.answers = "e5"
        with pytest.raises(DriftError):
            cache.embed("a")


def test_a_name_that_is_missing_or_invalid_is_ignored() -> None:
    provider: Any = Served(None)
    with Cache(provider, [DictBackend(scope="host")]) as cache:
        cache.embed("a")
        for name in ("", 7, None, ["bge"]):
            provider.embed = lambda texts, task, name=name: Embedded([[1.0, 2.0]] * len(texts), model=name)
            cache.embed(f"b {name}")
        assert all(SERVED_MODEL not in card for card in read_cards(cache))


def test_a_name_with_a_lone_surrogate_or_of_any_length_is_kept() -> None:
    store = DictBackend(scope="host")
    for name in ("model \ud800", "m" * 100_000):
        with Cache(Served(name, model=name[:5]), [DictBackend(scope="host", store=store)]) as cache:
            cache.embed("a")
        with Cache(Served(name, model=name[:5]), [DictBackend(scope="host", store=store)]) as cache:
            cache.embed("b")
            (kept,) = {card[SERVED_MODEL] for card in read_cards(cache) if card["model"] == name[:5]}
            assert len(kept) <= 200
            kept.encode()


def test_vectors_that_are_not_stored_are_checked_too() -> None:
    provider = Served()
    with Cache(provider, [MemoryBackend()]) as cache:
        cache.fetch(["a"], store=False)
        provider.answers = "e5"
        assert isinstance(cache.fetch(["a"], store=False).failed[0], DriftError)


def test_each_vector_space_has_its_own_name() -> None:
    store = DictBackend(scope="host")
    for version in ("v1", "v2"):
        with Cache(Served(version), [DictBackend(scope="host", store=store)], key=KeyPolicy(version=version)) as cache:
            cache.embed("a")
            names = {card["version"]: card[SERVED_MODEL] for card in read_cards(cache)}
            assert names[version] == version


def test_the_first_of_two_threads_wins_and_the_other_raises() -> None:
    barrier = threading.Barrier(2)
    names = iter(["bge", "e5"])
    lock = threading.Lock()

    class Racing(Served):
        def embed(self, texts: Sequence[str], task: Task) -> Embedded:
            with lock:
                name = next(names)
            barrier.wait(60)
            return Embedded([[1.0, 2.0]] * len(texts), model=name)

    with Cache(Racing(), [DictBackend(scope="host")]) as cache:
        errors: list[Any] = [None, None]

        def run(number: int) -> None:
            errors[number] = cache.fetch([f"text {number}"]).failed.get(0)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(type(error).__name__ for error in errors) == ["DriftError", "NoneType"]
        assert len([source for source in cache.lookup(["text 0", "text 1"]).sources if source]) == 1


def test_caches_of_one_chain_share_the_name() -> None:
    with Cache(Served(), [MemoryBackend()]) as cache:
        cache.embed("a")
        other = cache.for_provider(Served("e5"))
        with pytest.raises(DriftError):
            other.embed("b")


def test_a_fallback_answers_when_the_provider_answers_with_another_model() -> None:
    provider, fallback = Served(), Served("other", model="other")
    with Cache(provider, [MemoryBackend()], fallback=fallback) as cache:
        cache.embed("a")
        provider.answers = "e5"
        assert cache.fetch(["b"]).space.model == "other"


def test_replay_never_asks(tmp_path: Path) -> None:
    with Cache(Served(), [DiskBackend(path=tmp_path)]) as cache:
        cache.embed("a")
    provider = Served("e5")
    with Cache(provider, [DiskBackend(path=tmp_path)], mode="replay") as cache:
        assert cache.fetch(["a"]).sources == ["disk"]
    assert provider.calls == 0


# --- aliases ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "name", "aliases", "accepted"),
    [
        ("bge", "bge-v1", ["bge-v1"], True),
        ("bge", "bge-v1", "bge-v1", True),
        ("bge", "bge-v1", ("x", "bge-v1"), True),
        ("bge-v1", "bge", ["bge-v1"], True),
        ("bge-v1", "bge-v2", ["bge-v1", "bge-v2"], True),
        ("bge", "e5", ["bge-v1"], False),
        ("bge-v1", "e5", ["bge-v1"], False),
        ("bge", "bge-v1", [], False),
        ("bge", "bge-v1", None, False),
        ("bge", "BGE", ["bge-v1"], False),
    ],
)
def test_aliases(kept: str, name: str, aliases: Any, accepted: bool) -> None:
    provider = Aliased(kept, aliases)
    with Cache(provider, [MemoryBackend()]) as cache:
        cache.embed("a")
        provider.answers = name
        error = cache.fetch(["b"]).failed.get(0)
        assert (error is None) == accepted
        provider.answers = kept
        assert not cache.fetch(["c"]).failed, "the first name must stay accepted"


# --- the space card ---------------------------------------------------------------------------


def test_the_card_holds_the_name_and_contents_show_it() -> None:
    with Cache(Served("bge-v1"), [DictBackend(scope="host")]) as cache:
        cache.embed("a")
        (card,) = read_cards(cache)
        assert card[SERVED_MODEL] == "bge-v1"
        assert card["model"] == "bge"


def test_put_sets_no_name_and_the_first_answer_adds_it_to_the_card() -> None:
    store = DictBackend(scope="host")
    with Cache(Served(), [DictBackend(scope="host", store=store)]) as cache:
        cache.put(["a"], [[1.0, 2.0]])
        (card,) = read_cards(cache)
        assert SERVED_MODEL not in card
        cache.embed("b")
    with Cache(Served("e5"), [DictBackend(scope="host", store=store)]) as cache:
        assert [card[SERVED_MODEL] for card in read_cards(cache)] == ["bge"]
        with pytest.raises(DriftError):
            cache.embed("c")


def test_a_process_that_knows_no_name_does_not_remove_it_from_the_card() -> None:
    store = DictBackend(scope="host")
    with Cache(Served(), [DictBackend(scope="host", store=store)]) as cache:
        cache.embed("a")
    with Cache(Served(None), [DictBackend(scope="host", store=store)]) as cache:
        cache.put(["b"], [[1.0, 2.0]])
        cache.embed("c")
    with Cache(Served("e5"), [DictBackend(scope="host", store=store)]) as cache, pytest.raises(DriftError):
        cache.embed("d")


def test_a_new_route_to_the_same_space_keeps_the_name() -> None:
    store = DictBackend(scope="host")
    with Cache(Served(), [DictBackend(scope="host", store=store)]) as cache:
        cache.embed("a")
        cache.for_provider(Served()).embed("b")
        cache.embed("c", task="classification")
        assert [card[SERVED_MODEL] for card in read_cards(cache)] == ["bge"]


def test_an_encrypted_tier_keeps_the_name() -> None:
    pytest.importorskip("cryptography")
    store = DictBackend(scope="host")
    encryption = Encryption([os.urandom(32)])

    def open_cache(name: str) -> Cache:
        return Cache(Served(name), [Tier(DictBackend(scope="host", store=store), encryption=encryption)])

    with open_cache("bge-secretive") as cache:
        cache.embed("a")
    with open_cache("e5") as cache, pytest.raises(DriftError):
        cache.embed("b")
    assert not any(b"bge-secretive" in value for value, _ in store._store.values())


def test_a_read_only_tier_is_asked_for_the_name() -> None:
    store = DictBackend(scope="host")
    with Cache(Served(), [DictBackend(scope="host", store=store)]) as cache:
        cache.embed("a")
    tiers = [MemoryBackend(), Tier(DictBackend(scope="host", store=store), write="none")]
    with Cache(Served("e5"), tiers) as cache, pytest.raises(DriftError):
        cache.embed("b")


def test_purge_forgets_the_name() -> None:
    provider = Served()
    with Cache(provider, [MemoryBackend(), DictBackend(scope="host")]) as cache:
        cache.embed("a")
        provider.answers = "e5"
        cache.purge(model="bge", dry_run=True)
        with pytest.raises(DriftError):
            cache.embed("b")
        cache.purge(model="bge")
        cache.embed("b")
        assert [card[SERVED_MODEL] for card in read_cards(cache) if SERVED_MODEL in card][-1] == "e5"
        provider.answers = "bge"
        with pytest.raises(DriftError):
            cache.embed("c")


def test_a_near_miss_is_explained_by_its_version_and_not_by_the_served_name() -> None:
    store = DictBackend(scope="host")
    with Cache(Served("x"), [DictBackend(scope="host", store=store)], key=KeyPolicy(version="v0")) as cache:
        cache.embed("a")
    with Cache(Served("y"), [DictBackend(scope="host", store=store)]) as cache:
        cache.embed("b")
        (reason,) = cache.explain("a").reasons
        assert "version 'v0'" in reason
        assert SERVED_MODEL not in reason


# --- tiers that fail --------------------------------------------------------------------------


@faces
@pytest.mark.parametrize("kind", ["error", "not a mapping", "partial"])
def test_a_tier_that_fails_fails_no_call_and_is_asked_again(asynchronous: bool, kind: str) -> None:
    store = DictBackend(scope="host")
    with Cache(Served(), [DictBackend(scope="host", store=store)]) as cache:
        cache.embed("a")

    class Failing(DictBackend):
        fails = True

        def get_many(self, keys: Sequence[str], /) -> Any:
            if not self.fails or not keys[0].startswith(CARD_PREFIX):
                return super().get_many(keys)
            if kind == "partial":
                raise PartialAnswer("a node failed", answer={}, failed=keys)
            if kind == "error":
                raise ConnectionError
            return 7

    backend = Failing(scope="host", store=store)
    with Cache(Served("e5"), [backend]) as cache:
        assert fetch(cache, asynchronous, ["b"]).sources == ["provider"]
        backend.fails = False
        assert isinstance(fetch(cache, asynchronous, ["c"]).failed[0], DriftError), "the stored name is older"
    with Cache(Served("e5"), [DictBackend(scope="host", store=store)]) as cache, pytest.raises(DriftError):
        cache.embed("d")


def test_a_tier_that_is_down_costs_no_extra_call() -> None:
    backend = FaultyBackend(DictBackend(scope="host"), [Fault("error")])
    with Cache(Served(), [Tier(backend, name="down")]) as cache:
        fetched = cache.fetch(["a"])
        assert fetched.sources == ["provider"]
        cache.embed("b")
        errors = cache.stats().tiers["down"].errors
        assert errors <= 4


def test_after_the_first_answer_no_card_is_read() -> None:
    reads = []

    class Counting(DictBackend):
        def get_many(self, keys: Sequence[str], /) -> Any:
            reads.extend(key for key in keys if key.startswith(CARD_PREFIX))
            return super().get_many(keys)

    with Cache(Served(), [Counting(scope="host")]) as cache:
        cache.embed("a")
        first = len(reads)
        for number in range(20):
            cache.embed(f"text {number}")
        assert len(reads) == first
        assert first <= 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="requires fork")
def test_a_forked_child_knows_the_name() -> None:
    provider = Served()
    with Cache(provider, [MemoryBackend()]) as cache:
        cache.embed("a")
        provider.answers = "e5"
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = 0 if isinstance(cache.fetch(["b"]).failed.get(0), DriftError) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# --- with a drift guard -----------------------------------------------------------------------


def guarded(provider: Any, action: Any, store: DictBackend) -> Cache:
    return Cache(provider, [DictBackend(scope="host", store=store)], drift=DriftGuard(action=action))


@faces
def test_refuse_raises(asynchronous: bool) -> None:
    provider = Served()
    with guarded(provider, "refuse", DictBackend(scope="host")) as cache:
        cache.embed("a")
        provider.answers = "e5"
        assert type(fetch(cache, asynchronous, ["b"]).failed[0]) is DriftError
        assert cache.lookup(["b"]).sources == [None]


@faces
def test_warn_logs_once_and_stores(asynchronous: bool, caplog: pytest.LogCaptureFixture) -> None:
    provider = Served()
    with guarded(provider, "warn", DictBackend(scope="host")) as cache, caplog.at_level(logging.WARNING):
        cache.embed("a")
        provider.answers = "e5"
        for text in ("b", "c"):
            assert fetch(cache, asynchronous, [text]).sources == ["provider"]
        assert cache.lookup(["b", "c"]).rows[0] is not None
        assert [card[SERVED_MODEL] for card in read_cards(cache)] == ["bge"]
    assert len([record for record in caplog.records if 'model "e5"' in record.getMessage()]) == 1


@faces
def test_new_space_repeats_the_call_in_a_new_space(asynchronous: bool, caplog: pytest.LogCaptureFixture) -> None:
    provider, store = Served(max_batch=2), DictBackend(scope="host")
    with guarded(provider, "new-space", store) as cache, caplog.at_level(logging.WARNING):
        old = cache.fetch(["a"])
        provider.answers = "e5"
        fetched = fetch(cache, asynchronous, ["a", "b", "c", "d"])
        assert fetched.sources == ["provider"] * 4
        assert fetched.space.extra == {"drift": 1}
        assert len(set(fetched.vectors[:, 0])) == 1, "one answer must not mix two models"
        assert fetched.vectors[0, 0] != old.vectors[0, 0]
        assert sorted(card[SERVED_MODEL] for card in read_cards(cache)) == ["bge", "e5"]
    with guarded(Served("e5"), "new-space", store) as cache:
        again = fetch(cache, asynchronous, ["a", "b"])
        assert again.space.extra == {"drift": 1}, "another process must find the new space by the marked canaries"
        assert again.sources[0] == again.sources[1] != "provider"


@faces
@pytest.mark.parametrize("action", ["refuse", "new-space"])
def test_an_answer_of_another_model_ends_the_other_requests_of_the_call(asynchronous: bool, action: Any) -> None:
    provider = Served()
    provider.limits = Limits(max_batch=1, concurrency=1)
    with guarded(provider, action, DictBackend(scope="host")) as cache:
        cache.embed("a")
        provider.answers, before = "e5", provider.calls
        fetched = fetch(cache, asynchronous, [f"text {i}" for i in range(20)])
        assert fetched.wasted.texts == 1
        if action == "refuse":
            assert len(fetched.failed) == 20
            assert provider.calls == before + 1
        else:
            assert fetched.failed == {}


def test_new_space_when_the_process_starts_with_another_model() -> None:
    store = DictBackend(scope="host")
    with guarded(Served(), "new-space", store) as cache:
        cache.embed("a")
    with guarded(Served("e5"), "new-space", store) as cache:
        fetched = cache.fetch(["a", "b"])
        assert len(set(fetched.vectors[:, 0])) == 1
        assert fetched.space.extra == {"drift": 1}


def test_the_action_is_read_from_toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "embedonce.toml"
    file.write_text('[provider]\ntype = "ngram"\n[[tiers]]\ntype = "memory"\n[drift]\naction = "warn"\n')
    with embedonce.open(file) as cache:
        provider = Served()
        other = cache.for_provider(provider)
        other.embed("a")
        provider.answers = "e5"
        other.embed("b")
    file.write_text('[provider]\ntype = "ngram"\n[[tiers]]\ntype = "memory"\n')
    with embedonce.open(file) as cache:
        provider = Served()
        other = cache.for_provider(provider)
        other.embed("a")
        provider.answers = "e5"
        with pytest.raises(DriftError):
            other.embed("b")
