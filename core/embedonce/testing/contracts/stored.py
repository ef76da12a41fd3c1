"""The standard tests that all backends have in common, and their helpers. The tests read what a store holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any, ClassVar, TypeAlias

import pytest
from hypothesis import HealthCheck, settings

from embedonce.contracts import EXTRAS, Backend, Capabilities, StoredSize, deadline
from embedonce.keys import CARD_PREFIX
from embedonce.vectors import Entry

from .support import Recipe, call_with_timeout
from .values import SCOPE, Values, key, make_values, require_samples
from .whole import Contract

MakeItems: TypeAlias = Callable[[Capabilities], Mapping[str, Any]]
"""Returns the keys and values of a store whose backend has these capabilities."""

OTHER_SCOPE = "fedcba9876543210"
LONG_LISTING = 1100
"""Number of keys in the test of a long listing."""
LAST_DATE = 1e11
"""A Unix time far in the future. The present time in milliseconds is larger."""


class StoredContract(Contract):
    """Base class of the contracts of backends. Subclass BackendContract or ReadOnlyContract, not this class."""

    dimensions: ClassVar[Sequence[int]] = (8, 1, 384, 3072)
    """The test vectors have these numbers of dimensions. Only a backend that holds entries gets vectors."""
    examples: ClassVar[int | None] = None
    """Number of examples that hypothesis tries in each test; None means the number in hypothesis's profile. If
    :meth:`make` is slow, set a low number."""
    key = staticmethod(key)

    def reopen(self, backend: Any) -> Backend:
        """Return another client of the store of ``backend``, even if ``backend`` is already closed.

        If the scope is ``single``, ``backend`` is always closed.
        """
        raise NotImplementedError

    def recipe(self, backend: Any) -> Recipe | None:
        """Return a recipe for a client of the same store in another process, or None if that is impossible."""
        return None

    # --- batches ------------------------------------------------------------------------------

    def test_one_entry_comes_back(self) -> None:
        with self._open_samples([1]) as backend:
            self._require_stored(backend, {key(1): 1})

    def test_a_key_asked_twice_comes_once(self) -> None:
        with self._open_samples([1, 2, 3]) as backend:
            for asked in ([1, 1, 2, 3], [9, 9, 1, 2], [2, 1, 2, 1, 9], [3, 3, 3]):
                there = {key(number): number for number in asked if number != 9}
                self._require_equal(backend, backend.get_many([key(number) for number in asked]), there)

    def test_only_what_was_asked_comes_back(self) -> None:
        with self._open_samples(range(20)) as backend:
            self._require_equal(backend, backend.get_many([key(3)]), {key(3): 3})

    def test_a_full_batch_comes_back(self) -> None:
        def make_items(caps: Capabilities) -> Mapping[str, Any]:
            return self._make_samples(caps, range(get_batch_size(caps)))

        with self._open_with(make_items) as backend:
            self._require_stored(backend, {key(number): number for number in range(self._get_batch_size(backend))})

    # --- values -------------------------------------------------------------------------------

    def test_special_values_come_back_exactly(self) -> None:
        special: dict[str, Any] = {}

        def make_items(caps: Capabilities) -> Mapping[str, Any]:
            special.update(self._choose_values(caps).make_edge_values(caps.max_value_bytes))
            return {key(number): value for number, value in enumerate(special.values())}

        with self._open_with(make_items, singly=True) as backend:
            values = self._make_values(backend)
            for number, (name, value) in enumerate(special.items()):
                found = backend.get_many([key(number)]).get(key(number))
                assert values.is_equal(found, value), f"{name}: get_many did not return the stored value"

    def test_a_space_card_comes_back(self) -> None:
        def make_items(caps: Capabilities) -> Mapping[str, Any]:
            if caps.holds == "frames":
                pytest.skip("requires a backend that takes entries; a backend of frames stores a space card as a frame")
            return {CARD_PREFIX + SCOPE: self._make_card(caps)}

        with self._open_with(make_items) as backend:
            values, card = self._make_values(backend), self._make_card(backend.capabilities)
            found = backend.get_many([CARD_PREFIX + SCOPE]).get(CARD_PREFIX + SCOPE)
            assert values.is_equal(found, card), "an entry with an empty vector, as in a space card, was not stored"

    def test_what_is_handed_out_cannot_change_the_store(self) -> None:
        with self._open_samples([1, 2]) as backend:
            found: Any = backend.get_many([key(1), key(2)])
            if isinstance(found[key(1)], Entry):
                vector = found[key(1)].vector
                assert not vector.flags.writeable, "the vector of an entry that get_many returns must be read-only"
                with suppress(ValueError):
                    vector.setflags(write=True)
                    vector[:] = 0.0
            with suppress(Exception):
                found.clear()
            self._require_stored(backend, {key(1): 1, key(2): 2})

    def test_get_agrees_with_get_many(self) -> None:
        with self._open_samples([1]) as backend:
            self._skip_without(backend, "get")
            sample = self._make_values(backend).sample(1)
            assert self._make_values(backend).is_equal(backend.get(key(1)), sample), (
                "get did not return the stored value"
            )
            assert backend.get(key(2)) is None, "get must return None for a missing key"

    # --- scan, close --------------------------------------------------------------------------

    def test_scan_finds_what_starts_with_the_prefix(self) -> None:
        ours = {key(number) for number in range(40)}
        theirs = {key(number, OTHER_SCOPE) for number in range(10)}
        card, decoys = CARD_PREFIX + SCOPE, self._list_decoys()

        def make_items(caps: Capabilities) -> Mapping[str, Any]:
            sample = self._choose_values(caps).sample(0)
            return {**dict.fromkeys(ours | theirs | decoys, sample), card: self._make_card(caps)}

        with self._open_with(make_items) as backend:
            self._skip_without(backend, "scan")
            expected = {
                f"eo1.{SCOPE}.": ours,
                f"eo1.{OTHER_SCOPE}.": theirs,
                CARD_PREFIX: {card},
                key(7): {key(7)},
                "eo1.none": set(),
                "": ours | theirs | decoys | {card},
            }
            for prefix, names in expected.items():
                listed = list(backend.scan(prefix))
                odd = {type(name).__name__ for name in listed if not isinstance(name, str)}
                assert not odd, f"scan must yield keys as str, got {', '.join(sorted(odd))}"
                found = set(listed)
                assert found == names, (
                    f"scan({prefix!r}) yielded {len(found - names)} wrong keys and missed {len(names - found)}"
                    f" of the {len(names)} keys that are stored"
                )
                assert len(listed) == len(found), f"scan({prefix!r}) yielded keys twice: {len(listed) - len(found)}"

    def test_a_long_scan_leaves_nothing_out(self) -> None:
        # Many stores list at most 1000 keys per page, so this listing needs a second page.
        names = [key(number) for number in range(LONG_LISTING)]
        with self._open_with(lambda caps: dict.fromkeys(names, self._choose_values(caps).sample(0))) as backend:
            self._skip_without(backend, "scan")
            found = list(backend.scan(f"eo1.{SCOPE}."))
            assert set(found) == set(names), f"scan yielded {len(set(found))} of {LONG_LISTING} keys"
            assert len(found) == LONG_LISTING, f"of {LONG_LISTING} keys, scan yielded {len(found) - LONG_LISTING} twice"
            if backend.capabilities.count:
                counted = backend.count(f"eo1.{SCOPE}.")
                assert counted == LONG_LISTING, f"count returned {counted}, but {LONG_LISTING} keys are stored"

    def test_close_twice_does_nothing(self) -> None:
        with self._open_samples([1]) as backend:
            backend.close()
            backend.close()

    # --- making stores ------------------------------------------------------------------------

    def _open_with(self, make_items: MakeItems, *, singly: bool = False) -> AbstractContextManager[Any]:
        """Make a backend whose store has the items. With ``singly``, they may be too large for one call."""
        raise NotImplementedError

    def _open_samples(self, numbers: Sequence[int]) -> AbstractContextManager[Any]:
        """Make a backend whose store has ``sample(n)`` under ``key(n)``."""
        return self._open_with(lambda caps: self._make_samples(caps, numbers))

    def _make_samples(self, caps: Capabilities, numbers: Sequence[int]) -> dict[str, Any]:
        values = self._choose_values(caps)
        return {key(number): values.sample(number) for number in numbers}

    def _list_decoys(self) -> set[str]:
        """Return keys that a listing of a scope must leave out, although they look like the keys of the scope."""
        return set()

    def _choose_values(self, caps: Capabilities) -> Values:
        """Return what makes the values of a backend with these capabilities."""
        return make_values(caps.holds, self.dimensions)

    def _make_values(self, backend: Any) -> Values:
        return self._choose_values(backend.capabilities)

    def _make_card(self, caps: Capabilities) -> Any:
        """Return a space card, which is an entry without a vector. In a backend of frames, it is a frame."""
        values = self._choose_values(caps)
        sample = values.sample(1)
        return (
            sample._replace(vector=sample.vector[:0].copy(), metadata={"model": "m"})
            if isinstance(sample, Entry)
            else sample
        )

    # --- helpers ------------------------------------------------------------------------------

    def _overrides(self, hook: str) -> bool:
        owner = next(one for one in type(self).__mro__ if hook in vars(one))
        return not owner.__module__.startswith(f"{__package__}.")

    def _require_error(self, call: Callable[[], object], what: str) -> None:
        """Require that a call raises. The call has a deadline, but only backends that declare ``deadline`` obey it."""

        def call_with_deadline() -> None:
            with deadline(2.0):
                call()

        try:
            call_with_timeout(call_with_deadline, what)
        except AssertionError:
            raise
        except Exception:
            return
        raise AssertionError(f"{what} must raise an error, but it returned normally")

    def _make_settings(self) -> settings:
        slow = [HealthCheck.too_slow, HealthCheck.filter_too_much]
        chosen = settings(deadline=None, suppress_health_check=slow, database=None, stateful_step_count=30)
        return chosen if self.examples is None else settings(chosen, max_examples=self.examples)

    def _skip_without(self, backend: Any, *capabilities: str) -> None:
        for capability in capabilities:
            if not getattr(backend.capabilities, capability):
                pytest.skip(f'requires the capability "{capability}"')

    def _skip_without_lasting(self, backend: Any) -> None:
        scope = backend.capabilities.scope
        if scope == "process":
            pytest.skip('requires the scope "single", "host" or "network"; the scope "process" shares nothing')
        assert self._overrides("reopen"), f'the scope "{scope}" requires reopen(), which returns another client'

    def _skip_without_sharing(self, backend: Any) -> None:
        self._skip_without_lasting(backend)
        if backend.capabilities.scope == "single":
            pytest.skip('requires the scope "host" or "network"; the scope "single" allows one process at a time')

    def _get_recipe_or_skip(self, backend: Any) -> Recipe:
        recipe = self.recipe(backend)
        if recipe is None:
            pytest.skip("requires recipe(), with which another process makes a client of the same store")
        return recipe

    def _get_batch_size(self, backend: Any) -> int:
        return get_batch_size(backend.capabilities)

    def _require_stored(self, backend: Any, expected: Mapping[str, int]) -> None:
        """Require that the backend returns all samples of ``expected``, which maps keys to the seeds of samples."""
        self._require_equal(backend, backend.get_many(list(expected)), expected)

    def _require_equal(self, backend: Any, found: Mapping[str, Any], expected: Mapping[str, int]) -> None:
        """Require that ``found`` has exactly the samples of ``expected``, which maps keys to the seeds of samples."""
        require_samples(self._make_values(backend), found, expected)


def get_batch_size(caps: Capabilities) -> int:
    """Return the number of keys in a full batch."""
    return min(1000 if caps.max_batch is None else caps.max_batch, 5000)


def check_capabilities(declared: object) -> None:
    """Check that a backend has declared its capabilities, and that their values are valid."""
    assert isinstance(declared, Capabilities), (
        f"capabilities must be a Capabilities(...), got {type(declared).__name__}"
    )
    assert declared.holds in ("frames", "entries", "either"), (
        f'capabilities.holds must be "frames", "entries" or "either", got {declared.holds!r}'
    )
    assert declared.scope in ("process", "single", "host", "network"), (
        f'capabilities.scope must be "process", "single", "host" or "network", got {declared.scope!r}'
    )
    for name in ("max_batch", "max_value_bytes"):
        limit = getattr(declared, name)
        assert limit is None or (type(limit) is int and limit >= 1), (
            f"capabilities.{name} must be None or an int of at least 1, got {limit!r}"
        )


def check_methods(backend: Any, required: Sequence[str]) -> None:
    """Check that a backend has the required methods, and those that its capabilities declare."""
    for capability, method in EXTRAS.items():
        if getattr(backend.capabilities, capability):
            found = callable(getattr(backend, method, None))
            assert found, f'the capability "{capability}" requires the method {method}'
    for method in required:
        assert callable(getattr(backend, method, None)), f"a backend must have the method {method}"


def measure_store(backend: Any, prefix: str) -> StoredSize:
    """Call ``measure``, and check the types and the dates of its result."""
    size = backend.measure(prefix)
    assert isinstance(size, StoredSize), f"measure must return a StoredSize, got {type(size).__name__}"
    for name in ("bytes", "dimensions"):
        number = getattr(size, name)
        assert number is None or type(number) is int, f"StoredSize.{name} must be None or an int, got {number!r}"
    dates = [date for date in (size.oldest, size.newest) if date is not None]
    assert all(isinstance(date, int | float) and 0 < date < LAST_DATE for date in dates), (
        f"the dates of measure must be Unix times in seconds, got {size.oldest!r} and {size.newest!r}"
    )
    assert dates == sorted(dates), "measure returned an oldest date that is later than the newest"
    return size
