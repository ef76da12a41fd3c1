"""Writes to a tier: the write breaker, expiry dates, the queue of background writes, and space cards."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence, Set
from typing import Any, NamedTuple

from embedonce.contracts import Capabilities
from embedonce.errors import PartialAnswer, TierBusy
from embedonce.events import Event, Stored
from embedonce.keys import CARD_PREFIX, SERVED_MODEL, Value
from embedonce.vectors import Entry, freeze

from .backend_calls import BackendCalls, split_partial
from .breaker import Breaker, BreakerChange
from .chain import Tier, WriteMode
from .codec import Codec
from .counters import Counters
from .flights import InFlight, Ticket
from .ports import Port, Ports, run_blocking

CARD_SECONDS = 600.0
"""Seconds after which a space card is written again, because it may have been evicted or purged."""

JITTER = 0.05
"""Maximum fraction by which a TTL is shortened, so that entries written together expire at different times."""

DEFAULT_WRITE_MODES: Mapping[str, WriteMode] = {
    "process": "inline",
    "single": "inline",
    "host": "inline",
    "network": "background",
}
"""Default write mode of a tier, by the ``Capabilities.scope`` of its backend."""

draining_writers: set[TierWriter] = set()
"""Writers with background writes in flight. This set keeps a writer alive after its cache is garbage-collected."""


def _choose_mode(tier: Tier, caps: Capabilities, lease: float | None) -> WriteMode:
    if caps.read_only:
        return "none"
    # While this process holds the lease of a text, other processes wait for the text's vector. So a tier with leases is
    # always written inline.
    return "inline" if lease is not None else tier.write or DEFAULT_WRITE_MODES[caps.scope]


class WriteResult(NamedTuple):
    """The outcome of one write: how many entries were stored, how many were refused, and how many failed."""

    stored: int = 0
    refused: int = 0
    """Number of entries that are too large for the backend."""
    failed: int = 0
    error: Exception | None = None
    """The error of the failed entries, or None if no entry failed."""
    unstored: Collection[str] = ()
    """Keys of the entries that were refused or failed."""


class TierWriter:
    """Writes to one tier, inline or in the background."""

    def __init__(
        self,
        tier: Tier,
        calls: BackendCalls,
        codec: Codec,
        counters: Counters,
        *,
        lease: float | None,
        in_flight: InFlight,
        ports: Ports,
        cards: MutableMapping[str, dict[str, Value]],
        on_change: BreakerChange,
        emit: Callable[[Event], None],
        has_listeners: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self.name = calls.name
        self.ttl = tier.ttl
        self.mode = _choose_mode(tier, calls.capabilities, lease)
        self._calls = calls
        self._codec = codec
        self._counters = counters
        self._in_flight = in_flight
        self._ports = ports
        self._cards = cards
        self._on_change = on_change
        self._emit = emit
        self._has_listeners = has_listeners
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        """Start over in a forked child."""
        self._lock = threading.RLock()  # re-entrant, because a signal handler may use the cache
        self._is_draining = False
        self._cards_written: dict[str, float] = {}
        """By scope, the monotonic time at which this process last wrote the space card."""
        self.breaker = Breaker(self._on_change)

    # --- entries ------------------------------------------------------------------------------

    async def store(
        self,
        port: Port,
        ticket: Ticket,
        entries: Mapping[str, Entry],
        preview_of: Callable[[str], str],
        *,
        wait_for_room: bool,
    ) -> set[str]:
        """Write entries in this tier's write mode. Return the keys that an inline write did not store.

        ``preview_of`` returns the start of a key's text; it is called only if the tier stores previews.
        ``wait_for_room`` decides what happens when the queue of background writes is full: see :meth:`_enqueue`.

        Raises:
            TierError: an inline write failed and the tier's ``on_error`` is ``"raise"``.
        """
        unstored: set[str] = set()
        if self.mode == "none" or not entries:
            return unstored
        dated = self.set_expiry(self._codec.add_previews(entries, preview_of))
        if self.mode == "background":
            await self._enqueue(port, ticket, dated, wait_for_room=wait_for_room)
            return unstored
        for part in self._calls.split_items(dated):
            unstored.update(await self._write_inline(port, ticket, part))
        return unstored

    def set_expiry(self, entries: Mapping[str, Entry]) -> Mapping[str, Entry]:
        """Return the entries. Each expires on its own date or at the end of this tier's TTL, whichever is earlier."""
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

    async def _write_inline(self, port: Port, ticket: Ticket, entries: Mapping[str, Entry]) -> Collection[str]:
        """Write one chunk while the caller waits, and return the keys that were not stored.

        If the write is a probe, make the write in the background instead.
        """
        admitted = self.breaker.admit()
        if admitted == "skip":
            self._count(0, dropped=len(entries), cause="skipped")
            if self._calls.on_error == "raise":
                raise self._calls.make_skipped_error()
            return entries.keys()
        if admitted == "probe":
            self._write_probe(ticket, entries)
            return ()
        start = time.perf_counter()
        try:
            result: WriteResult
            if self._calls.is_quick:
                result = self._write(ticket.number, entries)
            else:
                result = await self._calls.call(port, lambda: self._write(ticket.number, entries))
        except Exception as error:  # noqa: BLE001  (a backend may raise anything)
            result = WriteResult(failed=len(entries), error=error, unstored=entries.keys())
        self._record(result, start)
        if result.error is not None and self._calls.on_error == "raise":
            raise self._calls.make_error(result.error) from result.error
        return result.unstored

    def _write_probe(self, ticket: Ticket, entries: Mapping[str, Entry]) -> None:
        """Write entries in another thread. The thread holds the ticket, so that erasures still concern the write."""

        def write() -> None:
            try:
                self._write_unattended(ticket.number, entries, probe=True)
            finally:
                ticket.release()

        ticket.hold()
        if not self._calls.run_in_background(write):
            write()  # the interpreter is shutting down, so write in this thread

    # --- leases -------------------------------------------------------------------------------

    async def add(self, port: Port, items: Mapping[str, bytes], ttl: float) -> tuple[set[str], set[str]]:
        """Store the items whose keys are absent.

        Return the keys that were absent, and the keys for which the tier failed. After a call that failed as a whole,
        and while the breaker is open, the tier is not called, and the remaining keys count as failed.

        A success does not reset the breaker, because a store that is nearly full may still accept such small items.
        """
        backend = self._calls.backend
        added: set[str] = set()
        failed: set[str] = set()
        for chunk in self._calls.split_into_chunks(list(items)):
            if self.breaker.is_open:
                break
            part = {key: items[key] for key in chunk}
            start = time.perf_counter()
            try:
                added |= await self._calls.call(port, lambda part=part: backend.add_many(part, ttl))  # type: ignore[misc]
            except Exception as error:  # noqa: BLE001  (a backend may raise anything)
                lost, others = split_partial(list(part), error, Set)
                cause = self._calls.note_failure(self.breaker, error)
                self._count(0, errors=len(lost), cause=cause, start=start)
                added.update(others)
                failed.update(lost)
                if len(lost) == len(part):
                    break
        else:
            return added, failed
        return added, items.keys() - added

    def replace(self, items: Mapping[str, bytes], ttl: float) -> Set[str]:
        """Store the items, whether or not their keys are absent, and return the keys that were stored.

        ``items`` must fit into one call. No caller waits for a renewal, so a failure is neither raised nor counted.
        """
        if self.breaker.is_open:
            return set()
        try:
            self._call_blocking(lambda: self._calls.backend.set_many(items, ttl))
        except Exception as error:  # noqa: BLE001  (a backend may raise anything)
            lost, _ = split_partial(list(items), error, object)
            return items.keys() - lost
        return items.keys()

    def remove(self, keys: Sequence[str]) -> None:
        """Remove keys if the backend can. A failure is neither raised nor counted, because the items expire anyway."""
        if not self._calls.capabilities.delete:
            return
        for chunk in self._calls.split_into_chunks(keys):
            try:
                self._call_blocking(lambda chunk=chunk: self._calls.backend.delete_many(chunk))  # type: ignore[misc]
            except Exception:  # noqa: BLE001  (a backend may raise anything)
                return

    def _call_blocking(self, call: Callable[[], Any]) -> Any:
        return run_blocking(self._calls.call(self._ports.blocking, call))

    # --- one write ----------------------------------------------------------------------------

    def _write(self, number: int, entries: Mapping[str, Entry]) -> WriteResult:
        """Write the entries, except those that were erased after the call with this ticket number began."""
        with self._in_flight.track_write(self.name, number, entries) as permitted:
            return self._call_set_many(permitted)

    def _call_set_many(self, entries: Mapping[str, Entry]) -> WriteResult:
        if not entries:
            return WriteResult()
        ends = {entry.expires for entry in entries.values()}
        ttl = None if None in ends else max(1e-3, max(ends) - self._clock())  # type: ignore[type-var,operator]
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
        self._write_cards(entries)
        unstored = {*failed, *(entries.keys() - values.keys())} if failed or len(values) < len(entries) else ()
        return WriteResult(len(values) - len(failed), len(entries) - len(values), len(failed), problem, unstored)

    def _record(self, result: WriteResult, start: float, *, probe: bool = False) -> str | None:
        """Tell the breaker and the counters the result of a write. Return why some entries were not stored, or None."""
        if result.error is None:
            self.breaker.record_success()
            cause = "too large" if result.refused else None
        else:
            cause = self._calls.note_failure(self.breaker, result.error, probe=probe)
            if result.refused:
                self._count(0, dropped=result.refused, cause="too large")
                result = result._replace(refused=0)
        self._count(result.stored, dropped=result.refused, errors=result.failed, cause=cause, start=start)
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

    def _write_cards(self, keys: Iterable[str]) -> None:
        """Write the space card of each scope, unless the card was written less than :data:`CARD_SECONDS` ago.

        Cards have no TTL. All values of one backend call get the same TTL, so cards need a backend call of their own.
        An in-process tier stores no cards, because this process knows the cards of all entries that it writes.

        A card that is stored keeps the name of its model. Another process has written the name, so it is the older one.
        """
        if self._calls.capabilities.scope == "process":
            return
        now = time.monotonic()
        known = {scope: self._cards.get(scope) for scope in {key.split(".", 2)[1] for key in keys}}
        due = {
            scope: card
            for scope, card in known.items()
            if card is not None and now - self._cards_written.get(scope, -CARD_SECONDS) >= CARD_SECONDS
        }
        if not due:
            return
        keys = [CARD_PREFIX + scope for scope in due]
        try:
            names = self._codec.read_served_models(self._calls.backend.get_many(keys))
        except Exception:  # noqa: BLE001  (a backend may raise anything; the next write retries the card)
            return
        for scope in due.keys() & names.keys():
            due[scope] = self._cards[scope] = {**self._cards.get(scope, due[scope]), SERVED_MODEL: names[scope]}
        cards = {CARD_PREFIX + scope: Entry(freeze(()), self._clock(), metadata=card) for scope, card in due.items()}
        try:
            self._calls.backend.set_many(self._codec.encode(cards), None)
        except (PartialAnswer, TierBusy):  # the entries are stored; the next write retries the card
            return
        self._cards_written.update(dict.fromkeys(due, now))

    def forget_cards(self, scopes: Iterable[str]) -> None:
        """Forget that these scopes' cards were written, so that the next write of entries also writes the cards."""
        for scope in scopes:
            self._cards_written.pop(scope, None)

    # --- background writes --------------------------------------------------------------------

    async def _enqueue(self, port: Port, ticket: Ticket, entries: Mapping[str, Entry], *, wait_for_room: bool) -> None:
        """Queue entries for a background write.

        If the queue is full, a call with ``wait_for_room`` waits for room, up to the tier's timeout. If there
        is still no room, the oldest queued entries are dropped. A call without ``wait_for_room``, such as a promotion,
        immediately drops the new entries.
        """
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
        """Start a thread that writes the queued entries, unless such a thread is running."""
        with self._lock:
            if self._is_draining or not self._in_flight.count_queued(self.name):
                return
            self._is_draining = True
            draining_writers.add(self)
        if not self._calls.run_in_background(self._drain):
            self._drain()  # the interpreter is shutting down, so write in this thread

    def _drain(self) -> None:
        """Write queued entries until the queue is empty."""
        while True:
            self._write_queued()
            with self._lock:
                if not self._in_flight.count_queued(self.name):
                    self._is_draining = False
                    draining_writers.discard(self)
                    return

    def _write_queued(self) -> None:
        while (write := self._in_flight.take_write(self.name)) is not None:
            try:
                for part in self._calls.split_items(write.entries):
                    admitted = self.breaker.admit()
                    if admitted == "skip":
                        self._count(0, dropped=len(part), cause="skipped")
                    else:
                        self._write_unattended(write.number, part, probe=admitted == "probe")
            finally:
                self._in_flight.finish_write(write)

    def wait_until_chain_is_flushed(self, timeout: float) -> bool:
        """Wait until no tier of this chain has queued or running writes; return False after ``timeout`` seconds."""
        return self._in_flight.wait_until_flushed(timeout)

    def _write_unattended(self, number: int, entries: Mapping[str, Entry], *, probe: bool) -> None:
        """Write entries in the background. No caller waits for them, so a failure is counted and logged, not raised."""
        start = time.perf_counter()
        try:
            result: WriteResult = self._call_blocking(lambda: self._write(number, entries))
        except Exception as error:  # noqa: BLE001  (a backend may raise anything)
            result = WriteResult(failed=len(entries), error=error)
        cause = self._record(result, start, probe=probe)
        if result.error is not None and not self.breaker.is_open:
            self._calls.warnings.warn(
                "writing",
                "tier %r: background write failed for {count} entries (%s)",
                self.name,
                cause,
                count=result.failed,
            )
