"""Entries that a store returns and that the cache did not write: deep metadata, wrong dates, long cards.

Such an entry fails alone. The other entries of its batch are returned and promoted.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from typing import Any

import numpy as np
import pytest
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from embedonce import Cache, Tier
from embedonce._format import frames as frames_module
from embedonce.keys import CARD_PREFIX
from embedonce.testing.fakes import CountingProvider, DictBackend
from embedonce.vectors import MAX_DEPTH, Block, Entries, Entry, freeze, plain_metadata
from embedonce_backends.memory import MemoryBackend


class MovableClock:
    """A clock that can be set back."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def nest(levels: int, *, lists: bool = False) -> dict[str, Any]:
    """Return metadata with so many objects or lists inside each other."""
    inner: Any = [] if lists else {}
    for _ in range(levels - 2):
        inner = [inner] if lists else {"a": inner}
    return {"a": inner} if levels > 1 else {}


def make_frame(key: str, vector: Any, metadata: bytes, *, created: float = 1.0, expires: float = math.inf) -> bytes:
    """Return a frame with any bytes as its metadata, as another program may write it."""
    values = np.asarray(vector, np.float32)
    word = frames_module._build_first_word(1, "float32", 1)
    body = (
        frames_module._REST.pack(len(values), len(metadata), created, expires, xxh3_128_digest(key.encode()), 0)
        + metadata
        + values.tobytes()
    )
    return frames_module.START.pack(word, xxh3_64_intdigest(body, word)) + body


CYCLE: dict[str, Any] = {}
BOMB: Any = []
for _ in range(30):
    BOMB = [BOMB] * 10
CYCLE["a"] = [CYCLE, CYCLE, CYCLE]

BAD_METADATA = {
    "33 levels": nest(MAX_DEPTH + 1),
    "400 levels": nest(400),
    "600 lists": nest(600, lists=True),
    "100,000 levels": nest(100_000, lists=True),
    "a cycle": CYCLE,
    "10^30 lists": {"a": BOMB},
    "NaN": {"a": math.nan},
    "a number as key": {"a": {1: 2}},
    "a lone surrogate": {"a": "\ud800"},
    "too long": {"a": "x" * 70_000},
    "an object": {"a": object()},
    "bytes": {"a": b"x"},
    "an int of 5,000 digits": {"a": 10**5000},
    "a list": [1],
}
bad_metadata = pytest.mark.parametrize("metadata", BAD_METADATA.values(), ids=BAD_METADATA.keys())
faces = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


def call(cache: Cache, method: str, asynchronous: bool, *args: Any, **options: Any) -> Any:
    if asynchronous:
        return asyncio.run(getattr(cache, f"a{method}")(*args, **options))
    return getattr(cache, method)(*args, **options)


@bad_metadata
@faces
@pytest.mark.parametrize("method", ["put", "fetch"])
def test_metadata_that_a_store_could_not_return_is_refused_before_anything_is_stored(
    metadata: Any, asynchronous: bool, method: str
) -> None:
    backend, provider = DictBackend(), CountingProvider()
    with Cache(provider, [backend]) as cache:
        vectors = [np.ones((2, 16), np.float32)] if method == "put" else []
        with pytest.raises((TypeError, ValueError), match="an entry: metadata"):
            call(cache, method, asynchronous, ["one", "two"], *vectors, metadata=[None, metadata])
        assert list(backend.scan("")) == []
        assert provider.calls == 0 if isinstance(provider.calls, int) else not provider.calls


def test_metadata_at_the_limits_is_stored_and_read() -> None:
    metadata = [nest(MAX_DEPTH), {"a": 2**70, "b": [1, 2.5, None, True, "é\0"]}, {"a": "x" * 65_000}]
    texts = ["one", "two", "three"]
    with Cache(CountingProvider(), [MemoryBackend(), Tier(DictBackend(), name="frames")]) as cache:
        cache.fetch(texts, metadata=metadata)
        assert cache.fetch(texts).metadata == metadata
    assert plain_metadata(nest(MAX_DEPTH)) == nest(MAX_DEPTH)
    with pytest.raises(TypeError, match="at most 32 levels"):
        plain_metadata(nest(MAX_DEPTH + 1))


