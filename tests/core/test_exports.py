"""Exporting entries to a new store: the best entry of each key, in order, once, and only when all of them are there."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from embedonce import Cache, Entry, Exported, StoreExists, Tier, TransferRefused, TransferStopped
from embedonce._engine import bulk_calls, transferring
from embedonce._plugins import loading
from embedonce.encryption import Encryption
from embedonce.keys import CARD_PREFIX
from embedonce.store_writers import BUNDLE, WrittenStore
from embedonce.testing.clocks import ManualClock
from embedonce.testing.fakes import CountingProvider, DictBackend
from embedonce.vectors import freeze
from embedonce_backends.memory import MemoryBackend

NOW = 1_800_000_000.0
SCOPE = "0" * 16
ENCRYPTION = Encryption(bytes(range(32)))


class ListWriter:
    """Keeps what it gets. It is strict about the order of keys, as the contract of writers says."""

    made: list[ListWriter]
    is_refused = False

    def __init__(self, path: Path, *, replace: bool) -> None:
        if self.is_refused:
            raise StoreExists(f"{path} already has a bundle")
        self.path, self.replace = path, replace
        self.entries: dict[str, Entry | bytes] = {}
        self.cards: dict[str, Entry | bytes] = {}
        self.sizes: list[int] = []
        self.state = "open"
        self.made.append(self)

    def add(self, items: Mapping[str, Entry | bytes]) -> None:
        assert self.state == "open"
        for key, value in items.items():
            if key.startswith(CARD_PREFIX):
                self.cards[key.removeprefix(CARD_PREFIX)] = value
            else:
                assert key > max(self.entries, default="")
                self.entries[key] = value
        self.sizes.append(len(items))

    def commit(self) -> WrittenStore:
        self.state = "committed"
        return WrittenStore(entries=len(self.entries), parts=1, bytes=7)

    def close(self) -> None:
        self.state = "closed" if self.state == "open" else self.state


@pytest.fixture(autouse=True)
def writers(monkeypatch: pytest.MonkeyPatch) -> list[ListWriter]:
    """The writers that exports have made."""
    made: list[ListWriter] = []
    monkeypatch.setattr(ListWriter, "made", made, raising=False)

    class Bundles:
        create_writer = staticmethod(ListWriter)

    real = loading.backend
    monkeypatch.setattr(loading, "backend", lambda name: Bundles if name == BUNDLE else real(name))
    return made


def export_async(cache: Cache, *arguments: Any, **options: Any) -> Exported:
    return asyncio.run(cache.aexport(*arguments, **options))


faces = pytest.mark.parametrize("export", [Cache.export, export_async], ids=["sync", "async"])


def make_cache(*tiers: Any, **options: Any) -> Cache:
    return Cache(CountingProvider(symmetric=False), tiers, clock=ManualClock(NOW), **options)


def put(backend: DictBackend, entries: Mapping[str, Entry], encryption: Encryption | None = None) -> None:
    with make_cache(Tier(DictBackend(scope="host", store=backend), encryption=encryption)) as cache:
        [tier] = cache._chain.tiers
        tier.backend.set_many(tier.codec.encode(entries), None)


def make_key(digit: str) -> str:
    return f"eo1.{SCOPE}.{digit * 64}"


@faces
def test_all_lasting_tiers_are_exported_in_the_order_of_the_keys(export: Any, writers: list[ListWriter]) -> None:
    near, far, memory = DictBackend(scope="host"), DictBackend(scope="network"), MemoryBackend()
    seen: list[tuple[int, int]] = []
    with make_cache(memory, Tier(near, name="near", lease="off"), Tier(far, name="far", write="none")) as cache:
        cache.embed_batch([f"text {i}" for i in range(1500)])
        cache.embed_batch([f"text {i}" for i in range(700)], "query")
        cache.copy("near", "far")
        cache.forget([f"text {i}" for i in range(100)])
        scopes = [cache.explain("a", task).scope for task in ("document", "query")]
        exported = export(cache, "some/bundle", progress=lambda done, total: seen.append((done, total)))
        assert exported == Exported(
            path=Path("some/bundle"),
            sources=["near", "far"],
            scopes={scope: cache._chain.cards[scope] for scope in scopes},
            entries=2000,
            parts=1,
            bytes=7,
        )
        assert repr(exported) == "<Exported 2,000 entries to 'some/bundle'>"
    [writer] = writers
    assert (writer.path, writer.replace, writer.state) == (Path("some/bundle"), False, "committed")
    assert len(writer.entries) == 2000
    assert writer.cards.keys() == exported.scopes.keys()
    assert max(writer.sizes) <= 1025
    assert seen[-1] == (2000, 2000)
    assert seen == sorted(seen)


@faces
def test_nothing_is_made_if_nothing_matches(export: Any, writers: list[ListWriter]) -> None:
    near = DictBackend(scope="host")
    put(near, {make_key("1"): Entry(freeze([1]), NOW, NOW)})
    with make_cache(Tier(near, name="near")) as cache:
        exported = export(cache, "bundle")
        assert (exported.entries, exported.expired, exported.found, exported.parts) == (0, 1, 1, 0)
        assert export(cache, "bundle", model="another").found == 0
        cache.embed("a")
        assert export(cache, "bundle", dry_run=True).entries == 1
    assert writers == []


def test_the_best_entry_of_each_key_is_exported(writers: list[ListWriter]) -> None:
    vector = freeze([1, 2])
    fine, coarse = Entry(vector, NOW), Entry(vector, NOW, dtype="int8")
    short, long = fine._replace(expires=NOW + 1), fine._replace(expires=NOW + 2)
    pairs = {
        "1": (fine, None, fine),
        "2": (None, coarse, coarse),
        "3": (coarse, short, short),
        "4": (short, long, long),
        "5": (long, short, long),
        "6": (short, fine, fine),
        "7": ("damaged", fine, fine),
        "8": ("damaged", None, None),
        "9": (fine._replace(expires=NOW - 1), fine, fine),
        "a": (fine._replace(expires=NOW - 1), "damaged", None),
        "b": (fine._replace(expires=NOW - 1), None, None),
    }
    backends = [DictBackend(scope="host"), DictBackend(scope="host")]
    for place, backend in enumerate(backends):
        put(backend, {make_key(d): pair[place] for d, pair in pairs.items() if isinstance(pair[place], Entry)})
        backend._store |= {make_key(d): (b"?", None) for d, pair in pairs.items() if pair[place] == "damaged"}
    with make_cache(Tier(backends[0], name="near"), Tier(backends[1], name="far")) as cache:
        exported = cache.export("bundle")
        assert repr(exported) == "<Exported 8 entries to 'bundle': 1 expired, 2 corrupt>"
    found = {key[-1]: (entry.dtype, entry.expires) for key, entry in writers[0].entries.items()}
    assert found == {d: (best.dtype, best.expires) for d, (_, _, best) in pairs.items() if best is not None}


def test_an_encrypted_tier_exports_its_frames_as_they_are(writers: list[ListWriter]) -> None:
    near = DictBackend(scope="host")
    put(near, {make_key("1"): Entry(freeze([1]), NOW), make_key("2"): Entry(freeze([1]), NOW, NOW)}, ENCRYPTION)
    put(near, {make_key("3"): Entry(freeze([1]), NOW)}, Encryption(b"k" * 32))
    with make_cache(Tier(near, name="near", encryption=ENCRYPTION, lease="off")) as cache:
        cache.embed("a")
        exported = cache.export("bundle", source="near")
        assert (exported.encrypted, exported.entries, exported.expired, exported.corrupt) == (True, 2, 1, 1)
        [writer] = writers
        assert writer.entries == {key: near._store[key][0] for key in (make_key("1"), *cache.keys(["a"]))}
        [(scope, card)] = writer.cards.items()
        [tier] = cache._chain.tiers
        decoded = tier.decode({CARD_PREFIX + scope: card}, dtype="float32", dimensions=None).entries
        assert decoded[CARD_PREFIX + scope].metadata == cache._chain.cards[scope]


def test_encrypted_tiers_and_others_are_not_mixed() -> None:
    tiers = [
        Tier(DictBackend(scope="host"), name="near", encryption=ENCRYPTION),
        Tier(DictBackend(scope="host"), name="far"),
    ]
    with make_cache(*tiers) as cache:
        with pytest.raises(TransferRefused, match=r"^tier 'near' is encrypted and tier 'far' is not, .* \(--from on"):
            cache.export("bundle")
        assert cache.export("bundle", "far").found == 0
    with make_cache() as cache, pytest.raises(TransferRefused, match=r"^the cache has no tiers"):
        cache.export("bundle")


def test_the_memory_of_a_process_can_be_exported_in_python(writers: list[ListWriter]) -> None:
    with make_cache(MemoryBackend()) as cache:
        cache.embed("a")
        assert cache.export("bundle", replace=True).entries == 1
    assert [writer.replace for writer in writers] == [True]


@faces
def test_an_export_that_fails_is_closed_and_not_committed(
    export: Any, writers: list[ListWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk_calls, "MAX_FAILURES", 1)
    monkeypatch.setattr(transferring, "MAX_WINDOW", 10)

    class Failing(DictBackend):
        def get_many(self, keys: Sequence[str], /) -> dict[str, Any]:
            if writers and not any("card" in key for key in keys):
                raise OSError("disk error")
            return super().get_many(keys)

    with make_cache(Tier(Failing(scope="host"), name="near", lease="off")) as cache:
        cache.embed_batch([f"text {i}" for i in range(30)])
        with pytest.raises(TransferStopped, match=r"^tier 'near' failed for 0\.\d s \(OSError\)$") as caught:
            export(cache, "bundle")
    assert caught.value.result.entries == 10
    assert [writer.state for writer in writers] == ["closed"]


def test_an_export_is_not_committed_if_a_text_is_forgotten_meanwhile(writers: list[ListWriter]) -> None:
    with make_cache(Tier(DictBackend(scope="host"), name="near", lease="off")) as cache:
        cache.embed_batch(["a", "b"])
        with pytest.raises(TransferStopped, match=r"^texts were erased during the export, which may still have them"):
            cache.export("bundle", progress=lambda done, total: cache.forget(["a"]))
        assert writers[0].state == "closed"
        assert cache.export("bundle").entries == 1
    assert writers[1].state == "committed"


def test_an_interrupt_closes_the_writer(writers: list[ListWriter]) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with make_cache(Tier(DictBackend(scope="host"), name="near", lease="off")) as cache:
        cache.embed("a")
        with pytest.raises(KeyboardInterrupt):
            cache.export("bundle", progress=interrupt)
    assert writers[0].state == "closed"


def test_a_folder_that_is_in_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ListWriter, "is_refused", True)
    with make_cache(Tier(DictBackend(scope="host"), name="near", lease="off")) as cache:
        cache.embed("a")
        with pytest.raises(StoreExists):
            cache.export("bundle")


@pytest.mark.parametrize("name", ["copy", "export"])
def test_both_faces_have_the_same_arguments(name: str) -> None:
    def list_arguments(method: Callable[..., Any]) -> list[str]:
        return [str(parameter) for parameter in inspect.signature(method).parameters.values()]

    assert list_arguments(getattr(Cache, name)) == list_arguments(getattr(Cache, f"a{name}"))
