"""Reads and writes of many entries in one tier, for copies and exports.

Other calls must never wait long for a tier, so they skip a tier that fails. A copy must be complete, so these calls are
patient and strict: they wait longer than the tier's timeout, they try again, and then they raise. They ignore the
breaker and the queue of background writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from embedonce.errors import CacheClosed, PartialAnswer, TierBusy, TierError, TierTimeout
from embedonce.keys import CARD_PREFIX, SpaceCard
from embedonce.vectors import Dtype, Entries, Entry, freeze

from .backend_calls import split_partial
from .flights import InFlight
from .key_tables import KeyTable, read_key_tables
from .ports import Port
from .tiers import LiveTier

T = TypeVar("T")

MIN_TIMEOUT: Final = 5.0
"""Minimum timeout of a call, in seconds. The default timeout of a network tier, 0.25 s, is for lookups."""
PATIENCE = 15.0
"""Seconds after which a call is not tried again, however often it was tried."""
MAX_FAILURES: Final = 6
"""A call is not tried again after this many failures. Timeouts do not count, and neither does a tier that is busy."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0
"""Seconds between the first two tries of a call. Each pause is twice as long as the one before, up to the longest."""

DTYPES: Final[Sequence[Dtype]] = ("float32", "float16", "int8")
"""All dtypes, the finest first."""

LIFE_RATIO: Final = 1.25
"""Entries are written together if the longest of their remaining lives is at most this many times the shortest one,
because all entries of a call get the same TTL."""


# --- calls ------------------------------------------------------------------------------------


async def call_patiently(
    port: Port,
    tier: LiveTier,
    call: Callable[[], T],
    *,
    note_failure: Callable[[Exception], None] = lambda error: None,
    listing: bool = False,
) -> T:
    """Make a call to the tier's backend. After a failure, try it again with growing pauses.

    ``note_failure`` gets each error before the next try. A ``listing`` has no timeout.

    Raises:
        TierError: the call still fails. The message names the tier; ``__cause__`` is the backend's error.
        CacheClosed: the backend is closed.
    """
    started, failures, pause = time.monotonic(), 0, FIRST_PAUSE
    while True:
        try:
            result: T = await tier.calls.call(port, call, listing=listing, min_timeout=MIN_TIMEOUT)
            return result
        except CacheClosed:
            raise
        except Exception as error:  # noqa: BLE001  (a backend may raise anything)
            problem = error
        failures += not _is_busy(problem)
        waited = time.monotonic() - started
        if failures >= MAX_FAILURES or waited >= PATIENCE:
            raise _make_error(tier, problem, waited) from problem
        note_failure(problem)
        await port.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def _is_busy(error: Exception) -> bool:
    """Return whether the tier may just be busy."""
    cause = error.__cause__ if isinstance(error, PartialAnswer) else error
    return isinstance(cause, TimeoutError | TierBusy)


def _make_error(tier: LiveTier, error: Exception, waited: float) -> TierError:
    if isinstance(error, TimeoutError):
        return TierTimeout(f"tier {tier.name!r} did not answer for {waited:.1f} s", tier.name)
    return TierError(f"tier {tier.name!r} failed for {waited:.1f} s ({type(error).__name__})", tier.name)


# --- reading ----------------------------------------------------------------------------------


async def list_keys(port: Port, tier: LiveTier, prefix: str) -> dict[str, KeyTable]:
    """Return the keys of the entries that start with ``prefix``, by scope. The tier must be able to list.

    Raises:
        TierError: the tier failed.
    """
    return await call_patiently(port, tier, lambda: read_key_tables(tier.backend.scan(prefix)), listing=True)


@dataclass(frozen=True, slots=True)
class ExactEntries:
    """What a tier has of some keys. A key that is nowhere here is missing in the tier."""

    entries: dict[str, Entry] = field(default_factory=dict)
    """Entries with the dtype in which they are stored, without previews of texts."""
    values: dict[str, Any] = field(default_factory=dict)
    """For each of ``entries``, the value as the backend returned it."""
    expired: set[str] = field(default_factory=set)
    corrupt: set[str] = field(default_factory=set)
    """Keys whose value is damaged, or cannot be decrypted, or has the format of a newer version."""


