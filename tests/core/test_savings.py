"""Records of the work that processes have computed and saved: where they are, when they are written, who reads them."""

from __future__ import annotations

import asyncio
import json
import math
import multiprocessing
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from embedonce import Cache, KeyPolicy, Tier
from embedonce._engine import recording
from embedonce.keys import SAVINGS_PREFIX
from embedonce.prices import Price
from embedonce.savings import SavingsRecord, add_up, group_by_scope, group_savings
from embedonce.testing.fakes import CountingProvider, DictBackend
from embedonce.testing.faults import Fault, FaultyBackend
from embedonce.vectors import Entry, Work, encode_frames, freeze
from embedonce_backends.disk import DiskBackend
from embedonce_backends.memory import MemoryBackend

PRICE = "0.02 USD / 1M tokens"
DAY = 86_400.0
NOON = datetime(2026, 3, 14, 12, tzinfo=UTC).timestamp()


def make_far(**options: Any) -> DictBackend:
    return DictBackend(**{"scope": "network", **options})


def embed(backend: Any, texts: list[str], **options: Any) -> None:
    with Cache(CountingProvider(), [MemoryBackend(), Tier(backend, name="far")], **options) as cache:
        cache.embed_batch(texts)


def read(backend: DictBackend, since: float = 0.0, **options: Any) -> list[SavingsRecord]:
    """Return the records as another process finds them."""
    with Cache(CountingProvider(), [Tier(make_far(store=backend), name="other name")], **options) as cache:
        return cache.savings(since).records


def list_keys(backend: DictBackend) -> list[str]:
    return [key for key in backend._store if key.startswith(SAVINGS_PREFIX)]


def test_a_cache_that_is_closed_has_recorded_its_work() -> None:
    far = make_far()
    policy = KeyPolicy(version="v7", namespace="mine")
    with Cache(CountingProvider(model="m"), [MemoryBackend(), Tier(far, name="far")], key=policy, price=PRICE) as cache:
        cache.embed_batch(["a", "bb", "a"])
        cache.embed("bb")
        cache.embed_batch(["a", "bb"])
        scope = cache.explain("a").scope
    (record,) = read(far)
    assert (record.provider, record.model, record.task) == ("counting", "m", "")
    assert (record.scope, record.version, record.namespace) == (scope, "v7", "mine")
    assert (record.computed.texts, record.computed.tokens, record.computed.unknown_tokens) == (2, 3, 0)
    assert list(record.saved) == ["memory"]
    assert (record.all_saved.texts, record.all_saved.tokens) == (3, 5)
    assert record.price == Price.parse(PRICE)
    sums = add_up([record])
    assert sums.spent["USD"] == record.price.of(3)
    assert sums.money_saved["USD"] == record.price.of(5)


def test_processes_are_added_up() -> None:
    far = make_far()
    for texts in (["a", "bb"], ["bb", "ccc"], ["a", "bb", "ccc"]):
        embed(make_far(store=far), texts)
    records = read(far)
    assert len({record.process for record in records}) == len(records) == 3
    sums = add_up(records)
    assert (sums.computed.texts, sums.computed.tokens) == (3, 6)
    assert (sums.saved.texts, sums.saved.tokens) == (4, 8)
    by_tier = group_savings(records, "tier")
    assert {name: one.saved.texts + one.computed.texts for name, one in by_tier.items()} == {"far": 4, "provider": 3}
    assert list(group_by_scope(records)) == [records[0].scope]


def test_the_record_of_a_cache_that_is_open_is_read_too() -> None:
    far = make_far()
    with Cache(CountingProvider(), [Tier(far, name="far")]) as cache:
        for count in (1, 2, 3):
            cache.embed_batch(["a"])
            (record,) = cache.savings().records
            assert (record.computed.texts, record.all_saved.texts) == (1, count - 1)
            assert len(list_keys(far)) == 1  # the same record, written again


def test_the_async_twin_reads_the_same_records() -> None:
    async def run() -> list[SavingsRecord]:
        async with Cache(CountingProvider(), [Tier(make_far(), name="far")]) as cache:
            await cache.aembed_batch(["a", "b"])
            return (await cache.asavings()).records

    (record,) = asyncio.run(run())
    assert record.computed.texts == 2


def test_a_cache_without_work_records_nothing() -> None:
    far = make_far()
    with Cache(CountingProvider(), [Tier(far, name="far")]) as cache:
        cache.lookup(["a"])
        cache.contents()
        cache.savings()
    assert list_keys(far) == []


