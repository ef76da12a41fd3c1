"""One run of ``embedonce import``: verify a sample of the source, then store what no tier has, window by window.

After each window, its vectors are in the tiers. A run that is killed loses at most one window, and the same command
stores the rest. Memory does not grow with the source.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from embedonce._engine.checks import round_matrix
from embedonce._engine.verifying import LEAST_COSINE, compute_cosines
from embedonce._messages import format_count
from embedonce.cli.embedding.run import FLUSH
from embedonce.cli.embedding.summary import collect_causes, collect_tier_failures, subtract_money
from embedonce.cli.money import sum_cost
from embedonce.cli.output import Failed
from embedonce.errors import EraseIncomplete, ProviderError, ReplayMiss
from embedonce.vectors import Dtype, Matrix

from .repeats import TextFilter
from .verification import verify_samples

if TYPE_CHECKING:
    from embedonce.answers import Fetched
    from embedonce.cache import Cache
    from embedonce.cli.embedding.progress import Display
    from embedonce.keys import VectorSpace

    from .reading import SourceReader, Window
    from .summary import Summary

OUTAGE = 2
"""The import stops after this many windows in a row of which no tier that outlives the process has stored anything."""

SEVERAL_VECTORS = "several different vectors of one text"
"""Why a text is left out: only one of its vectors can be right. The importers use the same words for a lookup."""


class Run:
    """Imports a source and keeps the counts in ``summary``.

    ``make_reader`` starts a new pass over the source. ``verify`` is the number of texts to verify.
    """

    def __init__(
        self,
        cache: Cache,
        make_reader: Callable[[], SourceReader],
        *,
        summary: Summary,
        verify: int,
        dtype: Dtype,
        with_texts: bool,
        persistent_tiers: Sequence[str],
    ) -> None:
        self._cache = cache
        self._make_reader = make_reader
        self._verify = verify
        self._dtype: Dtype = dtype
        self._with_texts = with_texts
        self._persistent_tiers = persistent_tiers
        self._before = cache.stats()
        self._started = time.monotonic()
        self._last_stored = 0
        self._outage = 0
        self._stored = TextFilter()
        """The texts that this run has stored."""
        self._contradictory = TextFilter()
        """The texts that the source has with several different vectors, as far as this run has found out."""
        self._removed = 0
        self.summary = summary
        self.reader: SourceReader = make_reader()
        """The current pass over the source."""
        found = cache.lookup([], task=summary.task)
        self._space: VectorSpace = found.space
        self._dimensions = found.dimensions
        """Dimensions of the provider's vectors; None if they are not known yet."""

    # --- the verification ---------------------------------------------------------------------

    def verify(self, display: Display) -> None:
        """Compare a random sample of the source with what the provider computes.

        Raises:
            Failed: the source cannot be read or has no vector, the provider fails, or the vectors differ.
        """
        if not self._verify:
            return

        def report(window: Window) -> None:
            display.start_window(window.texts, window.position)
            display.add_results(hits=0, others=window.texts, failed=0)

        try:
            samples = self.reader.sample(self._verify, np.random.default_rng(), report)
        finally:
            self._take_counts()
        found = verify_samples(self._cache, samples, self.summary.task, dimensions=self._dimensions, dtype=self._dtype)
        if found is None:
            raise Failed(self._describe_nothing())
        self.summary.take_verification(found)
        self._dimensions = found.dimensions
        if found.difference is not None:
            raise Failed(found.describe_difference(self.summary.source))
        self.reader = self._make_reader()

    # --- the import ---------------------------------------------------------------------------

    def store(self, display: Display) -> None:
        """Store the vectors that no tier has. In a dry run, only count them.

        Raises:
            Failed: the source cannot be read or has no vector, or no tier stores anything.
        """
        for window in self.reader.read():
            display.start_window(window.texts, window.position)
            before = replace(self.summary)
            for part in window.parts:
                if self._dimensions is None:
                    self._dimensions = max(window.parts, key=lambda part: len(part.texts)).matrix.shape[1]
                if part.matrix.shape[1] == self._dimensions:
                    self._store_texts(*self._drop_unroundable(part.texts, part.matrix))
                else:
                    size, expected = part.matrix.shape[1], self._dimensions
                    reason = f"{format_count(size, 'dimension')} in place of {expected:,}"
                    self.reader.counts.add_invalid(reason, len(part.texts))
            self._take_counts()
            imported = self.summary.imported - before.imported
            there = self.summary.already_there - before.already_there
            display.add_results(hits=there, others=max(imported, 0), failed=max(window.texts - there - imported, 0))
            self._check_tiers(imported)
        self._take_counts()
        if not self.summary.imported + self.summary.already_there + self.summary.different:
            raise Failed(self._describe_nothing())

    def _drop_unroundable(self, texts: list[str], matrix: Matrix) -> tuple[list[str], Matrix]:
        """Return the texts whose vectors can be rounded to the cache's dtype, and their vectors as they are."""
        try:
            round_matrix(matrix, self._dtype, "")
        except ProviderError:
            good = [index for index in range(len(texts)) if self._is_roundable(matrix[index : index + 1])]
            self.reader.counts.add_invalid(f"cannot be rounded to {self._dtype}", len(texts) - len(good))
            return [texts[index] for index in good], matrix[good]
        return texts, matrix

    def _is_roundable(self, row: Matrix) -> bool:
        try:
            round_matrix(row, self._dtype, "")
        except ProviderError:
            return False
        return True

    def _store_texts(self, texts: list[str], matrix: Matrix) -> None:
        texts, matrix = self._take_distinct(texts, matrix)
        if not texts:
            return
        found = self._look_up(texts)
        for error in found.failed.values():
            if not isinstance(error, _MISSES):
                self.reader.counts.add_invalid(f"the text has no key ({type(error).__name__})")
        known = [index for index, row in enumerate(found.rows) if row is not None]
        if known:
            stored = np.stack([row for row in found.rows if row is not None])
            self._count_known([texts[index] for index in known], stored, matrix[known])
        new = [
            index
            for index, row in enumerate(found.rows)
            if row is None and isinstance(found.failed.get(index), _MISSES)
        ]
        if new and not self.summary.dry_run:
            everything = len(new) == len(texts)
            new_texts = texts if everything else [texts[index] for index in new]
            self._cache.put(new_texts, matrix if everything else matrix[new], self.summary.task)
            self._cache.flush(timeout=FLUSH)
            self._stored.add(new_texts)
        self.summary.imported += len(new)

    def _look_up(self, texts: list[str]) -> Fetched:
        """Return what the tiers have. In a dry run, copy nothing from one tier to another."""
        task = self.summary.task
        if not self.summary.dry_run:
            return self._cache.lookup(texts, task=task)
        return self._cache.fetch(texts, task, store=False, admit=_refuse_to_compute)

    def _take_distinct(self, texts: list[str], matrix: Matrix) -> tuple[list[str], Matrix]:
        """Return each text once. Leave out the texts that the source has with several different vectors."""
        first = dict(zip(reversed(texts), range(len(texts) - 1, -1, -1), strict=True))
        repeated = [index for index, text in enumerate(texts) if first[text] != index]
        if repeated:
            cosines = compute_cosines(matrix[[first[texts[index]] for index in repeated]], matrix[repeated])
            differing = {texts[index] for index, cosine in zip(repeated, cosines, strict=True) if cosine < LEAST_COSINE}
            self._refuse(list(differing))
        is_refused = self._contradictory.contains(texts)
        if count := int(is_refused.sum()):
            self.reader.counts.add_invalid(SEVERAL_VECTORS, count)
        self.summary.already_there += sum(not is_refused[index] for index in repeated)
        kept = [index for index in sorted(first.values()) if not is_refused[index]]
        return (texts, matrix) if len(kept) == len(texts) else ([texts[index] for index in kept], matrix[kept])

    def _refuse(self, texts: list[str]) -> None:
        """Import none of these texts. Those that this run has stored are removed from the tiers.

        Raises:
            Failed: a tier could not remove them.
        """
        if not texts:
            return
        self._contradictory.add(texts)
        stored = [text for text, is_stored in zip(texts, self._stored.contains(texts), strict=True) if is_stored]
        if not stored:
            return
        try:
            self._cache.forget(stored, self.summary.task)
        except EraseIncomplete as error:
            raise Failed(
                f"the source has {SEVERAL_VECTORS}, and the one that was imported could not be removed: {error}"
            ) from error
        self._removed += len(stored)
        self.summary.imported -= len(stored)
        self.reader.counts.add_invalid(SEVERAL_VECTORS, len(stored))

    def _count_known(self, texts: list[str], stored: Matrix, found: Matrix) -> None:
        """Count distinct texts that have a vector already: the same one, or another one.

        If this run has stored the other one, then the source has two different vectors of the text.
        """
        is_equal = compute_cosines(stored, found) >= LEAST_COSINE
        is_contradictory = ~is_equal & self._stored.contains(texts)
        if count := int(is_contradictory.sum()):
            self._refuse([texts[index] for index in np.flatnonzero(is_contradictory)])
            self.reader.counts.add_invalid(SEVERAL_VECTORS, count)
        self.summary.already_there += int(is_equal.sum())
        self.summary.different += int((~is_equal & ~is_contradictory).sum())

    def _check_tiers(self, imported: int) -> None:
        """Stop if the tiers have stored nothing for some time, because reading the rest would be in vain.

        Raises:
            Failed: no tier that outlives the process has stored anything of the last windows.
        """
        if imported <= 0 or self.summary.dry_run:
            return
        tiers = self._cache.stats().tiers
        stored = sum(tiers[name].stored for name in self._persistent_tiers)
        self._outage = self._outage + 1 if stored == self._last_stored else 0
        self._last_stored = stored
        if self._outage >= OUTAGE:
            raise Failed("no tier stores the vectors")

    # --- the end ------------------------------------------------------------------------------

    def _take_counts(self) -> None:
        self.summary.take_counts(self.reader.counts, with_texts=self._with_texts)

    def _describe_nothing(self) -> str:
        """Return that there is nothing to import, and why."""
        summary = self.summary
        if summary.found:
            return f"found {format_count(summary.found, 'text')} in {summary.source}, but nothing that can be imported"
        if summary.missing:
            return (
                f"found no vector for the {format_count(summary.missing, 'text')} of --texts in {summary.source}. They "
                "must be exactly the texts that the other program embedded: check --split and --field, and the options "
                "of the importer"
            )
        return f"found no vector that can be read in {summary.source}"

    def complete_summary(self) -> None:
        """Add what is known at the end: failures, costs and seconds."""
        summary, failures = self.summary, self.reader.failures
        summary.failures = failures.groups
        summary.failed = sum(group.count for group in failures.groups) + failures.ungrouped
        stats, before = self._cache.stats(), self._before
        spent = subtract_money(stats.spent, before.spent)
        summary.spent = sum_cost(stats.computed - before.computed, spent) if summary.verified else None
        summary.trouble, summary.tier_causes = collect_tier_failures(stats), collect_causes(stats)
        for name in self._persistent_tiers if summary.imported and not summary.dry_run else ():
            tier = stats.tiers[name]
            lost = summary.imported + self._removed - (tier.stored - before.tiers[name].stored)
            if lost > 0 and (tier.errors or tier.dropped or tier.skipped):
                summary.unstored[name] = lost
        summary.seconds = round(time.monotonic() - self._started, 3)


class _NotComputed(Exception):
    """Raised in place of sending a text to the provider. It is never shown."""


_MISSES = (_NotComputed, ReplayMiss, type(None))
"""What a text that no tier has gets in place of an error."""


def _refuse_to_compute(texts: Sequence[str], space: VectorSpace) -> None:
    raise _NotComputed
