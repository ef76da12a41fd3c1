"""However many requests and workers there are, a budget is exceeded by at most one call per worker."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from budget_calls import fetch_within_budget
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import LONG_TIMEOUT

from embedonce import Cache, Tier
from embedonce.config import Tenant
from embedonce.contracts import Embedded, Limits
from embedonce.keys import VectorSpace
from embedonce.testing.fakes import DictBackend
from embedonce_server.tenants.budgets import BudgetExceeded, Budgets

NOON = 20_000.5 * 86_400


class StatusError(Exception):
    status_code = 400


class HostileProvider:
    """Charges from nothing up to ten times of what is estimated, and fails now and then.

    It refuses requests with many texts, so that they are sent in parts.
    """

    def __init__(self, seed: int, failures: float) -> None:
        self.limits = Limits(max_batch=6, concurrency=2)
        self.random = random.Random(seed)
        self.takes = self.random.choice([1, 3, 6])
        self.failures = failures
        self.factors = self.random.choice([[0.0, 0.5, 1.0, 1.0, 10.0], [10.0]])
        self.charged = 0
        self.largest = 0

    def space(self, task: str) -> VectorSpace:
        return VectorSpace(provider="hostile", model="m", dimensions=2)

    async def aembed(self, texts: Sequence[str], task: str) -> Embedded:
        for _ in range(self.random.randrange(12)):
            await asyncio.sleep(0)
        if self.random.random() < self.failures:
            raise ConnectionResetError
        if len(texts) > self.takes:
            raise StatusError
        factor = self.random.choice(self.factors)
        tokens = [int(factor * -(-len(text) // 4)) for text in texts]
        self.charged += sum(tokens)
        self.largest = max(self.largest, sum(tokens))
        return Embedded(np.ones((len(texts), 2), np.float32), tokens=tokens)

    def close(self) -> None:
        pass


class Simulation:
    """Workers of one host with random requests, some of which are cancelled, and workers that are killed."""

    def __init__(self, path: Path, seed: int, budget: int, *, workers: int, failures: float, kills: bool) -> None:
        self.path = path
        self.random = random.Random(seed)
        self.provider = HostileProvider(seed, failures)
        self.tenant = Tenant(name="search", keys=(), namespace="search", tokens_per_day=budget)
        self.workers = [self.start(number) for number in range(1, workers + 1)]
        self.kills = kills
        self.answered = self.refused = 0

    def start(self, number: int) -> Budgets:
        return Budgets(self.path, number, lambda: NOON)

    async def run(self, requests: int) -> None:
        async with AsyncExitStack() as stack:
            store = DictBackend()
            coalesce = self.random.choice([None, 0.001])
            tiers = [[Tier(DictBackend(store=store), name="shared")] for _ in self.workers]
            caches = [await stack.enter_async_context(Cache(self.provider, own, coalesce=coalesce)) for own in tiers]
            running: list[asyncio.Task[None]] = []
            for _ in range(requests):
                worker = self.random.randrange(len(self.workers))
                running.append(asyncio.create_task(self.request(self.workers[worker], caches[worker])))
                for _ in range(self.random.randrange(20)):
                    await asyncio.sleep(0)
                if self.random.random() < 0.1:
                    self.random.choice(running).cancel()
                if self.kills and self.random.random() < 0.05:
                    self.kill(worker)
            await asyncio.gather(*running, return_exceptions=True)
            for worker in self.workers:
                await worker.drain()
            usage = (await self.workers[0].read_usage([self.tenant]))["search"]
        for worker in self.workers:
            worker.close()
        assert usage.reserved == 0
        assert self.provider.charged <= usage.limit + len(self.workers) * self.provider.largest
        if self.kills:
            assert usage.used >= self.provider.charged
        else:
            assert usage.used == self.provider.charged

    async def request(self, worker: Budgets, cache: Cache) -> None:
        texts = [
            f"{self.random.randrange(10_000):{self.random.randrange(5, 200)}}"
            for _ in range(self.random.randrange(1, 12))
        ]
        try:
            answer = await fetch_within_budget(worker, self.tenant, cache, texts, "document")
            assert all((row is None) == (i in answer.failed) for i, row in enumerate(answer.rows))
            self.answered += 1
        except BudgetExceeded:
            self.refused += 1

    def kill(self, number: int) -> None:
        """End a worker in the middle of its requests, and start its successor. It reserves and settles nothing more."""
        self.workers[number]._thread.shutdown()
        self.workers[number] = self.start(number + 1)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    budget=st.integers(0, 8_000),
    workers=st.integers(1, 3),
    failures=st.sampled_from([0.0, 0.2]),
    kills=st.booleans(),
)
def test_a_budget_is_exceeded_by_at_most_one_call_per_worker(
    tmp_path_factory: pytest.TempPathFactory, seed: int, budget: int, workers: int, failures: float, kills: bool
) -> None:
    path = tmp_path_factory.mktemp("budgets") / "budgets.db"
    asyncio.run(Simulation(path, seed, budget, workers=workers, failures=failures, kills=kills).run(25))


async def test_a_budget_is_used_up_before_requests_are_refused(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path / "budgets.db", 1, 5000, workers=2, failures=0.0, kills=False)
    await simulation.run(100)
    assert simulation.refused > 0
    assert simulation.provider.charged > 5000 * 0.9


async def test_a_call_that_is_cut_into_many_exceeds_the_budget_by_one_of_them(tmp_path: Path) -> None:
    provider = HostileProvider(0, 0.0)
    provider.limits, provider.takes, provider.factors = Limits(max_batch=256), 4, [20.0]
    tenant = Tenant(name="search", keys=(), namespace="", tokens_per_day=1000)
    with closing(Budgets(tmp_path / "budgets.db", 1, lambda: NOON)) as worker:
        async with Cache(provider, [Tier(DictBackend(), name="memory")]) as cache:
            texts = [f"t{i:03}" for i in range(400)]
            with pytest.raises(BudgetExceeded):
                await fetch_within_budget(worker, tenant, cache, texts, "document")
            assert 900 < provider.charged <= 1000 + provider.largest
            assert provider.largest == 80
            assert sum(row is not None for row in cache.lookup(texts).rows) == provider.charged // 20
            assert (await worker.read_usage([tenant]))["search"][:2] == (provider.charged, 0)


_PROCESS = """
import asyncio, json, random, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_budget_bounds import Simulation

