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
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.utils import floatToGoString

from embedonce import __version__
from embedonce.config import Tenant
from embedonce.events import Stats
from embedonce.metrics import CacheCollector
from embedonce.prices import Price

from .budget_file import Usage
from .budgets import BudgetsUnavailable

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from .embedding import Embeddings
    from .models import Model
    from .service import Service
    from .siblings import SiblingAnswer

log = logging.getLogger("embedonce.serve")

COPY_SECONDS: Final = 1.0
"""Seconds between two copies of a worker's counters."""

BUCKETS: Final = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
"""Upper bounds of the buckets of durations, in seconds."""

NO_TENANT: Final = ""
NO_MODEL: Final = ""

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
    _Family("computed_tokens", "Tokens charged for computed inputs.", ("tenant", "model")),
    _Family("saved_tokens", "Tokens that hits have saved.", ("tenant", "model")),
    _Family("computed_money", "Price of the computed tokens.", ("tenant", "model", "currency")),
    _Family("saved_money", "Price of the saved tokens.", ("tenant", "model", "currency")),
    _Family("changed", "Inputs whose stored vector was not the one computed anew (no-cache).", ("model",)),
    _Family("refused", "Requests refused by a limit of the tenant.", ("tenant", "reason")),
)

_Sample = tuple[str, tuple[str, ...]]
"""The name of a family, and the values of its labels."""


class _Latency:
    """The durations of the requests to one endpoint with one class of statuses."""

    __slots__ = ("buckets", "seconds")

    def __init__(self) -> None:
        self.seconds = 0.0
        self.buckets = [0] * (len(BUCKETS) + 1)

    def count(self, seconds: float) -> None:
        self.seconds += seconds
        self.buckets[bisect_left(BUCKETS, seconds)] += 1


class _Work:
    """What a tenant's requests to a model took and saved, at one price."""

    __slots__ = ("computed", "computed_tokens", "hits", "price", "saved_tokens")

    def __init__(self, price: Price | None) -> None:
        self.price = price
        self.hits: dict[str, int] = {}
        """Number of inputs by tier."""
        self.computed = 0
        self.computed_tokens = 0
        self.saved_tokens = 0


class _Requests:
    """The requests of one tenant for one model that were answered with one status."""

    __slots__ = ("count", "latency", "work")

    def __init__(self, latency: _Latency) -> None:
        self.count = 0
        self.latency = latency
        self.work: _Work | None = None


class _Counters:
    """The numbers of one worker."""

    def __init__(self) -> None:
        self._requests: dict[tuple[str, str, int], _Requests] = {}
        self._latencies: dict[tuple[str, str], _Latency] = {}
        self._work: dict[tuple[str, str, Price | None], _Work] = {}
        self._changed: dict[str, int] = {}
        self._refused: dict[tuple[str, str], int] = {}

    def find_requests(self, tenant: str, model: str, status: int) -> _Requests:
        requests = self._requests.get((tenant, model, status))
        if requests is None:
            requests = _Requests(self.find_latency("/v1/embeddings", status))
            self._requests[tenant, model, status] = requests
        return requests

    def find_latency(self, endpoint: str, status: int) -> _Latency:
        return self._latencies.setdefault((endpoint, f"{status // 100}xx"), _Latency())

    def find_work(self, tenant: str, model: str, price: Price | None) -> _Work:
        work = self._work.get((tenant, model, price))
        if work is None:
            work = self._work[tenant, model, price] = _Work(price)
        return work

    def add_changed(self, model: str, inputs: int) -> None:
        self._changed[model] = self._changed.get(model, 0) + inputs

    def add_refused(self, tenant: str, reason: str) -> None:
        self._refused[tenant, reason] = self._refused.get((tenant, reason), 0) + 1

    def list_samples(self) -> Iterator[tuple[_Sample, float]]:
        """Yield the value of each counter. Values of the same counter at different prices are added up."""
        for (tenant, model, status), requests in self._requests.items():
            yield ("requests", (tenant, model, str(status))), requests.count
        sums: dict[_Sample, float] = {}

        def add(name: str, labels: tuple[str, ...], value: float) -> None:
            sums[name, labels] = sums.get((name, labels), 0.0) + value

        for (tenant, model, price), work in self._work.items():
            for tier, hits in work.hits.items():
                add("hits", (tier, tenant, model), hits)
            for name in ("computed", "computed_tokens", "saved_tokens"):
                add(name, (tenant, model), getattr(work, name))
            if price is not None:
                add("computed_money", (tenant, model, price.currency), float(price.of(work.computed_tokens)))
                add("saved_money", (tenant, model, price.currency), float(price.of(work.saved_tokens)))
        for model, inputs in self._changed.items():
            add("changed", (model,), inputs)
        for (tenant, reason), number in self._refused.items():
            add("refused", (tenant, reason), number)
        yield from sums.items()

    def list_latencies(self) -> Iterator[tuple[tuple[str, ...], _Latency]]:
        """Yield the values of the labels ``endpoint`` and ``status``, and the durations."""
        yield from self._latencies.items()


