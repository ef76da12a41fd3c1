"""One process of many computes a cold text: leases on a tier that they share.

A lease is a key that is set if it is absent, for a whole batch in one trip, and expires. It is never
released: its holder writes the vectors inline before it does, and whoever waits polls for the vectors.
It saves work and decides nothing: without the tier every process computes for itself.
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
"""Seconds between two looks at whether another process has written a vector; each is half as long again."""


class Leases:
    """The leases of one chain, on one of its tiers."""

    def __init__(self, tier: LiveTier, seconds: float) -> None:
        self.tier = tier
        self._seconds = seconds
        self.reset()

    def reset(self) -> None:
        """Start anew, as in a forked child: what the parent holds is not ours."""
        self._lock = threading.RLock()
        self._held: dict[str, float] = {}
        self._token = os.urandom(16)

    async def take(self, port: Port, keys: Sequence[str]) -> set[str]:
        """Return the keys that are ours to compute: all of them where the tier does not answer."""
        now = time.monotonic()
        with self._lock:
            self._held = {key: until for key, until in self._held.items() if until > now}
            # A lease of our own from a moment ago: its vector was evicted or forgotten, and nobody else makes it.
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
        """Yield how long to sleep before each look, and whether it is the last."""
        end = time.monotonic() + limit
        pause = FIRST_PAUSE
        while True:
            yield pause, time.monotonic() + pause >= end
            pause = min(pause * 1.5, LONGEST_PAUSE)


def lease_key(key: str) -> str:
    """Return the key of the lease of a key."""
    return LEASE_PREFIX + key.removeprefix(KEY_PREFIX)


def lease_keys(keys: Iterable[str]) -> list[str]:
    return [lease_key(key) for key in keys]
