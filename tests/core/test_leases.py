"""With leases, only one process embeds a missing text. If the lease tier fails, every process embeds the text."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
from patience import LONG_TIMEOUT, wait_until, wait_until_collected

import embedonce
import embedonce.config
from embedonce import Cache, ConfigError, Tier, TierError
from embedonce._engine import chain, leases
from embedonce._engine.leases import Leases, lease_key
from embedonce.keys import LEASE_PREFIX
from embedonce.testing.fakes import CountingProvider, DictBackend
from embedonce.testing.faults import Fault, FaultyBackend, FaultyProvider, ProviderFault
from embedonce_backends.memory import MemoryBackend
from embedonce_providers.ngram import NgramProvider


def open_two_caches(store: DictBackend, lease: float | None = LONG_TIMEOUT, **options: Any) -> tuple[Any, Any]:
    """Open two caches that share only a store, as two processes do."""

    def one() -> Any:
        provider = FaultyProvider(CountingProvider(max_batch=4))
        tier = Tier(DictBackend(store=store, scope="host"), name="shared", lease=lease)
        return provider, Cache(provider, [MemoryBackend(), tier], **options)

    return one(), one()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_follower_waits_for_the_vector_of_another_process(asynchronous: bool) -> None:
    (leader, one), (follower, other) = open_two_caches(DictBackend())
    leader.faults.append(ProviderFault("hang", calls={1}))
    with one, other, ThreadPoolExecutor(2) as pool:
        first = pool.submit(one.embed_batch, ["a", "b"])
        leader.gate.until(1)

        def follow() -> Any:
            if asynchronous:
                return asyncio.run(other.afetch(["b", "c", "a"]))
            return other.fetch(["b", "c", "a"])

        second = pool.submit(follow)
        wait_until(
            lambda: follower.count["c"]
        )  # the follower has embedded its own text, and now polls for the other texts
        assert not second.done()
        leader.release()
        fetched = second.result(LONG_TIMEOUT)
        assert fetched.sources == ["shared", "provider", "shared"]
        assert (fetched.rows[0] == first.result(LONG_TIMEOUT)[1]).all()
        assert other.lookup(["a"]).sources == ["memory"]
        assert dict(follower.count) == {"c": 1}
        assert other.stats().tiers["shared"].misses == 3


def test_when_the_leader_dies_a_follower_computes_once_its_lease_has_expired(monkeypatch: pytest.MonkeyPatch) -> None:
    store = DictBackend()
    (leader, one), (follower, other) = open_two_caches(store, lease=0.5)
    monkeypatch.setattr(Leases, "_start_thread", lambda _: None)  # a process that has died renews nothing
    leader.faults.append(ProviderFault("hang"))
    with one, other, ThreadPoolExecutor(2) as pool:
        pool.submit(one.embed, "a")
        leader.gate.until(1)
        assert (other.embed("a") == follower.inner.vector_of("a")).all()
        assert follower.count["a"] == 1
        leader.heal()


# --- renewing and removing ------------------------------------------------------------------------


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Renew leases of 60 s several times a second, so that a busy machine cannot make a lease expire."""
    monkeypatch.setattr(chain, "DEFAULT_LEASE_SECONDS", LONG_TIMEOUT)
    monkeypatch.setattr(leases, "RENEW_AFTER", 0.001)


def find_lease_end(store: DictBackend) -> float:
    """Return the latest time at which a lease in a store expires, or 0 if there is no lease."""
    with store._lock:
        return max((end or 0.0 for key, (_, end) in store._store.items() if key.startswith(LEASE_PREFIX)), default=0.0)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("lease", [None, LONG_TIMEOUT], ids=["default", "explicit"])
@pytest.mark.usefixtures("often")
def test_a_lease_is_renewed_while_the_provider_computes(lease: float | None, asynchronous: bool) -> None:
    store = DictBackend()
    (leader, one), (follower, other) = open_two_caches(store, lease=lease)
    leader.faults.append(ProviderFault("hang", calls={1}))
    with one, other, ThreadPoolExecutor(2) as pool:
        first = pool.submit(lambda: asyncio.run(one.aembed("a")) if asynchronous else one.embed("a"))
        leader.gate.until(1)
        second = pool.submit(other.embed, "a")
        for _ in range(2):
            end = find_lease_end(store)
            wait_until(lambda end=end: find_lease_end(store) > end)
        leader.release()
        assert (first.result(LONG_TIMEOUT) == second.result(LONG_TIMEOUT)).all()
        assert follower.count["a"] == 0
        wait_until(lambda: not one._chain.engine.leases._active)
        end = find_lease_end(store)
        wait_until(lambda: not one._chain.engine.leases._has_thread)
        assert find_lease_end(store) in (0.0, end), "the lease of a stored text is not renewed"