class Metrics:
    """Counts the requests of one worker, and shows what all workers of the host have counted."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._counters = _Counters()
        self._caches = CacheCollector(self)
        folder = service.run.metrics
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A worker that is started again gets files of its own, so that the counts of its predecessor stay.
        name = f"{service.worker}-{secrets.token_hex(4)}"
        self._counts = MmapedDict(str(folder / f"counter_{name}.db"))
        self._durations = MmapedDict(str(folder / f"histogram_{name}.db"))
        self._keys: dict[_Sample, str] = {}
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

    # --- counting -----------------------------------------------------------------------------

    def count_embeddings(
        self, tenant: Tenant | None, found: Embeddings | None, status: int, seconds: float, model: str = NO_MODEL
    ) -> None:
        """Count a request for vectors. ``model`` is the name of the model if there is no answer of it."""
        owner = NO_TENANT if tenant is None else tenant.name
        if found is None:
            requests = self._counters.find_requests(owner, model, status)
            requests.count += 1
            requests.latency.count(seconds)
            return
        of_model = found.model
        requests = self._counters.find_requests(owner, of_model.name, status)
        requests.count += 1
        requests.latency.count(seconds)
        fetched = found.fetched
        price = _choose_price(of_model, found) if of_model.has_fallback else of_model.price
        work = requests.work
        if work is None or work.price is not price:
            work = requests.work = self._counters.find_work(owner, of_model.name, price)
        hits = work.hits
        for tier, inputs in found.tiers.items():
            hits[tier] = hits.get(tier, 0) + inputs
        work.saved_tokens += fetched.saved.tokens
        computed = len(fetched.sources) - found.hits
        if computed:
            work.computed += computed
            work.computed_tokens += fetched.computed.tokens
            if fetched.changed:
                self._counters.add_changed(of_model.name, len(fetched.changed))

    def count_refused(self, tenant: Tenant, reason: str) -> None:
        """Count a request that a limit of the tenant has refused: ``"rate"`` or ``"budget"``."""
        self._counters.add_refused(tenant.name, reason)

    def count_other(self, endpoint: str, status: int, seconds: float) -> None:
        """Count a request to another endpoint. ``endpoint`` is one of few names, never a path that a client chose."""
        self._counters.find_latency(endpoint, status).count(seconds)

    def stats(self) -> Stats:
        """Return the counters of all caches of this worker."""
        service = self._service
        return replace(service.base.stats(), providers=service.providers.read(service.list_caches()))

    # --- copying and showing ------------------------------------------------------------------

    def copy(self) -> None:
        """Write the counters to this worker's files. A failure is logged once, and does not disturb requests."""
        if not self._is_open:
            return
        try:
            for (name, labels), value in self._counters.list_samples():
                family = _BY_NAME[name]
                full = f"embed_serve_{name}"
                self._write(self._counts, full, f"{full}_total", family.labels, labels, family.about, value)
            names: tuple[str, ...] = ("endpoint", "status")
            for labels, latency in self._counters.list_latencies():
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
                log.warning("metrics cannot be written (%s)", type(error).__name__)

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

    def read_gauges(self) -> dict[str, float]:
        """Return what this worker is doing now, without the request that asks for it."""
        service = self._service
        return {"requests_in_progress": max(service.count_active() - 1, 0), "body_bytes": service.body_bytes}

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
        registry.register(_Now(service.worker, self.read_gauges(), answers, usage))
        MultiProcessCollector(registry, path=str(service.run.metrics))
        return await asyncio.to_thread(generate_latest, registry)


_BY_NAME: Final = {family.name: family for family in _FAMILIES}


def _choose_price(model: Model, found: Embeddings) -> Price | None:
    """Return the price of the provider that has answered: the model's own provider, or the fallback."""
    space = found.fetched.space
    return model.price if (space.provider, space.model) == model.own_space else model.fallback_price


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
