"""Metrics of all workers of a host.

Counting is on the path of each hit, so a worker adds to plain numbers. :meth:`Metrics.copy` writes them, and the
counters of the caches, to files of the worker in ``prometheus_client``'s multiprocess format. A scrape asks every other
worker to do that first. So it shows each request that was answered before, whichever worker answers the scrape. Each
worker also copies once per second, so a worker that is killed loses at most the counts of one second.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.utils import floatToGoString

from embedonce import __version__
from embedonce.metrics import CacheCollector
from embedonce_server.counters import BUCKETS, Sample
from embedonce_server.service import Service
from embedonce_server.siblings import SiblingAnswer
from embedonce_server.tenants.budget_file import Usage
from embedonce_server.tenants.budgets import BudgetsUnavailable

if TYPE_CHECKING:
    from prometheus_client.core import Metric


log = logging.getLogger("embedonce.serve")

COPY_SECONDS: Final = 1.0
"""Seconds between two copies of a worker's counters."""

_LATENCY: Final = "embed_serve_request_seconds"
_ABOUT: Final = "Seconds from the request to the answer."
_BOUNDS: Final = tuple(map(floatToGoString, (*BUCKETS, float("inf"))))


class _Family(NamedTuple):
    name: str
    about: str
    labels: tuple[str, ...]


_FAMILIES: Final = (
    _Family("requests", "Requests for vectors.", ("tenant", "model", "status")),
    _Family("hits", "Inputs that a tier had.", ("tier", "tenant", "model")),
    _Family("computed", "Inputs that no tier had.", ("tenant", "model")),
    _Family("computed_tokens", "Tokens that the endpoint has charged.", ("tenant", "model")),
    _Family("saved_tokens", "Tokens that hits have saved.", ("tenant", "model")),
    _Family("computed_money", "Price of the computed tokens.", ("tenant", "model", "currency")),
    _Family("saved_money", "Price of the saved tokens.", ("tenant", "model", "currency")),
    _Family("changed", "Inputs whose stored vector was not the one computed anew (no-cache).", ("model",)),
    _Family("refused", "Requests refused by a limit of the tenant.", ("tenant", "reason")),
)

_BY_NAME: Final = {family.name: family for family in _FAMILIES}