def test_records_are_no_entries() -> None:
    far = make_far()
    embed(far, ["a", "bb"])
    again = make_far(store=far)
    with Cache(CountingProvider(), [Tier(again, name="far")]) as cache:
        (held,) = cache.contents()
        assert held.entries == 2
        assert cache.list_metadata() == []
        assert cache.purge(unused=True).removed == {"far": 0}
        assert cache.purge(scope=held.scope).removed == {"far": 2}
        cache.forget(["a", "bb"])
        assert len(cache.savings().records) == 1


def test_each_day_has_its_record(monkeypatch: pytest.MonkeyPatch) -> None:
    far, now = make_far(), [NOON]
    with Cache(CountingProvider(), [Tier(far, name="far")], clock=lambda: now[0]) as cache:
        cache.embed_batch(["a"])
        cache.savings()
        now[0] += DAY
        cache.embed_batch(["bb"])
        cache.savings()
        cache.embed_batch(["a", "bb"])
    clock: Callable[[], float] = lambda: now[0]  # noqa: E731
    records = read(far, clock=clock)
    assert [(one.day, one.computed.texts, one.all_saved.texts) for one in records] == [
        ("2026-03-14", 1, 0),
        ("2026-03-15", 1, 2),
    ]
    assert [one.day for one in read(far, since=now[0], clock=clock)] == ["2026-03-15"]
    assert list(group_savings(records, "day")) == ["2026-03-14", "2026-03-15"]


def test_records_expire_after_a_year() -> None:
    far = make_far()
    embed(far, ["a"], clock=lambda: NOON)
    assert len(read(far, clock=lambda: NOON + 365 * DAY)) == 1
    assert read(far, clock=lambda: NOON + 368 * DAY) == []
    ((_, expires),) = [value for key, value in far._store.items() if key.startswith(SAVINGS_PREFIX)]
    assert expires is not None


def test_records_outlive_the_ttl_of_their_tier() -> None:
    far = make_far()
    with Cache(CountingProvider(), [Tier(far, name="far", ttl=60.0)], clock=lambda: NOON) as cache:
        cache.embed("a")
    later = Tier(make_far(store=far), name="far", ttl=60.0)
    with Cache(CountingProvider(), [later], clock=lambda: NOON + 30 * DAY) as cache:
        assert len(cache.savings().records) == 1


def test_the_slowest_tier_that_can_list_and_is_written_keeps_the_records() -> None:
    near, far, unlisted, unwritten = make_far(scope="host"), make_far(), make_far(scan=False), make_far()
    tiers = [
        MemoryBackend(),
        Tier(near, name="near"),
        Tier(far, name="far"),
        Tier(unlisted, name="unlisted"),
        Tier(unwritten, name="unwritten", write="none"),
    ]
    with Cache(CountingProvider(), tiers) as cache:
        cache.embed("a")
        found = cache.savings()
    assert [len(list_keys(one)) for one in (near, far, unlisted, unwritten)] == [0, 1, 0, 0]
    assert (found.tiers, found.errors) == (["near", "far", "unwritten"], {})
    assert repr(found) == "<FoundSavings 1 record in near, far, unwritten>"


@pytest.mark.parametrize("tiers", [[], [MemoryBackend()], [make_far(scan=False)]])
def test_without_such_a_tier_nothing_is_recorded(tiers: list[Any]) -> None:
    with Cache(CountingProvider(), tiers) as cache:
        cache.embed("a")
        found = cache.savings()
    assert (found.records, found.tiers, found.errors) == ([], [], {})


def test_a_tier_that_fails_is_named_and_the_record_is_written_later() -> None:
    far = make_far()
    backend = FaultyBackend(far, [Fault("raise", on="set", calls=[3]), Fault("raise", on="scan", calls=[1])])
    with Cache(CountingProvider(), [Tier(backend, name="far", write="inline")]) as cache:
        cache.embed("a")
        found = cache.savings()
        assert [kind for kind, _ in backend.calls].count("set") == 3  # the entry, its space card, the record
        assert (list(found.errors), found.records, list_keys(far)) == (["far"], [], [])
    (record,) = read(far)
    assert record.computed.texts == 1


def test_a_record_is_written_while_the_cache_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "RECORD_SECONDS", 0.0)
    far = make_far()
    written = multiprocessing.Event()
    store = far.set_many

    def set_many(items: Any, ttl: float | None) -> None:
        store(items, ttl)
        if any(key.startswith(SAVINGS_PREFIX) for key in items):
            written.set()

    far.set_many = set_many  # type: ignore[method-assign]
    with Cache(CountingProvider(), [Tier(far, name="far")]) as cache:
        cache.embed("a")
        assert written.wait(60)


