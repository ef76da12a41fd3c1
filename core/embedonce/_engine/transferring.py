"""Copies entries from tier to tier, and exports them to a new read-only store, window by window."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from embedonce.answers import Copied, Exported
from embedonce.errors import TierError, TransferRefused, TransferStopped
from embedonce.keys import CARD_PREFIX, SpaceCard
from embedonce.vectors import Entry

from .bulk_calls import (
    ExactEntries,
    is_finer,
    list_keys,
    make_card_entry,
    read_cards,
    read_exactly,
    write_card,
    write_strictly,
)
from .key_tables import NO_KEYS, KeyTable
from .ports import Port
from .running import RunningChain
from .selecting import Selection
from .tiers import LiveTier

if TYPE_CHECKING:
    from embedonce.store_writers import StoreWriter

T = TypeVar("T")

MAX_WINDOW = 1024
"""Maximum number of entries in memory at the same time."""
FIRST_WINDOW: Final = 64
"""Number of entries in the first window of a scope, whose vectors may have any size."""
MAX_WINDOW_BYTES: Final = 4 * 2**20
"""Approximate maximum size of the vectors of a window, so that a call of a busy tier ends within its timeout."""

Progress = Callable[[int, int], None]
"""A function that is called with the number of keys that are done and with the number of all selected keys."""


class Source(NamedTuple):
    """A tier that is read."""

    tier: LiveTier
    listed: Mapping[str, KeyTable] | None
    """The keys that it had at the beginning, by scope; None if it cannot list its keys."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is copied or exported: the keys of each scope, and the cards."""

    sources: Sequence[Source]
    keys: Mapping[str, KeyTable]
    cards: Mapping[str, SpaceCard]
    unknown: Mapping[str, str]

    @property
    def total(self) -> int:
        return sum(map(len, self.keys.values()))


@dataclass(slots=True)
class Counts:
    """The keys that are done, by outcome."""

    copied: int = 0
    already_there: int = 0
    expired: int = 0
    corrupt: int = 0
    too_large: int = 0
    scopes: dict[str, SpaceCard | None] = field(default_factory=dict)


