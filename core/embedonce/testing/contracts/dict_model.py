"""The state machine of the backend contract: after any sequence of calls, a backend must answer as a dict would.

The state machine uses only a few keys, so that different calls often use the same key. With many keys, two calls would
rarely use the same key, and the state machine would find no bugs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import settings as Settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from embedonce.contracts import Backend

from .values import make_values

TTLS = (10.0, 100.0)
STEPS = (7.0, 70.0)
"""Seconds to advance. At the exact end of a TTL, a read may hit or miss. No sum of these steps equals a TTL, so the
test never reads at that moment."""


def compare_with_dict(
    make: Callable[[], Backend],
    *,
    reopen: Callable[[Any], Backend] | None,
    advance: Callable[[float], None] | None,
    keys: Sequence[str],
    prefixes: Sequence[str],
    dimensions: Sequence[int],
    settings: Settings,
) -> None:
    """Run random sequences of calls on the backend and on a dict, and raise at the first difference."""
    some_keys = st.lists(st.sampled_from(keys), max_size=len(keys) + 1)
    some_items = st.dictionaries(st.sampled_from(keys), st.integers(0, 7), max_size=len(keys))

    class DictComparison(RuleBasedStateMachine):
        """Compares a backend with a dict. The dict holds the seed and the time of expiry of each stored sample."""

        def __init__(self) -> None:
            super().__init__()
            self.backend: Any = make()
            self.values = make_values(self.backend.capabilities.holds, dimensions)
            self.model: dict[str, tuple[int, float | None]] = {}
            self.now = 0.0

        def declares(self, capability: str) -> bool:
            return bool(getattr(self.backend.capabilities, capability))

        def get_live_seeds(self) -> dict[str, int]:
            """Return the seeds of the keys that have not expired."""
            return {key: seed for key, (seed, ends) in self.model.items() if ends is None or ends > self.now}

        def get_expected_listing(self, prefix: str) -> tuple[set[str], set[str]]:
            """Return the keys that must be in a listing, and all keys that may be in it, including expired keys."""
            there = {key for key in self.get_live_seeds() if key.startswith(prefix)}
            return there, {key for key in self.model if key.startswith(prefix)}

        def make_samples(self, seeds: dict[str, int]) -> dict[str, Any]:
            return {key: self.values.sample(seed) for key, seed in seeds.items()}

        @rule(seeds=some_items)
        def set_many(self, seeds: dict[str, int]) -> None:
            self.backend.set_many(self.make_samples(seeds), None)
            self.model |= {key: (seed, None) for key, seed in seeds.items()}

        @rule(asked=some_keys)
        def get_many(self, asked: list[str]) -> None:
            found = self.backend.get_many(asked)
            expected = {key: seed for key, seed in self.get_live_seeds().items() if key in asked}
            assert set(found) == set(expected), f"get_many returned {len(found)} keys, expected {len(expected)}"
            for key, seed in expected.items():
                assert self.values.is_equal(found[key], self.values.sample(seed)), "get_many returned a different value"

        @precondition(lambda self: self.declares("get"))
        @rule(key=st.sampled_from(keys))
        def get(self, key: str) -> None:
            seed = self.get_live_seeds().get(key)
            found = self.backend.get(key)
            same = found is None if seed is None else self.values.is_equal(found, self.values.sample(seed))
            assert same, "get returned something other than what was stored"

        @precondition(lambda self: self.declares("delete"))
        @rule(gone=some_keys)
        def delete_many(self, gone: list[str]) -> None:
            self.backend.delete_many(gone)
            for key in gone:
                self.model.pop(key, None)

        @precondition(lambda self: self.declares("add"))
        @rule(seeds=some_items)
        def add_many(self, seeds: dict[str, int]) -> None:
            absent = {key: seed for key, seed in seeds.items() if key not in self.get_live_seeds()}
            added = set(self.backend.add_many(self.make_samples(seeds), None))
            assert added == set(absent), "add_many must return exactly the keys that were absent"
            self.model |= {key: (seed, None) for key, seed in absent.items()}

        @precondition(lambda self: self.declares("scan"))
        @rule(prefix=st.sampled_from(prefixes))
        def scan(self, prefix: str) -> None:
            there, perhaps = self.get_expected_listing(prefix)
            assert there <= set(self.backend.scan(prefix)) <= perhaps, "scan did not return exactly the stored keys"

        @precondition(lambda self: self.declares("count"))
        @rule(prefix=st.sampled_from(prefixes))
        def count(self, prefix: str) -> None:
            there, perhaps = self.get_expected_listing(prefix)
            counted = self.backend.count(prefix)
            assert len(there) <= counted <= len(perhaps), f"count returned {counted}, expected {len(there)}"

        @precondition(lambda self: self.declares("ttl") and advance is not None)
        @rule(seeds=some_items, ttl=st.sampled_from(TTLS))
        def set_many_with_ttl(self, seeds: dict[str, int], ttl: float) -> None:
            self.backend.set_many(self.make_samples(seeds), ttl)
            self.model |= {key: (seed, self.now + ttl) for key, seed in seeds.items()}

        @precondition(lambda self: self.declares("ttl") and advance is not None)
        @rule(seconds=st.sampled_from(STEPS))
        def advance_time(self, seconds: float) -> None:
            if advance is not None:
                advance(seconds)
                self.now += seconds

        @precondition(lambda self: reopen is not None and self.backend.capabilities.scope != "process")
        @rule()
        def reopen_backend(self) -> None:
            if reopen is not None:
                self.backend.close()
                self.backend = reopen(self.backend)

        def teardown(self) -> None:
            self.backend.close()

    run_state_machine_as_test(DictComparison, settings=settings)
