"""The computations, writes and erasures that are in flight in one chain.

A *flight* is one computation of the vector of one key. Any number of calls may wait for a flight. A flight *lands*
when its entry is computed. A landed flight stays readable until its background writes have ended, and until every call
that began before the landing has claimed its keys. Such a call may have read a tier before the entry was written.
Without the flight, this call would embed the text again.

Every call has a numbered *ticket*, and later calls have higher numbers. An erasure (``forget``, ``purge``) forbids
calls with older tickets to store the erased keys. This applies to computed, promoted and queued entries alike. A flight
or a queued write may outlive its call. So flights and queued writes keep only the number of the ticket. If they kept
the ticket itself, the ended call would still count as running.

One lock guards the dictionaries and queues. A thread that holds the lock awaits nothing and calls no backend or
provider.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING
from weakref import WeakSet

from embedonce.vectors import Entry

if TYPE_CHECKING:
    import asyncio

MAX_ERASED = 100_000
"""Maximum number of erased keys and prefixes that are kept while calls that began before the erasures are running.

If there are more, the oldest erasures are dropped, and the calls that began before them store nothing any more."""

calls_in_provider: ContextVar[frozenset[int]] = ContextVar("embedonce_calls_in_provider", default=frozenset())
"""Ticket numbers of the calls whose provider is running in this context. Code in this context must not wait for flights
of these calls, because the wait would deadlock."""


class Abandoned(Exception):
    """The call that computed a flight was refused or cancelled, or the call's event loop ended.

    The calls that wait for the flight then claim its key again, and one of them embeds the text.
    """


class Leader:
    """The call that computes some flights."""

    __slots__ = ("loop", "number", "thread")

    def __init__(self, number: int, loop: asyncio.AbstractEventLoop | None) -> None:
        self.number = number
        """The number of the call's ticket."""
        self.loop = loop
        """The event loop of the call; None if it is a blocking call."""
        self.thread = threading.current_thread()


class Flight:
    """One computation of the vector of one key.

    A call that computes many vectors makes many flights. Therefore the usual values are attributes of the class.
    """

    entry: Entry | None = None
    error: Exception | None = None
    pending_writes = 0
    """Number of queued background writes of the entry."""
    stored = False
    """Whether the leading call gave the entry to the tiers."""
    importer: str | None = None
    """The name of the importer that had the entry; None if the entry was computed or put."""
    is_computing = False
    """Whether the computation has begun. If so, cancelling an async call does not stop the computation."""
    _future: Future[None] | None = None

    def __init__(self, leader: Leader) -> None:
        self.leader = leader

    def get_future(self) -> Future[None]:
        """Return the future that other calls wait for.

        Hold the lock when you use this method for the first time, because the first use creates the future.
        """
        if self._future is None:
            self._future = Future()
        return self._future

    def wake(self) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_result(None)

    def would_deadlock(self, loop: asyncio.AbstractEventLoop | None) -> bool:
        """Return whether waiting for this flight in this thread would block the flight's own computation.

        This is the case in code that the leading call's provider runs. It is also the case in a blocking call on the
        leading call's thread, which may be running an event loop.
        """
        if self.leader.number in calls_in_provider.get():
            return True
        return loop is None and self.leader.thread is threading.current_thread()


@dataclass(slots=True)
class Claims:
    """The flights that :meth:`InFlight.claim` found or started for the keys of a call."""

    landed: dict[str, Flight] = field(default_factory=dict)
    """Flights that have an entry already."""
    led: dict[str, Flight] = field(default_factory=dict)
    """New flights, which this call computes."""
    followed: dict[str, Flight] = field(default_factory=dict)
    """Flights that other calls are computing."""


@dataclass(eq=False)
class PendingWrite:
    """Entries that are being written to a tier, or that are queued for this tier."""

    tier: str
    number: int
    """The ticket number of the call that stores the entries."""
    entries: dict[str, Entry]
    flights: dict[str, Flight] = field(default_factory=dict)


