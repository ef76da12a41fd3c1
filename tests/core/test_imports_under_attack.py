"""Importers on demand: calls at the same time, importers that misbehave, and verifications that prove nothing."""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from import_doubles import TEXTS, Model, Scanned, Store, open_cache, store_of, vector_of

from embedonce import Cache, ConfigError, Import, Tier
from embedonce.contracts import FoundVectors
from embedonce.events import Event, Stored
from embedonce.vectors import Dtype
from embedonce_backends.disk import DiskBackend
from embedonce_backends.memory import MemoryBackend


def run_in_thread(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_a_call_that_has_imported_some_texts_shares_what_another_call_has_computed_meanwhile() -> None:
    model = Model()
    with open_cache(model, Import(store_of(["a"]), verify=0)) as cache:
        other: list[Any] = []

        def compute_b(event: Event) -> None:
            if isinstance(event, Stored) and not other:  # "a" was imported, and "b" is to be computed next
                other.append(None)
                run_in_thread(lambda: other.append(cache.embed("b")))

        cache.subscribe(compute_b)
        rows = cache.embed_batch(["a", "b"])
        assert np.array_equal(rows[1], other[1])
    assert model.texts == ["b"]


def test_texts_that_wait_for_a_verification_get_the_vector_that_another_call_has_stored_meanwhile() -> None:
    """The vectors of the source are a little longer than those of the provider, so that they can be told apart."""
    store = Store({text: vector_of(text) * np.float32(1.0002) for text in TEXTS})
    others: list[np.ndarray] = []

    class Interrupted(Model):
        def embed(self, texts: Sequence[str], task: str) -> list[np.ndarray]:
            if not others:
                others.append(np.zeros(16))
                run_in_thread(lambda: others.append(cache.embed(TEXTS[40], task="document")))
            return super().embed(texts, task)

    with open_cache(Interrupted(), store, tiers=[MemoryBackend()]) as cache:
        rows = cache.embed_batch(TEXTS)
        assert np.array_equal(rows[40], others[1])
        assert np.array_equal(cache.embed(TEXTS[40]), others[1])


def test_imported_entries_get_the_metadata_of_the_call() -> None:
    with open_cache(Model(), Import(store_of(TEXTS), verify=0)) as cache:
        assert cache.fetch(["text 1", "new"], metadata=[{"n": 1}, {"n": 2}]).metadata == [{"n": 1}, {"n": 2}]
        assert cache.fetch(["text 1"]).metadata == [{"n": 1}]


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError])
def test_an_importer_that_raises_an_exception_of_another_kind_ends_no_call(kind: type[BaseException]) -> None:
    store = store_of(TEXTS)

    def fail() -> None:
        raise kind

    store.fail = fail
    with open_cache(Model(), Import(store, verify=0)) as cache:
        assert cache.fetch(TEXTS[:2]).sources == ["provider"] * 2
        assert asyncio.run(cache.afetch(TEXTS[2:4])).sources == ["provider"] * 2
        assert cache.stats().importers["store"].causes == {kind.__name__: 4}


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_a_check_of_an_importer_that_raises_an_exception_of_another_kind_has_a_result(
    kind: type[BaseException],
) -> None:
    class Broken(Store):
        def check(self) -> None:
            raise kind

    with open_cache(Model(), Broken({})) as cache:
        (result,) = cache.check_importers()
        assert not result.ok
        assert kind.__name__ in result.detail


def test_a_scan_that_raises_an_exception_of_another_kind_ends() -> None:
    class Broken(Scanned):
        def scan(self) -> Iterable[FoundVectors]:
            raise SystemExit

    with open_cache(Model(), Import(Broken([]), verify=0, timeout=600.0)) as cache:
        assert cache.fetch(TEXTS).sources == ["provider"] * 50
        assert cache.stats().importers["broken"].causes == {"SystemExit": 50}