@pytest.mark.usefixtures("often")
def test_a_call_renews_only_what_is_still_to_compute() -> None:
    store = DictBackend()
    (leader, one), _ = open_two_caches(store)
    leader.faults.append(ProviderFault("hang", calls={2}))
    with one, ThreadPoolExecutor(1) as pool:
        call = pool.submit(one.embed_batch, [f"text {n}" for n in range(12)])
        leader.gate.until(1)
        end = find_lease_end(store)
        wait_until(lambda: find_lease_end(store) > end)
        renewed = [
            key for key, (_, until) in store._store.items() if key.startswith(LEASE_PREFIX) and (until or 0) > end
        ]
        assert len(renewed) == 4, "only the texts of the second of three chunks are renewed"
        assert len(one._chain.engine.leases._active) == 4
        leader.release()
        call.result(LONG_TIMEOUT)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_when_the_leaders_provider_fails_a_follower_goes_on(asynchronous: bool) -> None:
    """The lease is so long that the test fails if the follower waits for its end."""
    (leader, one), (follower, other) = open_two_caches(DictBackend(), lease=100 * LONG_TIMEOUT, max_wait=1e6)
    leader.faults.append(ProviderFault("raise"))
    with one, other:
        with pytest.raises(RuntimeError):
            asyncio.run(one.aembed("a")) if asynchronous else one.embed("a")
        assert (other.embed("a") == follower.inner.vector_of("a")).all()


class ReadOnlyStore(DictBackend):
    """Refuses entries, and accepts leases. It has a limit on the size of an entry, or raises an error."""

    def __init__(self, error: Exception | None, **options: Any) -> None:
        super().__init__(**options)
        self.error = error

    def set_many(self, items: Any, ttl: float | None, /) -> None:
        if self.error is not None and not all(key.startswith(LEASE_PREFIX) for key in items):
            raise self.error
        super().set_many(items, ttl)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("on_error", ["skip", "raise"])
@pytest.mark.parametrize("error", [OSError("full"), None], ids=["error", "too large"])
def test_a_follower_does_not_wait_for_a_vector_that_was_not_stored(
    error: Exception | None, on_error: Any, asynchronous: bool
) -> None:
    """The lease is so long that the test fails if the follower waits for its end."""
    store = DictBackend()

    def open_cache() -> Any:
        size = None if error is not None else 100
        backend = ReadOnlyStore(error, store=store, scope="host", max_value_bytes=size)
        tier = Tier(backend, name="shared", lease=100 * LONG_TIMEOUT, on_error=on_error)
        return Cache(CountingProvider(dimensions=64), [tier], max_wait=1e6)

    with open_cache() as one, open_cache() as other:
        for cache in (one, other):
            with suppress(TierError):
                asyncio.run(cache.aembed("a")) if asynchronous else cache.embed("a")
            assert cache.provider.count["a"] == 1
    assert find_lease_end(store) == 0.0


def test_closing_a_cache_removes_the_leases_of_texts_that_failed() -> None:
    store = DictBackend()
    (leader, one), _ = open_two_caches(store)
    leader.faults.append(ProviderFault("raise"))
    with one, pytest.raises(RuntimeError):
        one.embed("a")
    assert find_lease_end(store) == 0.0


def test_a_cancelled_call_whose_loop_ends_releases_its_leases() -> None:
    store = DictBackend()
    provider = CountingProvider(asynchronous=True)
    began = threading.Event()

    async def hang(texts: Any, task: Any) -> Any:
        began.set()
        await asyncio.sleep(LONG_TIMEOUT)

    provider.aembed = hang  # type: ignore[method-assign]
    _, (follower, other) = open_two_caches(store, max_wait=1e6)
    one = Cache(provider, [Tier(DictBackend(store=store, scope="host"), name="shared", lease=100 * LONG_TIMEOUT)])

    async def begin_and_leave() -> None:
        task = asyncio.create_task(one.aembed("a"))
        while not began.is_set():
            await asyncio.sleep(0.001)
        task.cancel()

    with one, other:
        asyncio.run(begin_and_leave())
        assert (other.embed("a") == follower.inner.vector_of("a")).all()


