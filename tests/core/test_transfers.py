"""Copying entries from tier to tier: they arrive exactly as they were, and only those that are wanted and lacking."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedonce import Cache, Copied, Entry, KeyPolicy, Tier, TransferRefused
from embedonce._engine import transferring
from embedonce.encryption import Encryption
from embedonce.keys import CARD_PREFIX, SERVED_MODEL
from embedonce.testing.clocks import ManualClock
from embedonce.testing.fakes import CountingProvider, DictBackend
from embedonce.vectors import Dtype, freeze, round_vectors
from embedonce_backends.memory import MemoryBackend

NOW = 1_800_000_000.0
SCOPES = ("0" * 16, "a" * 16)
KEYS = [f"eo1.{scope}.{digest * 64}" for scope in SCOPES for digest in "0179bf"]
FINENESS: Mapping[Dtype, int] = {"int8": 0, "float16": 1, "float32": 2}


def copy_async(cache: Cache, *arguments: Any, **options: Any) -> Copied:
    return asyncio.run(cache.acopy(*arguments, **options))


faces = pytest.mark.parametrize("copy", [Cache.copy, copy_async], ids=["sync", "async"])


def make_cache(*tiers: Tier | Any, clock: Any = None, **options: Any) -> Cache:
    return Cache(CountingProvider(), tiers, clock=clock or ManualClock(NOW), **options)


def store(tier: Tier, entries: Mapping[str, Entry], clock: Any = None) -> None:
    """Put entries into a tier's backend without a cache."""
    with Cache(CountingProvider(), [tier], clock=clock or ManualClock(NOW)) as cache:
        backend = cache._chain.tiers[0].backend
        backend.set_many(cache._chain.tiers[0].codec.encode(entries), None)


def read(tier: Tier, clock: Any = None) -> dict[str, Entry]:
    """Return all entries of a tier, with the dtypes in which they are stored."""
    with Cache(CountingProvider(), [tier], clock=clock or ManualClock(NOW)) as cache:
        found: dict[str, Entry] = {}
        backend = cache._chain.tiers[0].backend
        values = backend.get_many([key for key in backend.scan("") if key.count(".") == 2 and "card" not in key])
        for dtype in FINENESS:
            entries = cache._chain.tiers[0].decode(values, dtype=dtype, dimensions=None).entries.as_dict()
            found |= entries
        # The finest dtype that an entry can be read with is the one in which it is stored.
        return found


def reopen(backend: DictBackend) -> DictBackend:
    """Return another client of a store, because a cache closes its backends."""
    caps = backend.capabilities
    return DictBackend(
        holds=caps.holds,
        scope=caps.scope,
        clock=backend.clock,
        store=backend,
        text_preview=caps.text_preview,
        max_value_bytes=caps.max_value_bytes,
    )


def as_bits(entries: Mapping[str, Entry]) -> dict[str, tuple[Any, ...]]:
    return {key: (entry.vector.tobytes(), *entry[1:]) for key, entry in entries.items()}


@st.composite
def make_entry(draw: st.DrawFn, dimensions: int = 3) -> Entry:
    dtype: Dtype = draw(st.sampled_from(["float32", "float16", "int8"]))
    values = draw(st.lists(st.floats(-100, 100, width=16), min_size=dimensions, max_size=dimensions).filter(any))
    try:
        vector = freeze(round_vectors(np.array([values], np.float32), dtype)[0])
    except ValueError:  # all values would become zero
        vector = freeze(np.ones(dimensions, np.float32))
    return Entry(
        vector,
        draw(st.sampled_from([0.5, NOW - 1000.25, NOW])),
        draw(st.sampled_from([None, NOW - 1, NOW, NOW + 1, NOW + 59, NOW + 3600.5, NOW + 1e9])),
        draw(st.sampled_from([None, {}, {"source": "a", "n": [1, None]}])),
        dtype,
        draw(st.sampled_from([None, 0, 7])),
        draw(st.sampled_from([None, 0.0, 0.25])),
    )