def spoil(backend: DictBackend, key: str, entry: Entry, metadata: Any) -> None:
    """Replace the value of a key with an entry that has this metadata."""
    if backend.capabilities.holds == "entries":
        backend.set_many({key: entry._replace(metadata=metadata)}, None)
    else:
        try:
            if metadata is BAD_METADATA["10^30 lists"]:
                raise ValueError
            written = json.dumps(metadata).encode()
        except (ValueError, TypeError, RecursionError):
            written = b'{"a":' * 500 + b"1" + b"}" * 500
        backend.set_many({key: make_frame(key, entry.vector, written[:70_000] or b"{")}, None)


@bad_metadata
@faces
@pytest.mark.parametrize("holds", ["frames", "entries"])
def test_a_stored_entry_with_bad_metadata_is_corrupt_alone(metadata: Any, asynchronous: bool, holds: Any) -> None:
    if holds == "frames" and metadata is BAD_METADATA["a number as key"]:
        pytest.skip("JSON has no number as key")
    provider = CountingProvider()
    far = DictBackend(holds=holds, scope="network")
    texts = [f"text {number}" for number in range(20)]
    with Cache(provider, [Tier(far, name="far", write="inline")]) as cache:
        cache.fetch(texts, metadata=[{"n": number} for number in range(20)])
        keys = cache._get_route(cache._source, "document").keys(texts)
        entry = Entry(freeze(cache.embed(texts[3])), time.time())
        spoil(far, keys[3], entry, metadata)
        card = next(iter(far.scan(CARD_PREFIX)))
        spoil(far, f"{card[:-1]}0", entry._replace(vector=freeze(())), metadata)
    far = DictBackend(holds=holds, scope="network", store=far)
    with Cache(provider, [MemoryBackend(), Tier(far, name="far", write="none")]) as cache:
        looked_up = call(cache, "lookup", asynchronous, texts)
        assert looked_up.sources == ["far" if number != 3 else None for number in range(20)]
        assert cache.stats().tiers["far"].corrupt == 1
        fetched = call(cache, "fetch", asynchronous, texts)
        assert fetched.sources == ["memory" if number != 3 else "provider" for number in range(20)]
        assert call(cache, "lookup", asynchronous, texts).sources == ["memory"] * 20
        cache.forget(["nothing"])
        assert len(call(cache, "list_metadata", asynchronous)) == 19
        assert call(cache, "contents", asynchronous)
        assert call(cache, "explain", asynchronous, texts[3]).tiers["far"] == "corrupt"
        assert call(cache, "explain", asynchronous, "unknown").tiers["far"] == "miss"
        assert all(check.ok for check in call(cache, "check", asynchronous))
        assert call(cache, "purge", asynchronous, model=provider.space("document").model).removed["far"] == 20


@pytest.mark.parametrize(
    "dates", [{"created": math.nan}, {"created": "now"}, {"expires": "never"}, {"expires": math.nan}], ids=str
)
def test_an_entry_with_a_wrong_date_is_corrupt_alone(dates: dict[str, Any]) -> None:
    far = DictBackend(holds="entries", scope="network")
    with Cache(CountingProvider(), [Tier(far, name="far", write="inline")]) as cache:
        cache.embed_batch(["one", "two"])
        key = cache._get_route(cache._source, "document").keys(["one"])[0]
        far.set_many({key: Entry(freeze(cache.embed("one")), 1.0)._replace(**dates)}, None)
        assert cache.lookup(["one", "two"]).sources == [None, "far"]
        assert cache.stats().tiers["far"].corrupt == 1


def test_a_block_with_bad_metadata_keeps_its_other_rows() -> None:
    class Blocks(DictBackend):
        def get_many(self, keys, /):  # type: ignore[no-untyped-def]
            found = super().get_many(keys)
            if not found or any(key.startswith(CARD_PREFIX) for key in found):
                return found
            rows = np.array([entry.vector for entry in found.values()])
            metadata = [nest(400) if not place else {"n": 1} for place in range(len(found))]
            dates = np.ones(len(found))
            return Entries(blocks=[Block(list(found), rows, dates, dates * np.inf, metadata)])

    with Cache(
        CountingProvider(), [MemoryBackend(), Tier(Blocks(holds="entries", scope="host"), name="blocks")]
    ) as cache:
        cache.embed_batch(["one", "two", "three"])
        cache._chain.tiers[0].backend.delete_many(list(cache._chain.tiers[0].backend.scan("")))
        assert cache.lookup(["one", "two", "three"]).sources == [None, "blocks", "blocks"]