def test_ctrl_c_releases_the_leases_of_a_call() -> None:
    (leader, one), (follower, other) = open_two_caches(DictBackend(), lease=100 * LONG_TIMEOUT, max_wait=1e6)

    def interrupt(texts: Any, task: Any) -> Any:
        raise KeyboardInterrupt

    leader.inner.embed = interrupt
    with one, other:
        with pytest.raises(KeyboardInterrupt):
            one.embed("a")
        assert (other.embed("a") == follower.inner.vector_of("a")).all()


def test_a_lease_that_another_process_may_hold_is_neither_renewed_nor_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    store = DictBackend()
    (leader, one), _ = open_two_caches(store, lease=100.0)
    leader.faults.append(ProviderFault("hang"))
    monkeypatch.setattr(Leases, "_start_thread", lambda _: None)
    with one, ThreadPoolExecutor(1) as pool:
        call = pool.submit(one.embed, "a")
        leader.gate.until(1)
        active = one._chain.engine.leases._active
        ((key, lease),) = active.items()
        active[key] = lease._replace(since=lease.since - 71.0)
        store.set_many({lease_key(key): b"another process"}, 100.0)
        one._chain.engine.leases._tend()
        assert not active
        assert store.get(lease_key(key)) == b"another process"
        leader.heal()
        call.result(LONG_TIMEOUT)


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("fault", ["raise", "hang"])
def test_a_renewal_that_fails_does_not_fail_the_call(fault: Any) -> None:
    store = DictBackend()
    faulty = FaultyBackend(DictBackend(store=store, scope="network"), [])
    provider = FaultyProvider(CountingProvider(), [ProviderFault("hang", calls={1})])
    with (
        Cache(provider, [Tier(faulty, name="far")]) as cache,
        ThreadPoolExecutor(1) as pool,
    ):
        call = pool.submit(cache.embed, "a")
        provider.gate.until(1)
        faulty.faults.append(Fault(fault, on="set"))
        before = faulty.called("set")
        wait_until(lambda: faulty.called("set") >= before + (2 if fault == "raise" else 1))
        faulty.heal()
        provider.release()
        assert (call.result(LONG_TIMEOUT) == provider.inner.vector_of("a")).all()
        assert cache.stats().tiers["far"].errors == 0
        assert cache.lookup(["a"]).sources == ["far"]


def test_a_text_that_was_stored_after_a_slow_read_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process stores the vector between this process's read and its lease, and its own lease expires."""
    store = DictBackend()
    (leader, one), (follower, other) = open_two_caches(store)
    slow = other._chain.tiers[1]
    take = slow.add

    async def take_late(*args: Any) -> Any:
        one.embed("a")
        store.delete_many([key for key in store.scan(LEASE_PREFIX)])
        return await take(*args)

    monkeypatch.setattr(slow, "add", take_late)
    monkeypatch.setattr(Leases, "is_stale", lambda *_: True)
    with one, other:
        fetched = other.fetch(["a"])
        assert fetched.sources == ["shared"]
        assert (leader.count["a"], follower.count["a"]) == (1, 0)
        assert other.stats().found == 1


def test_a_cache_with_leases_can_be_garbage_collected() -> None:
    (_, one), _ = open_two_caches(DictBackend())
    one.embed("a")
    assert one._chain.engine.leases._has_thread
    found = ref(one._chain.engine.leases)
    one.close()
    del one, _
    wait_until_collected(found)


# --- which tier has the leases --------------------------------------------------------------------


def find_leasing_tier(tiers: Sequence[Tier], **options: Any) -> str | None:
    with Cache(CountingProvider(), tiers, **options) as cache:
        found = cache._chain.engine.leases
        name = None if found is None else found.tier.name
        assert [tier.name for tier in cache._chain.tiers if tier.lease] == [name for _ in [name] if name]
        return name


def process(**options: Any) -> Tier:
    return Tier(MemoryBackend(), name="process", **options)


def host(**options: Any) -> Tier:
    return Tier(DictBackend(scope="host"), **{"name": "host", **options})


