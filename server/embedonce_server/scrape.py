"""``GET /metrics``: what all workers of the host have counted and are doing now."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector, CollectorRegistry

from embedonce import __version__

from .budget_file import Usage
from .budgets import BudgetsUnavailable
from .service import Service
from .siblings import PREFIX, SiblingAnswer

COPY_TIMEOUT = 1.0
"""Seconds that another worker gets to copy its counters."""


async def show_metrics(service: Service) -> bytes:
    """Return the metrics of all workers in the text format of Prometheus."""
    service.metrics.copy()
    answers = await service.siblings.call("POST", f"{PREFIX}metrics", timeout=COPY_TIMEOUT)
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
