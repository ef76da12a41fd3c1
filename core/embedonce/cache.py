"""The cache: a blocking and an async face of one engine."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import sys
import threading
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeAlias, TypeVar
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from ._engine.call import Answer
from ._engine.chain import Tier, chain_warnings, compose_chain, log_once
from ._engine.checks import checked_matrix, rounded
from ._engine.drift import Guarded, Moved
from ._engine.flights import Table
from ._engine.plan import Engine
from ._engine.ports import Port, Ports, step
from ._engine.routes import Route, Source, describe, plain_texts
from ._engine.tiers import LiveTier
from ._engine.upkeep import Upkeep
from ._engine.writing import Writing, draining
from .answers import ChainWarning, Explanation, Fetched, Held, Purged, TierCheck
from .contracts import AnyProvider, Backend, Normalizer, Task, Vectors
from .drift import DriftGuard
from .errors import CacheClosed, ConfigError, SpaceError, TextRefused
from .events import Event, Stats
from .functions import NoProvider, wrap
from .keys import NORMALIZERS, KeyPolicy, Value, VectorSpace, card
from .vectors import Dtype, Entry, Metadata, freeze_rows, plain_metadata

if TYPE_CHECKING:
    from typing import Self

T = TypeVar("T")

log = logging.getLogger("embedonce")
Mode: TypeAlias = Literal["read-through", "replay"]
Matrix: TypeAlias = NDArray[np.float32]

TASKS = ("document", "query")
ITER_BATCH = 1024
MOVES = 5
"""Most new spaces that one call opens for a provider that drifts."""
LAST_FLUSH = 5.0
"""Seconds that the program's end waits for the writes of caches that nobody holds any more."""

_open_caches: WeakSet[Cache] = WeakSet()


