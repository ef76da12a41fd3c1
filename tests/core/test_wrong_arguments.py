"""A cache that is made from wrong arguments says which argument is wrong and what to pass instead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from embedonce import Cache, KeyPolicy, Tier
from embedonce.errors import ConfigError
from embedonce_backends.memory import MemoryBackend
from embedonce_providers.ngram import NgramProvider


@pytest.mark.parametrize(
    ("tiers", "said"),
    [
        (MemoryBackend(), "tiers must be a list of backends, got one MemoryBackend; write it in brackets"),
        (Tier(MemoryBackend()), "got one Tier; write it in brackets"),
        (MemoryBackend, "got one MemoryBackend; write it in brackets"),
        ("memory", "tiers must be a list of backends, such as [MemoryBackend()], got str"),
        ({"type": "memory"}, "got dict"),
        ({1}, "got set"),
        (None, "got NoneType; to store nothing, leave tiers out"),
        (7, "got int"),
        ([MemoryBackend], "MemoryBackend is a class; pass an instance of it"),
        ([Tier(MemoryBackend)], "MemoryBackend is a class; pass an instance of it"),  # type: ignore[arg-type]
        (["memory"], "a str is not a backend"),
        ([{"type": "memory"}], "a dict is not a backend"),
        ([Tier(Tier(MemoryBackend()))], "a Tier is not a backend"),  # type: ignore[arg-type]
        ([None], "NoneType is not a backend"),
        ([Tier(MemoryBackend(), name=3)], "a tier's name must be a str, got int"),  # type: ignore[arg-type]
    ],
)
def test_wrong_tiers(tiers: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Cache(NgramProvider(), tiers)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("argument", "value", "said"),
    [
        ("key", {"version": "v1"}, "key must be a KeyPolicy, such as KeyPolicy(...), got a dict"),
        ("key", {}, "got a dict"),
        ("key", "v1", "got a str"),
        ("key", KeyPolicy, "got KeyPolicy"),
        ("drift", True, "drift must be a DriftGuard"),
        ("listeners", print, "listeners must be a list of functions"),
        ("listeners", None, "listeners must be a list of functions"),
        ("listeners", ["x"], "listeners must be a list of functions"),
        ("clock", 3, "clock must be a function that returns Unix time, got a int"),
        ("max_wait", "5", "max_wait must be a number, got str"),
        ("flush_timeout", None, "flush_timeout must be a number, got NoneType"),
        ("max_queued", True, "max_queued must be a number, got bool"),
    ],
)
def test_other_wrong_arguments(argument: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Cache(NgramProvider(), **{argument: value})
    assert said in str(caught.value)


def test_a_step_must_be_a_name() -> None:
    with pytest.raises(ConfigError, match="must list names of steps"):
        Cache(NgramProvider(), key=KeyPolicy(normalize=[str.strip]))  # type: ignore[list-item]


def test_tiers_may_come_from_an_iterator() -> None:
    def backends() -> Iterator[MemoryBackend]:
        yield MemoryBackend()

    with Cache(NgramProvider(), backends()) as cache:  # type: ignore[arg-type]
        assert cache.tiers == ("memory",)