class Erasure:
    """The keys that ``forget`` or ``purge`` removes: single keys, or all keys with one of the prefixes."""

    def __init__(self, keys: Iterable[str] = (), prefixes: Sequence[str] = ()) -> None:
        self.keys = frozenset(keys)
        self.prefixes = tuple(dict.fromkeys(prefixes))
        self.size = len(self.keys) + len(self.prefixes)
        self.until: int | None = None
        """Calls with tickets up to this number must not store the keys.

        The number is None while the erasure runs. During that time, no call is allowed to store the keys.
        """

    def covers(self, key: str) -> bool:
        return key in self.keys or (bool(self.prefixes) and key.startswith(self.prefixes))

    def forbids(self, number: int) -> bool:
        return self.until is None or number <= self.until


class Ticket:
    """One call's place in the order of calls.

    Several holders may share a ticket. The call ends when the last holder releases the ticket.

    Ctrl-C can interrupt a call between any two lines, even inside a context manager. Then ``__exit__`` may never run,
    so ``__del__`` ends the call.
    """

    __slots__ = ("_holders", "_in_flight", "number")

    def __init__(self, in_flight: InFlight, number: int) -> None:
        self.number = number
        self._in_flight = in_flight
        self._holders = 1

    def hold(self) -> None:
        """Add a holder: a computation or a write that may outlive the call. Holders may run in several threads."""
        with self._in_flight._lock:
            self._holders += 1

    def release(self) -> None:
        """Remove a holder. The call ends before the last holder is removed, so ``__del__`` completes both."""
        with self._in_flight._lock:
            if self._holders <= 1:
                self._in_flight.end_call(self.number)
            self._holders -= 1

    def end(self) -> None:
        """Release the ticket for all holders."""
        self._in_flight.end_call(self.number)
        self._holders = 0

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        if getattr(self, "_holders", 0) > 0:  # Ctrl-C may even interrupt ``__init__``
            self.end()


class TrackedWrite:
    """The context of a write: see :meth:`InFlight.track_write`. A generator would take three times as long."""

    __slots__ = ("_in_flight", "_write")

    def __init__(self, in_flight: InFlight, write: PendingWrite) -> None:
        self._in_flight = in_flight
        self._write = write

    def __enter__(self) -> dict[str, Entry]:
        return self._write.entries

    def __exit__(self, *_: object) -> None:
        self._in_flight.finish_write(self._write)


