"""A running chain: what the caches over it share, and what happens at the end of the program."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias
from weakref import WeakSet

from embedonce.contracts import Backend, Normalizer
from embedonce.drift import DriftGuard
from embedonce.events import Event
from embedonce.keys import KeyPolicy, Value
from embedonce.vectors import Dtype

from .chain import Tier, chain_warnings, compose_chain, log_once
from .drift import DriftCheckingEngine
from .flights import InFlight
from .plan import Engine
from .ports import Port, Ports
from .tiers import LiveTier
from .upkeep import Upkeep
from .writing import Writing, draining

log = logging.getLogger("embedonce")

Mode: TypeAlias = Literal["read-through", "replay"]

EXIT_FLUSH_SECONDS = 5.0
"""Seconds that the program's end waits for the writes of caches that nobody holds any more."""

_open_chains: WeakSet[RunningChain] = WeakSet()
_open_lock = threading.RLock()
"""Guards the set: listing it fails when another thread adds to it."""


class CacheOverChain(Protocol):
    """A cache, as the chain that it asks through knows it."""

    def _refresh_hot_path(self) -> None:
        """Look again whether a hit may take the fast path."""

    def _mark_closed(self) -> bool:
        """Refuse calls from now on; False where they were refused before."""
        ...

    def _close_providers(self) -> None: ...

    def _reset_after_fork(self) -> None:
        """In a forked child: take new locks and threads."""


class RunningChain:
    """The tiers of one chain, with all that the caches over them share: flights, queues, threads, events."""

    def __init__(
        self,
        tiers: Sequence[Tier | Backend],
        *,
        policy: KeyPolicy,
        steps: Sequence[Normalizer],
        dtype: Dtype,
        mode: Mode,
        drift: DriftGuard | None,
        max_wait: float,
        flush_timeout: float,
        max_queued: int,
        listeners: Iterable[Callable[[Event], None]],
        clock: Callable[[], float],
    ) -> None:
        self.policy = policy
        self.steps = steps
        self.dtype: Dtype = dtype
        self.replays = mode == "replay"
        self.flush_timeout = flush_timeout
        self.clock = clock
        self.cards: dict[str, dict[str, Value]] = {}
        """By scope, the space cards that are stored beside its entries."""
        self._caches: WeakSet[CacheOverChain] = WeakSet()
        self._lock = threading.RLock()
        """Guards the set of caches, as threads may make one while another thread subscribes or closes."""
        self._owner: CacheOverChain | None = None
        self.listeners = list(listeners)
        self._broken_listeners: set[int] = set()

        chain = compose_chain(tiers, keyed=policy.secret is not None)
        self.warnings = tuple(chain_warnings(chain))
        log_once(self.warnings)
        self.ports = Ports()
        self.in_flight = InFlight(max_queued)
        self.tiers = [
            LiveTier(
                tier,
                name,
                in_flight=self.in_flight,
                ports=self.ports,
                cards=self.cards,
                emit=self.emit,
                has_listeners=lambda: bool(self.listeners),
                clock=clock,
            )
            for name, tier in chain
        ]
        engine = Engine if drift is None else partial(DriftCheckingEngine, guard=drift)
        self.engine: Engine = engine(
            self.tiers,
            self.in_flight,
            dtype=dtype,
            replay=self.replays,
            max_wait=max_wait,
            emit=self.emit,
            clock=clock,
        )
        write_wait = 1.0 + max((tier.timeout or 0.0 for tier in self.tiers), default=0.0)
        self.upkeep = Upkeep(self.tiers, self.in_flight, self.cards, write_wait=write_wait, clock=clock)

    def close_at_exit(self, owner: CacheOverChain) -> None:
        """See that writes are flushed, and backends and providers closed, when this process ends.

        ``owner`` is the cache that has made this chain. It lives for as long as the chain, which closes its providers.
        """
        self._owner = owner
        with _open_lock:
            _open_chains.add(self)
        # Last registered, first run: what a backend has registered to close itself must come after our flush.
        _register_close()

    def add_cache(self, cache: CacheOverChain) -> None:
        """Take note of a cache that asks through these tiers, for as long as somebody holds it."""
        with self._lock:
            self._caches.add(cache)

    def _list_caches(self) -> list[CacheOverChain]:
        with self._lock:
            return list(self._caches)

    # --- events -------------------------------------------------------------------------------

    def emit(self, event: Event) -> None:
        """Call every listener; one that raises is logged once."""
        for listener in self.listeners:
            try:
                listener(event)
            except Exception:  # a broken listener must not cost an embedding
                if id(listener) not in self._broken_listeners:  # once, not once an event
                    self._broken_listeners.add(id(listener))
                    log.exception("a listener failed on %s; that it does so again is not logged", type(event).__name__)

    def subscribe(self, listener: Callable[[Event], None]) -> None:
        """Call a listener with every event from now on."""
        self.listeners.append(listener)
        for cache in self._list_caches():
            cache._refresh_hot_path()

    # --- ending -------------------------------------------------------------------------------

    def flush(self, timeout: float) -> bool:
        """Wait until background writes are done; False after ``timeout`` seconds."""
        for tier in self.tiers:
            tier.writing.start_draining()
        return self.in_flight.wait_until_flushed(timeout)

    def flush_or_warn(self, timeout: float) -> None:
        """Flush before something is closed, and log what could not be written in time."""
        if not self.flush(timeout):
            queued = {tier.name: n for tier in self.tiers if (n := self.in_flight.count_queued(tier.name))}
            log.warning("closing with background writes not done: %s", queued or "one is still under way")

    def close(self, timeout: float) -> None:
        """Flush, then close the other caches' providers, the backends, and the owner's providers, once.

        The other caches answer until the flush is done.
        """
        owner = self._owner
        if owner is None or not owner._mark_closed():
            return
        self.flush_or_warn(timeout)
        for cache in self._list_caches():
            if cache._mark_closed():
                cache._close_providers()
        for tier in self.tiers:
            close_part(tier.backend)
        owner._close_providers()
        self.ports.close()

    async def close_twins(self, port: Port) -> None:
        """Close the native async clients of the running loop."""
        for tier in self.tiers:
            await tier.close_twin(port)

    def reset(self) -> None:
        """In a forked child: locks, flights, queue and threads are the parent's; start with our own."""
        self._lock = threading.RLock()
        self.ports.reset()
        self.in_flight.reset()
        for cache in self._list_caches():
            cache._reset_after_fork()
        for tier in self.tiers:
            tier.reset()
        if self.engine.leases is not None:
            self.engine.leases.reset()


