"""Requests for one provider's vectors: the cache's methods as coroutines."""

from __future__ import annotations

import threading
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Iterator,
    Sequence,
)
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakSet

from embedonce.admission import Admit
from embedonce.answers import Explanation, Fetched, Held, ProviderCheck, Purged
from embedonce.contracts import Task, Vectors
from embedonce.errors import CacheClosed, EraseIncomplete, SpaceError
from embedonce.functions import NoProvider
from embedonce.keys import KeyPolicy, SpaceCard, card
from embedonce.tasks import TASKS, require_task
from embedonce.vectors import (
    Cost,
    Dtype,
    Entry,
    Matrix,
    Metadata,
    Vector,
    freeze_rows,
)

from .ahead import read_windows, read_windows_async, run_ahead, run_ahead_async
from .call import Answer, BegunCall, map_metadata
from .checks import check_costs, check_matrix, round_matrix
from .drift import SpaceLeft
from .estimating import Estimator
from .fresh import compute_anew
from .hot_path import HotPath
from .ports import Port, run_blocking
from .provider_checks import check_provider
from .routes import LiveProvider, Route, copy_texts, describe_space, require_texts
from .running import RunningChain, close_part
from .single_reads import read_one
from .upkeep import FoundKeys

ITER_BATCH = 1024
MAX_ROUTES = 256
"""Maximum number of routes that a cache keeps. The oldest route is dropped, and is made again when it is needed."""
MAX_TASKS = 10_000
"""Maximum number of names of tasks with a vector space of their own that a cache keeps, to erase texts in all tasks."""
MOVES = 5
"""Maximum number of times that one call moves to a new vector space because the provider has drifted."""


