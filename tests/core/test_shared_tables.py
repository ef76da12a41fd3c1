"""Tables that all threads of a process share: a loop over one never fails, and none grows without limit."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from patience import LONG_TIMEOUT

from embedonce import Cache, EraseIncomplete, Tier
from embedonce._engine import flights, requests, running
from embedonce.testing.fakes import CountingProvider, DictBackend
from embedonce.testing.faults import FaultyProvider, ProviderFault
from embedonce.vectors import Block, Entries, Entry, freeze
from embedonce_backends.memory import MemoryBackend


class TaskSpaces(CountingProvider):
    """A provider with a vector space for each task."""

    def space(self, task):  # type: ignore[no-untyped-def]
        space = super().space("document")
        return type(space)(provider=space.provider, model=f"{space.model}-{task}", dimensions=space.dimensions)


@pytest.fixture
def many_switches() -> Iterator[None]:
    """Make the interpreter change threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def run_together(*calls: Callable[[int], object], rounds: int) -> None:
    errors: list[BaseException] = []

    def run(call: Callable[[int], object]) -> None:
        try:
            for number in range(rounds):
                if errors:
                    return
                call(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_embed_in_new_tasks_while_others_forget_and_check(many_switches: None) -> None:
    with Cache(CountingProvider(), [MemoryBackend(), Tier(DictBackend(scope="host"), name="host")]) as cache:
        run_together(
            lambda number: cache.embed_batch([f"{number} {place}" for place in range(30)]),
            lambda number: cache.embed(f"{number}", f"task {number}"),
            lambda number: cache.fetch([f"{number}"], f"other task {number}"),
            lambda number: cache.for_provider(CountingProvider(model=f"model {number}")).embed("text"),
            lambda number: cache.forget([f"{number} {place}" for place in range(5)]),
            lambda number: cache.stats() if number % 20 else (cache.check(), cache.contents()),  # these list all keys
            rounds=200,
        )


def test_a_text_that_is_added_to_the_memo_during_forget() -> None:
    with Cache(CountingProvider(), [MemoryBackend()]) as cache:
        cache.embed_batch([f"text {number}" for number in range(1000)])
        route = cache._get_route(cache._source, "document")
        keys = route.keys(["text 1"])
        thresholds = gc.get_threshold()

        def add(phase: str, info: object) -> None:
            route.recent_keys[f"new {len(route.recent_keys)}"] = "eo1.x.y"

        gc.callbacks.append(add)  # Python 3.11 collects garbage in the middle of the step that makes a list of items
        try:
            gc.set_threshold(1)
            route.discard_texts(keys)
        finally:
            gc.set_threshold(*thresholds)
            gc.callbacks.remove(add)
        assert "text 1" not in route.recent_keys
        assert "text 2" in route.recent_keys


def test_entries_are_read_while_another_thread_adds_entries(many_switches: None) -> None:
    dates = np.zeros(50)
    entries = Entries(blocks=[Block([f"b{i}" for i in range(50)], np.ones((50, 4), np.float32), dates, dates + np.inf)])
    entry = Entry(freeze([1.0, 2.0]), 0.0)
    run_together(
        lambda number: entries.add({f"{number}": entry}),
        lambda number: entries.sizes(),
        lambda number: entries.as_dict(),
        rounds=1500,
    )


def test_the_routes_of_tasks_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "MAX_ROUTES", 10)
    with Cache(CountingProvider(), [backend := DictBackend()]) as cache:
        for number in range(100):
            cache.embed(f"text {number}", f"task {number}")
        assert len(cache._routes) == 10
        assert cache._other_tasks == {}  # the provider has one space for all tasks
        cache.forget(["text 3"])
        assert cache.lookup(["text 3", "text 4"]).sources[0] is None
        assert {("document", "query")} >= {tuple(task for _, task in list(cache._routes)[:2])}
        assert len(list(backend.scan("eo1."))) == 99


def test_forget_erases_a_text_of_a_task_whose_route_was_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "MAX_ROUTES", 10)
    with Cache(TaskSpaces(), [backend := DictBackend()]) as cache:
        for number in range(50):
            cache.embed("text", f"task {number}")
        assert len(cache._routes) == 10
        assert len(list(backend.scan("eo1."))) == 50
        cache.forget(["text"])
        assert list(backend.scan("eo1.")) == []


def test_forget_says_when_it_does_not_know_all_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "MAX_TASKS", 5)
    with Cache(TaskSpaces(), [DictBackend()]) as cache:
        for number in range(5):
            cache.embed("text", f"task {number}")
        cache.forget(["text"])
        cache.embed("text", "one more")
        with pytest.raises(EraseIncomplete, match="Call it again with each task"):
            cache.forget(["text"])
        cache.forget(["text"], task="one more")


