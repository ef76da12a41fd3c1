"""The progress bar of ``embedonce embed``, on standard error: passages, rate, hits, time left."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from embedonce.events import Computed

if TYPE_CHECKING:
    from types import TracebackType

    from embedonce.events import Event


class Bar:
    """Shows how far a run is. What is done is counted in bytes read, the only total known beforehand."""

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
        self._passages = self._hits = self._window = 0
        self._from = self._to = 0.0

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def window(self, passages: int, bytes_read: int) -> None:
        """A window of passages was read, and is about to be embedded."""
        self._window, self._from, self._to = passages, self._to, bytes_read
        self._passages += passages

    def event(self, event: Event) -> None:
        """Move within a window: a slow provider takes long over one."""
        if isinstance(event, Computed) and self._window:
            self._from += (self._to - self._from) * min(event.texts / self._window, 1)
            self._show(self._from)

    def done(self, hits: int) -> None:
        """The window is embedded; ``hits`` of the whole run so far."""
        self._hits = hits
        self._from = self._to
        self._show(self._to)

    def _show(self, completed: float) -> None:
        seconds = max(time.monotonic() - self._started, 1e-9)
        told = f"{self._passages:,} passages  {self._passages / seconds:,.0f}/s  {self._percent()} hits"
        self._progress.update(self._task, completed=completed, description=told)

    def _percent(self) -> str:
        return f"{100 * self._hits / max(self._passages, 1):.0f} %"


class NoBar:
    """The same for a run that nobody watches."""

    def __enter__(self) -> NoBar:
        return self

    def __exit__(self, *error: Any) -> None: ...

    def window(self, passages: int, bytes_read: int) -> None: ...

    def event(self, event: Event) -> None: ...

    def done(self, hits: int) -> None: ...