def network(**options: Any) -> Tier:
    return Tier(DictBackend(scope="network"), **{"name": "network", **options})


@pytest.mark.parametrize(
    ("tiers", "expected"),
    [
        ([], None),
        ([process()], None),
        ([process(), host()], "host"),
        ([process(), host(), network()], "network"),
        ([network(), host()], "network"),
        ([network(), network(name="second")], "second"),
        ([host(), network(lease="off")], "host"),
        ([host(), network(write="background")], "host"),
        ([host(), network(write="none")], "host"),
        ([network(write="background")], None),
        ([host(write="none")], None),
        ([host(lease="off")], None),
        ([host(write="inline")], "host"),
        ([host(lease=9), network()], "host"),
        ([host(lease=9), network(lease="off")], "host"),
        ([host(), Tier(DictBackend(scope="network", add=False), name="cannot add")], "host"),
        ([host(), Tier(DictBackend(scope="network", ttl=False), name="cannot expire")], "host"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_one_tier_of_a_chain_has_leases_by_default(tiers: Sequence[Tier], expected: str | None) -> None:
    assert find_leasing_tier(tiers) == expected


def test_a_replay_takes_no_leases() -> None:
    assert find_leasing_tier([host()], mode="replay") is None


def test_a_tier_with_the_default_lease_is_written_inline() -> None:
    with Cache(CountingProvider(), [network(), network(name="second")]) as cache:
        assert [tier.writer.mode for tier in cache._chain.tiers] == ["background", "inline"]
    with Cache(CountingProvider(), [network(lease="off")]) as cache:
        assert [tier.writer.mode for tier in cache._chain.tiers] == ["background"]


@pytest.mark.parametrize(("lease", "taken"), [(None, 0), (60.0, 1)], ids=["default", "explicit"])
def test_a_provider_that_opts_out_takes_no_default_leases(lease: float | None, taken: int) -> None:
    backend = FaultyBackend(DictBackend(scope="network"), [])
    with Cache(NgramProvider(), [Tier(backend, name="far", lease=lease)]) as cache:
        cache.embed("a")
        assert backend.called("add") == taken
        counting = cache.for_provider(CountingProvider())
        counting.embed("a")
        assert backend.called("add") == taken + 1
        counting.fetch(["b"], store=False)
        assert backend.called("add") == taken + 1


@pytest.mark.parametrize(
    ("lease", "tier", "seconds"), [("", "disk", 2.5), ('lease = "off"', None, None), ('lease = "9s"', "disk", 9.0)]
)
def test_lease_in_toml(lease: str, tier: str | None, seconds: float | None, tmp_path: Path) -> None:
    file = tmp_path / "embedonce.toml"
    file.write_text(f'provider.type = "ngram"\n[[tiers]]\ntype = "disk"\npath = "d"\n{lease}\n')
    with embedonce.open(file) as cache:
        (found,) = cache._chain.tiers
        assert (found.name if cache._chain.engine.leases else None, found.lease) == (tier, seconds)


def test_lease_in_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDONCE__TIERS__DISK__LEASE", "off")
    table = {"provider": {"type": "ngram"}, "tiers": [{"type": "disk", "path": str(tmp_path / "d")}]}
    assert embedonce.config.load(table).tiers[0].lease == "off"
    monkeypatch.setenv("EMBEDONCE__TIERS__DISK__LEASE", "9s")
    assert embedonce.config.load(table).tiers[0].lease == 9.0


def test_waiting_for_another_process_has_a_limit() -> None:
    (leader, one), (follower, other) = open_two_caches(DictBackend(), max_wait=0.3)
    leader.faults.append(ProviderFault("hang"))
    with one, other, ThreadPoolExecutor(2) as pool:
        pool.submit(one.embed, "a")
        leader.gate.until(1)
        assert (other.embed("a") == follower.inner.vector_of("a")).all()
        leader.heal()


def test_a_cache_does_not_wait_for_its_own_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    store = DictBackend()
    (provider, one), _ = open_two_caches(store)
    with one:
        one.embed("a")
        one.forget(["a"])
        monkeypatch.setattr(Leases, "pauses", lambda *_: pytest.fail("the cache waits for its own lease"))
        one.embed("a")
        assert provider.count["a"] == 2


@pytest.mark.parametrize("ends", ["removed", "expired"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_call_takes_over_the_lease_of_a_failed_text_while_it_takes_other_leases(
    asynchronous: bool, ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the tier adds the lease of "b", the thread looks for leases to remove, and the lease of "a" may expire."""
    store = DictBackend()
    (leader, one), _ = open_two_caches(store)
    monkeypatch.setattr(Leases, "_start_thread", lambda _: None)  # the test does the work of the thread
    own, tier = one._chain.engine.leases, one._chain.tiers[1]
    leader.faults.append(ProviderFault("raise", calls={1}))
    with one:
        with pytest.raises(RuntimeError):
            one.embed("a")
        (key,) = own._active
        add, kept = tier.add, list[bool]()

        async def add_slowly(*args: Any) -> Any:
            if ends == "expired":
                own._held[key] = own._next_clearing = 0.0
                own._take_over_held({}, 1.0)
            own._tend()
            kept.append(store.get(lease_key(key)) is not None)
            return await add(*args)

        monkeypatch.setattr(tier, "add", add_slowly)
        fetched = asyncio.run(one.afetch(["a", "b"])) if asynchronous else one.fetch(["a", "b"])
        assert fetched.sources == ["provider", "provider"]
        assert kept == [True]
        assert not own._active


def test_forget_and_purge_remove_leases_too() -> None:
    store = DictBackend()
    (_, one), (provider, other) = open_two_caches(store)
    with one, other:
        one.embed_batch(["a", "b"])
        one.forget(["a"])
        other.embed("a")  # if the lease still existed, this call would wait for it
        assert provider.count["a"] == 1
        one.purge(version="v1")
        assert not list(store.scan(""))


@pytest.mark.parametrize("fault", [Fault("refuse"), Fault("raise", on="add"), Fault("hang", on="add")])
def test_every_process_computes_if_the_lease_tier_fails(fault: Fault) -> None:
    provider = CountingProvider()
    faulty = FaultyBackend(DictBackend(scope="network"), [fault])
    with Cache(provider, [Tier(faulty, name="shared", lease=LONG_TIMEOUT, timeout=0.2)]) as cache:
        assert (cache.embed("a") == provider.vector_of("a")).all()
        faulty.heal()


def test_a_tier_that_failed_in_a_call_is_not_asked_for_leases_in_that_call() -> None:
    provider = CountingProvider()
    faulty = FaultyBackend(DictBackend(scope="network"), [Fault("raise", on="get")])
    with Cache(provider, [Tier(faulty, name="shared", lease=LONG_TIMEOUT)]) as cache:
        assert (cache.embed("a") == provider.vector_of("a")).all()
        assert cache.stats().tiers["shared"].errors == 1
        faulty.heal()
        assert not list(faulty.inner.scan(""))


def test_batches_with_the_same_texts_in_opposite_order_in_two_processes_do_not_deadlock() -> None:
    for round_ in range(10):
        (_, one), (_, other) = open_two_caches(DictBackend())
        with one, other, ThreadPoolExecutor(2) as pool:
            a, b = [f"a{round_}", f"b{round_}"], [f"b{round_}", f"a{round_}"]
            futures = [pool.submit(one.embed_batch, a), pool.submit(other.embed_batch, b)]
            assert (futures[0].result(LONG_TIMEOUT) == futures[1].result(LONG_TIMEOUT)[::-1]).all()


def test_a_leases_key_has_the_form_of_a_key() -> None:
    key = "eo1." + "0" * 16 + "." + "f" * 64
    assert lease_key(key) == "eo1.lease." + "0" * 16 + "." + "f" * 64
    assert len(lease_key(key)) < 120


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        ([Tier(MemoryBackend(), lease=1.0)], "several processes share"),
        ([Tier(DictBackend(scope="host", add=False), lease=1.0)], "requires a backend with add_many"),
        ([Tier(DictBackend(scope="host"), lease=1.0, write="background")], 'requires write = "inline"'),
        (
            [Tier(DictBackend(scope="host"), name=name, lease=1.0) for name in ("a", "b")],
            "'a' and 'b' both have a lease",
        ),
        ([Tier(DictBackend(scope="host"), lease="on")], "above 0 or \"off\", got 'on'"),  # type: ignore[arg-type]
    ],
)
def test_a_lease_that_cannot_work_is_refused(tiers: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Cache(CountingProvider(), tiers)