class Requests(HotPath):
    """Serves requests for one provider's vectors from a chain that several caches may share."""

    def __init__(
        self,
        chain: RunningChain,
        source: LiveProvider,
        fallback: LiveProvider | None,
        *,
        fetch_only: bool,
        policy: KeyPolicy | None = None,
    ) -> None:
        self._chain = chain
        self._policy = policy or chain.policy
        self._source = source
        self._fallback = fallback
        self._fetch_only = fetch_only
        self._dtype: Dtype = chain.dtype
        self._clock = chain.clock
        self._longest_life = chain.tiers[0].codec.longest_life if chain.tiers else 0.0
        self._routes: dict[tuple[LiveProvider, str], Route] = {}
        """Changed with the lock held. Other threads may change it at any time, so copy it before a loop."""
        self._other_tasks: dict[str, None] = {}
        """Names of the tasks whose vector space is neither that of documents nor that of queries."""
        self._knows_all_tasks = True
        self._lock = threading.RLock()
        self._closed = False
        self._dependent: WeakSet[Requests] = WeakSet()
        """Caches that use this cache's providers. They are closed together with this cache."""
        self._uses_fallback = False
        for task in TASKS:
            self._get_route(source, task)
        if fallback is not None and not fetch_only:
            _check_dimensions(source, fallback)
        self._refresh_hot_path()
        chain.add_cache(self)

    # --- routes -------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise CacheClosed("this cache is closed; open a new one")

    def _get_route(self, source: LiveProvider, task: Task) -> Route:
        require_task(task)
        route = self._routes.get((source, task))
        if route is None:
            chain = self._chain
            with self._lock:
                route = self._routes.get((source, task))
                if route is None:
                    route = self._routes[source, task] = Route(source, task, self._policy, chain.steps)
                    self._limit_routes(source, task, route)
            if not isinstance(source.provider, NoProvider):
                chain.add_space(route)
            if hasattr(self, "_hot"):
                self._refresh_hot_path()
        return route

    def _limit_routes(self, source: LiveProvider, task: str, route: Route) -> None:
        """Note the task of a new route, and drop the oldest route if there are too many. Hold the lock."""
        usual = [self._routes[source, name] for name in TASKS if (source, name) in self._routes]
        if task not in TASKS and all(route.origin != other.origin for other in usual):
            if len(self._other_tasks) < MAX_TASKS:
                self._other_tasks[task] = None
            elif task not in self._other_tasks:
                self._knows_all_tasks = False
        if len(self._routes) > MAX_ROUTES:
            del self._routes[next(place for place in self._routes if place[1] not in TASKS)]

    def _discard_texts(self, keys: Collection[str]) -> None:
        """Remove from the memos of all routes every text that has one of the keys."""
        with self._lock:
            routes = list(self._routes.values())
        for route in routes:
            route.discard_texts(keys)

    def _list_scopes(self) -> set[str]:
        """Return the scopes of the routes that this cache keeps."""
        with self._lock:
            return {route.keyer.scope for route in self._routes.values()}

    async def _find_current_route(self, port: Port, source: LiveProvider, task: Task) -> Route:
        """Return the route to a task's current vector space, which changes when the provider drifts."""
        self._check_open()
        chain = self._chain
        route = self._get_route(source, task)
        current = await chain.engine.find_current_route(port, route)
        if current is not route:
            with self._lock:
                # Tasks that share a vector space move to the new vector space together.
                for place, other in list(self._routes.items()):
                    if place[0] is source and other.origin == current.origin and other.generation != current.generation:
                        self._routes[place] = current if place[1] == task else other.with_generation(current.generation)
            chain.add_space(current)
            self._refresh_hot_path()
        return self._get_route(source, task)

    # --- embedding ----------------------------------------------------------------------------

    def _embed_one(self, text: str, task: Task) -> Vector:
        """Return the vector of one text. A plain hit needs no plan; everything else goes on in the plan."""
        engine, port = self._chain.engine, self._chain.ports.blocking
        begun = None
        route = self._routes.get((self._source, task)) if self._reads_singly and type(task) is str else None
        if route is not None and route.dimensions is not None and type(text) is str:
            key = route.recent_keys.get(text) or route.key(text)
            found = read_one(engine, port, route, key, text, route.dimensions)
            if isinstance(found, Entry):
                return found.vector
            begun = found
        row: Vector = run_blocking(self._embed_rows(port, [text], task, begun=begun))[0]
        return row

    async def _embed_rows(
        self, port: Port, texts: Sequence[str], task: Task, first: int = 0, *, begun: BegunCall | None = None
    ) -> list[Any]:
        answer = await self._answer_texts(port, texts, task, rows_only=True, first=first, begun=begun)
        return answer.rows()

    async def _embed_matrix(self, port: Port, texts: Sequence[str], task: Task) -> Matrix:
        answer = await self._answer_texts(port, texts, task, rows_only=True)
        return answer.matrix()

    def _embed_windows(self, texts: Iterable[str], task: Task, batch: int) -> Iterator[list[Any]]:
        """Yield the rows of a stream of texts, window by window; at most ``batch`` texts are read ahead."""
        ports, size = self._chain.ports, self._choose_window(batch)

        def list_jobs() -> Iterator[Callable[[], list[Any]]]:
            first = 0
            for window in read_windows(texts, size):
                yield lambda window=window, first=first: run_blocking(  # type: ignore[misc]
                    self._embed_rows(ports.blocking, window, task, first)
                )
                first += len(window)

        return run_ahead(lambda: ports.workers, list_jobs()) if size < batch else (job() for job in list_jobs())

    async def _embed_windows_async(
        self, texts: Iterable[str] | AsyncIterable[str], task: Task, batch: int
    ) -> AsyncGenerator[list[Any]]:
        """Like :meth:`_embed_windows`."""
        port, size = self._chain.ports.get_loop_port(), self._choose_window(batch)

        async def list_jobs() -> AsyncIterator[Callable[[], Coroutine[Any, Any, list[Any]]]]:
            first = 0
            async for window in read_windows_async(texts, size):
                yield partial(self._embed_rows, port, window, task, first)
                first += len(window)

        if size == batch:
            async for job in list_jobs():
                yield await job()
            return
        async with aclosing(run_ahead_async(list_jobs())) as windows:
            async for rows in windows:
                yield rows

    def _choose_window(self, batch: int) -> int:
        """Return the size of a window: half of ``batch``, if this is enough for the calls of the provider."""
        limits = self._source.provider.limits
        return batch // 2 if batch // 2 >= limits.max_batch * limits.concurrency else batch

    async def _fetch(
        self,
        port: Port,
        texts: Sequence[str],
        task: Task,
        *,
        store: bool,
        metadata: Sequence[Metadata | None] | None,
        fresh: bool,
        admit: Admit | None,
    ) -> Fetched:
        if admit is not None and not callable(admit):
            raise TypeError(f"admit must be a function, got {type(admit).__name__}")
        answer = await self._answer_texts(port, texts, task, store=store, metadata=metadata, fresh=fresh, admit=admit)
        return answer.to_fetched()

    async def _lookup(self, port: Port, texts: Sequence[str], task: Task) -> Fetched:
        engine = self._chain.engine
        if engine.can_change_space:
            await self._find_current_route(port, self._source, task)
        answer = self._new_answer(self._source, texts, task)
        await engine.fetch(port, answer, compute=False)
        self._chain.report_answer(answer)
        return answer.to_fetched()

    async def _begin_estimate(self, port: Port, texts: object, task: Task) -> Estimator:
        """Return an estimator for the provider's current vector space, before any text is read."""
        self._check_open()
        require_texts(texts)
        if isinstance(self._source.provider, NoProvider):
            self._source.provider.embed([], task)  # raises the error
        route = await self._find_current_route(port, self._source, task)
        return Estimator(self._chain.tiers, self._chain.in_flight, route, self._dtype)

    async def _add_to_estimate(self, port: Port, estimator: Estimator, texts: Sequence[str]) -> None:
        self._check_open()
        await estimator.add(port, copy_texts(texts, estimator.texts))

    async def _answer_texts(
        self,
        port: Port,
        texts: Sequence[str],
        task: Task,
        *,
        store: bool = True,
        metadata: Sequence[Metadata | None] | None = None,
        rows_only: bool = False,
        fresh: bool = False,
        admit: Admit | None = None,
        first: int = 0,
        begun: BegunCall | None = None,
    ) -> Answer:
        """Find vectors for all texts in one vector space: the provider's, or the fallback's if the provider fails.

        ``first`` is the position of the first text in the caller's stream; errors name positions in that stream.
        """
        if not isinstance(texts, list):  # an iterator can be read only once, and the fallback may need the texts again
            require_texts(texts)
            texts = copy_texts(texts, first)
        how = (texts, task, store, metadata, fresh and not self._chain.is_replayed, admit, first)
        answer = await self._answer_in_one_space(port, self._source, *how, begun)
        if self._fallback is not None and answer.refusal is None:
            answer = await self._choose_space(port, self._fallback, answer, how, rows_only=rows_only)
        self._chain.report_answer(answer)
        return answer

    async def _choose_space(
        self, port: Port, fallback: LiveProvider, answer: Answer, how: tuple[Any, ...], *, rows_only: bool
    ) -> Answer:
        """Return the answer in the provider's space, or that in the fallback's space if the provider has failed.

        A recorded fallback is replayed in the same way: the provider's vectors are missing then.
        """
        if self._chain.replays and not self._chain.is_replayed:
            return answer
        down = answer.has_failed_provider()
        if not down or (rows_only and self._fetch_only):
            if not down and answer.has_made_entries:  # hits do not show that the provider works
                self._log_fallback_change(fallback, down=False)
            return answer
        self._log_fallback_change(fallback, down=True)
        other = await self._answer_in_one_space(port, fallback, *how)
        is_useless = other.has_failed_provider() and other.refusal is None
        used, unused = (answer, other) if is_useless else (other, answer)
        used.take_waste(unused)
        return used

    async def _answer_in_one_space(
        self,
        port: Port,
        source: LiveProvider,
        texts: Sequence[str],
        task: Task,
        store: bool,
        metadata: Sequence[Metadata | None] | None,
        fresh: bool,
        admit: Admit | None,
        first: int,
        begun: BegunCall | None = None,
    ) -> Answer:
        """Find vectors in one vector space. If the provider drifts meanwhile, start again in the new vector space."""
        engine = self._chain.engine
        moves = 0
        left: Answer | None = None
        while True:
            if engine.can_change_space:
                await self._find_current_route(port, source, task)
            answer = self._new_answer(source, texts, task, store=store, metadata=metadata, first=first)
            answer.admit = admit
            answer.refusal = None if left is None else left.refusal
            if fresh:
                await compute_anew(engine, port, answer)
            else:
                await engine.fetch(port, answer, begun=begun)
            if answer.settle_error is not None:
                raise answer.settle_error
            if left is not None:
                answer.take_waste(left)
            moved = any(isinstance(error, SpaceLeft) for error in answer.failed.values())
            if not moved or moves == MOVES:
                return answer
            moves += 1
            left = answer

    def _log_fallback_change(self, fallback: LiveProvider, *, down: bool) -> None:
        """Log that the fallback is used now, or no longer. After many changes, the line comes up to a minute late."""
        if down == self._uses_fallback:
            return
        warn, name = self._source.warnings.warn, self._source.name
        if down:
            message = "provider %r is failing; using %r, which has its own vector space"
            is_logged = warn("failing", message, name, fallback.name)
        else:
            is_logged = warn("working", "provider %r is working again", name)
        if is_logged:
            self._uses_fallback = down

    def _new_answer(
        self,
        source: LiveProvider,
        texts: Sequence[str],
        task: Task,
        *,
        store: bool = True,
        metadata: Sequence[Metadata | None] | None = None,
        first: int = 0,
    ) -> Answer:
        """Return an answer that has the keys of these texts but no vectors yet. Texts without a key have failed."""
        self._check_open()
        require_texts(texts)
        texts = copy_texts(texts, first)
        route = self._get_route(source, task)
        keys, invalid = route.find_keys(texts, first)
        return Answer(route, keys, texts, store, map_metadata(keys, metadata), invalid, first)

    # --- storing and erasing ------------------------------------------------------------------

    async def _put(
        self,
        port: Port,
        texts: Sequence[str],
        vectors: Vectors,
        task: Task,
        metadata: Sequence[Metadata | None] | None,
        costs: Sequence[Cost | None] | None,
    ) -> None:
        engine = self._chain.engine
        if engine.can_change_space:
            await self._find_current_route(port, self._source, task)
        answer = self._new_answer(self._source, texts, task, metadata=metadata)
        all_costs = check_costs(costs, len(answer.keys))
        for error in answer.invalid.values():
            raise error
        who = "put was given"
        if not answer.keys and len(vectors) == 0:
            return
        rows = round_matrix(
            check_matrix(vectors, len(answer.keys), dimensions=answer.dimensions, who=who), self._dtype, who
        )
        if answer.route.settle_dimensions(rows.shape[1]) != rows.shape[1]:
            check_matrix(rows, len(rows), dimensions=answer.route.dimensions, who=who)
        created = self._clock()
        entries: dict[str, Entry] = {}
        for key, row, cost in zip(answer.keys, freeze_rows(rows), all_costs, strict=True):
            entries.setdefault(key, Entry(row, created, None, answer.metadata.get(key), self._dtype, *cost))
        for keys in read_windows(entries, ITER_BATCH):
            window = Answer(answer.route, keys, [answer.texts_by_key()[key] for key in keys], store=True)
            await engine.put(port, window, entries)

    async def _forget(
        self, port: Port, texts: Sequence[str], task: Task | None, where: Callable[[SpaceCard], bool] | None
    ) -> dict[str, SpaceCard]:
        self._check_open()
        require_texts(texts)
        texts = copy_texts(texts)
        if where is not None:
            if task is not None:
                raise ValueError("task and where exclude each other, because a space card has its task")
            return await self._forget_where(port, texts, where)
        sources = [self._source, *([self._fallback] if self._fallback else [])]
        tasks = {*TASKS, *list(self._other_tasks)} if task is None else {task}
        current = [await self._find_current_route(port, source, name) for source in sources for name in sorted(tasks)]
        routes = [*current, *(route.with_generation(older) for route in current for older in range(route.generation))]
        keys = dict.fromkeys(key for route in routes for key in route.keys(texts))
        try:
            await self._chain.upkeep.forget(port, FoundKeys(list(keys)))
        finally:
            self._discard_texts(keys)
        if task is None and not self._knows_all_tasks:
            raise EraseIncomplete(
                f"forget is incomplete, because texts were embedded for more than {MAX_TASKS:,} tasks, and the names "
                "of some tasks are not known any more. Call it again with each task",
                {},
            )
        return {}

    async def _forget_where(
        self, port: Port, texts: Sequence[str], where: Callable[[SpaceCard], bool]
    ) -> dict[str, SpaceCard]:
        """Remove the texts from the scopes that satisfy ``where``. Return the other scopes that hold one of them."""
        keyer = self._get_route(self._source, TASKS[0]).keyer
        normalized = [keyer.normalize(text) for text in texts]
        for text in normalized:
            keyer.key(text)  # raises the error of a text that has no key
        # A policy with other steps shares these scopes, and may have stored the text as it is.
        both = list(dict.fromkeys([*normalized, *texts]))
        found = await self._chain.upkeep.find_keys(port, both, self._policy, where)
        try:
            await self._chain.upkeep.forget(port, found)
        finally:
            self._chain.discard_texts(set(found.keys))
        return dict(found.left)

    async def _purge(
        self,
        port: Port,
        scope: str | None,
        model: str | None,
        version: str | None,
        namespace: str | None,
        where: Callable[[SpaceCard], bool] | None,
        unused: bool,
        dry_run: bool,
    ) -> Purged:
        self._check_open()
        parts = {"model": model, "version": version, "namespace": namespace}
        wanted = {name: value for name, value in parts.items() if value is not None}
        if scope is None and not wanted and where is None and not unused:
            raise ValueError("purge requires at least one of scope, model, version, namespace, where and unused")
        upkeep = self._chain.upkeep
        keep = None
        if unused:
            if not self._list_sources():
                raise ValueError("purge(unused=True) requires a provider, which says which scopes are in use")
            own = await self._find_own_cards(port, (await upkeep.read_all_cards(port)).values())
            keep = own.keys() | self._chain.list_scopes_of_caches()
        return await upkeep.purge(port, scope=scope, wanted=wanted, where=where, keep=keep, dry_run=dry_run)

    # --- checking, listing and explaining -----------------------------------------------------

    def _list_sources(self) -> list[LiveProvider]:
        """Return the provider and the fallback, as far as this cache has them."""
        sources = [self._source, *([self._fallback] if self._fallback else [])]
        return [source for source in sources if not isinstance(source.provider, NoProvider)]

    async def _contents(self, port: Port) -> list[Held]:
        self._check_open()
        held = await self._chain.upkeep.contents(port)
        if not self._list_sources():
            return held
        own = await self._find_own_cards(port, [one.card for one in held if one.card is not None])
        return [one if one.error is not None else replace(one, current=one.scope in own) for one in held]

    async def _find_own_cards(self, port: Port, cards: Iterable[SpaceCard]) -> dict[str, SpaceCard]:
        """Return the cards of the scopes that the provider and the fallback use now, for every task that a card names.

        The cards are by scope.
        """
        chain = self._chain
        stored = {task for card in cards if isinstance(task := card.get("task"), str) and task}
        with self._lock:
            known = {task for _, task in self._routes}
        own: dict[str, SpaceCard] = {}
        for source in self._list_sources():
            for task in {*TASKS, *stored, *known}:
                try:
                    # The route is not kept, because a store may contain any number of tasks.
                    route = self._routes.get((source, task)) or Route(source, task, self._policy, chain.steps)
                except Exception:  # noqa: BLE001  (the provider does not know the task)
                    continue
                current = await chain.engine.find_current_route(port, route)
                own[current.keyer.scope] = card(current.policy, current.space)
        return own

    async def _check_providers(self, port: Port, *, embed: bool) -> list[ProviderCheck]:
        self._check_open()
        chain = self._chain
        routes = [self._get_route(source, TASKS[0]) for source in self._list_sources()]
        return [await check_provider(port, route, chain.in_flight, dtype=self._dtype, embed=embed) for route in routes]

    async def _list_metadata(self, port: Port, task: Task) -> list[Metadata]:
        self._check_open()
        return await self._chain.upkeep.list_metadata(port, self._get_route(self._source, task), self._dtype)

    async def _explain(self, port: Port, text: str, task: Task) -> Explanation:
        self._check_open()
        if not isinstance(text, str):
            raise TypeError(f"expected one text as a str, got {type(text).__name__}")
        route = await self._find_current_route(port, self._source, task)
        return await self._chain.upkeep.explain(port, route, text, self._policy, self._dtype)

    def _check_iter(self, texts: object, batch: int) -> None:
        self._check_open()
        require_texts(texts)
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")

    # --- ending -------------------------------------------------------------------------------

    def _add_dependent(self, cache: Requests) -> None:
        """Close ``cache`` when this cache is closed."""
        with self._lock:
            self._dependent.add(cache)

    def _mark_closed(self) -> bool:
        with self._lock:
            if self._closed:
                return False
            self._closed = True
            dependent = list(self._dependent)
        self._refresh_hot_path()
        for cache in dependent:
            cache._mark_closed()
        return True

    def _close_providers(self) -> None:
        close_part(self._source.provider)
        if self._fallback is not None:
            close_part(self._fallback.provider)

    def _reset_after_fork(self) -> None:
        self._lock = threading.RLock()
        self._source.reset()
        if self._fallback is not None:
            self._fallback.reset()


def _check_dimensions(source: LiveProvider, fallback: LiveProvider) -> None:
    """Raise SpaceError unless the vectors of the provider and of the fallback have the same dimensions."""
    for task in TASKS:
        mine = describe_space(source.provider, task).dimensions
        other = describe_space(fallback.provider, task).dimensions
        if mine is None or mine != other:
            raise SpaceError(
                f"the provider's vectors have {mine or 'unknown'} dimensions and the fallback's vectors have "
                f"{other or 'unknown'} dimensions, so the fallback cannot replace the provider; set the same "
                "dimensions for both, or set fetch_only = true in [provider.fallback] and read Fetched.space"
            )