HOLDERS = st.sampled_from(["frames", "entries", "either"])
ENCRYPTION = Encryption(bytes(range(32)))


@given(
    st.dictionaries(st.sampled_from(KEYS), make_entry()),
    st.dictionaries(st.sampled_from(KEYS), make_entry()),
    st.sampled_from(KEYS),
    HOLDERS,
    HOLDERS,
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 60.0, 1e6]),
    st.sampled_from(["float32", "float16", "int8"]),
    st.booleans(),
)
def test_every_lacking_entry_arrives_as_it_was(
    given_entries: dict[str, Entry],
    held: dict[str, Entry],
    damaged: str,
    source_holds: Any,
    target_holds: Any,
    hides_source: bool,
    hides_target: bool,
    ttl: float | None,
    dtype: Dtype,
    can_list: bool,
) -> None:
    clock = ManualClock(NOW)
    source = DictBackend(holds=source_holds, scope="host", clock=clock)
    target = DictBackend(holds=target_holds, scope="host", clock=clock, scan=can_list)
    first = ENCRYPTION if hides_source and source_holds != "entries" else None
    second = ENCRYPTION if hides_target and target_holds != "entries" else None
    store(Tier(reopen(source), encryption=first), given_entries)
    store(Tier(reopen(target), encryption=second), held)
    for backend in (source, target):
        if damaged in backend._store:
            is_frame = backend.capabilities.holds == "frames"
            backend._store[damaged] = (b"?" if is_frame else Entry(freeze([np.nan]), NOW), None)
    near = Tier(source, name="near", encryption=first)
    far = Tier(target, name="far", encryption=second, ttl=ttl, write="none")
    with make_cache(near, far, dtype=dtype, clock=clock) as cache:
        copied = cache.copy("near", "far")
        again = cache.copy("near", "far")

    # A chain takes an entry that expires later than its ttl allows for one of a clock that was set back.
    latest = np.inf if ttl is None else NOW + ttl + min(60, ttl / 10)
    expected: dict[str, Entry] = {}
    counts = dict.fromkeys(("copied", "already_there", "expired", "corrupt"), 0)
    for key in {*given_entries, *held}:
        entry, old = given_entries.get(key), held.get(key)
        has_old = old is not None and key != damaged and (old.expires is None or NOW < old.expires <= latest)
        if has_old:
            expected[key] = old
        if entry is None:
            continue
        if has_old and FINENESS[old.dtype] >= FINENESS[dtype]:
            counts["already_there"] += 1
        elif key == damaged:
            counts["corrupt"] += 1
        elif entry.expires is not None and not NOW < entry.expires <= latest:
            counts["expired"] += 1
        elif has_old and FINENESS[old.dtype] >= FINENESS[entry.dtype]:
            counts["already_there"] += 1
        else:
            counts["copied"] += 1
            expected[key] = entry
    assert {name: getattr(copied, name) for name in counts} == counts
    assert copied.found == sum(counts.values()) == len(given_entries)
    assert (again.copied, again.already_there) == (0, counts["copied"] + counts["already_there"])
    found = read(Tier(reopen(target), encryption=second, ttl=None))
    found = {key: found[key] for key in expected}
    for key, entry in expected.items():
        if ttl is not None and as_bits(found)[key] != as_bits(expected)[key]:
            life = found[key].expires - NOW
            assert 0.95 * ttl - 1e-3 <= life <= ttl
            assert entry.expires is None or entry.expires - NOW > life
            found[key] = found[key]._replace(expires=entry.expires)
    assert as_bits(found) == as_bits(expected)


