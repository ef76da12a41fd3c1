"""Tiers with a read-only backend: the chain reads them, stores nothing in them, and says what they keep."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
from read_only_stores import ReadOnlyDict, WritableLater

from embedonce import Cache, EraseIncomplete, KeyPolicy, ReplayMiss, Tier, TierError
from embedonce.contracts import Capabilities, time_left
from embedonce.encryption import Encryption
from embedonce.errors import ConfigError
from embedonce.testing import CountingProvider, DictBackend, ManualClock
from embedonce.vectors import Entry, decode_frames, freeze

TEXTS = ["one", "two", "three"]
SECRET, OTHER_SECRET = b"x" * 32, b"y" * 32


def export(texts: list[str] = TEXTS, *, frames: bool = False, **options: Any) -> dict[str, Any]:
    """Return what a tier stores of some texts: entries, or frames."""
    encryption = options.pop("encryption", None)
    provider = options.pop("provider", None) or CountingProvider()
    backend = DictBackend(scope="host")
    with Cache(provider, [Tier(backend, encryption=encryption)], **options) as cache:
        cache.embed_batch(texts)
        items = dict(backend.get_many(list(backend.scan("eo1."))))
    items = {key: value for key, value in items.items() if not key.startswith(("eo1.savings", "eo1.lease"))}
    if frames or encryption is not None:
        return items
    return decode_frames(items, now=0.0, dtype="float32", dimensions=None).entries.as_dict()


def store(texts: list[str] = TEXTS, cls: type[ReadOnlyDict] = WritableLater, **options: Any) -> ReadOnlyDict:
    return cls(export(texts, **options))


class Untouchable(DictBackend):
    """A backend that is read-only although it has all methods that write."""

    def __init__(self, items: Mapping[str, Any]) -> None:
        super().__init__(scope="host", delete=False, add=False, read_only=True, ttl=False)
        super().set_many(items, None)
        self.writes = 0

    def set_many(self, items: Mapping[str, Any], ttl: float | None) -> None:
        self.writes += bool(items)

    add_many = delete_many = set_many  # type: ignore[assignment]


# --- the chain --------------------------------------------------------------------------------


@pytest.mark.parametrize(("option", "value"), [("write", "none"), ("write", "inline"), ("ttl", 60.0), ("lease", 5.0)])
def test_options_of_writes_are_errors(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf'tier \'bundle\': "{option}" is not supported.*remove "{option}"') as error:
        Cache(CountingProvider(), [Tier(ReadOnlyDict({}), name="bundle", **{option: value})])
    assert getattr(error.value, "option", None) == option


@pytest.mark.parametrize("capability", ["delete", "add"])
def test_a_read_only_backend_cannot_declare_writes(capability: str) -> None:
    backend = Untouchable({})
    backend.capabilities = replace(backend.capabilities, **{capability: True})
    with pytest.raises(ConfigError, match=rf'declares both "read_only" and "{capability}"'):
        Cache(CountingProvider(), [backend])


def test_only_a_read_only_backend_may_lack_set_many() -> None:
    backend = ReadOnlyDict({})
    backend.capabilities = Capabilities()
    with pytest.raises(ConfigError, match=r'has no method "set_many"; .* must declare the capability "read_only"'):
        Cache(CountingProvider(), [backend])


def test_a_chain_that_stores_nothing_gets_a_warning() -> None:
    with Cache(CountingProvider(), [Tier(ReadOnlyDict({}), name="bundle")]) as cache:
        (warning,) = cache.warnings
    assert warning.tier == "bundle"
    assert "no other tier stores vectors" in warning.message
    with Cache(CountingProvider(), [Tier(DictBackend(), write="none"), ReadOnlyDict({})]) as cache:
        assert len(cache.warnings) == 1


@pytest.mark.parametrize("mode", ["read-through", "replay"])
def test_no_warning_where_nothing_is_wrong(mode: Any) -> None:
    tiers = [ReadOnlyDict({})] if mode == "replay" else [DictBackend(bounded=False), ReadOnlyDict({}, bounded=False)]
    with Cache(CountingProvider(), tiers, mode=mode) as cache:
        assert cache.warnings == ()


# --- reading ----------------------------------------------------------------------------------


def test_hits_are_promoted_and_misses_are_computed() -> None:
    provider, memory, bundle = CountingProvider(), DictBackend(), store()
    with Cache(provider, [memory, Tier(bundle, name="bundle")]) as cache:
        fetched = cache.fetch([*TEXTS, "new"])
        assert fetched.sources == ["bundle", "bundle", "bundle", "provider"]
        assert dict(provider.count) == {"new": 1}
        assert cache.fetch(TEXTS).sources == [cache.tiers[0]] * 3
        stats = cache.stats().tiers["bundle"]
        assert (stats.stored, stats.errors, stats.dropped, stats.corrupt) == (0, 0, 0, 0)


async def test_the_async_face_reads_it_too() -> None:
    provider, bundle = CountingProvider(), store()
    async with Cache(provider, [DictBackend(), Tier(bundle, name="bundle")]) as cache:
        fetched = await cache.afetch([*TEXTS, "new"])
        assert fetched.sources == ["bundle", "bundle", "bundle", "provider"]
        await cache.aforget(["new"])
        with pytest.raises(EraseIncomplete) as caught:
            await cache.aforget(["one", "new"])
        assert {tier: sum(scopes.values()) for tier, scopes in caught.value.kept.items()} == {"bundle": 1}
        assert (await cache.acheck())[1].read_only


def test_single_texts_are_read_from_it() -> None:
    provider = CountingProvider()
    with Cache(provider, [store()]) as cache:
        assert cache.embed("one").tolist() == provider.vector_of("one").tolist()
        assert not provider.count


def test_nothing_is_ever_written_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """No entries, cards, leases, savings records or probes, although the backend could store them."""
    monkeypatch.setattr("embedonce._engine.recording.RECORD_SECONDS", 0.0)
    backend = Untouchable(export(frames=True))
    with Cache(CountingProvider(), [Tier(backend, name="bundle"), DictBackend()]) as cache:
        cache.embed_batch([*TEXTS, "new"])
        cache.embed("newer")
        cache.put(["given"], [[1.0] * 8])
        cache.check(verify=True)
        cache.contents()
        cache.explain("one")
        cache.savings()
        cache.flush()
        with pytest.raises(EraseIncomplete):
            cache.purge(model="counting")
    assert backend.writes == 0


def test_replay_serves_from_it_alone() -> None:
    provider = CountingProvider()
    with Cache(provider, [store()], mode="replay") as cache:
        assert len(cache.embed_batch(TEXTS)) == 3
        with pytest.raises(ReplayMiss):
            cache.embed("new")
    assert not provider.count


def test_a_damaged_value_is_corrupt_alone() -> None:
    bundle = store()
    damaged = next(key for key, entry in bundle.items.items() if entry.vector.size)
    bundle.items[damaged] = b""
    provider = CountingProvider()
    with Cache(provider, [DictBackend(), Tier(bundle, name="bundle")]) as cache:
        assert sorted(cache.fetch(TEXTS).sources) == ["bundle", "bundle", "provider"]
        assert cache.stats().tiers["bundle"].corrupt == 1
    assert provider.texts == 1


def test_entries_in_this_process_are_checked_if_the_chain_has_not_written_them() -> None:
    items = {
        key: entry._replace(vector=freeze(entry.vector * float("nan"))) if entry.vector.size else entry
        for key, entry in export().items()
    }
    backend = ReadOnlyDict(items, scope="process", holds="entries", get=True, blocking=False)
    provider = CountingProvider()
    with Cache(provider, [Tier(backend, name="dict")]) as cache:
        assert cache.embed("one").tolist() == provider.vector_of("one").tolist()
        assert cache.embed_batch(["one"]).tolist() == [provider.vector_of("one").tolist()]
        assert cache.stats().tiers["dict"].corrupt >= 1


def test_a_tier_that_fails_is_skipped() -> None:
    bundle = store()
    bundle.close()
    with Cache(CountingProvider(), [DictBackend(), Tier(bundle, name="bundle")]) as cache:
        assert cache.fetch(["one"]).sources == ["provider"]
        assert cache.stats().tiers["bundle"].errors == 1
    with (
        Cache(CountingProvider(), [DictBackend(), Tier(bundle, name="bundle", on_error="raise")]) as cache,
        pytest.raises(TierError, match="bundle"),
    ):
        cache.embed("one")


# --- expiry -----------------------------------------------------------------------------------


def expire(items: Mapping[str, Entry], at: float) -> dict[str, Entry]:
    return {key: entry._replace(expires=at) if entry.vector.size else entry for key, entry in items.items()}


def test_an_entry_may_expire_later_than_any_ttl_of_the_chain() -> None:
    clock = ManualClock()
    items = expire(export(clock=clock), clock() + 10_000.0)
    fast, slow = DictBackend(clock=clock), DictBackend(clock=clock, scope="host")
    chain = [Tier(fast, name="fast", ttl=60.0), Tier(slow, name="slow"), Tier(ReadOnlyDict(items), name="bundle")]
    provider = CountingProvider()
    with Cache(provider, chain, clock=clock) as cache:
        assert cache.fetch(TEXTS).sources == ["bundle"] * 3
        assert cache.fetch(TEXTS).sources == ["fast"] * 3
        clock.advance(61.0)
        # The promoted entries lasted 60 s in the tier with a ttl. The tier without one keeps their own date.
        assert cache.fetch(TEXTS).sources == ["slow"] * 3
        clock.advance(10_000.0)
        assert cache.fetch(TEXTS).sources == ["provider"] * 3


def test_an_entry_that_expires_sooner_than_the_ttl_keeps_its_date() -> None:
    clock = ManualClock()
    items = expire(export(clock=clock), clock() + 10.0)
    fast = DictBackend(clock=clock, ttl=False)
    with Cache(
        CountingProvider(), [Tier(fast, name="fast", ttl=60.0), Tier(ReadOnlyDict(items), name="bundle")], clock=clock
    ) as cache:
        assert cache.fetch(["one"]).sources == ["bundle"]
        clock.advance(5.0)
        assert cache.fetch(["one"]).sources == ["fast"]
        clock.advance(6.0)
        assert cache.fetch(["one"]).sources == ["provider"]


# --- encryption -------------------------------------------------------------------------------


def test_encrypted_frames_are_read_with_their_key() -> None:
    bundle = store(encryption=Encryption([SECRET]))
    provider = CountingProvider()
    with Cache(provider, [Tier(bundle, name="bundle", encryption=Encryption([SECRET]))]) as cache:
        assert cache.fetch(TEXTS).sources == ["bundle"] * 3
        assert cache.check()[0].ok


@pytest.mark.parametrize(
    ("stored", "configured", "message"),
    [
        (SECRET, None, "1 of 1 scopes are encrypted, but the tier has no key"),
        (SECRET, OTHER_SECRET, "1 of 1 scopes are encrypted with a different key"),
        (None, SECRET, "1 of 1 scopes are not encrypted, but the tier has a key"),
    ],
)
def test_check_says_that_the_key_does_not_fit(stored: bytes | None, configured: bytes | None, message: str) -> None:
    made = {name: None if key is None else Encryption([key]) for name, key in (("a", stored), ("b", configured))}
    with Cache(CountingProvider(), [Tier(store(encryption=made["a"]), encryption=made["b"])]) as cache:
        (check,) = cache.check()
    assert (check.ok, check.detail, check.writes) == (False, message, None)


# --- erasing ----------------------------------------------------------------------------------


@pytest.fixture
def chain() -> Iterator[Cache]:
    """A cache with a writable tier and a read-only one."""
    with Cache(CountingProvider(), [DictBackend(), Tier(store(), name="bundle")]) as cache:
        cache.embed_batch([*TEXTS, "new"])
        yield cache


def scope_of(cache: Cache) -> str:
    return cache.explain("one").scope


def test_forget_succeeds_if_the_store_has_none_of_the_texts(chain: Cache) -> None:
    assert chain.forget(["new", "never seen"]) == {}
    assert chain.fetch(["new"]).sources == ["provider"]


def test_forget_names_the_tier_and_the_command(chain: Cache) -> None:
    with pytest.raises(EraseIncomplete) as caught:
        chain.forget(["one", "two", "new"])
    error = caught.value
    assert error.tiers == {
        "bundle": "it is read-only and keeps 2 of the entries; rebuild it without them: "
        "embedonce export --from bundle --out FOLDER --replace --except-texts FILE"
    }
    assert error.kept == {"bundle": {scope_of(chain): 2}}
    assert error.unable == {"bundle"}
    assert "Call it again" not in str(error)
    assert "expire or are evicted" not in str(error)
    assert chain.fetch(["new"]).sources == ["provider"], "the other tiers were not erased"


def test_a_store_that_cannot_be_exported_has_no_command() -> None:
    with Cache(CountingProvider(), [Tier(store(cls=ReadOnlyDict), name="bundle")]) as cache:
        with pytest.raises(EraseIncomplete) as caught:
            cache.forget(["one"])
        expected = "it is read-only and keeps 1 of the entries; rebuild its store without them"
        assert caught.value.tiers == {"bundle": expected}


def test_forget_by_card_names_the_tier_too(chain: Cache) -> None:
    with pytest.raises(EraseIncomplete) as caught:
        chain.forget(["one"], where=lambda card: True)
    assert caught.value.kept == {"bundle": {scope_of(chain): 1}}
    assert chain.forget(["new"], where=lambda card: True) == {}
    # The text stays in a scope that was not wanted, so its card is returned.
    assert list(chain.forget(["one"], where=lambda card: False)) == [scope_of(chain)]


def test_a_tier_that_fails_while_it_is_asked_is_not_a_tier_that_keeps_entries(chain: Cache) -> None:
    bundle: Any = chain._chain.tiers[1].backend
    bundle.closed = True
    with pytest.raises(EraseIncomplete) as caught:
        chain.forget(["one"])
    bundle.closed = False
    assert (set(caught.value.tiers), caught.value.kept, caught.value.unable) == ({"bundle"}, {}, frozenset())
    assert "Call it again" in str(caught.value)


def test_purge_names_the_scopes(chain: Cache) -> None:
    scope = scope_of(chain)
    preview = chain.purge(model="counting", dry_run=True)
    assert (dict(preview.removed), preview.kept) == ({chain.tiers[0]: 4}, {"bundle": {scope: 3}})
    assert repr(preview) == "<Purged 1 scope: 4 from dict; kept: 3 in bundle>"
    with pytest.raises(EraseIncomplete) as caught:
        chain.purge(model="counting")
    error = caught.value
    assert error.tiers["bundle"] == (
        "it is read-only and keeps 3 of the entries; rebuild it without them: "
        f"embedonce export --from bundle --out FOLDER --replace --except-scope {scope}"
    )
    assert (error.kept, error.removed) == ({"bundle": {scope: 3}}, {chain.tiers[0]: 4})
    assert list(error.matched) == [scope]


def test_purge_succeeds_if_the_store_has_none_of_the_entries() -> None:
    with Cache(CountingProvider(model="other"), [DictBackend(), Tier(store(), name="bundle")]) as cache:
        cache.embed_batch(TEXTS)
        assert dict(cache.purge(model="other").removed) == {cache.tiers[0]: 3}
        with pytest.raises(EraseIncomplete):
            cache.purge(model="counting")


def test_purge_of_unused_scopes_names_the_tier() -> None:
    with Cache(CountingProvider(model="other"), [DictBackend(), Tier(store(), name="bundle")]) as cache:
        assert sum(cache.purge(unused=True, dry_run=True).kept["bundle"].values()) == 3
        with pytest.raises(EraseIncomplete):
            cache.purge(unused=True)


async def test_purge_has_an_async_twin() -> None:
    async with Cache(CountingProvider(), [Tier(store(), name="bundle")]) as cache:
        assert (await cache.apurge(model="counting", dry_run=True)).kept
        with pytest.raises(EraseIncomplete):
            await cache.apurge(model="counting")


def test_many_scopes_are_not_all_named() -> None:
    items: dict[str, Any] = {}
    for number in range(7):
        items |= export(["one"], key=KeyPolicy(version=f"v{number}"))
    with Cache(CountingProvider(), [Tier(WritableLater(items), name="a bundle")]) as cache:
        with pytest.raises(EraseIncomplete) as caught:
            cache.purge(model="counting")
        reason = caught.value.tiers["a bundle"]
    assert reason.count("--except-scope") == 5
    assert reason.endswith("(and so for 2 more scopes)")
    assert "--from 'a bundle' " in reason


def test_purge_without_count_lists_the_keys() -> None:
    backend = ReadOnlyDict(export(), count=False)
    with Cache(CountingProvider(), [Tier(backend, name="bundle")]) as cache:
        assert sum(cache.purge(model="counting", dry_run=True).kept["bundle"].values()) == 3


def test_purge_of_a_store_that_cannot_be_listed_says_so() -> None:
    backend = ReadOnlyDict(export(), count=False, scan=False)
    with Cache(CountingProvider(), [Tier(backend, name="bundle")]) as cache:
        with pytest.raises(EraseIncomplete, match="cannot list its keys") as caught:
            cache.purge(model="counting")
        assert caught.value.kept == {}


# --- looking ----------------------------------------------------------------------------------


def test_check_writes_no_probe_and_says_read_only() -> None:
    bundle = store()
    before = dict(bundle.items)
    with Cache(CountingProvider(), [Tier(bundle, name="bundle")]) as cache:
        (check,) = cache.check()
    assert (check.ok, check.writes, check.read_only, check.verified, check.detail) == (True, None, True, None, "")
    assert bundle.items == before
    assert bundle.verified == 0


@pytest.mark.parametrize("is_damaged", [False, True])
def test_check_can_verify_the_whole_store(is_damaged: bool) -> None:
    bundle = store()
    bundle.damaged = is_damaged
    with Cache(CountingProvider(), [DictBackend(), Tier(bundle, name="bundle")]) as cache:
        memory, check = cache.check(verify=True)
    assert (memory.ok, memory.verified) == (True, None)
    assert (check.ok, check.verified) == (not is_damaged, not is_damaged)
    assert check.detail == (
        "a value is damaged; make the store again" if is_damaged else f"{len(bundle.items)} values are intact"
    )
    assert check.writes is None


def test_a_verification_has_no_timeout_and_can_be_interrupted() -> None:
    class Interrupted(ReadOnlyDict):
        """A store whose verification is interrupted by Ctrl-C. Its calls are made in the caller's thread."""

        def verify(self) -> str:
            assert time_left() is None
            raise KeyboardInterrupt

    bundle = Interrupted(export(), deadline=True)
    with (
        Cache(CountingProvider(), [Tier(bundle, name="bundle", timeout=0.001)]) as cache,
        pytest.raises(KeyboardInterrupt),
    ):
        cache.check(verify=True)


