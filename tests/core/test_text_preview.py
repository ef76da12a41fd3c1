"""Only a tier with text_preview stores the start of a text."""

from __future__ import annotations

import pytest

from embedonce import Cache, ConfigError, KeyPolicy, Tier
from embedonce.encryption import Encryption
from embedonce.testing.fakes import CountingProvider, DictBackend


def test_only_the_tier_with_text_preview_stores_the_preview() -> None:
    near, far = (
        DictBackend(holds="entries", scope="host"),
        DictBackend(holds="entries", scope="host", text_preview=True),
    )
    text = "x" * 150 + "y" * 100
    with Cache(CountingProvider(), [Tier(near, name="near"), Tier(far, name="far")]) as cache:
        cache.fetch([text], metadata=[{"source": "s"}])
        key = cache.explain(text).key
        assert far.get(key).metadata == {"source": "s", "text_preview": text[:200]}
        assert near.get(key).metadata == {"source": "s"}
        near.delete_many([key])
        fetched = cache.fetch([text])
        assert (fetched.sources, list(fetched.metadata)) == (["far"], [{"source": "s"}])
        assert near.get(key).metadata == {"source": "s"}
        cache.put(["one", "two"], [cache.embed("a"), cache.embed("b")])
        assert far.get(cache.explain("two").key).metadata == {"text_preview": "two"}
        near.delete_many([cache.explain("two").key])
        assert list(cache.fetch(["two"]).metadata) == [None]


def test_text_preview_is_refused_with_encryption_or_a_key_secret() -> None:
    keeping = DictBackend(scope="host", text_preview=True)
    with pytest.raises(ConfigError, match="text_preview"):
        Cache(CountingProvider(), [Tier(keeping, encryption=Encryption(bytes(32)))])
    with pytest.raises(ConfigError, match="text_preview"):
        Cache(CountingProvider(), [keeping], key=KeyPolicy(secret="a long secret"))
