"""What every integration stands on: equal configurations share one cache, and embedders describe themselves."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedonce import Cache, SpaceError, VectorSpace
from embedonce.testing.fakes import CountingProvider
from embedonce_integrations.wrapping import (
    NOT_IN_SPACE,
    WrappedProvider,
    declared_space,
    described_space,
    shared_cache,
)

NGRAM = {"provider": {"type": "ngram", "dimensions": 64}, "tiers": [{"type": "memory"}]}
TIERS = {"tiers": [{"type": "memory"}]}


class Embedder:
    """Stands for a framework's."""


def fingerprint(embedder: object = None, *, task: str | None = None, **fields: Any) -> bytes:
    return described_space(embedder or Embedder(), fields, model="m", task=task).fingerprint()


def test_equal_configurations_share_one_cache(tmp_path: Path) -> None:
    file = tmp_path / "embedonce.toml"
    file.write_text('[provider]\ntype = "ngram"\ndimensions = 64\n[[tiers]]\ntype = "memory"\n')
    first = shared_cache(NGRAM)
    assert shared_cache(dict(NGRAM)) is first
    assert shared_cache(file) is first
    assert shared_cache({**NGRAM, "key": {"version": "v2"}}) is not first


def test_another_provider_shares_the_tiers() -> None:
    one, two, other = CountingProvider(), CountingProvider(), CountingProvider(model="other")
    first, second, third = (shared_cache(TIERS, provider=provider) for provider in (one, two, other))
    first.embed_batch(["a", "b"])
    second.embed_batch(["b", "a"])
    third.embed_batch(["a", "b"])
    assert (one.texts, two.texts, other.texts) == (2, 0, 2)


def test_a_provider_takes_the_place_of_the_configurations() -> None:
    provider = CountingProvider()
    cache = shared_cache({**NGRAM, "provider": {"type": "no such plugin"}}, provider=provider)
    assert (cache.embed("a") == provider.vector_of("a")).all()


def test_a_cache_that_was_closed_or_left_is_not_handed_out_again() -> None:
    first = shared_cache(NGRAM)
    first.close()
    second = shared_cache(NGRAM)
    assert second is not first
    second.embed("text")
    del first, second
    gc.collect()
    assert shared_cache(NGRAM).lookup(["text"]).sources == [None], "the memory tier went with its last user"


def test_the_shared_cache_lives_as_long_as_one_of_its_users() -> None:
    cache: Cache | None = shared_cache(TIERS, provider=CountingProvider())
    assert cache is not None
    cache.embed("text")
    gc.collect()
    again = CountingProvider()
    shared_cache(TIERS, provider=again).embed("text")
    assert again.texts == 0


def test_what_decides_vectors_changes_the_space() -> None:
    plain = fingerprint()
    for field, value in (("dimensions", 2), ("prompt", "q: "), ("normalize", True), ("layers", [1, 2])):
        assert fingerprint(**{field: value}) != plain, field
    assert fingerprint(prompt=None) == plain
    assert fingerprint(task="query") != plain
    assert fingerprint(type("Other", (), {})()) != plain


@pytest.mark.parametrize("name", sorted(NOT_IN_SPACE))
def test_what_decides_nothing_does_not(name: str) -> None:
    assert fingerprint(**{name: object()}) == fingerprint()


def test_secrets_and_credentials_are_in_no_space() -> None:
    class Secret:
        def get_secret_value(self) -> str:
            raise AssertionError("nobody asks for it")

    space = described_space(
        Embedder(),
        {"key": Secret(), "headers": {"auth": Secret()}, "base_url": "https://me:pass@host:8080/v1"},
        model="m",
    )
    assert space.extra == {"headers": {}, "base_url": "https://host:8080/v1"}
    assert fingerprint(base_url="https://a:b@host/v1") == fingerprint(base_url="https://host/v1")


def test_what_cannot_be_described_is_refused_with_what_to_do() -> None:
    with pytest.raises(SpaceError, match=r"Embedder\.pooler.*space="):
        fingerprint(pooler=object())
    with pytest.raises(SpaceError, match=r"Embedder\.options\.hook"):
        fingerprint(options={"hook": print})


def test_values_of_a_description() -> None:
    class Pooling(Enum):
        MEAN = "mean"

    assert fingerprint(pooling=Pooling.MEAN) == fingerprint(pooling="mean")
    assert fingerprint(tags={"b", "a"}) == fingerprint(tags=["a", "b"])


def test_a_declared_space() -> None:
    assert declared_space({"model": "m"}).task is None
    assert declared_space({"model": "m"}, task="query").task == "query"
    assert declared_space(VectorSpace(provider="p", model="m", task="mine"), task="query").task == "mine"


@pytest.mark.parametrize("face", ["both", "embed", "aembed"])
async def test_a_wrapped_provider_has_the_faces_that_it_was_given(face: str) -> None:
    asked: list[str] = []

    def embed(texts: list[str], task: str) -> Sequence[Sequence[float]]:
        asked.append("embed")
        return [[float(len(text)), 1.0] for text in texts]

    async def aembed(texts: list[str], task: str) -> Sequence[Sequence[float]]:
        asked.append("aembed")
        return [[float(len(text)), 1.0] for text in texts]

    provider = WrappedProvider(
        embed=embed if face != "aembed" else None,
        aembed=aembed if face != "embed" else None,
        space=lambda task: VectorSpace(provider="p", model="m"),
    )
    cache = shared_cache({"tiers": []}, provider=provider)
    assert np.asarray(await cache.aembed("four")).tolist() == [4.0, 1.0]
    assert cache.embed("three").tolist() == [5.0, 1.0]
    first, second = ("embed", "embed") if face == "embed" else ("aembed", "aembed" if face == "aembed" else "embed")
    assert asked == [first, second]