def test_hits_on_the_fast_path_are_recorded_while_the_cache_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    far = make_far()
    with Cache(CountingProvider(), [MemoryBackend(), Tier(far, name="far")]) as cache:
        cache.embed("a")
        monkeypatch.setattr(cache._chain.recorder, "_next", 0.0)
        started: list[Any] = []
        monkeypatch.setattr(cache._chain.recorder._tier.calls, "run_in_background", started.append)  # type: ignore[union-attr]
        for _ in range(1000):
            cache.embed("a")
        assert started == [cache._chain.recorder.record]


def test_records_in_an_encrypted_tier_are_encrypted() -> None:
    pytest.importorskip("cryptography")
    from embedonce.encryption import Encryption

    far, key = make_far(), "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
    tier = Tier(far, name="far", encryption=Encryption(key))
    with Cache(CountingProvider(model="hidden-model"), [tier]) as cache:
        cache.embed("a")
    (name,) = list_keys(far)
    assert b"hidden-model" not in far._store[name][0]
    with Cache(
        CountingProvider(model="hidden-model"), [Tier(make_far(store=far), name="far", encryption=Encryption(key))]
    ) as cache:
        assert [record.model for record in cache.savings().records] == ["hidden-model"]


GOOD = {
    "provider": "p",
    "model": "m",
    "task": "",
    "version": "v1",
    "namespace": "",
    "price": None,
    "computed": Work(1)._asdict(),
    "saved": {},
}
OTHERS: list[Any] = [
    None,
    {},
    {**GOOD, "computed": 5},
    {**GOOD, "computed": {"texts": -1}},
    {**GOOD, "computed": {"texts": "1"}},
    {**GOOD, "computed": {"texts": True, "other": 1}},
    {**GOOD, "saved": []},
    {**GOOD, "saved": {"far": {"texts": None}}},
    {**GOOD, "computed": {"texts": 1.5}},
    {**GOOD, "computed": {"texts": True}},
    {**GOOD, "computed": {"texts": 1, "tokens": 10**400}},
    {**GOOD, "computed": {"texts": 1, "seconds": 1e308}},
    {**GOOD, "computed": {"texts": 1, "unknown_tokens": 2}},
    {**GOOD, "price": {"amount": "1E999999", "currency": "USD", "tokens": "1"}},
    {**GOOD, "price": {"amount": "NaN", "currency": "USD", "tokens": "1"}},
    {**GOOD, "price": "free"},
    {**GOOD, "price": 7},
    {**GOOD, "model": ["m"]},
    {name: value for name, value in GOOD.items() if name != "namespace"},
]


@pytest.mark.parametrize("metadata", OTHERS, ids=lambda value: json.dumps(value)[:40])
def test_what_another_program_wrote_is_left_out(metadata: Any) -> None:
    far = make_far()
    embed(far, ["a"])
    key = f"{SAVINGS_PREFIX}20990101.0123456789abcdef.0123456789ab"
    far._store.update({key: (encode_frames({key: Entry(freeze(()), 1.0, None, metadata)})[key], None)})
    assert len(read(far)) == 1
    far._store.update({key: (encode_frames({key: Entry(freeze(()), 1.0, None, GOOD)})[key], None)})
    assert len(read(far)) == 2


@pytest.mark.parametrize(
    "price",
    [
        Price(Decimal("0.00000000000001"), "USD", 1),
        Price(Decimal("1E+10"), "USD", 1),
        Price(Decimal(1), "USD", 10**13 + 1),
        Price(Decimal("-0"), "USD", 1),
    ],
    ids=str,
)
def test_a_price_that_python_made_is_recorded_exactly(price: Price) -> None:
    far = make_far()
    embed(far, ["a"], price=price)
    assert [record.price for record in read(far)] == [price]


@pytest.mark.parametrize("since", [1e20, math.inf])
def test_a_time_that_no_date_can_have_finds_no_records(since: float) -> None:
    far = make_far()
    embed(far, ["a"])
    assert read(far, since) == []


