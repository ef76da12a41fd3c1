"""Errors and warnings about a chain, their place in the file, and backends without optional methods."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

import embedonce
from embedonce import Cache, Capabilities, ConfigError, Tier, config
from embedonce.contracts import EXTRAS
from embedonce.errors import EraseIncomplete
from embedonce.testing import CountingProvider, DictBackend


def chain(*scopes: str, **options: Any) -> list[Tier]:
    return [Tier(DictBackend(scope=scope), name=f"t{n}", **options) for n, scope in enumerate(scopes)]


def warnings_of(tiers: list[Tier]) -> list[tuple[str, str]]:
    with Cache(CountingProvider(), tiers) as cache:
        return [(warning.tier, warning.message) for warning in cache.warnings]


@pytest.mark.parametrize(
    ("scopes", "about"),
    [
        ("process", []),
        ("process process host network network", []),
        ("host process", ["t1"]),
        ("network process", ["t1"]),
        ("network host", ["t1"]),
        ("process network host network host", ["t2", "t4"]),
    ],
)
def test_a_slower_tier_before_a_faster_one_gives_a_warning(scopes: str, about: list[str]) -> None:
    assert [tier for tier, _ in warnings_of(chain(*scopes.split()))] == about


class Endless(DictBackend):
    bounded: bool | None = False

    def __init__(self) -> None:
        super().__init__(scope="host")
        self.capabilities = Capabilities(scope="host", bounded=self.bounded)


class Bounded(Endless):
    bounded = True


class Silent(Endless):
    bounded = None


def test_two_tiers_that_grow_without_limit_give_a_warning() -> None:
    ((tier, message),) = warnings_of([Tier(Endless(), name="a"), Tier(Bounded(), name="b"), Tier(Endless(), name="c")])
    assert tier == "a"
    assert message.startswith("tiers 'a' and 'c' grow without limit")
    assert not warnings_of([Tier(Endless(), name="a"), Tier(Endless(), name="b", ttl=60.0)])
    assert not warnings_of([Tier(Endless(), name="a"), Tier(Silent(), name="b")])


def test_a_warning_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    tiers = [Tier(DictBackend(scope="host"), name="once-first"), Tier(DictBackend(), name="once-second")]
    with caplog.at_level(logging.WARNING, "embedonce"):
        for _ in range(3):
            assert len(warnings_of(tiers)) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "tier 'once-second' (in this process) comes after the slower tier 'once-first' (on this host), "
        "so every hit in 'once-second' waits for 'once-first' first; move 'once-second' up"
    ]


def test_a_warning_names_its_place_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "embedonce.toml"
    file.write_text('provider.type = "ngram"\n[[tiers]]\ntype = "disk"\npath = "x"\n\n[[tiers]]\ntype = "memory"\n')
    loaded = config.load(file)
    with config.compose(loaded) as cache:
        (problem,) = config.warnings(loaded, cache.warnings)
    assert (problem.line, problem.column) == (6, 1)


def test_a_chain_error_names_its_place_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "embedonce.toml"
    file.write_text(
        'provider.type = "ngram"\n[[tiers]]\ntype = "disk"\npath = "x"\nlease = "5s"\n\n'
        '[[tiers]]\ntype = "disk"\nname = "second"\npath = "y"\nlease = "5s"\n'
    )
    with pytest.raises(ConfigError) as caught:
        embedonce.open(file)
    (problem,) = caught.value.problems
    assert (problem.line, problem.column) == (11, 1)
    assert problem.message == (
        "tiers 'disk' and 'second' both have a lease; only one tier of a chain may have a lease, so remove one"
    )


@pytest.mark.parametrize("capability", EXTRAS)
def test_a_capability_without_its_method_is_refused(capability: str) -> None:
    class Bare:
        capabilities = Capabilities(**{capability: True})

        def get_many(self, keys: Any) -> dict[str, bytes]:
            return {}

        def set_many(self, items: Any, ttl: float | None) -> None: ...

        def close(self) -> None: ...

    with pytest.raises(
        ConfigError, match=f'declares the capability "{capability}" but has no method "{EXTRAS[capability]}"'
    ):
        Cache(CountingProvider(), [Bare()])


def test_the_engine_replaces_or_reports_what_a_backend_lacks() -> None:
    bare = DictBackend(ttl=False, get=False, delete=False, scan=False, count=False, add=False)
    with Cache(CountingProvider(), [Tier(bare, name="bare", ttl=60.0)]) as cache:
        cache.embed("a")
        assert cache.fetch(["a"]).sources == ["bare"], "without get, the cache must use get_many"
        (held,) = cache.contents()
        assert held.error == "it cannot list its keys"
        with pytest.raises(EraseIncomplete) as caught:
            cache.forget(["a"])
        assert caught.value.tiers == {"bare": "it cannot delete"}
