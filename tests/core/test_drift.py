"""The drift guard: when it checks, what it remembers across restarts, and how it handles a changed provider."""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import embedonce
from embedonce import Cache, ConfigError, DriftError, DriftGuard, Tier, config
from embedonce.drift import CANARIES
from embedonce.testing import CountingProvider, FaultyProvider, ManualClock, ProviderFault
from embedonce_backends.disk import DiskBackend
from embedonce_backends.memory import MemoryBackend

DAY = 86400.0


class Changing(CountingProvider):
    """Returns different vectors for the same space after ``changed`` is set. ``noise`` is added to every value."""

    changed = False
    noise = 0.0

    def vector_of(self, text: str, task: str = "document") -> Any:
        if self.changed:
            text = f"another model: {text}"
        return super().vector_of(text, task) + np.float32(self.noise)

    @property
    def checks(self) -> int:
        """Number of times that the canaries were embedded."""
        counts = {self.count[text] for text in CANARIES}
        assert len(counts) == 1
        return counts.pop()


def open_guarded(provider: Any, clock: ManualClock, tiers: Any = None, action: Any = "refuse", **options: Any) -> Cache:
    guard = DriftGuard(action=action, every=DAY, **options.pop("guard", {}))
    return Cache(provider, [MemoryBackend()] if tiers is None else tiers, drift=guard, clock=clock, **options)


def test_it_checks_at_the_first_miss_and_never_for_a_hit() -> None:
    provider, clock = Changing(), ManualClock()
    with open_guarded(provider, clock) as cache:
        assert provider.calls == []
        cache.lookup(["a"])
        assert provider.calls == []
        cache.embed("a")
        assert provider.checks == 1
        cache.embed_batch(["a", "b", "c"])
        assert provider.checks == 1
        clock.advance(10 * DAY)
        cache.embed_batch(["a", "b", "c"])
        cache.put(["d"], [provider.vector_of("d")])
        assert provider.checks == 1, "nothing was embedded, so there must be no check"
        cache.embed("e")
        assert provider.checks == 2
        assert (cache.embed("e") == provider.vector_of("e")).all()


def test_the_date_of_the_last_check_survives_a_restart(tmp_path: Path) -> None:
    provider, clock = Changing(), ManualClock()
    for text, passed, checks in (("a", 0.0, 1), ("b", 0.6, 1), ("c", 0.6, 2), ("d", 0.6, 2), ("e", 0.6, 3)):
        clock.advance(passed * DAY)
        with open_guarded(provider, clock, [MemoryBackend(), DiskBackend(path=tmp_path)]) as cache:
            cache.embed(text)
            cache.embed(f"{text} again")
        assert provider.checks == checks, text


def test_drift_after_a_restart_is_refused_and_hits_are_still_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    provider, clock = Changing(), ManualClock()
    with open_guarded(provider, clock, [DiskBackend(path=tmp_path)]) as cache:
        old = cache.embed("stored")
    provider.changed = True
    clock.advance(2 * DAY)
    with open_guarded(provider, clock, [DiskBackend(path=tmp_path)]) as cache, caplog.at_level(logging.WARNING):
        assert (cache.embed("stored") == old).all()
        with pytest.raises(DriftError, match=r"no longer returns the vectors .* Change \[key\] version"):
            cache.embed("new")
        fetched = cache.fetch(["stored", "new"])
        assert fetched.sources == ["disk", None]
        assert isinstance(fetched.failed[1], DriftError)
        assert provider.count["new"] == 0
        assert cache.lookup(["new"]).sources == [None]
        checks = provider.checks
        for number in range(5):
            with pytest.raises(DriftError):
                cache.embed(f"new {number}")
        assert provider.checks == checks, "the result of a check must be remembered for a while"
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert not any(text in messages[0] for text in CANARIES)
    with open_guarded(provider, clock, [DiskBackend(path=tmp_path)]) as cache, pytest.raises(DriftError):
        cache.embed("new")

    provider.changed = False
    with open_guarded(provider, clock, [DiskBackend(path=tmp_path)]) as cache:
        assert (cache.embed("new") == provider.vector_of("new")).all()


def test_a_provider_that_returns_to_its_old_vectors_is_used_again_without_a_restart() -> None:
    provider, clock = Changing(), ManualClock()
    with open_guarded(provider, clock) as cache:
        cache.embed("a")
        provider.changed = True
        clock.advance(DAY)
        with pytest.raises(DriftError):
            cache.embed("b")
        provider.changed = False
        with pytest.raises(DriftError):
            cache.embed("b")
        clock.advance(61)
        assert (cache.embed("b") == provider.vector_of("b")).all()


