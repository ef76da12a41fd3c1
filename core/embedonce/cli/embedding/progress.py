"""The progress of ``embedonce embed``, on standard error: passages, rate, hits, time left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from embedonce.events import Computed

if TYPE_CHECKING:
    from embedonce.events import Event

INTERVAL = 10.0
"""Seconds between two lines of progress if standard error is not a terminal."""


class Progress:
    """Counts what a run has done, and describes it.

    A window of passages is looked up first. Texts that no tier has are then computed in chunks. The rate is the rate of
    the computed texts alone, so that hits do not make the provider look fast. The first chunk does not count, because
    the provider may load its model for this chunk.

    Args:
        total: number of bytes to read; None if it is not known.
        clock: function that returns seconds, for tests.
    """

    def __init__(self, total: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = total
        self._clock = clock
        self._started = clock()
        self._read = self._done = self._hits = self._failed = 0
        """Passages read so far; those that are done; the hits and the failures among them."""
        self._texts = self._missed = self._open = 0
        """Passages of the current window; those that no tier has; those that are not done."""
        self._window_start = self._window_end = 0
        """Number of bytes read before and after the current window."""
        self._chunks: list[tuple[int, float]] = []
        """Computed texts and seconds: of the first chunk, and of all other chunks that have ended."""
        self._chunk_started: float | None = None
        self._chunk: tuple[int, float] = (0, 0.0)
        """Texts of the current chunk that the provider has embedded, and the seconds that this took."""
        self._ahead = 0
        """Texts of later windows that the provider has embedded already."""

    # --- what happens -------------------------------------------------------------------------

    def start_window(self, passages: int, bytes_read: int) -> None:
        """Record that a window of passages was read."""
        self._window_start, self._window_end = self._window_end, bytes_read
        self._texts = self._missed = self._open = passages
        self._read += passages

    def add_results(self, *, hits: int, others: int, failed: int) -> None:
        """Record passages of the window that are done: hits, others that have a vector, and failed ones."""
        self._hits += hits
        self._failed += failed
        self._missed -= hits
        self._done += hits + others + failed
        self._open -= hits + others + failed

    def start_chunk(self) -> None:
        """Record that texts are about to be embedded."""
        self._chunk_started, self._chunk = self._clock(), (0, 0.0)

    def handle_event(self, event: Event) -> None:
        """Count the texts that the provider embedded. A chunk may take several calls of the provider."""
        if isinstance(event, Computed) and self._chunk_started is not None:
            self._chunk = self._chunk[0] + event.texts, self._clock() - self._chunk_started

    def finish_chunk(self, computed: int | None = None) -> None:
        """Record that the texts were embedded or have failed.

        If a later window is in flight, ``computed`` says how many texts of this one were embedded. The others that the
        provider has embedded belong to the later window.
        """
        self._ahead = 0 if computed is None else max(self._ahead + self._chunk[0] - computed, 0)
        if self._chunk_started is not None and self._chunk[0]:
            self._chunk = self._chunk[0], self._clock() - self._chunk_started
            if len(self._chunks) < 2:
                self._chunks.append(self._chunk)
            else:
                self._chunks[1] = _add(self._chunks[1], self._chunk)
        self._chunk_started, self._chunk = None, (0, 0.0)

    # --- what is shown ------------------------------------------------------------------------

    @property
    def completed(self) -> float:
        """Number of bytes whose passages are done. Each passage of a window counts for the same number of bytes."""
        share = 1 - self._count_open() / self._texts if self._texts else 1.0
        return self._window_start + (self._window_end - self._window_start) * share

    def describe(self) -> str:
        """Return in one line: the passages, the rate, the share of hits, and what the run is waiting for."""
        done = self._done + self._ahead + self._chunk[0]
        rate = self._compute_rate() or done / max(self._clock() - self._started, 1e-9)
        parts = [
            f"{done:,} passages",
            f"{rate:,.0f}/s" if rate >= 9.95 else f"{rate:.1f}/s",
            f"{100 * self._hits / max(done, 1):.0f} % hits",
        ]
        parts += [f"{self._failed:,} failed"] if self._failed else []
        if self._chunk_started is not None and not (self._chunks or self._chunk[0] or self._failed):
            parts.append("loading the model, or waiting for the provider's first answer")
        return "  ".join(parts)

    def estimate_seconds_left(self) -> float | None:
        """Return how many seconds the rest will probably take, or None if this is not known.

        The estimate assumes that the tiers have the same share of the unread passages as of the current window.
        """
        if self.total is None or not self._window_end or not self._texts:
            return None
        unread = self._read * max(self.total - self._window_end, 0) / self._window_end
        missed = self._count_open() + unread * self._missed / self._texts
        rate = self._compute_rate()
        if missed and not rate:
            return None
        now = self._clock()
        waited = sum(seconds for _, seconds in self._chunks)
        waited += 0.0 if self._chunk_started is None else now - self._chunk_started
        other = max(now - self._started - waited, 0.0)  # reading, looking up and writing
        return unread * other / self._read + (missed / rate if rate else 0.0)

    def _count_open(self) -> int:
        return max(self._open - self._chunk[0], 0)

    def _compute_rate(self) -> float | None:
        """Return the number of texts that the provider embeds per second, or None before its first answer."""
        first, rest = [*self._chunks, (0, 0.0), (0, 0.0)][:2]
        if not self._chunks:
            first = self._chunk
        else:
            rest = _add(rest, self._chunk)
        texts, seconds = rest if rest[0] else first
        return texts / max(seconds, 1e-9) if texts else None


class ReadingProgress(Progress):
    """The progress of a dry run, which embeds nothing: the share of the bytes whose passages were looked up."""

    def describe(self) -> str:
        """Return in one line: the passages, the rate and the failures."""
        rate = self._done / max(self._clock() - self._started, 1e-9)
        failed = f"  {self._failed:,} failed" if self._failed else ""
        return f"{self._done:,} passages  {rate:,.0f}/s{failed}"

    def estimate_seconds_left(self) -> float | None:
        """Return how many seconds the rest will probably take, or None if this is not known."""
        completed = self.completed
        if self.total is None or not completed:
            return None
        return (self._clock() - self._started) * max(self.total - completed, 0) / completed


def _add(one: tuple[int, float], other: tuple[int, float]) -> tuple[int, float]:
    return one[0] + other[0], one[1] + other[1]


def format_seconds(seconds: float) -> str:
    """Return a duration: ``42 s``, ``3 min 20 s`` or ``2 h 5 min``."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def describe_with_time(progress: Progress) -> str:
    """Return the description of the progress, with the time left if it is known."""
    left = progress.estimate_seconds_left()
    line = progress.describe()
    return line if left is None else f"{line}  {format_seconds(left)} left"


