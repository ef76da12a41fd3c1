"""Standard tests of every importer: subclass :class:`ImporterContract` and run pytest.

An importer may have ``lookup``, ``scan`` or both. If an importer has both, both must find the same vectors.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from embedonce._config.tables import ImportTable
from embedonce._messages import format_count, quote
from embedonce._plugins.options import merge_options, options_of
from embedonce.contracts import LOOKUP_BATCH, FoundVectors, Importer, Source, deadline
from embedonce.errors import PluginError, SourceError

from .child import make_from_recipe
from .found_vectors import MAX_PART, StoreReader
from .stored_texts import (
    ALIKE,
    ALPHABET,
    DIGESTS,
    TEXTS,
    make_numbered_texts,
    make_short_texts,
    make_special_vectors,
    make_vectors,
)
from .support import Recipe, call_with_timeout, run_in_fork, run_in_processes, run_in_threads
from .whole import Contract, register_standard_tests

PRIVATE_TEXT = "A private text, 5d41402abc4b2a76, that no message may show."


class ImporterContract(Contract):
    """Subclass this class as ``Test…`` and write :meth:`make`; pytest does the rest.

    The other methods are optional: tests that need a missing method are skipped.
    """

    dimensions: ClassVar[int] = 8
    """Number of dimensions of the test vectors."""
    has_unit_vectors: ClassVar[bool] = False
    """Whether the test vectors have length 1. Set this for a store that normalises vectors, and set ``tolerance``."""
    tolerance: ClassVar[float] = 0.0
    """Maximum difference of a value that was found and the value that was written, relative and absolute; 0.0 means
    that they must be equal."""
    scan_length: ClassVar[int] = 6_000
    """Number of texts in the test of a long scan, which is more than a part may have."""
    examples: ClassVar[int | None] = None
    """Number of examples that hypothesis tries; None means the number in hypothesis's profile."""
    secrets: ClassVar[Sequence[str]] = ()
    """Secrets, such as passwords, in the options that :meth:`make` and :meth:`missing` use. No message shows them."""

    def make(self, texts: Sequence[str], vectors: NDArray[np.float32]) -> Importer:
        """Write a new store, and return a new importer that reads it. The caller closes the importer.

        ``texts`` are different texts, and row i of ``vectors`` (float32, shape (n, d)) is the vector of text i. The
        store holds these and no others. Write it with the program whose stores the importer reads. Each call writes a
        store of its own, beside those of earlier calls.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define how to write a store: def make(self, texts, vectors) -> Importer"
        )

    def can_hold(self, text: str) -> bool:
        """Return whether the store can hold a text. The other texts are only looked up."""
        return True

    def recipe(self, importer: Any) -> Recipe | None:
        """Return a recipe for another importer of the same store: the importer's class, and its options as in TOML."""
        return None

    def missing(self) -> tuple[Importer, str]:
        """Return an importer of a store that does not exist, and what a message must name, such as the path."""
        raise NotImplementedError

    def damage(self, importer: Any, text: str) -> None:
        """Change the value of a text in the store of ``importer`` so that it is no vector. Nothing was read so far."""
        raise NotImplementedError

    def snapshot(self, importer: Any) -> object:
        """Return the whole content of the store, such as all files with their bytes, to compare it with ``==``."""
        raise NotImplementedError

    def stall(self, importer: Any) -> AbstractContextManager[object]:
        """Return a context in which the store of ``importer`` hangs, for example because its server is paused."""
        raise NotImplementedError

    # --- what the importer declares -----------------------------------------------------------

    def test_the_methods_are_there(self) -> None:
        with self._open(TEXTS) as store:
            for method in ("check", "close"):
                assert callable(getattr(store.importer, method, None)), f"an importer must have the method {method}"
            assert store.has_lookup or store.has_scan, "an importer must have the method lookup or the method scan"
            has_count = callable(getattr(store.importer, "count", None))
            assert has_count or not store.has_scan, "an importer with scan must have the method count"

    def test_options_can_be_written_in_toml(self) -> None:
        with self._open(TEXTS) as store:
            recipe = self.recipe(store.importer)
            cls = recipe.plugin if recipe is not None else type(store.importer)
            assert isinstance(cls, type), "recipe() must name the class of the importer"
            try:
                options = merge_options(cls, options_of(ImportTable), {"type"})
            except PluginError as error:
                raise AssertionError(str(error)) from error
            assert {"path", "url"} & options.keys(), (
                "an importer must have an option path or an option url, which `embedonce import SOURCE` sets"
            )
            assert "path" not in options or options["path"].is_path, "the option path must have the type Path"

    def test_the_source_is_described_and_stays(self) -> None:
        with self._open(TEXTS) as store:
            before = store.importer.source
            assert isinstance(before, Source), f"source must be a Source(...), got {type(before).__name__}"
            assert isinstance(before.name, str), f"Source.name must be a str, got {type(before.name).__name__}"
            assert before.name.strip(), "Source.name must name the store"
            assert before.task is None or (isinstance(before.task, str) and before.task), (
                "Source.task must be a task or None"
            )
            assert isinstance(before.mixing, str), f"Source.mixing must be a str, got {type(before.mixing).__name__}"
            assert not before.mixing.endswith("."), "Source.mixing must not end with a full stop"
            store.importer.check()
            store.read_all()
            assert store.importer.source == before, "source must not change when the store is read"

    def test_two_importers_of_one_store_have_one_source(self) -> None:
        with self._open(TEXTS) as store, self._reopen(store) as other:
            assert other.importer.source == store.importer.source, (
                "two importers with the same options must have the same source"
            )
            other.read_all("in a second importer of the store, ")

    def test_another_store_is_another_source(self) -> None:
        with self._open(TEXTS) as one, self._open(TEXTS) as other:
            assert one.importer.source.name != other.importer.source.name, (
                "two stores must have different names, because the result of a verification is kept under the name"
            )

    def test_no_text_and_no_secret_is_shown(self) -> None:
        with self._open([*TEXTS, PRIVATE_TEXT]) as store:
            shown = [repr(store.importer), repr(store.importer.source)]
            store.importer.check()
            if store.has_lookup:
                shown.append(repr(store.look_up([PRIVATE_TEXT])))
            if store.has_scan:
                shown += [repr(part) for part in store.importer.scan()]
            shown += [repr(store.importer), str(store.importer), repr(store.importer.source)]
            assert not any(PRIVATE_TEXT in text for text in shown), "a repr or the source shows a text"
            self._require_no_secret("\n".join(shown), "a repr or the source")

    # --- the store ----------------------------------------------------------------------------

    def test_check_accepts_a_store_that_can_be_read(self) -> None:
        with self._open(TEXTS) as store:
            for call in ("first", "second"):
                try:
                    answer = store.importer.check()
                except Exception as error:
                    raise AssertionError(
                        f"the {call} call of check raised {type(error).__name__}, although the store can be read"
                    ) from error
                assert answer is None, f"check must raise an error or return None, got {type(answer).__name__}"
            store.read_all("after check, ")

    def test_a_missing_store_is_named_by_check(self) -> None:
        importer, named = self._make_missing()
        try:
            assert isinstance(importer.source, Source), "source must be available without opening the store"
            try:
                importer.check()
            except SourceError as error:
                message = str(error)
            except Exception as error:
                raise AssertionError(f"check raised {type(error).__name__} instead of SourceError") from error
            else:
                raise AssertionError("check must raise SourceError if the store is missing")
            assert named in message, f"the message of check does not name {quote(named)}, which is missing"
            assert "Traceback" not in message, "the message of check contains a traceback"
            self._require_no_secret(message, "the message of check")
        finally:
            importer.close()

    def test_a_missing_store_is_an_error_and_no_miss(self) -> None:
        for name in ("lookup", "scan"):
            importer, _ = self._make_missing()
            try:
                if not callable(getattr(importer, name, None)):
                    continue
                try:
                    _read(importer, name, [PRIVATE_TEXT])
                except Exception as error:
                    message = str(error)
                else:
                    raise AssertionError(f"{name} must raise an error if the store is missing")
                assert PRIVATE_TEXT not in message, f"the error of {name} shows a text"
                self._require_no_secret(message, f"the error of {name}")
            finally:
                importer.close()

    def test_a_damaged_value_is_counted(self) -> None:
        if not self._overrides("damage"):
            pytest.skip("requires damage(), which makes the value of a text unreadable")
        with self._open([*TEXTS, PRIVATE_TEXT]) as store:
            self.damage(store.importer, PRIVATE_TEXT)
            if store.has_lookup:
                found = store.importer.lookup(store.texts)
                store.check_lookup(found, store.texts, without=[PRIVATE_TEXT])
                self._require_counted(found.unreadable, "lookup")
            if store.has_scan:
                store.scan(without=[PRIVATE_TEXT])
                counted: dict[str, int] = {}
                for part in store.importer.scan():
                    counted |= {reason: counted.get(reason, 0) + n for reason, n in part.unreadable.items()}
                self._require_counted(counted, "scan")

    def test_reading_changes_nothing(self) -> None:
        if not self._overrides("snapshot"):
            pytest.skip("requires snapshot(), which returns the content of the store")
        with self._open(TEXTS) as store:
            before = self.snapshot(store.importer)
            store.importer.check()
            store.read_all()
            if store.has_lookup:
                store.look_up(["a text that is not stored"])
            if store.has_scan:
                store.importer.count()
            assert self.snapshot(store.importer) == before, "reading has changed the store"
            store.importer.close()
            assert self.snapshot(store.importer) == before, "close has changed the store"

    # --- lookup -------------------------------------------------------------------------------

    def test_lookup_finds_the_texts_that_are_stored(self) -> None:
        with self._open_for_lookup(TEXTS) as store:
            absent = [f"{text} (not stored)" for text in TEXTS]
            for text in store.texts:
                store.look_up([text])
            store.look_up(absent[:1])
            store.look_up(absent)
            mixed = [text for pair in zip(absent, TEXTS, strict=True) for text in pair]
            store.look_up(mixed)
            store.look_up(tuple(mixed[::-1]), "lookup of a tuple")

    def test_every_order_and_subset_gets_the_right_vectors(self) -> None:
        with self._open_for_lookup([*TEXTS, *make_numbered_texts(40)]) as store:
            chance = np.random.default_rng(0)
            everything = [*store.texts, *(f"{text} (not stored)" for text in store.texts)]
            for size in (2, 3, 17, len(everything) - 1, len(everything)):
                order = chance.permutation(len(everything))[:size]
                store.look_up([everything[place] for place in order])

    def test_a_full_batch_is_looked_up(self) -> None:
        with self._open_for_lookup(TEXTS[:1]):  # skips before a long store is written
            pass
        with self._open_for_lookup(make_numbered_texts(LOOKUP_BATCH)) as store:
            store.look_up(store.texts, f"lookup of {LOOKUP_BATCH:,} texts")
            half = [text if number % 2 else f"{text}!" for number, text in enumerate(store.texts)]
            store.look_up(half, f"lookup of {LOOKUP_BATCH:,} texts, of which half are stored,")

    def test_texts_that_look_alike_are_different(self) -> None:
        alike = [*dict.fromkeys(text for group in ALIKE for text in group)]
        half = [text for group in ALIKE for text in group[::2]]
        for stored in (half, alike):
            with self._open_for_lookup(dict.fromkeys([*stored, "text"])) as store:
                asked = list(dict.fromkeys([*alike, *DIGESTS, "text"]))
                store.look_up(asked)
                store.look_up(asked[::-1])

    def test_any_text_gets_its_own_vector_or_none(self) -> None:
        stored = [text for number, text in enumerate(make_short_texts()) if number % 2]
        with self._open_for_lookup(stored) as store:

            @self._make_settings()
            @given(st.lists(st.text(ALPHABET, max_size=3), min_size=1, max_size=20, unique=True))
            def check(texts: list[str]) -> None:
                store.look_up(texts)

            check()

    def test_what_is_handed_in_is_left_alone(self) -> None:
        with self._open_for_lookup(TEXTS) as store:
            asked = ["a text that is not stored", *store.texts, " with white space "]
            before = list(asked)
            store.look_up(asked)
            assert asked == before, "lookup changed the list of texts that it was given"

    def test_a_later_call_leaves_earlier_vectors_alone(self) -> None:
        with self._open_for_lookup(TEXTS) as store:
            first = store.look_up(store.texts[:3])
            store.look_up(store.texts[3:6])
            store.check_lookup(first, store.texts[:3], "after a second call, the first answer of lookup")

    def test_threads_get_their_own_vectors(self) -> None:
        with self._open_for_lookup(make_numbered_texts(80)) as store:

            def work(number: int) -> None:
                mine = store.texts[number * 10 : number * 10 + 10]
                for _ in range(5):
                    store.look_up(mine, "lookup in one of several threads")

            run_in_threads(8, work, "lookup in eight threads")

    # --- values -------------------------------------------------------------------------------

    def test_special_values_come_back_exactly(self) -> None:
        if self.has_unit_vectors or self.tolerance:
            pytest.skip("requires a store that keeps vectors as they are, and a tolerance of 0.0")
        vectors = make_special_vectors(self.dimensions)
        with self._open(make_numbered_texts(len(vectors)), vectors) as store:
            store.read_all()

    # --- scan ---------------------------------------------------------------------------------

    def test_scan_yields_every_text_with_its_vector(self) -> None:
        alike = (text for group in ALIKE for text in group)
        with self._open_for_scan(dict.fromkeys([*TEXTS, *alike, *DIGESTS])) as store:
            store.scan()

    def test_scan_yields_the_same_order_each_time(self) -> None:
        with self._open_for_scan(make_numbered_texts(200)) as store:
            first, second = store.scan(), store.scan("the second scan")
            assert first == second, "two scans yielded the texts in different orders, so no import can be resumed"
            if self.recipe(store.importer) is not None:
                with self._reopen(store) as other:
                    assert other.scan() == first, "another importer yielded the texts in a different order"

    def test_scan_yields_parts_of_bounded_size(self) -> None:
        with self._open_for_scan(TEXTS[:1]):  # skips before a long store is written
            pass
        with self._open_for_scan(make_numbered_texts(self.scan_length)) as store:
            largest = max(len(part.texts) for part in store.importer.scan())
            assert largest <= MAX_PART, f"scan yielded {largest:,} texts in one part; yield at most {MAX_PART:,}"
            store.scan(f"scan of {format_count(len(store.texts), 'text')}")

    def test_a_scan_that_was_abandoned_changes_no_later_scan(self) -> None:
        with self._open_for_scan(make_numbered_texts(50)) as store:
            for _ in range(2):
                for _part in islice(store.importer.scan(), 1):
                    pass
            unfinished = iter(store.importer.scan())
            next(unfinished)
            store.scan("a scan after unfinished ones")
            if hasattr(unfinished, "close"):  # a generator may have opened a file
                unfinished.close()

    def test_count_agrees_with_scan(self) -> None:
        with self._open_for_scan(make_numbered_texts(100)) as store:
            count = store.importer.count()
            if count is None:
                return
            assert type(count) is int, f"count must return an int or None, got {type(count).__name__}"
            found = len(store.scan())
            assert abs(count - found) <= found / 10, f"count returned {count:,}, but scan yields {found:,} texts"

    def test_lookup_finds_what_scan_yields(self) -> None:
        alike = (text for group in ALIKE for text in group)
        with self._open_for_scan(dict.fromkeys([*TEXTS, *alike])) as store:
            if not store.has_lookup:
                pytest.skip("requires both lookup and scan")
            texts: list[str] = []
            for part in store.importer.scan():
                texts += part.texts
                # The scan is not finished yet, so both methods use the store at the same time.
                for start in range(0, len(part.texts), LOOKUP_BATCH):
                    store.look_up(list(dict.fromkeys(part.texts[start : start + LOOKUP_BATCH])), "lookup during a scan")
            assert set(texts) == set(store.texts), "a scan left out texts, because lookup was called during the scan"

    # --- lifetime and processes ---------------------------------------------------------------

    def test_close_twice_does_nothing(self) -> None:
        for is_used in (False, True):
            with self._open(TEXTS) as store:
                if is_used:
                    store.importer.check()
                    store.read_all()
                store.importer.close()
                store.importer.close()

    def test_a_closed_importer_returns_no_wrong_vector(self) -> None:
        with self._open(TEXTS) as store:
            store.read_all()
            store.importer.close()
            for name in store.methods:
                what = f"{name} after close"
                try:
                    parts = call_with_timeout(partial(_read, store.importer, name, store.texts), what)
                except AssertionError:
                    raise
                except Exception:
                    continue
                for part in parts:
                    store.check_vectors(part, what)

    def test_a_forked_child_reads_the_store_or_is_refused(self) -> None:
        with self._open(TEXTS) as store:
            store.read_all()
            self._run_in_fork(lambda: self._read_or_be_refused(store), "an importer that was used before the fork")

    def test_a_forked_child_takes_nothing_from_its_parent(self) -> None:
        with self._open(TEXTS) as store:
            store.read_all()

            def child() -> None:
                for _ in range(5):
                    self._read_or_be_refused(store)
                with suppress(Exception):  # it may refuse this too
                    store.importer.close()

            self._run_in_fork(
                child, "an importer that parent and child use", meanwhile=lambda: store.read_all("during a fork, ")
            )
            store.read_all("after a forked child has closed its importer, ")

    def test_other_processes_read_the_store(self) -> None:
        with self._open(TEXTS) as store:
            recipe = self._get_recipe_or_skip(store.importer)
            request = {"lookup": store.texts if store.has_lookup else [], "scan": store.has_scan}
            # The other process must not hash as this one does.
            seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
            (answer,) = run_in_processes([request], recipe, PYTHONHASHSEED=seed)
            assert answer["source"] == store.importer.source.name, "another process has a different source"
            for name in store.methods:
                what = f"{name} in another process"
                texts, rows = zip(*answer[name], strict=True) if answer[name] else ((), ())
                store.check_vectors(FoundVectors(texts, rows), what)
                assert set(texts) == set(store.texts), f"{what} left out texts"

    def test_a_pickled_importer_reads_the_store_or_is_refused(self) -> None:
        with self._open(TEXTS) as store:
            store.read_all()
            try:
                pickled = pickle.dumps(store.importer)
            except Exception:
                return
            copy = StoreReader(pickle.loads(pickled), store.texts, store.vectors, self.tolerance)
            try:
                copy.read_all("in a copy made with pickle, ")
            finally:
                copy.importer.close()

    def test_a_store_that_stalls_is_left_by_the_deadline(self) -> None:
        if not self._overrides("stall"):
            pytest.skip("requires stall(), a context in which the store does not answer")
        with self._open_for_lookup(TEXTS) as store:
            store.look_up(store.texts)

            def ask() -> None:
                with deadline(0.2):
                    store.importer.lookup(store.texts[:1])

            with self.stall(store.importer):
                try:
                    call_with_timeout(ask, "while the store did not answer, lookup")
                except AssertionError:
                    raise
                except Exception:
                    is_left = True
                else:
                    is_left = False
                assert is_left, "lookup returned an answer while the store did not answer"
            # The reply that arrives too late must not be taken for the reply to the next call.
            store.look_up(store.texts[1:3], "after the store was stalled, lookup")
            store.look_up(store.texts, "after the store was stalled, lookup")

    # --- helpers ------------------------------------------------------------------------------

    @contextmanager
    def _open(self, texts: Iterable[str], vectors: NDArray[np.float32] | None = None) -> Iterator[StoreReader]:
        """Write a store with those of the texts that it can hold, and open it."""
        held = [text for text in texts if self.can_hold(text)]
        if vectors is None:
            vectors = make_vectors(held, self.dimensions, is_unit=self.has_unit_vectors)
        importer = self.make(list(held), vectors.copy())
        try:
            yield StoreReader(importer, held, vectors, self.tolerance)
        finally:
            importer.close()

    @contextmanager
    def _open_for_lookup(self, texts: Iterable[str]) -> Iterator[StoreReader]:
        with self._open(texts) as store:
            if not store.has_lookup:
                pytest.skip("requires lookup")
            yield store

    @contextmanager
    def _open_for_scan(self, texts: Iterable[str]) -> Iterator[StoreReader]:
        with self._open(texts) as store:
            if not store.has_scan:
                pytest.skip("requires scan")
            yield store

    @contextmanager
    def _reopen(self, store: StoreReader) -> Iterator[StoreReader]:
        """Open another importer of the same store."""
        recipe = self._get_recipe_or_skip(store.importer)
        importer = make_from_recipe(recipe)
        try:
            yield StoreReader(importer, store.texts, store.vectors, self.tolerance)
        finally:
            importer.close()

    def _get_recipe_or_skip(self, importer: Any) -> Recipe:
        recipe = self.recipe(importer)
        if recipe is None:
            pytest.skip("requires recipe(), with which another importer of the same store is made")
        return recipe

    def _make_missing(self) -> tuple[Any, str]:
        if not self._overrides("missing"):
            pytest.skip("requires missing(), which returns an importer of a store that does not exist")
        try:
            return self.missing()
        except Exception as error:
            raise AssertionError(
                f"the constructor raised {type(error).__name__} for a missing store; it must open nothing"
            ) from error

    def _overrides(self, hook: str) -> bool:
        return getattr(type(self), hook) is not getattr(ImporterContract, hook)

    def _make_settings(self) -> settings:
        chosen = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)
        return chosen if self.examples is None else settings(chosen, max_examples=self.examples)

    def _require_no_secret(self, text: str, what: str) -> None:
        assert not any(secret in text for secret in self.secrets), f"{what} shows a secret"

    def _require_counted(self, unreadable: Mapping[str, int], what: str) -> None:
        assert sum(unreadable.values()) >= 1, f"{what} did not count a value that cannot be read in unreadable"
        assert not any(PRIVATE_TEXT in reason for reason in unreadable), f"a reason in unreadable of {what} has a text"

    def _run_in_fork(
        self, work: Callable[[], None], what: str, *, meanwhile: Callable[[], None] = lambda: None
    ) -> None:
        if not hasattr(os, "fork"):
            pytest.skip("this platform has no fork")
        run_in_fork(work, what, meanwhile=meanwhile)

    def _read_or_be_refused(self, store: StoreReader) -> None:
        try:
            store.read_all("in a forked child, ")
        except AssertionError:
            raise
        except Exception:
            pass


def _read(importer: Any, method: str, texts: Sequence[str]) -> Sequence[Any]:
    """Call ``lookup`` or ``scan``, and return the parts of the answer."""
    return [importer.lookup(texts)] if method == "lookup" else list(importer.scan())


register_standard_tests(ImporterContract)