def close_part(part: Any) -> None:
    """Close a backend or a provider, if it can be closed; a failure is logged, so that the others are closed too."""
    close = getattr(part, "close", None)
    if close is None:
        return
    try:
        close()
    except Exception as error:  # noqa: BLE001  (the other backends are closed all the same)
        log.warning("closing %s failed (%s)", type(part).__name__, type(error).__name__)


# --- the end of the program -----------------------------------------------------------------------

_seconds_waited = 0.0
"""Seconds for which the program's end has waited for writes already."""


def _flush_open_chains() -> None:
    """Wait for what is queued, while pools of threads still take work: a client may need one."""
    global _seconds_waited
    start = time.monotonic()
    chains = _end_open_chains(start, lambda chain, timeout: chain.flush(timeout))
    # What the others have not written in their time ends when they are closed.
    _wait_for_writes(set(draining).difference(tier.writing for chain in chains for tier in chain.tiers), start)
    _seconds_waited = time.monotonic() - start


def _close_open_chains() -> None:
    """Flush and close what the program left open, and wait for writes of caches that are gone already."""
    start = time.monotonic() - _seconds_waited
    _end_open_chains(start, lambda chain, timeout: chain.close(timeout))
    _wait_for_writes(draining, start)


def _end_open_chains(start: float, end: Callable[[RunningChain, float], object]) -> list[RunningChain]:
    """End and return all open chains. Together they take no longer than the longest would alone."""
    with _open_lock:
        chains = list(_open_chains)
    for chain in chains:
        for tier in chain.tiers:
            tier.writing.start_draining()
    for chain in chains:
        end(chain, max(0.0, start + chain.flush_timeout - time.monotonic()))
    return chains


def _wait_for_writes(writings: Iterable[Writing], start: float) -> None:
    for writing in list(writings):
        writing.wait_until_drained(max(0.0, start + EXIT_FLUSH_SECONDS - time.monotonic()))


@functools.cache
def _register_flush() -> None:
    """See that :func:`_flush_open_chains` runs when this process ends.

    Callbacks of atexit come when the pools of concurrent.futures, asyncio's among them, have been shut. Before that
    there is one place alone, that in which they are shut themselves: what was registered last is called first.
    """
    with suppress(RuntimeError):  # this process is ending already
        import concurrent.futures.thread  # noqa: F401  (registers what shuts them)

        register = getattr(threading, "_register_atexit", None)
        if register is not None:
            register(_flush_open_chains)


def _register_close() -> None:
    """See that :func:`_close_open_chains` runs when this process ends, before anything that was registered until now."""
    _register_flush()
    atexit.unregister(_close_open_chains)
    atexit.register(_close_open_chains)
    if "multiprocessing.process" in sys.modules:
        from multiprocessing import parent_process
        from multiprocessing.util import Finalize

        if parent_process() is not None:  # a child that was forked ends without atexit
            Finalize(None, _close_open_chains, exitpriority=100)


def _reset_after_fork() -> None:
    global _open_lock
    _open_lock = threading.RLock()  # a thread of the parent may have held it, and is not here
    draining.clear()
    for chain in list(_open_chains):
        chain.reset()
    if "multiprocessing.util" in sys.modules:
        from multiprocessing.util import register_after_fork

        # multiprocessing forgets in the child what is to run at its end, and then calls what was registered so.
        register_after_fork(_open_chains, lambda chains: _register_close())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)
