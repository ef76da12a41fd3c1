"""A backend for a store on the network. Replace the requests with those of your store."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from embedonce import Capabilities, hookimpl
from embedonce.options import Doc

from .connections import AsyncPool, Pool, parse_url

api = 1
"""Version of the plugin contract that this module implements."""

PAGE = 1000
"""Maximum number of keys per request of ``scan``."""


class ExampleBackend:
    """Stores frames (bytes) under keys. Each keyword argument of ``__init__`` is an option in TOML."""

    # Declare only what this class implements, because the conformance tests check every declared capability.
    capabilities = Capabilities(
        scope="network", deadline=True, ttl=True, max_batch=512, delete=True, scan=True, add=True, twin=True
    )

    def __init__(
        self,
        *,
        url: Annotated[str, Doc("Address of the server: example://HOST:PORT.")],
        max_connections: Annotated[int, Doc("Open at most this many connections, per process and event loop.")] = 8,
    ) -> None:
        # Nothing is connected here, so that a server that is down does not prevent startup.
        self.url = url
        self._address, self._size = parse_url(url), max_connections
        self._pool = Pool(self._address, max_connections)

    def get_many(self, keys: Sequence[str], /) -> Mapping[str, bytes]:
        """Return the frames of the keys that are stored; leave out missing keys."""
        return decode(self._pool.call({"do": "get", "keys": list(keys)})) if keys else {}

    def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        """Store every item. The server removes the items after ``ttl`` seconds."""
        if items:
            self._pool.call({"do": "set", "items": encode(items), "ttl": ttl})

    def add_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> set[str]:
        """Store the items whose key is absent, and return those keys."""
        return set(self._pool.call({"do": "add", "items": encode(items), "ttl": ttl})) if items else set()

    def delete_many(self, keys: Sequence[str], /) -> None:
        """Remove the keys; ignore missing keys."""
        if keys:
            self._pool.call({"do": "delete", "keys": list(keys)})

    def scan(self, prefix: str, /) -> Iterator[str]:
        """Yield every key that starts with ``prefix``, in pages, so that no request holds up the server."""
        after = ""
        while True:
            page = self._pool.call({"do": "scan", "prefix": prefix, "after": after, "limit": PAGE})
            yield from page
            if len(page) < PAGE:
                return
            after = page[-1]

    def twin(self) -> ExampleTwin:
        """Return an async client for the running event loop, with its own connections."""
        return ExampleTwin(AsyncPool(self._address, self._size))

    def close(self) -> None:
        """Close the connections; a second call does nothing."""
        self._pool.close()


class ExampleTwin:
    """The async client: the same calls as coroutines, for one event loop."""

    def __init__(self, pool: AsyncPool) -> None:
        self._pool = pool

    async def get_many(self, keys: Sequence[str], /) -> Mapping[str, bytes]:
        """Async twin of :meth:`ExampleBackend.get_many`."""
        return decode(await self._pool.call({"do": "get", "keys": list(keys)})) if keys else {}

    async def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        """Async twin of :meth:`ExampleBackend.set_many`."""
        if items:
            await self._pool.call({"do": "set", "items": encode(items), "ttl": ttl})

    async def close(self) -> None:
        """Close the connections."""
        await self._pool.close()


def encode(items: Mapping[str, bytes]) -> dict[str, str]:
    """Return the items with their frames as text, because JSON has no bytes."""
    return {key: b64encode(frame).decode() for key, frame in items.items()}


def decode(items: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the items with their frames as bytes."""
    return {key: b64decode(text) for key, text in items.items()}


@hookimpl
def embedonce_backends() -> Mapping[str, type[ExampleBackend]]:
    """Register the backend under its name in TOML."""
    return {"example": ExampleBackend}
