"""Standard tests of every backend: subclass :class:`BackendContract` and run pytest.

The capabilities that a backend declares decide which of the tests run. ``docs/testing.md`` lists all tests.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from functools import partial
from inspect import iscoroutinefunction
from itertools import count, islice
from types import MappingProxyType
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedonce.contracts import Backend, deadline
from embedonce.errors import PartialAnswer
from embedonce.keys import CARD_PREFIX
from embedonce.testing.proxy import FaultProxy, NetworkFault

from .child import WRITE_BATCH
from .dict_model import compare_with_dict
from .stored import OTHER_SCOPE, MakeItems, StoredContract, check_capabilities, check_methods, measure_store
from .support import (
    CALL_TIMEOUT,
    call_with_timeout,
    kill_while_writing,
    read_while_loop_is_blocked,
    run_in_fork,
    run_in_processes,
    run_in_threads,
    run_with_twin,
)
from .values import SCOPE, key, require_partition
from .whole import register_standard_tests

T = TypeVar("T")

DAY = 86_400.0
MIN_READS = 5
"""Minimum number of reads that a test makes while other threads or processes are writing."""
RECOVERY_CALLS = 10
"""Number of calls after which a client must have dropped the dead connections of its pool."""


class BackendContract(StoredContract):
    """Subclass this class as ``Test…`` and write :meth:`make`; pytest does the rest.

    The other methods are optional: tests that need a missing method are skipped. The exception is :meth:`reopen`,
    which is required for a backend whose scope is ``single``, ``host`` or ``network``.

    No test opens the store of a backend with the scope ``single`` twice at the same time.
    """

    def make(self) -> Backend:
        """Return a new, empty backend that nothing else uses. The caller closes the backend."""
        raise NotImplementedError(f"{type(self).__name__} must define how to make a backend: def make(self) -> Backend")

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass on the clock that the backend uses for TTLs."""
        raise NotImplementedError

    def stall(self, backend: Any) -> AbstractContextManager[object]:
        """Return a context in which the store of ``backend`` hangs, for example because the store is paused."""
        raise NotImplementedError

    def server(self) -> tuple[str, int | None]:
        """Return ``(host, port)`` of the backend's server, or ``(path, None)`` if the server has a Unix socket."""
        raise NotImplementedError

    def through(self, backend: Any, host: str, port: int) -> Backend:
        """Return another client of the store of ``backend``. The client must connect to the proxy at ``host:port``."""
        raise NotImplementedError

    def lose_a_node(self, backend: Any) -> AbstractContextManager[object]:
        """Return a context in which one node of the store of ``backend`` is down, and the other nodes answer.

        Define this method only for a store that keeps each key on one node. With replicas, all keys stay available
        while a node is down, so the test would find no failed keys.
        """
        raise NotImplementedError

    # --- what the backend declares ------------------------------------------------------------

    def test_capabilities_are_declared_and_stay(self) -> None:
        with self._open() as backend:
            declared = backend.capabilities
            check_capabilities(declared)
            assert not declared.read_only, (
                "a backend that declares read_only has a contract of its own: subclass ReadOnlyContract"
            )
            backend.set_many({key(0): self._make_values(backend).sample(0)}, None)
            assert backend.capabilities == declared, "capabilities must not change while the backend is in use"

    def test_declared_extras_are_there(self) -> None:
        with self._open() as backend:
            check_methods(backend, ("get_many", "set_many", "close"))

    # --- batches ------------------------------------------------------------------------------

    def test_empty_calls_do_nothing(self) -> None:
        with self._open() as backend:
            backend.set_many({}, None)
            assert dict(backend.get_many([])) == {}, "get_many([]) must return an empty mapping"
            if backend.capabilities.get:
                assert backend.get(key(1)) is None, "get must return None for a missing key"
            if backend.capabilities.scan:
                assert list(backend.scan("eo1.")) == [], "scan of an empty store must return no keys"
            if backend.capabilities.delete:
                backend.delete_many([])
            if backend.capabilities.add:
                assert set(backend.add_many({}, None)) == set(), "add_many({}) must return no keys"

    def test_a_miss_is_absent(self) -> None:
        with self._open() as backend:
            assert dict(backend.get_many([key(1), key(2)])) == {}, (
                "get_many must leave out a missing key; it must not return None for the key"
            )
            self._store(backend, [1, 3])
            found = backend.get_many([key(0), key(1), key(2), key(3), key(4)])
            assert set(found) == {key(1), key(3)}, "get_many must return the keys that are stored, and no other keys"
            self._require_stored(backend, {key(1): 1, key(3): 3})

    def test_any_sequence_and_any_mapping_will_do(self) -> None:
        with self._open() as backend:
            values = self._make_values(backend)
            backend.set_many(MappingProxyType({key(1): values.sample(1)}), None)
            self._require_equal(backend, backend.get_many((key(1), key(2))), {key(1): 1})

    def test_one_more_than_a_full_batch_is_right_or_refused(self) -> None:
        with self._open() as backend:
            size = self._get_batch_size(backend)
            expected = {key(number): number for number in range(size + 1)}
            self._store(backend, range(size))
            self._store(backend, [size])
            try:
                found = backend.get_many(list(expected))
            except Exception:
                return
            self._require_equal(backend, found, expected)

    def test_keys_that_look_alike_are_different(self) -> None:
        stem = f"eo1.{SCOPE}."
        alike = [stem + "a", stem + "aa", stem + "a.", stem + "b", stem + "0", stem + "00", f"eo1.{SCOPE}a.a"]
        alike += [f"{CARD_PREFIX}{SCOPE}", f"eo1.{OTHER_SCOPE}.a", (stem + "a" * 119)[:119], (stem + "a" * 118)[:118]]
        with self._open() as backend:
            values = self._make_values(backend)
            half = {name: seed for seed, name in enumerate(alike) if seed % 2}
            backend.set_many({name: values.sample(seed) for name, seed in half.items()}, None)
            self._require_equal(backend, backend.get_many(alike), half)
            everything = {name: seed for seed, name in enumerate(alike)}
            backend.set_many({name: values.sample(seed) for name, seed in everything.items()}, None)
            self._require_equal(backend, backend.get_many(alike), everything)

    def test_a_later_value_replaces_an_earlier_one(self) -> None:
        with self._open() as backend:
            values = self._make_values(backend)
            self._store(backend, [1, 2, 3])
            backend.set_many({key(1): values.sample(11), key(3): values.sample(13)}, None)
            self._require_stored(backend, {key(1): 11, key(2): 2, key(3): 13})

    # --- values -------------------------------------------------------------------------------

    def test_any_value_comes_back_exactly(self) -> None:
        with self._open() as backend:
            values = self._make_values(backend)
            content = st.binary(max_size=min(300, backend.capabilities.max_value_bytes or 300))
            if backend.capabilities.holds == "entries":
                content = st.integers(0, 2**32).map(values.sample)

            @self._make_settings()
            @given(st.dictionaries(st.integers(0, 5), content, max_size=6))
            def check(items: dict[int, Any]) -> None:
                backend.set_many({key(number): value for number, value in items.items()}, None)
                found = backend.get_many([key(number) for number in items])
                expected = {key(number) for number in items}
                assert set(found) == expected, "get_many must return the keys that are stored, and no other keys"
                for number, value in items.items():
                    assert values.is_equal(found[key(number)], value), (
                        "get_many did not return the value that was stored"
                    )

            check()

    def test_the_largest_value_fits(self) -> None:
        with self._open() as backend:
            largest = self._get_max_value_bytes(backend)
            value = os.urandom(largest)
            backend.set_many({key(1): value}, None)
            found = backend.get_many([key(1)]).get(key(1))
            assert found == value, f"a value of {largest} bytes, which is max_value_bytes, was not stored"

    def test_a_value_too_large_is_whole_or_not_there(self) -> None:
        with self._open() as backend:
            value = os.urandom(self._get_max_value_bytes(backend) + 1)
            with suppress(Exception):
                backend.set_many({key(1): value}, None)
            found = backend.get_many([key(1)]).get(key(1), value)
            assert found == value, (
                "a value above max_value_bytes must be stored whole, refused or skipped, never truncated"
            )

    def test_what_is_handed_in_is_left_alone(self) -> None:
        with self._open() as backend:
            values = self._make_values(backend)
            items = {key(1): values.sample(1), key(2): values.sample(2)}
            backend.set_many(items, None)
            assert list(items) == [key(1), key(2)], "set_many changed the mapping that it was given"
            unchanged = all(values.is_equal(items[key(n)], values.sample(n)) for n in (1, 2))
            assert unchanged, "set_many changed a value that it was given"
            items[key(1)] = values.sample(99)
            del items[key(2)]
            asked = [key(1), key(2), key(3)]
            self._require_equal(backend, backend.get_many(asked), {key(1): 1, key(2): 2})
            assert asked == [key(1), key(2), key(3)], "get_many changed the list of keys that it was given"

    # --- delete, scan, count ------------------------------------------------------------------

    def test_delete_removes_these_keys_alone(self) -> None:
        with self._open() as backend:
            self._skip_without(backend, "delete")
            self._store(backend, [1, 2, 3])
            backend.delete_many([key(1), key(3)])
            self._require_equal(backend, backend.get_many([key(1), key(2), key(3)]), {key(2): 2})
            if backend.capabilities.get:
                assert backend.get(key(1)) is None, "get returned a deleted key"

    def test_a_full_batch_is_deleted(self) -> None:
        with self._open() as backend:
            self._skip_without(backend, "delete")
            names = [key(number) for number in range(self._get_batch_size(backend))]
            self._store(backend, range(len(names)))
            backend.delete_many(names)
            left = len(backend.get_many(names))
            assert not left, f"delete_many with {len(names)} keys left {left} of them stored"

    def test_delete_of_what_is_not_there_is_no_error(self) -> None:
        with self._open() as backend:
            self._skip_without(backend, "delete")
            backend.delete_many([key(1)])
            self._store(backend, [2])
            backend.delete_many([key(1), key(2), key(2)])
            backend.delete_many([key(2)])
            assert dict(backend.get_many([key(1), key(2)])) == {}, "get_many returned a deleted key"

    def test_what_was_deleted_can_be_stored_again(self) -> None:
        with self._open() as backend:
            self._skip_without(backend, "delete")
            self._store(backend, [1])
            backend.delete_many([key(1)])
            backend.set_many({key(1): self._make_values(backend).sample(11)}, None)
            self._require_stored(backend, {key(1): 11})

    def test_scan_goes_on_while_keys_are_deleted(self) -> None:
        with self._open() as backend:
            self._skip_without(backend, "scan", "delete")
            self._store(backend, range(50))
            for name in backend.scan(f"eo1.{SCOPE}."):
                backend.delete_many([name])
            left = set(backend.scan(""))
            assert not left, (
                f"scan missed {len(left)} of 50 keys while the caller was deleting each key that scan yielded"
            )

    def test_scan_holds_up_no_writer_and_misses_nothing_that_stays(self) -> None:
        with self._open() as backend:
            self._skip_without(backend, "scan")
            self._store(backend, range(50))
            found = set()
            for place, name in enumerate(backend.scan(f"eo1.{SCOPE}.")):
                found.add(name)
                if place < 50 and place % 10 == 0:
                    fresh = range(1000 + place, 1005 + place)
                    call_with_timeout(partial(self._store, backend, fresh), "set_many during a scan")
            missed = {key(number) for number in range(50)} - found
            assert not missed, f"scan missed {len(missed)} of 50 stored keys while other keys were being written"

    def test_count_agrees_with_what_is_there(self) -> None:
        with self._open() as backend:
            self._skip_without(backend, "count")
            assert backend.count("") == 0, "count of an empty store must be 0"
            self._store(backend, range(7))
            backend.set_many({key(0, OTHER_SCOPE): self._make_values(backend).sample(0)}, None)
            self._store(backend, range(3))
            counted = [backend.count(prefix) for prefix in (f"eo1.{SCOPE}.", f"eo1.{OTHER_SCOPE}.", "", "eo1.none")]
            assert counted == [7, 1, 8, 0], f"count of four prefixes must return [7, 1, 8, 0], got {counted}"

    def test_measure_tells_the_size_of_a_scope(self) -> None:
        with self._open() as backend:
            if not hasattr(backend, "measure"):
                pytest.skip('requires the optional method "measure"')
            values, prefix = self._make_values(backend), f"eo1.{SCOPE}."
            empty = measure_store(backend, prefix)
            assert (empty.bytes or 0, empty.oldest, empty.newest) == (0, None, None), (
                f"measure of an empty store must have no bytes and no dates, got {empty}"
            )
            backend.set_many({key(number): values.sample(number) for number in range(4)}, None)
            size = measure_store(backend, prefix)
            backend.set_many({key(number, OTHER_SCOPE): values.sample(number) for number in range(20)}, None)
            assert measure_store(backend, prefix) == size, (
                "keys that do not start with the prefix changed what measure returns"
            )
            backend.set_many({key(number): values.sample(number) for number in range(4, 8)}, None)
            larger = measure_store(backend, prefix)
            if size.bytes is not None:
                assert larger.bytes is not None
                assert 0 < size.bytes < larger.bytes, (
                    f"measure returned {size.bytes} bytes for 4 values and {larger.bytes} bytes for 8"
                )

    # --- compact ------------------------------------------------------------------------------

    def test_compact_of_an_empty_store_does_no_harm(self) -> None:
        with self._open() as backend:
            self._skip_without_compact(backend)
            _compact(backend)
            self._store(backend, [1])
            self._require_stored(backend, {key(1): 1})

    def test_compact_keeps_every_entry(self) -> None:
        with self._open() as backend:
            self._skip_without_compact(backend)
            values = self._make_values(backend)
            names = [key(number) for number in range(min(300, self._get_batch_size(backend)))]
            backend.set_many({name: values.sample(number) for number, name in enumerate(names)}, None)
            backend.set_many({name: values.sample(1000 + number) for number, name in enumerate(names[:20])}, None)
            expected = {name: number if number >= 20 else 1000 + number for number, name in enumerate(names)}
            if backend.capabilities.delete:
                backend.delete_many(names[::2])
                expected = {name: expected[name] for name in names[1::2]}
            for _ in range(2):  # the second call finds nothing to give back
                _compact(backend)
                self._require_equal(backend, backend.get_many(names), expected)
            if backend.capabilities.scan:
                assert set(backend.scan("")) == expected.keys(), "compact changed which keys scan lists"
            self._store(backend, [400])
            self._require_stored(backend, {key(400): 400})

    def test_compact_keeps_entries_for_other_clients(self) -> None:
        with self._open() as backend:
            self._skip_without_compact(backend)
            self._skip_without_sharing(backend)
            self._store(backend, range(50))
            with closing(self.reopen(backend)) as other:
                self._require_stored(other, {key(1): 1})  # it has the store open before the call
                _compact(backend)
                self._require_stored(other, {key(number): number for number in range(50)})
                self._store(other, [60])
            self._require_stored(backend, {key(number): number for number in (*range(50), 60)})
            with closing(self.reopen(backend)) as later:
                self._require_stored(later, {key(number): number for number in (*range(50), 60)})

    def test_compact_loses_no_entry_of_a_writer(self) -> None:
        with self._open() as backend:
            self._skip_without_compact(backend)
            stored: list[int] = []
            compacting = [True]

            def write() -> None:
                # Keep writing until the other thread is done, because a busy machine may start that thread late.
                for seed in count():
                    self._store(backend, [seed])
                    stored.append(seed)
                    if seed >= 20 and not compacting:
                        return

            def compact() -> None:
                try:
                    for _ in range(3):
                        _compact(backend)
                finally:
                    compacting.clear()

            run_in_threads(2, lambda number: (write, compact)[number](), "set_many during compact")
            for seed in stored:
                self._require_stored(backend, {key(seed): seed})

    # --- add ----------------------------------------------------------------------------------

    def test_add_stores_what_is_absent_alone(self) -> None:
        with self._open() as backend:
            self._skip_without(backend, "add")
            values = self._make_values(backend)
            self._store(backend, [1])
            added = backend.add_many({key(1): values.sample(11), key(2): values.sample(12)}, None)
            assert set(added) == {key(2)}, "add_many must return exactly the keys that it stored"
            self._require_stored(backend, {key(1): 1, key(2): 12})

    def test_an_added_key_has_one_winner(self) -> None:
        with self._open() as backend:
            self._skip_without(backend, "add")
            values = self._make_values(backend)
            names = [key(number) for number in range(20)]
            won: dict[str, list[int]] = {name: [] for name in names}

            def work(number: int) -> None:
                # Half of the threads begin with the last key, so that the thread that starts first does not win
                # every key.
                for name in names if number % 2 else reversed(names):
                    if backend.add_many({name: values.sample(number)}, None):
                        won[name].append(number)

            run_in_threads(8, work, "add_many")
            wrong = sum(len(winners) != 1 for winners in won.values())
            assert not wrong, (
                f"eight threads called add_many with the same {len(names)} keys; "
                f"{wrong} of these keys were added by no thread or by several threads"
            )
            self._require_stored(backend, {name: winners[0] for name, winners in won.items()})

    def test_an_added_key_has_one_winner_among_processes(self) -> None:
        with self._open() as backend:
            self._skip_without(backend, "add")
            self._skip_without_sharing(backend)
            recipe = self._get_recipe_or_skip(backend)
            names = [key(number) for number in range(100)]
            requests = [{"add": names, "dimensions": list(self.dimensions)}] * 3
            won = [name for answer in run_in_processes(requests, recipe) for name in answer["won"]]
            assert sorted(won) == sorted(names), (
                f"three processes added the same {len(names)} keys; add_many reported {len(won)} keys as added"
            )

    # --- time to live -------------------------------------------------------------------------

    def test_any_ttl_is_taken(self) -> None:
        # Some TTLs are long, because some servers read a long TTL as a date. memcached does so above 30 days.
        with self._open() as backend:
            values = self._make_values(backend)
            for number, ttl in enumerate((None, 3600, 3600.5, 100 * DAY, 3650 * DAY)):
                backend.set_many({key(number): values.sample(number)}, ttl)
                self._require_stored(backend, {key(number): number})

    def test_an_entry_goes_when_its_ttl_ends(self) -> None:
        with self._open() as backend:
            self._skip_without_clock(backend)
            values = self._make_values(backend)
            backend.set_many({key(1): values.sample(1), key(2): values.sample(2)}, 60.0)
            backend.set_many({key(3): values.sample(3)}, None)
            self.advance(50.0)
            self._require_stored(backend, {key(1): 1, key(2): 2, key(3): 3})
            self.advance(11.0)
            self._require_equal(backend, backend.get_many([key(1), key(2), key(3)]), {key(3): 3})
            if backend.capabilities.get:
                assert backend.get(key(1)) is None, "get returned an expired key"

    def test_storing_again_sets_the_ttl_again(self) -> None:
        with self._open() as backend:
            self._skip_without_clock(backend)
            values = self._make_values(backend)
            backend.set_many({key(n): values.sample(n) for n in (1, 2, 3)}, 60.0)
            self.advance(50.0)
            backend.set_many({key(1): values.sample(1)}, 60.0)
            backend.set_many({key(2): values.sample(2)}, None)
            self.advance(50.0)
            self._require_equal(backend, backend.get_many([key(1), key(2), key(3)]), {key(1): 1, key(2): 2})
            backend.set_many({key(2): values.sample(2)}, 60.0)
            self.advance(61.0)
            found = dict(backend.get_many([key(1), key(2)]))
            assert found == {}, "a key did not expire: the TTL must count from the last time that the key was stored"

    def test_an_added_key_is_free_again_when_its_ttl_ends(self) -> None:
        with self._open() as backend:
            self._skip_without(backend, "add")
            self._skip_without_clock(backend)
            values = self._make_values(backend)
            added = set(backend.add_many({key(1): values.sample(1)}, 60.0))
            assert added == {key(1)}, "add_many did not add an absent key"
            self.advance(50.0)
            added = set(backend.add_many({key(1): values.sample(2)}, 60.0))
            assert added == set(), "add_many replaced a key before its TTL ended"
            self.advance(11.0)
            added = set(backend.add_many({key(1): values.sample(3)}, 60.0))
            assert added == {key(1)}, "add_many did not add a key whose TTL had ended"
            self.advance(50.0)
            backend.set_many({key(1): values.sample(3)}, 60.0)
            self.advance(50.0)
            added = set(backend.add_many({key(1): values.sample(4)}, 60.0))
            assert added == set(), "set_many did not renew the TTL of a key that add_many had added"
            self._require_stored(backend, {key(1): 3})

    # --- close, reopen, fork and other processes ----------------------------------------------

    def test_use_after_close_raises(self) -> None:
        backend: Any = self.make()
        value = self._make_values(backend).sample(1)
        backend.set_many({key(1): value}, None)
        backend.close()
        self._require_error(lambda: backend.get_many([key(1)]), "get_many after close")
        self._require_error(lambda: backend.set_many({key(2): value}, None), "set_many after close")

    def test_what_was_stored_is_there_when_opened_again(self) -> None:
        backend: Any = self.make()
        try:
            self._skip_without_lasting(backend)
            self._store(backend, range(20))
        finally:
            backend.close()
        again: Any = self.reopen(backend)
        try:
            self._require_stored(again, {key(number): number for number in range(20)})
        finally:
            again.close()

    def test_two_clients_see_one_store(self) -> None:
        with self._open() as one:
            self._skip_without_sharing(one)
            values = self._make_values(one)
            self._store(one, [1])
            two: Any = self.reopen(one)
            with closing(two):
                self._require_stored(two, {key(1): 1})
                two.set_many({key(1): values.sample(11), key(2): values.sample(2)}, None)
                self._require_stored(one, {key(1): 11, key(2): 2})
                if one.capabilities.delete:
                    two.delete_many([key(1)])
                    self._require_equal(one, one.get_many([key(1), key(2)]), {key(2): 2})
                if one.capabilities.add:
                    assert not two.add_many({key(2): values.sample(3)}, None), (
                        "add_many of one client replaced a key that another client had stored"
                    )
            self._store(one, [5])
            self._require_stored(one, {key(2): 2, key(5): 5})

    def test_a_forked_child_uses_the_store(self) -> None:
        if not hasattr(os, "fork"):
            pytest.skip("this platform has no fork")
        with self._open() as backend:
            self._skip_without(backend, "fork")
            self._skip_without_sharing(backend)
            values = self._make_values(backend)
            self._store(backend, range(10))

            made = mmap.mmap(-1, 1)
            """Number of reads that the parent has made since the fork. The parent and the child share this memory."""

            def child() -> None:
                for turn in count():
                    self._require_stored(backend, {key(number): number for number in range(10)})
                    backend.set_many({key(100 + turn % 20): values.sample(turn % 20)}, None)
                    if turn >= 20 and made[0] >= MIN_READS:
                        return

            def parent() -> None:
                self._require_stored(backend, {key(number): number for number in range(10)})
                made[0] = min(made[0] + 1, MIN_READS)

            run_in_fork(child, "a backend that was open before the fork", meanwhile=parent)
            self._require_stored(backend, {key(100 + turn): turn for turn in range(20)})
            self._store(backend, [50])
            self._require_stored(backend, {key(number): number for number in (*range(10), 50)})

    def test_a_forked_child_goes_on_without_its_parent(self) -> None:
        if not hasattr(os, "fork"):
            pytest.skip("this platform has no fork")
        with self._open() as backend:
            self._skip_without(backend, "fork")
            self._skip_without_sharing(backend)
            before = {key(number): number for number in range(10)}
            after = {key(number): number for number in range(100, 110)}
            self._store(backend, range(10))
            closed = mmap.mmap(-1, 1)
            """1 once the parent has closed its backend. The parent and the child share this memory."""

            def child() -> None:
                end = time.monotonic() + CALL_TIMEOUT
                while not closed[0]:
                    # The child must not wait forever if the parent is killed.
                    assert time.monotonic() < end, "the parent did not close its backend in time"
                    time.sleep(0.001)
                self._require_stored(backend, before)
                self._store(backend, range(100, 110))
                self._require_stored(backend, after)
                # The child exits without closing the backend, as a worker process may do. The entries that the
                # child has stored must survive.

            def parent() -> None:
                if not closed[0]:
                    backend.close()
                    closed[0] = 1
                time.sleep(0.001)

            run_in_fork(child, "a backend that the parent closed after the fork", meanwhile=parent)
            with closing(self.reopen(backend)) as again:
                found = again.get_many([*before, *after])
                lost = len(after.keys() - set(found))
                assert not lost, (
                    f"a forked child stored {len(after)} keys after its parent had closed the backend, "
                    f"and {lost} of these keys are missing"
                )
                self._require_equal(again, found, {**before, **after})

    def test_a_forked_child_is_refused(self) -> None:
        if not hasattr(os, "fork"):
            pytest.skip("this platform has no fork")
        with self._open() as backend:
            if backend.capabilities.fork:
                pytest.skip('requires a backend without the capability "fork"')
            value = self._make_values(backend).sample(1)
            backend.set_many({key(1): value}, None)

            def child() -> None:
                with pytest.raises(Exception):  # noqa: B017, PT011  (any error is fine)
                    backend.get_many([key(1)])
                with pytest.raises(Exception):  # noqa: B017, PT011
                    backend.set_many({key(2): value}, None)
                backend.close()

            run_in_fork(child, 'a backend without the capability "fork"')
            self._require_stored(backend, {key(1): 1})

    def test_other_processes_use_the_store(self) -> None:
        with self._open() as backend:
            self._skip_without_sharing(backend)
            recipe = self._get_recipe_or_skip(backend)
            self._store(backend, range(10))
            expect = {key(number): number for number in range(10)}
            stores = [{key(100 * child + n): n for n in range(30)} for child in (1, 2, 3)]
            values = {"holds": backend.capabilities.holds, "dimensions": list(self.dimensions)}
            requests = [{"store": store, "expect": expect, **values} for store in stores]
            for answer in run_in_processes(requests, recipe):
                wrong = len(answer["wrong"])
                assert not wrong, f"another process did not see {wrong} of {len(expect)} keys that this process stored"
            for store in stores:
                self._require_stored(backend, store)

    def test_processes_use_the_store_one_after_another(self) -> None:
        backend: Any = self.make()
        try:
            self._skip_without_lasting(backend)
            recipe = self._get_recipe_or_skip(backend)
            self._store(backend, range(10))
        finally:
            backend.close()
        expected = {key(number): number for number in range(10)}
        values = {"holds": backend.capabilities.holds, "dimensions": list(self.dimensions)}
        for child in (1, 2):
            store = {key(100 * child + n): n for n in range(10)}
            (answer,) = run_in_processes([{"store": store, "expect": expected, **values}], recipe)
            wrong = len(answer["wrong"])
            assert not wrong, f"a later process did not see {wrong} of {len(expected)} keys that earlier ones stored"
            expected |= store
        with closing(self.reopen(backend)) as again:
            self._require_stored(again, expected)

    def test_a_writer_that_is_killed_leaves_whole_values(self) -> None:
        if not hasattr(signal, "SIGKILL"):
            pytest.skip("this platform has no kill -9")
        backend: Any = self.make()
        try:
            self._skip_without_lasting(backend)
            recipe = self._get_recipe_or_skip(backend)
            self._store(backend, [1])
            for turn, batches in enumerate((2, 5)):
                # Each round uses a different scope, so that its keys are new.
                scope = f"{turn:016x}"
                is_exclusive = backend.capabilities.scope == "single"
                if is_exclusive:
                    backend.close()
                stored = kill_while_writing(
                    recipe,
                    scope=scope,
                    batches=batches,
                    holds=backend.capabilities.holds,
                    dimensions=list(self.dimensions),
                )
                if is_exclusive:
                    backend = self.reopen(backend)
                # On a busy machine the writer is killed late, and may have stored more keys than max_batch. The keys
                # are therefore read in batches.
                size = self._get_batch_size(backend)
                for start in range(0, stored, size):
                    numbers = range(start, min(start + size, stored))
                    self._require_stored(backend, {key(number, scope): number for number in numbers})
                perhaps = {key(number, scope): number for number in range(stored, stored + 2 * WRITE_BATCH)}
                there = backend.get_many(list(perhaps))
                self._require_equal(backend, there, {name: seed for name, seed in perhaps.items() if name in there})
                if backend.capabilities.scan:
                    others = set(backend.scan(f"eo1.{scope}.")) - {key(number, scope) for number in range(stored)}
                    left = len(others - set(perhaps))
                    assert not left, f"after a writer was killed, scan yielded {left} names that are not keys"
                backend.set_many({key(0, scope): self._make_values(backend).sample(2)}, None)
                self._require_stored(backend, {key(0, scope): 2, key(1): 1})
        finally:
            backend.close()

    # --- threads and time ---------------------------------------------------------------------

    def test_threads_keep_their_values_apart(self) -> None:
        with self._open() as backend:
            values = self._make_values(backend)

            stay: list[dict[str, int]] = [{} for _ in range(8)]

            def work(number: int) -> None:
                for turn in range(10):
                    seeds = range(1000 * number + 10 * turn, 1000 * number + 10 * turn + 10)
                    own = {key(seed): seed for seed in seeds}
                    backend.set_many({name: values.sample(seed) for name, seed in own.items()}, None)
                    self._require_stored(backend, own)
                    if backend.capabilities.delete:
                        gone = list(own)[::2]
                        backend.delete_many(gone)
                        own = {name: seed for name, seed in own.items() if name not in gone}
                        self._require_equal(backend, backend.get_many([*gone, *own]), own)
                    stay[number] |= own

            run_in_threads(len(stay), work, "set_many and get_many from eight threads")
            for own in stay:
                self._require_stored(backend, own)

    def test_threads_that_overwrite_leave_one_whole_value(self) -> None:
        with self._open() as backend:
            values = self._make_values(backend)
            names = [key(number) for number in range(5)]
            written = [values.sample(seed) for seed in range(6)]

            writing = list(written)
            looks = [0, 0]

            def write(value: Any) -> None:
                turns = 0
                try:
                    # Keep writing until both readers have read enough, because a busy machine may start the readers
                    # late.
                    while turns < 20 or min(looks) < MIN_READS:
                        backend.set_many(dict.fromkeys(names, value), None)
                        turns += 1
                finally:
                    writing.pop()

            def read(reader: int) -> None:
                try:
                    while writing:
                        for value in backend.get_many(names).values():
                            known = any(values.is_equal(value, one) for one in written)
                            assert known, "get_many returned a value that no thread had stored"
                        looks[reader] += 1
                finally:
                    looks[reader] = MIN_READS

            def work(number: int) -> None:
                if number < len(written):
                    write(written[number])
                else:
                    read(number - len(written))

            run_in_threads(len(written) + len(looks), work, "set_many from six threads and get_many from two threads")
            lost = len(set(names) - set(backend.get_many(names)))
            assert not lost, f"every thread stored {len(names)} keys, and {lost} of these keys are missing"

    def test_a_call_past_its_deadline_raises(self) -> None:
        with self._open() as backend:
            self._skip_without(backend, "deadline")
            self._store(backend, [1, 2])
            value = self._make_values(backend).sample(9)
            calls: dict[str, Callable[[], object]] = {
                "get_many": lambda: backend.get_many([key(1), key(2)]),
                "set_many": lambda: backend.set_many({key(9): value}, None),
            }
            for name, call in calls.items():
                with deadline(0.0), pytest.raises(TimeoutError):
                    call_with_timeout(call, f"{name} past its deadline")
            self._require_stored(backend, {key(1): 1, key(2): 2})
            with deadline(CALL_TIMEOUT):
                self._require_stored(backend, {key(1): 1, key(2): 2})

    def test_a_store_that_stalls_is_left_by_the_deadline(self) -> None:
        with self._open() as backend:
            self._skip_without(backend, "deadline")
            if not self._overrides("stall"):
                pytest.skip("requires stall(), a context in which the store does not answer")
            self._store(backend, [1, 2, 3])

            def ask() -> None:
                with deadline(0.2):
                    backend.get_many([key(1)])

            with self.stall(backend), pytest.raises(TimeoutError):
                call_with_timeout(ask, "while the store did not answer, get_many")
            # The reply that arrives too late must not be taken for the reply to the next call.
            self._require_equal(backend, backend.get_many([key(2)]), {key(2): 2})
            self._require_stored(backend, {key(1): 1, key(2): 2, key(3): 3})

    # --- the network --------------------------------------------------------------------------

    def test_a_server_that_is_gone_is_an_error_and_no_miss(self) -> None:
        with self._open() as backend, self._open_through_proxy(backend) as (proxy, client):
            value = self._make_values(backend).sample(9)
            proxy.fault = NetworkFault("refuse")
            self._require_error(lambda: client.get_many([key(1)]), "get_many without a server")
            self._require_error(lambda: client.set_many({key(9): value}, None), "set_many without a server")
            if backend.capabilities.delete:
                self._require_error(lambda: client.delete_many([key(1)]), "delete_many without a server")
            proxy.heal()
            self._require_recovery(client)
            self._require_stored(backend, {key(1): 1, key(2): 2})

    def test_a_reply_that_ends_early_is_an_error(self) -> None:
        with self._open() as backend, self._open_through_proxy(backend) as (proxy, client):
            for kind in ("cut", "reset", "garbage"):
                for after in (0, 3):
                    proxy.fault = NetworkFault(kind, after=after)
                    what = f"get_many, with the fault {kind!r} after {after} bytes of the reply,"
                    self._require_error(lambda: client.get_many([key(1), key(2)]), what)
                    proxy.heal()
                    self._require_recovery(client)

    def test_a_connection_that_died_silently_is_left_by_the_deadline(self) -> None:
        with self._open() as backend, self._open_through_proxy(backend) as (proxy, client):
            self._skip_without(backend, "deadline")
            proxy.fault = NetworkFault("half_open")

            def ask() -> None:
                with deadline(0.2):
                    client.get_many([key(1)])

            # The call may succeed, because a client that notices the dead connection may open a new connection.
            with suppress(Exception):
                call_with_timeout(ask, "get_many on a dead connection")
            self._require_recovery(client)

    def test_a_node_that_is_away_takes_its_own_keys_alone(self) -> None:
        with self._open() as backend:
            if not self._overrides("lose_a_node"):
                pytest.skip("requires lose_a_node(), a context in which one of several nodes is down")
            values = self._make_values(backend)
            self._store(backend, range(100))
            with self.lose_a_node(backend):
                held = {key(number): number for number in range(100)}
                found, failed = self._require_partial_answer(lambda: backend.get_many(list(held)), held)
                assert isinstance(found, Mapping), f"PartialAnswer.answer must be a mapping, got {type(found).__name__}"
                require_partition(found, failed, held)
                self._require_equal(backend, found, {name: seed for name, seed in held.items() if name not in failed})
                new = {key(number): number for number in range(100, 200)}
                items = {name: values.sample(seed) for name, seed in new.items()}
                _, failed = self._require_partial_answer(lambda: backend.set_many(items, None), new)
                self._require_written(backend, {name: seed for name, seed in new.items() if name not in failed})
                if backend.capabilities.add:
                    new = {key(number): number for number in range(200, 300)}
                    items = {name: values.sample(seed) for name, seed in new.items()}
                    added, failed = self._require_partial_answer(lambda: backend.add_many(items, None), new)
                    require_partition(added, failed, new)
                    assert set(added) == new.keys() - failed, "add_many must return exactly the keys that it stored"
                if backend.capabilities.delete:
                    self._require_error(lambda: backend.delete_many(list(held)), "while a node is down, delete_many")
            self._require_all_nodes_back(backend)

    # --- the async twin -----------------------------------------------------------------------

    def test_the_twin_shares_the_store(self) -> None:
        with self._open() as backend:
            self._skip_without(backend, "twin")
            values = self._make_values(backend)
            self._store(backend, [1])

            async def use(twin: Any) -> None:
                for method in ("get_many", "set_many", "close"):
                    is_async = iscoroutinefunction(getattr(twin, method))
                    assert is_async, f"the twin's {method} must be a coroutine function (async def)"
                await twin.set_many({}, None)
                assert dict(await twin.get_many([])) == {}, "the twin's get_many([]) must return an empty mapping"
                self._require_equal(backend, await twin.get_many([key(1), key(2), key(1)]), {key(1): 1})
                await twin.set_many({key(2): values.sample(2), key(1): values.sample(11)}, 3600.0)
                self._require_equal(backend, await twin.get_many([key(1), key(2)]), {key(1): 11, key(2): 2})

            run_with_twin(backend, use)
            self._require_stored(backend, {key(1): 11, key(2): 2})

    def test_every_loop_has_its_own_twin(self) -> None:
        with self._open() as backend:
            self._skip_without(backend, "twin")
            self._store(backend, [1])

            async def use(twin: Any) -> None:
                self._require_equal(backend, await twin.get_many([key(1)]), {key(1): 1})

            for _ in range(2):
                run_with_twin(backend, use)
            run_in_threads(3, lambda _: run_with_twin(backend, use), "twins in three event loops")

    def test_the_twin_answers_many_at_once(self) -> None:
        with self._open() as backend:
            self._skip_without(backend, "twin")
            self._store(backend, range(40))

            async def use(twin: Any) -> None:
                answers = await asyncio.gather(*(twin.get_many([key(n), key(n + 1)]) for n in range(39)))
                for number, answer in enumerate(answers):
                    self._require_equal(backend, answer, {key(number): number, key(number + 1): number + 1})

            run_with_twin(backend, use)

    def test_a_cancelled_twin_call_shifts_no_reply(self) -> None:
        with self._open() as backend:
            self._skip_without(backend, "twin")
            self._store(backend, range(40))

            async def use(twin: Any) -> None:
                for turn in range(39):
                    call = asyncio.ensure_future(twin.get_many([key(turn)]))
                    for _ in range(turn % 5):
                        await asyncio.sleep(0)
                    call.cancel()
                    await asyncio.gather(call, return_exceptions=True)
                    self._require_equal(backend, await twin.get_many([key(turn + 1)]), {key(turn + 1): turn + 1})

            run_with_twin(backend, use)

    def test_a_blocked_loop_is_no_timeout_of_the_twin(self) -> None:
        with self._open() as backend:
            self._skip_without(backend, "twin")
            self._store(backend, [1])

            async def use(twin: Any) -> None:
                self._require_equal(backend, await read_while_loop_is_blocked(twin, [key(1)]), {key(1): 1})

            run_with_twin(backend, use)

    def test_use_of_a_closed_twin_raises(self) -> None:
        with self._open() as backend:
            self._skip_without(backend, "twin")
            self._store(backend, [1])

            async def use(twin: Any) -> None:
                await twin.get_many([key(1)])
                await twin.close()
                await twin.close()
                with pytest.raises(Exception):  # noqa: B017, PT011  (any error is fine)
                    await twin.get_many([key(1)])

            run_with_twin(backend, use)
            self._require_stored(backend, {key(1): 1})

    # --- random sequences of calls ------------------------------------------------------------

    def test_it_behaves_as_a_dict(self) -> None:
        """Make random calls on the backend and the same calls on a dict, let time pass, and compare the results."""
        compare_with_dict(
            self.make,
            reopen=self.reopen if self._overrides("reopen") else None,
            advance=self.advance if self._overrides("advance") else None,
            keys=[key(number) for number in range(3)] + [key(number, OTHER_SCOPE) for number in range(2)],
            prefixes=["", "eo1.", f"eo1.{SCOPE}.", f"eo1.{OTHER_SCOPE}.", key(0)],
            dimensions=self.dimensions,
            settings=self._make_settings(),
        )

    # --- helpers ------------------------------------------------------------------------------

    @contextmanager
    def _open_with(self, make_items: MakeItems, *, singly: bool = False) -> Iterator[Any]:
        with self._open() as backend:
            items = make_items(backend.capabilities)
            size = 1 if singly else self._get_batch_size(backend)
            for start in range(0, len(items), size):
                backend.set_many(dict(islice(items.items(), start, start + size)), None)
            yield backend

    def _list_decoys(self) -> set[str]:
        # A prefix is not a pattern, so its dot must match only a dot.
        return {f"eo1.{SCOPE}a{'0' * 63}", f"eo1a{SCOPE}.{'0' * 64}"}

    def _open(self) -> AbstractContextManager[Any]:
        return closing(self.make())

    @contextmanager
    def _open_through_proxy(self, backend: Any) -> Iterator[tuple[FaultProxy, Any]]:
        """Yield a proxy in front of the server, and a client that uses the proxy and has made one call."""
        if not self._overrides("server"):
            pytest.skip("requires server() and through(), which let a client connect to the server through a proxy")
        host, port = self.server()
        self._store(backend, [1, 2])
        with FaultProxy(host, port) as proxy, closing(self.through(backend, *proxy.address)) as client:
            self._require_stored(client, {key(1): 1, key(2): 2})
            yield proxy, client
            proxy.heal()

    def _require_recovery(self, client: Any) -> None:
        """Require that a client works again, after a few calls that may still use dead connections."""
        for _ in range(RECOVERY_CALLS):
            with suppress(Exception), deadline(2.0):
                client.get_many([key(1)])
        self._require_stored(client, {key(1): 1, key(2): 2})

    def _require_partial_answer(self, call: Callable[[], Any], asked: Mapping[str, int]) -> tuple[Any, frozenset[str]]:
        """Require that a call raises PartialAnswer. Return the answer and the failed keys in this error."""

        def call_with_deadline() -> Any:
            with deadline(CALL_TIMEOUT / 2):
                return call()

        partial = None
        try:
            call_with_timeout(call_with_deadline, "while a node was down, a call")
        except PartialAnswer as raised:
            partial = raised
        assert partial is not None, "a call must raise PartialAnswer while a node is down, but it returned normally"
        others = len(partial.failed - asked.keys())
        assert not others, f"PartialAnswer.failed has keys that were not in the call: {others}"
        assert partial.failed != asked.keys(), "PartialAnswer.failed contains all keys, but only one node is down"
        return partial.answer, partial.failed

    def _require_written(self, backend: Any, expected: Mapping[str, int]) -> None:
        """Require that all ``expected`` items are stored, because set_many did not report them as failed."""
        try:
            found, away = backend.get_many(list(expected)), frozenset[str]()
        except PartialAnswer as partial:
            found, away = partial.answer, partial.failed
        lost = len(expected.keys() & away | expected.keys() - set(found or ()))
        assert not lost, f"{lost} keys were not stored and are not in PartialAnswer.failed"
        self._require_equal(backend, found, expected)

    def _require_all_nodes_back(self, backend: Any) -> None:
        """Require that all keys can be stored again. Retry, because clients may skip the node for a while."""
        end = time.monotonic() + CALL_TIMEOUT
        while True:
            try:
                self._store(backend, range(100))
                break
            except Exception:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)
        self._require_stored(backend, {key(number): number for number in range(100)})

    def _skip_without_clock(self, backend: Any) -> None:
        self._skip_without(backend, "ttl")
        if not self._overrides("advance"):
            pytest.skip("requires advance(), which lets time pass for the backend")

    def _skip_without_compact(self, backend: Any) -> None:
        if not hasattr(backend, "compact"):
            pytest.skip('requires the optional method "compact"')

    def _get_max_value_bytes(self, backend: Any) -> int:
        largest: int | None = backend.capabilities.max_value_bytes
        if backend.capabilities.holds != "frames" or largest is None or largest > 2**26:
            pytest.skip("requires a backend of frames whose max_value_bytes is at most 64 MiB")
        return largest

    def _store(self, backend: Any, numbers: Sequence[int]) -> None:
        """Store ``sample(n)`` under ``key(n)``."""
        values = self._make_values(backend)
        backend.set_many({key(number): values.sample(number) for number in numbers}, None)


def _compact(backend: Any) -> None:
    """Call ``compact``, and check that it returns one sentence."""
    done = backend.compact()
    assert isinstance(done, str), f"compact must return a str, got {type(done).__name__}"
    assert done.strip(), "compact must return one sentence that says how large the store is and was, not an empty str"
    assert "\n" not in done, "compact must return one line"


register_standard_tests(BackendContract)
