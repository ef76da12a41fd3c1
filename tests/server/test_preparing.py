"""What the providers do before a worker answers requests, so that the first request does not wait for it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from patience import LONG_TIMEOUT

from embedonce import config
from embedonce_providers.ngram import NgramProvider
from embedonce_server.connections.listening import Address, bind_addresses
from embedonce_server.processes import worker as workers
from embedonce_server.processes.launch import Launch, Source
from embedonce_server.processes.worker import Worker


class ShortWorker(Worker):
    """Stops as soon as it answers requests, or after ``on_start``."""

    on_start: Callable[[], None] | None = None
    is_ready = False

    def on_ready(self) -> None:
        self.is_ready = True
        if self.on_start is None:
            self.drain()
        else:
            self.on_start()

    def _give_up(self) -> None:
        pass  # it would end the process of the tests


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], None]], None]:
    """Returns a function that gives the provider a method ``prepare``."""
    return lambda method: monkeypatch.setattr(NgramProvider, "prepare", method, raising=False)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[ShortWorker]:
    folder = tmp_path / "run"
    folder.mkdir()
    launch = Launch(source=Source(), run=str(folder), state=str(tmp_path))
    sockets = bind_addresses([Address(socket.AF_INET, ("127.0.0.1", 0))], 0)
    yield ShortWorker(launch, configure("first"), sockets)
    for listener in sockets:
        listener.close()


def configure(*models: str) -> config.Config:
    served = [{"name": name, "provider": {"type": "ngram", "dimensions": 64}} for name in models]
    return config.load({"tiers": [], "serve": {"models": served, "drain_timeout": "0.1s"}})


def test_a_worker_prepares_its_providers_before_it_answers_requests(
    worker: ShortWorker, prepare: Callable[[Callable[[Any], None]], None]
) -> None:
    seen: list[tuple[bool, bool]] = []
    prepare(lambda self: seen.append((worker.is_ready, threading.current_thread() is threading.main_thread())))
    worker.run()
    assert worker.is_ready
    assert seen == [(False, False)]


def test_the_models_of_a_reload_are_prepared(
    worker: ShortWorker, prepare: Callable[[Callable[[Any], None]], None]
) -> None:
    prepared: list[Any] = []

    def reload() -> None:
        loop = asyncio.get_running_loop()

        def stop_at_the_second_model(provider: Any) -> None:
            prepared.append(provider)
            if len(set(map(id, prepared))) == 2:
                loop.call_soon_threadsafe(worker.drain)

        prepare(stop_at_the_second_model)
        worker.reload(configure("first", "second"))

    worker.on_start = reload
    worker.run()
    assert prepared


def test_a_provider_that_cannot_be_prepared_keeps_no_worker_from_serving(
    worker: ShortWorker, prepare: Callable[[Callable[[Any], None]], None], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Any) -> None:
        raise ModuleNotFoundError("secret")

    prepare(fail)
    worker.run()
    assert worker.is_ready
    line = 'model "first": its provider could not be prepared for the first request (ModuleNotFoundError)'
    assert caplog.text.count(line) == 1
    assert "secret" not in caplog.text


def test_a_provider_that_hangs_delays_the_start_for_a_limited_time(
    worker: ShortWorker, prepare: Callable[[Callable[[Any], None]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    monkeypatch.setattr(workers, "PREPARE_SECONDS", 0.01)

    def hang(self: Any) -> None:
        released.wait(LONG_TIMEOUT)

    prepare(hang)

    def stop() -> None:
        assert not released.is_set()
        released.set()
        worker.drain()

    worker.on_start = stop
    worker.run()
    assert worker.is_ready


def test_a_worker_that_is_stopped_while_it_prepares_answers_no_requests(
    worker: ShortWorker, prepare: Callable[[Callable[[Any], None]], None]
) -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        released = threading.Event()

        def hang(self: Any) -> None:
            loop.call_soon_threadsafe(worker.drain)
            released.wait(LONG_TIMEOUT)

        prepare(hang)
        await worker._serve()
        assert not released.is_set()
        released.set()

    asyncio.run(run())
    assert not worker.is_ready