# --- where it is shown ------------------------------------------------------------------------


class Display:
    """Shows the progress of a run. No error of the progress or of its display ends the run."""

    def __init__(self, progress: Progress | None = None, view: Bar | Lines | None = None) -> None:
        self._progress = progress
        self._view = view

    def __enter__(self) -> Display:
        self._attempt(lambda progress, view: view.start())
        return self

    def __exit__(self, *error: object) -> None:
        self._attempt(lambda progress, view: view.stop())

    def start_window(self, passages: int, bytes_read: int) -> None:
        self._attempt(lambda progress, view: progress.start_window(passages, bytes_read))

    def add_results(self, *, hits: int, others: int, failed: int) -> None:
        self._attempt(lambda progress, view: progress.add_results(hits=hits, others=others, failed=failed))

    def start_chunk(self) -> None:
        self._attempt(lambda progress, view: progress.start_chunk())

    def handle_event(self, event: Event) -> None:
        self._attempt(lambda progress, view: progress.handle_event(event))

    def finish_chunk(self, computed: int | None = None) -> None:
        self._attempt(lambda progress, view: progress.finish_chunk(computed))

    def _attempt(self, action: Callable[[Progress, Bar | Lines], None]) -> None:
        """Run an action and show the result. After an error, show nothing more."""
        progress, view = self._progress, self._view
        if progress is None or view is None:
            return
        try:
            action(progress, view)
            view.update()
        except Exception:  # noqa: BLE001  (whatever the error is, the run must go on)
            self._progress = None
            with suppress(Exception):
                view.stop()


class Bar:
    """A progress bar on a terminal. It shows bytes, because only the total number of bytes is known in advance."""

    def __init__(self, progress: Progress) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._source = progress
        columns = [BarColumn(bar_width=30), TaskProgressColumn(), TextColumn("{task.description}", markup=False)]
        self._bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("reading", total=progress.total)

    def start(self) -> None:
        self._bar.start()

    def update(self) -> None:
        self._bar.update(self._task, completed=self._source.completed, description=describe_with_time(self._source))

    def stop(self) -> None:
        self._bar.stop()


class Lines:
    """Lines of progress for a log: one every :data:`INTERVAL` seconds, so that a short run has none."""

    def __init__(self, progress: Progress, report: Callable[[str], None]) -> None:
        self._source = progress
        self._report = report
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._write_lines, name="embedonce-progress", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def update(self) -> None: ...

    def stop(self) -> None:
        self._stopped.set()

    def _write_lines(self) -> None:
        with suppress(Exception):
            while not self._stopped.wait(INTERVAL):
                total = self._source.total
                share = f"{min(100 * self._source.completed / total, 100):.0f} %  " if total else ""
                self._report(share + describe_with_time(self._source))
