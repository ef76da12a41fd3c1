"""The keyvalue tier: frames in any store of py-key-value-aio, as base64 in the JSON objects that such a store holds.

Its stores are asynchronous, and one belongs to one event loop. Blocking calls have a loop of their own.
"""

from __future__ import annotations

import inspect
import os
import weakref
from base64 import b64decode, b64encode
from collections.abc import Callable, Coroutine, Mapping, Sequence
from importlib import import_module
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge
from key_value.aio.protocols import AsyncKeyValue

from embedonce import hookimpl
from embedonce.background import BackgroundLoop
from embedonce.contracts import Capabilities, time_left
from embedonce.errors import CacheClosed, ConfigError, TierError
from embedonce.options import Doc, Size

api = 1

G = TypeVar("G")
T = TypeVar("T")

KEYS = 256
"""Keys of one call."""
FIELD = "frame"
"""What the frame is called in the JSON object that is stored."""


class KeyValueBackend:
    """Holds frames in a store that it is told how to make."""

    def __init__(
        self,
        *,
        store: Annotated[
            str, Doc('What makes the store, as "module:name", such as "key_value.aio.stores.redis:RedisStore".')
        ],
        options: Annotated[dict[str, Any] | None, Doc("What it is called with.")] = None,
        collection: Annotated[str, Doc("The store's collection that holds the frames.")] = "embedonce",
        scope: Annotated[
            Literal["process", "host", "network"], Doc("Who shares the store: this process, this host, or machines.")
        ] = "network",
        max_value_bytes: Annotated[
            Size | None, Ge(1), Doc("Larger frames are not stored. A frame takes a third more in the store.")
        ] = None,
    ) -> None:
        self._making = _Making(_factory(store, options or {}), options or {}, collection, store)
        self.capabilities = Capabilities(
            scope=scope,
            deadline=True,
            ttl=True,
            max_batch=KEYS,
            max_value_bytes=max_value_bytes,
            delete=True,
            # A second store of a process would hold nothing of what the first one holds.
            twin=scope != "process",
        )
        self._start()
        _alive.add(self)

    def _start(self) -> None:
        self._client = _Client(self._making)
        self._background = BackgroundLoop("the keyvalue backend", at_end=self._client.close)

    def get_many(self, keys: Sequence[str], /) -> dict[str, bytes]:
        """Return what is there. A value that this backend did not write comes back as ``b""``: no frame, so corrupt."""
        return self._run(self._client.get_many, keys)

    def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        """Store every item."""
        self._run(lambda given: self._client.set_many(given, ttl), items)

    def delete_many(self, keys: Sequence[str], /) -> None:
        """Remove the keys."""
        self._run(self._client.delete_many, keys)

    def twin(self) -> KeyValueTwin:
        """Return a store of its own for the running event loop."""
        return KeyValueTwin(_Client(self._making))

    def close(self) -> None:
        """Close the store and end its loop."""
        self._background.close()

    def _run(self, call: Callable[[G], Coroutine[Any, Any, T]], given: G) -> T:
        return self._background.run(lambda: call(given), time_left())

    def restart(self) -> None:
        """Begin anew in a forked child, which has no thread but its own.

        What the parent had is kept and left alone: to close its loop here would take the parent's sockets
        out of the epoll that both share.
        """
        if not self._background.closed:
            _abandoned.append((self._client, self._background))
            self._start()


class KeyValueTwin:
    """The same frames through a store of one event loop."""

    def __init__(self, client: _Client) -> None:
        self._client = client
        self._closed = False

    async def get_many(self, keys: Sequence[str], /) -> dict[str, bytes]:
        """Return what is there."""
        return await self._open().get_many(keys)

    async def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        """Store every item."""
        await self._open().set_many(items, ttl)

    async def close(self) -> None:
        """Close the store."""
        if not self._closed:
            self._closed = True
            await self._client.close()

    def _open(self) -> _Client:
        if self._closed:
            raise CacheClosed("the keyvalue backend's async client is closed")
        return self._client


class _Making:
    """How a store is made, for each loop that needs one."""

    def __init__(self, factory: Callable[..., Any], options: Mapping[str, Any], collection: str, name: str) -> None:
        self._factory = factory
        self._options = options
        self._name = name
        self.collection = collection

    def make(self) -> AsyncKeyValue:
        """Return a new store.

        Raises:
            TierError: it cannot be made.
        """
        try:
            store = self._factory(**self._options)
        except Exception as error:  # noqa: BLE001  (a store may raise anything)
            # Not its message: it may repeat an option, and among them is the password.
            raise TierError(f"{self._name} cannot be made ({type(error).__name__})") from None
        if not isinstance(store, AsyncKeyValue):
            raise TierError(f"{self._name} makes a {type(store).__name__}, which is no store of py-key-value-aio")
        return store


class _Client:
    """One store, made by the first call in the event loop that it belongs to."""

    def __init__(self, making: _Making) -> None:
        self._making = making
        self._made: AsyncKeyValue | None = None

    def _store(self) -> AsyncKeyValue:
        if self._made is None:
            self._made = self._making.make()
        return self._made

    async def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        different = list(dict.fromkeys(keys))
        if not different:
            return {}
        values = await self._store().get_many(different, collection=self._making.collection)
        return {key: _frame(value) for key, value in zip(different, values, strict=True) if value is not None}

    async def set_many(self, items: Mapping[str, bytes], ttl: float | None) -> None:
        if items:
            values = [{FIELD: b64encode(frame).decode()} for frame in items.values()]
            await self._store().put_many(list(items), values, collection=self._making.collection, ttl=ttl)

    async def delete_many(self, keys: Sequence[str]) -> None:
        if keys:
            await self._store().delete_many(list(dict.fromkeys(keys)), collection=self._making.collection)

    async def close(self) -> None:
        store, self._made = self._made, None
        close = getattr(store, "close", None)  # not every store has something to close
        if close is not None:
            await close()


def _frame(value: Mapping[str, Any]) -> bytes:
    try:
        return b64decode(value[FIELD], validate=True)
    except (KeyError, TypeError, ValueError):
        return b""


def _factory(store: str, options: Mapping[str, Any]) -> Callable[..., Any]:
    """Return what ``store`` names, after seeing whether it takes these options.

    Raises:
        ConfigError: it is not there, or does not.
    """
    module, _, name = store.partition(":")
    try:
        found: Any = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        wanted = '"module:name", such as "key_value.aio.stores.memory:MemoryStore"'
        raise ConfigError(f"store: {store} cannot be loaded ({error}); it is {wanted}") from error
    if not callable(found):
        raise ConfigError(f"store: {store} makes nothing: it is a {type(found).__name__}")
    try:
        inspect.signature(found).bind(**options)
    except TypeError as error:
        raise ConfigError(f"options: {store} does not take them ({error})") from error
    except ValueError:  # written in C, with no signature to look at
        pass
    return found  # type: ignore[no-any-return]


_alive: weakref.WeakSet[KeyValueBackend] = weakref.WeakSet()
_abandoned: list[object] = []


def _after_in_child() -> None:
    for backend in list(_alive):
        backend.restart()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_in_child)


@hookimpl
def embedonce_backends() -> Mapping[str, type]:
    """Name this file's backend."""
    return {"keyvalue": KeyValueBackend}