class Transfer:
    """One copy or one export over a running chain."""

    def __init__(
        self,
        chain: RunningChain,
        selection: Selection,
        *,
        dry_run: bool,
        progress: Progress | None,
    ) -> None:
        self._chain = chain
        self._selection = selection
        self._dry_run = dry_run
        self._progress = progress
        self._counts = Counts()
        self._done = self._total = 0

    # --- what is selected ---------------------------------------------------------------------

    async def _make_plan(self, port: Port, tiers: Sequence[LiveTier]) -> Plan:
        """List the selected keys of some tiers, and read their cards.

        Raises:
            TransferRefused: a tier cannot list its keys, and no texts are given; or texts cannot be left out.
            TierError: a tier failed.
        """
        for tier in tiers:
            if not tier.capabilities.scan and self._selection.texts is None:
                raise TransferRefused(
                    f"tier {tier.name!r} cannot list its keys, so the texts must be named; use texts= in Python and "
                    "--texts on the command line, or choose another source"
                )
        cards = await self._read_cards(port, tiers)
        sources = [
            Source(tier, await list_keys(port, tier, self._selection.prefix) if tier.capabilities.scan else None)
            for tier in tiers
        ]
        listed: dict[str, KeyTable | None] = {}
        for source in sources:
            for scope, keys in (source.listed or {}).items():
                held = listed.get(scope)
                listed[scope] = keys if held is None else keys.unite(held)
        if any(source.listed is None for source in sources):
            listed |= dict.fromkeys(cards)
        selected, unknown = await self._selection.apply(port, listed, cards)
        return Plan(sources, selected, cards, unknown)

    async def _read_cards(self, port: Port, tiers: Sequence[LiveTier]) -> dict[str, SpaceCard]:
        """Return the space cards of the tiers and of the cache, by scope. The card of an earlier tier wins."""
        cards: dict[str, SpaceCard] = dict(self._chain.cards)
        if not all(tier.capabilities.scan for tier in tiers):
            # Such a tier cannot say which scopes it has, but other tiers may have entries of the same scopes.
            for tier in self._chain.tiers:
                if tier.capabilities.scan:
                    with suppress(TierError):
                        cards |= await read_cards(port, tier)
        for tier in reversed(tiers):
            found = await read_cards(port, tier, None if tier.capabilities.scan else list(cards))
            for scope, card in found.items():
                cards[scope] = {**cards.get(scope, {}), **card}
        return cards

    # --- copying ------------------------------------------------------------------------------

    async def copy(self, port: Port, source: LiveTier, target: LiveTier) -> Copied:
        """Copy the selected entries that the target does not have.

        Raises:
            TransferRefused: the tiers cannot be used for this.
            TransferStopped: a tier failed.
        """
        plan: Plan | None = None
        try:
            plan = await self._make_plan(port, [source])
            self._total = plan.total
            await self._copy_all(port, plan, target)
        except TierError as error:
            raise TransferStopped(str(error), error.tier, self._make_copied(source, target, plan)) from error.__cause__
        return self._make_copied(source, target, plan)

    def _make_copied(self, source: LiveTier, target: LiveTier, plan: Plan | None) -> Copied:
        counts = self._counts
        return Copied(
            source=source.name,
            target=target.name,
            scopes=dict(counts.scopes),
            copied=counts.copied,
            already_there=counts.already_there,
            expired=counts.expired,
            corrupt=counts.corrupt,
            too_large=counts.too_large,
            decrypted=source.codec.is_encrypted and not target.codec.is_encrypted,
            unknown={} if plan is None else plan.unknown,
        )

    async def _copy_all(self, port: Port, plan: Plan, target: LiveTier) -> None:
        there = await list_keys(port, target, self._selection.prefix) if target.capabilities.scan else None
        for scope, table in plan.keys.items():
            has_card = False
            windows = _Windows(table, plan.cards.get(scope))
            for keys in windows.list(scope):
                held = await self._read_held(port, target, keys, None if there is None else there.get(scope, NO_KEYS))
                # The ticket is taken before the source is read, so that what is erased from now on does not come back.
                with self._chain.in_flight.new_ticket() as ticket:
                    asked = keys
                    if plan.sources[0].listed is not None:
                        asked = [key for key in keys if not self._is_kept(held.get(key))]
                    read = await self._read_best(port, plan.sources, scope, asked)
                    kept = {key for key, entry in read.entries.items() if self._is_kept(held.get(key), entry)}
                    new = {key: entry for key, entry in read.entries.items() if key not in kept}
                    windows.adapt(read.entries.values())
                    self._count_read(scope, plan, read, there=len(keys) - len(asked) + len(kept))
                    if new and not has_card:
                        await self._copy_card(port, target, scope, plan.cards.get(scope))
                        has_card = True
                    await self._store(port, target, ticket.number, new)
                await self._report(port, len(keys))

    def _is_kept(self, held: Entry | None, entry: Entry | None = None) -> bool:
        """Return whether the target keeps its entry: the cache can use it, or the source has no finer one."""
        if held is None:
            return False
        is_fine = not is_finer(self._chain.dtype, held.dtype)
        return is_fine or (entry is not None and not is_finer(entry.dtype, held.dtype))

    async def _read_held(
        self, port: Port, target: LiveTier, keys: Sequence[str], there: KeyTable | None
    ) -> Mapping[str, Entry]:
        """Return what the target has of a window. Entries that are damaged or expired there are copied again."""
        if there is not None:
            keys = [key for key, is_there in zip(keys, there.contains(keys).tolist(), strict=True) if is_there]
        return (await read_exactly(port, target, keys)).entries if keys else {}

    async def _copy_card(self, port: Port, target: LiveTier, scope: str, card: SpaceCard | None) -> None:
        """Store the space card of a scope before its first entry."""
        if card is None or self._dry_run:
            return
        if target.capabilities.scope == "process":  # the chain knows the cards of the entries in this process
            self._chain.add_card(scope, dict(card))
        else:
            await write_card(port, target, scope, card, self._chain.clock())

    async def _store(self, port: Port, target: LiveTier, number: int, entries: Mapping[str, Entry]) -> None:
        if self._dry_run:
            self._counts.copied += len(entries)
            return
        written = await write_strictly(port, target, self._chain.in_flight, number, entries, self._chain.clock())
        self._counts.copied += len(written.stored)
        self._counts.too_large += len(written.too_large)

    # --- exporting ----------------------------------------------------------------------------

    async def export(
        self, port: Port, sources: Sequence[LiveTier], path: Path, make_writer: Callable[[], StoreWriter]
    ) -> Exported:
        """Write the selected entries to a new store. Nothing is written if there are none.

        Raises:
            TransferRefused: the tiers cannot be used for this.
            TransferStopped: a tier failed, or texts were erased meanwhile.
            StoreExists, OSError: the new store cannot be written.
        """
        is_encrypted = _agree_on_encryption(sources)
        result = Exported(path=path, sources=[tier.name for tier in sources], scopes={}, encrypted=is_encrypted)
        writer = _Writer(self._chain, port, make_writer)
        erasures = self._chain.in_flight.erasures
        plan: Plan | None = None
        try:
            plan = await self._make_plan(port, sources)
            self._total = plan.total
            await self._export_all(port, plan, writer)
            if self._chain.in_flight.erasures != erasures:
                raise TierError("texts were erased during the export, which may still have them; export again", "")
            parts, size = await writer.commit()
        except TierError as error:
            result = self._complete(result, plan)
            raise TransferStopped(str(error), error.tier, result) from error.__cause__
        except OSError as error:
            if error.filename is None:  # a call with an open file, for example on a full disk
                error.filename = str(path)
            raise
        finally:
            await writer.close()
        return self._complete(result, plan, parts, size)

    def _complete(self, result: Exported, plan: Plan | None, parts: int = 0, size: int = 0) -> Exported:
        counts = self._counts
        return replace(
            result,
            scopes=dict(counts.scopes),
            entries=counts.copied,
            expired=counts.expired,
            corrupt=counts.corrupt,
            unknown={} if plan is None else plan.unknown,
            parts=parts,
            bytes=size,
        )

    async def _export_all(self, port: Port, plan: Plan, writer: _Writer) -> None:
        first = plan.sources[0].tier
        for scope, table in plan.keys.items():
            card = plan.cards.get(scope)
            has_card = card is None
            windows = _Windows(table, card)
            for keys in windows.list(scope):
                read = await self._read_best(port, plan.sources, scope, keys)
                windows.adapt(read.entries.values())
                self._count_read(scope, plan, read, there=0)
                self._counts.copied += len(read.entries)
                items: dict[str, Any] = {}
                if card is not None and read.entries and not has_card:
                    items = dict(_seal(first, {CARD_PREFIX + scope: make_card_entry(card, self._chain.clock())}))
                    has_card = True
                # The writer wants the keys in ascending order, which is the order of the window.
                if first.codec.is_encrypted:
                    items |= {key: bytes(read.values[key]) for key in keys if key in read.values}
                else:
                    items |= {key: read.entries[key] for key in keys if key in read.entries}
                if items and not self._dry_run:
                    await writer.add(items)
                await self._report(port, len(keys))

    # --- both ---------------------------------------------------------------------------------

    async def _read_best(self, port: Port, sources: Sequence[Source], scope: str, keys: Sequence[str]) -> ExactEntries:
        """Return the best entry of each key: the finest one, and of these the one that lives longest."""
        best = ExactEntries()
        left = list(keys)
        for tier, listed in sources:
            asked = left
            if listed is not None and len(sources) > 1:
                table = listed.get(scope, NO_KEYS)
                asked = [key for key, is_there in zip(left, table.contains(left).tolist(), strict=True) if is_there]
            if not asked:
                continue
            read = await read_exactly(port, tier, asked)
            for key, entry in read.entries.items():
                if _is_better(entry, best.entries.get(key)):
                    best.entries[key] = entry
                    best.values[key] = read.values[key]
            best.expired.update(read.expired)
            best.corrupt.update(read.corrupt)
            left = [key for key in left if not self._is_final(best.entries.get(key))]
        best.corrupt.difference_update(best.entries)
        best.expired.difference_update(best.entries, best.corrupt)
        return best

    def _is_final(self, entry: Entry | None) -> bool:
        """Return whether no other tier can have a better entry that matters."""
        return entry is not None and entry.expires is None and not is_finer(self._chain.dtype, entry.dtype)

    def _count_read(self, scope: str, plan: Plan, read: ExactEntries, *, there: int) -> None:
        counts = self._counts
        counts.already_there += there
        counts.expired += len(read.expired)
        counts.corrupt += len(read.corrupt)
        if there or read.entries or read.expired or read.corrupt:
            counts.scopes.setdefault(scope, plan.cards.get(scope))

    async def _report(self, port: Port, keys: int) -> None:
        self._done += keys
        if self._progress is not None:
            self._progress(self._done, self._total)
        await port.sleep(0)  # decoding a window must not block an event loop for long


