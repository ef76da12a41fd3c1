"""The state machine of the backend contract: a backend is a dict, whatever is done to it in whatever order.

The keys are few, so that the calls meet: a machine that draws from many finds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import settings as Settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from embedonce.contracts import Backend

from .values import values_for

TTLS = (10.0, 100.0)
STEPS = (7.0, 70.0)
"""Sums of steps never meet an end of a ttl: at that very moment both answers are right."""


def run_as_a_dict(
    make: Callable[[], Backend],
    *,
    reopen: Callable[[Any], Backend] | None,
    advance: Callable[[float], None] | None,
    keys: Sequence[str],
    prefixes: Sequence[str],
    dimensions: Sequence[int],
    settings: Settings,
) -> None:
    """Try random sequences of calls against a dict, and raise at the first that ends otherwise."""
    some_keys = st.lists(st.sampled_from(keys), max_size=len(keys) + 1)
    some_items = st.dictionaries(st.sampled_from(keys), st.integers(0, 7), max_size=len(keys))

    class AsADict(RuleBasedStateMachine):
        """Samples stand for values: the model holds their seeds, and when each expires."""

        def __init__(self) -> None:
            super().__init__()
            self.backend: Any = make()
            self.values = values_for(self.backend.capabilities.holds, dimensions)
            self.model: dict[str, tuple[int, float | None]] = {}
            self.now = 0.0

        def has(self, capability: str) -> bool:
            return bool(getattr(self.backend.capabilities, capability))

        def held(self) -> dict[str, int]:
            """Return what the model holds now."""
            return {key: seed for key, (seed, ends) in self.model.items() if ends is None or ends > self.now}

        def listed(self, prefix: str) -> tuple[set[str], set[str]]:
            """Return the keys that must be listed, and with them those that may be: expired, space not freed yet."""
            there = {key for key in self.held() if key.startswith(prefix)}
            return there, {key for key in self.model if key.startswith(prefix)}

        def items(self, seeds: dict[str, int]) -> dict[str, Any]:
            return {key: self.values.sample(seed) for key, seed in seeds.items()}

        @rule(seeds=some_items)
        def set_many(self, seeds: dict[str, int]) -> None:
            self.backend.set_many(self.items(seeds), None)
            self.model |= {key: (seed, None) for key, seed in seeds.items()}

        @rule(asked=some_keys)
        def get_many(self, asked: list[str]) -> None:
            found = self.backend.get_many(asked)
            expected = {key: seed for key, seed in self.held().items() if key in asked}
            assert set(found) == set(expected), f"{len(found)} of {len(expected)} keys come back"
            for key, seed in expected.items():
                assert self.values.same(found[key], self.values.sample(seed)), "another value comes back"

        @precondition(lambda self: self.has("get"))
        @rule(key=st.sampled_from(keys))
        def get(self, key: str) -> None:
            seed = self.held().get(key)
            found = self.backend.get(key)
            same = found is None if seed is None else self.values.same(found, self.values.sample(seed))
            assert same, "get returns something else than was stored"

        @precondition(lambda self: self.has("delete"))
        @rule(gone=some_keys)
        def delete_many(self, gone: list[str]) -> None:
            self.backend.delete_many(gone)
            for key in gone:
                self.model.pop(key, None)

        @precondition(lambda self: self.has("add"))
        @rule(seeds=some_items)
        def add_many(self, seeds: dict[str, int]) -> None:
            absent = {key: seed for key, seed in seeds.items() if key not in self.held()}
            assert set(self.backend.add_many(self.items(seeds), None)) == set(absent), "add_many adds other keys"
            self.model |= {key: (seed, None) for key, seed in absent.items()}

        @precondition(lambda self: self.has("scan"))
        @rule(prefix=st.sampled_from(prefixes))
        def scan(self, prefix: str) -> None:
            there, perhaps = self.listed(prefix)
            assert there <= set(self.backend.scan(prefix)) <= perhaps, "scan finds other keys than are there"

        @precondition(lambda self: self.has("count"))
        @rule(prefix=st.sampled_from(prefixes))
        def count(self, prefix: str) -> None:
            there, perhaps = self.listed(prefix)
            assert len(there) <= self.backend.count(prefix) <= len(perhaps), "count says another number than is there"

        @precondition(lambda self: self.has("ttl") and advance is not None)
        @rule(seeds=some_items, ttl=st.sampled_from(TTLS))
        def set_many_for_a_time(self, seeds: dict[str, int], ttl: float) -> None:
            self.backend.set_many(self.items(seeds), ttl)
            self.model |= {key: (seed, self.now + ttl) for key, seed in seeds.items()}

        @precondition(lambda self: self.has("ttl") and advance is not None)
        @rule(seconds=st.sampled_from(STEPS))
        def time_passes(self, seconds: float) -> None:
            if advance is not None:
                advance(seconds)
                self.now += seconds

        @precondition(lambda self: reopen is not None and self.backend.capabilities.scope != "process")
        @rule()
        def open_again(self) -> None:
            if reopen is not None:
                self.backend.close()
                self.backend = reopen(self.backend)

        def teardown(self) -> None:
            self.backend.close()

    run_state_machine_as_test(AsADict, settings=settings)
