"""Counters of requests, and of each tier's reads and writes. Many threads update these counters."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

from embedonce.events import TierStats
from embedonce.vectors import Work


class RequestCounters:
    """Counts the requested texts, and how each was answered. Also counts the calls that did not use the cache."""

    def __init__(self) -> None:
        self.requested = 0
        """Number of texts that were requested. Equal texts in one call count once."""
        self.found = 0
        """Number of requested texts that a tier had."""
        self.shared = 0
        """Number of requested texts whose vector another call was already computing."""
        self.passed_by = 0
        """Number of calls of a wrapped client that did not use the cache."""
        self.watchers: list[Callable[[], None]] = []
        """Functions that are called after a change of these counters, which no event reports."""
        self.renew_locks()

    def renew_locks(self) -> None:
        """Create a new lock. A forked child calls this too.

        The lock is re-entrant, because a signal handler may use the cache.
        """
        self._lock = threading.RLock()

    def count(self, requested: int, found: int) -> None:
        """Count the texts of a call. The engine calls this at the end of each call, also if the counts are 0."""
        with self._lock:
            self.requested += requested
            self.found += found
        self.call_watchers()

    def read(self) -> tuple[int, int, int, int]:
        """Return ``requested``, ``found``, ``shared`` and ``passed_by``.

        The lock ensures that ``found`` is at most ``requested``.
        """
        with self._lock:
            return self.requested, self.found, self.shared, self.passed_by

    def count_shared(self, shared: int) -> None:
        with self._lock:
            self.shared += shared

    def count_passed_by(self) -> None:
        with self._lock:
            self.passed_by += 1
        self.call_watchers()

    def call_watchers(self) -> None:
        """Call every watcher, after a change of the counters."""
        for watcher in self.watchers:
            watcher()


class Counters:
    """Counters of one tier. Every count is a number of texts."""

    def __init__(self) -> None:
        self.renew_locks()
        self._counts: Counter[str] = Counter()
        self._causes: Counter[str] = Counter()
        self._drops: Counter[str] = Counter()
        self._seconds = 0.0
        self._last_cause: str | None = None

    def renew_locks(self) -> None:
        """Create new locks. A forked child calls this too.

        The locks are re-entrant, because a signal handler may use the cache.
        """
        self._lock = threading.RLock()

    def count(self, *, seconds: float = 0.0, cause: str | None = None, **counts: int) -> None:
        with self._lock:
            for name, n in counts.items():
                if n:
                    self._counts[name] += n
            if cause is not None:
                if counts.get("errors"):
                    self._last_cause = cause
                for causes, name in ((self._causes, "errors"), (self._drops, "dropped")):
                    if counts.get(name):
                        causes[cause] += counts[name]
            self._seconds += seconds

    def count_read(self, misses: int, seconds: float) -> None:
        """Count a read without errors. This takes a third of the time of :meth:`count`."""
        with self._lock:
            if misses:
                self._counts["misses"] += misses
            self._seconds += seconds

    def stats(self, saved: Work, *, is_skipped: bool) -> TierStats:
        """Return the counters of the tier. ``saved`` is the work that its hits have saved, on the fast path too."""
        with self._lock:
            counts = Counter(self._counts)
            counts["hits"] = saved.texts
            names = ("hits", "misses", "errors", "corrupt", "skipped", "stored", "dropped")
            return TierStats(
                **{name: counts[name] for name in names},
                seconds=self._seconds,
                causes=dict(self._causes),
                drops=dict(self._drops),
                saved=saved,
                is_skipped=is_skipped,
                last_cause=self._last_cause,
            )
