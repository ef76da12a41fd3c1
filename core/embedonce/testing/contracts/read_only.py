"""Standard tests of read-only backends: subclass :class:`ReadOnlyContract` and run pytest.

``docs/testing.md`` lists all tests.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedonce._engine.codec import Codec
from embedonce.cache import Cache
from embedonce.contracts import Backend, Capabilities
from embedonce.errors import EraseIncomplete, TierError
from embedonce.keys import CARD_PREFIX
from embedonce.testing.fakes import CountingProvider, DictBackend
from embedonce.vectors import Entry, decode_frames, encode_frames

from .stored import (
    OTHER_SCOPE,
    MakeItems,
    StoredContract,
    check_capabilities,
    check_methods,
    get_batch_size,
    measure_store,
)
from .support import CALL_TIMEOUT, run_in_fork, run_in_processes, run_in_threads, run_with_twin
from .values import SCOPE, Values, key, make_values, require_samples
from .whole import register_standard_tests

MIN_READS = 5
"""Minimum number of reads that a parent makes while its forked child reads too."""
THREADS = 8
TEXTS = ("one", "two", "three")

Snapshot: TypeAlias = Mapping[str, tuple[int, bytes]]


class ReadOnlyContract(StoredContract):
    """Subclass this class as ``Test…`` and write :meth:`make`; pytest does the rest.

    The other methods are optional: tests that need a missing method are skipped. The exception is :meth:`reopen`,
    which is required for a backend whose scope is ``single``, ``host`` or ``network``.
    """

    def make(self, items: Mapping[str, Any]) -> Backend:
        """Make a new store that holds exactly these items, and return a backend that reads it.

        A key is ``eo1.<16 hex digits>.<64 hex digits>``, or ``eo1.card.<16 hex digits>`` for a space card. The keys are
        in no particular order. A value is an :class:`~embedonce.vectors.Entry`. For a backend that holds ``"frames"``,
        it is bytes. The caller closes the backend.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define how to make a store: def make(self, items) -> Backend"
        )

    def damage(self, backend: Any, name: str) -> None:
        """Change some bytes of the value under the key ``name`` in the store of ``backend``, which is closed."""
        raise NotImplementedError

    def folder(self, backend: Any) -> Path:
        """Return the folder with the files of the store of ``backend``, or its only file."""
        raise NotImplementedError

    # --- what the backend declares ------------------------------------------------------------

    def test_it_declares_that_it_is_read_only(self) -> None:
        with self._open_samples([1]) as backend:
            declared = backend.capabilities
            check_capabilities(declared)
            assert declared.read_only, (
                "capabilities.read_only must be True; a backend that can be written to is tested by BackendContract"
            )
            for name in ("delete", "add"):
                assert not getattr(declared, name), f'a read-only backend must not declare the capability "{name}"'
            backend.get_many([key(1), key(2)])
            assert backend.capabilities == declared, "capabilities must not change while the backend is in use"

    def test_declared_extras_are_there(self) -> None:
        with self._open_samples([1]) as backend:
            check_methods(backend, ("get_many", "close"))

    # --- what it holds ------------------------------------------------------------------------

    def test_an_empty_store_has_nothing(self) -> None:
        with self._open_samples([]) as backend:
            assert dict(backend.get_many([])) == {}, "get_many([]) must return an empty mapping"
            assert dict(backend.get_many([key(1), CARD_PREFIX + SCOPE])) == {}, (
                "get_many must leave out a missing key; it must not return None for the key"
            )
            caps = backend.capabilities
            if caps.get:
                assert backend.get(key(1)) is None, "get must return None for a missing key"
            if caps.scan:
                assert list(backend.scan("eo1.")) == [], "scan of an empty store must return no keys"
            if caps.count:
                assert backend.count("eo1.") == 0, "count of an empty store must be 0"

    def test_a_miss_is_absent(self) -> None:
        with self._open_samples([1, 3]) as backend:
            found = backend.get_many([key(0), key(1), key(2), key(3), key(4)])
            assert set(found) == {key(1), key(3)}, "get_many must return the keys that are stored, and no other keys"
            self._require_equal(backend, found, {key(1): 1, key(3): 3})

    def test_what_is_handed_in_is_left_alone(self) -> None:
        with self._open_samples([1, 2]) as backend:
            asked = [key(2), key(1), key(3)]
            self._require_equal(backend, backend.get_many(asked), {key(2): 2, key(1): 1})
            assert asked == [key(2), key(1), key(3)], "get_many changed the list of keys that it was given"
            self._require_equal(backend, backend.get_many((key(1), key(2))), {key(1): 1, key(2): 2})

    def test_one_more_than_a_full_batch_is_right_or_refused(self) -> None:
        def make_items(caps: Capabilities) -> Mapping[str, Any]:
            return self._make_samples(caps, range(get_batch_size(caps) + 1))

        with self._open_with(make_items) as backend:
            expected = {key(number): number for number in range(get_batch_size(backend.capabilities) + 1)}
            try:
                found = backend.get_many(list(expected))
            except Exception:
                return
            self._require_equal(backend, found, expected)

    def test_keys_that_look_alike_are_different(self) -> None:
        # Some have the same first bytes, some the same last ones, and some differ only in the scope.
        one = key(1).rpartition(".")[2]
        digests = [one, one[:-1] + _next_digit(one[-1]), one[:16] + one[16:][::-1], _next_digit(one[0]) + one[1:]]
        digests += ["0" * 64, "0" * 63 + "1", "f" * 64, "f" * 63 + "e", "1" + "0" * 63]
        scopes = (SCOPE, SCOPE[:-1] + "0", OTHER_SCOPE, "0" * 16)
        alike = [f"eo1.{scope}.{digest}" for scope in scopes for digest in digests]
        half = {name: seed for seed, name in enumerate(alike) if seed % 2}

        def make_items(caps: Capabilities) -> Mapping[str, Any]:
            values = self._choose_values(caps)
            return {name: values.sample(seed) for name, seed in half.items()}

        with self._open_with(make_items) as backend:
            self._require_equal(backend, backend.get_many(alike), half)
            for name in alike:
                self._require_equal(backend, backend.get_many([name]), {name: half[name]} if name in half else {})

    def test_any_store_answers_as_a_dict(self) -> None:
        """Make stores with random keys and values, and compare the answers to random questions with a dict."""
        names = [*(key(number) for number in range(6)), *(key(number, OTHER_SCOPE) for number in range(3))]
        prefixes = ["", "eo1.", f"eo1.{SCOPE}.", f"eo1.{OTHER_SCOPE}.", key(0), key(0)[:40], CARD_PREFIX]

        @self._make_settings()
        @given(
            st.dictionaries(st.sampled_from(names), st.integers(0, 2**32), max_size=len(names)),
            st.lists(st.sampled_from(names), max_size=12),
            st.sampled_from(prefixes),
        )
        def check(held: dict[str, int], asked: list[str], prefix: str) -> None:
            def make_items(caps: Capabilities) -> Mapping[str, Any]:
                values = self._choose_values(caps)
                return {name: values.sample(seed) for name, seed in held.items()}

            with self._open_with(make_items) as backend:
                there = {name: held[name] for name in asked if name in held}
                self._require_equal(backend, backend.get_many(asked), there)
                matching = sorted(name for name in held if name.startswith(prefix))
                if backend.capabilities.scan:
                    assert sorted(backend.scan(prefix)) == matching, f"scan({prefix!r}) must yield the keys that match"
                if backend.capabilities.count:
                    counted = backend.count(prefix)
                    assert counted == len(matching), f"count({prefix!r}) must be {len(matching)}, got {counted}"

        check()

    def test_frames_come_back_exactly(self) -> None:
        """A backend that holds either gets the frames of an encrypted tier as bytes."""
        values = make_values("frames", self.dimensions)

        def make_items(caps: Capabilities) -> Mapping[str, Any]:
            if caps.holds != "either":
                pytest.skip('requires a backend that declares holds="either"')
            return {key(number): values.sample(number) for number in range(20)}

        with self._open_with(make_items) as backend:
            expected = {key(number): number for number in range(20)}
            require_samples(values, backend.get_many([*expected, key(99)]), expected)

    def test_measure_tells_the_size_of_a_scope(self) -> None:
        def make_items(caps: Capabilities) -> Mapping[str, Any]:
            values = self._choose_values(caps)
            others = {key(number, OTHER_SCOPE): values.sample(number) for number in range(20)}
            return {**self._make_samples(caps, range(4)), **others}

        with self._open_with(make_items) as backend:
            if not hasattr(backend, "measure"):
                pytest.skip('requires the optional method "measure"')
            small, large = (measure_store(backend, f"eo1.{scope}.") for scope in (SCOPE, OTHER_SCOPE))
            nothing = measure_store(backend, "eo1.0000000000000000.")
            assert (nothing.bytes or 0, nothing.oldest, nothing.newest) == (0, None, None), (
                f"measure of a scope without entries must have no bytes and no dates, got {nothing}"
            )
            if small.bytes is not None:
                assert large.bytes is not None
                assert 0 < small.bytes < large.bytes, (
                    f"measure returned {small.bytes} bytes for 4 values and {large.bytes} bytes for 20"
                )

    # --- nothing is written -------------------------------------------------------------------

    def test_reads_write_nothing(self) -> None:
        with self._open_samples(range(20)) as backend:
            if not self._overrides("folder"):
                pytest.skip("requires folder(), the folder with the files of the store")
            before = _take_snapshot(self.folder(backend))
            assert before, "folder() must return the folder with the files of the store, but it has none"
            backend.get_many([key(number) for number in range(30)])
            for extra in ("scan", "count", "measure"):
                if hasattr(backend, extra):
                    found = getattr(backend, extra)("eo1.")
                    if extra == "scan":
                        list(found)
            for extra in ("describe", "verify"):
                if hasattr(backend, extra):
                    getattr(backend, extra)()
            if self._overrides("reopen") and backend.capabilities.scope != "single":
                with closing(self.reopen(backend)) as other:
                    other.get_many([key(1)])
            after = _take_snapshot(self.folder(backend))
            changed = sorted({name for name in {**before, **after} if before.get(name) != after.get(name)})
            assert not changed, f"reading the store changed its files: {', '.join(changed)}"

    def test_a_chain_reads_it_and_writes_nothing_to_it(self) -> None:
        items = _compute_items()

        def make_items(caps: Capabilities) -> Mapping[str, Any]:
            return items if caps.holds == "frames" else _decode_items(items)

        provider = CountingProvider()
        with self._open_with(make_items) as backend, Cache(provider, [DictBackend(), backend]) as cache:
            first, name = cache.tiers
            fetched = cache.fetch([*TEXTS, "new"])
            assert list(fetched.sources) == [name] * len(TEXTS) + ["provider"], (
                f"a chain did not find its entries in the tier: the sources are {list(fetched.sources)}"
            )
            for text, row in zip(TEXTS, fetched.rows, strict=False):
                assert row is not None
                assert row.tolist() == provider.vector_of(text).tolist(), "a chain got another vector from the tier"
            promoted = list(cache.fetch(list(TEXTS)).sources)
            assert promoted == [first] * len(TEXTS), "the entries of the tier were not copied into the faster tier"
            counted = cache.stats().tiers[name]
            assert (counted.stored, counted.errors, counted.dropped) == (0, 0, 0), "a chain wrote to a read-only tier"
            cache.forget(["new"])
            with pytest.raises(EraseIncomplete) as caught:
                cache.forget([TEXTS[0]])
            kept = {tier: sum(scopes.values()) for tier, scopes in caught.value.kept.items()}
            assert kept == {name: 1}, f"forget must say that the tier keeps 1 entry, but it said {kept}"

    # --- clients, processes, threads ----------------------------------------------------------

    def test_use_after_close_raises(self) -> None:
        with self._open_samples([1]) as backend:
            backend.close()
            self._require_error(lambda: backend.get_many([key(1)]), "get_many after close")

    def test_what_it_holds_is_there_when_opened_again(self) -> None:
        with self._open_samples(range(20)) as backend:
            self._skip_without_lasting(backend)
            backend.close()
            with closing(self.reopen(backend)) as again:
                self._require_stored(again, {key(number): number for number in range(20)})

    def test_clients_close_alone(self) -> None:
        with self._open_samples(range(20)) as one:
            self._skip_without_sharing(one)
            expected = {key(number): number for number in range(20)}
            with closing(self.reopen(one)) as two:
                self._require_stored(two, expected)
                self._require_stored(one, expected)
            self._require_stored(one, expected)

    def test_threads_read_at_once(self) -> None:
        with self._open_samples(range(100)) as backend:

            def read(thread: int) -> None:
                for turn in range(20):
                    numbers = range((7 * turn + 11 * thread) % 90, 110)[:20]
                    there = {key(number): number for number in numbers if number < 100}
                    self._require_equal(backend, backend.get_many([key(number) for number in numbers]), there)

            run_in_threads(THREADS, read, "get_many from eight threads")

    def test_processes_read_at_once(self) -> None:
        with self._open_samples(range(20)) as backend:
            self._skip_without_sharing(backend)
            recipe = self._get_recipe_or_skip(backend)
            expect = {key(number): number for number in range(20)}
            holds = _get_tested_form(backend.capabilities)
            request = {"store": {}, "expect": expect, "holds": holds, "dimensions": list(self.dimensions)}
            for answer in run_in_processes([request] * 3, recipe):
                wrong = len(answer["wrong"])
                assert not wrong, f"another process did not see {wrong} of {len(expect)} keys of the store"

    def test_a_forked_child_reads_the_store(self) -> None:
        if not hasattr(os, "fork"):
            pytest.skip("this platform has no fork")
        with self._open_samples(range(10)) as backend:
            self._skip_without(backend, "fork")
            self._skip_without_sharing(backend)
            expected = {key(number): number for number in range(10)}
            made = mmap.mmap(-1, 1)
            """Number of reads that the parent has made since the fork. The parent and the child share this memory."""

            def child() -> None:
                end = time.monotonic() + CALL_TIMEOUT
                while made[0] < MIN_READS:
                    # The child must not wait forever if the parent is killed.
                    assert time.monotonic() < end, "the parent did not read in time"
                    self._require_stored(backend, expected)
                self._require_stored(backend, expected)
                backend.close()

            def parent() -> None:
                self._require_stored(backend, expected)
                made[0] = min(made[0] + 1, MIN_READS)

            run_in_fork(child, "a backend that was open before the fork", meanwhile=parent)
            self._require_stored(backend, expected)

    def test_a_forked_child_goes_on_without_its_parent(self) -> None:
        if not hasattr(os, "fork"):
            pytest.skip("this platform has no fork")
        with self._open_samples(range(10)) as backend:
            self._skip_without(backend, "fork")
            self._skip_without_sharing(backend)
            closed = mmap.mmap(-1, 1)
            """1 once the parent has closed its backend. The parent and the child share this memory."""

            def child() -> None:
                end = time.monotonic() + CALL_TIMEOUT
                while not closed[0]:
                    assert time.monotonic() < end, "the parent did not close its backend in time"
                    time.sleep(0.001)
                self._require_stored(backend, {key(number): number for number in range(10)})

            def parent() -> None:
                backend.close()
                closed[0] = 1

            run_in_fork(child, "a backend that the parent closed after the fork", meanwhile=parent)

    def test_a_forked_child_is_refused(self) -> None:
        if not hasattr(os, "fork"):
            pytest.skip("this platform has no fork")
        with self._open_samples([1]) as backend:
            if backend.capabilities.fork:
                pytest.skip('requires a backend without the capability "fork"')

            def child() -> None:
                with pytest.raises(Exception):  # noqa: B017, PT011  (any error is fine)
                    backend.get_many([key(1)])
                backend.close()

            run_in_fork(child, 'a backend without the capability "fork"')
            self._require_stored(backend, {key(1): 1})

    def test_the_twin_reads_the_store(self) -> None:
        with self._open_samples(range(40)) as backend:
            self._skip_without(backend, "twin")

            async def use(twin: Any) -> None:
                assert dict(await twin.get_many([])) == {}, "the twin's get_many([]) must return an empty mapping"
                asked = [key(number) for number in (1, 1, 2, 99)]
                self._require_equal(backend, await twin.get_many(asked), {key(1): 1, key(2): 2})
                await twin.close()
                await twin.close()

            run_with_twin(backend, use)
            self._require_stored(backend, {key(1): 1})

    # --- damage -------------------------------------------------------------------------------

    def test_a_damaged_value_is_corrupt_alone(self) -> None:
        with self._open_damaged(key(3)) as (backend, items):
            try:
                found = backend.get_many(list(items))
            except Exception as error:
                raise AssertionError(
                    f"get_many raised {type(error).__name__} because one value is damaged; it must return the others"
                ) from error
            codec = Codec(backend.capabilities, None, longest_ttl=None, clock=time.time)
            decoded = codec.decode(found, dtype="float32", dimensions=None)
            assert set(decoded.corrupt) == {key(3)}, (
                "a damaged value must count as corrupt, and no other value: return what is stored, or b''; "
                f"{len(decoded.corrupt)} values count as corrupt, and {len(items) - len(found)} are missing"
            )
            wanted = make_values("entries", self.dimensions)
            for name, entry in decoded.entries.items():
                assert wanted.is_equal(entry, items[name]), "get_many returned a wrong value beside a damaged one"

    def test_verify_accepts_an_intact_store(self) -> None:
        with self._open_samples(range(20)) as backend:
            self._skip_without_verify(backend)
            words = backend.verify()
            assert isinstance(words, str), f"verify must return a str, got {type(words).__name__}"
            assert words.strip(), "verify must say in a few words what is intact"
            assert "\n" not in words, "verify must return one line"

    def test_verify_finds_damage(self) -> None:
        with self._open_damaged(key(3)) as (backend, _):
            self._skip_without_verify(backend)
            message = None
            try:
                backend.verify()
            except TierError as error:
                message = str(error)
            assert message is not None, "verify must raise a TierError, because a value of the store is damaged"
            assert message.strip(), "the TierError of verify must say what is damaged, and what to do"

    # --- helpers ------------------------------------------------------------------------------

    @contextmanager
    def _open_with(self, make_items: MakeItems, *, singly: bool = False) -> Iterator[Any]:
        backend: Any = self.make(make_items(self._read_capabilities()))
        with closing(backend):
            yield backend

    def _read_capabilities(self) -> Capabilities:
        """Return the capabilities of the backend. They decide which values a store gets, so an empty store is made."""
        if not hasattr(self, "_known"):
            with closing(self.make({})) as backend:
                declared = backend.capabilities
            # An invalid declaration is reported by the test that is about it.
            self._known = declared if isinstance(declared, Capabilities) else Capabilities(read_only=True)
        return self._known

    @contextmanager
    def _open_damaged(self, name: str) -> Iterator[tuple[Any, Mapping[str, Entry]]]:
        """Yield a backend, one of whose values is damaged, and the entries that its store has had."""
        if not self._overrides("damage"):
            pytest.skip("requires damage(), which changes a value in the store")
        values = make_values("entries", self.dimensions)
        entries = {key(number): values.sample(number) for number in range(10)}
        with self._open_with(lambda caps: encode_frames(entries) if caps.holds == "frames" else entries) as backend:
            if backend.capabilities.scope == "process":
                self.damage(backend, name)
                yield backend, entries
                return
            backend.close()
            self.damage(backend, name)
            with closing(self.reopen(backend)) as again:
                yield again, entries

    def _skip_without_verify(self, backend: Any) -> None:
        if not hasattr(backend, "verify"):
            pytest.skip('requires the optional method "verify"')

    def _choose_values(self, caps: Capabilities) -> Values:
        return make_values(_get_tested_form(caps), self.dimensions)

    def _make_card(self, caps: Capabilities) -> Any:
        # A store may keep only the metadata of a card, because a card has no vector that was made or cost anything.
        card = super()._make_card(caps)
        return card._replace(created=0.0, tokens=None, seconds=None) if isinstance(card, Entry) else card


