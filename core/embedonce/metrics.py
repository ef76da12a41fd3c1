"""Prometheus metrics of caches.

A scrape reads the caches' counters, so the metrics take no extra time per text. If the variable
``PROMETHEUS_MULTIPROC_DIR`` is set, each process also copies its counters into a file, from which
``prometheus_client.multiprocess.MultiProcessCollector`` sums up the counters of all processes.

pip install 'embedonce[prometheus]'
"""

from __future__ import annotations

import logging
import os
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol
from weakref import WeakKeyDictionary

from .cache import Cache
from .errors import ConfigError
from .events import SpaceStats, Stats
from .vectors import NO_WORK, Work

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, values
    from prometheus_client.core import CounterMetricFamily
    from prometheus_client.multiprocess import MultiProcessCollector
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError("embedonce.metrics requires prometheus-client: pip install 'embedonce[prometheus]'") from error

if TYPE_CHECKING:
    from prometheus_client.core import Metric

log = logging.getLogger("embedonce")

_FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


@dataclass(frozen=True, slots=True)
class _Family:
    """A metric without its values. The full name is ``embed_cache_`` and ``name``."""

    name: str
    about: str
    labels: tuple[str, ...] = ()

    @property
    def full_name(self) -> str:
        return f"embed_cache_{self.name}"


_FAMILIES = (
    _Family("hits", "Texts found in a tier.", ("tier",)),
    _Family("corrupt", "Damaged or otherwise invalid entries found in a tier.", ("tier",)),
    _Family("skipped", "Texts that were not looked up in a tier, because its breaker was open.", ("tier",)),
    _Family("stored", "Entries written to a tier.", ("tier",)),
    _Family("errors", "Texts in failed calls to a tier, by cause.", ("tier", "cause")),
    _Family("dropped", "Entries that were not written to a tier, by cause.", ("tier", "cause")),
    _Family("tier_seconds", "Seconds spent in calls to a tier.", ("tier",)),
    _Family("misses", "Texts embedded by a provider."),
    _Family("imported", "Texts whose vector an importer had.", ("importer",)),
    _Family("importer_missing", "Texts that an importer did not have.", ("importer",)),
    _Family("importer_invalid", "Texts whose vector in a source is unreadable or invalid.", ("importer",)),
    _Family("importer_skipped", "Texts for which an importer was not asked.", ("importer",)),
    _Family("importer_errors", "Texts in failed calls to an importer, by cause.", ("importer", "cause")),
    _Family("importer_seconds", "Seconds spent in calls to an importer.", ("importer",)),
    _Family("shared", "Texts whose vector another call was already computing."),
    _Family("passed_by", "Calls of a wrapped client that did not use the cache."),
    _Family("provider_texts", "Texts embedded.", ("provider",)),
    _Family("provider_failed", "Texts that failed.", ("provider",)),
    _Family("provider_tokens", "Tokens charged.", ("provider",)),
    _Family("provider_seconds", "Seconds spent in calls to the provider.", ("provider",)),
    _Family("computed_texts", "Texts embedded, by model.", ("provider", "model")),
    _Family("computed_tokens", "Tokens charged for embedded texts.", ("provider", "model")),
    _Family("computed_seconds", "Seconds of calls to the provider.", ("provider", "model")),
    _Family("computed_money", "Price of the computed tokens.", ("provider", "model", "currency")),
    _Family("saved_texts", "Texts found in a tier, by model.", ("tier", "model")),
    _Family("saved_tokens", "Tokens that hits have saved.", ("tier", "model")),
    _Family("saved_seconds", "Seconds of calls to the provider that hits have saved.", ("tier", "model")),
    _Family("saved_money", "Price of the saved tokens.", ("tier", "model", "currency")),
    _Family("saved_unknown_tokens", "Hits whose tokens are unknown; saved_tokens lacks them.", ("tier", "model")),
)

_Sample = tuple[str, tuple[str, ...]]
"""The name of a family, and the values of its labels."""