def test_check_says_what_a_store_of_another_model_holds() -> None:
    with Cache(CountingProvider(model="mine"), [Tier(store(), name="bundle")]) as cache:
        (check,) = cache.check()
    assert check.ok
    assert check.detail == (
        "holds 3 entries of counting counting (8 dimensions, version v1), none of which this configuration uses: "
        "model 'counting' instead of 'mine'"
    )


def test_check_says_that_a_store_is_empty() -> None:
    with Cache(CountingProvider(), [ReadOnlyDict({})]) as cache:
        assert cache.check()[0].detail == "holds no entries"


def test_check_counts_entries_without_a_card() -> None:
    items = {key: entry for key, entry in export().items() if entry.vector.size}
    with Cache(CountingProvider(model="mine"), [ReadOnlyDict(items)]) as cache:
        assert cache.check()[0].detail == ("holds 3 entries of unknown spaces, none of which this configuration uses")


def test_check_says_nothing_about_a_store_that_is_used() -> None:
    items = export() | export(key=KeyPolicy(version="v7"))
    with Cache(CountingProvider(), [ReadOnlyDict(items)]) as cache:
        assert cache.check()[0].detail == ""


def test_contents_and_explain_show_it(chain: Cache) -> None:
    held = {one.tier: one for one in chain.contents()}
    assert (held["bundle"].entries, held["bundle"].error, held["bundle"].current) == (3, None, True)
    assert chain.explain("two").tiers["bundle"] == "hit"
    assert chain.explain("other").tiers["bundle"] == "miss"
    assert chain.migrate() == {}
    assert chain.compact() == {}
    assert chain.list_metadata() == []


def test_savings_are_recorded_in_another_tier() -> None:
    lasting = DictBackend(scope="host")
    with Cache(CountingProvider(), [Tier(lasting, name="disk"), Tier(store(), name="bundle")]) as cache:
        cache.embed_batch([*TEXTS, "new"])
        found = cache.savings()
    assert found.tiers == ["disk"]
    assert [record.saved["bundle"].texts for record in found.records] == [3]


def test_a_chain_with_a_read_only_tier_alone_records_no_savings() -> None:
    with Cache(CountingProvider(), [store()]) as cache:
        cache.embed_batch(TEXTS)
        assert cache.savings().tiers == []


def test_no_message_names_a_text(chain: Cache, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(EraseIncomplete) as caught:
        chain.forget(["three"])
    assert "three" not in f"{caught.value} {caught.value.tiers} {caplog.text}"