def test_a_new_version_leaves_the_old_vectors_behind(tmp_path: Path) -> None:
    provider, clock = Changing(), ManualClock()
    with open_guarded(provider, clock, [DiskBackend(path=tmp_path)]) as cache:
        cache.embed("a")
    provider.changed = True
    clock.advance(2 * DAY)
    policy = embedonce.KeyPolicy(version="v2")
    with open_guarded(provider, clock, [DiskBackend(path=tmp_path)], key=policy) as cache:
        assert (cache.embed("a") == provider.vector_of("a")).all()


def test_warn_logs_each_check_that_finds_drift_and_continues(caplog: pytest.LogCaptureFixture) -> None:
    provider, clock = Changing(), ManualClock()
    with open_guarded(provider, clock, action="warn") as cache, caplog.at_level(logging.WARNING):
        cache.embed("a")
        provider.changed = True
        for number, checks in enumerate((1, 2, 3)):
            clock.advance(DAY)
            cache.embed(f"b {number}")
            cache.embed(f"c {number}")
            assert len(caplog.records) == checks, "each check must still compare with the first vectors"


def test_a_slow_drift_is_measured_against_the_first_vectors() -> None:
    """Each step is within the tolerance, but their sum exceeds it. The guard must compare with the first vectors."""
    provider, clock = Changing(dimensions=64), ManualClock()
    with open_guarded(provider, clock) as cache:
        for step in range(40):
            provider.noise = 0.01 * step
            clock.advance(DAY)
            try:
                cache.embed(f"text {step}")
            except DriftError:
                break
        else:
            pytest.fail("never found")
    first, now, before = (
        np.stack([CountingProvider.vector_of(provider, text) + np.float32(noise) for text in CANARIES])
        for noise in (0.0, provider.noise, provider.noise - 0.01)
    )
    assert 1 - _cosines(now, before).min() < 0.001 < 1 - _cosines(now, first).min()


