"""Leases on a shared tier: when several processes miss a text at the same time, only one process embeds it.

A lease is a key that expires, and that a process can store only while the key is absent. One round trip takes the
leases of a whole batch. A lease is never released. The process that holds the lease of a text computes the text's
vector and writes the vector inline. The other processes poll the tier until the vector is there or the lease expires.

Without leases, results are still correct, but several processes may embed the same text. While the tier fails, no
process can take a lease. Each process then embeds all of its missing texts itself.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence

from embedonce.keys import KEY_PREFIX, LEASE_PREFIX

from .ports import Port
from .tiers import LiveTier

FIRST_PAUSE, LONGEST_PAUSE = 0.01, 0.25
"""Seconds of the first pause and of the longest pause between two polls for a vector that another process computes.

Each pause is 1.5 times as long as the pause before, up to the longest pause.
"""


class Leases:
    """The leases of one chain. One tier of the chain stores them."""

    def __init__(self, tier: LiveTier, seconds: float) -> None:
        self.tier = tier
        self._seconds = seconds
        self.reset()

    def reset(self) -> None:
        """Start without leases. A forked child calls this too, because the parent's leases stay with the parent."""
        self._lock = threading.RLock()
        self._held: dict[str, float] = {}
        self._token = os.urandom(16)

    async def take(self, port: Port, keys: Sequence[str]) -> set[str]:
        """Take the leases of keys, and return the keys whose leases we have. If the tier fails, return all keys."""
        now = time.monotonic()
        with self._lock:
            self._held = {key: until for key, until in self._held.items() if until > now}
            # We still hold these leases, so no other process computes the vectors of these keys. The tier does not have
            # these vectors, because they were evicted or forgotten, or because the provider failed.
            ours = self._held.keys() & set(keys)
        asked = {lease_key(key): key for key in keys if key not in ours}
        added = await self.tier.add(port, dict.fromkeys(asked, self._token), self._seconds) if asked else set()
        if added is None:
            return set(keys)
        won = {key for lease, key in asked.items() if lease in added}
        with self._lock:
            self._held.update(dict.fromkeys(won, now + self._seconds))
        return won | ours

    def pauses(self, limit: float) -> Iterator[tuple[float, bool]]:
        """Yield a pair for each poll: the seconds to sleep before the poll, and whether the poll is the last one.

        The last poll comes at least ``limit`` seconds after the start.
        """
        end = time.monotonic() + limit
        pause = FIRST_PAUSE
        while True:
            yield pause, time.monotonic() + pause >= end
            pause = min(pause * 1.5, LONGEST_PAUSE)


def lease_key(key: str) -> str:
    """Return the key under which the lease of an entry's key is stored."""
    return LEASE_PREFIX + key.removeprefix(KEY_PREFIX)


def lease_keys(keys: Iterable[str]) -> list[str]:
    return [lease_key(key) for key in keys]