class _Windows:
    """The keys of a scope in windows, whose size depends on the size of the vectors."""

    def __init__(self, table: KeyTable, card: SpaceCard | None) -> None:
        self._table = table
        dimensions = None if card is None else card.get("dimensions")
        self._size = min(FIRST_WINDOW, MAX_WINDOW)
        if isinstance(dimensions, int) and dimensions > 0:
            self._resize(4 * dimensions)

    def list(self, scope: str) -> Iterator[Sequence[str]]:
        """Yield the keys window by window, in ascending order."""
        start = 0
        while start < len(self._table):
            keys = self._table.list_keys(scope, start, start + self._size)
            start += len(keys)
            yield keys

    def adapt(self, entries: Any) -> None:
        """Choose the size of the next window by the size of the vectors that were read."""
        sizes = [entry.vector.nbytes for entry in entries]
        if sizes:
            self._resize(max(sizes))

    def _resize(self, vector_bytes: int) -> None:
        self._size = max(1, min(MAX_WINDOW, MAX_WINDOW_BYTES // max(vector_bytes, 1)))


class _Writer:
    """The writer of an export. It is made when there is something to write, and is used in a thread."""

    def __init__(self, chain: RunningChain, port: Port, make: Callable[[], StoreWriter]) -> None:
        self._workers = chain.ports.workers
        self._port = port
        self._make = make
        self._writer: StoreWriter | None = None

    async def add(self, items: Mapping[str, Entry | bytes]) -> None:
        writer = self._writer
        if writer is None:
            writer = self._writer = await self._call(self._make)
        await self._call(lambda: writer.add(items))

    async def commit(self) -> tuple[int, int]:
        """Return the number of parts and the size in bytes."""
        if self._writer is None:
            return 0, 0
        written = await self._call(self._writer.commit)
        return written.parts, written.bytes

    async def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    async def _call(self, call: Callable[[], T]) -> T:
        return await self._port.call(call, None, self._workers, inline=True, quick=False)


def _agree_on_encryption(sources: Sequence[LiveTier]) -> bool:
    """Return whether the tiers are encrypted.

    Raises:
        TransferRefused: only some of them are.
    """
    encrypted = [tier.name for tier in sources if tier.codec.is_encrypted]
    plain = [tier.name for tier in sources if not tier.codec.is_encrypted]
    if encrypted and plain:
        raise TransferRefused(
            f"tier {encrypted[0]!r} is encrypted and tier {plain[0]!r} is not, but a bundle is either encrypted or "
            "not; choose one tier with source= (--from on the command line)"
        )
    return bool(encrypted)


def _seal(tier: LiveTier, entries: Mapping[str, Entry]) -> Mapping[str, Entry | bytes]:
    """Return the entries, encrypted if the tier is."""
    return tier.codec.encode(entries) if tier.codec.is_encrypted else entries


def _is_better(entry: Entry, other: Entry | None) -> bool:
    if other is None or is_finer(entry.dtype, other.dtype):
        return True
    if is_finer(other.dtype, entry.dtype) or other.expires is None:
        return False
    return entry.expires is None or entry.expires > other.expires
