"""A warning that would repeat in every call is logged at most once a minute, with a count."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest

from embedonce import Cache, Tier
from embedonce._engine import repeated_warnings
from embedonce._engine.repeated_warnings import RepeatedWarnings
from embedonce.testing.fakes import CountingProvider, DictBackend
from embedonce.testing.faults import FaultyProvider, ProviderFault


class Time:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    clock = Time()
    monkeypatch.setattr(repeated_warnings, "time", clock)
    return clock


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_lines_of_a_kind_are_a_minute_apart_and_counts_are_added(time: Time, caplog: pytest.LogCaptureFixture) -> None:
    warnings = RepeatedWarnings()
    for _ in range(3000):
        warnings.warn("corrupt", "tier %r: {count} corrupt", "far", count=2)
        warnings.warn("other", "other: {count}", count=1)
    assert messages(caplog) == ["tier 'far': 2 corrupt", "other: 1"]
    time.now += 61
    warnings.warn("corrupt", "tier %r: {count} corrupt", "far", count=2)
    assert messages(caplog)[2:] == ["tier 'far': 6,000 corrupt (2,999 earlier warnings like this were not logged)"]
    time.now += 61
    warnings.warn("corrupt", "tier %r: {count} corrupt", "far", count=2)
    assert messages(caplog)[3:] == ["tier 'far': 2 corrupt"]


def test_kinds_are_limited(time: Time) -> None:
    warnings = RepeatedWarnings()
    for number in range(10_000):
        warnings.warn(f"{number}", "message")
    assert len(warnings._kinds) == repeated_warnings.MAX_KINDS


@pytest.mark.parametrize("write", ["none", "inline"])
def test_a_tier_with_half_of_its_entries_corrupt_gives_one_line(
    time: Time, caplog: pytest.LogCaptureFixture, write: Any
) -> None:
    far = DictBackend(scope="network")
    with Cache(CountingProvider(), [Tier(far, name="far", write="inline")]) as cache:
        texts = [f"{number}" for number in range(200)]
        cache.embed_batch(texts)
        keys = cache._get_route(cache._source, "document").keys(texts)
    far = DictBackend(scope="network", store=far)
    with Cache(CountingProvider(), [Tier(far, name="far", write=write)]) as cache:
        for round_ in range(3):
            far.set_many(dict.fromkeys(keys[::2], b"junk"), None)
            for text in texts:
                cache.embed(text)
            lines = messages(caplog)
            assert len(lines) == round_ + 1
            time.now += 61
        assert lines[0] == "tier 'far': ignoring 1 corrupt entries; their vectors are recomputed"
        assert int(re.findall(r"ignoring (\d+) corrupt entries", lines[1])[0]) >= 50


def test_a_provider_that_fails_every_second_call_does_not_flood_the_log(
    time: Time, caplog: pytest.LogCaptureFixture
) -> None:
    main = FaultyProvider(CountingProvider(model="main"), [])
    fault = ProviderFault("raise")
    with (
        caplog.at_level(logging.WARNING, "embedonce"),
        Cache(main, [DictBackend()], fallback=CountingProvider(model="other")) as cache,
    ):
        for number in range(100):
            main.faults[:] = [fault] if number % 2 else []
            cache.fetch([f"text {number}"])
        assert messages(caplog) == [
            "provider 'counting' is failing; using 'fallback:counting', which has its own vector space",
            "provider 'counting' is working again",
        ]


def test_a_hit_does_not_show_that_the_provider_works(caplog: pytest.LogCaptureFixture) -> None:
    main = FaultyProvider(CountingProvider(model="main"), [])
    with Cache(main, [DictBackend()], fallback=CountingProvider(model="other")) as cache:
        cache.embed("hit")
        main.faults.append(ProviderFault("raise"))
        for number in range(3):
            cache.embed(f"miss {number}")
            cache.embed("hit")
            cache.fetch(["hit"])
        assert len(messages(caplog)) == 1
