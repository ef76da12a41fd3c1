"""The metrics of a cache, in the form in which a Prometheus server reads them."""

from __future__ import annotations

import urllib.request

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.parser import text_string_to_metric_families

from embedonce import Cache, Tier
from embedonce.events import Stats
from embedonce.metrics import CacheCollector, register
from embedonce.testing.fakes import CountingProvider, DictBackend
from embedonce.testing.faults import Fault, FaultyBackend
from embedonce_backends.memory import MemoryBackend


def test_a_scrape_over_http_shows_hits_by_tier_misses_and_errors_by_cause() -> None:
    registry = CollectorRegistry()
    faulty = FaultyBackend(DictBackend(scope="host"), [Fault("raise", on="get")])
    with Cache(CountingProvider(), [MemoryBackend(), Tier(faulty, name="far")]) as cache:
        register(cache, registry=registry)
        cache.embed_batch(["private a", "b", "b"])
        for _ in range(3):
            cache.embed("b")
        server, thread = start_http_server(0, "127.0.0.1", registry)
        try:
            url = f"http://127.0.0.1:{server.server_port}/metrics"
            page = urllib.request.urlopen(url, timeout=60).read().decode()
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }
    assert samples["embed_cache_hits_total", "memory"] == 3
    assert samples["embed_cache_hits_total", "far"] == 0
    assert samples["embed_cache_misses_total",] == 2
    assert samples["embed_cache_errors_total", "OSError", "far"] == 2
    assert samples["embed_cache_provider_tokens_total", "counting"] == len("private a") + 1
    assert "private" not in page


def test_a_collector_accepts_any_object_with_stats() -> None:
    with Cache(CountingProvider(), [MemoryBackend()]) as cache:
        cache.embed("a")

        class OnlyStats:
            def stats(self) -> Stats:
                return cache.stats()

        [misses] = [metric for metric in CacheCollector(OnlyStats()).collect() if metric.name == "embed_cache_misses"]
        assert [sample.value for sample in misses.samples] == [1]


def test_caches_registered_together_are_added_up() -> None:
    registry = CollectorRegistry()
    with Cache(CountingProvider(), [MemoryBackend()]) as one, Cache(CountingProvider(), [MemoryBackend()]) as two:
        register(one, two, registry=registry)
        for cache in (one, two):
            cache.embed("a")
            cache.embed("a")
        assert registry.get_sample_value("embed_cache_hits_total", {"tier": "memory"}) == 2
        assert registry.get_sample_value("embed_cache_misses_total") == 2
