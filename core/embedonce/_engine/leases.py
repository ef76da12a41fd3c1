"""Leases on a shared tier: when several processes miss a text at the same time, only one process embeds it.

A lease is a key that expires, and that a process can store only while the key is absent. The process that holds the
lease of a text computes the text's vector and writes the vector inline. The other processes poll the tier until the
vector is there or the lease is free.

A lease lasts only a few seconds, so that the other processes soon go on if its process is killed. While the process
computes, a thread renews the lease. If the computation fails, or the tier does not store the vector, the same thread
removes the lease. Otherwise the lease is left to expire, because the tier needs no further call then, and because a
process that read the tier just before the write cannot take the lease and compute the vector again.

Without leases, results are still correct, but several processes may embed the same text. While the tier fails, no
process can take a lease. Each process then embeds all of its missing texts itself.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple
from weakref import ref

from embedonce.keys import KEY_PREFIX, LEASE_PREFIX

from .flights import Flight, InFlight
from .ports import Port
from .tiers import LiveTier

FIRST_PAUSE, LONGEST_PAUSE = 0.01, 0.25
"""Seconds of the first pause and of the longest pause between two polls for a vector that another process computes.

Each pause is 1.5 times as long as the pause before, up to the longest pause.
"""

RENEW_AFTER = 1 / 3
"""A lease is renewed when this part of its time has passed."""
SURE_FOR = 0.7
"""Part of a lease's time for which the lease is certainly still ours. An older lease is neither renewed nor removed,
because another process may hold it by the time the tier gets the call. Memcached counts whole seconds, so there a lease
of 2.5 s may last only 2 s."""
STALE_AFTER = 0.3
"""Part of a lease's time after which a read is too old to say that a vector is missing. Another process may have stored
the vector since then, and its lease, which is renewed in time, may have expired."""

RETRY_SECONDS = 0.1
"""Seconds after which a failed renewal is tried again."""
LONGEST_SLEEP = 1.0
"""Maximum number of seconds that the thread sleeps. So the thread ends soon after the last computation."""


class _Active(NamedTuple):
    """A lease whose vector is being computed."""

    since: float
    """Monotonic time at which the lease was taken or renewed."""
    flight: Flight
    is_useless: bool = False
    """Whether the vector was computed but not stored, so that other processes would wait for it in vain."""


class Leases:
    """The leases of one chain. One tier of the chain stores them."""

    def __init__(self, tier: LiveTier, seconds: float, in_flight: InFlight, *, is_default: bool) -> None:
        self.tier = tier
        self.is_default = is_default
        """Whether no tier sets ``lease``. A provider can opt out of the default leases."""
        self._seconds = seconds
        self._in_flight = in_flight
        self.reset()

    def reset(self) -> None:
        """Start without leases. A forked child calls this too, because the parent's leases stay with the parent."""
        self._lock = threading.RLock()  # re-entrant, because a signal handler may use the cache
        self._tier_lock = threading.Lock()
        """Held while leases are renewed and removed, so that no late renewal restores a removed lease."""
        self._held: dict[str, float] = {}
        """By key, the monotonic time at which a lease of this process expires."""
        self._next_clearing = 0.0
        self._active: dict[str, _Active] = {}
        """The leases to renew, by key."""
        self._has_thread = False
        self._wake = threading.Event()
        self._token = os.urandom(16)

    # --- taking ---------------------------------------------------------------------------------

    async def take(self, port: Port, flights: Mapping[str, Flight]) -> set[str]:
        """Take the leases of flights, and return the keys whose leases we have. If the tier fails, also
        return the keys for which it failed.

        The leases are renewed until :meth:`end`, or until the flights have landed, failed or been abandoned.
        """
        now = time.monotonic()
        ours = self._take_over_held(flights, now)
        asked = {lease_key(key): key for key in flights if key not in ours}
        items = dict.fromkeys(asked, self._token)
        added, failed = await self.tier.add(port, items, self._seconds) if asked else (set(), set())
        won = {asked[lease] for lease in added}
        if won:
            with self._lock:
                self._held.update(dict.fromkeys(won, now + self._seconds))
                self._active.update({key: _Active(now, flights[key]) for key in won})
            self._start_thread()
        return {*won, *ours, *(asked[lease] for lease in failed)}

    def _take_over_held(self, flights: Mapping[str, Flight], now: float) -> set[str]:
        """Return the keys whose leases this process holds already. From now on, these leases belong to the flights.

        No other process computes the vectors of these keys. The tier does not have these vectors, because they were
        evicted, or because a computation or a write failed. The step that finds a lease also takes it over. Otherwise,
        the thread could remove the lease of a failed computation before this call renews it.
        """
        with self._lock:
            if now >= self._next_clearing:
                self._held = {key: until for key, until in self._held.items() if until > now}
                self._next_clearing = now + self._seconds
            held = {key: until for key in flights if (until := self._held.get(key, 0.0)) > now}
            self._active.update({key: _Active(until - self._seconds, flights[key]) for key, until in held.items()})
        if held:
            self._start_thread()
        return set(held)

    def is_stale(self, read_at: float) -> bool:
        """Return whether another process may have stored a vector and lost its lease since a read of the tier."""
        return time.monotonic() - read_at > STALE_AFTER * self._seconds

    def pauses(self, limit: float) -> Iterator[tuple[float, bool]]:
        """Yield a pair for each poll: the seconds to sleep before the poll, and whether the poll is the last one.

        The last poll comes at least ``limit`` seconds after the start.
        """
        end = time.monotonic() + limit
        pause = FIRST_PAUSE
        while True:
            yield pause, time.monotonic() + pause >= end
            pause = min(pause * 1.5, LONGEST_PAUSE)

    # --- renewing and removing ------------------------------------------------------------------

    def end(self, flights: Mapping[str, Flight], unstored: Collection[str] = ()) -> None:
        """Stop renewing the leases of flights that have landed. The thread removes the leases of the other flights.

        The thread also removes the leases of flights whose entries are ``unstored``.
        """
        with self._lock:
            for key, flight in flights.items():
                lease = self._active.get(key)
                if lease is not None and key in unstored:
                    self._active[key] = lease._replace(is_useless=True)
                elif lease is not None and flight.entry is not None and not lease.is_useless:
                    del self._active[key]
            is_any_left = not self._active.keys().isdisjoint(flights)
        if is_any_left:
            self._wake.set()

    def finish(self) -> None:
        """Remove the leases of flights that have failed or were not stored, before the tier is closed."""
        self._tend()

    def _start_thread(self) -> None:
        with self._lock:
            if not self._has_thread:
                # The thread keeps no reference to the leases while it sleeps, so that a cache can be garbage-collected.
                tend = partial(_tend_until_done, ref(self), self._wake)
                # If no thread can be started, the leases are not renewed. They expire after their time.
                self._has_thread = self.tier.calls.run_in_background(tend)

    def _tend(self) -> float | None:
        """Renew and remove leases as necessary. Return the seconds until the next time, or None if none is active."""
        with self._tier_lock:
            failed, due = self._sort_active()
            if failed:
                self.tier.writer.remove(lease_keys(failed))
            is_renewed = True
            for chunk in self.tier.calls.split_into_chunks(due):
                is_renewed = self._renew(chunk) and is_renewed
        with self._lock:
            if not self._active:
                self._has_thread = False
                return None
            first = min(lease.since for lease in self._active.values())
            pause = first + RENEW_AFTER * self._seconds - time.monotonic()
        return min(max(pause, 0.0 if is_renewed else RETRY_SECONDS), LONGEST_SLEEP)

    def _sort_active(self) -> tuple[list[str], list[str]]:
        """Return the keys whose leases must be removed, and the keys whose leases must be renewed.

        Stop renewing the leases of flights that have ended, and leases that another process may hold by now.
        """
        failed: list[str] = []
        due: list[str] = []
        with self._lock:
            now = time.monotonic()
            for key, (since, flight, is_useless) in list(self._active.items()):
                is_ours = now < since + SURE_FOR * self._seconds
                if not is_ours or (flight.entry is not None and not is_useless):
                    del self._active[key]
                elif is_useless or flight.error is not None or self._in_flight.is_abandoned(flight):
                    del self._active[key]
                    self._held.pop(key, None)
                    failed.append(key)
                elif now >= since + RENEW_AFTER * self._seconds:
                    due.append(key)
        return failed, due

    def _renew(self, keys: Sequence[str]) -> bool:
        """Renew the leases that are still ours and still needed. Return whether the tier stored them."""
        with self._lock:
            now = time.monotonic()
            sure = now - SURE_FOR * self._seconds
            asked = {
                lease_key(key): key
                for key in keys
                if (lease := self._active.get(key)) is not None and lease.flight.entry is None and lease.since > sure
            }
        renewed = self.tier.writer.replace(dict.fromkeys(asked, self._token), self._seconds) if asked else set()
        with self._lock:
            for key in (asked[lease] for lease in renewed):
                self._held[key] = now + self._seconds
                if key in self._active:
                    self._active[key] = self._active[key]._replace(since=now)
        return len(renewed) == len(asked)


def _tend_until_done(leases: ref[Leases], wake: threading.Event) -> None:
    """Renew and remove leases until none is active, or until the leases are garbage-collected."""
    while (found := leases()) is not None:
        wake.clear()
        pause = found._tend()
        del found
        if pause is None:
            return
        wake.wait(pause)


def lease_key(key: str) -> str:
    """Return the key under which the lease of an entry's key is stored."""
    return LEASE_PREFIX + key.removeprefix(KEY_PREFIX)


def lease_keys(keys: Iterable[str]) -> list[str]:
    return [lease_key(key) for key in keys]
