"""Random samples of a source, and imports that end early and go on: properties for all inputs."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedonce import Cache, KeyPolicy, Tier
from embedonce.cli.embedding.progress import Display
from embedonce.cli.embedding.sources import Reader
from embedonce.cli.importing import reading
from embedonce.cli.importing.opening import OpenedSource, describe_source_error
from embedonce.cli.importing.progress import ImportProgress
from embedonce.cli.importing.reading import MAX_REASONS, OTHER_REASONS, Counts, Lookup, Scan, check_found
from embedonce.cli.importing.repeats import TextFilter
from embedonce.cli.importing.run import SEVERAL_VECTORS, Run
from embedonce.cli.importing.sampling import MAX_SIZES, Sample, SamplesBySize
from embedonce.cli.importing.summary import Summary
from embedonce.cli.output import Failed
from embedonce.contracts import LOOKUP_BATCH, FoundVectors, Source, time_left
from embedonce.errors import SourceError
from embedonce.testing import CountingProvider
from embedonce.testing.fakes import DictBackend

# --- samples ----------------------------------------------------------------------------------


@given(st.integers(0, 12), st.lists(st.integers(0, 9), max_size=8), st.integers(0, 2**32))
def test_a_sample_has_different_items_and_as_many_as_possible(size: int, parts: list[int], seed: int) -> None:
    sample: Sample[int] = Sample(size, np.random.default_rng(seed))
    for part in parts:
        first = sample.seen
        sample.add(part, lambda index, first=first: first + index)  # type: ignore[misc]
    assert len(sample.items) == len(set(sample.items)) == min(size, sum(parts))
    assert set(sample.items) <= set(range(sum(parts)))
    assert sample.seen == sum(parts)


@pytest.mark.parametrize("parts", [[40], [1] * 40, [3, 30, 7]])
def test_each_item_is_chosen_with_the_same_probability(parts: list[int]) -> None:
    random = np.random.default_rng(16)
    chosen: Counter[int] = Counter()
    for _ in range(2000):
        sample: Sample[int] = Sample(10, random)
        for part in parts:
            first = sample.seen
            sample.add(part, lambda index, first=first: first + index)  # type: ignore[misc]
        chosen.update(sample.items)
    # A count has the expectation 500 and the standard deviation 19. The seed is fixed, so chance plays no part.
    assert len(chosen) == 40
    assert max(abs(count - 500) for count in chosen.values()) < 80


def test_a_sample_does_not_keep_the_matrices_and_few_sizes() -> None:
    samples = SamplesBySize(2, np.random.default_rng(1))
    for size in range(1, MAX_SIZES + 10):
        samples.add(["a", "b", "c"], np.ones((3, size), np.float32))
    assert len(samples.by_dimensions) == MAX_SIZES
    assert all(row.base is None for sample in samples.by_dimensions.values() for _, row in sample.items)
    assert samples.count_most_kept() == 2
    assert samples.find_most_common() == 1


# --- a source that ends early -----------------------------------------------------------------


class Rows:
    """A source of rows, in parts of two. It is interrupted before the part ``interrupted_at``."""

    source = Source("rows")

    def __init__(self, rows: Sequence[tuple[str, Any]], interrupted_at: int | None = None) -> None:
        self._rows = rows
        self._interrupted_at = interrupted_at

    def scan(self) -> Iterator[FoundVectors]:
        for number, start in enumerate(range(0, len(self._rows), 2)):
            if number == self._interrupted_at:
                raise KeyboardInterrupt
            part = self._rows[start : start + 2]
            yield FoundVectors([text for text, _ in part], [row for _, row in part])

    def lookup(self, texts: Sequence[str]) -> FoundVectors:
        found = {text: row for text, row in self._rows if text in texts}
        return FoundVectors(list(found), list(found.values()))


def import_rows(
    importer: Any, backend: DictBackend, *, dry_run: bool = False, texts: Sequence[str] | None = None
) -> tuple[Summary, CountingProvider]:
    """Import a source without a verification. An interruption ends the import."""
    provider = CountingProvider(dimensions=2)
    summary = Summary("rows", "rows", "document", dry_run)
    tiers = [Tier(DictBackend(scope="host", store=backend), name="tier")]
    with (
        Cache(provider, tiers, key=KeyPolicy(normalize=("casefold",))) as cache,
        tempfile.TemporaryDirectory() as folder,
    ):
        opened = OpenedSource("rows", importer, ())
        if texts is not None:
            Path(folder, "texts.txt").write_text("\n".join(texts))

        def make_reader() -> Scan | Lookup:
            if texts is None:
                return Scan(opened, cache.normalize)
            return Lookup(opened, cache.normalize, lambda: Reader([folder], split="line"))

        run = Run(
            cache,
            make_reader,
            summary=summary,
            verify=0,
            dtype="float32",
            with_texts=texts is not None,
            persistent_tiers=["tier"],
        )
        try:
            run.store(Display())
        except (KeyboardInterrupt, Failed) as error:
            summary.stopped = type(error).__name__
        run.complete_summary()
    return summary, provider


def read_all(backend: DictBackend, texts: Sequence[str]) -> dict[str, list[float]]:
    tiers = [Tier(DictBackend(scope="host", store=backend), name="tier")]
    with Cache(CountingProvider(dimensions=2), tiers, key=KeyPolicy(normalize=("casefold",))) as cache:
        rows = cache.lookup(list(texts)).rows
    return {text: row.tolist() for text, row in zip(texts, rows, strict=True) if row is not None}


GOOD = [[1.0, 2.0], [2.0, 4.0], [-1.0, 2.0]]
BAD = [None, [0.0, 0.0], [1.0], [float("inf"), 1.0], "words"]
ROWS = st.lists(st.tuples(st.sampled_from("abcdA"), st.sampled_from([*GOOD, *BAD])), max_size=20)


@given(ROWS, st.integers(0, 10), st.integers(1, 6))
def test_an_import_that_was_interrupted_goes_on(rows: list[Any], interrupted_at: int, window: int) -> None:
    backend = DictBackend(scope="host")
    vectors: dict[str, list[list[float]]] = {}
    for text, row in rows:
        if text.islower() and row in GOOD:
            vectors.setdefault(text, []).append(row)
    # The first valid vector of a text may be stored, and it is imported if the others have the same direction.
    possible = {text: same[0] for text, same in vectors.items()}
    wanted = {text: same[0] for text, same in vectors.items() if GOOD[2] not in same or same == [GOOD[2]] * len(same)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "WINDOW", window)
        first, provider = import_rows(Rows(rows, interrupted_at), backend)
        stored = read_all(backend, "abcd")
        assert stored.items() <= possible.items()
        assert len(stored) == first.imported
        dry, _ = import_rows(Rows(rows), backend, dry_run=True)
        assert read_all(backend, "abcd") == stored
        second, other = import_rows(Rows(rows), backend)
    # A text that the interrupted import has stored keeps its vector.
    assert read_all(backend, "abcd") == wanted | stored
    assert second.imported == len(wanted | stored) - len(stored)
    assert provider.texts == other.texts == 0
    for summary in (first, second):
        counted = summary.imported + summary.already_there + summary.different + summary.changed
        assert summary.found == counted + sum(summary.invalid.values()) or summary.stopped == "KeyboardInterrupt"
    assert second.changed == sum(text == "A" and row in [*GOOD, [1.0]] for text, row in rows)
    # A window of a dry run does not see what an earlier window would have stored.
    assert (dry.found, dry.changed) == (second.found, second.changed)
    for summary in (dry, second):
        summary.invalid.pop(SEVERAL_VECTORS, None)
    assert dry.invalid == second.invalid
    assert second.stopped == (None if second.imported + second.already_there + second.different else "Failed")


@pytest.mark.parametrize("window", [1, 2, 8])
def test_a_text_of_which_the_source_has_two_different_vectors_is_not_imported(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "WINDOW", window)
    backend = DictBackend(scope="host")
    rows = [("a", GOOD[0]), ("b", GOOD[0]), ("a", GOOD[2]), ("c", GOOD[2]), ("a", GOOD[0]), ("b", GOOD[1])]
    summary, _ = import_rows(Rows(rows), backend)
    assert read_all(backend, "abc") == {"b": GOOD[0], "c": GOOD[2]}
    assert (summary.imported, summary.already_there, summary.different) == (2, 1, 0)
    assert (summary.found, summary.invalid) == (6, {SEVERAL_VECTORS: 3})


@given(st.sets(st.text(max_size=3)), st.sets(st.text(max_size=3)))
def test_a_filter_has_the_texts_that_were_added(added: set[str], others: set[str]) -> None:
    texts = TextFilter()
    assert not texts.contains(list(others)).any()
    texts.add(list(added))
    assert texts.contains(list(added)).all()
    assert texts.contains(list(others)).tolist() == [text in added for text in others]


@given(ROWS, st.lists(st.sampled_from("abcdABx"), max_size=20))
def test_the_texts_that_were_looked_up_are_imported(rows: list[Any], texts: list[str]) -> None:
    backend = DictBackend(scope="host")
    summary, provider = import_rows(Rows(rows), backend, texts=texts)
    found = {text: row for text, row in rows if text in {text.lower() for text in texts}}
    wanted = {text: row for text, row in found.items() if row in GOOD}
    assert read_all(backend, "abcdx") == wanted
    assert summary.imported == len(wanted)
    assert summary.missing == len({text.lower() for text in texts}) - len(found)
    assert (summary.passages, provider.texts) == (len(texts), 0)


def test_an_importer_gets_few_texts_at_a_time() -> None:
    sizes = []

    class Counted(Rows):
        def lookup(self, texts: Sequence[str]) -> FoundVectors:
            sizes.append(len(texts))
            return super().lookup(texts)

    texts = [f"text {number}" for number in range(LOOKUP_BATCH + 1)]
    import_rows(Counted([(texts[0], GOOD[0])]), DictBackend(scope="host"), texts=texts)
    assert sizes == [LOOKUP_BATCH, 1]


# --- errors -----------------------------------------------------------------------------------


def test_an_importer_has_some_time_for_each_call() -> None:
    times: list[float | None] = []

    class Timed(Rows):
        def scan(self) -> Iterator[FoundVectors]:
            times.append(time_left())
            yield FoundVectors(["a"], [GOOD[0]])
            times.append(time_left())

    assert import_rows(Timed([]), DictBackend(scope="host"))[0].imported == 1
    assert len(times) == 2
    assert all(seconds is not None and 0 < seconds <= 300 for seconds in times)


def test_a_scan_that_ends_early_is_closed() -> None:
    closed = []

    class Closed(Rows):
        def scan(self) -> Iterator[FoundVectors]:
            try:
                yield FoundVectors(["a"], [GOOD[0]])
            finally:
                closed.append(True)

    parts = OpenedSource("rows", Closed([]), ()).scan()
    next(parts)
    parts.close()  # type: ignore[attr-defined]
    assert closed == [True]


class Vendor(Exception):
    """An error of a client library."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (SourceError("no\nsuch table"), "no such table"),
        (FileNotFoundError(2, "No such file", "a\x1b.db"), "a\\x1b.db: No such file"),
        (ValueError("the text"), "the importer failed with an unexpected ValueError"),
        (Vendor("Error 111\nconnecting"), "Vendor: Error 111 connecting"),
        (Vendor(), "Vendor"),
    ],
)
def test_an_error_of_an_importer_is_one_line(error: Exception, message: str) -> None:
    assert describe_source_error(error) == message


def test_an_answer_with_the_wrong_number_of_vectors_is_refused() -> None:
    opened = OpenedSource("rows", Rows([]), ())
    with pytest.raises(Failed, match="2 texts with 1 vector; this is an error of the importer"):
        check_found(FoundVectors(["a", "b"], [GOOD[0]]), opened, Counts())


def test_reasons_are_counted_up_to_a_limit() -> None:
    counts = Counts()
    counts.add_unreadable({f"reason {number}": 1 for number in range(MAX_REASONS + 7)})
    assert len(counts.unreadable) == MAX_REASONS + 1
    assert counts.unreadable[OTHER_REASONS] == 7


def test_the_progress_names_the_action_and_the_rate() -> None:
    now = 0.0
    progress = ImportProgress("importing", 100, lambda: now)
    progress.start_window(50, 50)
    progress.add_results(hits=20, others=20, failed=10)
    now = 2.0
    assert progress.describe() == "importing: 50 texts  25/s"
    assert (progress.completed, progress.estimate_seconds_left()) == (50, 2.0)
