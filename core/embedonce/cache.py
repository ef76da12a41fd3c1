"""The cache: blocking methods and their async twins over one engine."""

from __future__ import annotations

import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from ._arguments import check_options, check_parts, find_normalizer, read_coalesce, read_price
from ._engine.ahead import read_windows, read_windows_async
from ._engine.chain import Tier
from ._engine.imports import Import
from ._engine.observable import Observable
from ._engine.ports import run_blocking
from ._engine.requests import ITER_BATCH, Requests
from ._engine.routes import LiveProvider
from ._engine.running import Mode, RunningChain
from ._transfers import TransferMethods
from .admission import Admit
from .answers import Estimate, Explanation, Fetched, Held, ProviderCheck, Purged
from .contracts import AnyProvider, Backend, Importer, Task, Vectors
from .drift import DriftGuard
from .events import Event
from .functions import wrap
from .keys import KeyPolicy, SpaceCard, VectorSpace, extend_namespace
from .prices import Price
from .savings import FoundSavings
from .vectors import Cost, Dtype, Matrix, Metadata, Vector

if TYPE_CHECKING:
    from typing import Self


class Cache(Requests, Observable, TransferMethods):
    """Embeds each text once: reads vectors from a chain of tiers, and asks the provider for the rest.

    Every method that does I/O has an async twin, whose name starts with ``a``. Blocking and async methods share
    tiers, flights and counters. Threads and asyncio tasks may use one cache at the same time.

    Args:
        provider: a provider, or a function that takes a list of texts and returns their vectors. If you pass a
            function, ``space`` is required.
        tiers: backends, fastest first; :class:`Tier` has their options. Without tiers nothing is stored, but batches
            are de-duplicated and vectors are checked.
        imports: importers to ask, before the provider, for texts that no tier has; :class:`Import` has their options.
        space: the vector space of a function, such as ``{"model": "my-model", "revision": "2"}``.
        key: settings that determine which requests share a vector.
        dtype: precision of the vectors that are stored *and returned*. Vectors are rounded to this precision before
            they are returned, so that a text has the same vector before and after a restart.
        mode: ``"read-through"``, or ``"replay"``, which computes nothing and fails for a text that no tier has.
        fallback: a second provider, used when the first one fails. Its vectors are in its own vector space.
        fallback_fetch_only: use the fallback only in ``fetch``, whose caller can read ``Fetched.space``. The ``embed…``
            methods then raise the first provider's error. This option is required if the dimensions of the two
            providers differ.
        price: the price of the provider's tokens, such as ``"0.02 USD / 1M tokens"``. With a price, statistics and
            estimates show money.
        fallback_price: the price of the fallback's tokens.
        coalesce: number of seconds, such as ``0.002``, for which texts that no tier has wait for texts of other calls,
            so that the provider gets one request instead of many. By default, they do not wait.
        fallback_coalesce: the same for requests to the fallback.
        drift: a guard that checks at intervals whether the provider still returns the vectors that are stored.
        max_wait: maximum number of seconds that a call waits for another call to embed the same text. After this time,
            the waiting call embeds the text itself.
        flush_timeout: maximum number of seconds to wait for background writes in ``close`` and at exit.
        max_queued: maximum number of entries per tier that wait for a background write.
        listeners: functions that are called with every :data:`embedonce.events.Event`.
        clock: function that returns Unix time in seconds, for tests.

    Raises:
        SpaceError: the provider describes no vector space.
        ConfigError: an option is invalid, the tiers cannot be combined, or an importer cannot be used.
    """

    def __init__(
        self,
        provider: AnyProvider | Callable[..., Any],
        tiers: Sequence[Tier | Backend] = (),
        *,
        imports: Sequence[Import | Importer] = (),
        space: VectorSpace | Mapping[str, Any] | None = None,
        key: KeyPolicy | None = None,
        dtype: Dtype = "float32",
        mode: Mode = "read-through",
        fallback: AnyProvider | None = None,
        fallback_fetch_only: bool = False,
        price: Price | str | None = None,
        fallback_price: Price | str | None = None,
        coalesce: float | None = None,
        fallback_coalesce: float | None = None,
        drift: DriftGuard | None = None,
        max_wait: float = 60.0,
        flush_timeout: float = 5.0,
        max_queued: int = 4096,
        listeners: Iterable[Callable[[Event], None]] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        check_options(dtype, mode, max_wait, flush_timeout, max_queued)
        listeners = check_parts(key, drift, listeners, clock)
        policy = key or KeyPolicy()
        steps = [find_normalizer(name) for name in policy.normalize]
        paid, wait = read_price("price", price), read_coalesce("coalesce", coalesce)
        source = LiveProvider(wrap(provider, space), fallback=False, price=paid, coalesce=wait)
        paid, wait = read_price("fallback_price", fallback_price), read_coalesce("fallback_coalesce", fallback_coalesce)
        second = None if fallback is None else LiveProvider(wrap(fallback), fallback=True, price=paid, coalesce=wait)
        chain = RunningChain(
            tiers,
            policy=policy,
            steps=steps,
            dtype=dtype,
            mode=mode,
            drift=drift,
            max_wait=max_wait,
            flush_timeout=flush_timeout,
            max_queued=max_queued,
            listeners=listeners,
            clock=clock,
        )
        super().__init__(chain, source, second, fetch_only=fallback_fetch_only)
        chain.add_imports(imports, source)
        chain.close_at_exit(self)

    def for_provider(
        self,
        provider: AnyProvider | Callable[..., Any],
        *,
        space: VectorSpace | Mapping[str, Any] | None = None,
        price: Price | str | None = None,
        coalesce: float | None = None,
    ) -> Cache:
        """Return a cache with the same tiers for another provider, without a fallback.

        Both caches share the key policy, flights, queues, breakers and the tiers' counters. They share entries
        only if their providers describe the same vector space. Closing the new cache closes only the new
        provider. Closing this cache closes both caches.

        Raises:
            SpaceError: the provider describes no vector space.
        """
        self._check_open()
        paid, wait = read_price("price", price), read_coalesce("coalesce", coalesce)
        source = LiveProvider(wrap(provider, space), fallback=False, price=paid, coalesce=wait)
        return _CacheOfSameTiers(self._chain, source, policy=self._policy)

    def for_namespace(self, name: str) -> Cache:
        """Return a cache with the same tiers and the same provider, whose entries no other namespace can find.

        ``name`` is appended to the namespace of the key policy: ``"search"`` becomes ``"project/search"``. Both
        caches share the provider, its rate and its counters. Closing the new cache closes nothing else. Closing this
        cache closes both caches.

        Raises:
            ValueError: ``name`` is empty, has a ``/``, or is not valid Unicode.
        """
        self._check_open()
        policy = replace(self._policy, namespace=extend_namespace(self._policy.namespace, name))
        cache = _CacheOfSameTiers(
            self._chain,
            self._source,
            policy=policy,
            fallback=self._fallback,
            fetch_only=self._fetch_only,
            owns_providers=False,
        )
        self._add_dependent(cache)
        return cache

    # --- blocking methods --------------------------------------------------------------------

    def embed(self, text: str, task: Task = "document") -> Vector:
        """Return the text's vector: float32, shape (d,), read-only.

        Raises:
            TextError: the text has a lone surrogate.
            ReplayMiss: in replay mode, no tier has the text.
            Exception: the provider's own error.
        """
        entry = self._read_hot_entry(text, task)
        return self._embed_one(text, task) if entry is None else entry.vector

    def embed_batch(self, texts: Sequence[str], task: Task = "document") -> Matrix:
        """Return a float32 matrix of shape (n, d), row i for text i.

        Raises:
            Exception: the error of the first text that failed, as in :meth:`embed`. The vectors of the other texts are
                stored.
        """
        rows = self._read_hot_matrix(texts, task)
        if rows is not None:
            return rows
        if type(texts) is list and len(texts) == 1:
            return self._embed_one(texts[0], task).reshape(1, -1).copy()
        return run_blocking(self._embed_matrix(self._chain.ports.blocking, texts, task))

    def embed_iter(self, texts: Iterable[str], task: Task = "document", *, batch: int = ITER_BATCH) -> Iterator[Vector]:
        """Yield each text's vector in order. Only ``batch`` texts are read at a time, so memory stays bounded.

        Raises:
            Exception: as in :meth:`embed_batch`. A position in an error counts from the first text of ``texts``.
        """
        self._check_iter(texts, batch)

        def rows() -> Iterator[Vector]:
            for found in self._embed_windows(texts, task, batch):
                yield from found

        return rows()

    def fetch(
        self,
        texts: Sequence[str],
        task: Task = "document",
        *,
        store: bool = True,
        metadata: Sequence[Metadata | None] | None = None,
        fresh: bool = False,
        admit: Admit | None = None,
    ) -> Fetched:
        """Return the vectors and the source of each vector. Report failures by position instead of raising them.

        A text that is not valid Unicode also fails alone, with a :class:`~embedonce.errors.TextError`.

        With ``store=False``, the call writes no vectors to the tiers. It neither stores the vectors that it computes
        nor copies vectors from a slower tier to a faster tier.

        ``metadata`` (one small JSON object or None per text) is stored with vectors that this call computes. An entry
        that is already stored keeps its own metadata.

        With ``fresh=True``, every text is computed, even if a tier has it. An entry that is already stored stays as it
        is, and ``changed`` of the result has the positions of the texts whose vector is different now.

        ``admit`` decides which texts are computed: see :data:`embedonce.admission.Admit`.
        """
        hot = self._read_hot_fetched(texts, task) if metadata is None and not fresh else None
        if hot is not None:
            return hot
        port = self._chain.ports.blocking
        return run_blocking(self._fetch(port, texts, task, store=store, metadata=metadata, fresh=fresh, admit=admit))

    def lookup(self, texts: Sequence[str], task: Task = "document") -> Fetched:
        """Return the vectors that the tiers have; compute nothing. An invalid text is in ``failed``."""
        hot = self._read_hot_fetched(texts, task)
        return run_blocking(self._lookup(self._chain.ports.blocking, texts, task)) if hot is None else hot

    def estimate(self, texts: Iterable[str], task: Task = "document") -> Estimate:
        """Return how many of the texts the tiers have, and the tokens, price and seconds of the others.

        Nothing is computed, stored or sent to the provider, and the counters of ``stats`` do not change. ``texts`` may
        be a stream of any length, because only a hash of 8 bytes per distinct text stays in memory. The fallback is
        ignored. A tier that fails is named in the result.

        Raises:
            TypeError: an item is not a str.
            ProviderError: the cache has no provider.
        """
        port = self._chain.ports.blocking
        estimator = run_blocking(self._begin_estimate(port, texts, task))
        for window in read_windows(texts, ITER_BATCH):
            run_blocking(self._add_to_estimate(port, estimator, window))
        return estimator.finish()

    def put(
        self,
        texts: Sequence[str],
        vectors: Vectors,
        task: Task = "document",
        *,
        metadata: Sequence[Metadata | None] | None = None,
        costs: Sequence[Cost | None] | None = None,
    ) -> None:
        """Store vectors that you already have. A text that is already in a tier keeps its entry.

        ``costs`` (one :class:`~embedonce.vectors.Cost` or None per text) says what it cost to compute the vectors, so
        that hits count as saved tokens and seconds.

        Raises:
            TextError: a text has a lone surrogate. Nothing is stored.
            ProviderError: the vectors have the wrong shape, or one of them has NaN, infinity or only zeros.
            ValueError: ``metadata`` or ``costs`` do not have one valid item per text.
        """
        run_blocking(self._put(self._chain.ports.blocking, texts, vectors, task, metadata, costs))

    def forget(
        self, texts: Sequence[str], task: Task | None = None, *, where: Callable[[SpaceCard], bool] | None = None
    ) -> dict[str, SpaceCard]:
        """Remove the vectors of the texts from every tier, for one task or for all tasks.

        The fallback's vectors of these texts are removed too. The memory tiers of other processes keep these vectors
        until the vectors expire.

        With ``where`` and without a task, the texts are removed from every scope in the tiers whose space card
        satisfies ``where``, whichever model, task, namespace or version it has. The other scopes that hold one of the
        texts are returned, with their cards.

        Raises:
            EraseIncomplete: some tiers failed, cannot delete, or cannot list their keys, which ``where`` needs; or
                read-only tiers have some of the vectors; or the keys of a scope are not known. The error names these
                tiers and scopes.
        """
        return run_blocking(self._forget(self._chain.ports.blocking, texts, task, where))

    def purge(
        self,
        *,
        scope: str | None = None,
        model: str | None = None,
        version: str | None = None,
        namespace: str | None = None,
        where: Callable[[SpaceCard], bool] | None = None,
        unused: bool = False,
        dry_run: bool = False,
    ) -> Purged:
        """Remove, from every tier, all entries of the scopes that match all given parts.

        ``where`` is a function that says whether a scope with this space card matches.

        With ``unused``, a scope matches only if neither the provider nor the fallback uses it now, for any task, and
        no other open cache over the same tiers (see :meth:`for_provider`) has used it. Entries of other namespaces,
        versions and models are unused, even if another program uses them.

        Raises:
            ValueError: no part was given, or ``unused`` was given and the cache has no provider.
            EraseIncomplete: some tiers failed, cannot list or cannot delete, or read-only tiers have some of the
                entries. The error names these tiers.
        """
        port = self._chain.ports.blocking
        return run_blocking(self._purge(port, scope, model, version, namespace, where, unused, dry_run))

    def explain(self, text: str, task: Task = "document") -> Explanation:
        """Return how the text's key is built, what each tier has for the key, and possible reasons for a miss."""
        return run_blocking(self._explain(self._chain.ports.blocking, text, task))

    def contents(self) -> list[Held]:
        """Return each tier's entries by scope: their number, size and dates, and whether the cache uses the scope.

        A tier that cannot list its keys has one row with the reason.
        """
        return run_blocking(self._contents(self._chain.ports.blocking))

    def savings(self, since: float = 0.0) -> FoundSavings:
        """Return what all processes that share the tiers have computed and saved since a Unix time.

        Each record has the work of one day in UTC. The whole day of ``since`` is included. Records expire after a year.
        A process writes its records about twice a minute while it works, and when its cache is closed. This method
        first writes the records of this process.

        If a tier fails, ``errors`` of the result has the reason.
        """
        self._check_open()
        self._chain.recorder.record()
        return run_blocking(self._chain.recorder.read(self._chain.ports.blocking, since))

    def list_metadata(self, task: Task = "document") -> list[Metadata]:
        """Return the metadata of all entries in the task's vector space, each entry once, in no particular order.

        This method lists the keys of all tiers. Entries that wait for a background write are not in a tier yet, so call
        ``flush`` first to include these entries.

        Raises:
            TierError: a tier failed or cannot list; the message names the tier.
        """
        return run_blocking(self._list_metadata(self._chain.ports.blocking, task))

    def check_providers(self, *, embed: bool = False) -> list[ProviderCheck]:
        """Return whether the provider, and the fallback if there is one, can be called.

        A missing API key is found without a call. With ``embed``, each provider embeds one constant text, which may
        cost money. Its vector is not stored.
        """
        return run_blocking(self._check_providers(self._chain.ports.blocking, embed=embed))

    def migrate(self) -> dict[str, str]:
        """Create or update the tables of every store that has tables (Postgres). Return the changes by tier.

        Raises:
            TierError: a store could not be changed.
        """
        self._check_open()
        return run_blocking(self._chain.upkeep.migrate(self._chain.ports.blocking))

    def compact(self) -> dict[str, str]:
        """Give unused space back to the system, in every store that supports this (disk). Return the sizes by tier.

        This may take minutes. Other threads and processes may use the stores meanwhile, but a write that waits for
        longer than its tier's timeout fails. If the call is interrupted, no entry is lost.

        Raises:
            TierError: a store could not be compacted. The other stores were compacted nevertheless.
        """
        self._check_open()
        return run_blocking(self._chain.upkeep.compact(self._chain.ports.blocking))

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until background writes are done and return True; return False after ``timeout`` seconds.

        The default timeout is ``flush_timeout``.
        """
        return self._chain.flush(self._chain.flush_timeout if timeout is None else timeout)

    def close(self) -> None:
        """Flush for up to ``flush_timeout`` seconds, then close backends and providers. Closing twice is allowed."""
        self._chain.close(self._chain.flush_timeout)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Cache cannot be copied or pickled, because it has threads, locks and connections; "
            "pass its configuration and call embedonce.open() where you need it"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- async twins -----------------------------------------------------------------------

    async def aembed(self, text: str, task: Task = "document") -> Vector:
        """Async twin of :meth:`embed`."""
        entry = self._read_hot_entry(text, task)
        if entry is not None:
            return entry.vector
        row: Vector = (await self._embed_rows(self._chain.ports.get_loop_port(), [text], task))[0]
        return row

    async def aembed_batch(self, texts: Sequence[str], task: Task = "document") -> Matrix:
        """Async twin of :meth:`embed_batch`."""
        rows = self._read_hot_matrix(texts, task)
        return await self._embed_matrix(self._chain.ports.get_loop_port(), texts, task) if rows is None else rows

    def aembed_iter(
        self, texts: Iterable[str] | AsyncIterable[str], task: Task = "document", *, batch: int = ITER_BATCH
    ) -> AsyncIterator[Vector]:
        """Async twin of :meth:`embed_iter`; ``texts`` may be an async iterable."""
        self._check_iter(texts, batch)

        async def rows() -> AsyncIterator[Vector]:
            async with aclosing(self._embed_windows_async(texts, task, batch)) as windows:
                async for found in windows:
                    for row in found:
                        yield row

        return rows()

    async def afetch(
        self,
        texts: Sequence[str],
        task: Task = "document",
        *,
        store: bool = True,
        metadata: Sequence[Metadata | None] | None = None,
        fresh: bool = False,
        admit: Admit | None = None,
    ) -> Fetched:
        """Async twin of :meth:`fetch`."""
        hot = self._read_hot_fetched(texts, task) if metadata is None and not fresh else None
        if hot is not None:
            return hot
        port = self._chain.ports.get_loop_port()
        return await self._fetch(port, texts, task, store=store, metadata=metadata, fresh=fresh, admit=admit)

    async def alookup(self, texts: Sequence[str], task: Task = "document") -> Fetched:
        """Async twin of :meth:`lookup`."""
        hot = self._read_hot_fetched(texts, task)
        return await self._lookup(self._chain.ports.get_loop_port(), texts, task) if hot is None else hot

    async def aestimate(self, texts: Iterable[str] | AsyncIterable[str], task: Task = "document") -> Estimate:
        """Async twin of :meth:`estimate`; ``texts`` may be an async iterable."""
        port = self._chain.ports.get_loop_port()
        estimator = await self._begin_estimate(port, texts, task)
        async for window in read_windows_async(texts, ITER_BATCH):
            await self._add_to_estimate(port, estimator, window)
        return estimator.finish()

    async def aput(
        self,
        texts: Sequence[str],
        vectors: Vectors,
        task: Task = "document",
        *,
        metadata: Sequence[Metadata | None] | None = None,
        costs: Sequence[Cost | None] | None = None,
    ) -> None:
        """Async twin of :meth:`put`."""
        await self._put(self._chain.ports.get_loop_port(), texts, vectors, task, metadata, costs)

    async def aforget(
        self, texts: Sequence[str], task: Task | None = None, *, where: Callable[[SpaceCard], bool] | None = None
    ) -> dict[str, SpaceCard]:
        """Async twin of :meth:`forget`."""
        return await self._forget(self._chain.ports.get_loop_port(), texts, task, where)

    async def apurge(
        self,
        *,
        scope: str | None = None,
        model: str | None = None,
        version: str | None = None,
        namespace: str | None = None,
        where: Callable[[SpaceCard], bool] | None = None,
        unused: bool = False,
        dry_run: bool = False,
    ) -> Purged:
        """Async twin of :meth:`purge`."""
        port = self._chain.ports.get_loop_port()
        return await self._purge(port, scope, model, version, namespace, where, unused, dry_run)

    async def aexplain(self, text: str, task: Task = "document") -> Explanation:
        """Async twin of :meth:`explain`."""
        return await self._explain(self._chain.ports.get_loop_port(), text, task)

    async def acontents(self) -> list[Held]:
        """Async twin of :meth:`contents`."""
        return await self._contents(self._chain.ports.get_loop_port())

    async def asavings(self, since: float = 0.0) -> FoundSavings:
        """Async twin of :meth:`savings`."""
        self._check_open()
        await self._chain.run_off_loop(self._chain.recorder.record)
        return await self._chain.recorder.read(self._chain.ports.get_loop_port(), since)

    async def alist_metadata(self, task: Task = "document") -> list[Metadata]:
        """Async twin of :meth:`list_metadata`."""
        return await self._list_metadata(self._chain.ports.get_loop_port(), task)

    async def acheck_providers(self, *, embed: bool = False) -> list[ProviderCheck]:
        """Async twin of :meth:`check_providers`."""
        return await self._check_providers(self._chain.ports.get_loop_port(), embed=embed)

    async def amigrate(self) -> dict[str, str]:
        """Async twin of :meth:`migrate`."""
        self._check_open()
        return await self._chain.upkeep.migrate(self._chain.ports.get_loop_port())

    async def acompact(self) -> dict[str, str]:
        """Async twin of :meth:`compact`."""
        self._check_open()
        return await self._chain.upkeep.compact(self._chain.ports.get_loop_port())

    async def aflush(self, timeout: float | None = None) -> bool:
        """Async twin of :meth:`flush`. It does not block the event loop."""
        return await self._chain.run_off_loop(lambda: self.flush(timeout))

    async def aclose(self) -> None:
        """Async twin of :meth:`close`. It does not block the event loop."""
        await self._chain.close_twins(self._chain.ports.get_loop_port())
        await self._chain.run_off_loop(self.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class _CacheOfSameTiers(Cache):
    """A cache that shares the tiers of an existing cache. Only the existing cache closes the tiers."""

    def __init__(
        self,
        chain: RunningChain,
        source: LiveProvider,
        *,
        policy: KeyPolicy,
        fallback: LiveProvider | None = None,
        fetch_only: bool = False,
        owns_providers: bool = True,
    ) -> None:
        self._owns_providers = owns_providers
        Requests.__init__(self, chain, source, fallback, fetch_only=fetch_only, policy=policy)

    def _close_providers(self) -> None:
        if self._owns_providers:
            super()._close_providers()

    def close(self) -> None:
        if self._mark_closed():
            self._chain.flush_or_warn(self._chain.flush_timeout)
            self._close_providers()

    async def aclose(self) -> None:
        await self._chain.run_off_loop(self.close)