@faces
def test_a_copy_says_what_it_did_and_counts_every_key(copy: Callable[..., Copied]) -> None:
    near, far = DictBackend(scope="host"), DictBackend(scope="network")
    seen: list[tuple[int, int]] = []
    with make_cache(Tier(near, name="near", lease="off"), Tier(far, name="far", write="none")) as cache:
        cache.embed_batch([f"text {i}" for i in range(2500)])
        copied = copy(cache, "near", "far", progress=lambda done, total: seen.append((done, total)))
        assert repr(copied) == "<Copied 2,500 entries from near to far>"
        [card] = copied.scopes.values()
        assert card is not None
        assert card["model"] == "counting"
        assert repr(copy(cache, "near", "far")) == "<Copied 0 entries from near to far: 2,500 already_there>"
        done = [keys for keys, _ in seen]
        assert done == sorted(done)
        assert {total for _, total in seen} == {2500}
        assert done[-1] == 2500
        assert max(np.diff([0, *done])) <= 1024
        cache.purge(model="counting")
        assert copy(cache, "near", "far").found == 0


@faces
def test_a_dry_run_stores_nothing(copy: Callable[..., Copied]) -> None:
    near, far = DictBackend(scope="host"), DictBackend(scope="host")
    with make_cache(Tier(near, name="near", lease="off"), Tier(far, name="far", write="none")) as cache:
        cache.embed_batch(["a", "b"])
        assert copy(cache, "near", "far", dry_run=True).copied == 2
        assert len(far) == 0


def test_big_vectors_are_copied_in_small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transferring, "MAX_WINDOW_BYTES", 64)
    near, far = DictBackend(scope="host"), DictBackend(scope="host")
    steps: list[int] = []
    entries = {f"eo1.{SCOPES[0]}.{i:064x}": Entry(freeze(np.ones(8)), NOW) for i in range(100)}
    store(Tier(reopen(near)), entries)
    with make_cache(Tier(near, name="near"), Tier(far, name="far")) as cache:
        cache.copy("near", "far", progress=lambda done, total: steps.append(done))
    assert list(np.diff([0, *steps])) == [64, *[2] * 18]


def test_entries_of_similar_lives_are_stored_with_one_ttl() -> None:
    clock = ManualClock(NOW)
    near, far = DictBackend(scope="host", clock=clock), DictBackend(scope="host", clock=clock)
    lives = [*range(1, 200), 100_000, 1_000_000]
    entries = {
        f"eo1.{SCOPES[0]}.{i:064x}": Entry(freeze(np.ones(8)), NOW, None if life == 1 else NOW + life)
        for i, life in enumerate(lives)
    }
    store(Tier(reopen(near)), entries)
    with make_cache(Tier(near, name="near"), Tier(far, name="far"), clock=clock) as cache:
        assert cache.copy("near", "far").copied == len(lives)
    stored = {key: expires for key, (_, expires) in far._store.items()}
    assert stored.pop(f"eo1.{SCOPES[0]}.{0:064x}") is None
    ratios = [(stored[key] - NOW) / (entries[key].expires - NOW) for key in stored]
    assert 1 <= min(ratios) <= max(ratios) <= 1.25


# --- space cards ------------------------------------------------------------------------------


def test_the_card_is_copied_and_the_target_keeps_the_name_of_its_model() -> None:
    near, far, third = (DictBackend(scope="host") for _ in range(3))
    with make_cache(Tier(near, name="near", lease="off")) as cache:
        cache.embed("a")
        scope = cache.explain("a").scope
        card = dict(cache._chain.cards[scope])
    for backend, name in ((near, "first"), (far, "second")):
        store(
            Tier(reopen(backend)), {CARD_PREFIX + scope: Entry(freeze(()), NOW, metadata={**card, SERVED_MODEL: name})}
        )
    with Cache(CountingProvider(model="other"), [Tier(reopen(near), name="near"), Tier(far, name="far")]) as cache:
        assert cache.copy("near", Tier(reopen(third))).scopes == {scope: {**card, SERVED_MODEL: "first"}}
        copied = cache.copy("near", "far")
        assert (copied.copied, copied.unused) == (1, {scope})
        assert cache.copy(Tier(reopen(third)), "far", model="counting").already_there == 1
        held = {one.tier: one.card for one in cache.contents()}
    assert held == {"near": {**card, SERVED_MODEL: "first"}, "far": {**card, SERVED_MODEL: "second"}}