def _cosines(one: Any, other: Any) -> Any:
    return (one * other).sum(axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_small_variations_of_a_model_are_not_drift(dtype: Any) -> None:
    provider, clock = Changing(dimensions=384), ManualClock()
    with open_guarded(provider, clock, dtype=dtype) as cache:
        for number in range(5):
            provider.noise = 1e-6 * number
            clock.advance(DAY)
            cache.embed(f"text {number}")
    assert provider.checks == 5


def test_each_space_has_its_own_canaries() -> None:
    provider, clock = Changing(symmetric=False), ManualClock()
    with open_guarded(provider, clock) as cache:
        cache.embed("a")
        cache.embed("a", task="query")
        assert [task for task, texts in provider.calls if set(texts) == set(CANARIES)] == ["document", "query"]
    provider, clock = Changing(), ManualClock()
    with open_guarded(provider, clock) as cache:
        cache.embed("a")
        cache.embed("b", task="query")
        assert provider.checks == 1, "a symmetric provider has one space, so one check is enough"


def test_canaries_that_a_tier_has_lost_are_embedded_again() -> None:
    provider, clock = Changing(), ManualClock()
    with open_guarded(provider, clock) as cache:
        cache.embed("a")
        cache.forget([CANARIES[0]])
        provider.changed = True
        clock.advance(DAY)
        with pytest.raises(DriftError):  # the vectors of the other canaries are still stored
            cache.embed("b")
        cache.forget(CANARIES)
        clock.advance(DAY)
        cache.embed("b")  # no reference is left, so the new vectors of the canaries become the reference


def test_custom_canaries_are_normalised_like_texts() -> None:
    provider, clock = CountingProvider(), ManualClock()
    policy = embedonce.KeyPolicy(normalize=["strip"])
    with open_guarded(provider, clock, key=policy, guard={"texts": [" one ", "one", "two"]}) as cache:
        cache.embed("a")
        assert provider.calls[0][1] == ("one", "two")
        assert cache.fetch(["one"]).sources == ["memory"], "canaries are stored like any other text"


def test_a_failing_provider_raises_its_own_error() -> None:
    clock = ManualClock()
    provider = FaultyProvider(CountingProvider(), [ProviderFault("raise", error=OSError("down"))])
    with open_guarded(provider, clock) as cache:
        with pytest.raises(OSError, match="down"):
            cache.embed("a")
        provider.heal()
        cache.embed("a")
        clock.advance(61)
        cache.embed("b")
        assert [len(texts) for _, texts in provider.inner.calls] == [1, len(CANARIES), 1]


def test_replay_never_checks() -> None:
    provider, clock = Changing(), ManualClock()
    with open_guarded(provider, clock, mode="replay") as cache, pytest.raises(embedonce.ReplayMiss):
        cache.embed("a")
    assert provider.calls == []


def test_a_failing_tier_does_not_prevent_an_answer() -> None:
    from embedonce.testing import DictBackend, Fault, FaultyBackend

    provider, clock = Changing(), ManualClock()
    backend = FaultyBackend(DictBackend(scope="network"), [Fault("refuse", on="any")])
    with open_guarded(provider, clock, [Tier(backend, name="broken", timeout=60.0)]) as cache:
        assert (cache.embed("a") == provider.vector_of("a")).all()


def test_the_canaries_of_an_unreachable_tier_are_not_replaced() -> None:
    from embedonce.testing import DictBackend, Fault, FaultyBackend

    provider, clock, store = Changing(), ManualClock(), DictBackend()
    open_guarded(provider, clock, [store]).embed("a")
    provider.changed = True
    clock.advance(2 * DAY)
    away = FaultyBackend(store, [Fault("raise", on="get", calls=[1, 2])])
    with open_guarded(provider, clock, [MemoryBackend(), Tier(away, name="away")]) as cache:
        cache.embed("nothing to compare with")
        assert provider.checks == 1, "the stored canaries could not be read, so no new ones may replace them"
        clock.advance(120)
        with pytest.raises(DriftError):
            cache.embed("b")


@pytest.mark.parametrize("action", ["warn", "refuse", "new-space"])
def test_vectors_with_different_dimensions_are_drift(
    tmp_path: Path, action: Any, caplog: pytest.LogCaptureFixture
) -> None:
    length, clock, space = [3], ManualClock(), {"model": "behind its name"}

    def model(texts: list[str]) -> list[list[float]]:
        return [[float(len(text) + 1)] * length[0] for text in texts]

    with open_guarded(model, clock, [DiskBackend(path=tmp_path / "d")], space=space) as cache:
        cache.embed("a")
    length[0] = 2
    clock.advance(2 * DAY)
    with open_guarded(model, clock, [DiskBackend(path=tmp_path / "d")], action, space=space) as cache:
        fetched = cache.fetch(["b"])
        assert "no longer returns the vectors" in caplog.text
        assert [type(error) for error in fetched.failed.values()] == ([DriftError] if action == "refuse" else [])
        if action == "new-space":
            assert cache.fetch(["a", "b"]).vectors.shape == (2, 2)


def test_a_clock_that_is_set_back_does_not_postpone_the_next_check() -> None:
    provider, now = Changing(), [100 * DAY]
    guard = DriftGuard(action="refuse", every=DAY)
    with Cache(provider, [MemoryBackend()], drift=guard, clock=lambda: now[0]) as cache:
        cache.embed("a")
        now[0] = DAY
        cache.embed("b")
        cache.embed("c")
        assert provider.checks == 2


def test_concurrent_calls_share_one_check(caplog: pytest.LogCaptureFixture) -> None:
    provider, clock = Changing(delay=0.01), ManualClock()
    with open_guarded(provider, clock) as cache:
        found: dict[int, Any] = {}

        def work(number: int) -> None:
            found[number] = cache.embed(f"text {number}")

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        provider.changed = True
        clock.advance(DAY)

        async def tasks() -> list[Any]:
            return await asyncio.gather(*(cache.aembed(f"late {n}") for n in range(8)), return_exceptions=True)

        assert all(isinstance(error, DriftError) for error in asyncio.run(tasks()))
        assert caplog.text.count("no longer returns the vectors") == 1, "concurrent calls must share one check"
    for number, vector in found.items():
        assert (vector == Changing().vector_of(f"text {number}")).all()


# --- a new space ------------------------------------------------------------------------------


def test_a_new_space_is_opened_and_found_after_a_restart(tmp_path: Path) -> None:
    provider, clock = Changing(), ManualClock()

    def opened() -> Cache:
        return open_guarded(provider, clock, [MemoryBackend(), DiskBackend(path=tmp_path)], action="new-space")

    with opened() as cache:
        first = cache.fetch(["a", "b"])
    provider.changed = True
    clock.advance(2 * DAY)
    with opened() as cache:
        assert cache.fetch(["a"]).sources == ["disk"], "a hit must not cause a check"
        moved = cache.fetch(["a", "new"])
        assert moved.sources == ["provider", "provider"], "all vectors of an answer must be from the same space"
        for text, row in zip(["a", "new"], moved.vectors, strict=True):
            assert (row == provider.vector_of(text)).all()
        assert moved.space is not None
        assert first.space is not None
        assert moved.space.extra == {"drift": 1}
        assert moved.space.fingerprint() != first.space.fingerprint()
        assert (cache.embed("a", task="query") == moved.vectors[0]).all(), "both tasks must use the new space"
        assert cache.explain("a").space["extra"] == {"drift": 1}
    checks = provider.checks
    with opened() as cache:
        assert cache.fetch(["a", "new"]).sources == ["disk", "disk"]
        assert cache.lookup(["b"]).sources == [None], "b is only in the old space"
        cache.put(["c"], [provider.vector_of("c")])
        assert cache.fetch(["c"]).sources == ["memory"]
        assert cache.embed("b").tolist() == provider.vector_of("b").tolist()
        assert provider.checks == checks


def test_another_process_uses_the_new_space(tmp_path: Path) -> None:
    provider, clock = Changing(), ManualClock()
    caches = [open_guarded(provider, clock, [DiskBackend(path=tmp_path)], action="new-space") for _ in range(2)]
    with caches[0] as one, caches[1] as other:
        one.embed("a")
        other.embed("a2")
        provider.changed = True
        clock.advance(DAY)
        assert (one.embed("b") == provider.vector_of("b")).all()
        checks = provider.checks
        assert (other.embed("c") == provider.vector_of("c")).all()
        assert provider.checks == checks, "a process must find the new space that another process has opened"
        assert other.fetch(["b"]).sources == ["disk"]


def test_drift_again_opens_another_space() -> None:
    provider, clock = Changing(), ManualClock()
    with open_guarded(provider, clock, action="new-space") as cache:
        for number in range(3):
            provider.changed = bool(number % 2)
            clock.advance(DAY)
            fetched = cache.fetch(["a", f"new {number}"])
            assert (fetched.vectors[0] == provider.vector_of("a")).all()
            assert fetched.space is not None
            assert fetched.space.extra == ({"drift": number} if number else None)


def test_forget_also_removes_from_the_old_spaces(tmp_path: Path) -> None:
    provider, clock = Changing(), ManualClock()
    with open_guarded(provider, clock, [DiskBackend(path=tmp_path)], action="new-space") as cache:
        cache.embed("a")
        provider.changed = True
        clock.advance(DAY)
        cache.embed("b")
        cache.forget(["a"])
    provider.changed = False
    with Cache(provider, [DiskBackend(path=tmp_path)]) as plain:
        assert plain.lookup(["a"]).sources == [None]


def test_concurrent_calls_that_find_drift_use_one_new_space() -> None:
    provider, clock = Changing(delay=0.005), ManualClock()
    with open_guarded(provider, clock, action="new-space") as cache:
        cache.embed("a")
        provider.changed = True
        clock.advance(DAY)

        async def tasks() -> list[Any]:
            return await asyncio.gather(*(cache.afetch(["a", f"late {n}"]) for n in range(8)))

        for number, fetched in enumerate(asyncio.run(tasks())):
            assert fetched.space.extra == {"drift": 1}
            for text, row in zip(["a", f"late {number}"], fetched.vectors, strict=True):
                assert (row == provider.vector_of(text)).all()


# --- configuration ----------------------------------------------------------------------------


def load_guard(**drift: Any) -> Any:
    return config.load({"provider": {"type": "ngram"}, "tiers": [], "drift": drift}).drift


def test_it_is_off_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"provider": {"type": "ngram"}, "tiers": []}
    assert config.load(table).drift is None
    assert not [one for one in config.load(table).settings() if one.name.startswith("drift")]
    monkeypatch.setenv("EMBEDONCE__DRIFT__ACTION", "refuse")
    assert config.load(table).drift == DriftGuard(action="refuse")


def test_its_toml_table() -> None:
    assert load_guard() == DriftGuard()
    made = load_guard(action="refuse", every="1h30m", tolerance=0.01, texts=["a", "b"])
    assert made == DriftGuard(action="refuse", every=5400.0, tolerance=0.01, texts=("a", "b"))
    assert "drift" in config.schema()["properties"]
    with embedonce.open({"provider": {"type": "ngram"}, "tiers": [], "drift": {}}) as cache:
        assert cache.embed("a").shape == (256,)


@pytest.mark.parametrize(
    "drift",
    [
        {"action": "panic"},
        {"every": 0},
        {"tolerance": 0},
        {"tolerance": 2},
        {"texts": []},
        {"texts": "a"},
        {"texts": [""]},
        {"acton": 1},
    ],
)
def test_invalid_options_in_a_configuration_are_refused(drift: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="drift"):
        load_guard(**drift)


@pytest.mark.parametrize(
    "options",
    [
        {"action": "panic"},
        {"texts": "a"},
        {"texts": []},
        {"texts": ["a", ""]},
        {"texts": ["\ud800"]},
        {"every": 0},
        {"tolerance": 2},
    ],
)
def test_invalid_options_in_python_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        DriftGuard(**options)
