"""Maintenance of the tiers' contents: erase, list, check, explain. A tier that fails is always reported."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from embedonce.answers import Explanation, Held, Purged, TierCheck
from embedonce.errors import EraseIncomplete, PartialAnswer, TierBusy, TierError
from embedonce.keys import (
    CARD_PREFIX,
    FINGERPRINT,
    KEY_PREFIX,
    KeyPolicy,
    SpaceCard,
    make_digests,
    read_fingerprint,
)
from embedonce.vectors import Dtype, Metadata, open_frame

from .card_words import MOST_NAMED, compare_cards
from .flights import Erasure, InFlight
from .leases import lease_keys
from .measuring import group_by_scope, measure
from .ports import Port
from .probing import probe_writes
from .read_only import EntriesKept, count_entries, describe_unused, refuse_to_forget, refuse_to_purge
from .routes import Route
from .selecting import matches_card
from .served import ServedModels
from .tiers import PROBE_KEY, LiveTier, TierUnable

ENTRIES_PER_READ = 1024
"""Maximum number of entries in memory at the same time while a whole tier is read."""


FindOwnCards: TypeAlias = Callable[[Port, Iterable[SpaceCard]], Awaitable[Mapping[str, SpaceCard]]]


class FoundKeys(NamedTuple):
    """The keys of texts in several scopes, and what could not be found."""

    keys: list[str]
    left: Mapping[str, SpaceCard] = MappingProxyType({})
    """The cards of the scopes that hold one of the texts and were not wanted."""
    failed: Mapping[str, TierError] = MappingProxyType({})
    """The tiers that could not be listed."""
    unknown: Mapping[str, str] = MappingProxyType({})
    """The scopes whose keys could not be made, with the reasons."""


class Upkeep:
    """Erases and lists the entries of one chain's tiers, checks the tiers, and explains misses."""

    def __init__(
        self,
        tiers: Sequence[LiveTier],
        in_flight: InFlight,
        cards: Mapping[str, SpaceCard],
        served: ServedModels,
        *,
        busy_timeout: float,
        clock: Callable[[], float],
    ) -> None:
        self._tiers = tiers
        self._in_flight = in_flight
        self._cards = cards
        self._served = served
        self._busy_timeout = busy_timeout
        self._clock = clock

    # --- erasing ------------------------------------------------------------------------------

    async def forget(self, port: Port, found: FoundKeys) -> None:
        """Remove keys from every tier. Queued writes, promotions and flights cannot store the keys again.

        Raises:
            EraseIncomplete: a tier failed or cannot delete, a read-only tier has one of the keys, or keys could not be
                found. The error names the tiers and scopes.
        """

        async def erase(tier: LiveTier) -> None:
            if tier.capabilities.read_only:
                await refuse_to_forget(port, tier, found.keys)
            else:
                await tier.erase(port, found.keys if tier.lease is None else [*found.keys, *lease_keys(found.keys)])
            if tier.name in found.failed:
                raise found.failed[tier.name]

        try:
            await self._erase(port, Erasure(found.keys), erase, "forget", found.unknown)
        except EraseIncomplete as error:
            error.left = dict(found.left)
            raise

    async def find_keys(
        self, port: Port, texts: Sequence[str], policy: KeyPolicy, where: Callable[[SpaceCard], bool]
    ) -> FoundKeys:
        """Find the keys of normalised texts in every scope whose space card satisfies ``where``."""
        failed: dict[str, TierError] = {}
        cards: dict[str, SpaceCard] = {}
        for tier in self._tiers:
            try:
                stored = await self._read_cards(port, tier)
            except TierError as error:
                failed[tier.name] = error
            else:
                cards |= {name: card for name, card in stored.items() if name not in cards or FINGERPRINT in card}
        cards |= self._cards
        keys = await self._make_keys(port, texts, policy, cards)
        owners = {key: scope for scope in keys for key in keys[scope]}
        listed = group_by_scope(self._in_flight.list_unwritten())
        held, holding = set(listed), {owners[key] for queued in listed.values() for key in queued if key in owners}
        for tier in self._tiers:
            if tier.name not in failed:
                try:
                    listed = group_by_scope(await tier.scan(port, KEY_PREFIX))
                except TierError as error:
                    failed[tier.name] = error
                else:
                    held |= listed.keys()
                    holding |= {owners[key] for scope in listed for key in listed[scope] if key in owners}
        wanted = {scope for scope, card in cards.items() if where(card)}
        unknown = {scope: "its space card is missing" for scope in held - cards.keys()}
        for scope in (held & wanted) - keys.keys():
            unknown[scope] = "it belongs to another secret, or its space card is from an earlier version"
        # A call may be computing a text now for a wanted scope that holds nothing yet.
        found = [key for scope in wanted & keys.keys() for key in keys[scope]]
        return FoundKeys(found, {scope: cards[scope] for scope in holding - wanted}, failed, unknown)

    async def _make_keys(
        self, port: Port, texts: Sequence[str], policy: KeyPolicy, cards: Mapping[str, SpaceCard]
    ) -> dict[str, list[str]]:
        """Return the keys of normalised texts in each scope whose card shows them."""
        keys: dict[str, list[str]] = {}
        digests: dict[bytes, list[str]] = {}
        for scope, card in cards.items():
            fingerprint = read_fingerprint(policy, scope, card)
            if fingerprint is not None:
                if fingerprint not in digests:
                    await port.sleep(0)  # hashing many texts for many spaces must not block an event loop
                    digests[fingerprint] = make_digests(policy, fingerprint, texts)
                keys[scope] = [f"{KEY_PREFIX}{scope}.{digest}" for digest in digests[fingerprint]]
        return keys

    async def purge(
        self,
        port: Port,
        *,
        scope: str | None,
        wanted: Mapping[str, str],
        where: Callable[[SpaceCard], bool] | None,
        keep: Collection[str] | None,
        dry_run: bool,
    ) -> Purged:
        """Remove every entry in the scopes that match ``scope``, ``wanted`` and ``where`` and are not in ``keep``.

        With ``keep``, a scope without a space card matches too if nothing else is given. With ``dry_run``, only count
        entries.

        Raises:
            EraseIncomplete: a tier failed, a tier cannot list or delete keys, or a read-only tier has some of the
                entries. The error names each such tier.
        """
        failed: dict[str, TierError] = {}
        kept = () if keep is None else keep
        scopes: dict[str, SpaceCard | None] = {}
        if scope is not None and not wanted and where is None and scope not in kept:
            scopes[scope] = self._cards.get(scope)
        for tier in self._tiers:
            try:
                cards: dict[str, SpaceCard | None] = {**await self._read_cards(port, tier)}
                if keep is not None:
                    cards = dict.fromkeys(group_by_scope(await tier.scan(port, KEY_PREFIX))) | cards
            except TierError as error:
                failed[tier.name] = error
            else:
                matching = {name: card for name, card in cards.items() if scope in (None, name) and name not in kept}
                scopes |= {name: card for name, card in matching.items() if matches_card(card, wanted, where)}
        removed: dict[str, int] = {}
        if dry_run:
            left: dict[str, dict[str, int]] = {}
            for tier in self._tiers:
                if tier.name not in failed:
                    counts = await count_entries(port, tier, scopes)
                    if not tier.capabilities.read_only:
                        removed[tier.name] = sum(counts.values())
                    elif counts:
                        left[tier.name] = counts
            purged = Purged(scopes, removed, left)
            with _attach(purged):
                _raise_if_incomplete(failed, "purge --dry-run")
            return purged

        async def erase(tier: LiveTier) -> None:
            if tier.name in failed:
                raise failed[tier.name]
            if tier.capabilities.read_only:
                await refuse_to_purge(port, tier, scopes)
                return
            keys = await self._list_keys(port, tier, scopes)
            leases = lease_keys(keys) if tier.lease is not None else []
            await tier.erase(port, [*keys, *leases, *(CARD_PREFIX + name for name in scopes)])
            tier.writer.forget_cards(scopes)
            removed[tier.name] = len(keys)

        prefixes = [f"{KEY_PREFIX}{name}." for name in scopes]
        purged = Purged(scopes, removed)
        try:
            with _attach(purged):
                await self._erase(port, Erasure(prefixes=prefixes), erase, "purge")
        finally:
            self._served.forget(scopes)
        return purged

    async def _list_keys(self, port: Port, tier: LiveTier, scopes: Iterable[str]) -> list[str]:
        return [key for scope in scopes for key in await tier.scan(port, f"{KEY_PREFIX}{scope}.")]

    async def _erase(
        self,
        port: Port,
        erasure: Erasure,
        erase: Callable[[LiveTier], Any],
        operation: str,
        unknown: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Erase from all tiers. ``unknown`` has the scopes that cannot be erased, with the reasons."""
        failed: dict[str, TierError] = {}
        with self._in_flight.forbid_stores(erasure) as busy:
            end = time.monotonic() + self._busy_timeout
            while (writing := busy()) and time.monotonic() < end:
                await port.sleep(0.002)
            for tier in self._tiers:
                try:
                    await erase(tier)
                except TierError as error:
                    failed[tier.name] = error
                else:
                    if tier.name in writing:
                        failed[tier.name] = TierError("a write that has not ended may restore entries", tier.name)
        _raise_if_incomplete(failed, operation, unknown)

    # --- listing ------------------------------------------------------------------------------

    async def _read_cards(self, port: Port, tier: LiveTier) -> dict[str, SpaceCard]:
        """Return the space cards that a tier stores, and the space cards of this cache, by scope."""
        return {**self._cards, **await self._read_stored_cards(port, tier)}

    async def _read_stored_cards(self, port: Port, tier: LiveTier) -> dict[str, SpaceCard]:
        keys = await tier.scan(port, CARD_PREFIX)
        values = await tier.peek(port, keys) if keys else {}
        decoded = tier.decode(values, dtype="int8", dimensions=None)
        return {key.removeprefix(CARD_PREFIX): dict(entry.metadata or {}) for key, entry in decoded.entries.items()}

    async def contents(self, port: Port) -> list[Held]:
        """Count the entries of each tier by scope; a tier that cannot be listed has one row with the reason."""
        held: list[Held] = []
        for tier in self._tiers:
            try:
                cards = await self._read_cards(port, tier)
                scopes = group_by_scope(await tier.scan(port, KEY_PREFIX))
                held += [await measure(port, tier, scope, scopes[scope], cards.get(scope)) for scope in sorted(scopes)]
            except TierError as error:
                held.append(Held(tier.name, "", None, 0, _describe(error)))
        return held

    async def read_all_cards(self, port: Port) -> dict[str, SpaceCard]:
        """Return the space cards that the tiers store, by scope. A tier that fails is left out."""
        cards: dict[str, SpaceCard] = {}
        for tier in self._tiers:
            with suppress(TierError):
                cards |= await self._read_cards(port, tier)
        return cards

    async def list_metadata(self, port: Port, route: Route, dtype: Dtype) -> list[Metadata]:
        """Return the metadata of every entry in a route's scope, once per entry. Skip entries without metadata.

        Raises:
            TierError: a tier failed or cannot list; the message names the tier.
        """
        found: dict[str, Metadata | None] = {}
        for tier in self._tiers:
            try:
                scanned = await tier.scan(port, f"{KEY_PREFIX}{route.keyer.scope}.")
                keys = [key for key in scanned if key not in found]
                for start in range(0, len(keys), ENTRIES_PER_READ):
                    values = await tier.peek(port, keys[start : start + ENTRIES_PER_READ])
                    decoded = tier.decode(values, dtype=dtype, dimensions=route.dimensions)
                    entries = tier.codec.remove_previews(decoded.entries)
                    found.update({key: deepcopy(entry.metadata) for key, entry in entries.items()})
            except TierError as error:
                raise TierError(f"tier {tier.name!r}: {_describe(error)}", tier.name) from error
        return [metadata for metadata in found.values() if metadata is not None]

    async def check(self, port: Port, find_own_cards: FindOwnCards, *, verify: bool) -> list[TierCheck]:
        """Check that each tier answers, can decrypt its space cards, and stores, returns and deletes a probe.

        ``find_own_cards`` gets the cards that a read-only tier stores, and returns the cards of all scopes that the
        cache uses, by scope. With ``verify``, stores that can check themselves are read as a whole.
        """
        checks = []
        for tier in self._tiers:
            start = time.perf_counter()
            detail, ok = "", False
            writes: bool | None = None
            verified: bool | None = None
            is_read = False
            is_read_only = tier.capabilities.read_only
            try:
                await self._read_available(port, tier, [PROBE_KEY])
                is_read = True
                detail = await self._find_key_mismatch(port, tier)
                if not detail:
                    writes, remark = await probe_writes(port, tier, self._clock)
                    unused = await self._describe_unused(port, tier, find_own_cards) if is_read_only else ""
                    detail = "; ".join(filter(None, (await tier.describe(port), remark, unused)))
                    ok = True
            except TierError as error:
                detail = _describe(error)
                writes = False if is_read and not is_read_only else None
            seconds = time.perf_counter() - start
            if verify and is_read and hasattr(tier.backend, "verify"):
                try:
                    detail = "; ".join(filter(None, (detail, await tier.verify(port))))
                    verified = True
                except TierError as error:
                    detail, ok, verified = _describe(error), False, False
            kind = type(tier.backend).__name__.removesuffix("Backend").lower()
            checks.append(TierCheck(tier.name, kind, ok, seconds, detail, writes, is_read_only, verified))
        return checks

    async def _describe_unused(self, port: Port, tier: LiveTier, find_own_cards: FindOwnCards) -> str:
        """Return what a read-only tier holds, if the cache uses nothing of it; otherwise ""."""
        stored = await self._read_stored_cards(port, tier) if tier.capabilities.scan else {}
        own = await find_own_cards(port, stored.values())
        return await describe_unused(port, tier, stored, own) if own else ""

    async def _read_available(self, port: Port, tier: LiveTier, keys: Sequence[str]) -> Mapping[str, Any]:
        """Read some keys. If the tier is reachable but busy, or has lost a node, return fewer values or none."""
        try:
            return await tier.peek(port, keys)
        except TierError as error:
            if isinstance(error.__cause__, PartialAnswer):
                return dict(error.__cause__.answer)
            if isinstance(error.__cause__, TierBusy):
                return {}
            raise

    async def _find_key_mismatch(self, port: Port, tier: LiveTier) -> str:
        """Return a message if the tier cannot decrypt some of the space cards that it stores, else "".

        All cards are checked if the tier is encrypted or read-only and can list what it stores. Otherwise, only the
        cards of this cache are checked.
        """
        caps = tier.capabilities
        if caps.scope == "process" and not caps.read_only:
            return ""
        can_list = (tier.codec.is_encrypted or caps.read_only) and caps.scan
        cards = await tier.scan(port, CARD_PREFIX) if can_list else [CARD_PREFIX + scope for scope in list(self._cards)]
        values = await self._read_available(port, tier, cards) if cards else {}
        if not tier.codec.is_encrypted:
            sealed = sum(open_frame(value) is not None for value in values.values())
            return f"{sealed} of {len(values)} scopes are encrypted, but the tier has no key" if sealed else ""
        decoded = tier.decode(values, dtype="int8", dimensions=None)
        if decoded.corrupt:
            return f"{len(decoded.corrupt)} of {len(values)} scopes are encrypted with a different key"
        # Other tiers may have entries from before encryption was turned on, which are replaced one by one.
        plain = len(decoded.missed) if caps.read_only else 0
        return f"{plain} of {len(values)} scopes are not encrypted, but the tier has a key" if plain else ""

    async def migrate(self, port: Port) -> dict[str, str]:
        """Migrate the layout of every store that can be migrated. For each tier, return what was done.

        Raises:
            TierError: a store could not be migrated.
        """
        return {tier.name: await tier.migrate(port) for tier in self._tiers if hasattr(tier.backend, "migrate")}

    async def compact(self, port: Port) -> dict[str, str]:
        """Compact every store that can be compacted. For each such tier, return how large its store is and was.

        Raises:
            TierError: a store could not be compacted. The other stores were compacted nevertheless.
        """
        done: dict[str, str] = {}
        failed: list[TierError] = []
        for tier in self._tiers:
            if hasattr(tier.backend, "compact"):
                try:
                    done[tier.name] = await tier.compact(port)
                except TierError as error:
                    failed.append(error)
        if failed:
            raise failed[0]
        return done

    # --- explaining ---------------------------------------------------------------------------

    async def explain(self, port: Port, route: Route, text: str, policy: KeyPolicy, dtype: Dtype) -> Explanation:
        """Return how a text's key is built and what each tier stores under the key.

        This method counts no hits or misses, and promotes no entries.
        """
        keyer = route.keyer
        normalized = keyer.normalize(text)
        (key,) = route.keys([text])
        outcomes = {tier.name: await self._read_outcome(port, tier, key, route, dtype) for tier in self._tiers}
        reasons: list[str] = []
        if "hit" not in outcomes.values():
            for tier in self._tiers:
                if outcomes[tier.name] != "skipped" and not outcomes[tier.name].startswith("error"):
                    reasons += await self._find_near_misses(port, tier, keyer.scope)
        return Explanation(
            key=key,
            scope=keyer.scope,
            fingerprint=keyer.fingerprint.hex(),
            task=route.task,
            space=route.space.described(),
            policy={
                "normalize": list(policy.normalize),
                "version": policy.version,
                "namespace": policy.namespace,
                "hash": policy.hash,
                "keyed": policy.secret is not None,
            },
            normalized=normalized != text,
            tiers=outcomes,
            reasons=reasons,
        )

    async def _read_outcome(self, port: Port, tier: LiveTier, key: str, route: Route, dtype: Dtype) -> str:
        if tier.reader.breaker.is_open:
            return "skipped"
        try:
            values = await tier.peek(port, [key])
        except TierError as error:
            return f"error: {_describe(error)}"
        if key not in values:
            return "miss"
        decoded = tier.decode(values, dtype=dtype, dimensions=route.dimensions)
        if key in decoded.entries:
            return "hit"
        if key in decoded.corrupt:
            return "corrupt"
        unexpired = tier.decode(values, dtype=dtype, dimensions=route.dimensions, now=float("-inf"))
        return "expired" if key in unexpired.entries else "coarser"

    async def _find_near_misses(self, port: Port, tier: LiveTier, scope: str) -> list[str]:
        own_card = self._cards.get(scope, {})
        try:
            cards = await self._read_cards(port, tier) if tier.capabilities.scan else {}
        except TierError:
            return []  # the outcome of this tier already has the error
        reasons = []
        for name, card in sorted(cards.items()):
            differences = compare_cards(own_card, card)
            is_other_task = name in self._cards and card.get("task") != own_card.get("task")
            if name != scope and 0 < len(differences) <= 2 and not is_other_task:
                reasons.append(f"tier {tier.name!r} holds entries with {', '.join(differences)}")
        return reasons


def _describe(error: TierError) -> str:
    """Return a tier's error on one line, with the message of the store's own error if there is one."""
    cause = error.__cause__
    detail = " ".join(str(cause).split()) if cause is not None else ""
    return f"{error}: {detail}" if detail and detail != str(error) else str(error)


@contextmanager
def _attach(purged: Purged) -> Iterator[None]:
    """Attach the result of a purge to the error that says that it is incomplete."""
    try:
        yield
    except EraseIncomplete as error:
        error.matched, error.removed = dict(purged.scopes), dict(purged.removed)
        raise


def _raise_if_incomplete(
    failed: Mapping[str, TierError], operation: str, unknown: Mapping[str, str] = MappingProxyType({})
) -> None:
    if failed or unknown:
        tiers = {name: _describe(error) for name, error in failed.items()}
        unable = [name for name, error in failed.items() if isinstance(error, TierUnable)]
        kept = {name: error.scopes for name, error in failed.items() if isinstance(error, EntriesKept)}
        causes = [f"tier {name!r}: {cause}" for name, cause in tiers.items()]
        causes += [f"scope {scope}: {cause}" for scope, cause in list(unknown.items())[:MOST_NAMED]]
        if len(unknown) > MOST_NAMED:
            causes.append(f"{len(unknown) - MOST_NAMED} more scopes")
        advice = [
            *(["Call it again once these tiers are reachable"] if len(unable) < len(failed) else ()),
            *(
                ["Entries of tiers that cannot list or delete stay until they expire or are evicted"]
                if len(unable) > len(kept)
                else ()
            ),
            *(["The keys of these scopes are not known; remove the scopes with purge(scope=…)"] if unknown else ()),
        ]
        message = ". ".join([f"{operation} is incomplete ({'; '.join(causes)})", *advice])
        raise EraseIncomplete(message, tiers, unknown, unable, kept)
