"""The progress bar of ``embedonce embed``, on standard error: passages, rate, hits, time left."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from embedonce.events import Computed

if TYPE_CHECKING:
    from types import TracebackType

    from embedonce.events import Event


class Bar:
    """Shows the progress of a run in bytes read, because only the total number of bytes is known in advance."""

    def __init__(self, total: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task("reading", total=total)
        self._started = time.monotonic()
        self._passages = self._hits = self._window_size = 0
        self._completed = self._window_end = 0.0

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def start_window(self, passages: int, bytes_read: int) -> None:
        """Record that a window of passages was read and is about to be embedded."""
        self._window_size, self._completed, self._window_end = passages, self._window_end, bytes_read
        self._passages += passages

    def handle_event(self, event: Event) -> None:
        """Advance the bar after each part of a window. A slow provider may take a long time for a whole window."""
        if isinstance(event, Computed) and self._window_size:
            self._completed += (self._window_end - self._completed) * min(event.texts / self._window_size, 1)
            self._update()

    def finish_window(self, hits: int) -> None:
        """Record that the window was embedded; ``hits`` is the number of hits of the whole run so far."""
        self._hits = hits
        self._completed = self._window_end
        self._update()

    def _update(self) -> None:
        seconds = max(time.monotonic() - self._started, 1e-9)
        hit_rate = f"{100 * self._hits / max(self._passages, 1):.0f} %"
        description = f"{self._passages:,} passages  {self._passages / seconds:,.0f}/s  {hit_rate} hits"
        self._progress.update(self._task, completed=self._completed, description=description)


class NoBar:
    """Stands in for :class:`Bar` when no progress is shown."""

    def __enter__(self) -> NoBar:
        return self

    def __exit__(self, *error: Any) -> None: ...

    def start_window(self, passages: int, bytes_read: int) -> None: ...

    def handle_event(self, event: Event) -> None: ...

    def finish_window(self, hits: int) -> None: ...