def test_entries_in_this_process_can_be_purged_by_their_card() -> None:
    far = DictBackend(scope="host")
    with make_cache(Tier(far, name="far", lease="off")) as cache:
        cache.embed_batch(["a", "b"])
    with Cache(CountingProvider(model="other"), [MemoryBackend(), Tier(reopen(far), name="far")]) as cache:
        assert cache.copy("far", "memory").copied == 2
        assert cache.purge(model="counting").removed == {"memory": 2, "far": 2}


def test_only_the_tier_with_previews_keeps_them() -> None:
    near = DictBackend(holds="entries", scope="host", text_preview=True)
    far = DictBackend(holds="entries", scope="host")
    with make_cache(Tier(near, name="near", lease="off"), Tier(far, name="far", write="none")) as cache:
        cache.fetch(["a", "b"], metadata=[{"source": "s"}, None])
        assert near.get(cache.explain("a").key).metadata == {"source": "s", "text_preview": "a"}
        assert cache.copy("near", "far").copied == 2
        assert [far.get(cache.explain(text).key).metadata for text in "ab"] == [{"source": "s"}, None]


# --- encryption -------------------------------------------------------------------------------


def test_a_copy_of_an_encrypted_tier_says_that_the_target_is_not_encrypted() -> None:
    near, far = DictBackend(scope="host"), DictBackend(scope="host")
    hidden = Tier(near, name="near", encryption=ENCRYPTION, lease="off")
    other = Tier(DictBackend(scope="host"), encryption=Encryption(b"k" * 32))
    with make_cache(hidden, Tier(far, name="far", write="none")) as cache:
        cache.embed("a")
        assert cache.copy("near", "far").decrypted
        assert not cache.copy("near", other).decrypted
        assert not cache.copy("far", "near").decrypted
        assert cache.copy(other, "far").already_there == 1


def test_entries_of_an_unknown_key_are_corrupt() -> None:
    near, far = DictBackend(scope="host"), DictBackend(scope="host")
    with make_cache(Tier(near, name="near", encryption=ENCRYPTION, lease="off")) as cache:
        cache.embed("a")
    near = reopen(near)
    tiers = [Tier(near, name="near", encryption=Encryption(b"k" * 32)), Tier(far, name="far")]
    with make_cache(*tiers) as cache:
        assert (cache.copy("near", "far").corrupt, len(far)) == (1, 0)


# --- what is refused --------------------------------------------------------------------------


@faces
def test_tiers_that_cannot_be_used_are_refused_with_what_to_do(copy: Callable[..., Copied]) -> None:
    silent = DictBackend(scope="network", scan=False, count=False)
    fixed = DictBackend(scope="host", read_only=True, delete=False, add=False)
    tiers = [Tier(DictBackend(scope="host"), name="near"), Tier(silent, name="silent"), Tier(fixed, name="fixed")]
    with make_cache(*tiers) as cache:
        for source, target, message in (
            ("nera", "near", r"^the source 'nera' is not a tier; the tiers are: 'near', 'silent' and 'fixed'$"),
            ("near", "disk", r"^the target 'disk' is not a tier; the tiers are: 'near', 'silent' and 'fixed'$"),
            ("near", "near", r"^the source and the target are the same tier, 'near'; choose another target$"),
            ("near", tiers[0].backend, r"^the source and the target are the same tier, 'near'; choose another"),
            ("near", "fixed", r"^tier 'fixed' is read-only, so .*; make a new bundle with export \(`embedonce export`"),
            ("silent", "near", r"^tier 'silent' cannot list its keys, so the texts must be named; .* --texts on the"),
            ("near", 7, r"^target: int is not a backend"),
        ):
            with pytest.raises(TransferRefused, match=message):
                copy(cache, source, target)
        with pytest.raises(TypeError, match="except_scopes must be a list"):
            copy(cache, "near", "silent", except_scopes="0" * 16)
        with pytest.raises(TypeError, match="got one str; write one text as"):
            copy(cache, "near", "silent", texts="one text")


# --- what is selected -------------------------------------------------------------------------