async def read_exactly(port: Port, tier: LiveTier, keys: Sequence[str]) -> ExactEntries:
    """Read entries as they are stored, without counting hits or misses.

    Raises:
        TierError: the tier failed.
    """
    found = ExactEntries()
    values = await _read_values(port, tier, keys)
    if not values:
        return found
    entries, corrupt, rest = _decode_all(tier, values, None)
    entries = tier.codec.remove_previews(Entries(entries)).as_dict()
    # Only a space card has an empty vector. Under the key of a text, an empty vector is invalid.
    empty = [key for key, entry in entries.items() if entry.vector.size == 0]
    for key in empty:
        del entries[key]
    found.entries.update(entries)
    found.values.update({key: values[key] for key in entries})
    found.corrupt.update(corrupt, empty)
    if rest:
        expired, damaged, unknown = _decode_all(tier, rest, float("-inf"))
        found.expired.update(expired)
        found.corrupt.update(damaged, unknown)
    return found


async def _read_values(port: Port, tier: LiveTier, keys: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for chunk in tier.calls.split_into_chunks(keys):
        await _read_chunk(port, tier, chunk, values)
    wanted = set(keys)
    return values if wanted.issuperset(values) else {key: value for key, value in values.items() if key in wanted}


async def _read_chunk(port: Port, tier: LiveTier, keys: Sequence[str], values: dict[str, Any]) -> None:
    left = keys

    def keep_answer(error: Exception) -> None:
        nonlocal left
        left, answer = split_partial(left, error, Mapping)
        values.update(answer)

    values.update(await call_patiently(port, tier, lambda: tier.backend.get_many(left), note_failure=keep_answer))


def _decode_all(
    tier: LiveTier, values: Mapping[str, Any], now: float | None
) -> tuple[dict[str, Entry], list[str], dict[str, Any]]:
    """Return the entries with the dtypes in which they are stored, the corrupt keys, and the other values."""
    entries: dict[str, Entry] = {}
    corrupt: list[str] = []
    left = dict(values)
    for dtype in DTYPES:
        # An entry that is coarser than the wanted dtype is missed, and is found in a later round.
        decoded = tier.decode(left, dtype=dtype, dimensions=None, now=now)
        entries |= decoded.entries.as_dict()
        corrupt += decoded.corrupt
        left = {key: values[key] for key in decoded.missed}
        if not left:
            break
    return entries, corrupt, left


def is_finer(one: Dtype, other: Dtype) -> bool:
    """Return whether the first dtype is finer than the second one."""
    return DTYPES.index(one) < DTYPES.index(other)


# --- writing ----------------------------------------------------------------------------------


@dataclass(slots=True)
class BulkWrite:
    """The keys of one bulk write, by outcome. Keys that an erasure forbids are in neither set."""

    stored: set[str] = field(default_factory=set)
    too_large: set[str] = field(default_factory=set)


async def write_strictly(
    port: Port, tier: LiveTier, in_flight: InFlight, number: int, entries: Mapping[str, Entry], now: float
) -> BulkWrite:
    """Store entries. Each keeps its expiry date, unless it would outlive the tier's TTL.

    ``number`` is that of the ticket of the call: entries that are erased after it began are not stored.

    Raises:
        TierError: the tier failed.
    """
    done = BulkWrite()
    for group in _group_by_life(_limit_life(tier, entries, now), now):
        ends = {entry.expires for entry in group.values()}
        ttl = None if None in ends else max(1e-3, max(ends) - now)  # type: ignore[type-var,operator]
        for part in tier.calls.split_items(group):
            await _write_part(port, tier, in_flight, number, part, ttl, done)
    return done


async def _write_part(
    port: Port,
    tier: LiveTier,
    in_flight: InFlight,
    number: int,
    part: Mapping[str, Entry],
    ttl: float | None,
    done: BulkWrite,
) -> None:
    values = _encode_fitting(tier, part)
    left = {key: part[key] for key in values}
    done.too_large |= part.keys() - values.keys()

    def write() -> set[str]:
        # Each try is tracked on its own, so that an erasure need not wait for the pause between two tries.
        with in_flight.track_write(tier.name, number, left) as permitted:
            if permitted:
                tier.backend.set_many({key: values[key] for key in permitted}, ttl)
            return set(permitted)

    def keep_failed(error: Exception) -> None:
        nonlocal left
        failed, _ = split_partial(list(left), error, object)
        done.stored |= left.keys() - set(failed)
        left = {key: left[key] for key in failed}

    if left:
        done.stored |= await call_patiently(port, tier, write, note_failure=keep_failed)


def _encode_fitting(tier: LiveTier, entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Return the values of the entries that are not too large for the tier."""
    limit = tier.capabilities.max_value_bytes
    values = dict(tier.codec.encode(entries))
    if limit is None:
        return values
    return {key: value for key, value in values.items() if not isinstance(value, bytes) or len(value) <= limit}


def _limit_life(tier: LiveTier, entries: Mapping[str, Entry], now: float) -> Mapping[str, Entry]:
    """Return the entries with the dates at which they expire in this tier."""
    if tier.writer.ttl is not None:
        return tier.writer.set_expiry(entries)
    longest = tier.codec.longest_ttl
    if longest is None:
        return entries
    # The chain takes an entry that expires later for one that was written before the clock was set back.
    return {
        key: entry if entry.expires is None or entry.expires <= now + longest else entry._replace(expires=now + longest)
        for key, entry in entries.items()
    }


def _group_by_life(entries: Mapping[str, Entry], now: float) -> Iterator[dict[str, Entry]]:
    """Yield groups of entries whose remaining lives are similar. Entries that never expire are a group."""
    endless = {key: entry for key, entry in entries.items() if entry.expires is None}
    if endless:
        yield endless
    dated = [(entry.expires, key) for key, entry in entries.items() if entry.expires is not None]
    group: dict[str, Entry] = {}
    limit = 0.0
    for expires, key in sorted(dated):
        if group and expires - now > limit:
            yield group
            group = {}
        if not group:
            limit = max(1.0, LIFE_RATIO * (expires - now))
        group[key] = entries[key]
    if group:
        yield group


# --- space cards ------------------------------------------------------------------------------


async def read_cards(port: Port, tier: LiveTier, scopes: Iterable[str] | None = None) -> dict[str, SpaceCard]:
    """Return the space cards that a tier stores for some scopes, or for all scopes, by scope.

    Raises:
        TierError: the tier failed.
    """
    if scopes is None:
        keys = await call_patiently(port, tier, lambda: list(tier.backend.scan(CARD_PREFIX)), listing=True)
    else:
        keys = [CARD_PREFIX + scope for scope in scopes]
    values = await _read_values(port, tier, keys) if keys else {}
    decoded = tier.decode(values, dtype="int8", dimensions=None)
    return {key.removeprefix(CARD_PREFIX): dict(entry.metadata or {}) for key, entry in decoded.entries.items()}


def make_card_entry(card: SpaceCard, created: float) -> Entry:
    """Return the entry that holds a space card."""
    return Entry(freeze(()), created, metadata=card)


async def write_card(port: Port, tier: LiveTier, scope: str, card: SpaceCard, now: float) -> None:
    """Store a space card, unless the tier has it already. The parts of a card that the tier has stay as they are.

    Raises:
        TierError: the tier failed.
    """
    held = (await read_cards(port, tier, [scope])).get(scope, {})
    merged = {**card, **held}
    if merged != held:
        values = tier.codec.encode({CARD_PREFIX + scope: make_card_entry(merged, now)})
        await call_patiently(port, tier, lambda: tier.backend.set_many(values, None))
