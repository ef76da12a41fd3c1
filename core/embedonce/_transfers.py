"""The methods of a cache that copy entries from tier to tier, and export them to a bundle."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ._engine.chain import Tier
from ._engine.ports import Port, run_blocking
from ._engine.routes import LiveProvider, Route, copy_texts, require_texts
from ._engine.running import RunningChain
from ._engine.selecting import Selection
from ._engine.tiers import LiveTier
from ._engine.transferring import Progress, Transfer
from ._messages import join_words
from .answers import Copied, Exported
from .contracts import Backend, Task
from .errors import ConfigError, TransferRefused
from .keys import KeyPolicy, SpaceCard, Value
from .store_writers import BUNDLE
from .tasks import TASKS


class TransferMethods:
    """Copies and exports entries. :class:`~embedonce._engine.requests.Requests` has the attributes."""

    _chain: RunningChain
    _policy: KeyPolicy
    _source: LiveProvider
    _check_open: Callable[[], None]
    _get_route: Callable[[LiveProvider, Task], Route]
    _list_sources: Callable[[], list[LiveProvider]]
    _find_own_cards: Callable[[Port, Iterable[Mapping[str, Value]]], Awaitable[Mapping[str, SpaceCard]]]

    def copy(
        self,
        source: str | Tier | Backend,
        target: str | Tier | Backend,
        *,
        scope: str | None = None,
        model: str | None = None,
        version: str | None = None,
        namespace: str | None = None,
        where: Callable[[SpaceCard], bool] | None = None,
        texts: Sequence[str] | None = None,
        except_scopes: Iterable[str] = (),
        except_texts: Sequence[str] = (),
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> Copied:
        """Copy entries from one tier to another one, as they are: vectors, costs, metadata and dates.

        ``source`` and ``target`` are names of tiers, or other backends, which you close yourself. Nothing is computed.
        An entry that the target has already is skipped, so after an interruption, the same call continues. An entry
        lives in the target as long as in the source, or for the target's TTL if that is shorter. Entries that wait for
        a background write are not in a tier yet, so call ``flush`` first to include them.

        Args:
            scope: only entries of the scope with this ID. ``model``, ``version`` and ``namespace`` say which space
                cards match; ``where`` is a function that says so.
            texts: only entries of these texts. A source that cannot list its keys (memcached) needs them.
            except_scopes: IDs of scopes to leave out.
            except_texts: texts to leave out.
            dry_run: store nothing, and count what would be copied.
            progress: function that is called after each window, with the number of keys that are done and the number of
                all selected keys. An exception in it ends the call.

        Raises:
            TransferRefused: the tiers cannot be used for this. Nothing was stored.
            TransferStopped: a tier failed for several seconds. What was copied until then is stored.
            TextError: a text has a lone surrogate.
        """
        selected = (scope, model, version, namespace, where, texts, except_scopes, except_texts)
        return run_blocking(self._copy(self._chain.ports.blocking, source, target, selected, dry_run, progress))

    def export(
        self,
        path: str | os.PathLike[str],
        source: str | Tier | Backend | None = None,
        *,
        scope: str | None = None,
        model: str | None = None,
        version: str | None = None,
        namespace: str | None = None,
        where: Callable[[SpaceCard], bool] | None = None,
        texts: Sequence[str] | None = None,
        except_scopes: Iterable[str] = (),
        except_texts: Sequence[str] = (),
        replace: bool = False,
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> Exported:
        """Write entries to a new bundle in the folder ``path``: vectors, costs, metadata and dates.

        ``source`` is the tier to read. By default, all tiers that outlive the process are read, or all tiers if there
        is no such tier. If several tiers have an entry, the bundle gets the finest one that lives longest. The bundle
        of an encrypted tier is encrypted with the tier's key.

        With ``replace``, the new bundle replaces a bundle in the folder. The old one stays until the new one is
        complete, so it may be the source. The other arguments are those of :meth:`copy`.

        Raises:
            TransferRefused: the tiers cannot be used for this.
            TransferStopped: a tier failed for several seconds, or texts were erased meanwhile. Nothing was written.
            StoreExists: there is something in the folder already.
            OSError: the folder cannot be written.
            PluginError: the plugin for bundles cannot be loaded.
            TextError: a text has a lone surrogate.
        """
        selected = (scope, model, version, namespace, where, texts, except_scopes, except_texts)
        port = self._chain.ports.blocking
        return run_blocking(self._export(port, path, source, selected, replace, dry_run, progress))

    async def acopy(
        self,
        source: str | Tier | Backend,
        target: str | Tier | Backend,
        *,
        scope: str | None = None,
        model: str | None = None,
        version: str | None = None,
        namespace: str | None = None,
        where: Callable[[SpaceCard], bool] | None = None,
        texts: Sequence[str] | None = None,
        except_scopes: Iterable[str] = (),
        except_texts: Sequence[str] = (),
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> Copied:
        """Async twin of :meth:`copy`."""
        selected = (scope, model, version, namespace, where, texts, except_scopes, except_texts)
        return await self._copy(self._chain.ports.get_loop_port(), source, target, selected, dry_run, progress)

    async def aexport(
        self,
        path: str | os.PathLike[str],
        source: str | Tier | Backend | None = None,
        *,
        scope: str | None = None,
        model: str | None = None,
        version: str | None = None,
        namespace: str | None = None,
        where: Callable[[SpaceCard], bool] | None = None,
        texts: Sequence[str] | None = None,
        except_scopes: Iterable[str] = (),
        except_texts: Sequence[str] = (),
        replace: bool = False,
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> Exported:
        """Async twin of :meth:`export`."""
        selected = (scope, model, version, namespace, where, texts, except_scopes, except_texts)
        port = self._chain.ports.get_loop_port()
        return await self._export(port, path, source, selected, replace, dry_run, progress)

    # --- both faces ---------------------------------------------------------------------------

    async def _copy(
        self,
        port: Port,
        source: str | Tier | Backend,
        target: str | Tier | Backend,
        selected: _Selected,
        dry_run: bool,
        progress: Progress | None,
    ) -> Copied:
        self._check_open()
        reader, writer = self._find_tier(source, "source"), self._find_tier(target, "target")
        if reader.backend is writer.backend:
            raise TransferRefused(
                f"the source and the target are the same tier, {reader.name!r}; choose another target"
            )
        if writer.capabilities.read_only:
            raise TransferRefused(
                f"tier {writer.name!r} is read-only, so nothing can be copied to it; make a new bundle with export "
                "(`embedonce export` on the command line)"
            )
        transfer = Transfer(self._chain, self._select(*selected), dry_run=dry_run, progress=progress)
        copied = await transfer.copy(port, reader, writer)
        if not self._list_sources():
            return copied
        cards = [card for card in copied.scopes.values() if card is not None]
        return replace(copied, unused=copied.scopes.keys() - (await self._find_own_cards(port, cards)).keys())

    async def _export(
        self,
        port: Port,
        path: str | os.PathLike[str],
        source: str | Tier | Backend | None,
        selected: _Selected,
        replaces: bool,
        dry_run: bool,
        progress: Progress | None,
    ) -> Exported:
        from ._plugins import loading

        self._check_open()
        folder = Path(path)
        tiers = self._list_lasting_tiers() if source is None else [self._find_tier(source, "source")]
        if not tiers:
            raise TransferRefused("the cache has no tiers, so there is nothing to export")
        create_writer = loading.backend(BUNDLE).create_writer
        transfer = Transfer(self._chain, self._select(*selected), dry_run=dry_run, progress=progress)
        return await transfer.export(port, tiers, folder, lambda: create_writer(folder, replace=replaces))

    def _list_lasting_tiers(self) -> list[LiveTier]:
        tiers = self._chain.tiers
        return [tier for tier in tiers if tier.capabilities.scope != "process"] or list(tiers)

    def _find_tier(self, given: str | Tier | Backend, role: str) -> LiveTier:
        """Return the tier of the chain with this name, or a tier for a backend outside of the chain.

        Raises:
            TransferRefused: there is no such tier, or this is not a backend.
        """
        if isinstance(given, str):
            for tier in self._chain.tiers:
                if tier.name == given:
                    return tier
            names = join_words([repr(tier.name) for tier in self._chain.tiers]) or "none"
            raise TransferRefused(f"the {role} {given!r} is not a tier; the tiers are: {names}")
        backend = given.backend if isinstance(given, Tier) else given
        for tier in self._chain.tiers:
            if tier.backend is backend:
                return tier
        try:
            return self._chain.make_outside_tier(given)
        except ConfigError as error:
            raise TransferRefused(f"{role}: {error}") from error

    def _select(
        self,
        scope: str | None,
        model: str | None,
        version: str | None,
        namespace: str | None,
        where: Callable[[SpaceCard], bool] | None,
        texts: Sequence[str] | None,
        except_scopes: Iterable[str],
        except_texts: Sequence[str],
    ) -> Selection:
        if isinstance(except_scopes, str):
            raise TypeError("except_scopes must be a list of IDs of scopes, got one str; write it in brackets")
        parts = {"model": model, "version": version, "namespace": namespace}
        return Selection(
            policy=self._policy,
            scope=scope,
            parts={name: value for name, value in parts.items() if value is not None},
            where=where,
            except_scopes=frozenset(except_scopes),
            texts=None if texts is None else self._normalize_texts(texts),
            except_texts=self._normalize_texts(except_texts),
        )

    def _normalize_texts(self, texts: Sequence[str]) -> list[str]:
        """Return the distinct texts, normalised and as they are, because other policies may have stored them unchanged.

        Raises:
            TextError: a text has a lone surrogate.
        """
        require_texts(texts, for_one="write one text as [text]")
        given = copy_texts(texts)
        keyer = self._get_route(self._source, TASKS[0]).keyer
        normalized = [keyer.normalize(text) for text in given]
        for text in normalized:
            keyer.key(text)  # raises the error of a text that has no key
        return list(dict.fromkeys([*normalized, *given]))


_Selected = tuple[
    "str | None",
    "str | None",
    "str | None",
    "str | None",
    "Callable[[SpaceCard], bool] | None",
    "Sequence[str] | None",
    "Iterable[str]",
    "Sequence[str]",
]
