"""A tier that is down, slow, faulty or full causes only errors and a bounded delay, and never a wrong vector."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from patience import LONG_TIMEOUT, retry_when_busy, wait_until

from embedonce import Cache, ConfigError, PartialAnswer, Tier, TierBusy, TierError, TierTimeout
from embedonce._engine.breaker import Breaker
from embedonce.events import Event, LookedUp, TierChanged
from embedonce.testing.fakes import CountingProvider, DictBackend
from embedonce.testing.faults import Fault, FaultyBackend
from embedonce_backends.memory import MemoryBackend

TEXTS = [f"text {i}" for i in range(20)]

Ask = Callable[[Cache, list[str]], NDArray[np.float32]]


def ask_async(cache: Cache, texts: list[str]) -> NDArray[np.float32]:
    return asyncio.run(cache.aembed_batch(texts))


faces = pytest.mark.parametrize("ask", [Cache.embed_batch, ask_async], ids=["sync", "async"])
kept_as = pytest.mark.parametrize("kept", ["frames", "entries"])
writes = pytest.mark.parametrize("write", ["inline", "background"])


def expected(provider: CountingProvider, texts: list[str]) -> NDArray[np.float32]:
    return np.stack([provider.vector_of(text) for text in texts])


class Clock:
    """A clock of Unix time that a test can change."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@faces
@kept_as
@writes
@pytest.mark.parametrize("twin", [False, True], ids=["blocking", "twin"])
@pytest.mark.parametrize(
    "fault",
    [
        Fault("raise"),
        Fault("refuse"),
        Fault("hang"),
        Fault("hang", obey=True),
        Fault("slow", seconds=0.4),
        Fault("corrupt"),
        Fault("truncate"),
        Fault("partial"),
        Fault("wrong_reply"),
        Fault("unasked"),
        Fault("none_for_miss"),
    ],
    ids=lambda fault: fault.kind + ("-obey" if fault.obey else ""),
)
def test_every_fault_still_gives_every_text_its_own_vector(
    ask: Ask, kept: Any, write: Any, twin: bool, fault: Fault
) -> None:
    provider = CountingProvider()
    inner = DictBackend(holds=kept, scope="network", twin=twin)
    faulty = FaultyBackend(inner, [])
    tier = Tier(faulty, name="far", timeout=0.1, write=write)
    with Cache(provider, [MemoryBackend(max_entries=3), tier], flush_timeout=1.0) as cache:
        assert (ask(cache, TEXTS[:10]) == expected(provider, TEXTS[:10])).all()
        cache.flush(LONG_TIMEOUT)
        faulty.faults.append(fault)
        start = time.monotonic()
        for _ in range(3):
            if fault.kind == "wrong_reply" and kept == "entries":
                break  # an entry does not contain its key, so the cache cannot detect a wrong reply
            assert (ask(cache, TEXTS) == expected(provider, TEXTS)).all()
        assert time.monotonic() - start < LONG_TIMEOUT
        faulty.heal()
        assert (ask(cache, TEXTS) == expected(provider, TEXTS)).all()


@faces
def test_calls_wait_once_for_a_tier_that_hangs_and_then_skip_it(ask: Ask) -> None:
    provider = CountingProvider()
    faulty = FaultyBackend(DictBackend(scope="network"), [Fault("hang")])
    with Cache(provider, [Tier(faulty, name="far", timeout=0.2)], flush_timeout=0.3) as cache:
        for i in range(50):
            ask(cache, [f"{i}"])
        stats = cache.stats().tiers["far"]
        assert stats.causes["timeout"] >= 1
        assert stats.errors <= 3  # the first read, at most one probe, and the first write
        assert stats.skipped >= 45
        assert provider.texts == 50
        faulty.release()


def changes_of(events: Sequence[Event]) -> list[tuple[str, str]]:
    return [(event.state, event.operation) for event in events if isinstance(event, TierChanged)]