def test_a_preview_that_makes_metadata_too_long_drops_one_entry() -> None:
    far = DictBackend(holds="frames", scope="network", text_preview=True)
    texts = ["one", "é" * 300, "three"]
    with Cache(CountingProvider(), [Tier(far, name="far", write="inline")]) as cache:
        cache.fetch(texts, metadata=[None, {"a": "x" * 65_500}, None])
        assert cache.stats().tiers["far"].stored == 2
        assert cache.stats().tiers["far"].dropped == 1
        assert cache.stats().tiers["far"].errors == 0


def test_a_card_with_a_long_value_gives_a_short_reason() -> None:
    far = DictBackend(scope="network")
    with Cache(CountingProvider(), [Tier(far, name="far", write="inline")]) as cache:
        cache.embed("one")
        (card,) = far.scan(CARD_PREFIX)
        own = dict(cache._chain.cards[card.removeprefix(CARD_PREFIX)])
        other = f"{CARD_PREFIX}{'0' * 16}"
        written = json.dumps({**own, "model": ["x" * 30_000]}).encode()
        far.set_many({other: make_frame(other, (), written)}, None)
        (reason,) = cache.explain("unknown").reasons
        assert len(reason) < 300


# --- the clock is set back --------------------------------------------------------------------


@faces
@pytest.mark.parametrize("holds", ["frames", "entries", "either"])
def test_an_entry_that_expires_later_than_its_ttl_allows_has_expired(asynchronous: bool, holds: Any) -> None:
    clock, provider = MovableClock(), CountingProvider()
    far = DictBackend(holds=holds, scope="network", clock=clock)
    tiers = [MemoryBackend(), Tier(far, name="far", ttl=3600.0, write="inline")]
    with Cache(provider, tiers, clock=clock) as cache:
        texts = [f"{number}" for number in range(10)]
        call(cache, "fetch", asynchronous, texts)
        clock.advance(-86_400)
        assert call(cache, "explain", asynchronous, "1").tiers["far"] == "expired"
        assert call(cache, "lookup", asynchronous, texts).sources == ["memory"] * 10  # it has no TTL: never expires
        cache._chain.tiers[0].backend.delete_many(list(cache._chain.tiers[0].backend.scan("")))
        assert call(cache, "lookup", asynchronous, texts).sources == [None] * 10
        assert call(cache, "fetch", asynchronous, texts).sources == ["provider"] * 10
        assert call(cache, "fetch", asynchronous, texts).sources == ["memory"] * 10


@faces
def test_a_promoted_entry_expires_when_the_clock_is_set_back(asynchronous: bool) -> None:
    clock, provider = MovableClock(), CountingProvider()
    far = DictBackend(scope="network", clock=clock)
    with Cache(provider, [Tier(far, name="far", ttl=3600.0, write="inline", lease="off")], clock=clock) as cache:
        cache.embed("one")
    far = DictBackend(scope="network", clock=clock, store=far)
    tiers = [MemoryBackend(), Tier(far, name="far", ttl=3600.0, write="inline", lease="off")]
    with Cache(provider, tiers, clock=clock) as cache:
        assert cache.fetch(["one"]).sources == ["far"]
        assert cache.fetch(["one"]).sources == ["memory"]
        clock.advance(-86_400)
        before = cache.stats().providers["counting"].texts
        call(cache, "embed", asynchronous, "one")
        assert cache.stats().providers["counting"].texts == before + 1


def test_clocks_of_hosts_may_differ_by_seconds() -> None:
    clock = MovableClock()
    far = DictBackend(scope="network", clock=clock)
    with Cache(CountingProvider(), [Tier(far, name="far", ttl=3600.0, write="inline")], clock=clock) as cache:
        cache.embed_batch(texts := [f"{number}" for number in range(50)])
        clock.advance(-5)
        assert cache.lookup(texts).sources == ["far"] * 50