def fill(store: DictBackend) -> dict[str, str]:
    """Embed the same texts in several scopes of one store. Return the scopes by name."""
    scopes: dict[str, str] = {}
    policies = {
        "plain": KeyPolicy(),
        "v2": KeyPolicy(version="v2"),
        "team": KeyPolicy(namespace="team", hash="blake2b"),
        "hidden": KeyPolicy(secret="not known to the other policies"),
    }
    for name, policy in policies.items():
        provider = CountingProvider(model=f"model-{name}", symmetric=False)
        with Cache(provider, [Tier(reopen(store), lease="off")], key=policy, clock=ManualClock(NOW)) as cache:
            for task in ("document", "query"):
                cache.embed_batch(["a", "b", " c"], task)
                scopes[f"{name} {task}"] = cache.explain("a", task).scope
    return scopes


@pytest.mark.parametrize("can_list", [True, False])
def test_the_selection_names_scopes_and_texts(can_list: bool) -> None:
    near = DictBackend(scope="host")
    scopes = fill(near)
    source = DictBackend(scope="host", store=near, scan=can_list, count=can_list)
    tiers = [Tier(source, name="near"), Tier(reopen(near), name="cards")]
    with make_cache(*tiers, key=KeyPolicy(normalize=["strip"])) as cache:
        names = {scope: name for name, scope in scopes.items()}

        def select(**options: Any) -> list[str]:
            target = DictBackend(scope="host")
            copied = cache.copy("near", Tier(target), **options)
            stored = sorted(names[key.split(".")[1]] for key in target._store if "card" not in key)
            assert copied.copied == len(stored)
            assert {names[scope] for scope in copied.scopes} == set(stored)
            return stored

        documents, queries = scopes["plain document"], scopes["plain query"]
        known = [name for name in scopes if not name.startswith("hidden")]
        assert select(texts=["a"]) == sorted(known)
        assert select(texts=["a", "c", "nothing"], scope=documents) == ["plain document"]
        assert select(texts=["a", " c", "b"], scope=documents, except_texts=["b"]) == ["plain document"] * 2
        assert select(texts=["a"], model="model-v2") == ["v2 document", "v2 query"]
        assert select(texts=["a"], namespace="", version="v1") == ["plain document", "plain query"]
        assert select(texts=["a"], where=lambda card: card["namespace"] == "team") == ["team document", "team query"]
        assert select(texts=["a"], model="model-plain", except_scopes=[queries]) == ["plain document"]
        assert select(texts=[]) == []
        if not can_list:
            return
        assert select() == sorted([*scopes] * 3)
        assert select(model="model-team") == ["team document"] * 3 + ["team query"] * 3
        assert select(scope=queries, except_texts=["b", "a"]) == ["plain query"]
        assert select(model="nothing") == []
        unknown = cache.copy("near", Tier(DictBackend(scope="host")), texts=["a"]).unknown
        assert unknown.keys() == {scopes["hidden document"], scopes["hidden query"]}
        assert set(unknown.values()) == {
            "the space belongs to another secret, or its space card is from an earlier version"
        }
        with pytest.raises(
            TransferRefused, match=r"cannot leave texts out of the scopes .* \(--except-scope on the comm"
        ):
            select(except_texts=["a"])


def test_texts_are_not_left_out_of_a_scope_without_a_card() -> None:
    near = DictBackend(scope="host")
    store(Tier(reopen(near)), {KEYS[0]: Entry(freeze([1]), NOW)})
    with make_cache(Tier(near, name="near")) as cache:
        with pytest.raises(
            TransferRefused, match=f"{SCOPES[0]}, because their keys are not known: the space card is mis"
        ):
            cache.copy("near", Tier(DictBackend()), except_texts=["a"])
        assert cache.copy("near", Tier(DictBackend()), except_texts=["a"], except_scopes=[SCOPES[0]]).found == 0
        assert cache.copy("near", Tier(DictBackend()), model="m").found == 0
        assert cache.copy("near", Tier(DictBackend()), scope=SCOPES[0]).copied == 1
