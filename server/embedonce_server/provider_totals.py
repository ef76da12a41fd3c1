"""The counters of all providers that a worker has had, including those that were closed."""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakKeyDictionary

from embedonce import Cache
from embedonce.events import ProviderStats

_NOTHING = ProviderStats(texts=0, failed=0, tokens=0, seconds=0.0)


class ProviderTotals:
    """Adds up the counters of providers by name.

    Several models may use providers of the same name, and a reload closes providers. The sums never decrease, as
    metrics require.
    """

    def __init__(self) -> None:
        self._sums: dict[str, ProviderStats] = {}
        self._counted: WeakKeyDictionary[Cache, dict[str, ProviderStats]] = WeakKeyDictionary()
        """For each cache, the counters that are part of the sums."""

    def count(self, cache: Cache) -> None:
        """Add what the providers of a cache have counted since the last call. Call this before a cache is closed."""
        before = self._counted.get(cache, {})
        now = self._counted[cache] = cache.provider_stats()
        for name, stats in now.items():
            earlier = before.get(name, _NOTHING)
            total = self._sums.get(name, _NOTHING)
            self._sums[name] = ProviderStats(
                texts=total.texts + stats.texts - earlier.texts,
                failed=total.failed + stats.failed - earlier.failed,
                tokens=total.tokens + stats.tokens - earlier.tokens,
                seconds=total.seconds + stats.seconds - earlier.seconds,
            )

    def read(self, caches: Iterable[Cache]) -> dict[str, ProviderStats]:
        """Return the sums by the providers' names, with the last error of the caches that are open."""
        errors: dict[str, str] = {}
        for cache in caches:
            self.count(cache)
            for name, stats in self._counted[cache].items():
                if stats.last_error is not None:
                    errors[name] = stats.last_error
        return {
            name: ProviderStats(
                texts=total.texts,
                failed=total.failed,
                tokens=total.tokens,
                seconds=total.seconds,
                last_error=errors.get(name),
            )
            for name, total in self._sums.items()
        }
