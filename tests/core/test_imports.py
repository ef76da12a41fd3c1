"""Importers on demand: a cache asks them for texts that no tier has, before the provider."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from import_doubles import TEXTS, Model, Scanned, Store, open_cache, store_of, vector_of

import embedonce
from embedonce import Cache, ConfigError, DriftGuard, Import, KeyPolicy, ReplayMiss, Tier
from embedonce.contracts import FoundVectors
from embedonce.errors import SourceError
from embedonce.events import Event, Imported, ImporterChanged
from embedonce.functions import NoProvider
from embedonce.testing import CountingProvider
from embedonce_backends.disk import DiskBackend
from embedonce_backends.memory import MemoryBackend


def test_an_importer_is_asked_for_misses_before_the_provider() -> None:
    model, store = Model(), store_of(TEXTS)
    with open_cache(model, Import(store, verify=0, name="shop")) as cache:
        fetched = cache.fetch([*TEXTS, "new"])
        assert fetched.sources == ["shop"] * 50 + ["provider"]
        assert fetched.imported == set(range(50))
        assert fetched.saved.texts == 0
        assert fetched.computed.texts == 1
        assert model.texts == ["new"]
        assert all(np.array_equal(row, vector_of(text)) for row, text in zip(fetched.rows, TEXTS, strict=False))
        again = cache.fetch(TEXTS)
        assert set(again.sources) == {"memory"}
        assert not again.imported
        stats = cache.stats()
        assert stats.imported == stats.importers["shop"].imported == 50
        assert stats.importers["shop"].missing == 1
        assert stats.found == 50
        assert store.asked == [*TEXTS, "new"]
    assert store.is_closed


def test_single_texts_and_async_calls_are_imported_too() -> None:
    model, store = Model(), store_of(TEXTS)
    with open_cache(model, Import(store, verify=0)) as cache:
        assert np.array_equal(cache.embed(TEXTS[0]), vector_of(TEXTS[0]))
        assert np.array_equal(asyncio.run(cache.aembed(TEXTS[1])), vector_of(TEXTS[1]))
        assert np.array_equal(asyncio.run(cache.aembed_batch(TEXTS)), [vector_of(text) for text in TEXTS])
    assert model.texts == []


def test_lookup_and_estimate_ask_no_importer() -> None:
    store = store_of(TEXTS)
    with open_cache(Model(), Import(store, verify=0)) as cache:
        assert cache.lookup(TEXTS).sources == [None] * 50
        assert cache.estimate(TEXTS).missing == 50
        cache.fetch(TEXTS[:3], fresh=True)
    assert store.asked == []


def test_the_first_texts_are_computed_as_well_and_the_others_imported() -> None:
    model, store = Model(), store_of(TEXTS)
    with open_cache(model, store) as cache:
        fetched = cache.fetch(TEXTS)
        assert len(model.texts) == 20
        assert fetched.sources.count("provider") == 20
        assert len(fetched.imported) == 30
        assert cache.stats().importers["store"].verification == "verified"
        assert np.array_equal(fetched.vectors, [vector_of(text) for text in TEXTS])


def test_texts_that_come_one_by_one_are_computed_until_enough_were_compared() -> None:
    model, store = Model(), store_of(TEXTS)
    with open_cache(model, Import(store, verify=3)) as cache:
        sources = [cache.fetch([text]).sources[0] for text in TEXTS[:6]]
        assert sources == ["provider"] * 3 + ["store"] * 3


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda text: vector_of(text, seed=1), "cosine"),
        (lambda text: vector_of(text) / np.linalg.norm(vector_of(text)), "normalised"),
        (lambda text: vector_of(text).astype(np.float16).astype(np.float32), "float16"),
        (lambda text: vector_of(text)[:8], "8 dimensions"),
    ],
    ids=["another model", "normalised", "float16", "fewer dimensions"],
)
def test_vectors_that_are_not_those_of_the_provider_are_refused(
    change: Callable[[str], np.ndarray], cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, store = Model(), Store({text: change(text) for text in TEXTS})
    with open_cache(model, store) as cache:
        fetched = cache.fetch(TEXTS)
        assert set(fetched.sources) == {"provider"}
        assert np.array_equal(fetched.vectors, [vector_of(text) for text in TEXTS])
        assert cache.stats().importers["store"].verification == "refused"
        (line,) = [record.getMessage() for record in caplog.records if "nothing is imported" in record.getMessage()]
        assert cause in line
        assert "text " not in line
        store.asked.clear()
        cache.fetch(["other"])
        assert store.asked == []


def test_the_result_of_a_verification_is_kept_in_the_tier(tmp_path: Any) -> None:
    for expected in (20, 0):
        model = Model()
        with Cache(model, [DiskBackend(path=tmp_path / "vectors")], imports=[store_of(TEXTS)]) as cache:
            cache.purge(scope=cache.explain("x").scope)
            cache.fetch(TEXTS)
            cache.flush()
        assert len(model.texts) == expected
    model = Model()
    with Cache(model, [DiskBackend(path=tmp_path / "vectors")], imports=[store_of(["b"], name="another")]) as cache:
        cache.fetch(["b"])
    assert model.texts == ["b"]  # another source is verified anew


def test_a_program_that_embeds_few_texts_per_run_continues_the_verification(tmp_path: Any) -> None:
    computed = []
    for start in range(0, 30, 6):
        model = Model()
        with Cache(
            model, [DiskBackend(path=tmp_path / "vectors")], imports=[Import(store_of(TEXTS), verify=15)]
        ) as cache:
            cache.fetch(TEXTS[start : start + 6])
        computed.append(len(model.texts))
    assert computed == [6, 6, 3, 0, 0]


def test_a_source_that_was_refused_stays_refused_in_the_next_process(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = {text: vector_of(text, seed=5) for text in TEXTS}
    for _ in range(2):
        store = Store(wrong)
        with Cache(Model(), [DiskBackend(path=tmp_path / "vectors")], imports=[store]) as cache:
            cache.fetch([str(store)])
            cache.fetch(TEXTS[:1])
            assert cache.stats().importers["store"].verification == "refused"
            cache.flush()
    assert store.asked == []


def test_replay_mode_imports_from_a_trusted_source_and_names_one_that_is_not_verified() -> None:
    model = Model()
    with open_cache(model, Import(store_of(TEXTS), verify=0), mode="replay") as cache:
        assert cache.fetch(TEXTS).imported == set(range(50))
        with pytest.raises(ReplayMiss, match=r"computes nothing$"):
            cache.embed("missing")
    with open_cache(model, store_of(TEXTS), mode="replay") as cache, pytest.raises(ReplayMiss, match="not verified"):
        cache.embed(TEXTS[0])
    assert model.texts == []


def test_replay_mode_uses_the_result_of_an_earlier_verification(tmp_path: Any) -> None:
    with Cache(Model(), [DiskBackend(path=tmp_path / "vectors")], imports=[store_of(TEXTS)]) as cache:
        cache.fetch(TEXTS[:25])
    with Cache(Model(), [DiskBackend(path=tmp_path / "vectors")], imports=[store_of(TEXTS)], mode="replay") as cache:
        assert cache.fetch(TEXTS[25:]).imported == set(range(25))


def test_a_failing_importer_costs_only_its_vectors() -> None:
    model, store = Model(), store_of(TEXTS)
    events: list[Event] = []

    def fail() -> None:
        raise SourceError("gone")

    store.fail = fail
    with open_cache(model, Import(store, verify=0), listeners=[events.append]) as cache:
        for text in TEXTS[:5]:
            assert cache.fetch([text]).sources == ["provider"]
        stats = cache.stats().importers["store"]
        assert stats.errors == 3
        assert stats.skipped == 2
        assert stats.causes == {"SourceError": 3}
        assert stats.is_skipped
    assert [event.state for event in events if isinstance(event, ImporterChanged)] == ["open"]
    assert sum(event.errors for event in events if isinstance(event, Imported)) == 3


def test_a_hanging_importer_costs_its_timeout_once() -> None:
    model, store, gate = Model(), store_of(TEXTS), threading.Event()
    store.fail = lambda: bool(gate.wait())  # type: ignore[assignment,return-value]
    try:
        with open_cache(model, Import(store, verify=0, timeout=0.05)) as cache:
            assert cache.fetch(TEXTS[:1]).sources == ["provider"]
            assert cache.fetch(TEXTS[1:3]).sources == ["provider"] * 2
            assert cache.stats().importers["store"].causes == {"timeout": 1}
            assert cache.stats().importers["store"].skipped == 2
    finally:
        gate.set()


def test_invalid_vectors_are_left_out_one_by_one() -> None:
    bad = {"nan": [np.nan] * 16, "zero": [0.0] * 16, "short": [1.0] * 3, "none": None, "words": ["a"] * 16}
    model, store = Model(), Store({**bad, **{text: vector_of(text) for text in TEXTS}})
    with open_cache(model, Import(store, verify=0)) as cache:
        fetched = cache.fetch([*TEXTS, *bad])
        assert fetched.imported == set(range(50))
        assert sorted(model.texts) == sorted(bad)
        assert cache.stats().importers["store"].invalid == 5


@pytest.mark.parametrize("answer", [{}, None, FoundVectors(["a", "b"], [[1.0]]), FoundVectors(["other"], [[1.0] * 16])])
def test_a_wrong_answer_of_an_importer_is_never_used(answer: Any) -> None:
    store = Store({})
    store.lookup = lambda texts: answer  # type: ignore[method-assign]
    with open_cache(Model(), Import(store, verify=0)) as cache:
        assert np.array_equal(cache.embed("a"), vector_of("a"))


def test_importers_belong_to_one_space_and_one_namespace() -> None:
    store = store_of(TEXTS)
    with open_cache(Model(), Import(store, verify=0)) as cache:
        assert cache.for_provider(Model(seed=3), space=None).fetch(TEXTS[:1]).sources == ["store"]  # the same space
        other = CountingProvider(dimensions=16)
        assert cache.for_provider(other).fetch(TEXTS[1:2]).sources == ["provider"]
        assert cache.for_namespace("tenant").fetch(TEXTS[2:3]).sources == ["provider"]


def test_a_chain_without_a_provider_asks_for_each_provider_and_verifies_each(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = store_of(TEXTS)
    with open_cache(NoProvider(), store) as base:  # type: ignore[arg-type]
        first = base.for_provider(Model())
        assert first.fetch(TEXTS).sources.count("store") == 30
        second = base.for_provider(Model(seed=1, name="n"))
        assert second.fetch(TEXTS).sources == ["provider"] * 50
        assert base.stats().importers["store"].verification == "verified"
    with open_cache(NoProvider(), Import(store_of(TEXTS), verify=0)) as base:  # type: ignore[arg-type]
        assert base.for_provider(Model()).fetch(TEXTS[:1]).sources == ["store"]
        other = base.for_provider(Model(seed=1, name="n"))
        assert other.fetch(TEXTS[1:2]).sources == ["provider"]
        assert "one vector space only" in caplog.text
    with open_cache(NoProvider(), store_of(TEXTS, mixing="queries are mixed up")) as base:  # type: ignore[arg-type]
        assert base.for_provider(Model(asymmetric=True)).fetch(TEXTS).imported == set()
        assert "queries are mixed up" in caplog.text
        assert len(base.for_provider(Model()).fetch(TEXTS).imported) == 30


def test_the_vectors_of_one_task_are_not_those_of_another() -> None:
    store = store_of(TEXTS)
    with open_cache(Model(asymmetric=True), Import(store, verify=0)) as cache:
        assert cache.fetch(TEXTS, task="query").imported == set()
        assert cache.fetch(TEXTS).imported == set(range(50))
    with pytest.raises(ConfigError, match="mixed up"):
        open_cache(Model(asymmetric=True), store_of(TEXTS, mixing="queries and documents are mixed up"))
    with pytest.raises(ConfigError, match='task "document"'):
        open_cache(Model(asymmetric=True), Import(store_of(TEXTS, task="document"), task="query"))
    with open_cache(Model(), Import(store_of(TEXTS, mixing="mixed up", task="query"), verify=0)) as cache:
        assert cache.fetch(TEXTS, task="document").imported == set(range(50))


def test_the_importer_gets_the_normalised_text() -> None:
    store = store_of(["a"])
    with open_cache(Model(), Import(store, verify=0), key=KeyPolicy(normalize=["strip"])) as cache:
        assert cache.fetch([" a ", "a"]).imported == {0, 1}
    assert store.asked == ["a"]


def test_vectors_are_rounded_like_those_of_the_provider() -> None:
    with open_cache(Model(), store_of(TEXTS), dtype="float16") as cache:
        fetched = cache.fetch(TEXTS)
        assert len(fetched.imported) == 30
        assert np.array_equal(fetched.vectors, np.array([vector_of(text) for text in TEXTS], np.float16))


def test_an_unknown_number_of_dimensions_is_learned_from_imported_vectors() -> None:
    with open_cache(Model(dimensions=None), Import(store_of(TEXTS), verify=0)) as cache:
        assert cache.embed(TEXTS[0]).size == 16


def test_nothing_is_imported_into_the_space_of_a_provider_that_has_drifted() -> None:
    model, store = Model(), store_of(TEXTS)
    guard = DriftGuard(texts=["canary"], every=1.0, action="new-space")
    now = [0.0]
    with open_cache(model, Import(store, verify=0), drift=guard, clock=lambda: now[0]) as cache:
        assert cache.fetch(TEXTS[:1]).sources == ["store"]
        cache.embed("first")
        model.seed, now[0] = 9, 1000.0
        cache.embed("second")
        assert cache.fetch(TEXTS[1:2]).sources == ["provider"]


def test_with_store_false_nothing_is_stored() -> None:
    store = store_of(TEXTS)
    with open_cache(Model(), Import(store, verify=0)) as cache:
        assert cache.fetch(TEXTS, store=False).imported == set(range(50))
        assert cache.lookup(TEXTS).sources == [None] * 50


def test_a_source_that_can_only_be_scanned_is_read_once() -> None:
    model = Model()
    half = len(TEXTS) // 2
    parts = [
        FoundVectors(some, np.array([vector_of(text) for text in some])) for some in (TEXTS[:half], [], TEXTS[half:])
    ]
    source = Scanned(parts)
    with open_cache(model, Import(source, verify=0, timeout=60.0)) as cache:
        assert cache.fetch([*TEXTS[::-1], "new"]).imported == set(range(50))
        assert np.array_equal(cache.embed_batch(TEXTS), [vector_of(text) for text in TEXTS])
        assert cache.fetch(["newer"]).sources == ["provider"]
    assert source.scans == 1


def test_a_text_with_two_vectors_in_a_scanned_source_is_computed() -> None:
    rows = np.array([vector_of("a"), vector_of("b"), vector_of("a", seed=1), vector_of("b")])
    source = Scanned([FoundVectors(["a", "b", "a", "b"], rows)])
    with open_cache(Model(), Import(source, verify=0, timeout=60.0)) as cache:
        assert cache.fetch(["a", "b"]).sources == ["provider", "scanned"]


def test_a_call_does_not_wait_for_a_scan_that_takes_long() -> None:
    gate = threading.Event()
    source = Scanned([FoundVectors(TEXTS, [vector_of(text) for text in TEXTS])], gate)
    try:
        with open_cache(Model(), Import(source, verify=0, timeout=0.1)) as cache:
            assert cache.fetch(TEXTS[:1]).sources == ["provider"]
            assert cache.stats().importers["scanned"].errors == 0
    finally:
        gate.set()


def test_two_importers_are_asked_in_turn_and_have_two_names() -> None:
    first, second = store_of(TEXTS[:5]), store_of(TEXTS)
    tier = Tier(MemoryBackend(), name="store")
    with open_cache(Model(), Import(first, verify=0), Import(second, verify=0), tiers=[tier]) as cache:
        assert cache.fetch(TEXTS[:6]).sources == ["store-import"] * 5 + ["store-import-2"]
    assert second.asked == [TEXTS[5]]


def test_calls_at_the_same_time_return_one_vector_per_text() -> None:
    model, store = Model(), store_of(TEXTS)
    barrier = threading.Barrier(4)
    results: list[np.ndarray] = []
    with open_cache(model, store) as cache:

        def work() -> None:
            barrier.wait()
            results.append(cache.embed_batch(TEXTS))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(np.array_equal(result, [vector_of(text) for text in TEXTS]) for result in results)
        assert len(set(model.texts)) == len(model.texts)


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (Store, "is a class"),
        (object(), "is not an importer"),
        (Import(store_of([]), verify=-1), "verify must be"),
        (Import(store_of([]), timeout=0), "timeout must be"),
    ],
)
def test_an_importer_that_cannot_be_used_is_an_error_at_startup(one: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_cache(Model(), one)
    with pytest.raises(ConfigError, match="must be a list"):
        Cache(Model(), imports="langchain")  # type: ignore[arg-type]


def test_an_unknown_task_is_reported_at_the_importer_that_has_it() -> None:
    imports = [{"type": "langchain", "path": "cache", "task": "qurey"}]
    with pytest.raises(ConfigError, match=r'\[\[imports\]\] "langchain": .*the task "qurey"; did you mean "query"'):
        embedonce.open({"provider": {"type": "ngram"}, "tiers": [{"type": "memory"}], "imports": imports})