class HasStats(Protocol):
    """A cache, or another object with the counters of caches."""

    def stats(self) -> Stats: ...


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
    ``embed_cache_imported_total``         ``importer``        texts whose vector an importer had
    ``embed_cache_importer_missing_total`` ``importer``        texts that an importer did not have
    ``embed_cache_importer_invalid_total`` ``importer``        texts whose vector is unreadable or invalid
    ``embed_cache_importer_skipped_total`` ``importer``        texts for which an importer was not asked
    ``embed_cache_importer_errors_total``  ``importer``,       texts in failed calls
                                           ``cause``
    ``embed_cache_importer_seconds_total`` ``importer``        seconds spent in calls to an importer
    ``embed_cache_shared_total``                               texts whose vector another call was computing
    ``embed_cache_passed_by_total``                            calls of a wrapped client that did not use the cache
    ``embed_cache_provider_texts_total``   ``provider``        texts embedded
    ``embed_cache_provider_failed_total``  ``provider``        texts that failed
    ``embed_cache_provider_tokens_total``  ``provider``        tokens charged
    ``embed_cache_provider_seconds_total`` ``provider``        seconds spent in calls to the provider
    =====================================  ==================  =========================================

    These metrics show the work that was computed and saved. They are added up over the vector spaces of a model.

    ============================================  ==============================  ==============================
    ``embed_cache_computed_texts_total``          ``provider``, ``model``         texts embedded
    ``embed_cache_computed_tokens_total``         ``provider``, ``model``         tokens charged
    ``embed_cache_computed_seconds_total``        ``provider``, ``model``         seconds of calls to the provider
    ``embed_cache_computed_money_total``          also ``currency``               price of the computed tokens
    ``embed_cache_saved_texts_total``             ``tier``, ``model``             texts found
    ``embed_cache_saved_tokens_total``            ``tier``, ``model``             tokens that hits have saved
    ``embed_cache_saved_seconds_total``           ``tier``, ``model``             seconds that hits have saved
    ``embed_cache_saved_money_total``             also ``currency``               price of the saved tokens
    ``embed_cache_saved_unknown_tokens_total``    ``tier``, ``model``             hits whose tokens are unknown
    ============================================  ==============================  ==============================
    """

    def __init__(self, *caches: HasStats) -> None:
        self._caches = caches

    def collect(self) -> Iterator[Metric]:
        """Yield the counters as they are now, of this process alone."""
        sums: defaultdict[_Sample, float] = defaultdict(float)
        for cache in self._caches:
            for sample, value in _list_samples(cache.stats()):
                sums[sample] += value
        for family in _FAMILIES:
            metric = CounterMetricFamily(family.full_name, family.about, labels=family.labels)
            for (name, labels), value in sums.items():
                if name == family.name:
                    metric.add_metric(labels, value)
            yield metric


def register(*caches: Cache, registry: CollectorRegistry = REGISTRY) -> CacheCollector:
    """Add the caches' counters to a registry (default: the one that ``start_http_server`` serves).

    If ``PROMETHEUS_MULTIPROC_DIR`` was set when ``prometheus_client`` was imported, the counters are also copied into
    the files of that folder. The registry then has the counters of this process. A registry with a
    ``MultiProcessCollector`` has the counters of all processes already, so nothing is added to it.

    Raises:
        ConfigError: ``PROMETHEUS_MULTIPROC_DIR`` is not an existing folder.
    """
    collector = CacheCollector(*caches)
    if not _is_multiprocess():
        registry.register(collector)
        return collector
    folder = os.environ.get(_FOLDER_VARIABLE) or os.environ.get(_FOLDER_VARIABLE.lower(), "")
    if not os.path.isdir(folder):
        raise ConfigError(f"{_FOLDER_VARIABLE} must name an existing folder; create it before the first process starts")
    if not _has_all_processes(registry):
        registry.register(collector)
    for cache in caches:
        _copier.add(cache)
    return collector


def _is_multiprocess() -> bool:
    """Return whether ``prometheus_client`` keeps values in files. It decides this when it is imported."""
    return values.ValueClass is not values.MutexValue


def _has_all_processes(registry: CollectorRegistry) -> bool:
    collectors = list(getattr(registry, "_collector_to_names", ()))  # prometheus_client has no public name for this
    return any(isinstance(collector, MultiProcessCollector) for collector in collectors)


class _Copier:
    """Copies the counters of caches into counters of ``prometheus_client``, which keeps them in files.

    Each process has one copier, because two counters with the same name would overwrite each other's values in the
    file. The copier adds differences, so a forked child, whose file is empty, counts only what the child does.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # re-entrant, because a signal handler may use the cache
        self._is_copying = False
        self._has_failed = False
        self._counters: dict[str, Counter] = {}
        self._labelled: dict[_Sample, Counter] = {}
        self._copied: WeakKeyDictionary[Cache, dict[_Sample, float]] = WeakKeyDictionary()
        """For each cache, the values that have been copied."""
        # No other thread may hold a lock of ours or of prometheus_client while the process forks, because nobody would
        # release the lock in the child.
        if hasattr(os, "register_at_fork"):
            release = self._lock.release
            os.register_at_fork(before=self._lock.acquire, after_in_parent=release, after_in_child=release)

    def add(self, cache: Cache) -> None:
        """Copy the counters of a cache now and after each change. A cache that was added before is not added again."""
        with self._lock:
            if cache in self._copied:
                return
            for family in _FAMILIES:
                if family.name not in self._counters:
                    self._counters[family.name] = Counter(family.full_name, family.about, family.labels, registry=None)
            self._copied[cache] = {}
        self._copy(cache)
        cache._watch_counters(partial(self._copy, cache))

    def _copy(self, cache: Cache) -> None:
        with self._lock:
            if self._is_copying:  # a signal handler has interrupted this method; the next change copies its counts
                return
            self._is_copying = True
            try:
                self._add_differences(cache.stats(), self._copied[cache])
            except Exception as error:  # noqa: BLE001  (a full disk must not make the call fail)
                if not self._has_failed:
                    self._has_failed = True
                    log.warning("metrics cannot be written to the folder in %s (%s)", _FOLDER_VARIABLE, error)
            finally:
                self._is_copying = False

    def _add_differences(self, stats: Stats, copied: dict[_Sample, float]) -> None:
        for sample, value in _list_samples(stats):
            difference = value - copied.get(sample, 0.0)
            if difference > 0 or sample not in copied:
                copied[sample] = value  # before the counter changes, so that no difference is ever added twice
                self._find_counter(sample).inc(max(difference, 0.0))

    def _find_counter(self, sample: _Sample) -> Counter:
        """Return the counter with the labels of a sample. Keeping it takes less time than asking for it again."""
        counter = self._labelled.get(sample)
        if counter is None:
            name, labels = sample
            counter = self._counters[name]
            self._labelled[sample] = counter = counter.labels(*labels) if labels else counter
        return counter


