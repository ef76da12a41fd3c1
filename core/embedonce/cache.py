"""The cache: a blocking and an async face of one engine."""

from __future__ import annotations

import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from ._engine.chain import Tier
from ._engine.ports import run_blocking
from ._engine.requests import ITER_BATCH, TASKS, Requests, awindows, windows
from ._engine.routes import LiveProvider
from ._engine.running import Mode, RunningChain
from .answers import ChainWarning, Explanation, Fetched, Held, Purged, TierCheck
from .contracts import AnyProvider, Backend, Normalizer, Task, Vectors
from .drift import DriftGuard
from .errors import ConfigError
from .events import Event, Stats
from .functions import wrap
from .keys import NORMALIZERS, KeyPolicy, VectorSpace
from .vectors import Dtype, Matrix, Metadata, Vector

if TYPE_CHECKING:
    from typing import Self

T = TypeVar("T")


class Cache(Requests):
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
        _check_options(dtype, mode, max_wait, flush_timeout, max_queued)
        policy = key or KeyPolicy()
        steps = [_normalizer(name) for name in policy.normalize]
        source = LiveProvider(wrap(provider, space), fallback=False)
        second = None if fallback is None else LiveProvider(wrap(fallback), fallback=True)
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
        chain.close_at_exit(self)

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
        return _CacheOfSameTiers(self._chain, LiveProvider(wrap(provider, space), fallback=False))

    # --- the blocking face --------------------------------------------------------------------

    def embed(self, text: str, task: Task = "document") -> Vector:
        """Return the text's vector: float32, shape (d,), read-only.

        Raises:
            TextError: the text has a lone surrogate.
            ReplayMiss: it is in no tier, in replay mode.
            Exception: whatever the provider raised.
        """
        vector = self._hit(text, task)
        if vector is not None:
            return vector
        row: Vector = run_blocking(self._rows(self._chain.ports.blocking, [text], task))[0]
        return row

    def embed_batch(self, texts: Sequence[str], task: Task = "document") -> Matrix:
        """Return a float32 matrix of shape (n, d), row i for text i.

        Raises:
            Exception: as :meth:`embed`, for the first text that failed; what did not fail is stored.
        """
        return run_blocking(self._matrix(self._chain.ports.blocking, texts, task))

    def embed_iter(self, texts: Iterable[str], task: Task = "document", *, batch: int = ITER_BATCH) -> Iterator[Vector]:
        """Yield each text's vector in order, reading ``batch`` texts at a time: memory stays bounded."""
        self._check_iter(texts, batch, "embed_iter")

        def rows() -> Iterator[Vector]:
            for window in windows(texts, batch):
                yield from run_blocking(self._rows(self._chain.ports.blocking, window, task))

        return rows()

    def fetch(
        self,
        texts: Sequence[str],
        task: Task = "document",
        *,
        store: bool = True,
        metadata: Sequence[Metadata | None] | None = None,
    ) -> Fetched:
        """Return the vectors with where each came from; failures are reported by position, not raised.

        ``store=False`` writes and promotes nothing. ``metadata`` (small JSON, one per text) is stored
        beside vectors that are computed now; where an entry is there already, its own stays.
        """
        return run_blocking(self._fetch(self._chain.ports.blocking, texts, task, store=store, metadata=metadata))

    def lookup(self, texts: Sequence[str], task: Task = "document") -> Fetched:
        """Return what the tiers hold, computing nothing."""
        return run_blocking(self._lookup(self._chain.ports.blocking, texts, task))

    def put(
        self,
        texts: Sequence[str],
        vectors: Vectors,
        task: Task = "document",
        *,
        metadata: Sequence[Metadata | None] | None = None,
    ) -> None:
        """Store vectors that you already have; a text that a tier holds keeps its entry.

        Raises:
            ProviderError: the vectors are not what a provider may return.
        """
        run_blocking(self._put(self._chain.ports.blocking, texts, vectors, task, metadata))

    def forget(self, texts: Sequence[str], task: Task | None = None) -> None:
        """Remove the texts from every tier, for one task or for all, the fallback's vectors too.

        Another process's memory is out of reach until its TTL.

        Raises:
            EraseIncomplete: tiers that failed or cannot delete, by name.
        """
        run_blocking(self._forget(self._chain.ports.blocking, texts, task))

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
        return run_blocking(self._purge(self._chain.ports.blocking, scope, model, version, namespace, dry_run))

    def explain(self, text: str, task: Task = "document") -> Explanation:
        """Say what the text's key is made of, where its entry is, and why it missed."""
        return run_blocking(self._explain(self._chain.ports.blocking, text, task))

    def contents(self) -> list[Held]:
        """Count what each tier holds, by scope; a tier that cannot say has one row with the reason."""
        self._check_open()
        return run_blocking(self._chain.upkeep.contents(self._chain.ports.blocking))

    def list_metadata(self, task: Task = "document") -> list[Metadata]:
        """Return the metadata of every entry of the task's vector space that has some, in no order, each entry once.

        It walks over all tiers, and sees what is in them: ``flush`` first where a tier is written in the background.

        Raises:
            TierError: a tier failed or cannot list; the message names it.
        """
        return run_blocking(self._list_metadata(self._chain.ports.blocking, task))

    def check(self) -> list[TierCheck]:
        """Ask every tier whether it answers."""
        self._check_open()
        return run_blocking(self._chain.upkeep.check(self._chain.ports.blocking))

    def migrate(self) -> dict[str, str]:
        """Create or update the layout of every store that has one (Postgres), and say what was done, by tier.

        Raises:
            TierError: a store could not be changed.
        """
        self._check_open()
        return run_blocking(self._chain.upkeep.migrate(self._chain.ports.blocking))

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until background writes are done; False after ``timeout`` seconds (default: ``flush_timeout``)."""
        return self._chain.flush(self._chain.flush_timeout if timeout is None else timeout)

    def close(self) -> None:
        """Flush, within ``flush_timeout``, then close backends and provider. Calling it twice does nothing."""
        self._chain.close(self._chain.flush_timeout)

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

    async def aembed(self, text: str, task: Task = "document") -> Vector:
        """As :meth:`embed`."""
        vector = self._hit(text, task)
        if vector is not None:
            return vector
        row: Vector = (await self._rows(self._chain.ports.get_loop_port(), [text], task))[0]
        return row

    async def aembed_batch(self, texts: Sequence[str], task: Task = "document") -> Matrix:
        """As :meth:`embed_batch`."""
        return await self._matrix(self._chain.ports.get_loop_port(), texts, task)

    def aembed_iter(
        self, texts: Iterable[str] | AsyncIterable[str], task: Task = "document", *, batch: int = ITER_BATCH
    ) -> AsyncIterator[Vector]:
        """As :meth:`embed_iter`; ``texts`` may be an async iterable."""
        self._check_iter(texts, batch, "aembed_iter")

        async def rows() -> AsyncIterator[Vector]:
            async for window in awindows(texts, batch):
                for row in await self._rows(self._chain.ports.get_loop_port(), window, task):
                    yield row

        return rows()

    async def afetch(
        self,
        texts: Sequence[str],
        task: Task = "document",
        *,
        store: bool = True,
        metadata: Sequence[Metadata | None] | None = None,
    ) -> Fetched:
        """As :meth:`fetch`."""
        return await self._fetch(self._chain.ports.get_loop_port(), texts, task, store=store, metadata=metadata)

    async def alookup(self, texts: Sequence[str], task: Task = "document") -> Fetched:
        """As :meth:`lookup`."""
        return await self._lookup(self._chain.ports.get_loop_port(), texts, task)

    async def aput(
        self,
        texts: Sequence[str],
        vectors: Vectors,
        task: Task = "document",
        *,
        metadata: Sequence[Metadata | None] | None = None,
    ) -> None:
        """As :meth:`put`."""
        await self._put(self._chain.ports.get_loop_port(), texts, vectors, task, metadata)

    async def aforget(self, texts: Sequence[str], task: Task | None = None) -> None:
        """As :meth:`forget`."""
        await self._forget(self._chain.ports.get_loop_port(), texts, task)

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
        return await self._purge(self._chain.ports.get_loop_port(), scope, model, version, namespace, dry_run)

    async def aexplain(self, text: str, task: Task = "document") -> Explanation:
        """As :meth:`explain`."""
        return await self._explain(self._chain.ports.get_loop_port(), text, task)

    async def acontents(self) -> list[Held]:
        """As :meth:`contents`."""
        self._check_open()
        return await self._chain.upkeep.contents(self._chain.ports.get_loop_port())

    async def alist_metadata(self, task: Task = "document") -> list[Metadata]:
        """As :meth:`list_metadata`."""
        return await self._list_metadata(self._chain.ports.get_loop_port(), task)

    async def acheck(self) -> list[TierCheck]:
        """As :meth:`check`."""
        self._check_open()
        return await self._chain.upkeep.check(self._chain.ports.get_loop_port())

    async def amigrate(self) -> dict[str, str]:
        """As :meth:`migrate`."""
        self._check_open()
        return await self._chain.upkeep.migrate(self._chain.ports.get_loop_port())

    async def aflush(self, timeout: float | None = None) -> bool:
        """As :meth:`flush`, without holding the loop up."""
        return await self._off_loop(lambda: self.flush(timeout))

    async def aclose(self) -> None:
        """As :meth:`close`, without holding the loop up."""
        await self._chain.close_twins(self._chain.ports.get_loop_port())
        await self._off_loop(self.close)

    async def _off_loop(self, call: Callable[[], T]) -> T:
        ports = self._chain.ports
        return await ports.get_loop_port().call(call, None, ports.workers, inline=False, quick=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    # --- counters -----------------------------------------------------------------------------

    def stats(self) -> Stats:
        """Return what tiers and providers did since the cache was made, in texts."""
        sources = [self._source, *([self._fallback] if self._fallback else [])]
        return Stats(
            tiers={tier.name: tier.counters.stats() for tier in self._chain.tiers},
            providers={source.name: source.stats() for source in sources},
            shared=self._chain.engine.shared,
        )

    def subscribe(self, listener: Callable[[Event], None]) -> None:
        """Call ``listener`` with every event from now on. One that raises is logged and stays."""
        self._chain.subscribe(listener)

    @property
    def tiers(self) -> Sequence[str]:
        """The tiers' names, fastest first."""
        return tuple(tier.name for tier in self._chain.tiers)

    @property
    def warnings(self) -> Sequence[ChainWarning]:
        """What works in this chain and is hardly meant, such as a network tier above a local one."""
        return self._chain.warnings

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