def test_an_importer_may_use_the_cache_itself() -> None:
    class Curious(Store):
        def lookup(self, texts: Sequence[str]) -> FoundVectors:
            self.asked += texts
            return FoundVectors(texts, cache.embed_batch(list(texts)))

    store = Curious({})
    model = Model()
    with open_cache(model, Import(store, verify=0, timeout=600.0)) as cache:
        assert np.array_equal(cache.embed_batch(TEXTS), [vector_of(text) for text in TEXTS])
    assert (store.asked, model.texts) == (TEXTS, TEXTS)


def test_a_text_that_a_lookup_returns_twice_is_computed() -> None:
    class Double(Store):
        def lookup(self, texts: Sequence[str]) -> FoundVectors:
            return FoundVectors([*texts, texts[0]], [vector_of(text) for text in [*texts, "other"]])

    with open_cache(Model(), Import(Double({}), verify=0)) as cache:
        assert cache.fetch(["a", "b"]).sources == ["provider", "double"]
        counts = cache.stats().importers["double"]
        assert (counts.found, counts.invalid, counts.missing) == (1, 1, 0)


@pytest.mark.parametrize("unreadable", [{"a": float("nan")}, {"a": -5}, {"a": 10**30}, {"a": "x"}])
def test_wrong_numbers_of_an_importer_do_not_spoil_the_counters(unreadable: Any) -> None:
    class Odd(Store):
        def lookup(self, texts: Sequence[str]) -> FoundVectors:
            return FoundVectors((), (), unreadable)

    with open_cache(Model(), Import(Odd({}), verify=0)) as cache:
        cache.fetch(TEXTS)
        counts = cache.stats().importers["odd"]
        numbers = [counts.found, counts.missing, counts.invalid, counts.errors, counts.skipped]
        assert sum(numbers) == 50
        assert min(numbers) == 0


def test_vectors_of_another_importer_verify_nothing() -> None:
    """The importer "trusted" gets its vectors while "other" is asked, and both have those of another model."""
    wrong = {text: vector_of(text, seed=5) for text in TEXTS}
    trusted = Store({}, name="trusted")

    class Late(Store):
        def lookup(self, texts: Sequence[str]) -> FoundVectors:
            found = super().lookup(texts)
            if not trusted.vectors:
                trusted.vectors = wrong
                run_in_thread(lambda: cache.fetch(TEXTS))
            return found

    imports = [Import(trusted, verify=0, name="trusted"), Import(Late(wrong, name="late"), name="late", timeout=600.0)]
    with open_cache(Model(), *imports) as cache:
        fetched = cache.fetch(TEXTS)
        assert set(fetched.sources) == {"trusted", "memory"}  # from flights of the other call, or from what it stored
        assert fetched.imported == {i for i, source in enumerate(fetched.sources) if source == "trusted"}
        assert cache.stats().importers["late"].verification == "unverified"


def open_on_disk(folder: Path, store: Store, *, dtype: Dtype = "float32", dimensions: int | None = 16) -> Cache:
    return open_cache(Model(dimensions=dimensions), store, tiers=[DiskBackend(path=folder)], dtype=dtype)


def test_a_verification_with_another_dtype_does_not_count(tmp_path: Path) -> None:
    store = Store({text: vector_of(text).astype(np.float16).astype(np.float32) for text in TEXTS})
    verifications = []
    runs: list[tuple[Dtype, list[str]]] = [("float16", TEXTS[:30]), ("float32", TEXTS[30:40]), ("float16", TEXTS[40:])]
    for dtype, texts in runs:
        with open_on_disk(tmp_path, store, dtype=dtype) as cache:
            cache.fetch(texts)
            verifications.append(cache.stats().importers["store"].verification)
    assert verifications == ["verified", "refused", "verified"]


def test_a_vector_of_other_dimensions_than_those_that_were_verified_sets_no_dimensions(tmp_path: Path) -> None:
    store = store_of(TEXTS)
    store.vectors["stray"] = vector_of("stray", size=8)
    with open_on_disk(tmp_path, store, dimensions=None) as cache:
        cache.fetch(TEXTS[:30])
    with open_on_disk(tmp_path, store, dimensions=None) as cache:
        assert cache.fetch(["stray"]).sources == ["provider"]
        assert cache.fetch(["new"]).sources == ["provider"]


