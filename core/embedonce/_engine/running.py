"""A running chain, with everything that its caches share, and the steps that close all chains at exit."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypeVar
from weakref import WeakSet

from embedonce._messages import format_count
from embedonce.contracts import Backend, Importer, Normalizer
from embedonce.drift import DriftGuard
from embedonce.errors import ImportRefused, SpaceError
from embedonce.events import Computed, Event, ProviderStats, Stats, Stored
from embedonce.functions import NoProvider
from embedonce.keys import KEY_PREFIX, KeyPolicy, Value, card
from embedonce.vectors import NO_WORK, Dtype

from .chain import Tier, choose_lease, compose_chain, find_chain_warnings, find_longest_ttl, log_once
from .drift import DriftCheckingEngine
from .flights import InFlight
from .governing import GovernedChain, choose_governor
from .import_checks import check_source
from .imports import Import, ImportOptionError, check_imports, choose_name
from .leases import Leases
from .ledger import Ledger
from .plan import Engine
from .ports import Port, Ports
from .recording import SavingsRecorder
from .repeated_warnings import RepeatedWarnings
from .routes import LiveProvider, Route
from .served import ServedModels
from .tiers import LiveTier
from .upkeep import Upkeep
from .writing import TierWriter, draining_writers

if TYPE_CHECKING:
    from .call import Answer
    from .importing import LiveImporter

log = logging.getLogger("embedonce")

T = TypeVar("T")

Mode: TypeAlias = Literal["read-through", "replay"]

EXIT_FLUSH_SECONDS = 5.0
"""Maximum number of seconds to wait, at exit, for writes of caches that have been garbage-collected."""

MAX_CARDS = 1024
"""Number of space cards above which the cards that nothing uses are dropped."""

_closing_warnings = RepeatedWarnings()

_open_chains: WeakSet[RunningChain] = WeakSet()
_open_lock = threading.RLock()
"""Guards ``_open_chains``, because iterating over the set fails if another thread adds a chain to the set."""


class CacheOverChain(Protocol):
    """The methods that a chain calls on each of its caches."""

    def _refresh_hot_path(self) -> None:
        """Determine again whether hits can take the fast path."""

    def _mark_closed(self) -> bool:
        """Refuse calls from now on. Return False if the cache was closed already."""
        ...

    def _close_providers(self) -> None: ...

    def _list_scopes(self) -> set[str]:
        """Return the scopes whose keys the cache can make at this moment."""
        ...

    def _discard_texts(self, keys: Collection[str]) -> None:
        """Remove from the memos every text that has one of the keys."""

    def _reset_after_fork(self) -> None:
        """Replace locks and threads in a forked child."""


class RunningChain:
    """The tiers of one chain, and everything that the caches of the chain share: flights, queues, threads, events."""

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
        self.flush_timeout = flush_timeout
        self.clock = clock
        self.cards: dict[str, dict[str, Value]] = {}
        """The space card of each scope. A card is stored beside its scope's entries. Copy the dict before a loop."""
        self._max_cards = MAX_CARDS
        self._caches: WeakSet[CacheOverChain] = WeakSet()
        self._lock = threading.RLock()
        """Guards ``_caches``, because one thread may create a cache while another thread iterates over the set."""
        self._owner: CacheOverChain | None = None
        self.listeners = list(listeners)
        self.write_listeners: list[Callable[[Event], None]] = []
        """Functions that are called only when a provider has computed vectors, or when a tier was written to."""
        self._broken_listeners: set[int] = set()

        chain = compose_chain(tiers, keyed=policy.secret is not None)
        self.warnings = tuple(find_chain_warnings(chain, replays=mode == "replay"))
        log_once(self.warnings)
        governor = choose_governor()
        self.governed = None if governor is None else GovernedChain(governor, chain)
        """What the governor of a test session has changed; None without a governor."""
        chain = chain if self.governed is None else self.governed.tiers
        self.replays = mode == "replay" or self.is_replayed
        lease = choose_lease(chain, allow_default=not self.replays)
        longest_ttl = find_longest_ttl(chain)
        self.ports = Ports()
        self.ledger = Ledger([name for name, _ in chain])
        self.in_flight = InFlight(max_queued)
        self.tiers = [
            self._make_tier(
                tier,
                name,
                lease=lease.seconds if lease is not None and lease.tier == name else None,
                longest_ttl=longest_ttl,
            )
            for name, tier in chain
        ]
        self.served = ServedModels(self.tiers, self.cards)
        leases = next(
            (
                Leases(tier, tier.lease, self.in_flight, is_default=lease.is_default)
                for tier in self.tiers
                if lease is not None and tier.lease is not None
            ),
            None,
        )
        engine = Engine if drift is None else partial(DriftCheckingEngine, guard=drift)
        self.engine: Engine = engine(
            self.tiers,
            self.in_flight,
            served=self.served,
            leases=leases,
            dtype=dtype,
            replay=self.replays,
            max_wait=max_wait,
            ledger=self.ledger,
            emit=self.emit,
            clock=clock,
        )
        self.importers: Sequence[LiveImporter] = ()
        self.recorder = SavingsRecorder(self.tiers, self.ledger, clock)
        self.engine.requests.watchers.append(self.recorder.record_if_due)
        busy_timeout = 1.0 + max((tier.timeout or 0.0 for tier in self.tiers), default=0.0)
        self.upkeep = Upkeep(
            self.tiers, self.in_flight, self.cards, self.served, busy_timeout=busy_timeout, clock=clock
        )

    def _make_tier(self, tier: Tier, name: str, *, lease: float | None, longest_ttl: float | None) -> LiveTier:
        return LiveTier(
            tier,
            name,
            lease=lease,
            longest_ttl=longest_ttl,
            in_flight=self.in_flight,
            ports=self.ports,
            ledger=self.ledger,
            cards=self.cards,
            emit=self.emit,
            has_listeners=lambda: bool(self.listeners or self.write_listeners),
            clock=self.clock,
        )

    def make_outside_tier(self, backend: Tier | Backend) -> LiveTier:
        """Return a tier that is not in the chain, for a copy or an export. The caller closes its backend.

        Raises:
            ConfigError: it cannot be a tier.
        """
        [(name, tier)] = compose_chain([backend], keyed=self.policy.secret is not None)
        return self._make_tier(tier, name, lease=None, longest_ttl=None)

    @property
    def is_replayed(self) -> bool:
        """Whether a governor replays the answers of calls."""
        return self.governed is not None and self.governed.replays

    @property
    def is_recorded(self) -> bool:
        """Whether a governor is told the answer of each call."""
        return self.governed is not None and not self.governed.replays

    def report_answer(self, answer: Answer) -> None:
        """Tell the governor, if there is one, what a call has answered."""
        if self.governed is not None:
            route = answer.route
            self.governed.report(answer, self.cards.get(route.keyer.scope) or card(route.policy, route.space))

    def add_imports(self, imports: Sequence[Import | Importer], source: LiveProvider) -> None:
        """Ask importers for the texts of this provider that no tier has, or of all providers if this is none.

        Raises:
            ImportOptionError: an importer cannot be used.
            ImportRefused: a source has vectors of other tasks.
        """
        checked = check_imports(imports)
        if self.governed is not None and self.governed.replays:
            self.governed.replaced += [one.importer for one in checked]
            return
        if not checked:
            return
        # Most caches have no importers, so these modules are not imported with the package.
        from .import_steps import ImportSteps
        from .importing import LiveImporter

        provider = None if isinstance(source.provider, NoProvider) else source.provider
        live: list[LiveImporter] = []
        for place, one in enumerate(checked):
            taken = {"provider", *(tier.name for tier in self.tiers), *(other.name for other in live)}
            try:
                if provider is not None:
                    check_source(one.importer.source, provider, one.task)
            except ImportRefused as error:
                raise ImportOptionError(str(error), place) from error
            except SpaceError as error:
                if one.task == "document":
                    raise  # not an error of the importer's task
                raise ImportOptionError(str(error), place, "task") from error
            live.append(
                LiveImporter(
                    one,
                    choose_name(one, taken),
                    provider=provider,
                    namespace=self.policy.namespace,
                    dtype=self.dtype,
                    emit=self.emit,
                )
            )
        self.importers = live
        self.engine.imports = ImportSteps(
            live,
            self.tiers,
            self.in_flight,
            dtype=self.dtype,
            replays=self.replays,
            store=self.engine.store,
            take_flights=self.engine.take_flights,
            clock=self.clock,
        )

    def close_at_exit(self, owner: CacheOverChain) -> None:
        """Register this chain to be flushed and closed when the process exits.

        ``owner`` is the cache that created this chain. The chain keeps this cache alive, so that it can close the
        cache's providers at exit.
        """
        self._owner = owner
        with _open_lock:
            _open_chains.add(self)
        # atexit runs callbacks in reverse order. Register our callback last, so that it flushes the chain before a
        # callback of a backend closes the backend.
        _register_close()

    def add_cache(self, cache: CacheOverChain) -> None:
        """Add a cache that uses these tiers. The chain keeps only a weak reference to the cache."""
        with self._lock:
            self._caches.add(cache)

    def _list_caches(self) -> list[CacheOverChain]:
        with self._lock:
            return list(self._caches)

    def add_space(self, route: Route) -> None:
        """Store the card and the price of a route's vector space."""
        scope, described = route.keyer.scope, card(route.policy, route.space)
        self.ledger.add_space(scope, described, route.source.price)
        self.add_card(scope, described)

    def add_card(self, scope: str, card: dict[str, Value]) -> None:
        """Keep the space card of a scope, as long as a cache, a queued write or an in-process tier uses the scope."""
        if scope in self.cards:
            return
        with self._lock:
            self.cards.setdefault(scope, card)
            if len(self.cards) <= self._max_cards:
                return
            used = self._list_used_scopes() | {scope}
            unused = [other for other in self.cards if other not in used]
            for other in unused:
                del self.cards[other]
            self._max_cards = max(MAX_CARDS, 2 * len(self.cards))
        self.served.drop(unused)
        for tier in self.tiers:
            tier.writer.forget_cards(unused)

    def discard_texts(self, keys: Collection[str]) -> None:
        """Remove from the memos of all caches every text that has one of the keys."""
        for cache in self._list_caches():
            cache._discard_texts(keys)

    def list_scopes_of_caches(self) -> set[str]:
        """Return the scopes whose keys the caches of this chain can make at this moment."""
        return {scope for cache in self._list_caches() for scope in cache._list_scopes()}

    def _list_used_scopes(self) -> set[str]:
        """Return the scopes whose cards are needed. If an in-process tier cannot be listed, return all scopes."""
        used = self.list_scopes_of_caches()
        keys = self.in_flight.list_unwritten()
        for tier in self.tiers:
            # Other tiers store cards beside their entries. An in-process tier has only the cards of this chain.
            if tier.capabilities.scope == "process" and tier.capabilities.scan:
                try:
                    keys += tier.backend.scan(KEY_PREFIX)
                except Exception:  # noqa: BLE001  (a backend may raise anything)
                    return set(self.cards)
        return used | {key.split(".", 2)[1] for key in keys if key.count(".") == 2}

    # --- events -------------------------------------------------------------------------------

    def emit(self, event: Event) -> None:
        """Call every listener, and log the first error of each listener."""
        for listener in self.listeners:
            try:
                listener(event)
            except Exception:  # an error of a listener must not make the call fail
                if id(listener) not in self._broken_listeners:
                    self._broken_listeners.add(id(listener))
                    log.exception(
                        "listener failed on %s; further failures of this listener will not be logged",
                        type(event).__name__,
                    )
        if self.write_listeners and isinstance(event, Stored | Computed):
            for listener in self.write_listeners:
                listener(event)

    def watch_counters(self, watcher: Callable[[], None]) -> None:
        """Call ``watcher`` after each hit, at the end of each call, and after writes. It must not raise.

        Hits still take the fast path.
        """
        self.engine.requests.watchers.append(watcher)
        # Other events occur within a call. A write, and a computation whose call was cancelled, end after it.
        self.write_listeners.append(lambda event: watcher())
        for cache in self._list_caches():
            cache._refresh_hot_path()

    def subscribe(self, listener: Callable[[Event], None]) -> None:
        """Call ``listener`` with every event from now on."""
        self.listeners.append(listener)
        for cache in self._list_caches():
            cache._refresh_hot_path()

    def read_stats(self, providers: Mapping[str, ProviderStats]) -> Stats:
        """Return the counters of the tiers and of the requests, together with those of some providers."""
        requested, found, shared, passed_by = self.engine.requests.read()
        spaces = self.ledger.read()
        fast_hits = self.ledger.count_hot_hits()
        saved = {
            tier.name: sum((space.saved.get(tier.name, NO_WORK) for space in spaces.values()), NO_WORK)
            for tier in self.tiers
        }
        return Stats(
            tiers={tier.name: tier.read_stats(saved[tier.name]) for tier in self.tiers},
            providers=providers,
            shared=shared,
            requested=requested + fast_hits,
            found=found + fast_hits,
            passed_by=passed_by,
            spaces=spaces,
            importers={importer.name: importer.stats() for importer in self.importers},
        )

    # --- ending -------------------------------------------------------------------------------

    def flush(self, timeout: float) -> bool:
        """Wait until background writes are done, and return True; return False after ``timeout`` seconds."""
        for tier in self.tiers:
            tier.writer.start_draining()
        return self.in_flight.wait_until_flushed(timeout)

    def flush_or_warn(self, timeout: float) -> None:
        """Flush before closing, and log a warning if some writes were not done in time."""
        if not self.flush(timeout):
            queued = {tier.name: n for tier in self.tiers if (n := self.in_flight.count_queued(tier.name))}
            unfinished = ", ".join(
                f"tier {name!r}: {format_count(n, 'entry', 'entries')} queued" for name, n in queued.items()
            )
            log.warning("closing before background writes are done (%s)", unfinished or "a write is still in progress")

    def close(self, timeout: float) -> None:
        """Flush. Then close the other caches' providers, then the backends, and last the owner's providers.

        The other caches still accept calls during the flush. Closing twice is allowed.
        """
        owner = self._owner
        if owner is None or not owner._mark_closed():
            return
        self.flush_or_warn(timeout)
        # At exit, the caches are closed one after the other. Once their time is used up, no tier is asked any more.
        if timeout > 0 or not self.flush_timeout:
            self.recorder.record()
        for cache in self._list_caches():
            if cache._mark_closed():
                cache._close_providers()
        if self.engine.leases is not None:
            self.engine.leases.finish()
        kept_open = None if self.governed is None else self.governed.store
        for tier in self.tiers:
            if tier.backend is not kept_open:
                close_part(tier.backend)
        for importer in self.importers:
            close_part(importer)
        for part in self.governed.replaced if self.governed is not None else ():
            close_part(part)
        owner._close_providers()
        self.ports.close()

    async def run_off_loop(self, call: Callable[[], T]) -> T:
        """Return the result of a blocking call, which is made in a thread so that the running loop goes on."""
        return await self.ports.get_loop_port().call(call, None, self.ports.workers, inline=False, quick=False)

    async def close_twins(self, port: Port) -> None:
        """Close the native async clients of the running loop."""
        for tier in self.tiers:
            await tier.close_twin(port)

    def reset(self) -> None:
        """Start over in a forked child, because locks, flights, queued writes and threads belong to the parent."""
        self._lock = threading.RLock()
        self.ports.reset()
        self.in_flight.reset()
        self.served.reset()
        for cache in self._list_caches():
            cache._reset_after_fork()
        for tier in self.tiers:
            tier.reset()
        for importer in self.importers:
            importer.reset()
        self.engine.requests.renew_locks()
        self.ledger.renew_lock()
        self.recorder.reset()
        if self.engine.leases is not None:
            self.engine.leases.reset()