def test_a_tier_that_stores_no_record_is_asked_once_when_the_cache_is_closed() -> None:
    far = make_far(max_batch=1)
    tried = []
    store = far.set_many

    def set_many(items: Any, ttl: float | None) -> None:
        if any(key.startswith(recording.SAVINGS_PREFIX) for key in items):
            tried.append(len(items))
            raise TimeoutError
        store(items, ttl)

    far.set_many = set_many  # type: ignore[method-assign]
    with Cache(CountingProvider(), [Tier(far, name="far")]) as cache:
        for model in ("one", "two", "three"):
            cache.for_provider(CountingProvider(model=model)).embed("a")
    assert tried == [1]


@pytest.mark.parametrize("key", ["20990101", "20990101.a", "20990101.a.b.c", "2099.a.b", "20991399.a.b", "x.y.z", ""])
def test_other_keys_are_left_out(key: str) -> None:
    far = make_far()
    whole = SAVINGS_PREFIX + key
    far._store[whole] = (encode_frames({whole: Entry(freeze(()), 1.0, None, GOOD)})[whole], None)
    far._store[f"{whole}z"] = (b"not a frame", None)
    assert read(far) == []


def test_a_group_is_a_tier_a_model_a_namespace_or_a_day() -> None:
    def record(day: str, model: str, namespace: str, tokens: int) -> SavingsRecord:
        saved = {"far": Work(1, tokens)}
        return SavingsRecord(day, "s", "p", "x", model, "", "v1", namespace, Work(2, 2 * tokens), saved)

    records = [record("2026-01-02", "m", "", 1), record("2026-01-01", "n", "a", 10), record("2026-01-02", "n", "", 100)]

    def sums(by: Any) -> dict[str, tuple[int, int]]:
        return {name: (one.computed.tokens, one.saved.tokens) for name, one in group_savings(records, by).items()}

    assert sums("model") == {"n": (220, 110), "m": (2, 1)}
    assert sums("namespace") == {"": (202, 101), "a": (20, 10)}
    assert list(sums("day").items()) == [("2026-01-01", (20, 10)), ("2026-01-02", (202, 101))]
    assert sums("tier") == {"far": (0, 111), "provider": (222, 0)}


def _work_in_child(cache: Cache) -> None:
    cache.embed_batch(["bb", "ccc"])
    cache.close()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
def test_a_forked_child_records_only_its_own_work(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    with Cache(CountingProvider(), [MemoryBackend(), DiskBackend(path=tmp_path)]) as cache:
        cache.embed_batch(["a", "bb"])
        child = fork.Process(target=_work_in_child, args=(cache,))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        cache.embed("a")
        records = cache.savings().records
    assert len({record.process for record in records}) == len(records) == 2
    sums = add_up(records)
    assert (sums.computed.texts, sums.saved.texts) == (3, 2)


def test_work_at_two_prices_in_one_space_is_paid_at_its_own_price() -> None:
    far = make_far()
    with Cache(CountingProvider(), [MemoryBackend(), Tier(far, name="far")], price="1 USD / 1 token") as cache:
        cache.embed("aa")
        spent = cache.stats().spent["USD"]
        dearer = cache.for_provider(CountingProvider(), price="100 USD / 1 token")
        dearer.embed_batch(["bb"])
        dearer.embed_batch(["aa"])
        unpriced = cache.for_provider(CountingProvider())
        unpriced.embed_batch(["cc"])
        unpriced.embed("cc")
        cache.embed_batch(["aa"])
        stats = cache.stats()
        (space,) = stats.spaces.values()
        assert (stats.spent["USD"], stats.money_saved["USD"]) == (101 * spent, 101 * spent)
        assert [part.price and part.price.amount for part in space.split_prices()] == [1, 100, None]
        assert sum((part.computed for part in space.parts), Work()) == space.computed == stats.computed
        assert stats.saved.texts == 3
        cache.savings()
    records = read(far)
    total = add_up(records)
    assert (total.spent["USD"], total.money_saved["USD"]) == (101 * spent, 101 * spent)
    assert (total.computed, total.saved) == (stats.computed, stats.saved)
    assert len(list_keys(far)) == len(records) == 3


@pytest.mark.parametrize(("flush_timeout", "records"), [(5.0, 0), (0.0, 1)])
def test_a_cache_that_is_closed_after_the_time_of_the_exit_is_used_up_records_nothing(
    flush_timeout: float, records: int
) -> None:
    far = make_far()
    cache = Cache(CountingProvider(), [Tier(far, name="far", write="inline")], flush_timeout=flush_timeout)
    cache.embed("a")
    cache._chain.close(0.0)
    assert len(list_keys(far)) == records
