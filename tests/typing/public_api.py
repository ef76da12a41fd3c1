"""What type checkers say about the public names. mypy and pyright read this file; nothing runs it.

``tests/test_public_api.py`` checks that every public name of the package and of ``Cache`` occurs here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, assert_type

import numpy as np
from numpy.typing import NDArray

import embedonce
from embedonce import (
    Cache,
    CacheClosed,
    Capabilities,
    ConfigError,
    Copied,
    Cost,
    DriftError,
    DriftGuard,
    Embedded,
    EmbedonceError,
    Entry,
    EraseIncomplete,
    Estimate,
    Explanation,
    Exported,
    Fetched,
    Held,
    Import,
    ImportRefused,
    Incomplete,
    KeyPolicy,
    Limits,
    Matrix,
    PartialAnswer,
    PluginError,
    ProviderCheck,
    ProviderError,
    ProviderTimeout,
    Purged,
    ReplayMiss,
    SourceError,
    SpaceError,
    Stats,
    StoreBusy,
    StoreExists,
    TextError,
    TextRefused,
    Tier,
    TierBusy,
    TierCheck,
    TierError,
    TierTimeout,
    TransferRefused,
    TransferStopped,
    Vector,
    VectorSpace,
    hookimpl,
)
from embedonce.admission import Settle
from embedonce.answers import ChainWarning, ImporterCheck
from embedonce.contracts import AnyProvider, EntryBackend, FrameBackend, LookupImporter, ScanImporter, Task
from embedonce.events import Event, ProviderStats, SpaceStats, TierStats
from embedonce.keys import SpaceCard
from embedonce.savings import FoundSavings
from embedonce.vectors import Metadata, Work


def opening(
    backend: FrameBackend,
    entries: EntryBackend,
    provider: AnyProvider,
    lookup: LookupImporter,
    scan: ScanImporter,
) -> None:
    assert_type(embedonce.open(), Cache)
    assert_type(embedonce.open("embedonce.toml", provider=provider), Cache)
    assert_type(embedonce.open({"provider": {"type": "ngram"}}), Cache)
    tiers = [Tier(backend, name="near", timeout=1.0), Tier(entries)]
    guard = DriftGuard(action="refuse", every=60.0, tolerance=0.01)
    policy = KeyPolicy(normalize=["nfc"], version="v2", namespace="mine", hash="blake2b", secret=b"hush")
    cache = Cache(provider, tiers, key=policy, dtype="float16", mode="replay", fallback=provider, drift=guard)
    assert_type(cache.for_provider(provider, price="0.02 USD / 1M tokens"), Cache)
    assert_type(cache.for_namespace("team"), Cache)
    assert_type(Cache(provider, imports=[Import(lookup, name="old", task="query", verify=5, timeout=1.0), scan]), Cache)
    assert_type(Cache(lambda texts: [[1.0] for _ in texts], space={"model": "m"}), Cache)
    assert_type(Cache(lambda texts: [[1.0] for _ in texts], [entries, backend], space={"model": "m"}), Cache)
    with cache as opened:
        assert_type(opened, Cache)
    assert_type(cache.close(), None)


def embedding(cache: Cache, texts: list[str], names: tuple[str, ...]) -> None:
    assert_type(cache.embed("text"), Vector)
    assert_type(cache.embed("text", "query"), Vector)
    assert_type(cache.embed_batch(texts), Matrix)
    assert_type(cache.embed_batch(names, task="code"), Matrix)
    assert_type(cache.embed_iter(iter(texts), batch=10), Iterator[Vector])
    assert_type(cache.fetch(texts, store=False, metadata=[None, {"page": 1}]), Fetched)
    assert_type(cache.lookup(texts), Fetched)
    assert_type(cache.find_in_memory("a text"), Entry | None)
    assert_type(cache.estimate(iter(texts), "query"), Estimate)
    assert_type(cache.put(texts, [[1.0, 2.0]], metadata=[{"page": 1}]), None)
    assert_type(cache.put(texts, np.ones((1, 2), np.float64), costs=[Cost(tokens=3), None]), None)
    assert_type(cache.put(texts, cache.embed_batch(texts)), None)
    assert_type(cache.put(texts, [cache.embed(text) for text in texts]), None)


def settle(computed: Work, wasted: Work) -> None:
    pass


async def settle_async(computed: Work, wasted: Work) -> None:
    pass


def admit_all(texts: Sequence[str], space: VectorSpace) -> None:
    pass


def admit(texts: Sequence[str], space: VectorSpace) -> Settle:
    return settle


async def admit_async(texts: Sequence[str], space: VectorSpace) -> Settle | None:
    return settle_async


def admitting(cache: Cache, texts: list[str]) -> None:
    assert_type(cache.fetch(texts, admit=admit_all), Fetched)
    assert_type(cache.fetch(texts, admit=admit), Fetched)
    assert_type(cache.fetch(texts, admit=admit_async), Fetched)


async def embedding_async(cache: Cache, texts: list[str], stream: AsyncIterator[str]) -> None:
    async with cache as opened:
        assert_type(opened, Cache)
    assert_type(await cache.aembed("text"), Vector)
    assert_type(await cache.aembed_batch(texts), Matrix)
    assert_type(cache.aembed_iter(texts), AsyncIterator[Vector])
    assert_type(cache.aembed_iter(stream), AsyncIterator[Vector])
    assert_type(await cache.afetch(texts, store=False), Fetched)
    assert_type(await cache.alookup(texts), Fetched)
    assert_type(await cache.aestimate(stream), Estimate)
    assert_type(await cache.aput(texts, [[1.0, 2.0]], metadata=None), None)
    assert_type(await cache.aforget(texts), dict[str, SpaceCard])
    assert_type(await cache.apurge(model="m", dry_run=True), Purged)
    assert_type(await cache.acopy("disk", "redis", texts=texts, dry_run=True), Copied)
    assert_type(await cache.aexport("bundle", except_scopes=["0123456789abcdef"], replace=True), Exported)
    assert_type(await cache.aexplain("text"), Explanation)
    assert_type(await cache.akeys(iter(texts), "query"), list[str])
    assert_type(await cache.acontents(), list[Held])
    assert_type(await cache.alist_metadata(), list[Metadata])
    assert_type(await cache.asavings(since=0.0), FoundSavings)
    assert_type(await cache.acheck(), list[TierCheck])
    assert_type(await cache.acheck_providers(embed=True), list[ProviderCheck])
    assert_type(await cache.acheck_importers(), list[ImporterCheck])
    assert_type(await cache.amigrate(), dict[str, str])
    assert_type(await cache.acompact(), dict[str, str])
    assert_type(await cache.aflush(1.0), bool)
    assert_type(await cache.aclose(), None)


def upkeep(cache: Cache, texts: list[str]) -> None:
    assert_type(cache.forget(texts, task="query"), dict[str, SpaceCard])
    assert_type(cache.forget(texts, where=lambda card: card["namespace"] == "search"), dict[str, SpaceCard])
    assert_type(cache.purge(scope="0123456789abcdef", version="v1", namespace=""), Purged)
    assert_type(cache.copy("disk", Tier(Shelf()), model="m", progress=print), Copied)
    assert_type(cache.copy(Shelf(), "disk", where=lambda card: card["namespace"] == "search"), Copied)
    assert_type(cache.export(Path("bundle"), "disk", except_texts=texts), Exported)
    assert_type(cache.explain("text", "query"), Explanation)
    assert_type(cache.normalize("text"), str)
    assert_type(cache.keys(texts), list[str])
    assert_type(cache.contents(), list[Held])
    assert_type(cache.list_metadata("query"), list[Metadata])
    assert_type(cache.savings(), FoundSavings)
    assert_type(cache.check(), list[TierCheck])
    assert_type(cache.check_providers(), list[ProviderCheck])
    assert_type(cache.check_importers(), list[ImporterCheck])
    assert_type(cache.importers, Sequence[str])
    assert_type(cache.migrate(), dict[str, str])
    assert_type(cache.compact(), dict[str, str])
    assert_type(cache.flush(), bool)
    assert_type(cache.stats(), Stats)
    assert_type(cache.subscribe(print_event), None)
    assert_type(cache.count_passed_by(), None)
    assert_type(cache.provider_stats(), dict[str, ProviderStats])
    assert_type(cache.tiers, Sequence[str])
    assert_type(cache.warnings, Sequence[ChainWarning])
    assert_type(cache.provider, AnyProvider)
    assert_type(cache.fallback, AnyProvider | None)
    assert_type(cache.closed, bool)


def print_event(event: Event) -> None:
    print(event)


def answers(fetched: Fetched, stats: Stats, explanation: Explanation, purged: Purged, held: Held) -> None:
    assert_type(fetched.vectors, Matrix)
    assert_type(fetched.rows, Sequence[Vector | None])
    assert_type(fetched.sources, Sequence[str | None])
    assert_type(fetched.failed, Mapping[int, Exception])
    assert_type(fetched.metadata, Sequence[Metadata | None])
    assert_type(fetched.space, VectorSpace)
    assert_type(fetched.seconds, Mapping[str, float])
    assert_type(fetched.errors, Mapping[str, str])
    assert_type(fetched.dimensions, int | None)
    assert_type(stats.tiers, Mapping[str, TierStats])
    assert_type(stats.providers, Mapping[str, ProviderStats])
    assert_type(stats.shared, int)
    assert_type(stats.hit_rate, float | None)
    assert_type(stats.requested, int)
    assert_type(stats.found, int)
    assert_type(stats.saved, Work)
    assert_type(stats.money_saved, Mapping[str, Decimal])
    assert_type(stats.spaces, Mapping[str, SpaceStats])
    assert_type(stats.tiers["memory"].hit_rate, float | None)
    assert_type(stats.tiers["memory"].is_skipped, bool)
    assert_type(stats.providers["openai"].last_error, str | None)
    assert_type(explanation.found, str | None)
    assert_type(explanation.as_dict(), dict[str, Any])
    assert_type(purged.removed, Mapping[str, int])
    assert_type(held.entries, int)


def entries(entry: Entry, space: VectorSpace) -> None:
    assert_type(entry.vector, Vector)
    assert_type(entry.created, float)
    assert_type(entry.expires, float | None)
    assert_type(Entry(np.ones(3, np.float32), 0.0), Entry)
    assert_type(space.fingerprint(), bytes)
    assert_type(space.dimensions, int | None)


def arrays_of_numpy(vector: Vector, matrix: Matrix) -> None:
    """A vector and a matrix go wherever a float32 array goes."""
    array: NDArray[np.float32] = vector
    array = matrix
    assert_type(array.dtype, np.dtype[np.float32])


class Words:
    """A provider as a user writes it."""

    limits = Limits(max_batch=8, concurrency=2, timeout=1.0)

    def space(self, task: Task) -> VectorSpace:
        return VectorSpace(provider="words", model="count", task=task)

    def embed(self, texts: Sequence[str], task: Task) -> Embedded:
        return Embedded(vectors=np.array([[len(text.split())] for text in texts], np.float32), tokens=len(texts))

    def close(self) -> None: ...


class Shelf:
    """A backend as a user writes it."""

    capabilities = Capabilities(scope="process", delete=True)

    def get_many(self, keys: Sequence[str]) -> Mapping[str, bytes]:
        return {}

    def set_many(self, items: Mapping[str, bytes], ttl: float | None) -> None: ...

    def delete_many(self, keys: Sequence[str]) -> None: ...

    def close(self) -> None: ...


@hookimpl
def embedonce_providers() -> Mapping[str, type]:
    return {"words": Words}


def plugins() -> None:
    assert_type(Cache(Words(), [Shelf(), Tier(Shelf(), ttl=60.0)]), Cache)
    frames: FrameBackend = Shelf()
    provider: AnyProvider = Words()
    del frames, provider


def errors(cache: Cache) -> None:
    try:
        cache.embed("text")
    except (TextError, TextRefused, ReplayMiss, ProviderError, ProviderTimeout, DriftError) as error:
        wide: EmbedonceError = error
        del wide
    except EraseIncomplete as error:
        assert_type(error.tiers, dict[str, str])
        assert_type(error.scopes, dict[str, str])
        assert_type(error.unable, frozenset[str])
    except PartialAnswer as error:
        print(error.failed)
    except StoreBusy as error:
        wide = error
    except (TransferRefused, TransferStopped, StoreExists) as error:
        wide = error
    except (ImportRefused, SourceError) as error:
        print(error)
    except (TierError, TierBusy, TierTimeout, CacheClosed, ConfigError, PluginError, SpaceError, Incomplete) as error:
        print(error)
