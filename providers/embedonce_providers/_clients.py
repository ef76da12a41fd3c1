"""The clients of a vendor's package: made when first needed, one for all threads and one for each event loop."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary, WeakSet


class Closes(Protocol):
    def close(self) -> Any: ...


Sync = TypeVar("Sync", bound=Closes)
Async = TypeVar("Async")

CLOSE_SECONDS = 2.0
"""How long closing waits for the client of a loop that runs in another thread."""


def need(package: str) -> None:
    """Say that a package is missing before it is imported, which takes a second and waits for the first miss.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    if find_spec(package) is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)


@dataclass(slots=True)
class _Used(Generic[Sync]):
    """A blocking client, and by how many calls it is used at this moment."""

    client: Sync
    calls: int = 0
    closed: bool = False


class Clients(Generic[Sync, Async]):
    """A blocking client for all threads, and an async one for each event loop, whose connections belong to it.

    The async client of a loop is closed with the loop, when ``asyncio.run`` or whatever runs it shuts its
    async generators down; and by :meth:`close`. A forked child makes clients of its own: a connection
    that it shared with its parent would carry one's answers to the other.
    """

    def __init__(
        self,
        module: str,
        *,
        make: Callable[[], Sync],
        amake: Callable[[], Async],
        aclose: Callable[[Async], Awaitable[Any]],
    ) -> None:
        self._module = module
        self._make = make
        self._amake = amake
        self._aclose = aclose
        self._inherited: list[Any] = []
        self._renew()
        _all.add(self)

    def _renew(self) -> None:
        self._lock = threading.RLock()
        self._used: _Used[Sync] | None = None
        self._of_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[Async, AsyncGenerator[Async, None]]]
        self._of_loop = WeakKeyDictionary()
        self._ending: set[asyncio.Task[None]] = set()

    @contextmanager
    def using(self) -> Iterator[Sync]:
        """Give the blocking client to a call. It is not closed before the call ends, which may be left behind."""
        with self._lock:
            if self._used is None:
                self._used = _Used(self._make())
            used = self._used
            used.calls += 1
        try:
            yield used.client
        finally:
            with self._lock:
                used.calls -= 1
                last = used.closed and not used.calls
            if last:
                used.client.close()

    async def aget(self) -> Async:
        """Return the async client of the running loop."""
        loop = asyncio.get_running_loop()
        if self._module not in sys.modules:
            await asyncio.to_thread(import_module, self._module)
        held = self._of_loop.get(loop)
        if held is None:  # and nothing below lets another task of this loop run before it is there
            life = self._live(loop)
            held = await anext(life), life
            with self._lock:
                self._of_loop[loop] = held
        return held[0]

    async def _live(self, loop: asyncio.AbstractEventLoop) -> AsyncGenerator[Async, None]:
        """Yield a client once. A loop keeps track of its async generators and ends them when it ends."""
        client = self._amake()
        try:
            yield client
        finally:
            with self._lock:
                self._of_loop.pop(loop, None)
            await self._aclose(client)

    def close(self) -> None:
        """Close all clients. The one of a loop that neither runs nor has ended is closed when that loop ends."""
        with self._lock:
            used, self._used = self._used, None
            if used is not None:
                used.closed = True
            idle = used is not None and not used.calls
            of_loop = [(loop, life) for loop, (_, life) in self._of_loop.items()]
            self._of_loop.clear()
        if used is not None and idle:
            used.client.close()
        for loop, life in of_loop:
            self._end(loop, life)

    def _end(self, loop: asyncio.AbstractEventLoop, life: AsyncGenerator[Async, None]) -> None:
        async def end() -> None:
            await life.aclose()

        if not loop.is_running():
            return
        if _running_loop() is loop:
            task = loop.create_task(end())
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)
            return
        future = asyncio.run_coroutine_threadsafe(end(), loop)
        with suppress(TimeoutError):  # a loop that is held up closes it when it goes on
            future.result(CLOSE_SECONDS)

    def after_fork(self) -> None:
        """In the child: start anew, and keep what is the parent's from being closed."""
        self._inherited += [self._used, *self._of_loop.values(), *self._ending]
        self._renew()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


_all: WeakSet[Clients[Any, Any]] = WeakSet()


def _in_child() -> None:
    for clients in list(_all):
        clients.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