class _CacheOfSameTiers(Cache):
    """Another provider over the tiers of a cache. Only the cache that made it closes the tiers."""

    def __init__(self, chain: RunningChain, source: LiveProvider) -> None:
        Requests.__init__(self, chain, source, None, fetch_only=False)

    def close(self) -> None:
        if self._mark_closed():
            self._chain.flush_or_warn(self._chain.flush_timeout)
            self._close_providers()

    async def aclose(self) -> None:
        await self._off_loop(self.close)


def _check_options(dtype: str, mode: str, max_wait: float, flush_timeout: float, max_queued: int) -> None:
    if dtype not in ("float32", "float16", "int8"):
        raise ConfigError(f'dtype is "float32", "float16" or "int8", not {dtype!r}')
    if mode not in ("read-through", "replay"):
        raise ConfigError(f'mode is "read-through" or "replay", not {mode!r}')
    for name, number in (("max_wait", max_wait), ("flush_timeout", flush_timeout), ("max_queued", max_queued - 1)):
        if not number >= 0:
            raise ConfigError(f"{name} is {'at least 1' if name == 'max_queued' else 'not below 0'}")


def _normalizer(name: str) -> Normalizer:
    if name in NORMALIZERS:
        return NORMALIZERS[name]
    from ._plugins.loading import normalizer

    return normalizer(name)
