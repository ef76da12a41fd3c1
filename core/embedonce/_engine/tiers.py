"""A tier of a running chain: its reading, its writing, and the calls to its backend that both make."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from embedonce.errors import TierError
from embedonce.events import Event, TierChanged
from embedonce.keys import KEY_PREFIX, Value

from .backend_calls import BackendCalls
from .chain import Tier
from .codec import Codec
from .counters import Counters
from .flights import InFlight
from .ports import Port, Ports
from .reading import Reading
from .writing import Writing

log = logging.getLogger("embedonce")

PROBE_KEY = f"{KEY_PREFIX}probe"
"""A key that no entry has; reading it shows whether a tier answers."""


class LiveTier:
    """A tier of a running chain."""

    def __init__(
        self,
        tier: Tier,
        name: str,
        *,
        in_flight: InFlight,
        ports: Ports,
        cards: Mapping[str, Mapping[str, Value]],
        emit: Callable[[Event], None],
        has_listeners: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self.name = name
        self.lease = tier.lease
        self._emit = emit
        self.counters = Counters()
        self.calls = BackendCalls(tier, name, ports)
        self.codec = Codec(self.calls.capabilities, tier.encryption, clock=clock)
        self.reading = Reading(
            self.calls,
            self.codec,
            self.counters,
            changed=partial(self._note_change, "read"),
            emit=emit,
            has_listeners=has_listeners,
        )
        self.writing = Writing(
            tier,
            self.calls,
            self.codec,
            self.counters,
            in_flight=in_flight,
            ports=ports,
            cards=cards,
            changed=partial(self._note_change, "write"),
            emit=emit,
            has_listeners=has_listeners,
            clock=clock,
        )
        # Bound methods, because a method that calls another one would cost each read and write a call more.
        self.backend = self.calls.backend
        self.capabilities = self.calls.capabilities
        self.timeout = self.calls.timeout
        self.close_twin = self.calls.close_twin
        self.decode = self.codec.decode
        self.read = self.reading.read
        self.store = self.writing.store
        self.add = self.writing.add

    def reset(self) -> None:
        """Start anew, as in a forked child, and do not close what the parent owns."""
        self.counters.renew_locks()
        self.calls.reset()
        self.reading.reset()
        self.writing.reset()

    def _note_change(
        self, operation: Literal["read", "write"], state: Literal["open", "closed"], cause: str | None
    ) -> None:
        if state == "open":
            log.warning(
                "tier %r: %ss fail (%s); it is left out and tried again until it answers", self.name, operation, cause
            )
        else:
            log.warning("tier %r: %ss work again", self.name, operation)
        self._emit(TierChanged(tier=self.name, state=state, operation=operation, cause=cause))

    # --- erasing and listing: none of it fails open ---------------------------------------------

    async def erase(self, port: Port, keys: Sequence[str]) -> None:
        """Remove keys.

        Raises:
            TierError: the backend has no ``delete_many``, or it failed.
        """
        if not self.capabilities.delete:
            raise TierError("it cannot delete", self.name)
        for chunk in self.calls.chunks(keys):
            await self.calls.call_strictly(port, partial(self.backend.delete_many, chunk))

    async def scan(self, port: Port, prefix: str) -> list[str]:
        """Return the keys that start with ``prefix``.

        Raises:
            TierError: the backend has no ``scan``, or it failed.
        """
        if not self.capabilities.scan:
            raise TierError("it cannot list its keys", self.name)
        keys: list[str] = await self.calls.call_strictly(port, lambda: list(self.backend.scan(prefix)), listing=True)
        return keys

    async def describe(self, port: Port) -> str:
        """Return how the backend stores vectors, in its own words; nothing where it has none."""
        if not hasattr(self.backend, "describe"):
            return ""
        words: str = await self.calls.call_strictly(port, self.backend.describe)
        return words

    async def migrate(self, port: Port) -> str:
        """Bring the store's layout up to date, for as long as that takes, and return what was done."""
        done: str = await self.calls.call_strictly(port, self.backend.migrate, listing=True)
        return done

    async def peek(self, port: Port, keys: Sequence[str]) -> Mapping[str, Any]:
        """Return the raw values of some keys, uncounted.

        Raises:
            TierError: the backend failed.
        """
        values: dict[str, Any] = {}
        for chunk in self.calls.chunks(keys):
            values.update(await self.calls.call_strictly(port, partial(self.backend.get_many, chunk)))
        return values