class Metrics:
    """Counts the requests of one worker, and shows what all workers of the host have counted."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._caches = CacheCollector(service)
        folder = service.run.metrics
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A worker that is started again gets files of its own, so that the counts of its predecessor stay.
        name = f"{service.worker}-{secrets.token_hex(4)}"
        self._counts = MmapedDict(str(folder / f"counter_{name}.db"))
        self._durations = MmapedDict(str(folder / f"histogram_{name}.db"))
        self._keys: dict[Sample, str] = {}
        """For each sample, its key in a file."""
        self._is_open = True
        self._has_failed = False
        self._copying: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Copy the counters once per second from now on. Call this in a running event loop."""
        if self._copying is None:
            self._copying = asyncio.get_running_loop().create_task(self._copy_again_and_again())

    async def _copy_again_and_again(self) -> None:
        while True:
            await asyncio.sleep(COPY_SECONDS)
            self.copy()

    def close(self) -> None:
        """Copy the counters for the last time. Their values stay part of the metrics of the host."""
        if self._copying is not None:
            self._copying.cancel()
            self._copying = None
        if self._is_open:
            self.copy()
            self._is_open = False
            self._counts.close()
            self._durations.close()

    # --- copying and showing ------------------------------------------------------------------

    def copy(self) -> None:
        """Write the counters to this worker's files. A failure is logged once, and does not disturb requests."""
        if not self._is_open:
            return
        service = self._service
        try:
            for (name, labels), value in service.counters.list_samples():
                family = _BY_NAME[name]
                full = f"embed_serve_{name}"
                self._write(self._counts, full, f"{full}_total", family.labels, labels, family.about, value)
            names: tuple[str, ...] = ("endpoint", "status")
            for labels, latency in service.counters.list_latencies():
                self._write(self._durations, _LATENCY, f"{_LATENCY}_sum", names, labels, _ABOUT, latency.seconds)
                for bound, count in zip(_BOUNDS, latency.buckets, strict=True):
                    bucket = (*labels, bound)
                    self._write(self._durations, _LATENCY, f"{_LATENCY}_bucket", (*names, "le"), bucket, _ABOUT, count)
            for metric in self._caches.collect():
                for sample in metric.samples:
                    names, labels = tuple(sample.labels), tuple(sample.labels.values())
                    self._write(
                        self._counts, metric.name, sample.name, names, labels, metric.documentation, sample.value
                    )
        except Exception as error:  # noqa: BLE001  (a full disk must not make requests fail)
            if not self._has_failed:
                self._has_failed = True
                log.warning(
                    "metrics cannot be written to the folder %s (%s), so /metrics is incomplete; check its free space",
                    service.run.metrics,
                    type(error).__name__,
                )

    def _write(
        self,
        file: MmapedDict,
        metric: str,
        name: str,
        labels: tuple[str, ...],
        values: tuple[str, ...],
        about: str,
        value: float,
    ) -> None:
        key = self._keys.get((name, values))
        if key is None:
            key = self._keys[name, values] = mmap_key(metric, name, list(labels), list(values), about)
        file.write_value(key, float(value), 0.0)

    async def show(self) -> bytes:
        """Return the metrics of all workers in the text format of Prometheus."""
        service = self._service
        self.copy()
        answers = await service.siblings.call("POST", "/siblings/metrics", timeout=1.0)
        try:
            usage = await service.budgets.read_usage(service.generation.settings.tenants)
        except BudgetsUnavailable:  # the budgets' own log line says why
            usage = {}
        registry = CollectorRegistry()
        registry.register(_Now(service.worker, service.read_gauges(), answers, usage))
        MultiProcessCollector(registry, path=str(service.run.metrics))
        return await asyncio.to_thread(generate_latest, registry)


class _Now(Collector):
    """What the workers are doing now, and the tenants' budgets."""

    def __init__(
        self,
        worker: int,
        gauges: Mapping[str, float],
        answers: Sequence[SiblingAnswer],
        usage: Mapping[str, Usage],
    ) -> None:
        self._gauges: dict[int, Mapping[str, float] | None] = {worker: gauges}
        for answer in answers:
            self._gauges[answer.worker] = answer.body if answer.error is None else None
        self._usage = usage

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily("embed_serve", "The version of the server.", {"version": __version__})
        up = GaugeMetricFamily(
            "embed_serve_worker_up",
            "1 if the worker has answered. If it is 0, its last second may be missing in the other metrics.",
            labels=["worker"],
        )
        busy = GaugeMetricFamily("embed_serve_requests_in_progress", "Requests under way.", labels=["worker"])
        bodies = GaugeMetricFamily("embed_serve_body_bytes", "Bytes of request bodies in memory.", labels=["worker"])
        for worker, gauges in sorted(self._gauges.items()):
            labels = [str(worker)]
            up.add_metric(labels, float(gauges is not None))
            if gauges is not None:
                busy.add_metric(labels, gauges["requests_in_progress"])
                bodies.add_metric(labels, gauges["body_bytes"])
        yield from (up, busy, bodies)
        limit = GaugeMetricFamily("embed_serve_budget_tokens", "Tokens per day of a tenant.", labels=["tenant"])
        used = GaugeMetricFamily("embed_serve_budget_used_tokens", "Tokens used on this day (UTC).", labels=["tenant"])
        held = GaugeMetricFamily(
            "embed_serve_budget_reserved_tokens", "Estimated tokens of the calls under way.", labels=["tenant"]
        )
        for tenant, usage in self._usage.items():
            limit.add_metric([tenant], usage.limit)
            used.add_metric([tenant], usage.used)
            held.add_metric([tenant], usage.reserved)
        yield from (limit, used, held)