def test_one_log_line_and_one_event_per_change_of_state(caplog: pytest.LogCaptureFixture) -> None:
    events: list[Event] = []
    faulty = FaultyBackend(DictBackend(scope="network"), [Fault("refuse")])
    tier = Tier(faulty, name="far", write="none")
    with Cache(CountingProvider(), [tier], listeners=[events.append]) as cache:
        with caplog.at_level(logging.WARNING, "embedonce"):
            for i in range(10):
                cache.embed(f"{i}")
            assert [record.message for record in caplog.records] == [
                "tier 'far': reads are failing (ConnectionRefusedError); skipping it until a probe succeeds"
            ]
            faulty.heal()
            # The log line precedes the event, so the line exists when the second event has arrived.
            wait_until(lambda: cache.embed(f"again {time.monotonic()}") is not None and len(changes_of(events)) == 2)
            assert caplog.records[-1].message == "tier 'far': reads work again"
            assert len(caplog.records) == 2
        assert changes_of(events) == [("open", "read"), ("closed", "read")]
        assert sum(event.errors for event in events if isinstance(event, LookedUp)) == 3


def test_exactly_one_probe_runs_and_not_on_the_callers_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Breaker, "FIRST_WAIT", 1e-9)
    monkeypatch.setattr(Breaker, "LOST_PROBE", 2 * LONG_TIMEOUT)
    faulty = FaultyBackend(DictBackend(scope="network"), [Fault("raise", calls=range(1, 4)), Fault("hang")])
    with Cache(CountingProvider(), [Tier(faulty, name="far", write="none")]) as cache:
        for i in range(3):
            cache.embed(f"{i}")
        assert cache._chain.tiers[0].reader.breaker.is_open
        before = faulty.called("get")
        cache.embed("its probe hangs")
        faulty.gate.until(1)
        for i in range(100):
            cache.embed(f"none of its own {i}")
            assert faulty.gate.waiting == 1
        assert faulty.called("get") - before == 1
        faulty.heal()


def test_a_busy_pool_is_an_error_but_opens_no_breaker() -> None:
    faulty = FaultyBackend(DictBackend(scope="network"), [Fault("raise", error=TierBusy)])
    with Cache(CountingProvider(), [Tier(faulty, name="far", write="none")]) as cache:
        for i in range(10):
            cache.embed(f"{i}")
        stats = cache.stats().tiers["far"]
        assert (stats.errors, stats.skipped, dict(stats.causes)) == (10, 0, {"TierBusy": 10})