@pytest.mark.parametrize(
    "metadata",
    [
        {"compared": "many", "equal": True, "dimensions": 16},
        {"compared": None, "equal": True, "dimensions": 16},
        {"compared": 20, "equal": "yes", "dimensions": 16},
        {"compared": 20, "equal": True},
        {"equal": True},
    ],
)
def test_a_damaged_result_of_a_verification_does_not_count(tmp_path: Path, metadata: dict[str, Any]) -> None:
    with open_on_disk(tmp_path, store_of(TEXTS)) as cache:
        cache.fetch(TEXTS[:30])
    damaged = 0
    with open_on_disk(tmp_path, store_of(TEXTS)) as cache:
        tier = cache._chain.tiers[0]
        for key in tier.backend.scan("eo1.import."):
            entries = tier.codec.decode(tier.backend.get_many([key]), dtype="int8", dimensions=None).entries
            tier.backend.set_many(tier.codec.encode({key: entries[key]._replace(metadata=metadata)}), None)
            damaged += 1
    assert damaged == 1
    with open_on_disk(tmp_path, store_of(TEXTS)) as cache:
        assert cache.fetch(TEXTS[30:40]).sources == ["provider"] * 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": None}, "timeout must be"),
        ({"timeout": [1]}, "timeout must be"),
        ({"timeout": float("nan")}, "timeout must be"),
        ({"name": 5}, "name must be"),
        ({"name": ""}, "name must be"),
    ],
)
def test_an_option_of_the_wrong_type_is_an_error_at_startup(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_cache(Model(), Import(store_of([]), **options))


def test_a_source_of_a_task_that_the_provider_does_not_know_is_refused() -> None:
    class Knowing(Model):
        def space(self, task: str) -> Any:
            if task not in {"document", "query"}:
                raise ValueError("unknown task")
            return super().space(task)

    with pytest.raises(ConfigError, match="passage"):
        open_cache(Knowing(), Import(store_of(TEXTS, task="passage")))


def test_a_source_that_has_rounded_only_some_vectors_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    rounded = {text: vector_of(text).astype(np.float16).astype(np.float32) for text in TEXTS[::2]}
    store = Store({**{text: vector_of(text) for text in TEXTS}, **rounded})
    with open_cache(Model(), store) as cache:
        assert set(cache.fetch(TEXTS).sources) == {"provider"}
        assert cache.stats().importers["store"].verification == "refused"
    assert "10 of 20 texts are float16 numbers" in caplog.text


def test_a_provider_whose_vectors_are_coarse_up_to_the_last_digit_is_verified() -> None:
    class Coarse(Model):
        def embed(self, texts: Sequence[str], task: str) -> list[np.ndarray]:
            return [np.nextafter(np.sign(vector_of(text)), np.float32(9)) for text in texts]

    store = Store({text: np.sign(vector_of(text)) for text in TEXTS})
    with open_cache(Coarse(), store) as cache:
        assert len(cache.fetch(TEXTS).imported) == 30


def test_no_importer_is_asked_for_a_text_that_waits_for_a_background_write() -> None:
    may_write = threading.Event()

    class Slow(MemoryBackend):
        def set_many(self, *arguments: Any) -> None:
            may_write.wait()
            super().set_many(*arguments)

    store = store_of(TEXTS[:5])
    with open_cache(Model(), Import(store, verify=0), tiers=[Tier(Slow(), write="background")]) as cache:
        try:
            cache.fetch(TEXTS[:10])
            store.asked.clear()
            assert set(cache.fetch(TEXTS[:10]).sources) == {"provider", "store"}
            assert store.asked == []
        finally:
            may_write.set()


def test_a_part_of_a_scan_whose_vectors_have_other_dimensions_does_not_hide_the_rest() -> None:
    stray = FoundVectors(["stray"], [vector_of("stray", size=8)])
    source = Scanned([stray, FoundVectors(TEXTS, [vector_of(text) for text in TEXTS]), stray])
    with open_cache(Model(), Import(source, verify=0, timeout=600.0)) as cache:
        assert cache.fetch([*TEXTS, "stray"]).sources == ["scanned"] * 50 + ["provider"]


def test_the_error_of_a_scan_does_not_keep_the_texts_of_calls() -> None:
    error = OSError("broken")

    class Broken(Scanned):
        def scan(self) -> Iterable[FoundVectors]:
            raise error

    with open_cache(Model(), Import(Broken([]), verify=0, timeout=600.0)) as cache:
        lengths = []
        for text in TEXTS[:2]:
            cache.embed(text)
            lengths.append(len(traceback.extract_tb(error.__traceback__)))
    assert lengths[0] == lengths[1]


def test_many_calls_at_the_same_time_compute_no_more_texts_than_the_verification_needs() -> None:
    model, store = Model(), Store({text: vector_of(text) * np.float32(1.0002) for text in TEXTS})

    async def embed_all() -> list[np.ndarray]:
        async with open_cache(model, Import(store, verify=5, timeout=600.0)) as cache:
            rows = await asyncio.gather(*[cache.aembed(text) for text in TEXTS])
            assert cache.stats().imported == 45
            return rows

    asyncio.run(embed_all())
    assert len(model.texts) == 5


def test_calls_that_wait_for_a_verification_are_computed_if_it_fails() -> None:
    class Failing(Model):
        def embed(self, texts: Sequence[str], task: str) -> list[np.ndarray]:
            if not self.texts:
                self.texts += texts
                raise ConnectionError
            return super().embed(texts, task)

    async def embed_all() -> None:
        async with open_cache(Failing(), Import(store_of(TEXTS), verify=1, timeout=600.0)) as cache:
            rows = await asyncio.gather(*[cache.aembed(text) for text in TEXTS], return_exceptions=True)
            assert [type(row) for row in rows].count(np.ndarray) == 49

    asyncio.run(embed_all())


def test_a_call_that_is_cancelled_does_not_keep_others_waiting_for_its_sample() -> None:
    async def run() -> None:
        asked = asyncio.Event()
        loop = asyncio.get_running_loop()
        store = store_of(TEXTS)
        release = threading.Event()

        class Slow(Model):
            def embed(self, texts: Sequence[str], task: str) -> list[np.ndarray]:
                loop.call_soon_threadsafe(asked.set)
                release.wait()
                return super().embed(texts, task)

        async with open_cache(Slow(), Import(store, verify=1, timeout=600.0)) as cache:
            first = asyncio.create_task(cache.aembed(TEXTS[0]))
            await asked.wait()
            second = asyncio.create_task(cache.aembed(TEXTS[1]))
            first.cancel()
            release.set()
            assert np.array_equal(await second, vector_of(TEXTS[1]))

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_call_inside_the_call_that_verifies_does_not_wait_for_it() -> None:
    class Curious(Model):
        def embed(self, texts: Sequence[str], task: str) -> list[np.ndarray]:
            if TEXTS[0] in texts:
                cache.embed(TEXTS[1])
            return super().embed(texts, task)

    with open_cache(Curious(), Import(store_of(TEXTS), verify=1, timeout=600.0)) as cache:
        assert np.array_equal(cache.embed(TEXTS[0]), vector_of(TEXTS[0]))


def test_a_blocking_call_on_the_event_loop_does_not_wait_for_a_call_of_the_same_loop() -> None:
    async def run() -> None:
        begun, go_on = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        class Slow(Model):
            def embed(self, texts: Sequence[str], task: str) -> list[np.ndarray]:
                if TEXTS[0] in texts:
                    loop.call_soon_threadsafe(begun.set)
                    go_on.wait()
                return super().embed(texts, task)

        async with open_cache(Slow(), Import(store_of(TEXTS), verify=1, timeout=600.0)) as cache:
            first = asyncio.create_task(cache.aembed(TEXTS[0]))
            await begun.wait()
            assert np.array_equal(cache.embed(TEXTS[1]), vector_of(TEXTS[1]))
            go_on.set()
            await first

    asyncio.run(run())