def _get_tested_form(caps: Capabilities) -> str:
    """Return the form of the values in most tests. A store that holds either has a test of its own for frames."""
    return "frames" if caps.holds == "frames" else "entries"


def _next_digit(digit: str) -> str:
    return f"{(int(digit, 16) + 1) % 16:x}"


def _take_snapshot(folder: Path) -> Snapshot:
    """Return the date and the digest of each file."""
    files = [folder] if folder.is_file() else [path for path in folder.rglob("*") if path.is_file()]
    return {str(file): (file.stat().st_mtime_ns, hashlib.sha256(file.read_bytes()).digest()) for file in sorted(files)}


def _compute_items() -> dict[str, bytes]:
    """Return the keys and frames of :data:`TEXTS`, and the space card, as a chain stores them."""
    backend = DictBackend(scope="host")  # a tier of the scope "process" gets no space cards
    with Cache(CountingProvider(), [backend]) as cache:
        cache.embed_batch(list(TEXTS))
        return {name: bytes(frame) for name, frame in backend.get_many(list(backend.scan("eo1."))).items()}


def _decode_items(frames: Mapping[str, bytes]) -> dict[str, Entry]:
    return decode_frames(frames, now=0.0, dtype="float32", dimensions=None).entries.as_dict()


register_standard_tests(ReadOnlyContract)
