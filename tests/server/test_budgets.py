"""A tenant's misses cost at most its tokens of the day, and its hits cost nothing."""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from budget_calls import fetch_within_budget
from patience import LONG_TIMEOUT, wait_until_async

from embedonce import Cache, Tier, TierError
from embedonce.config import Tenant
from embedonce.contracts import Embedded, Limits, note_lost_request
from embedonce.drift import DriftGuard
from embedonce.errors import DriftError, ProviderTimeout, TextRefused
from embedonce.keys import VectorSpace
from embedonce.testing.fakes import CountingProvider, DictBackend
from embedonce.testing.faults import Fault, FaultyBackend
from embedonce_server.tenants import budget_file, budgets
from embedonce_server.tenants.budget_file import recover_budgets
from embedonce_server.tenants.budgets import BudgetExceeded, Budgets, BudgetsUnavailable

DAY = 86_400
NOON = 20_000 * DAY + DAY / 2


class Clock:
    def __init__(self, now: float = NOON) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class PaidProvider:
    """Charges ``charge(text)`` tokens for each text. A call waits while ``gate`` is not set."""

    def __init__(
        self,
        charge: Callable[[str], int | None] = len,
        *,
        max_batch: int = 4,
        exact: Callable[[str], int] | None = None,
        model: str = "paid",
        concurrency: int = 4,
    ) -> None:
        self.limits = Limits(max_batch=max_batch, concurrency=concurrency)
        self.charge = charge
        self.model = model
        self.calls: list[list[str]] = []
        self.charged: list[int] = []
        """Tokens of each call that has ended."""
        self.error: Exception | None = None
        self.lost = 0
        """Number of attempts of each call that get no answer in time."""
        self.errors: dict[str, Exception] = {}
        """Error of each text that fails alone."""
        self.served: str | None = None
        """Name of the model according to the answers."""
        self.value = float(len(model))
        """Each number of each vector."""
        self.row: list[float] | None = None
        """Each vector, if it is not of that number."""
        self.gate = asyncio.Event()
        self.gate.set()
        self.at_once = self.most_at_once = 0
        if exact is not None:
            self.count_exact_tokens = lambda texts, task: [exact(text) for text in texts]

    def space(self, task: str) -> VectorSpace:
        return VectorSpace(provider="paid", model=self.model, dimensions=4)

    async def aembed(self, texts: Sequence[str], task: str) -> Embedded:
        self.calls.append(list(texts))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await self.gate.wait()
            for _ in range(self.lost):
                note_lost_request()
            for error in [self.error, *map(self.errors.get, texts)]:
                if error is not None:
                    raise error
        finally:
            self.at_once -= 1
        tokens = [self.charge(text) for text in texts]
        self.charged.append(sum(number or 0 for number in tokens))
        row = [self.value] * 4 if self.row is None else self.row
        return Embedded(np.array([row] * len(texts), np.float32), tokens=tokens, model=self.served)

    def close(self) -> None:
        pass


def make_tenant(tokens: int | None, name: str = "search") -> Tenant:
    return Tenant(name=name, keys=(), namespace=name, tokens_per_day=tokens)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "budgets.db"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def worker(path: Path, clock: Clock) -> Iterator[Budgets]:
    with closing(Budgets(path, 1, clock)) as worker:
        yield worker


async def read_used(worker: Budgets, tenant: Tenant) -> tuple[int, int]:
    usage = (await worker.read_usage([tenant]))[tenant.name]
    assert usage.limit == tenant.tokens_per_day
    return usage.used, usage.reserved


def open_cache(provider: Any, **options: Any) -> Cache:
    return Cache(provider, [Tier(DictBackend(), name="memory")], **options)


async def learn_charges(worker: Budgets, cache: Cache) -> None:
    """Let a call of another tenant show what the model charges. Before that, each worker makes one call at a time."""
    await fetch_within_budget(worker, make_tenant(1000, "earlier"), cache, ["e" * 400], "document")


def cancel_all_tasks() -> None:
    """Do what happens when the event loop ends."""
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()


# --- counting -------------------------------------------------------------------------------------


async def test_misses_cost_what_the_provider_charges_and_hits_cost_nothing(worker: Budgets) -> None:
    tenant, provider = make_tenant(1000), PaidProvider()
    async with open_cache(provider) as cache:
        first = await fetch_within_budget(worker, tenant, cache, ["aaa", "bb", "aaa"], "document")
        assert first.sources == ["provider"] * 3
        assert first.computed.texts == 2
        assert await read_used(worker, tenant) == (5, 0)
        second = await fetch_within_budget(worker, tenant, cache, ["bb", "c", "aaa", "c"], "document")
        assert second.sources == ["memory", "provider", "memory", "provider"]
        assert (second.computed.tokens, second.saved.tokens) == (1, 5)
        assert await read_used(worker, tenant) == (6, 0)
        assert (await fetch_within_budget(worker, tenant, cache, ["c"], "document")).sources == ["memory"]
        assert await read_used(worker, tenant) == (6, 0)
        assert provider.calls == [["aaa", "bb"], ["c"]]


