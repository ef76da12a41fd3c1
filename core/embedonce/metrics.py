"""Prometheus metrics of caches. A scrape reads the caches' counters, so the metrics take no extra time per text.

pip install 'embedonce[prometheus]'
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .cache import Cache
from .events import Stats

try:
    from prometheus_client import REGISTRY, CollectorRegistry
    from prometheus_client.core import CounterMetricFamily
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError("embedonce.metrics requires prometheus-client: pip install 'embedonce[prometheus]'") from error

if TYPE_CHECKING:
    from prometheus_client.core import Metric

_TIER_COUNTERS = {
    "hits": "Texts found in a tier.",
    "corrupt": "Damaged or otherwise invalid entries found in a tier.",
    "skipped": "Texts that were not looked up in a tier, because its breaker was open.",
    "stored": "Entries written to a tier.",
}


class CacheCollector(Collector):
    """Collects the counters of one or more caches. Counters of tiers with the same name are added up.

    =====================================  ==================  =========================================
    ``embed_cache_hits_total``             ``tier``            texts found
    ``embed_cache_misses_total``                               texts embedded by a provider
    ``embed_cache_errors_total``           ``tier``, ``cause`` texts in failed calls
    ``embed_cache_corrupt_total``          ``tier``            damaged or otherwise invalid entries
    ``embed_cache_skipped_total``          ``tier``            texts not looked up, because the breaker was open
    ``embed_cache_stored_total``           ``tier``            entries written
    ``embed_cache_dropped_total``          ``tier``, ``cause`` entries not written
    ``embed_cache_tier_seconds_total``     ``tier``            seconds spent in calls to the tier
    ``embed_cache_shared_total``                               texts whose vector another call was computing
    ``embed_cache_passed_by_total``                            calls of a wrapped client that did not use the cache
    ``embed_cache_provider_texts_total``   ``provider``        texts embedded
    ``embed_cache_provider_failed_total``  ``provider``        texts that failed
    ``embed_cache_provider_tokens_total``  ``provider``        tokens charged
    ``embed_cache_provider_seconds_total`` ``provider``        seconds spent in calls to the provider
    =====================================  ==================  =========================================
    """

    def __init__(self, *caches: Cache) -> None:
        self._caches = caches

    def collect(self) -> Iterator[Metric]:
        """Yield the counters as they are now."""
        stats = [cache.stats() for cache in self._caches]
        for count, about in _TIER_COUNTERS.items():
            samples = [((name,), getattr(tier, count)) for s in stats for name, tier in s.tiers.items()]
            yield _sum_samples(count, about, ["tier"], samples)
        yield _sum_samples(
            "errors",
            "Texts in failed calls to a tier, by cause.",
            ["tier", "cause"],
            [((name, cause), n) for s in stats for name, tier in s.tiers.items() for cause, n in tier.causes.items()],
        )
        yield _sum_samples(
            "dropped",
            "Entries that were not written to a tier, by cause.",
            ["tier", "cause"],
            [((name, cause), n) for s in stats for name, tier in s.tiers.items() for cause, n in tier.drops.items()],
        )
        yield _sum_samples(
            "tier_seconds",
            "Seconds spent in calls to a tier.",
            ["tier"],
            [((name,), tier.seconds) for s in stats for name, tier in s.tiers.items()],
        )
        yield _sum_samples("misses", "Texts embedded by a provider.", [], [((), _count_computed(s)) for s in stats])
        yield _sum_samples(
            "shared", "Texts whose vector another call was already computing.", [], [((), s.shared) for s in stats]
        )
        yield _sum_samples(
            "passed_by", "Calls of a wrapped client that did not use the cache.", [], [((), s.passed_by) for s in stats]
        )
        for count, about in {
            "texts": "Texts embedded.",
            "failed": "Texts that failed.",
            "tokens": "Tokens charged.",
            "seconds": "Seconds spent in calls to the provider.",
        }.items():
            yield _sum_samples(
                f"provider_{count}",
                about,
                ["provider"],
                [((name,), getattr(p, count)) for s in stats for name, p in s.providers.items()],
            )


def register(*caches: Cache, registry: CollectorRegistry = REGISTRY) -> CacheCollector:
    """Add the caches' counters to a registry (default: the one that ``start_http_server`` serves)."""
    collector = CacheCollector(*caches)
    registry.register(collector)
    return collector


def _count_computed(stats: Stats) -> int:
    return sum(provider.texts for provider in stats.providers.values())


def _sum_samples(
    name: str, about: str, labels: Sequence[str], samples: Sequence[tuple[tuple[str, ...], float]]
) -> CounterMetricFamily:
    family = CounterMetricFamily(f"embed_cache_{name}", about, labels=labels)
    sums: dict[tuple[str, ...], float] = {}
    for key, value in samples:
        sums[key] = sums.get(key, 0) + value
    for key, value in sums.items():
        family.add_metric(key, value)
    return family