def close_part(part: Any) -> None:
    """Close a backend or provider that has ``close``. A failure is only logged, so that other parts are closed too."""
    close = getattr(part, "close", None)
    if close is None:
        return
    try:
        close()
    except Exception as error:  # noqa: BLE001  (the other parts must still be closed)
        kind = type(part).__name__
        _closing_warnings.warn(kind, "closing %s failed (%s)", kind, type(error).__name__)


# --- exit of the program --------------------------------------------------------------------------

_seconds_waited = 0.0
"""Seconds that :func:`_flush_open_chains` spent waiting.

:func:`_close_open_chains` subtracts these seconds from the time for which it may wait.
"""


def _flush_open_chains() -> None:
    """Wait for queued writes while thread pools still accept work, because a backend's client may need a pool."""
    global _seconds_waited
    start = time.monotonic()
    chains = _end_open_chains(start, lambda chain, timeout: chain.flush(timeout))
    # Each open chain was flushed for up to its flush_timeout. Writes that are still queued in a chain are dropped when
    # _close_open_chains closes the chain's backends. So wait here only for writes of garbage-collected caches.
    _wait_for_writes(set(draining_writers).difference(tier.writer for chain in chains for tier in chain.tiers), start)
    _seconds_waited = time.monotonic() - start


def _close_open_chains() -> None:
    """Flush and close the chains that are still open, and wait for writes of garbage-collected caches."""
    start = time.monotonic() - _seconds_waited
    _end_open_chains(start, lambda chain, timeout: chain.close(timeout))
    _wait_for_writes(draining_writers, start)


