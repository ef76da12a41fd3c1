"""A tier whose store lasts and belongs to one process at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest
from embedonce_single import SingleBackend

from embedonce import Cache, Tier
from embedonce._engine.chain import choose_lease, compose_chain, find_chain_warnings
from embedonce._engine.writing import DEFAULT_WRITE_MODES
from embedonce.errors import ConfigError
from embedonce.testing import CountingProvider, DictBackend

TEXTS = [f"text {number}" for number in range(50)]


def test_the_entries_and_the_space_card_are_there_after_a_restart(tmp_path: Path) -> None:
    with Cache(CountingProvider(), [SingleBackend(path=tmp_path)]) as cache:
        vectors = cache.embed_batch(TEXTS)
    provider = CountingProvider()
    with Cache(provider, [SingleBackend(path=tmp_path)]) as cache:
        (held,) = cache.contents()
        assert held.card is not None
        assert held.card["model"] == "counting"
        assert held.entries == len(TEXTS)
        assert (cache.embed_batch(TEXTS) == vectors).all()
        assert provider.calls == []
        assert sum(cache.purge(namespace="").removed.values()) == len(TEXTS)


def test_the_entries_are_there_after_a_restart_of_an_event_loop(tmp_path: Path) -> None:
    async def embed(provider: CountingProvider) -> None:
        async with Cache(provider, [SingleBackend(path=tmp_path)]) as cache:
            await cache.aembed_batch(TEXTS)

    asyncio.run(embed(CountingProvider()))
    provider = CountingProvider()
    asyncio.run(embed(provider))
    assert provider.calls == []


def test_it_has_no_leases_by_default(tmp_path: Path) -> None:
    with Cache(CountingProvider(), [SingleBackend(path=tmp_path)]) as cache:
        assert cache.stats().tiers.keys() == {"single"}
        cache.embed_batch(TEXTS)
        keys = SingleBackend.scan(cache._chain.tiers[0].backend, "")
    assert len(keys) == len(TEXTS) + 1, "the vectors and the space card, and no leases"


def test_a_lease_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match='only one process at a time can use the backend of this tier; remove "lease"'
    ):
        Cache(CountingProvider(), [Tier(DictBackend(scope="single"), name="duck", lease=2.0)])


def test_another_tier_gets_the_leases() -> None:
    chain = [Tier(DictBackend(scope="host"), name="disk"), Tier(DictBackend(scope="single"), name="duck")]
    lease = choose_lease(compose_chain(chain))
    assert lease is not None
    assert lease.tier == "disk"


def test_its_defaults_are_those_of_a_local_store(shipped_timeouts: Mapping[str, float | None]) -> None:
    assert shipped_timeouts["single"] == shipped_timeouts["host"] == 2.0
    assert DEFAULT_WRITE_MODES["single"] == "inline"


@pytest.mark.parametrize(
    ("scopes", "warned"),
    [
        (["process", "single", "network"], False),
        (["single", "host"], False),
        (["host", "single"], False),
        (["single", "process"], True),
        (["network", "single"], True),
    ],
)
def test_its_place_in_a_chain(scopes: list[str], warned: bool) -> None:
    chain = [Tier(DictBackend(scope=scope, bounded=True), name=scope) for scope in scopes]  # type: ignore[arg-type]
    warnings = find_chain_warnings(compose_chain(chain))
    assert bool(warnings) is warned
