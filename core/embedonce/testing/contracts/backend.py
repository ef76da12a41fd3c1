"""What every backend must do, as tests: subclass :class:`BackendContract` and run pytest.

Which tests run is decided by what the backend declares of itself. ``docs/testing.md`` lists them.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from inspect import iscoroutinefunction
from itertools import count
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedonce.contracts import EXTRAS, Backend, Capabilities, deadline
from embedonce.errors import PartialAnswer
from embedonce.keys import CARD_PREFIX
from embedonce.testing.proxy import FaultProxy, NetworkFault

from .child import WRITE_BATCH
from .dict_model import run_as_a_dict
from .support import BOUND, Recipe, bounded, in_fork, in_processes, in_threads, killed_while_writing
from .values import SCOPE, Values, key, values_for
from .whole import Whole, standard

T = TypeVar("T")

OTHER_SCOPE = "fedcba9876543210"
DAY = 86_400.0
LISTED = 1100
"""Keys of a long listing."""
LOOKS = 5
"""How often at least somebody looks at what others write at that moment."""
RECOVERY = 10
"""Calls after which a client must have left the connections of its pool that have died."""


class BackendContract(Whole):
    """Subclass it as ``Test…``, write :meth:`make`, and pytest does the rest.

    The other methods are optional; each opens tests that are skipped without it, except that a
    backend whose scope is ``host`` or ``network`` must be able to :meth:`reopen`.
    """

    dimensions: ClassVar[Sequence[int]] = (8, 1, 384, 3072)
    """Of the vectors that a backend which holds entries is tried with."""
    examples: ClassVar[int | None] = None
    """How many examples hypothesis tries; None: as its profile says. Fewer where :meth:`make` is slow."""
    key = staticmethod(key)

    def make(self) -> Backend:
        """Return a new, empty backend that nothing else uses. It is closed by who asked for it."""
        raise NotImplementedError(f"{type(self).__name__} says how its backend is made: def make(self) -> Backend")

    def reopen(self, backend: Any) -> Backend:
        """Return another client of the store that ``backend`` uses, or used before it was closed."""
        raise NotImplementedError

    def recipe(self, backend: Any) -> Recipe | None:
        """Return how another process makes a client of the store that ``backend`` uses."""
        return None

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass on the clock that the backend's TTL goes by."""
        raise NotImplementedError

    def stall(self, backend: Any) -> AbstractContextManager[object]:
        """Return a context inside which the store of ``backend`` does not answer (a server that is stopped)."""
        raise NotImplementedError

    def server(self) -> tuple[str, int | None]:
        """Return host and port of the server that the backend talks to over TCP, or a Unix socket's path and None."""
        raise NotImplementedError

    def through(self, backend: Any, host: str, port: int) -> Backend:
        """Return another client of the store that ``backend`` uses, for which its server is at ``host:port``."""
        raise NotImplementedError

    def lose_a_node(self, backend: Any) -> AbstractContextManager[object]:
        """Return a context inside which one node of the store of ``backend`` is away, and the others answer.

        For a store in which each key lies on one node: a store that has each on several misses nothing then.
        """
        raise NotImplementedError

    # --- what it declares ---------------------------------------------------------------------

    def test_capabilities_are_declared_and_stay(self) -> None:
        with self._open() as backend:
            declared = backend.capabilities
            assert isinstance(declared, Capabilities), "capabilities is a Capabilities(...)"
            assert declared.holds in ("frames", "entries", "either"), f"holds is not {declared.holds!r}"
            assert declared.scope in ("process", "host", "network"), f"scope is not {declared.scope!r}"
            for name in ("max_batch", "max_value_bytes"):
                most = getattr(declared, name)
                assert most is None or (type(most) is int and most >= 1), f"{name} is None or a number from 1"
            backend.set_many({key(0): self._values(backend).sample(0)}, None)
            assert backend.capabilities == declared, "capabilities do not change while a backend is used"

    def test_declared_extras_are_there(self) -> None:
        with self._open() as backend:
            for capability, method in EXTRAS.items():
                if getattr(backend.capabilities, capability):
                    found = callable(getattr(backend, method, None))
                    assert found, f"{capability} is declared, and there is no method {method}"
            for method in ("get_many", "set_many", "close"):
                assert callable(getattr(backend, method, None)), f"there is no method {method}"

    # --- batches ------------------------------------------------------------------------------

    def test_empty_calls_do_nothing(self) -> None:
        with self._open() as backend:
            backend.set_many({}, None)
            assert dict(backend.get_many([])) == {}, "no keys asked, nothing returned"
            if backend.capabilities.delete:
                backend.delete_many([])
            if backend.capabilities.add:
                assert set(backend.add_many({}, None)) == set(), "nothing to add, nothing added"

    def test_one_entry_comes_back(self) -> None:
        with self._open() as backend:
            self._stored(backend, [1])
            self._holds(backend, {key(1): 1})

    def test_a_miss_is_absent(self) -> None:
        with self._open() as backend:
            assert dict(backend.get_many([key(1), key(2)])) == {}, "a key that is not there is absent, never None"
            self._stored(backend, [1, 3])
            found = backend.get_many([key(0), key(1), key(2), key(3), key(4)])
            assert set(found) == {key(1), key(3)}, "what is there is returned, and what is not there is absent"
            self._holds(backend, {key(1): 1, key(3): 3})

    def test_a_key_asked_twice_comes_once(self) -> None:
        with self._open() as backend:
            self._stored(backend, [1, 2, 3])
            for asked in ([1, 1, 2, 3], [9, 9, 1, 2], [2, 1, 2, 1, 9], [3, 3, 3]):
                there = {key(number): number for number in asked if number != 9}
                self._same(backend, backend.get_many([key(number) for number in asked]), there)

    def test_only_what_was_asked_comes_back(self) -> None:
        with self._open() as backend:
            self._stored(backend, range(20))
            self._same(backend, backend.get_many([key(3)]), {key(3): 3})

    def test_any_sequence_and_any_mapping_will_do(self) -> None:
        with self._open() as backend:
            values = self._values(backend)
            backend.set_many(MappingProxyType({key(1): values.sample(1)}), None)
            self._same(backend, backend.get_many((key(1), key(2))), {key(1): 1})

    def test_a_full_batch_comes_back(self) -> None:
        with self._open() as backend:
            size = self._batch(backend)
            self._stored(backend, range(size))
            self._holds(backend, {key(number): number for number in range(size)})

    def test_one_more_than_a_full_batch_is_right_or_refused(self) -> None:
        with self._open() as backend:
            size = self._batch(backend)
            expected = {key(number): number for number in range(size + 1)}
            self._stored(backend, range(size))
            self._stored(backend, [size])
            try:
                found = backend.get_many(list(expected))
            except Exception:
                return
            self._same(backend, found, expected)

    def test_keys_that_look_alike_are_different(self) -> None:
        stem = f"eo1.{SCOPE}."
        alike = [stem + "a", stem + "aa", stem + "a.", stem + "b", stem + "0", stem + "00", f"eo1.{SCOPE}a.a"]
        alike += [f"{CARD_PREFIX}{SCOPE}", f"eo1.{OTHER_SCOPE}.a", (stem + "a" * 119)[:119], (stem + "a" * 118)[:118]]
        with self._open() as backend:
            values = self._values(backend)
            half = {name: seed for seed, name in enumerate(alike) if seed % 2}
            backend.set_many({name: values.sample(seed) for name, seed in half.items()}, None)
            self._same(backend, backend.get_many(alike), half)
            everything = {name: seed for seed, name in enumerate(alike)}
            backend.set_many({name: values.sample(seed) for name, seed in everything.items()}, None)
            self._same(backend, backend.get_many(alike), everything)

    def test_a_later_value_replaces_an_earlier_one(self) -> None:
        with self._open() as backend:
            values = self._values(backend)
            self._stored(backend, [1, 2, 3])
            backend.set_many({key(1): values.sample(11), key(3): values.sample(13)}, None)
            self._holds(backend, {key(1): 11, key(2): 2, key(3): 13})

    # --- values -------------------------------------------------------------------------------

    def test_special_values_come_back_exactly(self) -> None:
        with self._open() as backend:
            values = self._values(backend)
            special = values.edges(backend.capabilities.max_value_bytes)
            for number, value in enumerate(special.values()):
                backend.set_many({key(number): value}, None)
            for number, (name, value) in enumerate(special.items()):
                found = backend.get_many([key(number)]).get(key(number))
                assert values.same(found, value), f"{name}: what was stored does not come back"

    def test_any_value_comes_back_exactly(self) -> None:
        with self._open() as backend:
            values = self._values(backend)
            content = st.binary(max_size=min(300, backend.capabilities.max_value_bytes or 300))
            if backend.capabilities.holds == "entries":
                content = st.integers(0, 2**32).map(values.sample)

            @self._settings()
            @given(st.dictionaries(st.integers(0, 5), content, max_size=6))
            def check(items: dict[int, Any]) -> None:
                backend.set_many({key(number): value for number, value in items.items()}, None)
                found = backend.get_many([key(number) for number in items])
                assert set(found) == {key(number) for number in items}, "what was stored is there, and nothing else"
                for number, value in items.items():
                    assert values.same(found[key(number)], value), "what was stored does not come back"

            check()

    def test_the_largest_value_fits(self) -> None:
        with self._open() as backend:
            largest = self._largest(backend)
            value = os.urandom(largest)
            backend.set_many({key(1): value}, None)
            found = backend.get_many([key(1)]).get(key(1))
            assert found == value, f"a value of max_value_bytes, {largest}, does not come back"

    def test_a_value_too_large_is_whole_or_not_there(self) -> None:
        with self._open() as backend:
            value = os.urandom(self._largest(backend) + 1)
            with suppress(Exception):
                backend.set_many({key(1): value}, None)
            found = backend.get_many([key(1)]).get(key(1), value)
            assert found == value, "a value above max_value_bytes is stored whole, refused or left out, never cut"

    def test_a_space_card_comes_back(self) -> None:
        with self._open() as backend:
            if backend.capabilities.holds == "frames":
                pytest.skip("a frame is bytes, whatever is in it")
            values = self._values(backend)
            card = values.sample(1)._replace(vector=values.sample(1).vector[:0].copy(), metadata={"model": "m"})
            backend.set_many({CARD_PREFIX + SCOPE: card}, None)
            found = backend.get_many([CARD_PREFIX + SCOPE]).get(CARD_PREFIX + SCOPE)
            assert values.same(found, card), "an entry whose vector has no values does not come back (space cards)"

    def test_what_is_handed_in_is_left_alone(self) -> None:
        with self._open() as backend:
            values = self._values(backend)
            items = {key(1): values.sample(1), key(2): values.sample(2)}
            backend.set_many(items, None)
            assert list(items) == [key(1), key(2)], "the mapping that was handed in was changed"
            assert all(values.same(items[key(n)], values.sample(n)) for n in (1, 2)), "a value handed in was changed"
            items[key(1)] = values.sample(99)
            del items[key(2)]
            asked = [key(1), key(2), key(3)]
            self._same(backend, backend.get_many(asked), {key(1): 1, key(2): 2})
            assert asked == [key(1), key(2), key(3)], "the keys that were handed in were changed"

    def test_what_is_handed_out_cannot_change_the_store(self) -> None:
        with self._open() as backend:
            self._stored(backend, [1, 2])
            found: Any = backend.get_many([key(1), key(2)])
            if backend.capabilities.holds == "entries":
                vector = found[key(1)].vector
                assert not vector.flags.writeable, "an entry's vector is read-only"
                with suppress(ValueError):
                    vector.setflags(write=True)
                    vector[:] = 0.0
            with suppress(Exception):
                found.clear()
            self._holds(backend, {key(1): 1, key(2): 2})

    def test_get_agrees_with_get_many(self) -> None:
        with self._open() as backend:
            self._needs(backend, "get")
            values = self._values(backend)
            assert backend.get(key(1)) is None, "get returns None for what is not there"
            self._stored(backend, [1])
            assert values.same(backend.get(key(1)), values.sample(1)), "get returns another value than was stored"
            assert backend.get(key(2)) is None, "get returns None for what is not there"

    # --- delete, scan, count, add -------------------------------------------------------------

    def test_delete_removes_these_keys_alone(self) -> None:
        with self._open() as backend:
            self._needs(backend, "delete")
            self._stored(backend, [1, 2, 3])
            backend.delete_many([key(1), key(3)])
            self._same(backend, backend.get_many([key(1), key(2), key(3)]), {key(2): 2})
            if backend.capabilities.get:
                assert backend.get(key(1)) is None, "get returns what was deleted"

    def test_a_full_batch_is_deleted(self) -> None:
        with self._open() as backend:
            self._needs(backend, "delete")
            names = [key(number) for number in range(self._batch(backend))]
            self._stored(backend, range(len(names)))
            backend.delete_many(names)
            left = len(backend.get_many(names))
            assert not left, f"{left} of {len(names)} keys that were deleted in one call are still there"

    def test_delete_of_what_is_not_there_is_no_error(self) -> None:
        with self._open() as backend:
            self._needs(backend, "delete")
            backend.delete_many([key(1)])
            self._stored(backend, [2])
            backend.delete_many([key(1), key(2), key(2)])
            backend.delete_many([key(2)])
            assert dict(backend.get_many([key(1), key(2)])) == {}, "a deleted key is absent"

    def test_what_was_deleted_can_be_stored_again(self) -> None:
        with self._open() as backend:
            self._needs(backend, "delete")
            self._stored(backend, [1])
            backend.delete_many([key(1)])
            backend.set_many({key(1): self._values(backend).sample(11)}, None)
            self._holds(backend, {key(1): 11})

    def test_scan_finds_what_starts_with_the_prefix(self) -> None:
        with self._open() as backend:
            self._needs(backend, "scan")
            assert list(backend.scan("eo1.")) == [], "an empty store has no keys"
            ours = {key(number) for number in range(40)}
            theirs = {key(number, OTHER_SCOPE) for number in range(10)}
            # A prefix is no pattern: its full stop stands for itself.
            decoys = {f"eo1.{SCOPE}a{'0' * 63}", f"eo1a{SCOPE}.{'0' * 64}", CARD_PREFIX + SCOPE}
            values = self._values(backend)
            backend.set_many({name: values.sample(0) for name in ours | theirs | decoys}, None)
            expected = {
                f"eo1.{SCOPE}.": ours,
                f"eo1.{OTHER_SCOPE}.": theirs,
                CARD_PREFIX: {CARD_PREFIX + SCOPE},
                key(7): {key(7)},
                "eo1.none": set(),
                "": ours | theirs | decoys,
            }
            for prefix, names in expected.items():
                listed = list(backend.scan(prefix))
                odd = {type(name).__name__ for name in listed if not isinstance(name, str)}
                assert not odd, f"scan yields keys as str, not as {', '.join(sorted(odd))}"
                found = set(listed)
                assert found == names, f"scan({prefix!r}) finds {len(found)} keys, not the {len(names)} that are there"
                assert len(listed) == len(found), f"scan({prefix!r}) yields {len(listed) - len(found)} keys twice"

    def test_a_long_scan_leaves_nothing_out(self) -> None:
        # Many stores list a thousand keys at a time.
        with self._open() as backend:
            self._needs(backend, "scan")
            names, values = [key(number) for number in range(LISTED)], self._values(backend)
            for start in range(0, LISTED, self._batch(backend)):
                batch = names[start : start + self._batch(backend)]
                backend.set_many(dict.fromkeys(batch, values.sample(0)), None)
            found = list(backend.scan(f"eo1.{SCOPE}."))
            assert set(found) == set(names), f"scan finds {len(set(found))} of {LISTED} keys"
            assert len(found) == LISTED, f"scan yields {len(found) - LISTED} of {LISTED} keys twice"
            if backend.capabilities.count:
                counted = backend.count(f"eo1.{SCOPE}.")
                assert counted == LISTED, f"count says {counted} where {LISTED} keys are there"

    def test_scan_goes_on_while_keys_are_deleted(self) -> None:
        with self._open() as backend:
            self._needs(backend, "scan", "delete")
            self._stored(backend, range(50))
            for name in backend.scan(f"eo1.{SCOPE}."):
                backend.delete_many([name])
            assert set(backend.scan("")) == set(), "keys deleted one by one while they are scanned are all gone"

    def test_scan_holds_up_no_writer_and_misses_nothing_that_stays(self) -> None:
        with self._open() as backend:
            self._needs(backend, "scan")
            self._stored(backend, range(50))
            found = set()
            for place, name in enumerate(backend.scan(f"eo1.{SCOPE}.")):
                found.add(name)
                if place < 50 and place % 10 == 0:
                    fresh = range(1000 + place, 1005 + place)
                    bounded(partial(self._stored, backend, fresh), "set_many beside a scan")
            missed = {key(number) for number in range(50)} - found
            assert not missed, f"a scan beside a writer misses {len(missed)} of 50 keys that were there all the time"

    def test_count_agrees_with_what_is_there(self) -> None:
        with self._open() as backend:
            self._needs(backend, "count")
            assert backend.count("") == 0, "an empty store has no keys"
            self._stored(backend, range(7))
            backend.set_many({key(0, OTHER_SCOPE): self._values(backend).sample(0)}, None)
            self._stored(backend, range(3))
            counted = [backend.count(prefix) for prefix in (f"eo1.{SCOPE}.", f"eo1.{OTHER_SCOPE}.", "", "eo1.none")]
            assert counted == [7, 1, 8, 0], f"count says {counted} where [7, 1, 8, 0] are there"

    def test_add_stores_what_is_absent_alone(self) -> None:
        with self._open() as backend:
            self._needs(backend, "add")
            values = self._values(backend)
            self._stored(backend, [1])
            added = backend.add_many({key(1): values.sample(11), key(2): values.sample(12)}, None)
            assert set(added) == {key(2)}, "add_many returns the keys that it stored"
            self._holds(backend, {key(1): 1, key(2): 12})

    def test_an_added_key_has_one_winner(self) -> None:
        with self._open() as backend:
            self._needs(backend, "add")
            values = self._values(backend)
            names = [key(number) for number in range(20)]
            won: dict[str, list[int]] = {name: [] for name in names}

            def work(number: int) -> None:
                # From both ends, so that no thread wins everything by coming first.
                for name in names if number % 2 else reversed(names):
                    if backend.add_many({name: values.sample(number)}, None):
                        won[name].append(number)

            in_threads(8, work, "add_many")
            assert all(len(winners) == 1 for winners in won.values()), "each key is added once, by one thread"
            self._holds(backend, {name: winners[0] for name, winners in won.items()})

    def test_an_added_key_has_one_winner_among_processes(self) -> None:
        with self._open() as backend:
            self._needs(backend, "add")
            self._needs_sharing(backend)
            recipe = self._needs_recipe(backend)
            names = [key(number) for number in range(100)]
            requests = [{"add": names, "dimensions": list(self.dimensions)}] * 3
            won = [name for answer in in_processes(requests, recipe) for name in answer["won"]]
            assert sorted(won) == sorted(names), (
                f"three processes add the same {len(names)} keys, and {len(won)} times one is told that it did"
            )

    # --- time to live -------------------------------------------------------------------------

    def test_any_ttl_is_taken(self) -> None:
        # A hundred days: a server may read a long ttl as a date (memcached: from 30 days on).
        with self._open() as backend:
            values = self._values(backend)
            for number, ttl in enumerate((None, 3600, 3600.5, 100 * DAY, 3650 * DAY)):
                backend.set_many({key(number): values.sample(number)}, ttl)
                self._holds(backend, {key(number): number})

    def test_an_entry_goes_when_its_ttl_ends(self) -> None:
        with self._open() as backend:
            self._needs_time(backend)
            values = self._values(backend)
            backend.set_many({key(1): values.sample(1), key(2): values.sample(2)}, 60.0)
            backend.set_many({key(3): values.sample(3)}, None)
            self.advance(50.0)
            self._holds(backend, {key(1): 1, key(2): 2, key(3): 3})
            self.advance(11.0)
            self._same(backend, backend.get_many([key(1), key(2), key(3)]), {key(3): 3})
            if backend.capabilities.get:
                assert backend.get(key(1)) is None, "get returns what its ttl has ended"

    def test_storing_again_sets_the_ttl_again(self) -> None:
        with self._open() as backend:
            self._needs_time(backend)
            values = self._values(backend)
            backend.set_many({key(n): values.sample(n) for n in (1, 2, 3)}, 60.0)
            self.advance(50.0)
            backend.set_many({key(1): values.sample(1)}, 60.0)
            backend.set_many({key(2): values.sample(2)}, None)
            self.advance(50.0)
            self._same(backend, backend.get_many([key(1), key(2), key(3)]), {key(1): 1, key(2): 2})
            backend.set_many({key(2): values.sample(2)}, 60.0)
            self.advance(61.0)
            assert dict(backend.get_many([key(1), key(2)])) == {}, "a ttl counts from when the entry was stored last"

    def test_an_added_key_is_free_again_when_its_ttl_ends(self) -> None:
        with self._open() as backend:
            self._needs(backend, "add")
            self._needs_time(backend)
            values = self._values(backend)
            assert set(backend.add_many({key(1): values.sample(1)}, 60.0)) == {key(1)}, "an absent key is added"
            self.advance(50.0)
            assert set(backend.add_many({key(1): values.sample(2)}, 60.0)) == set(), "a lease is not taken over early"
            self.advance(11.0)
            assert set(backend.add_many({key(1): values.sample(3)}, 60.0)) == {key(1)}, "a lease that ran out is free"
            self._holds(backend, {key(1): 3})

    # --- the end ------------------------------------------------------------------------------

    def test_close_twice_does_nothing(self) -> None:
        backend: Any = self.make()
        self._stored(backend, [1])
        backend.close()
        backend.close()

    def test_use_after_close_raises(self) -> None:
        backend: Any = self.make()
        value = self._values(backend).sample(1)
        backend.set_many({key(1): value}, None)
        backend.close()
        with pytest.raises(Exception):  # noqa: B017, PT011  (any error will do; silence will not)
            bounded(lambda: backend.get_many([key(1)]), "get_many after close")
        with pytest.raises(Exception):  # noqa: B017, PT011
            bounded(lambda: backend.set_many({key(2): value}, None), "set_many after close")

    def test_what_was_stored_is_there_when_opened_again(self) -> None:
        backend: Any = self.make()
        try:
            self._needs_sharing(backend)
            self._stored(backend, range(20))
        finally:
            backend.close()
        again: Any = self.reopen(backend)
        try:
            self._holds(again, {key(number): number for number in range(20)})
        finally:
            again.close()

    def test_two_clients_see_one_store(self) -> None:
        with self._open() as one:
            self._needs_sharing(one)
            values = self._values(one)
            self._stored(one, [1])
            with self._closing(self.reopen(one)) as two:
                self._holds(two, {key(1): 1})
                two.set_many({key(1): values.sample(11), key(2): values.sample(2)}, None)
                self._holds(one, {key(1): 11, key(2): 2})
                if one.capabilities.delete:
                    two.delete_many([key(1)])
                    self._same(one, one.get_many([key(1), key(2)]), {key(2): 2})
                if one.capabilities.add:
                    assert not two.add_many({key(2): values.sample(3)}, None), "one client adds over another's entry"
            self._stored(one, [5])
            self._holds(one, {key(2): 2, key(5): 5})

    def test_a_forked_child_uses_the_store(self) -> None:
        if not hasattr(os, "fork"):
            pytest.skip("this platform has no fork")
        with self._open() as backend:
            self._needs(backend, "fork")
            self._needs_sharing(backend)
            values = self._values(backend)
            self._stored(backend, range(10))

            made = mmap.mmap(-1, 1)
            """How many calls the parent has made meanwhile, which the child sees."""

            def child() -> None:
                for turn in count():
                    self._holds(backend, {key(number): number for number in range(10)})
                    backend.set_many({key(100 + turn % 20): values.sample(turn % 20)}, None)
                    if turn >= 20 and made[0] >= LOOKS:
                        return

            def parent() -> None:
                self._holds(backend, {key(number): number for number in range(10)})
                made[0] = min(made[0] + 1, LOOKS)

            in_fork(child, "a backend that was open before the fork", beside=parent)
            self._holds(backend, {key(100 + turn): turn for turn in range(20)})
            self._stored(backend, [50])
            self._holds(backend, {key(number): number for number in (*range(10), 50)})

    def test_a_forked_child_goes_on_without_its_parent(self) -> None:
        if not hasattr(os, "fork"):
            pytest.skip("this platform has no fork")
        with self._open() as backend:
            self._needs(backend, "fork")
            self._needs_sharing(backend)
            before = {key(number): number for number in range(10)}
            after = {key(number): number for number in range(100, 110)}
            self._stored(backend, range(10))
            closed = mmap.mmap(-1, 1)
            """Whether the parent has closed its backend, which the child sees."""

            def child() -> None:
                end = time.monotonic() + BOUND
                while not closed[0]:
                    # Where the parent is killed, the child does not wait for ever.
                    assert time.monotonic() < end, "the parent does not close its backend"
                    time.sleep(0.001)
                self._holds(backend, before)
                self._stored(backend, range(100, 110))
                self._holds(backend, after)
                # It ends without a close, as a worker may: what was stored is there all the same.

            def parent() -> None:
                if not closed[0]:
                    backend.close()
                    closed[0] = 1
                time.sleep(0.001)

            in_fork(child, "a backend that its parent has closed after the fork", beside=parent)
            with self._closing(self.reopen(backend)) as again:
                found = again.get_many([*before, *after])
                lost = len(after.keys() - set(found))
                assert not lost, f"{lost} keys are lost that a forked child stored after its parent had closed"
                self._same(again, found, {**before, **after})

    def test_a_forked_child_is_refused(self) -> None:
        if not hasattr(os, "fork"):
            pytest.skip("this platform has no fork")
        with self._open() as backend:
            if backend.capabilities.fork:
                pytest.skip("fork is declared")
            value = self._values(backend).sample(1)
            backend.set_many({key(1): value}, None)

            def child() -> None:
                with pytest.raises(Exception):  # noqa: B017, PT011  (any error will do; silence will not)
                    backend.get_many([key(1)])
                with pytest.raises(Exception):  # noqa: B017, PT011
                    backend.set_many({key(2): value}, None)
                backend.close()

            in_fork(child, "a backend that cannot go on in a forked child")
            self._holds(backend, {key(1): 1})

    def test_other_processes_use_the_store(self) -> None:
        with self._open() as backend:
            self._needs_sharing(backend)
            recipe = self._needs_recipe(backend)
            self._stored(backend, range(10))
            expect = {key(number): number for number in range(10)}
            stores = [{key(100 * child + n): n for n in range(30)} for child in (1, 2, 3)]
            values = {"holds": backend.capabilities.holds, "dimensions": list(self.dimensions)}
            requests = [{"store": store, "expect": expect, **values} for store in stores]
            for answer in in_processes(requests, recipe):
                assert answer["wrong"] == [], "another process does not see what was stored in this one"
            for store in stores:
                self._holds(backend, store)

    def test_a_writer_that_is_killed_leaves_whole_values(self) -> None:
        if not hasattr(signal, "SIGKILL"):
            pytest.skip("this platform has no kill -9")
        with self._open() as backend:
            self._needs_sharing(backend)
            recipe = self._needs_recipe(backend)
            self._stored(backend, [1])
            for turn, batches in enumerate((2, 5)):
                # Another scope every time, so that the keys are new.
                scope = f"{turn:016x}"
                stored = killed_while_writing(
                    recipe,
                    scope=scope,
                    batches=batches,
                    holds=backend.capabilities.holds,
                    dimensions=list(self.dimensions),
                )
                # On a busy machine it is killed late, and has stored more than a backend takes in one call.
                size = self._batch(backend)
                for start in range(0, stored, size):
                    numbers = range(start, min(start + size, stored))
                    self._holds(backend, {key(number, scope): number for number in numbers})
                perhaps = {key(number, scope): number for number in range(stored, stored + 2 * WRITE_BATCH)}
                there = backend.get_many(list(perhaps))
                self._same(backend, there, {name: seed for name, seed in perhaps.items() if name in there})
                if backend.capabilities.scan:
                    others = set(backend.scan(f"eo1.{scope}.")) - {key(number, scope) for number in range(stored)}
                    left = len(others - set(perhaps))
                    assert not left, f"{left} names are listed that are no keys: what a killed writer left behind"
                backend.set_many({key(0, scope): self._values(backend).sample(2)}, None)
                self._holds(backend, {key(0, scope): 2, key(1): 1})

    # --- threads and time ---------------------------------------------------------------------

    def test_threads_keep_their_values_apart(self) -> None:
        with self._open() as backend:
            values = self._values(backend)

            stay: list[dict[str, int]] = [{} for _ in range(8)]

            def work(number: int) -> None:
                for turn in range(10):
                    seeds = range(1000 * number + 10 * turn, 1000 * number + 10 * turn + 10)
                    own = {key(seed): seed for seed in seeds}
                    backend.set_many({name: values.sample(seed) for name, seed in own.items()}, None)
                    self._holds(backend, own)
                    if backend.capabilities.delete:
                        gone = list(own)[::2]
                        backend.delete_many(gone)
                        own = {name: seed for name, seed in own.items() if name not in gone}
                        self._same(backend, backend.get_many([*gone, *own]), own)
                    stay[number] |= own

            in_threads(len(stay), work, "set_many and get_many from eight threads")
            for own in stay:
                self._holds(backend, own)

    def test_threads_that_overwrite_leave_one_whole_value(self) -> None:
        with self._open() as backend:
            values = self._values(backend)
            names = [key(number) for number in range(5)]
            written = [values.sample(seed) for seed in range(6)]

            writing = list(written)
            looks = [0, 0]

            def write(value: Any) -> None:
                turns = 0
                try:
                    # Until both readers have looked, however late a busy machine lets them begin.
                    while turns < 20 or min(looks) < LOOKS:
                        backend.set_many(dict.fromkeys(names, value), None)
                        turns += 1
                finally:
                    writing.pop()

            def read(reader: int) -> None:
                try:
                    while writing:
                        for value in backend.get_many(names).values():
                            known = any(values.same(value, one) for one in written)
                            assert known, "a value comes back that nobody stored"
                        looks[reader] += 1
                finally:
                    looks[reader] = LOOKS

            def work(number: int) -> None:
                if number < len(written):
                    write(written[number])
                else:
                    read(number - len(written))

            in_threads(len(written) + len(looks), work, "six threads that overwrite the same keys, and two that read")
            assert set(backend.get_many(names)) == set(names), "a key is lost that every thread has stored"

    def test_a_call_past_its_deadline_raises(self) -> None:
        with self._open() as backend:
            self._needs(backend, "deadline")
            self._stored(backend, [1, 2])
            value = self._values(backend).sample(9)
            calls: dict[str, Callable[[], object]] = {
                "get_many": lambda: backend.get_many([key(1), key(2)]),
                "set_many": lambda: backend.set_many({key(9): value}, None),
            }
            for name, call in calls.items():
                with deadline(0.0), pytest.raises(TimeoutError):
                    bounded(call, f"{name} past its deadline")
            self._holds(backend, {key(1): 1, key(2): 2})
            with deadline(BOUND):
                self._holds(backend, {key(1): 1, key(2): 2})

    def test_a_store_that_stalls_is_left_by_the_deadline(self) -> None:
        with self._open() as backend:
            self._needs(backend, "deadline")
            if not self._has("stall"):
                pytest.skip("needs stall(): a context in which the store does not answer")
            self._stored(backend, [1, 2, 3])

            def ask() -> None:
                with deadline(0.2):
                    backend.get_many([key(1)])

            with self.stall(backend), pytest.raises(TimeoutError):
                bounded(ask, "get_many of a store that stalls")
            # The reply that comes too late belongs to nobody: it must not answer the next question.
            self._same(backend, backend.get_many([key(2)]), {key(2): 2})
            self._holds(backend, {key(1): 1, key(2): 2, key(3): 3})

    # --- the network --------------------------------------------------------------------------

    def test_a_server_that_is_gone_is_an_error_and_no_miss(self) -> None:
        with self._open() as backend, self._proxied(backend) as (proxy, client):
            value = self._values(backend).sample(9)
            proxy.fault = NetworkFault("refuse")
            self._fails(lambda: client.get_many([key(1)]), "get_many without a server")
            self._fails(lambda: client.set_many({key(9): value}, None), "set_many without a server")
            if backend.capabilities.delete:
                self._fails(lambda: client.delete_many([key(1)]), "delete_many without a server")
            proxy.heal()
            self._recovers(client)
            self._holds(backend, {key(1): 1, key(2): 2})

    def test_a_reply_that_ends_early_is_an_error(self) -> None:
        with self._open() as backend, self._proxied(backend) as (proxy, client):
            for kind in ("cut", "reset", "garbage"):
                for after in (0, 3):
                    proxy.fault = NetworkFault(kind, after=after)
                    what = f"get_many whose reply is {kind} after {after} bytes"
                    self._fails(lambda: client.get_many([key(1), key(2)]), what)
                    proxy.heal()
                    self._recovers(client)

    def test_a_connection_that_died_silently_is_left_by_the_deadline(self) -> None:
        with self._open() as backend, self._proxied(backend) as (proxy, client):
            self._needs(backend, "deadline")
            proxy.fault = NetworkFault("half_open")

            def ask() -> None:
                with deadline(0.2):
                    client.get_many([key(1)])

            # It may find out at once that the connection is dead, and use a new one.
            with suppress(Exception):
                bounded(ask, "get_many on a connection that has died")
            self._recovers(client)

    def test_a_node_that_is_away_takes_its_own_keys_alone(self) -> None:
        with self._open() as backend:
            if not self._has("lose_a_node"):
                pytest.skip("needs lose_a_node(): a context in which one node of several is away")
            values = self._values(backend)
            self._stored(backend, range(100))
            with self.lose_a_node(backend):
                held = {key(number): number for number in range(100)}
                found, failed = self._partly(lambda: backend.get_many(list(held)), held)
                assert isinstance(found, Mapping), f"PartialAnswer.answer is a {type(found).__name__}, not a mapping"
                self._answered(found, failed, held)
                self._same(backend, found, {name: seed for name, seed in held.items() if name not in failed})
                new = {key(number): number for number in range(100, 200)}
                items = {name: values.sample(seed) for name, seed in new.items()}
                _, failed = self._partly(lambda: backend.set_many(items, None), new)
                self._kept(backend, {name: seed for name, seed in new.items() if name not in failed})
                if backend.capabilities.add:
                    new = {key(number): number for number in range(200, 300)}
                    items = {name: values.sample(seed) for name, seed in new.items()}
                    added, failed = self._partly(lambda: backend.add_many(items, None), new)
                    self._answered(added, failed, new)
                    assert set(added) == new.keys() - failed, "add_many returns the keys that are now there"
                if backend.capabilities.delete:
                    self._fails(lambda: backend.delete_many(list(held)), "delete_many while a node is away")
            self._serves_again(backend)

    # --- the async twin -----------------------------------------------------------------------

    def test_the_twin_shares_the_store(self) -> None:
        with self._open() as backend:
            self._needs(backend, "twin")
            values = self._values(backend)
            self._stored(backend, [1])

            async def use(twin: Any) -> None:
                for method in ("get_many", "set_many", "close"):
                    assert iscoroutinefunction(getattr(twin, method)), f"the twin's {method} is a coroutine"
                await twin.set_many({}, None)
                assert dict(await twin.get_many([])) == {}, "no keys asked, nothing returned"
                self._same(backend, await twin.get_many([key(1), key(2), key(1)]), {key(1): 1})
                await twin.set_many({key(2): values.sample(2), key(1): values.sample(11)}, 3600.0)
                self._same(backend, await twin.get_many([key(1), key(2)]), {key(1): 11, key(2): 2})

            self._with_twin(backend, use)
            self._holds(backend, {key(1): 11, key(2): 2})

    def test_every_loop_has_its_own_twin(self) -> None:
        with self._open() as backend:
            self._needs(backend, "twin")
            self._stored(backend, [1])

            async def use(twin: Any) -> None:
                self._same(backend, await twin.get_many([key(1)]), {key(1): 1})

            for _ in range(2):
                self._with_twin(backend, use)
            in_threads(3, lambda _: self._with_twin(backend, use), "twins in three loops at once")

    def test_the_twin_answers_many_at_once(self) -> None:
        with self._open() as backend:
            self._needs(backend, "twin")
            self._stored(backend, range(40))

            async def use(twin: Any) -> None:
                answers = await asyncio.gather(*(twin.get_many([key(n), key(n + 1)]) for n in range(39)))
                for number, answer in enumerate(answers):
                    self._same(backend, answer, {key(number): number, key(number + 1): number + 1})

            self._with_twin(backend, use)

    def test_a_cancelled_twin_call_shifts_no_reply(self) -> None:
        with self._open() as backend:
            self._needs(backend, "twin")
            self._stored(backend, range(40))

            async def use(twin: Any) -> None:
                for turn in range(39):
                    call = asyncio.ensure_future(twin.get_many([key(turn)]))
                    for _ in range(turn % 5):
                        await asyncio.sleep(0)
                    call.cancel()
                    await asyncio.gather(call, return_exceptions=True)
                    self._same(backend, await twin.get_many([key(turn + 1)]), {key(turn + 1): turn + 1})

            self._with_twin(backend, use)

    def test_use_of_a_closed_twin_raises(self) -> None:
        with self._open() as backend:
            self._needs(backend, "twin")
            self._stored(backend, [1])

            async def use(twin: Any) -> None:
                await twin.get_many([key(1)])
                await twin.close()
                await twin.close()
                with pytest.raises(Exception):  # noqa: B017, PT011  (any error will do; silence will not)
                    await twin.get_many([key(1)])

            self._with_twin(backend, use)
            self._holds(backend, {key(1): 1})

    # --- everything at once -------------------------------------------------------------------

    def test_it_behaves_as_a_dict(self) -> None:
        """Calls in any order over a few keys, against a dict: get, set, delete, add, scan, count, reopen, time."""
        run_as_a_dict(
            self.make,
            reopen=self.reopen if self._has("reopen") else None,
            advance=self.advance if self._has("advance") else None,
            keys=[key(number) for number in range(3)] + [key(number, OTHER_SCOPE) for number in range(2)],
            prefixes=["", "eo1.", f"eo1.{SCOPE}.", f"eo1.{OTHER_SCOPE}.", key(0)],
            dimensions=self.dimensions,
            settings=self._settings(),
        )

    # --- helpers ------------------------------------------------------------------------------

    def _open(self) -> AbstractContextManager[Any]:
        return self._closing(self.make())

    @contextmanager
    def _closing(self, backend: Any) -> Iterator[Any]:
        try:
            yield backend
        finally:
            backend.close()

    @contextmanager
    def _proxied(self, backend: Any) -> Iterator[tuple[FaultProxy, Any]]:
        """Give a proxy before the server, and a client that goes through it and has been used."""
        if not self._has("server"):
            pytest.skip("needs server() and through(): where the server is, and a client of another address")
        host, port = self.server()
        self._stored(backend, [1, 2])
        with FaultProxy(host, port) as proxy, self._closing(self.through(backend, *proxy.address)) as client:
            self._holds(client, {key(1): 1, key(2): 2})
            yield proxy, client
            proxy.heal()

    def _fails(self, call: Callable[[], object], what: str) -> None:
        """Require that a call raises. Within a deadline, which a backend that does not declare one need not obey."""

        def within() -> None:
            with deadline(2.0):
                call()

        try:
            bounded(within, what)
        except AssertionError:
            raise
        except Exception:
            return
        raise AssertionError(f"{what} raises nothing: an error is never taken for a miss, or for done")

    def _recovers(self, client: Any) -> None:
        """Require right answers again; the first calls may still meet connections that have died."""
        for _ in range(RECOVERY):
            with suppress(Exception), deadline(2.0):
                client.get_many([key(1)])
        self._holds(client, {key(1): 1, key(2): 2})

    def _partly(self, call: Callable[[], Any], asked: Mapping[str, int]) -> tuple[Any, frozenset[str]]:
        """Require a partial answer; return what is in it, and the keys that failed."""

        def within() -> Any:
            with deadline(BOUND / 2):
                return call()

        partial = None
        try:
            bounded(within, "a call while a node is away")
        except PartialAnswer as raised:
            partial = raised
        assert partial is not None, "a node that is away raises PartialAnswer: an error is no miss, and not done"
        others = len(partial.failed - asked.keys())
        assert not others, f"PartialAnswer.failed names {others} keys that were not asked for"
        assert partial.failed != asked.keys(), "PartialAnswer.failed names all keys, though only one node is away"
        return partial.answer, partial.failed

    def _answered(self, answer: Collection[str], failed: frozenset[str], asked: Mapping[str, int]) -> None:
        """Require that each key is in a partial answer or failed, and none is both."""
        both = len(failed & set(answer))
        assert not both, f"PartialAnswer.failed names {both} keys that are in its answer"
        neither = len(asked.keys() - failed - set(answer))
        assert not neither, f"{neither} keys are neither in PartialAnswer.failed nor in its answer"

    def _kept(self, backend: Any, expected: Mapping[str, int]) -> None:
        """Require that what set_many did not name as failed is stored."""
        try:
            found, away = backend.get_many(list(expected)), frozenset[str]()
        except PartialAnswer as partial:
            found, away = partial.answer, partial.failed
        lost = len(expected.keys() & away | expected.keys() - set(found or ()))
        assert not lost, f"{lost} keys are not in PartialAnswer.failed and were not stored"
        self._same(backend, found, expected)

    def _serves_again(self, backend: Any) -> None:
        """Require that every key can be stored once all nodes are there; a client may leave one out for a while."""
        end = time.monotonic() + BOUND
        while True:
            try:
                self._stored(backend, range(100))
                break
            except Exception:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)
        self._holds(backend, {key(number): number for number in range(100)})

    def _has(self, hook: str) -> bool:
        return getattr(type(self), hook) is not getattr(BackendContract, hook)

    def _settings(self) -> settings:
        slow = [HealthCheck.too_slow, HealthCheck.filter_too_much]
        chosen = settings(deadline=None, suppress_health_check=slow, database=None, stateful_step_count=30)
        return chosen if self.examples is None else settings(chosen, max_examples=self.examples)

    def _needs(self, backend: Any, *capabilities: str) -> None:
        for capability in capabilities:
            if not getattr(backend.capabilities, capability):
                pytest.skip(f"{capability} is not declared")

    def _needs_time(self, backend: Any) -> None:
        self._needs(backend, "ttl")
        if not self._has("advance"):
            pytest.skip("needs advance(): how time passes for the backend")

    def _needs_sharing(self, backend: Any) -> None:
        scope = backend.capabilities.scope
        if scope == "process":
            pytest.skip("its scope is the process: nothing is shared and nothing stays")
        assert self._has("reopen"), f"scope {scope!r} is declared: write reopen(), another client of the same store"

    def _needs_recipe(self, backend: Any) -> Recipe:
        recipe = self.recipe(backend)
        if recipe is None:
            pytest.skip("needs recipe(): how another process makes a client of the same store")
        return recipe

    def _values(self, backend: Any) -> Values:
        return values_for(backend.capabilities.holds, self.dimensions)

    def _batch(self, backend: Any) -> int:
        most: int | None = backend.capabilities.max_batch
        return min(1000 if most is None else most, 5000)

    def _largest(self, backend: Any) -> int:
        largest: int | None = backend.capabilities.max_value_bytes
        if backend.capabilities.holds != "frames" or largest is None or largest > 2**26:
            pytest.skip("declares no max_value_bytes for frames, or one above 64 MiB")
        return largest

    def _stored(self, backend: Any, numbers: Sequence[int]) -> None:
        """Store ``sample(n)`` under ``key(n)``."""
        values = self._values(backend)
        backend.set_many({key(number): values.sample(number) for number in numbers}, None)

    def _holds(self, backend: Any, expected: Mapping[str, int]) -> None:
        """Require that each key holds the sample of its number."""
        self._same(backend, backend.get_many(list(expected)), expected)

    def _same(self, backend: Any, found: Mapping[str, Any], expected: Mapping[str, int]) -> None:
        """Require that ``found`` is the samples of ``expected`` and nothing else. Keys are named by their place."""
        values = self._values(backend)
        assert isinstance(found, Mapping), f"get_many returns a mapping, not {type(found).__name__}"
        missing = [place for place, name in enumerate(expected) if name not in found]
        assert not missing, f"{len(missing)} of {len(expected)} keys that are there do not come back"
        assert len(found) == len(expected), f"{len(found) - len(expected)} keys come back that should not be there"
        for place, (name, seed) in enumerate(expected.items()):
            stored = values.sample(seed)
            about = _about(found[name], stored)
            assert values.same(found[name], stored), (
                f"key {place} of {len(expected)} comes back with {about}, not with what was stored"
            )

    def _with_twin(self, backend: Any, use: Callable[[Any], Awaitable[None]]) -> None:
        async def main() -> None:
            twin = backend.twin()
            try:
                async with asyncio.timeout(BOUND):
                    await use(twin)
            finally:
                await twin.close()

        asyncio.run(main())


def _about(value: object, stored: object) -> str:
    if value is None:
        return "None"
    if type(value) is not type(stored):
        return f"a {type(value).__name__} instead of {type(stored).__name__}"
    return f"{len(value)} bytes of something else" if isinstance(value, bytes) else f"another {type(value).__name__}"


standard(BackendContract)
