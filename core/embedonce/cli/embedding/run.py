"""One run of ``embedonce embed``: read windows of passages, embed them with the cache, and write them to the sink.

A window is looked up first, so that the progress shows its hits immediately. The texts that no tier has are then
computed in chunks that take about two seconds. After each chunk, the vectors are in the tiers, so that a run that is
killed loses at most about one chunk. If a whole window takes less than that, it is fetched in one call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from embedonce._messages import format_count
from embedonce.cli.money import sum_cost
from embedonce.errors import ReplayMiss, TextError, TextRefused
from embedonce.keys import NORMALIZERS

from .distinct import DistinctTexts
from .failures import Failures
from .pace import FACTOR, Pace
from .passages import Passage, ReadItem
from .summary import (
    Summary,
    collect_causes,
    collect_tier_failures,
    describe_skipped,
    has_stored_nothing,
    subtract_money,
)

if TYPE_CHECKING:
    from embedonce.answers import Fetched
    from embedonce.cache import Cache
    from embedonce.events import Stats
    from embedonce.keys import VectorSpace

    from .progress import Display
    from .sinks import Sink
    from .sources import Reader

T = TypeVar("T")

WINDOW = 2048
"""Maximum number of passages in a window. The passages of a window are looked up together."""
WINDOW_CHARACTERS = 8 * 2**20
"""A window also ends at this many characters, so that long passages do not fill the memory."""
FLUSH = 60.0
"""Seconds to wait for the background writes of one chunk."""
OUTAGE = 2
"""The run stops after this many windows in a row for which the provider returned no vector. The provider is then
probably down, and calling it for the rest of a large corpus would waste time."""


class Stopped(Exception):
    """Raised to end the run early, for example because of ``--strict`` or because the provider is down.

    ``is_temporary`` means that the same command may succeed later without a change.
    """

    def __init__(self, message: str, *, is_temporary: bool = False) -> None:
        super().__init__(message)
        self.is_temporary = is_temporary


class Window:
    """Some passages, and what is known about their vectors. Each distinct text is embedded once."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        self.passages = passages
        self.positions: dict[str, list[int]] = {}
        """Positions of each distinct text."""
        for position, passage in enumerate(passages):
            self.positions.setdefault(passage.text, []).append(position)
        self.rows: list[Any] = [None] * len(passages)
        self.sources: list[str | None] = [None] * len(passages)
        self.failed: dict[int, Exception | None] = {}
        """Errors by position. None stands for a text without a vector and without an error."""

    def list_missing(self) -> list[str]:
        """Return the distinct texts that have neither a vector nor an error, in the order of the passages."""
        return [
            text
            for text, positions in self.positions.items()
            if self.rows[positions[0]] is None and positions[0] not in self.failed
        ]

    def add(self, texts: Sequence[str], fetched: Fetched, *, is_final: bool) -> list[int]:
        """Take over the vectors of ``texts``, and the errors that another call would not change.

        With ``is_final``, take over all errors. Return the positions of the passages that have a result now.
        """
        done: list[int] = []
        for number, text in enumerate(texts):
            row, error = fetched.rows[number], fetched.failed.get(number)
            if row is None and not is_final and not isinstance(error, TextError):
                continue
            for position in self.positions[text]:
                self.rows[position], self.sources[position] = row, fetched.sources[number]
                if row is None:
                    self.failed[position] = error
            done += self.positions[text]
        return done


