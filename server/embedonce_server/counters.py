"""What one worker counts about requests: their number, how long they took, what they found and what they cost."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import Final

from embedonce.config import Tenant
from embedonce.prices import Price

from .answered import Embeddings
from .api.api_errors import ApiError

BUCKETS: Final = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
"""Upper bounds of the buckets of durations, in seconds."""

NO_TENANT: Final = ""

Sample = tuple[str, tuple[str, ...]]
"""The name of a family, and the values of its labels."""


class Latency:
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

    __slots__ = ("charged_tokens", "computed", "hits", "price", "saved_tokens")

    def __init__(self, price: Price | None) -> None:
        self.price = price
        self.hits: dict[str, int] = {}
        """Number of inputs by tier."""
        self.computed = 0
        self.charged_tokens = 0
        self.saved_tokens = 0


class _Requests:
    """The requests of one tenant for one model that were answered with one status."""

    __slots__ = ("count", "latency", "work")

    def __init__(self, latency: Latency) -> None:
        self.count = 0
        self.latency = latency
        self.work: _Work | None = None


class Counters:
    """The numbers of the requests of one worker. Counting is on the path of each hit, so these are plain numbers."""

    def __init__(self) -> None:
        self._requests: dict[tuple[str, str, int], _Requests] = {}
        self._latencies: dict[tuple[str, str], Latency] = {}
        self._work: dict[tuple[str, str, Price | None], _Work] = {}
        self._changed: dict[str, int] = {}
        self._refused: dict[tuple[str, str], int] = {}

    def _find_requests(self, tenant: str, model: str, status: int) -> _Requests:
        requests = self._requests.get((tenant, model, status))
        if requests is None:
            requests = _Requests(self._find_latency("/v1/embeddings", status))
            self._requests[tenant, model, status] = requests
        return requests

    def _find_latency(self, endpoint: str, status: int) -> Latency:
        return self._latencies.setdefault((endpoint, f"{status // 100}xx"), Latency())

    def _find_work(self, tenant: str, model: str, price: Price | None) -> _Work:
        work = self._work.get((tenant, model, price))
        if work is None:
            work = self._work[tenant, model, price] = _Work(price)
        return work

    def _add_changed(self, model: str, inputs: int) -> None:
        self._changed[model] = self._changed.get(model, 0) + inputs

    def _add_refused(self, tenant: str, reason: str) -> None:
        self._refused[tenant, reason] = self._refused.get((tenant, reason), 0) + 1

    def count_embeddings(self, tenant: Tenant | None, outcome: Embeddings | ApiError, seconds: float) -> None:
        """Count a request for vectors."""
        owner = NO_TENANT if tenant is None else tenant.name
        if isinstance(outcome, ApiError):
            requests = self._find_requests(owner, outcome.model, outcome.status)
            requests.count += 1
            requests.latency.count(seconds)
            return
        found = outcome
        name, price = found.model.name, found.price
        requests = self._requests.get((owner, name, 200)) or self._find_requests(owner, name, 200)
        requests.count += 1
        requests.latency.count(seconds)
        work = requests.work
        if work is None or work.price is not price:
            work = requests.work = self._find_work(owner, name, price)
        hits = work.hits
        for tier, inputs in found.tiers.items():
            hits[tier] = hits.get(tier, 0) + inputs
        work.saved_tokens += found.saved_tokens
        if found.hits < found.inputs:
            work.computed += found.inputs - found.hits
            work.charged_tokens += found.charged_tokens
            if found.changed:
                self._add_changed(name, found.changed)

    def count_charged(self, tenant: Tenant | None, model: str, price: Price | None, tokens: int) -> None:
        """Count the tokens of a request that has failed after a part of it was computed."""
        if tokens:
            self._find_work(NO_TENANT if tenant is None else tenant.name, model, price).charged_tokens += tokens

    def count_refused(self, tenant: Tenant, reason: str) -> None:
        """Count a request that a limit of the tenant has refused: ``"rate"`` or ``"budget"``."""
        self._add_refused(tenant.name, reason)

    def count_other(self, endpoint: str, status: int, seconds: float) -> None:
        """Count a request to another endpoint. ``endpoint`` is one of few names, never a path that a client chose."""
        self._find_latency(endpoint, status).count(seconds)

    def list_samples(self) -> Iterator[tuple[Sample, float]]:
        """Yield the value of each counter. Values of the same counter at different prices are added up."""
        for (tenant, model, status), requests in self._requests.items():
            yield ("requests", (tenant, model, str(status))), requests.count
        sums: dict[Sample, float] = {}

        def add(name: str, labels: tuple[str, ...], value: float) -> None:
            sums[name, labels] = sums.get((name, labels), 0.0) + value

        for (tenant, model, price), work in self._work.items():
            for tier, hits in work.hits.items():
                add("hits", (tier, tenant, model), hits)
            add("computed", (tenant, model), work.computed)
            add("computed_tokens", (tenant, model), work.charged_tokens)
            add("saved_tokens", (tenant, model), work.saved_tokens)
            if price is not None:
                add("computed_money", (tenant, model, price.currency), float(price.of(work.charged_tokens)))
                add("saved_money", (tenant, model, price.currency), float(price.of(work.saved_tokens)))
        for model, inputs in self._changed.items():
            add("changed", (model,), inputs)
        for (tenant, reason), number in self._refused.items():
            add("refused", (tenant, reason), number)
        yield from sums.items()

    def list_latencies(self) -> Iterator[tuple[tuple[str, ...], Latency]]:
        """Yield the values of the labels ``endpoint`` and ``status``, and the durations."""
        yield from self._latencies.items()
