"""A tier of a running chain: its reader, its writer, and the backend calls that both use."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any, Literal

from embedonce.errors import TierError, TierTimeout
from embedonce.events import Event, TierChanged, TierStats
from embedonce.keys import KEY_PREFIX, Value
from embedonce.vectors import Work

from .backend_calls import BackendCalls
from .chain import Tier
from .codec import Codec
from .counters import Counters
from .flights import InFlight
from .ledger import Ledger
from .ports import Port, Ports
from .reading import TierReader
from .writing import TierWriter

log = logging.getLogger("embedonce")

PROBE_KEY = f"{KEY_PREFIX}probe"
"""A key without an entry; reading this key shows whether a tier answers."""


class TierUnable(TierError):
    """The backend has no such method, so trying again does not help."""


class LiveTier:
    """A tier of a running chain."""

    def __init__(
        self,
        tier: Tier,
        name: str,
        *,
        lease: float | None,
        longest_ttl: float | None,
        in_flight: InFlight,
        ports: Ports,
        ledger: Ledger,
        cards: MutableMapping[str, dict[str, Value]],
        emit: Callable[[Event], None],
        has_listeners: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self.name = name
        self.lease = lease
        """Seconds that a lease in this tier lasts; None if this tier stores no leases."""
        self._emit = emit
        self.counters = Counters()
        self.calls = BackendCalls(tier, name, ports)
        self.codec = Codec(
            self.calls.capabilities,
            tier.encryption,
            longest_ttl=longest_ttl if tier.ttl is None else tier.ttl,
            clock=clock,
        )
        self.reader = TierReader(
            self.calls,
            self.codec,
            self.counters,
            ledger=ledger,
            on_change=partial(self._note_change, "read"),
            emit=emit,
            has_listeners=has_listeners,
        )
        self.writer = TierWriter(
            tier,
            self.calls,
            self.codec,
            self.counters,
            lease=lease,
            in_flight=in_flight,
            ports=ports,
            cards=cards,
            on_change=partial(self._note_change, "write"),
            emit=emit,
            has_listeners=has_listeners,
            clock=clock,
        )
        # These attributes refer directly to the parts' methods, because wrapper methods would add a call
        # to each read or write.
        self.backend = self.calls.backend
        self.capabilities = self.calls.capabilities
        self.timeout = self.calls.timeout
        self.close_twin = self.calls.close_twin
        self.decode = self.codec.decode
        self.read = self.reader.read
        self.store = self.writer.store
        self.add = self.writer.add

    def read_stats(self, saved: Work) -> TierStats:
        """Return the counters of the tier. ``saved`` is the work that its hits have saved."""
        return self.counters.stats(saved, is_skipped=self.reader.breaker.is_open or self.writer.breaker.is_open)

    def reset(self) -> None:
        """Start over in a forked child, without closing the parent's connections."""
        self.counters.renew_locks()
        self.calls.reset()
        self.reader.reset()
        self.writer.reset()

    def _note_change(
        self, operation: Literal["read", "write"], state: Literal["open", "closed"], cause: str | None
    ) -> None:
        if state == "open":
            skipped = "it" if operation == "read" else "writes to it"
            log.warning(
                "tier %r: %ss are failing (%s); skipping %s until a probe succeeds",
                self.name,
                operation,
                cause,
                skipped,
            )
        else:
            log.warning("tier %r: %ss work again", self.name, operation)
        self._emit(TierChanged(tier=self.name, state=state, operation=operation, cause=cause))

    # --- erasing and listing: failures always raise ---------------------------------------------

    async def erase(self, port: Port, keys: Sequence[str]) -> None:
        """Remove keys from the tier.

        Raises:
            TierUnable: the backend has no ``delete_many``.
            TierError: it failed. Unless a call timed out, all keys were tried.
        """
        if not self.capabilities.delete:
            raise TierUnable("it cannot delete", self.name)
        problem: TierError | None = None
        for chunk in self.calls.split_into_chunks(keys):
            try:
                await self.calls.call_strictly(port, partial(self.backend.delete_many, chunk))
            except TierTimeout:
                raise
            except TierError as error:
                problem = problem or error
        if problem is not None:
            raise problem

    async def scan(self, port: Port, prefix: str) -> list[str]:
        """Return the keys that start with ``prefix``.

        Raises:
            TierUnable: the backend has no ``scan``.
            TierError: it failed.
        """
        if not self.capabilities.scan:
            raise TierUnable("it cannot list its keys", self.name)
        keys: list[str] = await self.calls.call_strictly(port, lambda: list(self.backend.scan(prefix)), listing=True)
        return keys

    async def count(self, port: Port, prefix: str) -> int:
        """Return how many keys start with ``prefix``. A backend that cannot count lists these keys.

        Raises:
            TierUnable: the backend has neither ``count`` nor ``scan``.
            TierError: it failed.
        """
        if not self.capabilities.count:
            return len(await self.scan(port, prefix))
        number: int = await self.calls.call_strictly(port, lambda: self.backend.count(prefix), listing=True)
        return number

    async def find_stored(self, port: Port, keys: Sequence[str]) -> list[str]:
        """Return those of some keys that the tier has, without counting hits or misses.

        Raises:
            TierError: the backend failed.
        """
        found: list[str] = []
        for chunk in self.calls.split_into_chunks(keys):
            found += await self.calls.call_strictly(port, partial(self.backend.get_many, chunk))
        return found

    async def verify(self, port: Port) -> str:
        """Check the whole store, without a timeout, and return in a few words what is intact.

        Raises:
            TierError: something is damaged.
        """
        words: str = await self.calls.call_strictly(port, self.backend.verify, listing=True)
        return words

    async def describe(self, port: Port) -> str:
        """Return the backend's own description of how it stores vectors, or an empty string."""
        if not hasattr(self.backend, "describe"):
            return ""
        words: str = await self.calls.call_strictly(port, self.backend.describe)
        return words

    async def migrate(self, port: Port) -> str:
        """Migrate the store's layout to the current version, without a timeout, and return what was done."""
        done: str = await self.calls.call_strictly(port, self.backend.migrate, listing=True)
        if hasattr(self.backend, "list_grants"):
            grants = await self.calls.call_strictly(port, self.backend.list_grants)
            done = f"{done}; a role that only uses the table needs: {'; '.join(grants)}"
        return done

    async def compact(self, port: Port) -> str:
        """Give unused space of the store back to the system, without a timeout, and return the backend's sentence."""
        done: str = await self.calls.call_strictly(port, self.backend.compact, listing=True)
        return done

    async def peek(self, port: Port, keys: Sequence[str]) -> Mapping[str, Any]:
        """Return the raw values of some keys, without counting hits or misses.

        Raises:
            TierError: the backend failed.
        """
        values: dict[str, Any] = {}
        for chunk in self.calls.split_into_chunks(keys):
            values.update(await self.calls.call_strictly(port, partial(self.backend.get_many, chunk)))
        return values