class Run:
    """Embeds every passage of a reader and keeps the counts in ``summary``.

    ``allow_empty`` means that an output without rows may replace an earlier output, if nothing failed.
    """

    def __init__(
        self,
        cache: Cache,
        reader: Reader,
        sink: Sink,
        *,
        task: str,
        strict: bool = False,
        allow_empty: bool = False,
        persistent_tiers: Sequence[str] = (),
    ) -> None:
        self._cache = cache
        self._reader = reader
        self._sink = sink
        self._task = task
        self._strict = strict
        self._allow_empty = allow_empty
        self._persistent_tiers = persistent_tiers
        self._space = cache.lookup([], task=task).space
        self._pace = _make_pace(cache)
        self._distinct: DistinctTexts | None = DistinctTexts()
        self._outage = 0
        """Number of windows in a row for which the provider returned no vector."""
        self.failures = Failures()
        self.summary = Summary(hits=dict.fromkeys(cache.tiers, 0))
        self._before = self._measure("computed", cache.stats, None)

    def embed(self, display: Display) -> None:
        """Read, embed and write all passages, and move the output into place.

        Raises:
            Stopped: the run ended early. No output was written, but the tiers have the vectors computed so far.
        """
        started = time.monotonic()
        try:
            for passages in split_windows(read_passages(self._reader, self.summary, self.failures, self._strict)):
                display.start_window(len(passages), self._reader.bytes_read)
                self._count_distinct(passages)
                self._embed_window(Window(passages), display)
            self._check_rows()
            self._finish_output()
        finally:
            self._complete_summary(time.monotonic() - started)

    # --- one window ---------------------------------------------------------------------------

    def _embed_window(self, window: Window, display: Display) -> None:
        self.summary.texts += len(window.passages)
        if self._pace.size < len(window.positions):
            self._look_up(window, display)
        missing = window.list_missing()
        growth = 1
        while missing:
            size = self._pace.size * growth
            chunk, missing = missing[:size], missing[size:]
            # Small chunks would only delay finding out that the provider is down.
            growth = 1 if self._embed_chunk(window, chunk, display) else growth * FACTOR
        self._outage = self._outage + 1 if is_outage(window.failed.values(), window.sources) else 0
        self._report_failures(window)
        self._write_rows(window)

    def _look_up(self, window: Window, display: Display) -> None:
        texts = list(window.positions)
        found = self._cache.lookup(texts, task=self._task)
        if found.space == self._space:
            self._add_results(window, window.add(texts, found, is_final=False), display)

    def _embed_chunk(self, window: Window, texts: Sequence[str], display: Display) -> bool:
        """Embed texts of a window. Return False if the provider seems to be down."""
        started = time.monotonic()
        display.start_chunk()
        fetched = self._cache.fetch(texts, task=self._task)
        self._check_space(fetched.space)
        # Wait for the queued writes, so that no write is dropped and a killed run loses at most this chunk. Each write
        # has its tier's timeout, so only a very slow store can exceed FLUSH.
        self._cache.flush(timeout=FLUSH)
        display.finish_chunk()
        self._add_results(window, window.add(texts, fetched, is_final=True), display)
        if is_outage(fetched.failed.values(), fetched.sources):
            return False
        asked = len(texts) - sum(source not in (None, "provider") for source in fetched.sources)
        if asked:
            self._pace.record(asked, time.monotonic() - started)
        return True

    def _add_results(self, window: Window, done: Sequence[int], display: Display) -> None:
        """Count what passages got: hits by tier, and for the display also other vectors and failures."""
        hits = failed = 0
        for position in done:
            source = window.sources[position]
            failed += window.rows[position] is None
            if window.rows[position] is not None and source is not None and source != "provider":
                self.summary.hits[source] += 1
                hits += 1
        display.add_results(hits=hits, others=len(done) - hits - failed, failed=failed)
        if failed and self._strict:
            self._report_failures(window)

    def _check_space(self, space: VectorSpace) -> None:
        if space != self._space:
            raise Stopped(
                f"the provider failed, and the fallback ({space.provider} {space.model}) has a different vector space; "
                "one output cannot mix two vector spaces",
                is_temporary=True,
            )

    def _write_rows(self, window: Window) -> None:
        good = [position for position, row in enumerate(window.rows) if row is not None]
        if good:
            rows = [window.rows[position] for position in good]
            self._sink.write([_replace_surrogates(window.passages[position]) for position in good], np.stack(rows))
            self.summary.rows += len(good)
            self.summary.dimensions = len(rows[0])

    # --- the end ------------------------------------------------------------------------------

    def _check_rows(self) -> None:
        """Refuse to replace an earlier output with an output that has no rows."""
        if self.summary.rows:
            return
        if self.summary.failed:
            raise Stopped("no passage could be embedded", is_temporary=self._outage > 0)
        if not self._allow_empty:
            raise Stopped(f"{describe_empty_input(self._reader)}. To write an output without rows, use --allow-empty")

    def _finish_output(self) -> None:
        if self.summary.dimensions is None:
            self.summary.dimensions = int(self._cache.embed_batch([], task=self._task).shape[1])
        self._sink.finish(self.summary.dimensions)

    # --- counting: no statistic may end the run -----------------------------------------------

    def _measure(self, name: str, compute: Callable[[], T], default: T) -> T:
        """Return a statistic. If it cannot be computed, return ``default`` and add its name to ``unknown``."""
        try:
            return compute()
        except Exception:  # noqa: BLE001  (whatever the error is, the output does not depend on the statistic)
            if name not in self.summary.unknown:
                self.summary.unknown.append(name)
            return default

    def _count_distinct(self, passages: Sequence[Passage]) -> None:
        distinct = self._distinct
        if distinct is None:
            return

        def add() -> DistinctTexts:
            distinct.add([passage.text for passage in passages])
            return distinct

        self._distinct = self._measure("unique", add, None)

    def _complete_summary(self, seconds: float) -> None:
        summary, reader, distinct = self.summary, self._reader, self._distinct
        summary.files, summary.binary, summary.bytes = reader.files, reader.binary, reader.bytes_read
        summary.skipped = self._measure("skipped", lambda: reader.skipped, {})
        summary.failures = self.failures.groups
        summary.unique = None if distinct is None else self._measure("unique", distinct.count, None)
        summary.seconds = round(seconds, 3)
        answered = summary.rows - sum(summary.hits.values())
        before, stats = self._before, self._measure("computed", self._cache.stats, None)
        if before is None or stats is None:
            summary.computed = max(answered, 0)
            return
        summary.computed = _count_computed_texts(stats) - _count_computed_texts(before)
        summary.spent = sum_cost(stats.computed - before.computed, subtract_money(stats.spent, before.spent))
        summary.saved = sum_cost(stats.saved - before.saved, subtract_money(stats.money_saved, before.money_saved))
        summary.repeated = max(answered - summary.computed, 0)
        summary.trouble = collect_tier_failures(stats)
        summary.causes = collect_causes(stats)
        if summary.computed:
            summary.unstored = [name for name in self._persistent_tiers if has_stored_nothing(stats.tiers[name])]

    # --- failures -----------------------------------------------------------------------------

    def _report_failures(self, window: Window) -> None:
        for position in sorted(window.failed):
            self.failures.add_failed(window.passages[position], window.failed[position])
        self.summary.failed += len(window.failed)
        if self._strict and window.failed:
            raise Stopped("a passage failed, and --strict is set")
        if self._outage >= OUTAGE:
            raise Stopped("every call to the provider fails", is_temporary=True)


