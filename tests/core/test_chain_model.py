"""A chain of any tiers behaves like a dict. Hypothesis searches for a sequence of calls that shows a difference."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from embedonce import Cache, EraseIncomplete, KeyPolicy, Tier
from embedonce.keys import SAVINGS_PREFIX
from embedonce.testing.fakes import CountingProvider, DictBackend
from embedonce.testing.faults import Fault, FaultyBackend, FaultyProvider, ProviderFault
from embedonce_backends.memory import MemoryBackend

TEXTS = [f"text {i}" for i in range(6)]
texts = st.lists(st.sampled_from(TEXTS), max_size=8)
tasks = st.sampled_from(["document", "query"])
tiers = st.lists(
    st.fixed_dictionaries(
        {
            "kind": st.sampled_from(["memory", "frames", "entries", "twin"]),
            "write": st.sampled_from(["inline", "background", "none"]),
            "ttl": st.sampled_from([None, 10.0, 1000.0]),
            "max_batch": st.sampled_from([None, 1, 3]),
        }
    ),
    min_size=1,
    max_size=4,
)
FAULTS = [
    Fault("raise", probability=0.5),
    Fault("refuse", on="set"),
    Fault("corrupt", probability=0.5),
    Fault("truncate"),
    Fault("partial", probability=0.5),
    Fault("unasked"),
    Fault("none_for_miss"),
]


class Chain(RuleBasedStateMachine):
    """A cache over random tiers, with one provider and one clock. The entries stay when the cache is opened again."""

    @initialize(layout=tiers, dtype=st.sampled_from(["float32", "float16", "int8"]), symmetric=st.booleans())
    def compose(self, layout: list[dict[str, Any]], dtype: Any, symmetric: bool) -> None:
        self.now = 1_700_000_000.0
        self.layout = layout
        self.dtype = dtype
        self.inner = CountingProvider(dimensions=4, symmetric=symmetric, max_batch=3)
        self.provider = FaultyProvider(self.inner)
        self.stores = [
            DictBackend(
                holds="entries" if tier["kind"] == "entries" else "frames",
                scope="host",
                twin=tier["kind"] == "twin",
                max_batch=tier["max_batch"],
                clock=lambda: self.now,
            )
            for tier in layout
        ]
        self.faulty = False
        self.answers: dict[tuple[str, str], np.ndarray] = {}
        self.open()

    def open(self) -> None:
        self.backends = [
            MemoryBackend(max_entries=4)
            if tier["kind"] == "memory"
            else FaultyBackend(
                DictBackend(
                    holds=store.capabilities.holds,
                    scope="host",
                    twin=tier["kind"] == "twin",
                    max_batch=tier["max_batch"],
                    clock=lambda: self.now,
                    store=store,
                )
            )
            for tier, store in zip(self.layout, self.stores, strict=True)
        ]
        chain = [
            Tier(backend, name=f"tier{i}", ttl=tier["ttl"], write=tier["write"])
            for i, (tier, backend) in enumerate(zip(self.layout, self.backends, strict=True))
        ]
        # The clock of the stores moves only between calls. So a lease that an earlier cache has left in a store does
        # not expire while a call waits for it, and the wait must be short.
        self.cache = Cache(
            self.provider,
            chain,
            key=KeyPolicy(normalize=["strip"]),
            dtype=self.dtype,
            max_wait=0.02,
            clock=lambda: self.now,
        )

    def check(self, asked: list[str], task: str, rows: Any) -> None:
        assert len(rows) == len(asked)
        for text, row in zip(asked, rows, strict=True):
            if row is None:
                continue
            right = self.inner.vector_of(text, task)
            tolerance = {"float32": 0.0, "float16": 1e-3, "int8": 1e-2}[self.dtype]
            assert np.abs(row - right).max() <= tolerance, f"{text!r} got the vector of a different text"
            first = self.answers.setdefault((text, task), np.array(row))
            assert (row == first).all(), "the vector of a text has changed"

    @rule(asked=texts, task=tasks, asynchronous=st.booleans())
    def embed(self, asked: list[str], task: str, asynchronous: bool) -> None:
        if asynchronous:
            rows = asyncio.run(self.cache.aembed_batch(asked, task))
        else:
            rows = self.cache.embed_batch(asked, task)
        self.check(asked, task, rows)

    @rule(text=st.sampled_from(TEXTS), task=tasks, padding=st.sampled_from(["", " ", "\n"]))
    def embed_one(self, text: str, task: str, padding: str) -> None:
        self.check([text], task, [self.cache.embed(padding + text + padding, task)])

    @rule(asked=texts, task=tasks, store=st.booleans(), asynchronous=st.booleans())
    def fetch(self, asked: list[str], task: str, store: bool, asynchronous: bool) -> None:
        call = self.cache.afetch if asynchronous else self.cache.fetch
        fetched: Any = call(asked, task, store=store)
        if asynchronous:
            fetched = asyncio.run(fetched)
        assert not fetched.failed
        self.check(asked, task, fetched.rows)

    @rule(asked=texts, task=tasks)
    def lookup(self, asked: list[str], task: str) -> None:
        before = self.provider.count.total()
        found = self.cache.lookup(asked, task)
        assert self.provider.count.total() == before
        assert [row is None for row in found.rows] == [source is None for source in found.sources]
        self.check(asked, task, found.rows)

    @rule(asked=texts, task=tasks)
    def a_provider_that_fails_at_random(self, asked: list[str], task: str) -> None:
        self.provider.faults.append(ProviderFault("raise", probability=0.5))
        fetched = self.cache.fetch(asked, task)
        self.provider.faults.clear()
        assert all((row is None) == (i in fetched.failed) for i, row in enumerate(fetched.rows))
        self.check(asked, task, fetched.rows)

    @rule(asked=st.lists(st.sampled_from(TEXTS), min_size=1, max_size=4), task=tasks)
    def put(self, asked: list[str], task: str) -> None:
        self.cache.put(asked, np.stack([self.inner.vector_of(text, task) for text in asked]), task)

    @rule(asked=texts, asynchronous=st.booleans())
    def forget(self, asked: list[str], asynchronous: bool) -> None:
        try:
            if asynchronous:
                asyncio.run(self.cache.aforget(asked))
            else:
                self.cache.forget(asked)
        except EraseIncomplete:
            assert self.faulty
        else:
            for task in ("document", "query"):
                assert self.cache.lookup(asked, task).sources == [None] * len(asked)

    @rule(tier=st.integers(0, 3), fault=st.sampled_from(FAULTS))
    def break_a_tier(self, tier: int, fault: Fault) -> None:
        backend = self.backends[tier % len(self.backends)]
        if isinstance(backend, FaultyBackend):
            backend.faults.append(fault)
            self.faulty = True

    @rule()
    def heal(self) -> None:
        for backend in self.backends:
            if isinstance(backend, FaultyBackend):
                backend.heal()

    @rule(tier=st.integers(0, 3), which=st.integers(0, 2**16 - 1))
    def evict(self, tier: int, which: int) -> None:
        store = self.stores[tier % len(self.stores)]
        for i, key in enumerate(sorted(store.scan(""))):
            if which >> i & 1:
                store.delete_many([key])
        self.faulty = True  # a text may be embedded again

    @rule(seconds=st.sampled_from([0.5, 9.8, 11.0, 2000.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.faulty = True

    @rule()
    def restart(self) -> None:
        self.heal()
        self.cache.close()
        self.faulty = self.faulty or all(tier["kind"] == "memory" or tier["write"] == "none" for tier in self.layout)
        self.open()

    @precondition(lambda self: not self.faulty)
    @rule(asked=texts, task=tasks)
    def purge_everything(self, asked: list[str], task: str) -> None:
        self.cache.embed_batch(asked, task)
        self.cache.purge(model="counting")
        assert self.cache.lookup(asked, task).sources == [None] * len(asked)
        keys = [key for store in self.stores for key in store.scan("")]
        assert all(key.startswith(SAVINGS_PREFIX) for key in keys)

    @invariant()
    def no_call_is_left_in_flight(self) -> None:
        if hasattr(self, "cache"):
            assert not self.cache._chain.in_flight._calls
            assert not self.cache._chain.in_flight._reading

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.heal()
            self.cache.close()


@pytest.mark.slow
def test_a_chain_behaves_like_a_dict() -> None:
    run_state_machine_as_test(
        Chain,
        settings=settings(
            max_examples=100, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