@pytest.mark.parametrize("write", ["inline", "background"])
def test_a_probe_that_finds_the_store_busy_closes_the_breaker(
    write: Literal["inline", "background"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If TierBusy did not end the probe, the breaker would skip calls for 30 s, until the probe counts as lost."""
    monkeypatch.setattr(Breaker, "FIRST_WAIT", 1e-9)
    faults = [Fault("refuse", on="set", calls=[1, 2, 3]), Fault("raise", on="set", error=TierBusy, calls=[1])]
    changes: list[str] = []

    def record_change(event: Event) -> None:
        if isinstance(event, TierChanged):
            changes.append(event.state)

    tier = Tier(FaultyBackend(DictBackend(scope="network"), faults), name="far", write=write)
    with Cache(CountingProvider(), [tier], listeners=[record_change]) as cache:
        for i in range(4):
            cache.embed(f"{i}")
            assert cache.flush(LONG_TIMEOUT)
        wait_until(lambda: changes == ["open", "closed"])
        wait_until(
            lambda: "TierBusy" in cache.stats().tiers["far"].causes
        )  # the error is counted after the breaker has changed
        cache.embed("after")
        assert cache.flush(LONG_TIMEOUT)
        stats = cache.stats().tiers["far"]
        assert (stats.stored, dict(stats.causes)) == (1, {"ConnectionRefusedError": 3, "TierBusy": 1})


class TwoNodes(DictBackend):
    """A tier with two nodes. One node has the keys that end in an even digit, and may hang."""

    hangs = False

    def __init__(self) -> None:
        super().__init__(scope="network", deadline=True)
        self.probed = threading.Semaphore(0)

    def get_many(self, keys: Sequence[str], /) -> dict[str, Any]:
        if threading.current_thread() is not threading.main_thread():
            self.probed.release()
        if self.hangs and any(int(key[-1], 16) % 2 == 0 for key in keys):
            raise TimeoutError
        return super().get_many(keys)


def test_a_probe_reads_the_keys_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the probe asked a healthy node instead, the breaker would close, and calls would wait for the other node."""
    monkeypatch.setattr(Breaker, "FIRST_WAIT", 1e-9)
    monkeypatch.setattr(Breaker, "LOST_PROBE", 1e-9)
    changes: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, TierChanged):
            changes.append(event.state)

    backend = TwoNodes()
    with Cache(CountingProvider(), [Tier(backend, name="far", write="none")], listeners=[listen]) as cache:
        backend.hangs = True
        cache.embed_batch(TEXTS)
        for text in TEXTS[:5]:
            cache.embed(text)
            assert backend.probed.acquire(timeout=LONG_TIMEOUT)
        assert changes == ["open"]
        backend.hangs = False
        wait_until(lambda: cache.embed(TEXTS[0]) is not None and changes == ["open", "closed"])


def test_many_failed_background_writes_give_one_log_line(caplog: pytest.LogCaptureFixture) -> None:
    faulty = FaultyBackend(DictBackend(scope="network"), [Fault("raise", on="set", error=TierBusy)])
    with Cache(CountingProvider(), [Tier(faulty, name="far", write="background")]) as cache:
        for i in range(10):
            cache.embed(f"{i}")
            assert cache.flush(LONG_TIMEOUT)
        assert cache.stats().tiers["far"].errors == 10
    assert [record.getMessage() for record in caplog.records] == [
        "tier 'far': background write failed for 1 entries (TierBusy)"
    ]


def test_failing_writes_do_not_stop_reads() -> None:
    """A store that is full or read-only still answers."""
    provider = CountingProvider()
    faulty = FaultyBackend(DictBackend(scope="network"))
    with Cache(provider, [Tier(faulty, name="far", write="inline")]) as cache:
        cache.embed_batch(TEXTS)
        faulty.faults.append(Fault("raise", on="set"))
        for i in range(5):
            cache.embed(f"new {i}")
        assert cache.lookup(TEXTS).sources == ["far"] * len(TEXTS)
        assert cache._chain.tiers[0].writer.breaker.is_open
        assert not cache._chain.tiers[0].reader.breaker.is_open


@faces
def test_a_tier_whose_reads_are_skipped_is_not_written_to(ask: Ask) -> None:
    """A call whose read has timed out must not wait for a second timeout in an inline write."""
    faulty = FaultyBackend(DictBackend(scope="network"), [Fault("hang", obey=True)], deadline=True)
    with Cache(CountingProvider(), [Tier(faulty, name="far", write="inline", timeout=0.2)]) as cache:
        for i in range(20):
            ask(cache, [f"{i}"])
        assert cache._chain.tiers[0].reader.breaker.is_open
        assert faulty.called("set") == 0
        assert not cache._chain.tiers[0].writer.breaker.is_open
        faulty.heal()


def test_a_tier_that_failed_in_a_call_is_not_written_to_in_that_call() -> None:
    faulty = FaultyBackend(DictBackend(scope="host"), [Fault("raise", on="get", calls={1})])
    with Cache(CountingProvider(), [Tier(faulty, name="host")]) as cache:
        cache.embed("text")
        assert faulty.called("set") == 0
        cache.embed("text")
        assert faulty.called("set") > 0


@faces
@pytest.mark.parametrize("operation", ["get", "set"])
def test_on_error_raise(ask: Ask, operation: Any) -> None:
    provider = CountingProvider()
    faulty = FaultyBackend(DictBackend(scope="host"), [Fault("raise", on=operation)])
    near = DictBackend()
    with Cache(provider, [Tier(near, name="near"), Tier(faulty, name="host", on_error="raise")]) as cache:
        with pytest.raises(TierError, match="tier 'host' failed"):
            ask(cache, ["text"])
        if operation == "set":  # the computed vector is in the other tier
            assert cache.lookup(["text"]).sources == ["near"]


@pytest.mark.parametrize("operation", ["get", "set"])
def test_on_error_raise_raises_while_the_breaker_is_open_too(operation: Any) -> None:
    """With on_error="raise", a call must raise instead of paying again for vectors that the tier has."""
    provider = CountingProvider()
    faulty = FaultyBackend(DictBackend(scope="host"), [Fault("raise", on=operation)])
    with Cache(provider, [Tier(faulty, name="host", on_error="raise")]) as cache:
        for i in range(6):
            with pytest.raises(TierError):
                cache.embed(f"{i}")
        assert provider.texts == (0 if operation == "get" else 6)


def test_a_failed_promotion_raises_with_on_error_raise_but_loses_nothing() -> None:
    near = FaultyBackend(DictBackend(scope="host"))
    middle, far = DictBackend(), DictBackend()
    tiers = [Tier(near, name="near", on_error="raise"), Tier(middle, name="middle"), Tier(far, name="far")]
    with Cache(CountingProvider(), tiers) as cache:
        cache.embed("a")
        for backend in (near, middle):
            backend.delete_many(list(backend.scan("")))
        near.faults.append(Fault("raise", on="set"))
        with pytest.raises(TierError):
            cache.embed("a")
        assert [held.tier for held in cache.contents()] == ["middle", "far"]


def test_on_error_raise_raises_tier_timeout_after_a_timeout() -> None:
    faulty = FaultyBackend(DictBackend(scope="host"), [Fault("hang")])
    tier = Tier(faulty, name="host", on_error="raise", timeout=0.05)
    with Cache(CountingProvider(), [tier]) as cache:
        with pytest.raises(TierTimeout, match=r"did not answer within 0\.05 s"):
            retry_when_busy(lambda: cache.embed("text"))
        faulty.heal()


def test_the_default_timeout_depends_on_the_scope_of_the_backend(
    shipped_timeouts: Mapping[str, float | None],
) -> None:
    assert shipped_timeouts == {"process": None, "single": 2.0, "host": 2.0, "network": 0.25}


# --- what a read counts -----------------------------------------------------------------------


class FailsFromCall(DictBackend):
    """Answers the calls before the n-th call, and fails in the n-th and all later calls."""

    def __init__(self, call: int, **capabilities: Any) -> None:
        super().__init__(scope="host", **capabilities)
        self.left = call - 1

    def get_many(self, keys: Sequence[str], /) -> dict[str, Any]:
        self.left -= 1
        if self.left < 0:
            raise ConnectionError("gone")
        return super().get_many(keys)


def test_a_read_that_raises_counts_the_answers_before_the_failure() -> None:
    held, seen = DictBackend(scope="host"), list[Event]()
    with Cache(CountingProvider(), [held]) as cache:
        cache.embed_batch(TEXTS[:6])
    failing = FailsFromCall(2, max_batch=8, store=held)
    with Cache(CountingProvider(), [Tier(failing, name="host", on_error="raise")], listeners=[seen.append]) as cache:
        with pytest.raises(TierError):
            cache.embed_batch(TEXTS)
        counted = cache.stats().tiers["host"]
    assert (counted.hits, counted.misses, counted.errors) == (6, 2, 8)
    (event,) = [event for event in seen if isinstance(event, LookedUp)]
    assert (event.hits, event.misses, event.errors) == (6, 2, 8)


class ScriptedBackend(DictBackend):
    """A backend in which each key is a hit, a miss, corrupt or on a node that is down. Whole calls may also fail."""

    def __init__(self, keys: Sequence[str], calls: Sequence[bool], **capabilities: Any) -> None:
        super().__init__(scope="host", **capabilities)
        self.kinds = dict.fromkeys(keys, "hit")
        self.calls = list(calls)

    def get_many(self, keys: Sequence[str], /) -> dict[str, Any]:
        if self.calls and self.calls.pop():
            raise ConnectionError("gone")
        answer = {
            key: value for key, value in super().get_many(keys).items() if self.kinds.get(key) in ("hit", "corrupt")
        }
        answer.update({key: b"corrupt" for key in answer if self.kinds[key] == "corrupt"})
        away = [key for key in keys if self.kinds.get(key) == "away"]
        if away:
            raise PartialAnswer("a node is away", answer=answer, failed=away) from TierBusy("away")
        return answer


@given(
    kinds=st.lists(st.sampled_from(["hit", "miss", "corrupt", "away"]), min_size=1, max_size=12),
    calls=st.lists(st.booleans(), max_size=6),
    max_batch=st.integers(1, 5),
    on_error=st.sampled_from(["skip", "raise"]),
)
def test_every_key_of_a_read_is_counted_once(
    kinds: list[str], calls: list[bool], max_batch: int, on_error: Any
) -> None:
    texts, seen = TEXTS[: len(kinds)], list[Event]()
    store = DictBackend(scope="host")
    with Cache(CountingProvider(), [store]) as cache:
        cache.embed_batch(texts)
        keys = [cache.explain(text).key for text in texts]
    backend = ScriptedBackend(keys, calls, max_batch=max_batch, store=store)
    backend.kinds.update(zip(keys, kinds, strict=True))
    with Cache(CountingProvider(), [Tier(backend, name="host", on_error=on_error)], listeners=[seen.append]) as cache:
        ended_early = False
        try:
            cache.lookup(texts)
        except TierError:
            ended_early = True
        stats = cache.stats().tiers["host"]
    (event,) = [event for event in seen if isinstance(event, LookedUp)]
    counts = [event.hits, event.misses, event.errors, event.corrupt, event.skipped]
    assert counts == [stats.hits, stats.misses, stats.errors, stats.corrupt, stats.skipped]
    assert min(counts) >= 0
    assert sum(counts) <= len(texts)
    assert ended_early or sum(counts) == len(texts)
    assert event.hits <= kinds.count("hit")
    assert event.corrupt <= kinds.count("corrupt")


@kept_as
def test_entries_with_different_dimensions_are_counted_as_corrupt_and_never_as_hits(kept: Any) -> None:
    """If the provider does not state its dimensions, every entry must have the most common number of dimensions."""
    store, seen = DictBackend(scope="host", holds=kept), list[Event]()

    def open_cache(dimensions: int, **options: Any) -> Cache:
        provider = CountingProvider(dimensions=dimensions, tells_dimensions=False)
        backend = DictBackend(scope="host", holds=kept, store=store)
        return Cache(provider, [Tier(backend, name="host", lease="off")], **options)

    for dimensions, texts in ((4, TEXTS[:3]), (5, TEXTS[3:4])):
        with open_cache(dimensions) as cache:
            cache.embed_batch(texts)
    with open_cache(4, listeners=[seen.append]) as cache:
        assert cache.embed_batch(TEXTS[:5]).shape == (5, 4)
        counted = cache.stats().tiers["host"]
    assert (counted.hits, counted.misses, counted.corrupt) == (3, 1, 1)
    (event,) = [event for event in seen if isinstance(event, LookedUp)]
    assert (event.hits, event.misses, event.corrupt) == (3, 1, 1)


# --- time to live -----------------------------------------------------------------------------


def test_an_expired_entry_is_a_miss_and_is_stored_again() -> None:
    clock = Clock()
    provider = CountingProvider()
    backend = DictBackend(ttl=False)  # this store never removes a frame, so the cache must check the expiry of frames
    with Cache(provider, [Tier(backend, name="t", ttl=60.0)], clock=clock) as cache:
        cache.embed("text")
        clock.now += 56.9
        assert cache.lookup(["text"]).sources == ["t"]
        clock.now += 4
        assert cache.lookup(["text"]).sources == [None]
        assert cache.explain("text").tiers == {"t": "expired"}
        cache.embed("text")
        assert provider.texts == 2
        stats = cache.stats().tiers["t"]
        assert (stats.corrupt, stats.errors) == (0, 0)


def test_a_promotion_keeps_the_expiry_of_the_entry() -> None:
    clock = Clock()
    near, far = DictBackend(holds="entries"), DictBackend(holds="entries")
    tiers = [Tier(near, name="near", ttl=1000.0), Tier(far, name="far", ttl=100.0)]
    with Cache(CountingProvider(), tiers, clock=clock) as cache:
        cache.embed("text")
        (key,) = far.scan("")
        near.delete_many([key])
        clock.now += 50
        cache.embed("text")
        assert near.get(key).expires == far.get(key).expires
        clock.now += 51
        assert cache.lookup(["text"]).sources == [None]


def test_the_tiers_own_ttl_caps_a_promotion() -> None:
    clock = Clock()
    near, far = DictBackend(holds="entries"), DictBackend(holds="entries")
    with Cache(CountingProvider(), [Tier(near, name="near", ttl=10.0), Tier(far, name="far")], clock=clock) as cache:
        cache.embed("text")
        (key,) = far.scan("")
        near.delete_many([key])
        cache.embed("text")
        assert clock.now + 9.5 <= near.get(key).expires <= clock.now + 10
        assert far.get(key).expires is None


def test_ttl_is_jittered_by_the_digest_and_never_longer_than_configured() -> None:
    clock = Clock()
    backend = DictBackend(holds="entries")
    with Cache(CountingProvider(), [Tier(backend, name="t", ttl=100.0)], clock=clock) as cache:
        cache.embed_batch([str(i) for i in range(200)])
        lives = [backend.get(key).expires - clock.now for key in backend.scan("")]
    assert 95 <= min(lives) < 96
    assert 99 < max(lives) <= 100


# --- writing ----------------------------------------------------------------------------------


def test_background_writes_survive_the_end_of_the_cache() -> None:
    backend = DictBackend(scope="network")
    slow = FaultyBackend(backend, [Fault("slow", on="set", seconds=0.05)])
    tier = Tier(slow, name="far", timeout=LONG_TIMEOUT, write="background")
    cache = Cache(CountingProvider(), [tier], flush_timeout=LONG_TIMEOUT)
    cache.embed_batch(TEXTS)
    cache.close()
    assert len(backend) == len(TEXTS) + 2  # the additional entries are the space card and the record of savings


def test_a_full_queue_waits_then_drops_the_oldest_and_counts() -> None:
    faulty = FaultyBackend(DictBackend(scope="network"), [Fault("hang", on="set")])
    tier = Tier(faulty, name="far", timeout=0.3, write="background")
    with Cache(CountingProvider(), [tier], max_queued=10, flush_timeout=0.2) as cache:
        texts = itertools.count()

        def embed_and_count_drops() -> int:
            cache.embed(f"{next(texts)}")
            assert cache._chain.in_flight.count_queued("far") <= 10
            stats = cache.stats().tiers["far"]
            return stats.dropped + stats.errors

        for _ in range(40):
            embed_and_count_drops()
        wait_until(embed_and_count_drops)  # a call writes nothing if its read times out, so more calls may be needed
        faulty.heal()


def test_write_none_reads_only() -> None:
    backend = DictBackend()
    with Cache(CountingProvider(), [Tier(backend, name="ro", write="none")]) as cache:
        cache.embed("text")
        assert len(backend) == 0
        assert backend is not None


def test_values_too_large_for_a_tier_are_dropped_and_counted() -> None:
    backend = DictBackend(max_value_bytes=500)
    with Cache(CountingProvider(dimensions=384), [Tier(backend, name="small")]) as cache:
        cache.embed_batch(TEXTS)
        stats = cache.stats().tiers["small"]
        assert (stats.dropped, stats.errors, dict(stats.drops)) == (20, 0, {"too large": 20})


def test_a_backend_is_called_in_chunks_of_its_max_batch() -> None:
    backend = DictBackend(max_batch=7)  # the backend raises if a call has more keys
    with Cache(CountingProvider(), [backend]) as cache:
        cache.embed_batch(TEXTS)
        assert cache.lookup(TEXTS).sources == ["dict"] * 20
        cache.forget(TEXTS)
        assert cache.lookup(TEXTS).sources == [None] * 20
        assert cache.stats().tiers["dict"].errors == 0


def test_the_next_tier_gets_only_the_keys_that_are_still_missing() -> None:
    near, far = FaultyBackend(DictBackend()), FaultyBackend(DictBackend())
    with Cache(CountingProvider(), [Tier(near, name="near"), Tier(far, name="far")]) as cache:
        cache.embed_batch(TEXTS[:15])
        far.calls.clear()
        cache.lookup(TEXTS)
        assert far.calls == [("get", 5)]


# --- composing --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        ([DictBackend(), DictBackend()], "two tiers are named 'dict'"),
        ([Tier(MemoryBackend(), timeout=1.0)], '"timeout" is not supported'),
        ([Tier(DictBackend(), name="provider")], 'cannot be named "provider"'),
        ([Tier(DictBackend(scope="host"), ttl=0)], '"ttl" must be a finite number of seconds above 0, got 0'),
        ([object()], "is not a backend"),
        ([Tier(DictBackend(), write="bogus")], '"write" must be "inline", "background" or "none", got'),  # type: ignore[arg-type]
        ([Tier(DictBackend(), on_error="bogus")], '"on_error" must be "skip" or "raise"'),  # type: ignore[arg-type]
    ],
)
def test_a_chain_that_cannot_work_is_refused(tiers: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Cache(CountingProvider(), tiers)


def test_a_breaker_waits_longer_each_time_and_starts_over_after_a_success(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("embedonce._engine.breaker.time", SimpleNamespace(monotonic=lambda: now[0]))
    states: list[str] = []
    breaker = Breaker(lambda state, cause: states.append(state))
    waits = []
    breaker.record_failure("timeout")
    for _ in range(12):
        start = now[0]
        while breaker.admit() == "skip":
            now[0] += 0.05
        waits.append(now[0] - start)
        assert breaker.admit() == "skip"  # only one probe may run
        breaker.record_failure("timeout")
    assert 0.3 < waits[0] < 0.7
    assert waits[3] > waits[0] * 3
    assert max(waits) <= 60 * 1.25 + 0.1
    breaker.record_success()
    assert breaker.admit() == "go"
    assert states == ["open", "closed"]
    breaker.record_failure("OSError")
    breaker.record_failure("OSError")
    assert breaker.admit() == "go"
    breaker.record_failure("OSError")
    assert breaker.admit() == "skip"