def read_passages(items: Iterable[ReadItem], summary: Summary, failures: Failures, strict: bool) -> Iterator[Passage]:
    """Yield the passages; count the broken items.

    Raises:
        Stopped: an item is broken, and ``strict`` is set.
    """
    for item in items:
        if isinstance(item, Passage):
            yield item
            continue
        failures.add_broken(item)
        summary.failed += 1
        if strict:
            raise Stopped("an input could not be read, and --strict is set")


def _make_pace(cache: Cache) -> Pace:
    limits = cache.provider.limits
    # A provider that allows few calls per minute waits before each call, so a call must not be smaller than it may be.
    least = 1 if limits.requests_per_minute is None else limits.max_batch
    return Pace(WINDOW, batch=limits.max_batch, least=least)


def _count_computed_texts(stats: Stats) -> int:
    return sum(provider.texts for provider in stats.providers.values())


def describe_empty_input(reader: Reader) -> str:
    """Return why there is no passage, and what was skipped."""
    skipped = dict(reader.skipped)
    if reader.binary:
        skipped["binary"] = reader.binary
    found = f"{format_count(reader.files, 'file')} read" if reader.files else "no file was read"
    return f"there is no passage to embed ({found}{f'; skipped: {describe_skipped(skipped)}' if skipped else ''})"


def split_windows(passages: Iterable[Passage]) -> Iterator[list[Passage]]:
    """Yield the passages in lists of at most WINDOW passages and about WINDOW_CHARACTERS characters."""
    window: list[Passage] = []
    size = 0
    for passage in passages:
        window.append(passage)
        size += len(passage.text)
        if len(window) == WINDOW or size >= WINDOW_CHARACTERS:
            yield window
            window, size = [], 0
    if window:
        yield window


TEXT_ERRORS = (TextRefused, TextError, ReplayMiss)
"""Errors about a single text. Any other error concerns all texts that were sent to the provider together."""


def is_outage(errors: Iterable[Exception | None], sources: Iterable[str | None]) -> bool:
    """Return whether the provider was called and returned no vector at all."""
    # An invalid text is found before the provider is called.
    found = [error for error in errors if error is not None and not isinstance(error, TextError)]
    has_text_errors = any(isinstance(error, TEXT_ERRORS) for error in found)
    return bool(found) and not has_text_errors and "provider" not in sources


def _replace_surrogates(passage: Passage) -> Passage:
    """Return a passage whose text can be written, as the normalisation step ``surrogates`` changes it."""
    return passage._replace(text=NORMALIZERS["surrogates"](passage.text))