def test_cards_that_nothing_uses_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "MAX_CARDS", 8)
    far = DictBackend(scope="network")
    with Cache(CountingProvider(), [MemoryBackend(max_entries=4), Tier(far, name="far")]) as cache:
        for number in range(200):
            cache.for_provider(CountingProvider(model=f"model {number}")).embed("text")
            cache.flush()
        gc.collect()
        assert len(cache._chain.cards) < 40
        for tier in cache._chain.tiers:
            assert len(tier.writer._cards_written) < 40
        # The tier has the card of each scope, and the in-process tier has the cards of its entries.
        assert cache.purge(model="model 3").removed["far"] == 1
        assert cache.purge(model="model 199").removed == {"memory": 1, "far": 1}


def test_a_card_is_kept_while_an_entry_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "MAX_CARDS", 8)
    with Cache(CountingProvider(), [MemoryBackend()]) as cache:
        for number in range(50):
            cache.for_provider(CountingProvider(model=f"model {number}")).embed("text")
        gc.collect()
        assert cache.purge(model="model 0").removed == {"memory": 1}


def test_erasures_beside_a_call_that_hangs_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flights, "MAX_ERASED", 100)

    backend = DictBackend(scope="network")
    with Cache(CountingProvider(), [Tier(backend, name="far", write="inline", timeout=60.0)]) as cache:
        in_flight = cache._chain.in_flight
        ticket = in_flight.new_ticket()  # a call that hangs
        for number in range(1000):
            cache.forget([f"text {number}"])
        assert in_flight._erased_size <= 100
        assert len(in_flight._erased) <= 100
        entry = Entry(freeze([1.0]), 0.0)
        keys = cache._get_route(cache._source, "document").keys(["text 1", "text 999", "another"])
        with in_flight.track_write("far", ticket.number, dict.fromkeys(keys, entry)) as permitted:
            assert permitted == {}  # the call began before erasures that were dropped, so it stores nothing
        later = in_flight.new_ticket()
        with in_flight.track_write("far", later.number, dict.fromkeys(keys, entry)) as permitted:
            assert list(permitted) == keys
        later.release()
        ticket.release()
        assert not in_flight._erased


def test_a_write_that_is_queued_before_erasures_of_other_texts_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flights, "MAX_ERASED", 10)
    in_flight = flights.InFlight(1000)
    hanging = in_flight.new_ticket()
    entry = Entry(freeze([1.0]), 0.0)
    with in_flight.new_ticket() as ticket:
        in_flight.queue_write("far", ticket.number, {"eo1.a.kept": entry, "eo1.a.0": entry}, force=False)
    for number in range(100):
        with in_flight.forbid_stores(flights.Erasure([f"eo1.a.{number}"])):
            pass
    write = in_flight.take_write("far")
    assert write is not None
    with in_flight.track_write("far", write.number, write.entries) as permitted:
        assert list(permitted) == ["eo1.a.kept"]
    hanging.release()


@pytest.mark.slow
def test_ten_thousand_providers_leave_no_cards_and_caches_behind() -> None:
    with Cache(CountingProvider(), [Tier(DictBackend(scope="host"), name="host", write="none")]) as cache:
        chain = cache._chain
        for number in range(10_000):
            with cache.for_provider(CountingProvider(model=f"m{number}")) as other:
                other._list_scopes()
            assert len(chain.cards) <= 2 * running.MAX_CARDS
        del other
        gc.collect()
        assert len(chain._caches) == 1


@pytest.mark.slow
def test_ten_thousand_tasks_and_erasures_beside_a_call_that_hangs_leave_bounded_tables() -> None:
    """Each erasure stays correct: the call that hangs stores no text that was forgotten meanwhile."""
    provider = FaultyProvider(TaskSpaces(), [ProviderFault("hang", calls={1})])
    store = DictBackend(scope="host")
    with Cache(provider, [Tier(store, name="host", lease="off")]) as cache, ThreadPoolExecutor(1) as pool:
        slow = pool.submit(cache.embed_batch, ["forgotten", "kept"])
        provider.gate.until(1)
        for number in range(10_000):
            cache.lookup(["text"], f"task {number}")
            cache.forget(["forgotten" if number == 0 else f"text {number}"], "document")
        in_flight = cache._chain.in_flight
        assert len(cache._routes) <= requests.MAX_ROUTES
        assert len(cache._other_tasks) <= requests.MAX_TASKS
        assert in_flight._erased_size <= flights.MAX_ERASED
        provider.release()
        slow.result(LONG_TIMEOUT)
        assert cache.lookup(["forgotten", "kept"]).sources == [None, "host"]
        assert not in_flight._erased
        assert not in_flight._erasures