def _end_open_chains(start: float, end: Callable[[RunningChain, float], object]) -> list[RunningChain]:
    """Call ``end`` for every open chain, and return the chains.

    The arguments of ``end`` are the chain, and the number of seconds for which the chain may still wait. All
    chains write at the same time, so the total time is at most the longest ``flush_timeout``.
    """
    with _open_lock:
        chains = list(_open_chains)
    for chain in chains:
        for tier in chain.tiers:
            tier.writer.start_draining()
    for chain in chains:
        end(chain, max(0.0, start + chain.flush_timeout - time.monotonic()))
    return chains


def _wait_for_writes(writers: Iterable[TierWriter], start: float) -> None:
    for writer in list(writers):
        writer.wait_until_chain_is_flushed(max(0.0, start + EXIT_FLUSH_SECONDS - time.monotonic()))


@functools.cache
def _register_flush() -> None:
    """Register :func:`_flush_open_chains` to run when this process exits, before thread pools are shut down.

    A callback of ``atexit`` would run too late, because the thread pools of ``concurrent.futures`` and asyncio have
    been shut down by then. So this function uses ``threading._register_atexit``. Callbacks that are registered there
    run earlier, and the callback that was registered last runs first. Importing ``concurrent.futures.thread`` registers
    the callback that shuts the pools down. Our callback is registered after this import, so it runs before the pools
    are shut down.
    """
    with suppress(RuntimeError):  # this process is exiting already
        import concurrent.futures.thread  # noqa: F401  (registers the callback that shuts the pools down)

        register = getattr(threading, "_register_atexit", None)
        if register is not None:
            register(_flush_open_chains)


def _register_close() -> None:
    """Register :func:`_close_open_chains` to run at exit, before all callbacks that are registered already."""
    _register_flush()
    atexit.unregister(_close_open_chains)
    atexit.register(_close_open_chains)
    if "multiprocessing.process" in sys.modules:
        from multiprocessing import parent_process
        from multiprocessing.util import Finalize

        if parent_process() is not None:  # a forked child of multiprocessing does not run atexit callbacks
            Finalize(None, _close_open_chains, exitpriority=100)


def _reset_after_fork() -> None:
    global _open_lock
    _open_lock = threading.RLock()  # a thread of the parent may have held the old lock during the fork
    _closing_warnings.renew_lock()
    draining_writers.clear()
    for chain in list(_open_chains):
        chain.reset()
    if "multiprocessing.util" in sys.modules:
        from multiprocessing.util import register_after_fork

        # In the child, multiprocessing first clears its finalizers and then calls the functions registered here. So the
        # finalizer that _register_close creates in such a function is not cleared.
        register_after_fork(_open_chains, lambda chains: _register_close())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)