_copier = _Copier()


def _list_samples(stats: Stats) -> Iterator[tuple[_Sample, float]]:
    """Yield each counter's family and labels, with its value."""
    for name, tier in stats.tiers.items():
        for count in ("hits", "corrupt", "skipped", "stored"):
            yield (count, (name,)), getattr(tier, count)
        for family, causes in (("errors", tier.causes), ("dropped", tier.drops)):
            yield from _list_causes(family, name, causes)
        yield ("tier_seconds", (name,)), tier.seconds
    yield ("misses", ()), sum(provider.texts for provider in stats.providers.values())
    for name, importer in stats.importers.items():
        yield ("imported", (name,)), importer.imported
        for count in ("missing", "invalid", "skipped", "seconds"):
            yield (f"importer_{count}", (name,)), getattr(importer, count)
        yield from _list_causes("importer_errors", name, importer.causes)
    yield ("shared", ()), stats.shared
    yield ("passed_by", ()), stats.passed_by
    for name, provider in stats.providers.items():
        for count in ("texts", "failed", "tokens", "seconds"):
            yield (f"provider_{count}", (name,)), getattr(provider, count)
    yield from _list_work(stats).items()


def _list_work(stats: Stats) -> dict[_Sample, float]:
    """Return the work that was computed and saved, added up over the spaces of each model."""
    sums: defaultdict[_Sample, float] = defaultdict(float)

    def add(kind: str, source: str, space: SpaceStats, work: Work) -> None:
        labels = (source, str(space.card.get("model") or ""))
        for part in ("texts", "tokens", "seconds"):
            sums[f"{kind}_{part}", labels] += getattr(work, part)
        if kind == "saved":
            sums["saved_unknown_tokens", labels] += work.unknown_tokens
        if space.price is not None:
            sums[f"{kind}_money", (*labels, space.price.currency)] += float(space.price.of(work.tokens))

    for space in (part for whole in stats.spaces.values() for part in whole.split_prices()):
        if space.computed != NO_WORK:
            add("computed", str(space.card.get("provider") or ""), space, space.computed)
        for tier, work in space.saved.items():
            add("saved", tier, space, work)
    return dict(sums)


def _list_causes(family: str, name: str, causes: Mapping[str, int]) -> Iterator[tuple[_Sample, float]]:
    for cause, count in causes.items():
        yield (family, (name, cause)), count
