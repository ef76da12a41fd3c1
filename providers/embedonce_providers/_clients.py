"""The clients of a vendor's package: one blocking client for all threads, and one async client for each event loop.

Each client is made when it is first needed.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary, WeakSet


class Closeable(Protocol):
    def close(self) -> Any: ...


Sync = TypeVar("Sync", bound=Closeable)
Async = TypeVar("Async")

CLOSE_SECONDS = 2.0
"""Maximum number of seconds that ``close`` waits until an event loop in another thread has closed its client."""

_imported: set[str] = set()
"""The modules whose import has ended. A module is in ``sys.modules`` already while another thread imports it. An import
in the event loop would then wait for that thread, and no other task would run meanwhile."""


def require_package(package: str) -> None:
    """Check that a package is installed, without importing it.

    Importing the package takes a second, so the package is imported only at the first miss, or by ``prepare``.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    if find_spec(package) is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)


@dataclass(slots=True)
class _SharedClient(Generic[Sync]):
    """The blocking client, and the number of calls that use it at this moment."""

    client: Sync
    calls: int = 0
    closed: bool = False


class Clients(Generic[Sync, Async]):
    """One blocking client for all threads, and one async client per event loop.

    An async client cannot be shared between event loops, because its connections belong to a single loop.

    An async client is closed by :meth:`close`, or when its event loop shuts down async generators (``asyncio.run`` does
    this at its end). A forked child makes its own clients. If a child and its parent shared a connection, each of them
    could read the answers to the other's requests.
    """

    def __init__(
        self,
        module: str,
        *,
        make: Callable[[], Sync],
        amake: Callable[[], Async],
        aclose: Callable[[Async], Awaitable[Any]],
        close: Callable[[Sync], object] | None = None,
    ) -> None:
        self._module = module
        self._make = make
        self._amake = amake
        self._aclose = aclose
        self._close = close or (lambda client: client.close())
        self._inherited: list[Any] = []
        self._reset()
        _all_clients.add(self)

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._blocking: _SharedClient[Sync] | None = None
        self._by_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[Async, AsyncGenerator[Async, None]]]
        self._by_loop = WeakKeyDictionary()
        self._closing: set[asyncio.Task[None]] = set()

    @contextmanager
    def borrow(self) -> Iterator[Sync]:
        """Lend the blocking client to a call.

        The client stays open until the call ends, even if :meth:`close` is called before that.
        """
        with self._lock:
            if self._blocking is None:
                self._blocking = _SharedClient(self._make())
            shared = self._blocking
            shared.calls += 1
        try:
            yield shared.client
        finally:
            with self._lock:
                shared.calls -= 1
                close_now = shared.closed and not shared.calls
            if close_now:
                self._close(shared.client)

    def prepare(self) -> None:
        """Import the package."""
        import_module(self._module)
        _imported.add(self._module)

    async def aget(self) -> Async:
        """Return the async client of the running loop."""
        loop = asyncio.get_running_loop()
        if self._module not in _imported:
            await asyncio.to_thread(self.prepare)
        entry = self._by_loop.get(loop)
        if entry is None:
            # The generator reaches its yield without suspending. So no other asyncio task of this loop runs before the
            # entry is stored.
            generator = self._hold_client(loop)
            entry = await anext(generator), generator
            with self._lock:
                self._by_loop[loop] = entry
        return entry[0]

    async def _hold_client(self, loop: asyncio.AbstractEventLoop) -> AsyncGenerator[Async, None]:
        """Yield a client, and close it when this generator ends.

        An event loop tracks its async generators and ends them when the loop shuts down.
        """
        client = self._amake()
        try:
            yield client
        finally:
            with self._lock:
                self._by_loop.pop(loop, None)
            await self._aclose(client)

    def close(self) -> None:
        """Close the clients that are not in use.

        A blocking client that is in use is closed when its last call ends. The async client of an event loop that is
        not running at the moment is closed when that loop shuts down.
        """
        with self._lock:
            shared, self._blocking = self._blocking, None
            if shared is not None:
                shared.closed = True
            is_idle = shared is not None and not shared.calls
            generators = [(loop, generator) for loop, (_, generator) in self._by_loop.items()]
            self._by_loop.clear()
        if shared is not None and is_idle:
            self._close(shared.client)
        for loop, generator in generators:
            self._close_in_loop(loop, generator)

    def _close_in_loop(self, loop: asyncio.AbstractEventLoop, generator: AsyncGenerator[Async, None]) -> None:
        async def close_generator() -> None:
            await generator.aclose()

        if not loop.is_running():
            return
        if _running_loop() is loop:
            task = loop.create_task(close_generator())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
            return
        future = asyncio.run_coroutine_threadsafe(close_generator(), loop)
        with suppress(TimeoutError):  # a blocked loop closes its client later
            future.result(CLOSE_SECONDS)

    def after_fork(self) -> None:
        """Start without clients in the child.

        Keep the parent's clients alive, so that the garbage collector does not close them.
        """
        self._inherited += [self._blocking, *self._by_loop.values(), *self._closing]
        self._reset()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


_all_clients: WeakSet[Clients[Any, Any]] = WeakSet()


def _reset_in_child() -> None:
    for clients in list(_all_clients):
        clients.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_in_child)