async def test_the_answer_is_that_of_the_cache(worker: Budgets) -> None:
    texts = ["a", "bb", "bad", "a", "ccc", "\ud800", "refused", "bb"]
    provider = CountingProvider(max_batch=2)

    def charge(found: Any) -> Any:
        def embed(texts: Sequence[str], task: str) -> Embedded:
            if "refused" in texts:
                raise TextRefused("refused", [list(texts).index("refused")])
            return provider._embed(texts, task)

        return embed

    provider.embed = charge(provider)
    for known in ([], ["a"], ["bb", "ccc"]):
        for tokens in (10_000, 60):  # everything at once, and call by call
            tenant = make_tenant(tokens, f"tenant-{len(known)}-{tokens}")
            async with open_cache(provider) as one, open_cache(provider) as two:
                for cache in (one, two):
                    await cache.aembed_batch(known)
                expected = await one.afetch(texts)
                answer = await fetch_within_budget(worker, tenant, two, texts, "document")
            assert answer.sources == expected.sources
            assert [None if row is None else row.tobytes() for row in answer.rows] == [
                None if row is None else row.tobytes() for row in expected.rows
            ]
            assert list(answer.failed) == list(expected.failed)
            assert list(map(str, answer.failed.values())) == list(map(str, expected.failed.values()))
            assert answer.failed[6].positions == (6,)  # type: ignore[attr-defined]
            assert answer.failed[5].position == 5  # type: ignore[attr-defined]
            assert (answer.space, answer.dimensions) == (expected.space, expected.dimensions)
            assert answer.computed[:2] == expected.computed[:2]
            assert answer.saved[:2] == expected.saved[:2]
            assert (await read_used(worker, tenant)) == (expected.computed.tokens, 0)


async def test_with_fresh_every_text_costs(worker: Budgets) -> None:
    tenant, provider = make_tenant(1000), PaidProvider()
    async with open_cache(provider) as cache:
        await fetch_within_budget(worker, tenant, cache, ["aaa"], "document")
        provider.value = -1.0
        answer = await fetch_within_budget(worker, tenant, cache, ["bb", "aaa", "bb"], "document", fresh=True)
        assert answer.sources == ["provider"] * 3
        assert answer.computed.tokens == 5
        assert answer.changed == {1}
        assert await read_used(worker, tenant) == (8, 0)


async def test_without_store_nothing_is_stored_and_the_tokens_count(worker: Budgets) -> None:
    tenant, provider = make_tenant(1000), PaidProvider()
    async with open_cache(provider) as cache:
        for _ in range(2):
            await fetch_within_budget(worker, tenant, cache, ["aaa"], "document", store=False)
        assert await read_used(worker, tenant) == (6, 0)


async def test_a_provider_that_reports_no_tokens_is_charged_what_is_estimated(worker: Budgets) -> None:
    tenant = make_tenant(1000)
    async with open_cache(PaidProvider(lambda text: None)) as cache:
        await fetch_within_budget(worker, tenant, cache, ["x" * 400], "document")
    assert await read_used(worker, tenant) == (100, 0)
    counted = PaidProvider(lambda text: None, exact=lambda text: 7, model="other")
    async with open_cache(counted) as cache:
        await fetch_within_budget(worker, tenant, cache, ["x" * 400, "y"], "document")
    assert await read_used(worker, tenant) == (114, 0)


