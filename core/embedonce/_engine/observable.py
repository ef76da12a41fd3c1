"""The part of a cache that only looks: keys, counters, events, tiers, and whether importers can read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence

from embedonce.answers import ChainWarning, ImporterCheck, TierCheck
from embedonce.contracts import AnyProvider, Task
from embedonce.errors import ProviderError
from embedonce.events import Event, ProviderStats, Stats
from embedonce.functions import NoProvider
from embedonce.tasks import TASKS

from .ports import Port, run_blocking
from .routes import LiveProvider, Route, copy_texts, require_texts
from .running import RunningChain
from .upkeep import FindOwnCards


class Observable:
    """The methods and attributes of a cache that read its counters and announce its events."""

    _chain: RunningChain
    _source: LiveProvider
    _fallback: LiveProvider | None
    _routes: dict[tuple[LiveProvider, str], Route]
    _closed: bool
    _check_open: Callable[[], None]
    _find_current_route: Callable[[Port, LiveProvider, Task], Awaitable[Route]]
    _find_own_cards: FindOwnCards

    def keys(self, texts: Iterable[str], task: Task = "document") -> list[str]:
        """Return the key of each text, in order, under which the tiers store its vector. Equal texts have equal keys.

        The keys are those of the provider, not of the fallback. With them, another program can join its texts with what
        a store holds. This method reads no tier, with one exception: with a guard that opens a new vector space when
        the provider drifts (:class:`~embedonce.drift.DriftGuard`), the first call reads which space is in use.

        Raises:
            TextError: a text has a lone surrogate; the message names the text's position.
            TypeError: ``texts`` is one str, or an item is not a str.
            SpaceError: the provider does not know the task.
            ProviderError: the cache has no provider.
        """
        return run_blocking(self._make_keys(self._chain.ports.blocking, texts, task))

    async def akeys(self, texts: Iterable[str], task: Task = "document") -> list[str]:
        """Async twin of :meth:`keys`."""
        return await self._make_keys(self._chain.ports.get_loop_port(), texts, task)

    async def _make_keys(self, port: Port, texts: Iterable[str], task: Task) -> list[str]:
        self._check_open()
        require_texts(texts, for_one="write one text as [text]")
        texts = copy_texts(texts)
        if isinstance(self._source.provider, NoProvider):
            raise ProviderError(
                "this cache has no provider, and the provider's vector space is part of every key; add [provider] to "
                "the configuration, or pass a provider to open() or compose()"
            )
        return (await self._find_current_route(port, self._source, task)).make_keys(texts)

    def stats(self) -> Stats:
        """Return the counters of tiers and providers since the cache was created.

        The counts of a tier are numbers of texts.
        """
        return self._chain.read_stats(self.provider_stats())

    def normalize(self, text: str) -> str:
        """Return the text that is embedded in place of ``text``, according to the key policy's ``normalize``."""
        for step in self._chain.steps:
            text = step(text)
        return text

    def provider_stats(self) -> dict[str, ProviderStats]:
        """Return only ``providers`` of :meth:`stats`, which takes much less time."""
        sources = [self._source, *([self._fallback] if self._fallback else [])]
        return {source.name: source.stats() for source in sources}

    def count_passed_by(self) -> None:
        """Count a call that did not use the cache, because its answer cannot be cached. Wrappers of clients call this.

        The count is in ``stats().passed_by``.
        """
        self._chain.engine.requests.count_passed_by()

    def subscribe(self, listener: Callable[[Event], None]) -> None:
        """Call ``listener`` with every event from now on.

        If the listener raises, the error is logged, and the listener stays subscribed.
        """
        self._chain.subscribe(listener)

    def _watch_counters(self, watcher: Callable[[], None]) -> None:
        """Call ``watcher`` when the counters in :meth:`stats` have changed. The watcher must not raise."""
        self._chain.watch_counters(watcher)

    def check(self, *, verify: bool = False) -> list[TierCheck]:
        """Return whether each tier answers, and whether it stores, returns and deletes a probe.

        A probe is not listed, counted or kept, and evicts nothing in this process. A read-only tier, a tier whose
        ``write`` is ``"none"`` and a tier that cannot delete get no probe. If this cache uses nothing of what a
        read-only tier holds, the detail says what it holds.

        With ``verify``, each store that can check itself is read as a whole, such as a bundle. This takes as long as
        reading its files, and has no timeout.
        """
        return run_blocking(self._check(self._chain.ports.blocking, verify=verify))

    async def acheck(self, *, verify: bool = False) -> list[TierCheck]:
        """Async twin of :meth:`check`."""
        return await self._check(self._chain.ports.get_loop_port(), verify=verify)

    async def _check(self, port: Port, *, verify: bool) -> list[TierCheck]:
        self._check_open()
        return await self._chain.upkeep.check(port, self._find_own_cards, verify=verify)

    def check_importers(self) -> list[ImporterCheck]:
        """Return for each importer whether it can read its source, and whether it was verified."""
        return run_blocking(self._check_importers(self._chain.ports.blocking))

    async def acheck_importers(self) -> list[ImporterCheck]:
        """Async twin of :meth:`check_importers`."""
        return await self._check_importers(self._chain.ports.get_loop_port())

    async def _check_importers(self, port: Port) -> list[ImporterCheck]:
        self._check_open()
        return [await importer.check(port) for importer in self._chain.importers]

    @property
    def importers(self) -> Sequence[str]:
        """The names of the importers, in the order in which they are asked."""
        return tuple(importer.name for importer in self._chain.importers)

    @property
    def tiers(self) -> Sequence[str]:
        """The tiers' names, fastest first."""
        return tuple(tier.name for tier in self._chain.tiers)

    @property
    def warnings(self) -> Sequence[ChainWarning]:
        """Warnings about probable mistakes in this chain, such as a network tier before a local tier."""
        return self._chain.warnings

    @property
    def provider(self) -> AnyProvider:
        return self._source.provider

    @property
    def fallback(self) -> AnyProvider | None:
        return None if self._fallback is None else self._fallback.provider

    @property
    def closed(self) -> bool:
        return self._closed

    def __repr__(self) -> str:
        space = self._routes[self._source, TASKS[0]].space
        chain = " -> ".join([*self.tiers, f"{space.provider} {space.model}".strip()])
        return f"<embedonce.Cache {chain}>"
