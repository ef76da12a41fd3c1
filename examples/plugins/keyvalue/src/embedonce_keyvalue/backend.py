"""The keyvalue tier: frames in any store of py-key-value-aio, as base64 in the JSON objects that such a store holds.

The stores are asynchronous, and each belongs to one event loop. Blocking calls run on the backend's own loop.
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

MAX_KEYS = 256
"""Maximum keys per call."""
FIELD = "frame"
"""Name of the frame in the stored JSON object."""


class KeyValueBackend:
    """Holds frames in a store of py-key-value-aio, which it makes from its options."""

    def __init__(
        self,
        *,
        store: Annotated[
            str, Doc('The store\'s class or factory as "module:name", such as "key_value.aio.stores.redis:RedisStore".')
        ],
        options: Annotated[dict[str, Any] | None, Doc("Keyword arguments for store.")] = None,
        collection: Annotated[str, Doc("The store's collection that holds the frames.")] = "embedonce",
        scope: Annotated[
            Literal["process", "host", "network"],
            Doc("Who shares the store: this process, this host, or several machines."),
        ] = "network",
        max_value_bytes: Annotated[
            Size | None, Ge(1), Doc("Maximum size of a frame, which takes a third more space in the store.")
        ] = None,
    ) -> None:
        self._recipe = _StoreRecipe(_find_factory(store, options or {}), options or {}, collection, store)
        self.capabilities = Capabilities(
            scope=scope,
            deadline=True,
            ttl=True,
            max_batch=MAX_KEYS,
            max_value_bytes=max_value_bytes,
            delete=True,
            # With scope "process", a second store would hold none of the first one's frames.
            twin=scope != "process",
        )
        self._start()
        _live_backends.add(self)

    def _start(self) -> None:
        self._client = _Client(self._recipe)
        self._background = BackgroundLoop("the keyvalue backend", at_end=self._client.close)

    def get_many(self, keys: Sequence[str], /) -> dict[str, bytes]:
        """Return the frames of the keys that exist.

        A value that this backend did not write comes back as ``b""``, which embedonce treats as a corrupt frame.
        """
        return self._run(self._client.get_many, keys)

    def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        """Store every item."""
        self._run(lambda given: self._client.set_many(given, ttl), items)

    def delete_many(self, keys: Sequence[str], /) -> None:
        """Remove the keys."""
        self._run(self._client.delete_many, keys)

    def twin(self) -> KeyValueTwin:
        """Return an async client with its own store for the running event loop."""
        return KeyValueTwin(_Client(self._recipe))

    def close(self) -> None:
        """Close the store and end its loop."""
        self._background.close()

    def _run(self, call: Callable[[G], Coroutine[Any, Any, T]], given: G) -> T:
        return self._background.run(lambda: call(given), time_left())

    def restart(self) -> None:
        """Start again in a forked child, in which the background thread does not exist.

        The parent's loop and store are kept but not closed: closing the loop here would remove the parent's sockets
        from the epoll that both processes share.
        """
        if not self._background.closed:
            _abandoned.append((self._client, self._background))
            self._start()


class KeyValueTwin:
    """Access to the same frames from one event loop, through a store of its own."""

    def __init__(self, client: _Client) -> None:
        self._client = client
        self._closed = False

    async def get_many(self, keys: Sequence[str], /) -> dict[str, bytes]:
        """Return the frames of the keys that exist."""
        return await self._open_client().get_many(keys)

    async def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        """Store every item."""
        await self._open_client().set_many(items, ttl)

    async def close(self) -> None:
        """Close the store."""
        if not self._closed:
            self._closed = True
            await self._client.close()

    def _open_client(self) -> _Client:
        if self._closed:
            raise CacheClosed("the keyvalue backend's async client is closed")
        return self._client


class _StoreRecipe:
    """Makes a store for each event loop that needs one."""

    def __init__(self, factory: Callable[..., Any], options: Mapping[str, Any], collection: str, name: str) -> None:
        self._factory = factory
        self._options = options
        self._name = name
        self.collection = collection

    def make(self) -> AsyncKeyValue:
        """Return a new store.

        Raises:
            TierError: this fails.
        """
        try:
            store = self._factory(**self._options)
        except Exception as error:  # noqa: BLE001  (a store may raise anything)
            # Leave its message out: it may repeat an option, and one option may be the password.
            raise TierError(
                f"cannot make {self._name} ({type(error).__name__}); check the options of the tier"
            ) from None
        if not isinstance(store, AsyncKeyValue):
            raise TierError(f"{self._name} returned a {type(store).__name__}, which is not a store of py-key-value-aio")
        return store


class _Client:
    """One store. The first call makes it, in the event loop that it then belongs to."""

    def __init__(self, recipe: _StoreRecipe) -> None:
        self._recipe = recipe
        self._store: AsyncKeyValue | None = None

    def _get_store(self) -> AsyncKeyValue:
        if self._store is None:
            self._store = self._recipe.make()
        return self._store

    async def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        unique = list(dict.fromkeys(keys))
        if not unique:
            return {}
        values = await self._get_store().get_many(unique, collection=self._recipe.collection)
        return {key: _decode_frame(value) for key, value in zip(unique, values, strict=True) if value is not None}

    async def set_many(self, items: Mapping[str, bytes], ttl: float | None) -> None:
        if items:
            values = [{FIELD: b64encode(frame).decode()} for frame in items.values()]
            await self._get_store().put_many(list(items), values, collection=self._recipe.collection, ttl=ttl)

    async def delete_many(self, keys: Sequence[str]) -> None:
        if keys:
            await self._get_store().delete_many(list(dict.fromkeys(keys)), collection=self._recipe.collection)

    async def close(self) -> None:
        store, self._store = self._store, None
        close = getattr(store, "close", None)  # not every store has a close method
        if close is not None:
            await close()


def _decode_frame(value: Mapping[str, Any]) -> bytes:
    try:
        return b64decode(value[FIELD], validate=True)
    except (KeyError, TypeError, ValueError):
        return b""


def _find_factory(store: str, options: Mapping[str, Any]) -> Callable[..., Any]:
    """Return the class or function that ``store`` names, after checking that it accepts the options.

    Raises:
        ConfigError: it does not exist, or does not accept the options.
    """
    module, _, name = store.partition(":")
    try:
        found: Any = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        form = '"module:name", such as "key_value.aio.stores.memory:MemoryStore"'
        raise ConfigError(f"store: cannot load {store} ({error}); it must have the form {form}") from error
    if not callable(found):
        raise ConfigError(f"store: {store} must be a class or a function, got a {type(found).__name__}")
    try:
        inspect.signature(found).bind(**options)
    except TypeError as error:
        raise ConfigError(f"options: {store} does not accept them ({error})") from error
    except ValueError:  # a class written in C may have no signature to check
        pass
    return found  # type: ignore[no-any-return]


_live_backends: weakref.WeakSet[KeyValueBackend] = weakref.WeakSet()
_abandoned: list[object] = []
"""Stores and loops of the parent process, kept so that a forked child does not close them."""


def _restart_in_child() -> None:
    for backend in list(_live_backends):
        backend.restart()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_restart_in_child)


@hookimpl
def embedonce_backends() -> Mapping[str, type]:
    """Return this module's backend by name."""
    return {"keyvalue": KeyValueBackend}
