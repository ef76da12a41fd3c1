"""The keyvalue backend passes the contract on stores in memory, on disk and, if REDIS_URL is set, in Redis."""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from embedonce_keyvalue.backend import KeyValueBackend
from key_value.aio.stores.disk import DiskStore
from key_value.aio.stores.memory import MemoryStore

from embedonce.contracts import deadline
from embedonce.errors import ConfigError, TierError
from embedonce.testing import BackendContract, FaultProxy, NetworkFault, Recipe

key = BackendContract.key

MEMORY = "key_value.aio.stores.memory:MemoryStore"
DISK = "key_value.aio.stores.disk:DiskStore"
REDIS = "key_value.aio.stores.redis:RedisStore"


class TestMemory(BackendContract):
    examples = 20

    def make(self) -> KeyValueBackend:
        return KeyValueBackend(store=MEMORY, scope="process")


class SharedContract(BackendContract):
    examples = 5

    def options(self) -> dict[str, Any]:
        raise NotImplementedError

    def make(self) -> KeyValueBackend:
        return self.at(self.options())

    def at(self, options: dict[str, Any]) -> KeyValueBackend:
        backend = KeyValueBackend(**options)
        self.made[backend] = options
        return backend

    @pytest.fixture(autouse=True)
    def in_a_folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        self.made: dict[Any, dict[str, Any]] = {}

    def reopen(self, backend: KeyValueBackend) -> KeyValueBackend:
        return self.at(self.made[backend])

    def recipe(self, backend: KeyValueBackend) -> Recipe:
        return Recipe(KeyValueBackend, self.made[backend])


class TestDisk(SharedContract):
    def options(self) -> dict[str, Any]:
        return {"store": DISK, "options": {"directory": tempfile.mkdtemp(dir=self.folder)}, "scope": "host"}


@pytest.fixture(scope="session")
def proxy() -> Iterator[FaultProxy]:
    if "REDIS_URL" not in os.environ:
        pytest.skip("REDIS_URL is not set")
    place = urlsplit(os.environ["REDIS_URL"])
    with FaultProxy(place.hostname or "localhost", place.port or 6379) as proxy:
        yield proxy


class TestRedis(SharedContract):
    numbers = count()

    @pytest.fixture(autouse=True)
    def on_a_server(self, proxy: FaultProxy) -> None:
        self.proxy = proxy

    def options(self) -> dict[str, Any]:
        name = f"contract-{os.getpid()}-{next(self.numbers)}"
        return {"store": REDIS, "options": {"url": f"redis://{self.proxy.url_port}/0"}, "collection": name}

    def stall(self, backend: KeyValueBackend) -> AbstractContextManager[object]:
        return self.silent()

    @contextmanager
    def silent(self) -> Iterator[None]:
        self.proxy.fault = NetworkFault("black_hole")
        try:
            yield
        finally:
            self.proxy.heal()


# --- the content of the store ---------------------------------------------------------------------


def test_the_store_applies_the_ttl(tmp_path: Path) -> None:
    backend = KeyValueBackend(store=DISK, options={"directory": str(tmp_path)}, collection="vectors", scope="host")
    backend.set_many({key(1): b"one"}, 3600.0)
    backend.set_many({key(2): b"two"}, None)
    backend.close()

    async def look() -> list[tuple[dict[str, Any] | None, float | None]]:
        async with DiskStore(directory=tmp_path) as store:
            return [await store.ttl(key(n), collection="vectors") for n in (1, 2)]

    (one, left), (two, forever) = asyncio.run(look())
    assert one == {"frame": "b25l"}
    assert left is not None
    assert 0 < left <= 3600
    assert (two, forever) == ({"frame": "dHdv"}, None)


SHARED = MemoryStore()


def shared_store() -> MemoryStore:
    return SHARED


@pytest.mark.parametrize("value", [{}, {"frame": 7}, {"frame": "not base64!"}, {"other": "b25l"}])
def test_a_value_from_another_program_is_not_a_frame(value: dict[str, Any]) -> None:
    backend = KeyValueBackend(store=f"{__name__}:shared_store", collection="theirs", scope="process")
    asyncio.run(SHARED.put(key(1), value, collection="theirs"))
    assert backend.get_many([key(1)]) == {key(1): b""}
    backend.close()


# --- invalid options ------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["", "nowhere", "nowhere:Store", MEMORY + "s", "key_value.aio.stores.memory:", ":x"])
def test_a_store_that_cannot_be_loaded_is_an_error(store: str) -> None:
    with pytest.raises(ConfigError, match=r'cannot load .*; it must have the form "module:name"'):
        KeyValueBackend(store=store)


def test_a_name_that_makes_no_store_is_an_error() -> None:
    with pytest.raises(ConfigError, match="must be a class or a function, got a str"):
        KeyValueBackend(store=f"{__name__}:DISK")
    backend = KeyValueBackend(store="builtins:dict")
    with pytest.raises(TierError, match="returned a dict, which is not a store of py-key-value-aio"):
        backend.get_many([key(1)])
    backend.close()


def test_options_that_a_store_does_not_accept_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"options: .*RedisStore does not accept them .*'urll'"):
        KeyValueBackend(store=REDIS, options={"urll": "redis://:a-secret@localhost"})


def test_a_store_that_cannot_be_made_does_not_show_its_options(tmp_path: Path) -> None:
    (tmp_path / "a-secret").touch()
    backend = KeyValueBackend(store=DISK, options={"directory": str(tmp_path / "a-secret" / "x")})
    with pytest.raises(TierError, match=r"cannot make .*DiskStore \(\w+\)") as caught:
        backend.get_many([key(1)])
    assert "a-secret" not in str(caught.value)
    assert caught.value.__suppress_context__
    backend.close()


# --- deadlines and ends ---------------------------------------------------------------------------


class Hanging(MemoryStore):
    async def get_many(self, keys: Any, *, collection: str | None = None) -> Any:
        await asyncio.Event().wait()


def test_every_call_is_cancelled_at_its_deadline() -> None:
    backend = KeyValueBackend(store=f"{__name__}:Hanging", scope="process")
    with deadline(0.05), pytest.raises(TimeoutError):
        backend.get_many([key(1)])
    backend.set_many({key(1): b"one"}, None)
    backend.close()


def test_the_backend_ends_with_its_last_reference() -> None:
    before = {*threading.enumerate()}
    backend = KeyValueBackend(store=MEMORY, scope="process")
    backend.get_many([key(1)])
    (thread,) = (one for one in {*threading.enumerate()} - before if one.name == "embedonce: the keyvalue backend")
    del backend
    thread.join(60)
    assert not thread.is_alive()


def test_a_process_store_has_no_twin() -> None:
    assert not KeyValueBackend(store=MEMORY, scope="process").capabilities.twin
    assert KeyValueBackend(store=REDIS).capabilities.twin
