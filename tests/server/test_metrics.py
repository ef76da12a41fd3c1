"""What a worker counts, and that counting is cheap and never goes back."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest
from patience import wait_until_async
from prometheus_client.exposition import generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import CollectorRegistry
from serving import ADMIN_KEY, KEY, Served, serve

from embedonce import config
from embedonce.testing.servers.openai import OpenAIServer
from embedonce_server.connections.listening import Address, bind_addresses
from embedonce_server.counters import BUCKETS
from embedonce_server.processes.launch import Launch, Source
from embedonce_server.processes.worker import Worker
from embedonce_server.service import Service

ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
TENANT = {"authorization": f"Bearer {KEY}"}


def provider(api: OpenAIServer, **options: Any) -> dict[str, Any]:
    return {"type": "openai", "model": "m", "base_url": api.base_url, "api_key": "k", "max_retries": 0, **options}


def configure(api: OpenAIServer, **tenant: Any) -> dict[str, Any]:
    tenants = [{"name": "search", "keys": [KEY], **tenant}]
    return {
        "provider": provider(api, price="2 USD / 1 token"),
        "tiers": [{"type": "memory"}],
        "serve": {"admin_key": ADMIN_KEY, "tenants": tenants},
    }


class Scrape:
    """The samples of one scrape."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        """Return the sum of the samples of ``embed_serve_…`` with these labels."""
        return self.sum(f"embed_serve_{name}", **labels)

    def sum(self, name: str, **labels: str) -> float:
        return sum(
            sample.value for sample in self._samples if sample.name == name and labels.items() <= sample.labels.items()
        )

    @property
    def counters(self) -> dict[tuple[Any, ...], float]:
        return {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for sample in self._samples
            if sample.name.endswith(("_total", "_bucket", "_count", "_sum"))
        }


async def scrape(server: Served) -> Scrape:
    answer = await server.call("GET", "/metrics", headers=ADMIN)
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain")
    return Scrape(answer.body.decode())


async def test_hits_computed_inputs_tokens_and_money_are_counted_by_tenant_and_model(
    api: OpenAIServer, tmp_path: Path
) -> None:
    async with serve(configure(api), tmp_path) as server:
        await server.embed(["private", "b"], headers=TENANT)
        await server.embed(["private", "b", "private", "c"], headers=TENANT)
        value = await scrape(server)
        of = {"tenant": "search", "model": "m"}
        tokens = {text: api.tokens_of(text) for text in ("private", "b", "c")}
        assert value("requests_total", status="200", **of) == 2
        assert value("hits_total", tier="memory", **of) == 3
        assert value("computed_total", **of) == 3
        assert value("computed_tokens_total", **of) == sum(tokens.values())
        assert value("saved_tokens_total", **of) == tokens["private"] + tokens["b"]
        assert value("computed_money_total", currency="USD", **of) == 2 * sum(tokens.values())
        assert value("saved_money_total", currency="USD", **of) == 2 * (tokens["private"] + tokens["b"])
        assert value.sum("embed_cache_hits_total", tier="memory") == 2  # equal texts of a request count once there
        assert value.sum("embed_cache_provider_texts_total", provider="openai") == 3
        assert "private" not in value.text


async def test_failed_requests_are_counted_by_status_and_model(api: OpenAIServer, tmp_path: Path) -> None:
    async with serve(configure(api), tmp_path) as server:
        await server.embed("a", headers=TENANT, model="private")
        await server.embed("a")
        api.misbehave("server_error")
        await server.embed("a", headers=TENANT)
        value = await scrape(server)
        assert value("requests_total", tenant="search", model="", status="404") == 1
        assert value("requests_total", tenant="", model="", status="401") == 1
        assert value("requests_total", tenant="search", model="m", status="500") == 1
        assert value("request_seconds_count", endpoint="/v1/embeddings", status="4xx") == 2
        assert value("request_seconds_count", endpoint="/v1/embeddings", status="5xx") == 1
        assert "private" not in value.text


async def test_other_paths_are_counted_under_few_names(api: OpenAIServer, tmp_path: Path) -> None:
    async with serve(configure(api), tmp_path) as server:
        for path in ("/private/1", "/private/2", "/v1/models/private", "/health/live", "/siblings/private"):
            await server.call("GET", path, headers=TENANT)
        value = await scrape(server)
        assert value("request_seconds_count", endpoint="other") == 3
        assert value("request_seconds_count", endpoint="/v1/models/{model}") == 1
        assert value("request_seconds_count", endpoint="/health/live", status="2xx") == 1
        assert "private" not in value.text


async def test_durations_fall_into_buckets(api: OpenAIServer, tmp_path: Path) -> None:
    async with serve(configure(api), tmp_path) as server:
        for seconds in (BUCKETS[0], BUCKETS[0] * 1.01, BUCKETS[-1], BUCKETS[-1] * 2):
            server.service.counters.count_other("/health/live", 200, seconds)
        value = await scrape(server)
        buckets = {le: value("request_seconds_bucket", endpoint="/health/live", le=le) for le in ("0.0001", "0.00025")}
        assert buckets == {"0.0001": 1, "0.00025": 2}
        assert value("request_seconds_bucket", endpoint="/health/live", le="60.0") == 3
        assert value("request_seconds_bucket", endpoint="/health/live", le="+Inf") == 4
        assert value("request_seconds_count", endpoint="/health/live") == 4
        assert value("request_seconds_sum", endpoint="/health/live") == pytest.approx(180.0002, abs=1e-4)


class ChargingServer(OpenAIServer):
    """Adds up the tokens that it reports."""

    charged = 0

    def embed(self, request: Any, fault: Any) -> Any:
        reply = super().embed(request, fault)
        self.charged += reply.content["usage"]["total_tokens"]
        return reply


async def test_tokens_of_requests_that_fail_are_counted_too(tmp_path: Path) -> None:
    with ChargingServer(max_tokens=8) as api:
        async with serve(configure(api, tokens_per_day=80), tmp_path) as server:
            assert (await server.embed(["good text", "too long " * 8], headers=TENANT)).status == 400
            api.misbehave("nan")
            assert (await server.embed("this is refused", headers=TENANT)).status == 502
            api.heal()
            statuses = {
                (await server.embed([f"text {i} {n}" for n in range(3)], headers=TENANT)).status for i in range(10)
            }
            assert statuses == {200, 429}
            value = await scrape(server)
            assert value("computed_tokens_total", tenant="search") == api.charged
            assert value("computed_money_total", tenant="search") == 2 * api.charged
            assert value("refused_total", tenant="search", reason="budget") > 0
            assert value.sum("embed_cache_computed_tokens_total") == api.charged


async def test_a_vector_that_changes_counts_as_drift(api: OpenAIServer, tmp_path: Path) -> None:
    async with serve(configure(api), tmp_path) as server:
        await server.embed(["a", "b"], headers=TENANT)
        original = api.vector_of
        api.vector_of = lambda text, **other: -original(text, **other)  # type: ignore[method-assign]
        await server.embed(["a", "b", "c"], headers={**TENANT, "cache-control": "no-cache"})
        assert (await scrape(server))("changed_total", model="m") == 2


async def test_requests_that_limits_refuse_are_counted_by_reason(api: OpenAIServer, tmp_path: Path) -> None:
    async with serve(configure(api, requests_per_minute=2, tokens_per_day=0), tmp_path) as server:
        statuses = [(await server.embed(f"text {number}", headers=TENANT)).status for number in range(3)]
        assert statuses == [429] * 3
        value = await scrape(server)
        assert value("refused_total", tenant="search", reason="budget") == 2
        assert value("refused_total", tenant="search", reason="rate") == 1


async def test_budgets_are_gauges(api: OpenAIServer, tmp_path: Path) -> None:
    async with serve(configure(api, tokens_per_day=1000), tmp_path) as server:
        await server.embed("a text", headers=TENANT)
        value = await scrape(server)
        assert value("budget_tokens", tenant="search") == 1000
        assert value("budget_used_tokens", tenant="search") == api.tokens_of("a text")
        assert value("budget_reserved_tokens", tenant="search") == 0


async def test_requests_and_bodies_under_way_are_gauges(api: OpenAIServer, tmp_path: Path) -> None:
    async with serve(configure(api), tmp_path) as server:
        api.misbehave("hang")
        task = asyncio.create_task(server.embed("a text", headers=TENANT))
        await wait_until_async(lambda: api.requests)
        value = await scrape(server)
        assert value("requests_in_progress", worker="1") == 1
        assert value("body_bytes", worker="1") == server.service.bodies.bytes > 0
        api.heal()
        await task
        value = await scrape(server)
        assert (value("requests_in_progress"), value("body_bytes")) == (0, 0)


async def test_counters_never_decrease_when_a_reload_closes_models(api: OpenAIServer, tmp_path: Path) -> None:
    def load(*names: str) -> config.Config:
        models = [{"name": name, "provider": provider(api, model=name)} for name in names]
        return config.load({"tiers": [{"type": "memory"}], "serve": {"models": models}})

    first = {"tiers": [], "serve": {"models": [{"name": "one", "provider": provider(api, model="one")}]}}
    async with serve(first, tmp_path) as server:
        before: dict[tuple[Any, ...], float] = {}
        for names in (("one", "two"), ("two",), ("one",), ("one", "two")):
            server.service.reload(load(*names))
            for name in names:
                await server.embed(f"text of {name}", model=name)
                api.misbehave("bad_request")
                await server.embed("refused", model=name, dimensions=5)  # a space that is dropped at once
                api.heal()
            await wait_until_async(lambda: not server.service._retired)
            now = (await scrape(server)).counters
            assert not {sample for sample, value in before.items() if now[sample] < value}
            before = now
        value = await scrape(server)
        assert value.sum("embed_cache_provider_failed_total", provider="openai") == 6


async def test_a_fallback_counts_at_its_own_price(api: OpenAIServer, tmp_path: Path) -> None:
    with OpenAIServer() as other:
        fallback = provider(other, model="second", price="5 EUR / 1 token", dimensions=16)
        own = provider(api, price="2 USD / 1 token", dimensions=16, fallback=fallback)
        settings = {"provider": own, "tiers": []}
        async with serve({**settings, "serve": {}}, tmp_path) as server:
            await server.embed("a")
            api.misbehave("server_error")
            assert (await server.embed("bcd")).status == 200
            value = await scrape(server)
            assert value("computed_money_total", currency="USD") == 2 * api.tokens_of("a")
            assert value("computed_money_total", currency="EUR") == 5 * other.tokens_of("bcd")


async def test_a_worker_that_starts_again_adds_to_its_predecessor(api: OpenAIServer, tmp_path: Path) -> None:
    settings = configure(api)
    for count in (1, 2):
        async with serve(settings, tmp_path) as server:
            await server.embed("a", headers=TENANT)
            assert (await scrape(server))("requests_total", status="200") == count


def test_what_a_worker_counts_at_its_end_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close = Service.close

    async def close_and_count(service: Service, timeout: float) -> None:
        await close(service, timeout)
        service.counters.count_other("last", 200, 0.0)

    class ShortWorker(Worker):
        def on_ready(self) -> None:
            self.drain()

        def _give_up(self) -> None:
            pass  # it would end the process of the tests

    monkeypatch.setattr(Service, "close", close_and_count)
    settings = config.load({"provider": {"type": "ngram"}, "tiers": [], "serve": {"drain_timeout": "0.1s"}})
    folder = tmp_path / "run"
    folder.mkdir()
    launch = Launch(source=Source(), run=str(folder), state=str(tmp_path))
    ShortWorker(launch, settings, bind_addresses([Address(socket.AF_INET, ("127.0.0.1", 0))], 0)).run()
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(launch.folder.metrics))  # type: ignore[no-untyped-call]
    value = Scrape(generate_latest(registry).decode())
    assert value("request_seconds_bucket", endpoint="last", le="+Inf") == 1


async def test_a_folder_that_cannot_be_written_disturbs_no_request(
    api: OpenAIServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    async with serve(configure(api), tmp_path) as server:
        monkeypatch.setattr("prometheus_client.mmap_dict.MmapedDict.write_value", fail)
        for _ in range(2):
            assert (await server.embed("a", headers=TENANT)).status == 200
            server.app.metrics.copy()
        line = f"metrics cannot be written to the folder {server.service.run.metrics} (OSError)"
        assert caplog.text.count(line) == 1
        monkeypatch.undo()
        assert (await scrape(server))("requests_total") == 2