class InFlight:
    """Flights, pending writes and erasures of one chain."""

    def __init__(self, max_queued: int) -> None:
        self.max_queued = max_queued
        self.reset()

    def reset(self) -> None:
        """Start empty. A forked child calls this too, because flights and queued writes stay with the parent."""
        self._lock = threading.RLock()  # re-entrant, because a signal handler may use the cache
        self._changed = threading.Condition(self._lock)
        self._number = 0  # the number of the newest ticket
        self._calls: dict[int, None] = {}  # every call in flight, oldest first
        self._reading: dict[int, None] = {}  # calls that have not claimed their keys yet
        self._flights: dict[str, Flight] = {}
        self._retired: deque[tuple[int, str, Flight]] = deque()
        self._erasures: deque[Erasure] = deque()  # finished erasures, in the order in which they finished
        # Erasures by key and by prefix, so that checking a key does not search through all erasures.
        self._erased: dict[str, tuple[Erasure, ...]] = {}
        self._erased_prefixes: dict[str, tuple[Erasure, ...]] = {}
        self._erased_size = 0  # keys and prefixes of finished erasures
        self.erasures = 0  # how many erasures have begun
        self._may_not_store = 0  # calls with tickets up to this number store nothing, see MAX_ERASED
        # Weak, because Ctrl-C may interrupt a write at a line after which nothing removes the write from the set.
        self._writing: WeakSet[PendingWrite] = WeakSet()
        self._queues: dict[str, deque[PendingWrite]] = {}
        self._queued: dict[str, int] = {}

    # --- calls --------------------------------------------------------------------------------

    def new_ticket(self) -> Ticket:
        """Return the ticket for a call that begins now. Use it in a ``with`` block."""
        with self._lock:
            self._number += 1
            ticket = Ticket(self, self._number)
            self._calls[ticket.number] = None
            self._reading[ticket.number] = None
        return ticket

    def end_call(self, number: int) -> None:
        """Remove a call, and remove the erasures that finished before the oldest remaining call began."""
        with self._lock:
            self._end_reading(number)
            self._calls.pop(number, None)
            oldest = next(iter(self._calls), None)
            while self._erasures and (oldest is None or not self._erasures[0].forbids(oldest)):
                self._drop_oldest_erasure()

    def _end_reading(self, number: int) -> None:
        if self._reading.pop(number, self) is self:
            return
        oldest = next(iter(self._reading), None)
        while self._retired and (oldest is None or self._retired[0][0] < oldest):
            _, key, flight = self._retired.popleft()
            if self._flights.get(key) is flight:
                del self._flights[key]

    # --- flights ------------------------------------------------------------------------------

    def find_landed(self, keys: Iterable[str]) -> dict[str, Flight]:
        """Return the flights of these keys that have landed and are still readable."""
        with self._lock:
            flights = self._flights
            if not flights:
                return {}
            return {key: flight for key in keys if (flight := flights.get(key)) and flight.entry is not None}

    def claim(
        self,
        ticket: Ticket,
        keys: Iterable[str],
        loop: asyncio.AbstractEventLoop | None,
        claims: Claims,
        *,
        has_more: bool = False,
    ) -> None:
        """Claim some keys of a call in one step.

        Each key that has no flight gets a new flight, which this call leads. The call follows the flights of the other
        keys.

        This method fills ``claims`` and returns nothing. So the caller knows which flights it leads, even if Ctrl-C
        interrupts this method.

        ``has_more``: the call has read other keys from the tiers, and will claim them later.
        """
        leader = Leader(ticket.number, loop)
        with self._lock:
            flights = self._flights
            if not flights:
                claims.led.update(zip(keys, map(Flight, repeat(leader)), strict=False))  # `repeat` never ends
                flights.update(claims.led)
                keys = ()
            for key in keys:
                flight = flights.get(key)
                if flight is None:
                    claims.led[key] = flights[key] = Flight(leader)
                elif flight.entry is not None:
                    claims.landed[key] = flight
                else:
                    flight.get_future()
                    claims.followed[key] = flight
            if not has_more:
                self._end_reading(ticket.number)

    def take_over(
        self, ticket: Ticket, late: Mapping[str, Flight], loop: asyncio.AbstractEventLoop | None, claims: Claims
    ) -> dict[str, Flight]:
        """Start and return new flights for keys whose flights do not land in time. Add them to ``claims`` first.

        Calls that claim these keys from now on follow the new flights. If another call has taken a key over already,
        its flight stays in the table, and no other call follows ours.
        """
        leader = Leader(ticket.number, loop)
        taken = {key: Flight(leader) for key in late}
        claims.led.update(taken)
        with self._lock:
            for key, flight in late.items():
                if self._flights.get(key, flight) is flight:
                    self._flights[key] = taken[key]
        return taken

    def land(self, flights: Mapping[str, Flight], entries: Mapping[str, Entry], *, stored: bool) -> None:
        """Set the entries of flights and wake the waiting calls. ``stored`` says whether the tiers got the entries."""
        with self._lock:
            table, is_read = self._flights, bool(self._reading)
            for key, flight in flights.items():
                flight.entry = entries[key]
                flight.stored = stored
                if is_read or flight.pending_writes or table.get(key) is not flight:
                    self._retire(key, flight)
                else:
                    del table[key]
        for flight in flights.values():
            if flight._future is not None:
                flight.wake()

    def abandon(self, flights: Mapping[str, Flight]) -> None:
        """Set the error :class:`Abandoned` on each flight that has neither landed nor failed."""
        left = {key: flight for key, flight in flights.items() if flight.entry is None and flight.error is None}
        if left:
            self.fail(left, Abandoned())

    def fail(self, flights: Mapping[str, Flight], error: Exception) -> None:
        """Set the error of flights, remove these flights, and wake the calls that wait for them."""
        with self._lock:
            for key, flight in flights.items():
                flight.error = error
                if self._flights.get(key) is flight:
                    del self._flights[key]
        for flight in flights.values():
            flight.wake()

    def is_abandoned(self, flight: Flight) -> bool:
        """Return whether a flight can no longer land, because its call, thread or event loop has ended."""
        leader = flight.leader
        if leader.loop is not None and (leader.loop.is_closed() or not leader.loop.is_running()):
            return True
        return not leader.thread.is_alive() or leader.number not in self._calls

    def remove_abandoned(self, key: str, flight: Flight) -> None:
        """Remove a flight whose leading call has ended, so that another call can start a new flight."""
        with self._lock:
            if self._flights.get(key) is flight and flight.entry is None:
                del self._flights[key]

    def _retire(self, key: str, flight: Flight) -> None:
        if flight.pending_writes > 0 or self._flights.get(key) is not flight:
            return
        if self._reading:
            self._retired.append((self._number, key, flight))
        else:
            del self._flights[key]

    # --- writes -------------------------------------------------------------------------------

    def track_write(self, tier: str, number: int, entries: Mapping[str, Entry]) -> TrackedWrite:
        """Return a context manager for a write. It has the entries that no erasure forbids.

        These entries count as being written until the block ends.
        """
        with self._lock:
            write = PendingWrite(tier, number, self._select_permitted(number, entries))
            self._writing.add(write)
        return TrackedWrite(self, write)

    def _select_permitted(self, number: int, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        if number <= self._may_not_store:
            return {}
        if not self._erased and not self._erased_prefixes:
            return dict(entries)
        return {key: entry for key, entry in entries.items() if not self._is_forbidden(number, key)}

    def _is_forbidden(self, number: int, key: str) -> bool:
        if any(erasure.forbids(number) for erasure in self._erased.get(key, ())):
            return True
        return any(
            key.startswith(prefix) and any(erasure.forbids(number) for erasure in erasures)
            for prefix, erasures in self._erased_prefixes.items()
        )

    def _list_indexes(self, erasure: Erasure) -> Iterator[tuple[dict[str, tuple[Erasure, ...]], str]]:
        for key in erasure.keys:
            yield self._erased, key
        for prefix in erasure.prefixes:
            yield self._erased_prefixes, prefix

    def _add_erasure(self, erasure: Erasure) -> None:
        for index, name in self._list_indexes(erasure):
            index[name] = (*index.get(name, ()), erasure)

    def _drop_oldest_erasure(self) -> Erasure:
        erasure = self._erasures.popleft()
        self._erased_size -= erasure.size
        self._drop_erasure(erasure)
        return erasure

    def _drop_erasure(self, erasure: Erasure) -> None:
        for index, name in self._list_indexes(erasure):
            left = tuple(other for other in index[name] if other is not erasure)
            if left:
                index[name] = left
            else:
                del index[name]

    def queue_write(self, tier: str, number: int, entries: Mapping[str, Entry], *, force: bool) -> tuple[bool, int]:
        """Queue entries for a background write.

        Return whether the queue had room, and how many entries were dropped. With ``force`` a full queue
        drops its oldest writes to make room.
        """
        dropped = 0
        with self._lock:
            waiting = self._queues.setdefault(tier, deque())
            queued = self._queued.get(tier, 0)
            if queued and queued + len(entries) > self.max_queued:
                if not force:
                    return False, 0
                while waiting and queued + len(entries) > self.max_queued:
                    oldest = waiting.popleft()
                    queued -= len(oldest.entries)
                    dropped += len(oldest.entries)
                    self._release_flights(oldest)
            write = PendingWrite(tier, number, self._select_permitted(number, entries))
            if write.entries:
                waiting.append(write)
                for key in write.entries:
                    if flight := self._flights.get(key):
                        write.flights[key] = flight
                        flight.pending_writes += 1
            self._queued[tier] = queued + len(write.entries)
        return True, dropped

    def take_write(self, tier: str) -> PendingWrite | None:
        """Take the oldest queued write, which counts as in progress until the caller calls :meth:`finish_write`."""
        with self._lock:
            waiting = self._queues.get(tier)
            if not waiting:
                return None
            write = waiting.popleft()
            self._queued[tier] -= len(write.entries)
            # Erasures up to now have removed their keys from the queue, so only later ones may forbid this write.
            self._number += 1
            write.number = self._number
            self._writing.add(write)
            return write

    def finish_write(self, write: PendingWrite) -> None:
        """Remove a write that is tracked, or that :meth:`take_write` returned, after it is done or has failed."""
        with self._lock:
            self._writing.discard(write)
            if write.flights:
                self._release_flights(write)
            self._changed.notify_all()

    def _release_flights(self, write: PendingWrite) -> None:
        for key, flight in write.flights.items():
            flight.pending_writes -= 1
            if flight.entry is not None:
                self._retire(key, flight)
        write.flights = {}

    def _remove_erased(self, write: PendingWrite, erasure: Erasure) -> int:
        erased = [key for key in write.entries if erasure.covers(key)]
        for key in erased:
            del write.entries[key]
            if flight := write.flights.pop(key, None):
                flight.pending_writes -= 1
        return len(erased)

    def list_unwritten(self) -> list[str]:
        """Return the keys of the entries that are queued or being written."""
        with self._lock:
            writes = [*self._writing, *(write for waiting in self._queues.values() for write in waiting)]
            return [key for write in writes for key in write.entries]

    def count_queued(self, tier: str) -> int:
        with self._lock:
            return self._queued.get(tier, 0)

    def wait_until_flushed(self, timeout: float) -> bool:
        """Wait until no write is queued or in progress, and return True; return False after ``timeout`` seconds."""
        with self._lock:
            return self._changed.wait_for(lambda: not self._writing and not any(self._queues.values()), timeout)

    # --- erasures -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def forbid_stores(self, erasure: Erasure) -> Iterator[Callable[[], list[str]]]:
        """Forbid calls to store the erased keys, drop queued writes of these keys, and yield ``list_busy_tiers``.

        Calls that begin after the block may store the keys again.

        ``list_busy_tiers()`` returns the names of the tiers to which erased keys are being written at that moment.
        """
        with self._lock:
            self.erasures += 1
            self._add_erasure(erasure)
            for tier, waiting in self._queues.items():
                for write in waiting:
                    self._queued[tier] -= self._remove_erased(write, erasure)
            for key, flight in list(self._flights.items()):
                if flight.entry is not None and erasure.covers(key):
                    del self._flights[key]
            self._changed.notify_all()

        def list_busy_tiers() -> list[str]:
            with self._lock:
                return sorted({w.tier for w in self._writing if any(map(erasure.covers, w.entries))})

        try:
            yield list_busy_tiers
        finally:
            with self._lock:
                erasure.until = self._number
                if self._calls:
                    self._erasures.append(erasure)
                    self._erased_size += erasure.size
                    while self._erased_size > MAX_ERASED:
                        self._may_not_store = self._drop_oldest_erasure().until or self._may_not_store
                else:
                    self._drop_erasure(erasure)


def list_unlanded(flights: Mapping[str, Flight]) -> dict[str, Flight]:
    """Return the flights without an entry."""
    return {key: flight for key, flight in flights.items() if flight.entry is None}
