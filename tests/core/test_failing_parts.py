"""``stats`` says which tiers are skipped and which providers fail, without calling them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from embedonce import Cache, TextRefused, Tier
from embedonce.testing.fakes import CountingProvider, DictBackend
from embedonce.testing.faults import Fault, FaultyBackend
from embedonce_backends.memory import MemoryBackend


@pytest.mark.parametrize("operation", ["get", "set"])
def test_a_tier_whose_breaker_is_open_is_skipped(operation: str) -> None:
    fault = Fault("raise", on=operation)  # type: ignore[arg-type]
    far = FaultyBackend(DictBackend(scope="host"), [fault])
    with Cache(CountingProvider(), [MemoryBackend(), Tier(far, name="far", write="inline")]) as cache:
        assert (cache.stats().tiers["far"].is_skipped, cache.stats().tiers["far"].last_cause) == (False, None)
        for number in range(3):
            cache.embed(f"text {number}")
        tiers = cache.stats().tiers
        assert (tiers["far"].is_skipped, tiers["far"].last_cause) == (True, "OSError")
        assert (tiers["memory"].is_skipped, tiers["memory"].last_cause) == (False, None)
        cache.embed("one more")
        assert cache.stats().tiers["far"].last_cause == "OSError"  # a skipped call is no error


class Failing:
    """A function that fails as long as it is told to."""

    error: Exception | None = None

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        if self.error is not None:
            raise self.error
        return np.ones((len(texts), 4), np.float32)


def test_a_provider_fails_until_it_embeds_something() -> None:
    embed = Failing()
    with Cache(embed, [MemoryBackend()], space={"model": "m"}) as cache:
        assert cache.provider_stats() == cache.stats().providers
        embed.error = OSError("private")
        assert cache.fetch(["a"]).failed
        assert cache.provider_stats()["callable"].last_error == "OSError"
        assert "private" not in repr(cache.stats())
        embed.error = None
        cache.embed("b")
        assert cache.provider_stats()["callable"].last_error is None


def test_a_text_that_is_refused_does_not_show_that_the_provider_fails() -> None:
    embed = Failing()
    embed.error = TextRefused("no", positions=(0,))
    with Cache(embed, space={"model": "m"}) as cache:
        assert cache.fetch(["a"]).failed
        assert cache.provider_stats()["callable"].last_error is None
        assert cache.provider_stats()["callable"].failed == 1


def test_a_missing_text_in_replay_mode_does_not_show_that_the_provider_fails() -> None:
    with Cache(Failing(), [MemoryBackend()], space={"model": "m"}, mode="replay") as cache:
        assert cache.fetch(["a"]).failed
        assert cache.provider_stats()["callable"].last_error is None
