"""What the tests of the importers that read from Redis share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import numpy as np
import pytest
import redis
from numpy.typing import NDArray
from servers import RedisServer

from embedonce.contracts import FoundVectors
from embedonce.testing import ImporterContract, Recipe

SECRET = "a-secret-f2a9"
NO_SERVER = f"redis://user:{SECRET}@127.0.0.1:1/0"

_databases = itertools.count()


def make_database(server: RedisServer) -> str:
    """Return the URL of an empty database of the server. It stays until 15 others have been made."""
    number = next(_databases) % 15 + 1
    url = f"{server.url.rpartition('/')[0]}/{number}"
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


def make_vectors(count: int, dimensions: int = 8, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, dimensions)).astype(np.float32)


def as_dict(*parts: FoundVectors) -> dict[str, bytes]:
    """Return the bytes of each vector as float32, by text."""
    return {
        text: np.asarray(row, np.float32).tobytes()
        for part in parts
        for text, row in zip(part.texts, part.vectors, strict=True)
    }


def expect(texts: Sequence[str], vectors: NDArray[np.float32]) -> dict[str, bytes]:
    return {text: row.tobytes() for text, row in zip(texts, vectors, strict=True)}


def list_keys(client: redis.Redis) -> list[bytes]:
    return sorted(client.scan_iter())


def read_value(client: redis.Redis, key: bytes) -> object:
    """Return a string or the fields of a hash. DUMP returns the fields in an order that reading may change."""
    return client.get(key) if client.type(key) == b"string" else client.hgetall(key)


class RedisSourceContract(ImporterContract):
    """Runs the standard tests of an importer against a real server. ``write`` is that of the module of its store."""

    importer: ClassVar[Callable[..., Any]]
    write: ClassVar[Callable[..., dict[str, object]]]
    examples = 15
    scan_length = 5_000
    secrets = (SECRET,)

    @pytest.fixture(autouse=True)
    def on_server(self, redis_server: RedisServer) -> None:
        self.server = redis_server

    def make(self, texts: Sequence[str], vectors: NDArray[np.float32]) -> Any:
        self.options = type(self).write(make_database(self.server), list(texts), vectors)
        importer = type(self).importer(**self.options)
        importer.test_options = self.options
        return importer

    def recipe(self, importer: Any) -> Recipe:
        return Recipe(type(self).importer, importer.test_options)

    def missing(self) -> tuple[Any, str]:
        required = {"model": "m", "group": "g", "key": '"{text}"'}
        names = type(self).importer.__init__.__kwdefaults__ or {}  # type: ignore[misc]
        code = type(self).importer.__init__.__code__  # type: ignore[misc]
        given = {name: value for name, value in required.items() if name in code.co_varnames and name not in names}
        return type(self).importer(url=NO_SERVER, **given), "127.0.0.1:1"

    def snapshot(self, importer: Any) -> object:
        with redis.Redis.from_url(importer.test_options["url"]) as client:
            return {key: (read_value(client, key), client.pexpiretime(key)) for key in list_keys(client)}

    def stall(self, importer: Any) -> AbstractContextManager[object]:
        return pause(self.server)


@contextmanager
def pause(server: RedisServer) -> Iterator[None]:
    """Suspend the server inside the block."""
    server.pause()
    try:
        yield
    finally:
        server.resume()
