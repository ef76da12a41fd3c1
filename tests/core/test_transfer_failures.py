"""A copy that fails says so, keeps what it has stored, and continues; what is erased meanwhile does not come back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest

from embedonce import Cache, Copied, Tier, TierBusy, TierError, TransferStopped
from embedonce._engine import bulk_calls, transferring
from embedonce.contracts import time_left
from embedonce.errors import PartialAnswer
from embedonce.testing.fakes import CountingProvider, DictBackend

TEXTS = [f"text {i}" for i in range(100)]


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 10 entries, and pauses that nobody needs to wait for."""
    monkeypatch.setattr(transferring, "MAX_WINDOW", 10)
    monkeypatch.setattr(bulk_calls, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(bulk_calls, "LONGEST_PAUSE", 0.001)


class Flaky(DictBackend):
    """Raises the errors of ``script`` in turn, one per call; None lets a call through. Then all calls work."""

    def __init__(self, operation: str, script: Sequence[Exception | None] = (), **options: Any) -> None:
        super().__init__(**options)
        self.operation = operation
        self.script = iter(script)
        self.tries = 0

    def _start(self, operation: str) -> Exception | None:
        if operation != self.operation:
            return None
        self.tries += 1
        return next(self.script, None)

    def get_many(self, keys: Sequence[str], /) -> dict[str, Any]:
        error = self._start("get")
        if isinstance(error, PartialAnswer):
            half = keys[: len(keys) // 2]
            raise PartialAnswer("a node is down", answer=super().get_many(half), failed=keys[len(half) :]) from (
                error.__cause__
            )
        if error is not None:
            raise error
        return super().get_many(keys)

    def set_many(self, items: Mapping[str, Any], ttl: float | None, /) -> None:
        error = self._start("set")
        if isinstance(error, PartialAnswer):
            half = dict(list(items.items())[: len(items) // 2])
            super().set_many(half, ttl)
            raise PartialAnswer("a node is down", failed=items.keys() - half.keys()) from error.__cause__
        if error is not None:
            raise error
        super().set_many(items, ttl)

    def scan(self, prefix: str, /) -> Any:
        error = self._start("scan")
        if error is not None:
            raise error
        return super().scan(prefix)


def make_partial() -> PartialAnswer:
    error = PartialAnswer("some", failed=["one"])
    error.__cause__ = TierBusy("skipped for now")
    return error


def fill(backend: DictBackend) -> None:
    with Cache(CountingProvider(), [Tier(DictBackend(scope="host", store=backend), lease="off")]) as cache:
        cache.embed_batch(TEXTS)


def count_entries(backend: DictBackend) -> int:
    return sum(key.count(".") == 2 and "card" not in key for key in backend._store)


def open_tiers(source: DictBackend, target: DictBackend, **options: Any) -> Cache:
    tiers = [Tier(source, name="near"), Tier(target, name="far", write="none")]
    return Cache(CountingProvider(), tiers, **options)


def copy_async(cache: Cache, *arguments: Any, **options: Any) -> Copied:
    return asyncio.run(cache.acopy(*arguments, **options))


@pytest.mark.parametrize("copy", [Cache.copy, copy_async], ids=["sync", "async"])
@pytest.mark.parametrize("operation", ["get", "set", "scan"])
@pytest.mark.parametrize("at", ["source", "target"])
def test_a_tier_that_recovers_in_time_ends_no_copy(copy: Callable[..., Copied], operation: str, at: str) -> None:
    busy = [TierBusy("busy")] * 20  # more often than a failure is tried again
    script = [None, ConnectionError("reset"), *busy, *[make_partial()] * 3, TimeoutError(), None, OSError()]
    flaky, plain = Flaky(operation, script, scope="network"), DictBackend(scope="network")
    source, target = (flaky, plain) if at == "source" else (plain, flaky)
    fill(source)
    with open_tiers(source, target) as cache:
        assert copy(cache, "near", "far").copied == 100
        assert copy(cache, "near", "far").already_there == 100
    assert count_entries(target) == 100
    assert flaky.tries > len(script) or (operation == "set" and at == "source") or operation == "scan"


@pytest.mark.parametrize(
    ("operation", "at"), [("get", "near"), ("scan", "near"), ("get", "far"), ("scan", "far"), ("set", "far")]
)
def test_a_tier_that_stays_down_ends_the_copy_and_the_next_one_continues(operation: str, at: str) -> None:
    failures = bulk_calls.MAX_FAILURES
    script = [*[None] * 7 * (operation != "scan"), *[ConnectionError("no route")] * failures]
    # A target that cannot list its keys is asked for the keys of each window.
    can_list = (operation, at) != ("get", "far")
    flaky, plain = Flaky(operation, script, scope="network", scan=can_list), DictBackend(scope="network")
    source, target = (flaky, plain) if at == "near" else (plain, flaky)
    fill(source)
    with open_tiers(source, target) as cache:
        with pytest.raises(TransferStopped, match=rf"^tier '{at}' failed for 0\.\d s \(ConnectionError\)$") as caught:
            cache.copy("near", "far")
        assert caught.value.tier == at
        assert str(caught.value.__cause__) == "no route"
        stopped = caught.value.result
        assert stopped.copied == count_entries(target)
        assert (stopped.copied > 0) == (operation != "scan")
        copied = cache.copy("near", "far")
        assert (copied.copied, copied.already_there) == (100 - stopped.copied, stopped.copied)
        assert cache.stats().tiers["near"].errors == cache.stats().tiers["far"].errors == 0


def test_a_hanging_tier_ends_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_calls, "MIN_TIMEOUT", 0.01)
    monkeypatch.setattr(bulk_calls, "PATIENCE", 0.05)

    class Hanging(DictBackend):
        def set_many(self, items: Mapping[str, Any], ttl: float | None, /) -> None:
            while True:
                time_left()  # raises TierTimeout at the deadline

    near, far = DictBackend(scope="host"), Hanging(scope="host", deadline=True)
    fill(near)
    tiers = [Tier(near, name="near"), Tier(far, name="far", timeout=0.01, write="none")]
    with Cache(CountingProvider(), tiers) as cache:
        with pytest.raises(TransferStopped, match=r"^tier 'far' did not answer for \d+\.\d s$") as caught:
            cache.copy("near", "far")
        assert caught.value.result.copied == 0
        assert isinstance(caught.value, TierError)


def test_an_entry_that_is_too_large_is_counted_and_the_others_are_copied() -> None:
    near, far = DictBackend(scope="host"), DictBackend(scope="host", max_value_bytes=400)
    with open_tiers(near, far) as cache:
        cache.fetch(["small", "large", "also small"], metadata=[None, {"words": "x" * 400}, None])
        copied = cache.copy("near", "far")
        assert (copied.copied, copied.too_large, copied.found) == (2, 1, 3)
        again = cache.copy("near", "far")
        assert (again.copied, again.already_there, again.too_large) == (0, 2, 1)


# --- erasures ---------------------------------------------------------------------------------


@pytest.fixture
def erased_while_read() -> Iterator[tuple[Cache, DictBackend]]:
    """A cache that forgets a text, or purges everything, right after the copy has read it."""

    class Erasing(DictBackend):
        erase: Callable[[], Any] = staticmethod(lambda: None)

        def get_many(self, keys: Sequence[str], /) -> dict[str, Any]:
            values = super().get_many(keys)
            erase, self.erase = self.erase, lambda: None
            if values and not any("card" in key for key in keys):
                erase()
            else:
                self.erase = erase
            return values

    near, far = Erasing(scope="host"), DictBackend(scope="host")
    fill(near)
    with open_tiers(near, far) as cache:
        yield cache, near


def test_a_text_that_is_forgotten_during_the_copy_does_not_come_back(erased_while_read: Any) -> None:
    cache, near = erased_while_read
    first = sorted(key for key in near._store if "card" not in key)[0]
    text = next(text for text in TEXTS if cache.keys([text]) == [first])
    near.erase = lambda: cache.forget([text])
    copied = cache.copy("near", "far")
    assert copied.copied == 99
    assert cache.lookup([text]).sources == [None]


def test_a_scope_that_is_purged_during_the_copy_does_not_come_back(erased_while_read: Any) -> None:
    cache, near = erased_while_read
    near.erase = lambda: cache.purge(model="counting")
    assert cache.copy("near", "far").copied == 0
    assert set(cache.lookup(TEXTS).sources) == {None}
