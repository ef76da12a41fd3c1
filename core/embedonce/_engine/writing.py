"""Writing to a tier: the write breaker, dates, the queue of background writes, and space cards."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace

from embedonce.errors import PartialAnswer, TierBusy
from embedonce.events import Event, Stored
from embedonce.keys import CARD_PREFIX, Value
from embedonce.vectors import Entry, freeze

from .backend_calls import BackendCalls, split_partial
from .breaker import Breaker, BreakerChange
from .chain import Tier, WriteMode
from .codec import Codec
from .counters import Counters
from .flights import InFlight, Ticket
from .ports import Port, Ports, run_blocking

log = logging.getLogger("embedonce")

CARD_SECONDS = 600.0
"""A space card is written again after this long: the tier may have evicted it, or somebody purged the scope."""

SILENT_SECONDS = 60.0
"""Least seconds between two log lines about background writes that failed: a busy tier's may all fail."""

JITTER = 0.05
"""An entry's TTL is shortened by up to this share, so that what was written together does not expire together."""

WRITE_MODES: Mapping[str, WriteMode] = {"process": "inline", "host": "inline", "network": "background"}
"""How a backend of each scope is written, where the tier does not say."""

draining: set[Writing] = set()
"""Tiers with background writes under way: kept here, as the cache itself may be gone before they are done."""


@dataclass(frozen=True, slots=True)
class Written:
    """What became of entries that were to be written."""

    stored: int = 0
    refused: int = 0
    """Too large."""
    failed: int = 0
    error: Exception | None = None
    """Of those that failed."""