async def test_estimates_follow_the_tokens_that_earlier_texts_have_cost(worker: Budgets) -> None:
    provider = PaidProvider(lambda text: len(text) // 10)
    tenant = make_tenant(1_000_000)
    async with open_cache(provider) as cache:
        await fetch_within_budget(worker, tenant, cache, ["x" * 50_000], "document")
        provider.gate.clear()
        request = asyncio.create_task(fetch_within_budget(worker, tenant, cache, ["y" * 10_000], "document"))
        await wait_until_async(lambda: len(provider.calls) == 2)
        used, reserved = await read_used(worker, tenant)
        assert used == 5000
        assert 1000 <= reserved <= 1200
        provider.gate.set()
        await request
    assert await read_used(worker, tenant) == (6000, 0)


@pytest.mark.parametrize(
    ("error", "used"),
    [
        (ConnectionRefusedError(), 0),
        (TextRefused("too long"), 0),
        (ProviderTimeout("too slow"), 25),
        (type("APITimeoutError", (Exception,), {})(), 25),
        (type("ConnectTimeout", (Exception,), {})(), 0),
        (type("StatusError", (Exception,), {"status_code": 500})(), 0),
        (type("GatewayTimeout", (Exception,), {"status_code": 504})(), 0),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_a_failed_call_costs_its_estimate_only_if_the_provider_may_have_charged_it(
    worker: Budgets, error: Exception, used: int
) -> None:
    tenant, provider = make_tenant(1000), PaidProvider()
    provider.error = error
    async with open_cache(provider) as cache:
        answer = await fetch_within_budget(worker, tenant, cache, ["x" * 100], "document")
    assert list(answer.failed) == [0]
    assert await read_used(worker, tenant) == (used, 0)


async def test_an_answer_of_another_model_costs_what_it_reports(worker: Budgets) -> None:
    tenant, provider = make_tenant(1000), PaidProvider()
    provider.served = "first"
    async with open_cache(provider) as cache:
        await fetch_within_budget(worker, tenant, cache, ["a"], "document")
        provider.served = "second"
        answer = await fetch_within_budget(worker, tenant, cache, ["x" * 100], "document")
    assert isinstance(answer.failed[0], DriftError)
    assert await read_used(worker, tenant) == (101, 0)


@pytest.mark.parametrize("row", [[0.0, 0.0, 0.0, 0.0], [1.0]], ids=["invalid", "short"])
async def test_refused_answers_cost_what_they_report_and_later_estimates_follow_them(
    worker: Budgets, row: list[float]
) -> None:
    tenant, provider = make_tenant(5000), PaidProvider(lambda text: 1000)
    provider.row = row
    async with open_cache(provider) as cache:
        for i in range(5):
            answer = await fetch_within_budget(worker, tenant, cache, [f"text {i}"], "document")
            assert list(answer.failed) == [0]
            assert await read_used(worker, tenant) == (1000 * (i + 1), 0)
        with pytest.raises(BudgetExceeded):
            await fetch_within_budget(worker, tenant, cache, ["another text"], "document")
        provider.gate.clear()
        more = make_tenant(10_000_000)
        request = asyncio.create_task(fetch_within_budget(worker, more, cache, ["x" * 6000], "document"))
        await wait_until_async(lambda: provider.at_once == 1)
        assert (await read_used(worker, more))[1] > 2000  # without these answers, 1,500
        provider.gate.set()
        await request
    assert sum(provider.charged) == 6000


async def test_each_attempt_that_timed_out_costs_what_the_answered_one_reports(worker: Budgets) -> None:
    tenant, provider = make_tenant(1_000_000), PaidProvider(lambda text: len(text) // 4)
    provider.lost = 2
    async with open_cache(provider) as cache:
        answer = await fetch_within_budget(worker, tenant, cache, ["x" * 40_000], "document")
        assert (answer.computed.tokens, answer.wasted.tokens) == (10_000, 20_000)
        assert await read_used(worker, tenant) == (30_000, 0)
        # The attempts say nothing about the tokens per byte of one call.
        provider.gate.clear()
        request = asyncio.create_task(fetch_within_budget(worker, tenant, cache, ["y" * 4000], "document"))
        await wait_until_async(lambda: provider.at_once == 1)
        assert (await read_used(worker, tenant))[1] == 1000
        provider.gate.set()
        await request


async def test_each_attempt_that_timed_out_costs_its_estimate_if_none_was_answered(worker: Budgets) -> None:
    tenant, provider = make_tenant(1000), PaidProvider()
    provider.lost, provider.error = 4, type("APITimeoutError", (Exception,), {})()
    async with open_cache(provider) as cache:
        await fetch_within_budget(worker, tenant, cache, ["x" * 100], "document")
    assert await read_used(worker, tenant) == (100, 0)


async def test_calls_that_share_a_request_share_what_it_wasted(worker: Budgets) -> None:
    tenants, provider = [make_tenant(10_000, name) for name in ("one", "two")], PaidProvider(lambda text: 100)
    provider.lost, provider.row = 2, [0.0] * 4
    async with open_cache(provider, coalesce=1.0) as cache:
        await asyncio.gather(
            *(
                fetch_within_budget(worker, tenant, cache, [f"{tenant.name} {i}" for i in range(2)], "document")
                for tenant in tenants
            )
        )
        assert len(provider.calls[0]) == 4
        used = [(await read_used(worker, tenant))[0] for tenant in tenants]
    assert used[0] == used[1]
    assert sum(used) == 3 * sum(provider.charged), "each call had two attempts more"


async def test_a_text_that_was_not_sent_costs_nothing(worker: Budgets) -> None:
    tenant, provider = make_tenant(1000), PaidProvider()
    guard = DriftGuard(action="refuse", every=DAY)
    memory, clock = DictBackend(), Clock()
    async with Cache(provider, [memory], drift=guard, clock=clock) as cache:
        await fetch_within_budget(worker, tenant, cache, ["a"], "document")
        used = await read_used(worker, tenant)
        provider.value, clock.now = -1.0, NOON + 2 * DAY
        await cache.afetch(["b"])  # this call finds the drift
        calls = len(provider.calls)
        answer = await fetch_within_budget(worker, tenant, cache, ["x" * 100], "document")
        assert isinstance(answer.failed[0], DriftError)
        assert len(provider.calls) == calls
        assert await read_used(worker, tenant) == used


async def test_what_a_tier_fails_to_store_costs_what_the_provider_charges(worker: Budgets) -> None:
    tenant = make_tenant(1000)
    backend = FaultyBackend(DictBackend(), [Fault("raise", on="set")])
    async with Cache(PaidProvider(), [Tier(backend, name="memory", on_error="raise")]) as cache:
        with pytest.raises(TierError):
            await fetch_within_budget(worker, tenant, cache, ["x" * 100], "document")
    assert await read_used(worker, tenant) == (100, 0)


@pytest.mark.parametrize("action", ["warn", "new-space"])
async def test_a_request_reads_each_tier_once_and_is_counted_once(worker: Budgets, action: Any) -> None:
    slow = FaultyBackend(DictBackend())
    tiers = [Tier(DictBackend(), name="memory"), Tier(slow, name="slow", lease="off")]
    guard, clock = DriftGuard(action=action, every=DAY), Clock()
    async with Cache(PaidProvider(), tiers, drift=guard, clock=clock) as cache:
        tenant = make_tenant(10_000)
        await fetch_within_budget(worker, tenant, cache, ["known"], "document")
        before, reads = cache.stats(), slow.called("get")
        await fetch_within_budget(worker, tenant, cache, ["known", "a", "b", "a"], "document")
        after = cache.stats()
        assert slow.called("get") - reads == 1
        assert after.tiers["memory"].hits - before.tiers["memory"].hits == 1
        assert [after.tiers[name].misses - before.tiers[name].misses for name in ("memory", "slow")] == [2, 2]
        assert (after.requested - before.requested, after.found - before.found) == (3, 1)
        assert after.computed.texts - before.computed.texts == 2


# --- the end of the budget ------------------------------------------------------------------------


async def test_beyond_the_budget_misses_are_refused_until_the_next_day_and_hits_are_answered(
    worker: Budgets, clock: Clock
) -> None:
    tenant, provider = make_tenant(100), PaidProvider()
    async with open_cache(provider) as cache:
        await fetch_within_budget(worker, tenant, cache, ["x" * 100], "document")
        with pytest.raises(BudgetExceeded) as caught:
            await fetch_within_budget(worker, tenant, cache, ["x" * 100, "y"], "document")
        assert (caught.value.status, caught.value.retry_after) == (429, DAY / 2)
        assert caught.value.headers == {"retry-after": str(DAY // 2), "x-should-retry": "false"}
        assert 'tenant "search" has 0 tokens left' in str(caught.value)
        assert (await fetch_within_budget(worker, tenant, cache, ["x" * 100], "document")).sources == ["memory"]
        clock.now += DAY / 2 - 1
        with pytest.raises(BudgetExceeded):
            await fetch_within_budget(worker, tenant, cache, ["y"], "document")
        clock.now += 1
        await fetch_within_budget(worker, tenant, cache, ["y"], "document")
        assert await read_used(worker, tenant) == (1, 0)
        clock.now -= 1  # the clock was set back: the tokens of that day are still used
        with pytest.raises(BudgetExceeded):
            await fetch_within_budget(worker, tenant, cache, ["z"], "document")


async def test_a_budget_of_zero_has_hits_only(worker: Budgets) -> None:
    async with open_cache(PaidProvider(exact=lambda text: 0)) as cache:
        await cache.aembed("known")
        answer = await fetch_within_budget(worker, make_tenant(0), cache, ["known"], "document")
        assert answer.sources == ["memory"]
        with pytest.raises(BudgetExceeded):
            await fetch_within_budget(worker, make_tenant(0), cache, ["new"], "document")


async def test_a_long_request_keeps_what_the_budget_was_enough_for(worker: Budgets) -> None:
    tenant, provider = make_tenant(1000), PaidProvider()
    texts = [f"{i:0100}" for i in range(20)]
    async with open_cache(provider) as cache:
        with pytest.raises(BudgetExceeded):
            await fetch_within_budget(worker, tenant, cache, texts, "document")
        used, reserved = await read_used(worker, tenant)
        assert used == sum(provider.charged)
        assert reserved == 0
        assert 600 <= used <= 1000 + 400
        assert provider.most_at_once == 1
        stored = await cache.alookup(texts)
        assert sum(row is not None for row in stored.rows) == used // 100


async def test_a_first_call_that_does_not_fit_is_refused_before_anything_is_sent(worker: Budgets) -> None:
    provider = PaidProvider(exact=len)
    async with open_cache(provider) as cache:
        with pytest.raises(BudgetExceeded):
            await fetch_within_budget(worker, make_tenant(100), cache, ["x" * 101], "document")
        assert provider.calls == []
        await fetch_within_budget(worker, make_tenant(100), cache, ["x" * 100], "document")


async def test_far_from_the_end_of_the_budget_requests_run_at_the_same_time(worker: Budgets) -> None:
    tenant, provider = make_tenant(10_000_000), PaidProvider()
    async with open_cache(provider) as cache:
        await learn_charges(worker, cache)
        provider.gate.clear()
        requests = [
            asyncio.create_task(fetch_within_budget(worker, tenant, cache, [f"{i}-{j}" for j in range(8)], "document"))
            for i in range(8)
        ]
        await wait_until_async(lambda: provider.at_once == 16)
        provider.gate.set()
        await asyncio.gather(*requests)


async def test_near_the_end_of_the_budget_a_worker_makes_one_call_at_a_time(worker: Budgets, path: Path) -> None:
    tenant, provider = make_tenant(2000), PaidProvider(lambda text: 900)
    async with open_cache(provider) as cache:
        await learn_charges(worker, cache)
        provider.gate.clear()
        requests = [
            asyncio.create_task(fetch_within_budget(worker, tenant, cache, [f"{i:0600}"], "document")) for i in range(9)
        ]
        await wait_until_async(lambda: provider.at_once == 1)
        with closing(Budgets(path, 2, worker._file._clock)) as other:
            more = asyncio.create_task(fetch_within_budget(other, tenant, cache, ["x" * 600], "document"))
            await wait_until_async(lambda: provider.at_once == 2)
            provider.gate.set()
            results = await asyncio.gather(more, *requests, return_exceptions=True)
            await other.drain()
        assert provider.most_at_once == 2
        refused = [result for result in results if isinstance(result, BudgetExceeded)]
        charged = provider.charged[1:]
        assert len(refused) + len(charged) == 10
        assert 2000 - 900 < sum(charged) <= 2000 + 2 * 900
    assert await read_used(worker, tenant) == (sum(charged), 0)


async def test_a_request_that_calls_under_way_may_leave_no_tokens_for_waits_for_them(worker: Budgets) -> None:
    tenant, provider = make_tenant(2000), PaidProvider(lambda text: 10)
    async with open_cache(provider) as cache:
        await learn_charges(worker, cache)
        provider.gate.clear()
        free = asyncio.create_task(fetch_within_budget(worker, tenant, cache, ["x" * 480], "document"))
        await wait_until_async(lambda: provider.at_once == 1)
        waiting = asyncio.create_task(fetch_within_budget(worker, tenant, cache, ["y" * 480], "document"))
        turn = worker.get_turn("search")
        await wait_until_async(lambda: turn.is_waiting)
        assert provider.at_once == 1
        provider.gate.set()
        await asyncio.gather(free, waiting)
    assert not turn.is_waiting
    assert await read_used(worker, tenant) == (20, 0)


async def test_a_request_that_waits_for_too_long_is_to_be_repeated_soon(
    worker: Budgets, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant, provider = make_tenant(2000), PaidProvider(lambda text: 10)
    async with open_cache(provider) as cache:
        await learn_charges(worker, cache)
        provider.gate.clear()
        free = asyncio.create_task(fetch_within_budget(worker, tenant, cache, ["x" * 480], "document"))
        await wait_until_async(lambda: provider.at_once == 1)
        monkeypatch.setattr(budgets, "MAX_WAIT", 0.02)
        with pytest.raises(BudgetExceeded) as caught:
            await fetch_within_budget(worker, tenant, cache, ["y" * 480], "document")
        assert caught.value.headers == {"retry-after": "5"}
        async with worker.get_turn("search").lock:
            with pytest.raises(BudgetExceeded):
                await fetch_within_budget(worker, tenant, cache, ["y" * 480], "document")
        provider.gate.set()
        await free


async def test_a_provider_that_is_down_is_asked_once_for_each_call(worker: Budgets) -> None:
    provider = PaidProvider(max_batch=2)
    provider.error = ConnectionRefusedError()
    async with open_cache(provider) as cache:
        answer = await fetch_within_budget(worker, make_tenant(300), cache, list("abcdefgh"), "document")
    assert sorted(answer.failed) == list(range(8))
    assert provider.calls == [["a", "b"], ["c", "d"], ["e", "f"], ["g", "h"]]
    assert provider.most_at_once == 1


@pytest.mark.parametrize(
    "error",
    [TextRefused("too long", [0]), type("BadRequestError", (Exception,), {"status_code": 400})(), ValueError()],
    ids=lambda error: type(error).__name__,
)
async def test_a_text_that_fails_alone_does_not_fail_the_texts_of_later_calls(
    worker: Budgets, error: Exception
) -> None:
    provider = PaidProvider(lambda text: 1, max_batch=1)
    provider.errors["bad"] = error
    async with open_cache(provider) as cache:
        answer = await fetch_within_budget(worker, make_tenant(60), cache, ["bad", "a", "b"], "document")
    assert list(answer.failed) == [0]
    assert answer.sources == [None, "provider", "provider"]


async def test_calls_stay_within_the_limits_of_the_provider(worker: Budgets) -> None:
    provider = PaidProvider(lambda text: 1, max_batch=3)
    provider.limits = Limits(max_batch=3, max_tokens=10)
    provider.count_tokens = len  # type: ignore[attr-defined]
    async with open_cache(provider) as cache:
        await fetch_within_budget(worker, make_tenant(60), cache, ["aaaa", "b", "cccccc", "d", "e", "f"], "document")
    assert provider.calls == [["aaaa", "b"], ["cccccc", "d", "e"], ["f"]]


# --- models whose charges are unknown --------------------------------------------------------------


async def test_until_a_call_has_shown_what_a_model_charges_each_worker_makes_one_call_at_a_time(
    worker: Budgets, path: Path
) -> None:
    tenant, provider = make_tenant(10_000), PaidProvider(lambda text: 10_000)
    provider.gate.clear()
    async with open_cache(provider) as cache:
        with closing(Budgets(path, 2, worker._file._clock)) as other:
            requests = [
                asyncio.create_task(fetch_within_budget(budgets, tenant, cache, [f"text {i}"], "document"))
                for i, budgets in enumerate([worker, other] * 6)
            ]
            await wait_until_async(lambda: provider.at_once == 2)
            provider.gate.set()
            results = await asyncio.gather(*requests, return_exceptions=True)
            await other.drain()
    assert provider.most_at_once == 2
    assert sum(isinstance(result, BudgetExceeded) for result in results) == 10
    assert sum(provider.charged) == 20_000


async def test_a_long_request_to_a_model_whose_charges_are_unknown_is_sent_call_by_call(worker: Budgets) -> None:
    tenant, provider = make_tenant(100_000), PaidProvider(lambda text: 10_000, max_batch=4)
    async with open_cache(provider) as cache:
        with pytest.raises(BudgetExceeded):
            await fetch_within_budget(worker, tenant, cache, [f"text {i}" for i in range(100)], "document")
    assert provider.most_at_once == 1
    assert sum(provider.charged) <= 100_000 + 40_000


@pytest.mark.parametrize("tokens", [5, None], ids=["reported", "unreported"])
async def test_what_a_model_charges_is_known_after_one_call_even_after_a_restart(
    path: Path, clock: Clock, tokens: int | None
) -> None:
    tenant, provider = make_tenant(1_000_000), PaidProvider(lambda text: tokens)
    async with open_cache(provider) as cache:
        with closing(Budgets(path, 1, clock)) as worker:
            await learn_charges(worker, cache)
        provider.gate.clear()
        with closing(Budgets(path, 1, clock)) as worker:
            requests = [
                asyncio.create_task(fetch_within_budget(worker, tenant, cache, [f"{i}"], "document")) for i in range(5)
            ]
            await wait_until_async(lambda: provider.at_once == 5)
            provider.gate.set()
            await asyncio.gather(*requests)


# --- several spaces -------------------------------------------------------------------------------


async def test_an_answer_never_mixes_the_vectors_of_the_provider_and_of_its_fallback(worker: Budgets) -> None:
    tenant = make_tenant(10_000)
    provider, fallback = PaidProvider(), PaidProvider(lambda text: 50, model="fallback")
    async with open_cache(provider, fallback=fallback) as cache:
        await fetch_within_budget(worker, tenant, cache, ["a"], "document")
        provider.error = ConnectionRefusedError()
        answer = await fetch_within_budget(worker, tenant, cache, ["a", "b"], "document")
        assert answer.space.model == "fallback"
        assert [row[0] for row in answer.rows if row is not None] == [8.0, 8.0]
        assert answer.computed.tokens == 100
        assert await read_used(worker, tenant) == (101, 0)


async def test_the_fallback_is_asked_only_within_the_budget(worker: Budgets) -> None:
    tenant = make_tenant(25)
    provider, fallback = PaidProvider(), PaidProvider(model="fallback", exact=len)
    provider.error = ProviderTimeout("too slow")
    async with open_cache(provider, fallback=fallback) as cache:
        with pytest.raises(BudgetExceeded):  # the lost call of the first provider may be charged
            await fetch_within_budget(worker, tenant, cache, ["x" * 90], "document")
        assert await read_used(worker, tenant) == (23, 0)
        provider.error = ConnectionRefusedError()
        answer = await fetch_within_budget(worker, tenant, cache, ["x", "y"], "document")
        assert answer.space.model == "fallback"
        with pytest.raises(BudgetExceeded):
            await fetch_within_budget(worker, tenant, cache, ["z"], "document")
    assert fallback.calls == [["x", "y"]]
    assert await read_used(worker, tenant) == (25, 0)


async def test_a_request_for_a_text_that_a_refused_request_was_to_compute_is_answered(worker: Budgets) -> None:
    poor, rich, provider = make_tenant(5, "poor"), make_tenant(1000, "rich"), PaidProvider()
    async with open_cache(provider) as cache:  # as if both tenants had the same namespace
        reserve = worker.reserve
        reached, go = asyncio.Event(), asyncio.Event()

        async def reserve_slowly(tenant: Tenant, *args: Any, **options: Any) -> Any:
            if tenant is poor:
                reached.set()
                await go.wait()
            return await reserve(tenant, *args, **options)

        worker.reserve = reserve_slowly  # type: ignore[method-assign]
        refused = asyncio.create_task(fetch_within_budget(worker, poor, cache, ["x" * 100], "document"))
        await reached.wait()
        others = [
            asyncio.create_task(fetch_within_budget(worker, rich, cache, ["x" * 100], "document")),
            asyncio.create_task(cache.afetch(["x" * 100])),
        ]
        flights = cache._chain.in_flight._flights
        await wait_until_async(lambda: any(flight._future is not None for flight in flights.values()))
        go.set()
        with pytest.raises(BudgetExceeded):
            await refused
        for other in others:
            assert not (await other).failed
    assert provider.calls == [["x" * 100]]
    assert await read_used(worker, poor) == (0, 0)


async def test_the_calls_of_one_request_wait_for_each_other_without_a_limit(
    worker: Budgets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgets, "MAX_WAIT", 0.0)
    provider = PaidProvider(max_batch=1)
    async with open_cache(provider) as cache:
        await fetch_within_budget(worker, make_tenant(60), cache, ["a", "b", "c", "d"], "document")
    assert provider.most_at_once == 1


# --- cancelled requests, and workers that end -----------------------------------------------------


async def test_a_cancelled_request_is_settled_by_what_happens_afterwards(worker: Budgets) -> None:
    tenant, provider = make_tenant(10_000), PaidProvider()
    provider.gate.clear()
    async with open_cache(provider) as cache:
        request = asyncio.create_task(fetch_within_budget(worker, tenant, cache, ["aaa"], "document"))
        await wait_until_async(lambda: provider.at_once == 1)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        assert (await read_used(worker, tenant))[1] > 0
        provider.gate.set()
        await worker.drain()
        assert await read_used(worker, tenant) == (3, 0)
        assert (await cache.alookup(["aaa"])).sources == ["memory"]


async def test_a_cancelled_request_starts_no_more_calls(worker: Budgets) -> None:
    tenant, provider = make_tenant(100), PaidProvider(max_batch=1)
    async with open_cache(provider) as cache:
        await learn_charges(worker, cache)
        provider.gate.clear()
        requests = [
            asyncio.create_task(fetch_within_budget(worker, tenant, cache, [f"{i}a", f"{i}b"], "document"))
            for i in range(3)
        ]
        await wait_until_async(lambda: provider.at_once == 2)  # one whose upper bound fits, and one in turn
        for request in requests:
            request.cancel()
        await asyncio.gather(*requests, return_exceptions=True)
        started = len(provider.calls)
        provider.gate.set()
        await worker.drain()
        assert len(provider.calls) == started
        assert await read_used(worker, tenant) == (sum(provider.charged[1:]), 0)
        await fetch_within_budget(worker, tenant, cache, ["c"], "document")


async def test_a_client_that_goes_while_tokens_are_reserved_costs_nothing(worker: Budgets) -> None:
    tenant, provider = make_tenant(1000), PaidProvider()
    async with open_cache(provider) as cache:
        reserve = worker.reserve
        reached, go = asyncio.Event(), asyncio.Event()

        async def reserve_slowly(*args: Any, **options: Any) -> Any:
            outcome = await reserve(*args, **options)
            reached.set()
            await go.wait()
            return outcome

        worker.reserve = reserve_slowly  # type: ignore[method-assign]
        request = asyncio.create_task(fetch_within_budget(worker, tenant, cache, ["aaa"], "document"))
        await reached.wait()
        request.cancel()
        with suppress(asyncio.CancelledError):
            await request
        go.set()
        await worker.drain()
    assert provider.calls == []
    assert await read_used(worker, tenant) == (0, 0)


async def test_what_a_dead_worker_had_reserved_counts_as_used(path: Path, clock: Clock, worker: Budgets) -> None:
    tenant, provider = make_tenant(10_000), PaidProvider()
    provider.gate.clear()
    async with open_cache(provider) as cache:
        dead = Budgets(path, 2, clock)
        request = asyncio.create_task(fetch_within_budget(dead, tenant, cache, ["x" * 100], "document"))
        await wait_until_async(lambda: provider.at_once == 1)
        assert await read_used(worker, tenant) == (0, 25)
        await worker.recover(2)
        # The upper bound counts, because nobody knows what the provider charges.
        assert await read_used(worker, tenant) == (464, 0)
        # If the worker still lives, its settlement corrects that.
        provider.gate.set()
        await request
        dead.close()
        assert await read_used(worker, tenant) == (100, 0)


async def test_a_worker_that_starts_recovers_its_predecessor(path: Path, clock: Clock) -> None:
    tenant, provider = make_tenant(10_000), PaidProvider()
    provider.gate.clear()
    async with open_cache(provider) as cache:
        with closing(Budgets(path, 1, clock)) as worker:
            running = asyncio.create_task(fetch_within_budget(worker, tenant, cache, ["x" * 100], "document"))
            await wait_until_async(lambda: provider.at_once == 1)
            cancel_all_tasks()
            with pytest.raises(asyncio.CancelledError):
                await running
        with closing(Budgets(path, 1, clock)) as worker:
            assert await read_used(worker, tenant) == (464, 0)
        provider.gate.set()


async def test_a_server_that_starts_counts_what_all_workers_before_it_have_reserved(path: Path, clock: Clock) -> None:
    tenant, provider = make_tenant(10_000), PaidProvider()
    recover_budgets(path, clock)
    assert not path.exists()
    async with open_cache(provider) as cache:
        workers = [Budgets(path, number, clock) for number in (1, 2, 3)]
        provider.gate.clear()
        for number, dead in enumerate(workers, 1):
            running = asyncio.create_task(fetch_within_budget(dead, tenant, cache, [f"{number:0100}"], "document"))
            await wait_until_async(lambda number=number: len(provider.calls) == number)  # type: ignore[misc]
            cancel_all_tasks()
            with pytest.raises(asyncio.CancelledError):
                await running
        with closing(Budgets(path, 1, clock)) as worker:
            assert await read_used(worker, tenant) == (464, 50)
        recover_budgets(path, clock)
        with closing(Budgets(path, 1, clock)) as worker:
            assert await read_used(worker, tenant) == (3 * 464, 0)
        provider.gate.set()
        for dead in workers:
            dead.close()


def test_a_server_starts_although_the_budgets_cannot_be_recovered(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.mkdir()
    recover_budgets(path)
    assert "cannot be counted" in caplog.text


async def test_usage_lasts_after_a_restart(path: Path, clock: Clock) -> None:
    tenant = make_tenant(1000)
    for number in (1, 2):
        with closing(Budgets(path, 1, clock)) as worker:
            async with open_cache(PaidProvider()) as cache:
                await fetch_within_budget(worker, tenant, cache, ["xxx"], "document")
                assert await read_used(worker, tenant) == (3 * number, 0)


async def test_tokens_belong_to_the_day_on_which_they_were_reserved(worker: Budgets, clock: Clock) -> None:
    tenant, provider = make_tenant(1000), PaidProvider()
    provider.gate.clear()
    async with open_cache(provider) as cache:
        request = asyncio.create_task(fetch_within_budget(worker, tenant, cache, ["xxx"], "document"))
        await wait_until_async(lambda: provider.at_once == 1)
        clock.now += DAY / 2
        provider.gate.set()
        await request
        assert await read_used(worker, tenant) == (0, 0)
        clock.now -= DAY / 2
        assert await read_used(worker, tenant) == (3, 0)


async def test_a_reload_that_changes_or_renames_a_tenant_keeps_what_its_name_has_used(worker: Budgets) -> None:
    async with open_cache(PaidProvider()) as cache:
        await fetch_within_budget(worker, make_tenant(1000), cache, ["x" * 100], "document")
        with pytest.raises(BudgetExceeded):
            await fetch_within_budget(worker, make_tenant(100), cache, ["y"], "document")
        await fetch_within_budget(worker, make_tenant(200), cache, ["y"], "document")
        await fetch_within_budget(worker, make_tenant(100, "renamed"), cache, ["z"], "document")
    usage = await worker.read_usage([make_tenant(100), make_tenant(100, "renamed"), make_tenant(None, "free")])
    assert {name: one.used for name, one in usage.items()} == {"search": 101, "renamed": 1}


# --- failures of the file -------------------------------------------------------------------------


def break_by_lock(path: Path) -> Callable[[], None]:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    return connection.close


def break_by_content(path: Path) -> Callable[[], None]:
    for name in path.parent.iterdir():
        name.unlink()
    path.write_bytes(b"this is no database" * 1000)
    return path.unlink


def break_by_folder(path: Path) -> Callable[[], None]:
    for name in path.parent.iterdir():
        name.unlink()
    path.mkdir()
    return path.rmdir


def break_by_newer_version(path: Path) -> Callable[[], None]:
    for name in path.parent.iterdir():
        name.unlink()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    return path.unlink


@pytest.mark.parametrize("break_file", [break_by_lock, break_by_content, break_by_folder, break_by_newer_version])
async def test_without_the_file_misses_are_refused_and_hits_are_answered_until_the_file_is_back(
    worker: Budgets,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    break_file: Callable[[Path], Callable[[], None]],
) -> None:
    monkeypatch.setattr(budget_file, "BUSY_SECONDS", 0.01)
    tenant = make_tenant(1000)
    with closing(Budgets(path, 2, worker._file._clock)) as other:  # it has the short timeout
        async with open_cache(PaidProvider()) as cache:
            await fetch_within_budget(other, tenant, cache, ["known"], "document")
            mend = break_file(path)
            for _ in range(3):
                with pytest.raises(BudgetsUnavailable) as caught:
                    await fetch_within_budget(other, tenant, cache, ["known", "new"], "document")
                assert caught.value.status == 503
            with pytest.raises(BudgetsUnavailable):
                await other.read_usage([tenant])
            assert (await fetch_within_budget(other, tenant, cache, ["known"], "document")).sources == ["memory"]
            assert sum("budgets" in record.message for record in caplog.records) == 1
            mend()
            await fetch_within_budget(other, tenant, cache, ["new"], "document")


async def test_a_worker_starts_without_the_file(tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR), closing(Budgets(tmp_path / "missing" / "budgets.db", 1, clock)) as worker:
        assert len(caplog.records) == 1
        (tmp_path / "missing").mkdir()
        assert await read_used(worker, make_tenant(5)) == (0, 0)


async def test_a_call_that_cannot_be_settled_is_settled_with_the_next_use(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget_file, "BUSY_SECONDS", 0.01)
    tenant, provider = make_tenant(10_000), PaidProvider()
    provider.gate.clear()
    with closing(Budgets(path, 1, clock)) as worker:
        async with open_cache(provider) as cache:
            request = asyncio.create_task(fetch_within_budget(worker, tenant, cache, ["aaa"], "document"))
            await wait_until_async(lambda: provider.at_once == 1)
            mend = break_by_lock(path)
            provider.gate.set()
            assert (await request).sources == ["provider"]  # it is paid, so it is answered
            with pytest.raises(BudgetsUnavailable):
                await fetch_within_budget(worker, tenant, cache, ["b"], "document")
            mend()
            assert await read_used(worker, tenant) == (3, 0)


async def test_if_the_file_is_deleted_the_day_starts_anew_for_all_workers(
    worker: Budgets, path: Path, clock: Clock
) -> None:
    tenant, provider = make_tenant(1000), PaidProvider()
    with closing(Budgets(path, 2, clock)) as other:
        async with open_cache(provider) as cache:
            await fetch_within_budget(worker, tenant, cache, ["aaa"], "document")
            provider.gate.clear()
            request = asyncio.create_task(fetch_within_budget(worker, tenant, cache, ["bb"], "document"))
            await wait_until_async(lambda: provider.at_once == 1)
            for name in path.parent.iterdir():
                name.unlink()
            assert await read_used(other, tenant) == (0, 0)
            provider.gate.set()
            await request
            assert await read_used(worker, tenant) == (2, 0)
            assert await read_used(other, tenant) == (2, 0)


async def test_the_file_is_for_its_owner_only(worker: Budgets, path: Path) -> None:
    assert all(os.stat(name).st_mode & 0o777 == 0o600 for name in path.parent.iterdir())


async def test_after_closing_misses_are_refused(path: Path, clock: Clock) -> None:
    worker = Budgets(path, 1, clock)
    worker.close()
    worker.close()
    async with open_cache(PaidProvider()) as cache:
        with pytest.raises(BudgetsUnavailable):
            await asyncio.wait_for(fetch_within_budget(worker, make_tenant(5), cache, ["a"], "document"), LONG_TIMEOUT)
