"""A provider that reports a wrong number of tokens does not lock a tenant out, and does not slow others for long."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from budget_calls import fetch_within_budget
from patience import wait_until_async

from embedonce import Cache
from embedonce.config import Tenant
from embedonce.contracts import Embedded, Limits
from embedonce.keys import VectorSpace
from embedonce.testing.fakes import DictBackend
from embedonce_server.tenants.budgets import BudgetExceeded, Budgets

DAY = 86_400


class Clock:
    """A clock that the test moves. It begins at noon."""

    def __init__(self) -> None:
        self.now = 20_000.5 * DAY

    def __call__(self) -> float:
        return self.now


class LyingProvider:
    """Charges a token per 4 bytes, and reports ``lie`` for texts that begin with "lie". Calls wait for ``gate``."""

    def __init__(self, lie: int = 10**9) -> None:
        self.limits = Limits(max_batch=1, concurrency=8)
        self.lie = lie
        self.gate = asyncio.Event()
        self.gate.set()
        self.at_once = 0

    def space(self, task: str) -> VectorSpace:
        return VectorSpace(provider="lying", model="m", dimensions=2)

    async def aembed(self, texts: Sequence[str], task: str) -> Embedded:
        self.at_once += 1
        try:
            await self.gate.wait()
        finally:
            self.at_once -= 1
        tokens = [self.lie if text.startswith("lie") else -(-len(text) // 4) for text in texts]
        return Embedded(np.ones((len(texts), 2), np.float32), tokens=tokens)

    def close(self) -> None:
        pass


def make_tenant(tokens: int, name: str = "search") -> Tenant:
    return Tenant(name=name, keys=(), namespace=name, tokens_per_day=tokens)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def worker(tmp_path: Path, clock: Clock) -> Iterator[Budgets]:
    with closing(Budgets(tmp_path / "budgets.db", 1, clock)) as worker:
        yield worker


@pytest.mark.parametrize("lie", [10_000, 10**9, 2**40])
@pytest.mark.parametrize("lies", [1, 50])
async def test_a_tenant_that_was_charged_a_wrong_number_can_use_the_next_day(
    worker: Budgets, clock: Clock, lie: int, lies: int
) -> None:
    tenant, text = make_tenant(1000), "tea is ready " * 20
    async with Cache(LyingProvider(lie), [DictBackend()]) as cache:
        for i in range(lies):
            await fetch_within_budget(worker, make_tenant(2**60), cache, [f"lie {i}"], "document")
        with pytest.raises(BudgetExceeded):
            await fetch_within_budget(worker, tenant, cache, ["more"], "document")
        clock.now += DAY
        for i in range(3):
            await fetch_within_budget(worker, tenant, cache, [f"{i}"], "document")
        await fetch_within_budget(worker, tenant, cache, [text], "document")
        assert (await worker.read_usage([tenant]))["search"].used == 3 + len(text) // 4


async def test_estimates_forget_earlier_days(worker: Budgets, clock: Clock) -> None:
    provider, tenant, other = LyingProvider(lie=10_000), make_tenant(2**60), make_tenant(1000)
    async with Cache(provider, [DictBackend()]) as cache:
        for i in range(20):
            await fetch_within_budget(worker, tenant, cache, [f"lie {i:04000}"], "document")
        clock.now += DAY
        provider.gate.clear()
        reserved = []
        for day in range(3):
            task = asyncio.create_task(fetch_within_budget(worker, other, cache, [f"{day:0200}"], "document"))
            await wait_until_async(lambda: provider.at_once == 1)
            reserved.append((await worker.read_usage([other]))["search"].reserved)
            provider.gate.set()
            await task
            provider.gate.clear()
            clock.now += 2 * DAY
        assert reserved[0] > 200
        assert reserved == sorted(reserved, reverse=True)
        assert reserved[-1] <= 60
        provider.gate.set()


async def test_after_a_wrong_number_other_tenants_wait_for_one_call(worker: Budgets) -> None:
    provider, other = LyingProvider(), make_tenant(1_000_000, "other")
    async with Cache(provider, [DictBackend()]) as cache:
        await fetch_within_budget(worker, make_tenant(1000), cache, ["lie"], "document")
        provider.gate.clear()
        calls = [
            asyncio.create_task(fetch_within_budget(worker, other, cache, [f"text {i}"], "document")) for i in range(8)
        ]
        await wait_until_async(lambda: provider.at_once == 1)
        for _ in range(5):  # the others have time to find that the upper bound is not known
            await worker.read_usage([other])
        assert provider.at_once == 1
        provider.gate.set()
        await calls[0]
        provider.gate.clear()
        more = [
            asyncio.create_task(fetch_within_budget(worker, other, cache, [f"more {i}"], "document")) for i in range(8)
        ]
        await wait_until_async(lambda: provider.at_once >= 8)
        provider.gate.set()
        await asyncio.gather(*calls, *more)


async def test_a_model_that_charges_more_than_plausible_exceeds_a_budget_by_one_call(worker: Budgets) -> None:
    provider, tenant = LyingProvider(lie=100_000), make_tenant(1_050_000)
    async with Cache(provider, [DictBackend()]) as cache:
        with pytest.raises(BudgetExceeded):
            await fetch_within_budget(worker, tenant, cache, [f"lie {i}" for i in range(40)], "document")
    assert (await worker.read_usage([tenant]))["search"].used == 1_100_000