class Cache:
    """Embeds each text once: looks through a chain of tiers, and asks the provider for the rest.

    Every method that does I/O has a twin with an ``a`` before its name for use on an event loop; both
    share tiers, flights and counters, and may be used at once from threads and tasks.

    Args:
        provider: a provider, or any function ``list[str] -> vectors`` together with ``space``.
        tiers: fastest first; backends, or :class:`Tier` where one needs a TTL, a timeout or a name.
            None at all leaves a provider with de-duplication and checks.
        space: the vector space of a function, such as ``{"model": "my-model", "revision": "2"}``.
        key: what makes two requests the same.
        dtype: how finely vectors are kept *and returned*: an answer is the same before and after a restart.
        mode: ``"replay"`` computes nothing; a miss is an error.
        fallback: a provider that answers, in its own vector space, when the first one fails.
        fallback_fetch_only: the fallback answers ``fetch`` only, whose caller reads ``Fetched.space``;
            ``embed…`` raise what the first provider raised. Needed where the dimensions differ.
        drift: looks now and again whether the provider still makes the vectors that are stored.
        max_wait: seconds to wait for another call's computation of the same text before computing it too.
        flush_timeout: seconds that ``close`` and the program's end wait for background writes.
        max_queued: entries that may wait for a background write, per tier.
        listeners: called with every :data:`embedonce.events.Event`.
        clock: Unix time in seconds, for tests.

    Raises:
        SpaceError: the provider describes no vector space.
        ConfigError: the chain cannot work.
    """

    def __init__(
        self,
        provider: AnyProvider | Callable[..., Any],
        tiers: Sequence[Tier | Backend] = (),
        *,
        space: VectorSpace | Mapping[str, Any] | None = None,
        key: KeyPolicy | None = None,
        dtype: Dtype = "float32",
        mode: Mode = "read-through",
        fallback: AnyProvider | None = None,
        fallback_fetch_only: bool = False,
        drift: DriftGuard | None = None,
        max_wait: float = 60.0,
        flush_timeout: float = 5.0,
        max_queued: int = 4096,
        listeners: Iterable[Callable[[Event], None]] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        if dtype not in ("float32", "float16", "int8"):
            raise ConfigError(f'dtype is "float32", "float16" or "int8", not {dtype!r}')
        if mode not in ("read-through", "replay"):
            raise ConfigError(f'mode is "read-through" or "replay", not {mode!r}')
        for name, number in (("max_wait", max_wait), ("flush_timeout", flush_timeout), ("max_queued", max_queued - 1)):
            if not number >= 0:
                raise ConfigError(f"{name} is {'at least 1' if name == 'max_queued' else 'not below 0'}")
        self._policy = key or KeyPolicy()
        self._steps = [_normalizer(name) for name in self._policy.normalize]
        self._source = Source(wrap(provider, space), fallback=False)
        self._fallback = None if fallback is None else Source(wrap(fallback), fallback=True)
        self._fetch_only = fallback_fetch_only
        self._dtype: Dtype = dtype
        self._mode: Mode = mode
        self._flush_timeout = flush_timeout
        self._listeners = list(listeners)
        self._broken_listeners: set[int] = set()
        self._clock = clock
        self._routes: dict[tuple[Source, str], Route] = {}
        self._cards: dict[str, dict[str, Value]] = {}
        self._lock = threading.RLock()
        self._closed = False
        self._fell_back = False
        self._main = self
        """Whose tiers these are: another cache's, where :meth:`for_provider` made this one."""
        self._others: WeakSet[Cache] = WeakSet()
        """The caches that :meth:`for_provider` has made of this one."""

        chain = compose_chain(tiers, keyed=self._policy.secret is not None)
        self._warnings = tuple(chain_warnings(chain))
        log_once(self._warnings)
        self._ports = Ports()
        self._table = Table(max_queued)
        self._tiers = [
            LiveTier(
                tier,
                name,
                table=self._table,
                ports=self._ports,
                cards=self._cards,
                emit=self._emit,
                listened=lambda: bool(self._listeners),
                clock=clock,
            )
            for name, tier in chain
        ]
        engine = Engine if drift is None else partial(Guarded, guard=drift)
        self._engine: Engine = engine(
            self._tiers,
            self._table,
            dtype=dtype,
            replay=mode == "replay",
            max_wait=max_wait,
            emit=self._emit,
            clock=clock,
        )
        patience = 1.0 + max((tier.timeout or 0.0 for tier in self._tiers), default=0.0)
        self._upkeep = Upkeep(self._tiers, self._table, self._cards, patience=patience, clock=clock)
        for task in TASKS:
            self._route(self._source, task)
        if self._fallback is not None:
            self._check_fallback(self._fallback)
        self._hot = self._hot_tier()
        _open_caches.add(self)
        # Last registered, first run: what a backend has registered to close itself must come after our flush.
        _close_at_exit()

    def for_provider(
        self, provider: AnyProvider | Callable[..., Any], *, space: VectorSpace | Mapping[str, Any] | None = None
    ) -> Cache:
        """Return a cache of the same tiers that asks another provider, and has no fallback.

        Key policy, flights, queues, breakers and the tiers' counters are shared; vectors meet only where the
        providers describe the same vector space. Closing the new cache closes its provider alone, and closing
        this one ends both.

        Raises:
            SpaceError: the provider describes no vector space.
        """
        self._check_open()
        other = object.__new__(Cache)
        other.__dict__.update(self.__dict__)
        other._source = Source(wrap(provider, space), fallback=False)
        other._fallback = None
        other._fell_back = False
        other._lock = threading.RLock()
        other._routes = {}
        for task in TASKS:
            other._route(other._source, task)
        other._hot = other._hot_tier()
        self._main._others.add(other)
        return other

    # --- the blocking face --------------------------------------------------------------------

    def embed(self, text: str, task: Task = "document") -> Matrix:
        """Return the text's vector: float32, shape (d,), read-only.

        Raises:
            TextError: the text has a lone surrogate.
            ReplayMiss: it is in no tier, in replay mode.
            Exception: whatever the provider raised.
        """
        vector = self._hit(text, task)
        if vector is not None:
            return vector
        row: Matrix = step(self._rows(self._ports.blocking, [text], task))[0]
        return row

    def embed_batch(self, texts: Sequence[str], task: Task = "document") -> Matrix:
        """Return a float32 matrix of shape (n, d), row i for text i.

        Raises:
            Exception: as :meth:`embed`, for the first text that failed; what did not fail is stored.
        """
        return step(self._matrix(self._ports.blocking, texts, task))

    def embed_iter(self, texts: Iterable[str], task: Task = "document", *, batch: int = ITER_BATCH) -> Iterator[Matrix]:
        """Yield each text's vector in order, reading ``batch`` texts at a time: memory stays bounded."""
        self._check_iter(texts, batch, "embed_iter")

        def rows() -> Iterator[Matrix]:
            for window in _windows(texts, batch):
                yield from step(self._rows(self._ports.blocking, window, task))

        return rows()

    def fetch(
        self,
        texts: Sequence[str],
        task: Task = "document",
        store: bool = True,
        *,
        metadata: Sequence[Metadata | None] | None = None,
    ) -> Fetched:
        """Return the vectors with where each came from; failures are reported by position, not raised.

        ``store=False`` writes and promotes nothing. ``metadata`` (small JSON, one per text) is stored
        beside vectors that are computed now; where an entry is there already, its own stays.
        """
        return step(self._fetch(self._ports.blocking, texts, task, store=store, metadata=metadata))

    def lookup(self, texts: Sequence[str], task: Task = "document") -> Fetched:
        """Return what the tiers hold, computing nothing."""
        return step(self._lookup(self._ports.blocking, texts, task))

    def put(
        self,
        texts: Sequence[str],
        vectors: Vectors,
        task: Task = "document",
        metadata: Sequence[Metadata | None] | None = None,
    ) -> None:
        """Store vectors that you already have; a text that a tier holds keeps its entry.

        Raises:
            ProviderError: the vectors are not what a provider may return.
        """
        step(self._put(self._ports.blocking, texts, vectors, task, metadata))

    def forget(self, texts: Sequence[str], task: Task | None = None) -> None:
        """Remove the texts from every tier, for one task or for all, the fallback's vectors too.

        Another process's memory is out of reach until its TTL.

        Raises:
            EraseIncomplete: tiers that failed or cannot delete, by name.
        """
        step(self._forget(self._ports.blocking, texts, task))

    def purge(
        self,
        *,
        scope: str | None = None,
        model: str | None = None,
        version: str | None = None,
        namespace: str | None = None,
        dry_run: bool = False,
    ) -> Purged:
        """Remove all entries of the scopes that match every given part, in every tier.

        Raises:
            ValueError: nothing was given.
            EraseIncomplete: tiers that failed, cannot list or cannot delete, by name.
        """
        return step(self._purge(self._ports.blocking, scope, model, version, namespace, dry_run))

    def explain(self, text: str, task: Task = "document") -> Explanation:
        """Say what the text's key is made of, where its entry is, and why it missed."""
        return step(self._explain(self._ports.blocking, text, task))

    def contents(self) -> list[Held]:
        """Count what each tier holds, by scope; a tier that cannot say has one row with the reason."""
        self._check_open()
        return step(self._upkeep.contents(self._ports.blocking))

    def list_metadata(self, task: Task = "document") -> list[Metadata]:
        """Return the metadata of every entry of the task's vector space that has some, in no order, each entry once.

        It walks over all tiers, and sees what is in them: ``flush`` first where a tier is written in the background.

        Raises:
            TierError: a tier failed or cannot list; the message names it.
        """
        return step(self._list_metadata(self._ports.blocking, task))

    def check(self) -> list[TierCheck]:
        """Ask every tier whether it answers."""
        self._check_open()
        return step(self._upkeep.check(self._ports.blocking))

    def migrate(self) -> dict[str, str]:
        """Create or update the layout of every store that has one (Postgres), and say what was done, by tier.

        Raises:
            TierError: a store could not be changed.
        """
        self._check_open()
        return step(self._upkeep.migrate(self._ports.blocking))

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until background writes are done; False after ``timeout`` seconds (default: ``flush_timeout``)."""
        for tier in self._tiers:
            tier.writing.start_draining()
        return self._table.flushed(self._flush_timeout if timeout is None else timeout)

    def close(self) -> None:
        """Flush, within ``flush_timeout``, then close backends and provider. Calling it twice does nothing."""
        self._close(self._flush_timeout)

    def _close(self, timeout: float) -> None:
        if not self._shut():
            return
        if not self.flush(timeout):
            queued = {tier.name: n for tier in self._tiers if (n := self._table.queued(tier.name))}
            log.warning("closing with background writes not done: %s", queued or "one is still under way")
        if self._main is self:
            for other in list(self._others):
                if other._shut():
                    self._let_go(other._source.provider)
            for tier in self._tiers:
                self._let_go(tier.backend)
        self._let_go(self._source.provider)
        if self._fallback is not None:
            self._let_go(self._fallback.provider)
        if self._main is self:
            self._ports.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Cache has threads, locks and connections: it cannot be copied or pickled. "
            "Pass its configuration and call embedonce.open where it is needed"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the async face -----------------------------------------------------------------------

    async def aembed(self, text: str, task: Task = "document") -> Matrix:
        """As :meth:`embed`."""
        vector = self._hit(text, task)
        if vector is not None:
            return vector
        row: Matrix = (await self._rows(self._ports.of_running_loop(), [text], task))[0]
        return row

    async def aembed_batch(self, texts: Sequence[str], task: Task = "document") -> Matrix:
        """As :meth:`embed_batch`."""
        return await self._matrix(self._ports.of_running_loop(), texts, task)

    def aembed_iter(
        self, texts: Iterable[str] | AsyncIterable[str], task: Task = "document", *, batch: int = ITER_BATCH
    ) -> AsyncIterator[Matrix]:
        """As :meth:`embed_iter`; ``texts`` may be an async iterable."""
        self._check_iter(texts, batch, "aembed_iter")

        async def rows() -> AsyncIterator[Matrix]:
            async for window in _awindows(texts, batch):
                for row in await self._rows(self._ports.of_running_loop(), window, task):
                    yield row

        return rows()

    async def afetch(
        self,
        texts: Sequence[str],
        task: Task = "document",
        store: bool = True,
        *,
        metadata: Sequence[Metadata | None] | None = None,
    ) -> Fetched:
        """As :meth:`fetch`."""
        return await self._fetch(self._ports.of_running_loop(), texts, task, store=store, metadata=metadata)

    async def alookup(self, texts: Sequence[str], task: Task = "document") -> Fetched:
        """As :meth:`lookup`."""
        return await self._lookup(self._ports.of_running_loop(), texts, task)

    async def aput(
        self,
        texts: Sequence[str],
        vectors: Vectors,
        task: Task = "document",
        metadata: Sequence[Metadata | None] | None = None,
    ) -> None:
        """As :meth:`put`."""
        await self._put(self._ports.of_running_loop(), texts, vectors, task, metadata)

    async def aforget(self, texts: Sequence[str], task: Task | None = None) -> None:
        """As :meth:`forget`."""
        await self._forget(self._ports.of_running_loop(), texts, task)

    async def apurge(
        self,
        *,
        scope: str | None = None,
        model: str | None = None,
        version: str | None = None,
        namespace: str | None = None,
        dry_run: bool = False,
    ) -> Purged:
        """As :meth:`purge`."""
        return await self._purge(self._ports.of_running_loop(), scope, model, version, namespace, dry_run)

    async def aexplain(self, text: str, task: Task = "document") -> Explanation:
        """As :meth:`explain`."""
        return await self._explain(self._ports.of_running_loop(), text, task)

    async def acontents(self) -> list[Held]:
        """As :meth:`contents`."""
        self._check_open()
        return await self._upkeep.contents(self._ports.of_running_loop())

    async def alist_metadata(self, task: Task = "document") -> list[Metadata]:
        """As :meth:`list_metadata`."""
        return await self._list_metadata(self._ports.of_running_loop(), task)

    async def acheck(self) -> list[TierCheck]:
        """As :meth:`check`."""
        self._check_open()
        return await self._upkeep.check(self._ports.of_running_loop())

    async def aflush(self, timeout: float | None = None) -> bool:
        """As :meth:`flush`, without holding the loop up."""
        return await self._off_loop(lambda: self.flush(timeout))

    async def aclose(self) -> None:
        """As :meth:`close`, without holding the loop up."""
        port = self._ports.of_running_loop()
        if self._main is self:
            for tier in self._tiers:
                await tier.close_twin(port)
        await self._off_loop(self.close)

    async def _off_loop(self, call: Callable[[], T]) -> T:
        port = self._ports.of_running_loop()
        return await port.call(call, None, self._ports.workers, inline=False, quick=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    # --- counters -----------------------------------------------------------------------------

    def stats(self) -> Stats:
        """Return what tiers and providers did since the cache was made, in texts."""
        sources = [self._source, *([self._fallback] if self._fallback else [])]
        return Stats(
            tiers={tier.name: tier.counters.stats() for tier in self._tiers},
            providers={source.name: source.stats() for source in sources},
            shared=self._engine.shared,
        )

    def subscribe(self, listener: Callable[[Event], None]) -> None:
        """Call ``listener`` with every event from now on. One that raises is logged and stays."""
        self._listeners.append(listener)
        for cache in (self._main, *self._main._others):
            cache._hot = cache._hot_tier()

    @property
    def tiers(self) -> Sequence[str]:
        """The tiers' names, fastest first."""
        return tuple(tier.name for tier in self._tiers)

    @property
    def warnings(self) -> Sequence[ChainWarning]:
        """What works in this chain and is hardly meant, such as a network tier above a local one."""
        return self._warnings

    @property
    def provider(self) -> AnyProvider:
        return self._source.provider

    @property
    def closed(self) -> bool:
        return self._closed

    def __repr__(self) -> str:
        space = self._route(self._source, TASKS[0]).space
        chain = " -> ".join([*self.tiers, f"{space.provider} {space.model}".strip()])
        return f"<embedonce.Cache {chain}>"

    # --- steps of both faces ------------------------------------------------------------------

    def _hit(self, text: str, task: Task) -> Matrix | None:
        """Return the vector of a text whose key is known and whose entry is in a first in-process tier.

        This is the path that must stay under a microsecond: no coroutine, no lock, no event.
        """
        get, count, routes = self._hot
        if type(text) is not str or type(task) is not str or task not in routes:
            return None
        route = routes[task]
        key = route.known.get(text)
        if key is None:
            key = route.key(text)
        try:
            entry = get(key)
            if entry is None or entry.dtype != self._dtype or entry.vector.size != route.dimensions:
                return None
            expires = entry.expires
            if expires is not None and expires <= self._clock():
                return None
        except Exception:  # noqa: BLE001  (the long way counts the error, or says that the cache is closed)
            return None
        count()
        return entry.vector

    def _hot_tier(self) -> tuple[Callable[[str], Entry | None], Callable[[], int], dict[str, Route]]:
        """Return a first in-process tier's ``get``, its counter and the routes; no route where there is none.

        Whoever listens to events wants all of them, so that every hit then takes the long way.
        """
        if self._tiers and not self._listeners and not self._closed:
            first = self._tiers[0]
            caps = first.capabilities
            if caps.scope == "process" and caps.holds == "entries" and caps.get and not caps.blocking:
                routes = {task: route for (source, task), route in self._routes.items() if source is self._source}
                return first.backend.get, first.counters.single.add, routes
        return (lambda key: None), (lambda: 0), {}

    def _route(self, source: Source, task: Task) -> Route:
        if not isinstance(task, str) or not task:
            raise TypeError(f'a task is a str such as "document" or "query", not {task!r}')
        route = self._routes.get((source, task))
        if route is None:
            with self._lock:
                route = self._routes.setdefault((source, task), Route(source, task, self._policy, self._steps))
                if not isinstance(source.provider, NoProvider):
                    self._cards[route.keyer.scope] = card(self._policy, route.space)
            if hasattr(self, "_hot"):
                self._hot = self._hot_tier()
        return route

    async def _current(self, port: Port, source: Source, task: Task) -> Route:
        """Return the route to a task's space, as it is now that the provider may have drifted."""
        self._check_open()
        route = self._route(source, task)
        current = await self._engine.current(port, route)
        if current is not route:
            with self._lock:
                # Tasks that share a space leave it together.
                for place, other in list(self._routes.items()):
                    if place[0] is source and other.origin == current.origin and other.generation != current.generation:
                        self._routes[place] = current if place[1] == task else other.at(current.generation)
                self._cards[current.keyer.scope] = card(self._policy, current.space)
            self._hot = self._hot_tier()
        return self._route(source, task)

    async def _rows(self, port: Port, texts: Sequence[str], task: Task) -> list[Any]:
        answer = await self._answer(port, texts, task, rows_only=True)
        return answer.rows()

    async def _matrix(self, port: Port, texts: Sequence[str], task: Task) -> Matrix:
        answer = await self._answer(port, texts, task, rows_only=True)
        return answer.matrix()

    async def _fetch(
        self,
        port: Port,
        texts: Sequence[str],
        task: Task,
        *,
        store: bool,
        metadata: Sequence[Metadata | None] | None,
    ) -> Fetched:
        answer = await self._answer(port, texts, task, store=store, metadata=metadata)
        return answer.fetched()

    async def _lookup(self, port: Port, texts: Sequence[str], task: Task) -> Fetched:
        if self._engine.moves:
            await self._current(port, self._source, task)
        answer = self._ask(self._source, texts, task)
        await self._engine.fetch(port, answer, compute=False)
        return answer.fetched()

    async def _answer(
        self,
        port: Port,
        texts: Sequence[str],
        task: Task,
        *,
        store: bool = True,
        metadata: Sequence[Metadata | None] | None = None,
        rows_only: bool = False,
    ) -> Answer:
        """Answer from the provider's space or, where that fails and a fallback may answer, all from the fallback's."""
        if not isinstance(texts, list):
            _refuse_str(texts, "a batch")
            texts = plain_texts(texts)  # it may be asked again, and an iterator could not be
        answer = await self._asked(port, self._source, texts, task, store=store, metadata=metadata)
        fallback = self._fallback
        if fallback is None or self._mode == "replay":
            return answer
        down = any(not isinstance(error, TextRefused) for error in answer.failed.values())
        if not down or (rows_only and self._fetch_only):
            self._note_fallback(fallback, down=False if not down else self._fell_back)
            return answer
        self._note_fallback(fallback, down=True)
        other = await self._asked(port, fallback, texts, task, store=store, metadata=metadata)
        return answer if any(not isinstance(error, TextRefused) for error in other.failed.values()) else other

    async def _asked(
        self,
        port: Port,
        source: Source,
        texts: Sequence[str],
        task: Task,
        *,
        store: bool,
        metadata: Sequence[Metadata | None] | None,
    ) -> Answer:
        """Answer from one space; where the provider drifts meanwhile and a new space is opened, all from that one."""
        moves = 0
        while True:
            if self._engine.moves:
                await self._current(port, source, task)
            answer = self._ask(source, texts, task, store=store, metadata=metadata)
            await self._engine.fetch(port, answer)
            moved = any(isinstance(error, Moved) for error in answer.failed.values())
            if not moved or moves == MOVES:
                return answer
            moves += 1

    def _note_fallback(self, fallback: Source, *, down: bool) -> None:
        if down != self._fell_back:
            self._fell_back = down
            if down:
                log.warning("provider %r fails; %r answers, in its own vector space", self._source.name, fallback.name)
            else:
                log.warning("provider %r answers again", self._source.name)

    def _ask(
        self,
        source: Source,
        texts: Sequence[str],
        task: Task,
        *,
        store: bool = True,
        metadata: Sequence[Metadata | None] | None = None,
    ) -> Answer:
        self._check_open()
        _refuse_str(texts, "a batch")
        texts = plain_texts(texts)
        route = self._route(source, task)
        keys = route.keys(texts)
        return Answer(route, keys, texts, store, _by_key(keys, metadata))

    async def _put(
        self,
        port: Port,
        texts: Sequence[str],
        vectors: Vectors,
        task: Task,
        metadata: Sequence[Metadata | None] | None,
    ) -> None:
        if self._engine.moves:
            await self._current(port, self._source, task)
        answer = self._ask(self._source, texts, task, metadata=metadata)
        who = "put was given"
        if not answer.keys and len(vectors) == 0:
            return
        rows = rounded(
            checked_matrix(vectors, len(answer.keys), dimensions=answer.dimensions, who=who), self._dtype, who
        )
        if answer.route.settle(rows.shape[1]) != rows.shape[1]:
            checked_matrix(rows, len(rows), dimensions=answer.route.dimensions, who=who)
        created = self._clock()
        entries: dict[str, Entry] = {}
        for key, row in zip(answer.keys, freeze_rows(rows), strict=True):
            entries.setdefault(key, Entry(row, created, None, answer.metadata.get(key), self._dtype))
        for keys in _windows(entries, ITER_BATCH):
            window = Answer(answer.route, keys, [answer.text_of()[key] for key in keys], store=True)
            await self._engine.put(port, window, entries)

    async def _forget(self, port: Port, texts: Sequence[str], task: Task | None) -> None:
        self._check_open()
        _refuse_str(texts, "a batch")
        texts = plain_texts(texts)
        sources = [self._source, *([self._fallback] if self._fallback else [])]
        tasks = {*TASKS, *(known for _, known in self._routes)} if task is None else {task}
        current = [await self._current(port, source, name) for source in sources for name in sorted(tasks)]
        routes = [*current, *(route.at(older) for route in current for older in range(route.generation))]
        keys = dict.fromkeys(key for route in routes for key in route.keys(texts))
        try:
            await self._upkeep.forget(port, list(keys))
        finally:
            for route in routes:
                route.discard(keys)

    async def _purge(
        self,
        port: Port,
        scope: str | None,
        model: str | None,
        version: str | None,
        namespace: str | None,
        dry_run: bool,
    ) -> Purged:
        self._check_open()
        parts = {"model": model, "version": version, "namespace": namespace}
        wanted = {name: value for name, value in parts.items() if value is not None}
        if scope is None and not wanted:
            raise ValueError("purge needs at least one of scope, model, version and namespace")
        return await self._upkeep.purge(port, scope=scope, wanted=wanted, dry_run=dry_run)

    async def _list_metadata(self, port: Port, task: Task) -> list[Metadata]:
        self._check_open()
        return await self._upkeep.metadata(port, self._route(self._source, task), self._dtype)

    async def _explain(self, port: Port, text: str, task: Task) -> Explanation:
        self._check_open()
        if not isinstance(text, str):
            raise TypeError(f"explain takes a str, not {type(text).__name__}")
        route = await self._current(port, self._source, task)
        return await self._upkeep.explain(port, route, text, self._policy, self._dtype)

    # --- composing, events, ending ------------------------------------------------------------

    def _check_fallback(self, fallback: Source) -> None:
        if self._fetch_only:
            return
        for task in TASKS:
            mine = describe(self._source.provider, task).dimensions
            other = describe(fallback.provider, task).dimensions
            if mine is None or mine != other:
                raise SpaceError(
                    f"the fallback's vectors have {other or 'unknown'} dimensions and the provider's "
                    f"{mine or 'unknown'}: they cannot stand in for each other. Give both the same dimensions, or set "
                    "fetch_only = true in [provider.fallback] and read Fetched.space"
                )

    def _emit(self, event: Event) -> None:
        for listener in self._listeners:
            try:
                listener(event)
            except Exception:
                if id(listener) not in self._broken_listeners:  # once, not once an event
                    self._broken_listeners.add(id(listener))
                    log.exception("a listener failed on %s; that it does so again is not logged", type(event).__name__)

    def _check_iter(self, texts: object, batch: int, what: str) -> None:
        self._check_open()
        _refuse_str(texts, what)
        if batch < 1:
            raise ValueError(f"{what} reads at least one text at a time: batch is {batch}")

    def _check_open(self) -> None:
        if self._closed:
            raise CacheClosed("this cache is closed; open another one")

    def _shut(self) -> bool:
        with self._lock:
            if self._closed:
                return False
            self._closed = True
        self._hot = self._hot_tier()
        return True

    def _let_go(self, closing: Any) -> None:
        close = getattr(closing, "close", None)
        if close is None:
            return
        try:
            close()
        except Exception as error:  # noqa: BLE001  (the other backends are closed all the same)
            log.warning("closing %s failed (%s)", type(closing).__name__, type(error).__name__)

    def _after_fork(self) -> None:
        """In the child: locks, flights, queue and threads are the parent's; start with our own."""
        self._ports.reset()
        self._table.reset()
        for cache in (self, *self._others):
            cache._lock = threading.RLock()
            cache._source.renew()
        if self._fallback is not None:
            self._fallback.renew()
        for tier in self._tiers:
            tier.reset()
        if self._engine.leases is not None:
            self._engine.leases.reset()


def _normalizer(name: str) -> Normalizer:
    if name in NORMALIZERS:
        return NORMALIZERS[name]
    from .plugins import normalizer

    return normalizer(name)


def _refuse_str(texts: object, what: str) -> None:
    if not hasattr(texts, "__iter__") and not hasattr(texts, "__aiter__"):
        raise TypeError(f"{what} takes a list of texts, not {type(texts).__name__}")
    if isinstance(texts, str | bytes):
        raise TypeError(
            f"{what} takes a list of texts, not one {type(texts).__name__}; for a single text there is embed"
        )


def _by_key(keys: Sequence[str], metadata: Sequence[Metadata | None] | None) -> dict[str, Metadata]:
    if metadata is None:
        return {}
    if len(metadata) != len(keys):
        raise ValueError(f"metadata has {len(metadata)} items for {len(keys)} texts")
    by_key: dict[str, Metadata] = {}
    for key, item in zip(keys, metadata, strict=True):
        if item is not None and key not in by_key:
            by_key[key] = plain_metadata(item)
    return by_key


def _windows(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(texts)
    while window := list(islice(iterator, size)):
        yield window


async def _awindows(texts: Iterable[str] | AsyncIterable[str], size: int) -> AsyncIterator[list[str]]:
    if isinstance(texts, Iterable):
        for window in _windows(texts, size):
            yield window
        return
    window = []
    async for text in texts:
        window.append(text)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


_waited = 0.0
"""Seconds for which the program's end has waited for writes already."""


def _flush_all() -> None:
    """Wait for what is queued, while pools of threads still take work: a client may need one."""
    global _waited
    start = time.monotonic()
    caches = _end_each(start, lambda cache, timeout: cache.flush(timeout))
    # What the others have not written in their time ends when they are closed.
    _wait_for(set(draining).difference(tier.writing for cache in caches for tier in cache._tiers), start)
    _waited = time.monotonic() - start


def _close_all() -> None:
    """Flush and close what the program left open, and wait for writes of caches that are gone already."""
    start = time.monotonic() - _waited
    _end_each(start, lambda cache, timeout: cache._close(timeout))
    _wait_for(draining, start)


def _end_each(start: float, end: Callable[[Cache, float], object]) -> list[Cache]:
    """End and return all open caches. Together they take no longer than the longest would alone."""
    caches = list(_open_caches)
    for cache in caches:
        for tier in cache._tiers:
            tier.writing.start_draining()
    for cache in caches:
        end(cache, max(0.0, start + cache._flush_timeout - time.monotonic()))
    return caches


def _wait_for(writings: Iterable[Writing], start: float) -> None:
    for writing in list(writings):
        writing.wait_until_drained(max(0.0, start + LAST_FLUSH - time.monotonic()))


@functools.cache
def _flush_at_exit() -> None:
    """See that :func:`_flush_all` runs when this process ends.

    Callbacks of atexit come when the pools of concurrent.futures, asyncio's among them, have been shut. Before that
    there is one place alone, that in which they are shut themselves: what was registered last is called first.
    """
    with suppress(RuntimeError):  # this process is ending already
        import concurrent.futures.thread  # noqa: F401  (registers what shuts them)

        register = getattr(threading, "_register_atexit", None)
        if register is not None:
            register(_flush_all)


def _close_at_exit() -> None:
    """See that :func:`_close_all` runs when this process ends, before anything that was registered until now."""
    _flush_at_exit()
    atexit.unregister(_close_all)
    atexit.register(_close_all)
    if "multiprocessing.process" in sys.modules:
        from multiprocessing import parent_process
        from multiprocessing.util import Finalize

        if parent_process() is not None:  # a child that was forked ends without atexit
            Finalize(None, _close_all, exitpriority=100)


def _after_fork_in_child() -> None:
    draining.clear()
    for cache in list(_open_caches):
        cache._after_fork()
    if "multiprocessing.util" in sys.modules:
        from multiprocessing.util import register_after_fork

        # multiprocessing forgets in the child what is to run at its end, and then calls what was registered so.
        register_after_fork(_open_caches, lambda caches: _close_at_exit())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