class Writing:
    """Writes to one tier, inline or in the background."""

    def __init__(
        self,
        tier: Tier,
        calls: BackendCalls,
        codec: Codec,
        counters: Counters,
        *,
        in_flight: InFlight,
        ports: Ports,
        cards: Mapping[str, Mapping[str, Value]],
        changed: BreakerChange,
        emit: Callable[[Event], None],
        has_listeners: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self.name = calls.name
        self.ttl = tier.ttl
        # Whoever waits for a lease waits for the vector: it is written before the call goes on.
        self.mode: WriteMode = (
            "inline" if tier.lease is not None else tier.write or WRITE_MODES[calls.capabilities.scope]
        )
        self._calls = calls
        self._codec = codec
        self._counters = counters
        self._in_flight = in_flight
        self._ports = ports
        self._cards = cards
        self._changed = changed
        self._emit = emit
        self._has_listeners = has_listeners
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        """Start anew, as in a forked child."""
        self._lock = threading.RLock()  # a signal handler may use the cache
        self._is_draining = False
        self._silent_until = 0.0
        self._carded: dict[str, float] = {}
        self.breaker = Breaker(self._changed)

    # --- entries ------------------------------------------------------------------------------

    async def store(
        self,
        port: Port,
        ticket: Ticket,
        entries: Mapping[str, Entry],
        previews: Callable[[str], str],
        *,
        wait_for_room: bool,
    ) -> None:
        """Write entries in this tier's mode. Promotions have no ``wait_for_room``: a full queue drops them.

        ``previews`` gives the beginning of a key's text to a tier that keeps it.

        Raises:
            TierError: an inline write failed and the tier's ``on_error`` is ``"raise"``.
        """
        if self.mode == "none" or not entries:
            return
        dated = self._dated(self._codec.add_previews(entries, previews))
        if self.mode == "background":
            await self._queue(port, ticket, dated, wait_for_room=wait_for_room)
            return
        for chunk in self._calls.chunks(list(dated)):
            await self._store_now(port, ticket.number, {key: dated[key] for key in chunk})

    def _dated(self, entries: Mapping[str, Entry]) -> Mapping[str, Entry]:
        """Return the entries with this tier's expiry: the sooner of the tier's TTL and what remains."""
        if self.ttl is None:
            return entries
        now = self._clock()
        dated = {}
        for key, entry in entries.items():
            share = int(key[-4:], 16) / 0xFFFF
            expires = now + self.ttl * (1 - JITTER * share)
            if entry.expires is None or expires < entry.expires:
                entry = entry._replace(expires=expires)
            dated[key] = entry
        return dated

    async def _store_now(self, port: Port, number: int, entries: Mapping[str, Entry]) -> None:
        """Write one chunk before the call goes on; a probe is written off the caller's path."""
        admitted = self.breaker.admit()
        if admitted == "skip":
            self._count(0, dropped=len(entries), cause="skipped")
            if self._calls.on_error == "raise":
                raise self._calls.skipped_error()
            return
        if admitted == "probe":
            self._calls.run_off_path(lambda: self._write_caught(number, entries, probe=True))
            return
        start = time.perf_counter()
        try:
            written: Written = await self._calls.call(port, lambda: self._write(number, entries))
        except Exception as error:  # noqa: BLE001  (as in read)
            written = Written(failed=len(entries), error=error)
        self._settle(written, start)
        if written.error is not None and self._calls.on_error == "raise":
            raise self._calls.tier_error(written.error) from written.error

    async def add(self, port: Port, items: Mapping[str, bytes], ttl: float) -> set[str] | None:
        """Set what is absent and return those keys, and the keys of a part of the tier that failed.

        None where the tier fails or its breaker is open.
        """
        backend = self._calls.backend
        added: set[str] = set()
        for chunk in self._calls.chunks(list(items)):
            if self.breaker.open:
                return None
            part = {key: items[key] for key in chunk}
            start = time.perf_counter()
            try:
                added |= await self._calls.call(port, lambda part=part: backend.add_many(part, ttl))  # type: ignore[misc]
            except Exception as error:  # noqa: BLE001  (as in read)
                failed, others = split_partial(list(part), error, Set)
                cause = self._calls.note_failure(self.breaker, error)
                self._count(0, errors=len(failed), cause=cause, start=start)
                if len(failed) == len(part):
                    return None
                added.update(failed, others)
            else:
                self.breaker.succeeded()
        return added

    def _write(self, number: int, entries: Mapping[str, Entry]) -> Written:
        """Write what may still be stored by the call with this number."""
        with self._in_flight.track_write(self.name, number, entries) as permitted:
            return self._set(permitted)

    def _set(self, entries: Mapping[str, Entry]) -> Written:
        if not entries:
            return Written()
        expires = [entry.expires for entry in entries.values()]
        ends = [end for end in expires if end is not None]
        ttl = max(1e-3, max(ends) - self._clock()) if len(ends) == len(expires) else None
        values = self._codec.encode(entries)
        limit = self._calls.capabilities.max_value_bytes
        if limit is not None:
            values = {k: v for k, v in values.items() if not isinstance(v, bytes) or len(v) <= limit}
        failed: Sequence[str] = ()
        problem = None
        if values:
            try:
                self._calls.backend.set_many(values, ttl)
            except PartialAnswer as error:
                problem = error
                failed, _ = split_partial(list(values), error, object)
        self._set_cards(entries)
        return Written(len(values) - len(failed), len(entries) - len(values), len(failed), problem)

    def _settle(self, written: Written, start: float, *, probe: bool = False) -> str | None:
        """Count what became of a write, and tell the breaker; return the cause of what was not stored."""
        if written.error is None:
            self.breaker.succeeded()
            cause = "too large" if written.refused else None
        else:
            cause = self._calls.note_failure(self.breaker, written.error, probe=probe)
            if written.refused:
                self._count(0, dropped=written.refused, cause="too large")
                written = replace(written, refused=0)
        self._count(written.stored, dropped=written.refused, errors=written.failed, cause=cause, start=start)
        return cause

    def _count(
        self, stored: int, *, dropped: int = 0, errors: int = 0, cause: str | None = None, start: float | None = None
    ) -> None:
        seconds = 0.0 if start is None else time.perf_counter() - start
        self._counters.count(stored=stored, dropped=dropped, errors=errors, cause=cause, seconds=seconds)
        if self._has_listeners():
            self._emit(
                Stored(tier=self.name, stored=stored, dropped=dropped, errors=errors, seconds=seconds, cause=cause)
            )

    # --- space cards --------------------------------------------------------------------------

    def _set_cards(self, keys: Iterable[str]) -> None:
        """Store the space card of each scope, now and again.

        In a call of its own: a card has no TTL. An in-process tier needs none, as this cache is the
        only one that writes to it.
        """
        if self._calls.capabilities.scope == "process":
            return
        now = time.monotonic()
        scopes = {key.split(".", 2)[1] for key in keys} & self._cards.keys()
        due = {scope for scope in scopes if now - self._carded.get(scope, -CARD_SECONDS) >= CARD_SECONDS}
        cards = {CARD_PREFIX + scope: Entry(freeze(()), self._clock(), metadata=self._cards[scope]) for scope in due}
        if cards:
            try:
                self._calls.backend.set_many(self._codec.encode(cards), None)
            except (PartialAnswer, TierBusy):  # the entries are stored all the same; the card comes with later ones
                return
            self._carded.update(dict.fromkeys(due, now))

    def forget_cards(self, scopes: Iterable[str]) -> None:
        """Write the cards of these scopes again with the next entries."""
        for scope in scopes:
            self._carded.pop(scope, None)

    # --- background writes --------------------------------------------------------------------

    async def _queue(self, port: Port, ticket: Ticket, entries: Mapping[str, Entry], *, wait_for_room: bool) -> None:
        end = time.monotonic() + (self._calls.timeout or 0.0)
        while True:
            force = wait_for_room and time.monotonic() >= end
            room, dropped = self._in_flight.queue_write(self.name, ticket.number, entries, force=force)
            self.start_draining()
            if not room and not wait_for_room:
                dropped = len(entries)
            if dropped:
                self._count(0, dropped=dropped, cause="queue full")
            if room or not wait_for_room:
                return
            await port.sleep(0.002)

    def start_draining(self) -> None:
        """See that somebody writes what is queued; one thread at a time."""
        with self._lock:
            if self._is_draining or not self._in_flight.count_queued(self.name):
                return
            self._is_draining = True
            draining.add(self)
        if not self._calls.run_off_path(self._drain):
            self._drain()  # the interpreter is ending: here and now, or never

    def _drain(self) -> None:
        while True:
            self.drain()
            with self._lock:
                if not self._in_flight.count_queued(self.name):
                    self._is_draining = False
                    draining.discard(self)
                    return

    def drain(self) -> None:
        """Write what is queued, in this thread."""
        while (write := self._in_flight.take_write(self.name)) is not None:
            try:
                for chunk in self._calls.chunks(list(write.entries)):
                    part = {key: write.entries[key] for key in chunk}
                    admitted = self.breaker.admit()
                    if admitted == "skip":
                        self._count(0, dropped=len(part), cause="skipped")
                    else:
                        self._write_caught(write.number, part, probe=admitted == "probe")
            finally:
                self._in_flight.finish_write(write)

    def wait_until_drained(self, timeout: float) -> bool:
        """Wait for the writes under way; False after ``timeout`` seconds."""
        return self._in_flight.wait_until_flushed(timeout)

    def _write_caught(self, number: int, entries: Mapping[str, Entry], *, probe: bool) -> None:
        """Write where nobody waits for the result: a failure is counted and logged."""
        start = time.perf_counter()
        try:
            written: Written = run_blocking(
                self._calls.call(self._ports.blocking, lambda: self._write(number, entries))
            )
        except Exception as error:  # noqa: BLE001  (as in read)
            written = Written(failed=len(entries), error=error)
        cause = self._settle(written, start, probe=probe)
        now = time.monotonic()
        if written.error is not None and not self.breaker.open and now >= self._silent_until:
            self._silent_until = now + SILENT_SECONDS
            log.warning("tier %r: a background write of %d entries failed (%s)", self.name, written.failed, cause)
