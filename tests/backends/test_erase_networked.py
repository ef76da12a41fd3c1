"""``forget(where=…)`` and ``purge(where=…)`` in Redis and Postgres, where other programs have scopes of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from embedonce import Cache, EraseIncomplete, config
from embedonce.answers import Purged
from embedonce.keys import SpaceCard
from embedonce.testing.fakes import CountingProvider

OPTIONS = {
    "redis": lambda request: {"url": request.getfixturevalue("redis_server").url, "prefix": "erase:"},
    "postgres": lambda request: {"url": request.getfixturevalue("postgres_server").url, "table": "erase"},
}
TEXTS = [" Tea ", "milk"]
PROGRAMS: list[tuple[str, dict[str, Any]]] = [
    ("m1", {}),
    ("m1", {"version": "v0"}),
    ("m2", {"normalize": []}),
    ("m2", {"namespace": "search"}),
    ("m2", {"namespace": "search/web", "hash": "blake2b"}),
]
"""Model and key policy of each program that shares the store."""

Open = Callable[..., Cache]
Where = Callable[[SpaceCard], bool]


@pytest.fixture(params=OPTIONS)
def open_program(request: pytest.FixtureRequest) -> Open:
    """Return a function that opens the cache of a program. The store has entries of all programs and nothing else."""
    options = OPTIONS[request.param](request)
    tier = {"type": request.param, "name": "shared", "write": "inline", "timeout": "60s", **options}

    def open_program(model: str, policy: dict[str, Any]) -> Cache:
        return config.open({"tiers": [tier], "key": policy}, provider=CountingProvider(model=model))

    with open_program("m1", {}) as cache:
        cache.purge(where=lambda card: True)
    for program in PROGRAMS:
        with open_program(*program) as cache:
            assert cache.fetch(TEXTS).sources == ["provider", "provider"]
    return open_program


def find_left(open_program: Open) -> list[list[bool]]:
    """Return for each program which of its texts are in the store."""
    left = []
    for program in PROGRAMS:
        with open_program(*program) as cache:
            left.append([source is not None for source in cache.lookup(TEXTS).sources])
    return left


def forget(cache: Cache, texts: list[str], where: Where) -> dict[str, SpaceCard]:
    return cache.forget(texts, where=where)


def forget_async(cache: Cache, texts: list[str], where: Where) -> dict[str, SpaceCard]:
    return asyncio.run(cache.aforget(texts, where=where))


def purge(cache: Cache, where: Where, *, dry_run: bool = False) -> Purged:
    return cache.purge(where=where, dry_run=dry_run)


def purge_async(cache: Cache, where: Where, *, dry_run: bool = False) -> Purged:
    return asyncio.run(cache.apurge(where=where, dry_run=dry_run))


def is_of_search(card: SpaceCard) -> bool:
    return card["namespace"].split("/")[0] == "search"


@pytest.mark.parametrize("face", [forget, forget_async], ids=["sync", "async"])
def test_forget_removes_a_text_from_the_chosen_scopes_of_all_programs(
    open_program: Open, face: Callable[..., dict[str, SpaceCard]]
) -> None:
    with open_program("m3", {}) as cache:
        assert face(cache, ["never seen"], lambda card: False) == {}
        left = face(cache, [" Tea "], lambda card: not is_of_search(card))
        assert sorted(card["namespace"] for card in left.values()) == ["search", "search/web"]
    outside, inside = [False, True], [True, True]
    assert find_left(open_program) == [outside, outside, outside, inside, inside]
    with open_program("m3", {}) as cache:
        assert face(cache, TEXTS, lambda card: True) == {}
    assert find_left(open_program) == [[False, False]] * 5


@pytest.mark.parametrize("face", [purge, purge_async], ids=["sync", "async"])
def test_purge_removes_the_chosen_scopes_and_counts_their_entries(
    open_program: Open, face: Callable[..., Purged]
) -> None:
    with open_program("m3", {}) as cache:
        for dry_run in (True, False):
            report = face(cache, is_of_search, dry_run=dry_run)
            assert report.removed == {"shared": 4}
            assert sorted(card["namespace"] for card in report.scopes.values() if card) == ["search", "search/web"]
            assert find_left(open_program) == [[True, True]] * 3 + [[dry_run, dry_run]] * 2
        assert face(cache, is_of_search).removed == {"shared": 0}
        assert not any(is_of_search(held.card) for held in cache.contents() if held.card)


def test_forget_names_the_scopes_of_a_program_with_another_secret(open_program: Open) -> None:
    with open_program("m1", {"secret": "one", "namespace": "hidden"}) as other:
        other.embed("milk")
    with open_program("m3", {}) as cache:
        with pytest.raises(EraseIncomplete) as caught:
            cache.forget(["milk"], where=lambda card: True)
        assert len(caught.value.scopes) == 1
        assert caught.value.tiers == {}
    assert find_left(open_program) == [[True, False]] * 5
    with open_program("m3", {"secret": "one"}) as cache:
        cache.forget(["milk"], where=lambda card: card["namespace"] == "hidden")
    with open_program("m1", {"secret": "one", "namespace": "hidden"}) as other:
        assert other.lookup(["milk"]).sources == [None]