simulation = Simulation(Path(sys.argv[1]), int(sys.argv[2]), 30_000, workers=0, failures=0.0, kills=False)
worker = simulation.start(int(sys.argv[2]))

async def main():
    from embedonce import Cache
    async with Cache(simulation.provider) as cache:
        await asyncio.gather(*(simulation.request(worker, cache) for _ in range(150)))

print("ready", flush=True)
sys.stdin.readline()
asyncio.run(main())
worker.close()
print(json.dumps([simulation.provider.charged, simulation.provider.largest, simulation.refused]))
"""


async def test_two_processes_share_a_budget(tmp_path: Path) -> None:
    path = tmp_path / "budgets.db"
    command = [sys.executable, "-c", _PROCESS, str(path)]
    paths = [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]  # for patience.py
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    processes = [subprocess.Popen([*command, str(number), str(Path(__file__).parent)], **pipes) for number in (1, 2)]
    with processes[0], processes[1]:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        results = [json.loads(process.communicate(timeout=LONG_TIMEOUT)[0]) for process in processes]
    charged = sum(result[0] for result in results)
    assert 30_000 * 0.9 < charged <= 30_000 + sum(result[1] for result in results)
    assert all(result[2] > 0 for result in results)
    with closing(Budgets(path, 3, lambda: NOON)) as worker:
        usage = await worker.read_usage([Tenant(name="search", keys=(), namespace="", tokens_per_day=30_000)])
        assert usage["search"][:2] == (charged, 0)
