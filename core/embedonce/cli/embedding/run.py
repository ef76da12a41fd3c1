"""One run of ``embedonce embed``: read windows of passages, embed them with the cache, and write them to the sink.

A window is looked up first, so that the progress shows its hits immediately. The texts that no tier has are then
computed in chunks that take about two seconds. After each chunk, the vectors are in the tiers, so that a run that is
killed loses at most about one chunk. If a whole window takes less than that, it is fetched in one call.

Two windows are in flight: while one is computed or written, the next one is read and looked up, or fetched.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from embedonce._engine.ahead import run_ahead
from embedonce._engine.workers import Workers
from embedonce._messages import format_count
from embedonce.cli.money import sum_cost
from embedonce.errors import ReplayMiss, TextError, TextRefused
from embedonce.vectors import matrix as make_matrix

from .distinct import DistinctTexts
from .failures import Failures
from .pace import FACTOR, Pace
from .passages import Broken, Passage, ReadItem
from .summary import (
    Summary,
    collect_causes,
    collect_tier_failures,
    describe_skipped,
    has_stored_nothing,
    subtract_money,
)
from .windows import Results, Window

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


class Found(NamedTuple):
    """What a window got before its turn: from the tiers alone, or, if ``started`` is set, from a whole call."""

    numbers: Sequence[int]
    """Numbers of the texts that were looked up or fetched."""
    fetched: Fetched
    started: float | None = None
    """Monotonic time at which the call began, and the time at which it ended."""
    ended: float = 0.0


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
        self._broken: deque[Broken] = deque()
        """Items that were read without a passage and are not reported yet."""
        self._broken_in_windows = 0
        """Number of these items that belong to windows in flight."""
        self._unfinished: deque[Window] = deque()
        """The windows in flight."""
        self._fetching = 0
        """Number of windows that are being fetched ahead, each in one call."""
        self._last_end = 0.0
        """Monotonic time at which the last window that was fetched in one call was complete."""
        self._outage = 0
        """Number of windows in a row for which the provider returned no vector."""
        self.failures = Failures()
        self.summary = Summary(hits=dict.fromkeys(cache.tiers, 0), imported=dict.fromkeys(cache.importers, 0))
        self._before = self._measure("computed", cache.stats, None)

    def embed(self, display: Display) -> None:
        """Read, embed and write all passages, and move the output into place.

        Raises:
            Stopped: the run ended early. No output was written, but the tiers have the vectors computed so far.
        """
        started = time.monotonic()
        workers = Workers()
        try:
            for window, found in run_ahead(lambda: workers, self._list_jobs(display)):
                self._finish_window(window, found, display)
            self._report_broken(len(self._broken))
            self._check_rows()
            self._finish_output()
        finally:
            self._report_broken(len(self._broken))
            self._complete_summary(time.monotonic() - started)

    # --- reading ahead ------------------------------------------------------------------------

    def _list_jobs(self, display: Display) -> Iterator[Callable[[], tuple[Window, Found]]]:
        """Read the windows, and yield for each one the job that looks it up, or that fetches it in one call."""
        passages = read_passages(self._reader, self.summary, self._broken.append, self._strict)
        for batch in split_windows(passages):
            self._count_distinct(batch)
            window = Window(batch, len(self._broken) - self._broken_in_windows, self._reader.bytes_read)
            self._broken_in_windows += window.broken
            # A text of an earlier window that is not stored yet is fetched later, when it is in a tier.
            numbers = window.list_new(self._unfinished)
            self._unfinished.append(window)
            if self._pace.size < len(window.texts) or self._outage or not numbers:
                yield partial(self._look_up, window)
                continue
            if not self._fetching:
                display.start_chunk()
            self._fetching += 1
            yield partial(self._fetch, window, numbers)

    def _look_up(self, window: Window) -> tuple[Window, Found]:
        return window, Found(range(len(window.texts)), self._cache.lookup(window.texts, task=self._task))

    def _fetch(self, window: Window, numbers: Sequence[int]) -> tuple[Window, Found]:
        started = time.monotonic()
        fetched = self._cache.fetch([window.texts[number] for number in numbers], task=self._task)
        self._flush()
        return window, Found(numbers, fetched, started, time.monotonic())

    # --- one window ---------------------------------------------------------------------------

    def _finish_window(self, window: Window, found: Found, display: Display) -> None:
        display.start_window(len(window.passages), window.bytes_read)
        self._report_broken(window.broken)
        self._broken_in_windows -= window.broken
        self.summary.texts += len(window.passages)
        self._unfinished.popleft()
        if found.started is not None:
            self._finish_fetch(window, found, display)
        elif found.fetched.space == self._space:
            self._add_results(window, window.add(found.numbers, found.fetched, is_final=False), display)
        missing = window.list_missing()
        growth = 1
        while missing:
            size = self._pace.size * growth
            chunk, missing = missing[:size], missing[size:]
            # Small chunks would only delay finding out that the provider is down.
            growth = 1 if self._embed_chunk(window, chunk, display) else growth * FACTOR
        self._outage = self._outage + 1 if is_outage(window.failed.values(), window.is_computed) else 0
        self._report_failures(window)
        self._write_rows(window)

    def _finish_fetch(self, window: Window, found: Found, display: Display) -> None:
        """Take over the vectors of a window that was fetched in one call."""
        self._check_space(found.fetched.space)
        assert found.started is not None
        # Two windows are in flight, so the time since the window before was finished is what this window took.
        seconds = found.ended - max(found.started, self._last_end)
        self._last_end = found.ended
        self._fetching -= 1
        results = window.add(found.numbers, found.fetched, is_final=True)
        display.finish_chunk(results.sources["provider"] if self._fetching else None)
        if self._fetching:
            display.start_chunk()
        self._add_results(window, results, display)
        self._record_pace(found.fetched, seconds)

    def _embed_chunk(self, window: Window, numbers: Sequence[int], display: Display) -> bool:
        """Embed texts of a window. Return False if the provider seems to be down."""
        started = time.monotonic()
        display.start_chunk()
        fetched = self._cache.fetch([window.texts[number] for number in numbers], task=self._task)
        self._check_space(fetched.space)
        self._flush()
        display.finish_chunk()
        self._add_results(window, window.add(numbers, fetched, is_final=True), display)
        if is_outage(fetched.failed.values(), "provider" in fetched.sources):
            return False
        self._record_pace(fetched, time.monotonic() - started)
        return True

    def _flush(self) -> None:
        """Wait for the queued writes, so that no write is dropped and a killed run loses at most what it is computing.

        Each write has its tier's timeout, so only a very slow store can exceed FLUSH.
        """
        self._cache.flush(timeout=FLUSH)

    def _record_pace(self, fetched: Fetched, seconds: float) -> None:
        asked = sum(source in (None, "provider") for source in fetched.sources)
        if asked and not is_outage(fetched.failed.values(), "provider" in fetched.sources):
            self._pace.record(asked, seconds)

    def _add_results(self, window: Window, results: Results, display: Display) -> None:
        """Count what passages got: hits by tier, texts by importer, and for the display also others and failures."""
        hits = 0
        for source, number in results.sources.items():
            if source in self.summary.imported:
                self.summary.imported[source] += number
            elif source != "provider":
                self.summary.hits[source] += number
                hits += number
        others = results.sources.total() - hits
        display.add_results(hits=hits, others=others, failed=results.failed)
        if results.failed and self._strict:
            self._report_failures(window)

    def _check_space(self, space: VectorSpace) -> None:
        if space != self._space:
            raise Stopped(
                f"the provider failed, and the fallback ({space.provider} {space.model}) has a different vector space; "
                "one output cannot mix two vector spaces",
                is_temporary=True,
            )

    def _write_rows(self, window: Window) -> None:
        passages, numbers = window.passages, window.numbers
        if window.failed:
            good = [place for place, number in enumerate(numbers) if number not in window.failed]
            passages, numbers = [passages[place] for place in good], [numbers[place] for place in good]
        if passages:
            rows = [window.rows[number] for number in numbers]
            self._sink.write(passages, make_matrix(rows))
            self.summary.rows += len(rows)
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
        answered = summary.rows - sum(summary.hits.values()) - sum(summary.imported.values())
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

    def _report_broken(self, count: int) -> None:
        """Report the first items that were read without a passage and are not reported yet."""
        for _ in range(count):
            self.failures.add_broken(self._broken.popleft())

    def _report_failures(self, window: Window) -> None:
        failed = window.list_failed_passages()
        for passage, error in failed:
            self.failures.add_failed(passage, error)
        self.summary.failed += len(failed)
        if self._strict and failed:
            raise Stopped("a passage failed, and --strict is set")
        if self._outage >= OUTAGE:
            raise Stopped("every call to the provider fails", is_temporary=True)


def read_passages(
    items: Iterable[ReadItem], summary: Summary, add_broken: Callable[[Broken], None], strict: bool
) -> Iterator[Passage]:
    """Yield the passages; count the broken items.

    Raises:
        Stopped: an item is broken, and ``strict`` is set.
    """
    for item in items:
        if isinstance(item, Passage):
            yield item
            continue
        add_broken(item)
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


def is_outage(errors: Iterable[Exception | None], is_computed: bool) -> bool:
    """Return whether the provider was called and returned no vector at all. ``is_computed``: it returned some."""
    # An invalid text is found before the provider is called.
    found = [error for error in errors if error is not None and not isinstance(error, TextError)]
    has_text_errors = any(isinstance(error, TEXT_ERRORS) for error in found)
    return bool(found) and not has_text_errors and not is_computed
