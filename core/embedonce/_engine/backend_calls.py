"""The one way to call a backend: its deadline, its thread or async twin, its chunks, and what a failure means."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from embedonce.contracts import Capabilities, deadline
from embedonce.errors import PartialAnswer, TierBusy, TierError, TierTimeout

from .breaker import Breaker
from .chain import Tier
from .ports import Port, Ports, call_with_deadline
from .workers import Workers

if TYPE_CHECKING:
    import asyncio

log = logging.getLogger("embedonce")

CALLS = 32
"""Most calls to a backend at once from event loops; more wait, and that is no timeout of the tier."""

CHUNK = 1024
"""Keys of one backend call where the backend names no ``max_batch``: the deadline is looked at in between."""

TIMEOUTS: Mapping[str, float | None] = {"process": None, "host": 2.0, "network": 0.25}
"""Seconds that a call to a backend of each scope may take, where the tier names no timeout."""


class BackendCalls:
    """Calls one tier's backend, for reading and writing alike."""

    def __init__(self, tier: Tier, name: str, ports: Ports) -> None:
        self.name = name
        self.backend: Any = tier.backend
        self.capabilities: Capabilities = tier.backend.capabilities
        self.timeout = tier.timeout if tier.timeout is not None else TIMEOUTS[self.capabilities.scope]
        self.on_error = tier.on_error
        self._ports = ports
        self._twins: WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[Any, AsyncGenerator[Any, None]]]
        self._twins = WeakKeyDictionary()
        self._inherited: list[Any] = []
        self.reset()

    def reset(self) -> None:
        """Start anew, as in a forked child, and do not close what the parent owns."""
        self._workers = Workers(CALLS)
        self._inherited += self._twins.values()
        self._twins = WeakKeyDictionary()

    # --- calling ------------------------------------------------------------------------------

    async def call(self, port: Port, call: Callable[[], Any], *, listing: bool = False) -> Any:
        """Make one call to the backend within the tier's timeout.

        Raises:
            TimeoutError, TierBusy: as :meth:`Port.call` says.
            Exception: whatever the backend raised.
        """
        caps = self.capabilities
        # A listing walks over everything that a store holds, so the timeout of a look-up does not apply.
        timeout = None if listing else self.timeout
        quick = not caps.blocking and caps.deadline
        return await port.call(call, timeout, self._workers, inline=caps.deadline, quick=quick)

    async def call_strictly(self, port: Port, call: Callable[[], Any], *, listing: bool = False) -> Any:
        """Make one call of a kind that never fails open, such as erasing and listing.

        Raises:
            TierError: the backend failed.
        """
        try:
            return await self.call(port, call, listing=listing)
        except TierError as error:
            raise TierError(str(error), self.name) from error
        except TimeoutError as error:
            raise TierTimeout(f"no answer within {self.timeout} s", self.name) from error
        except Exception as error:
            raise TierError(f"{type(error).__name__}", self.name) from error

    def call_now(self, call: Callable[[], Any]) -> Any:
        """Make a call in this thread, with the tier's timeout as its deadline."""
        return call_with_deadline(call, self.timeout)

    async def get(self, port: Port, keys: Sequence[str]) -> Mapping[str, Any]:
        """Read some keys: on an event loop through the backend's async twin, if it has one."""
        loop = port.loop
        if loop is None or not self.capabilities.twin:
            found: Mapping[str, Any] = await self.call(port, lambda: self.backend.get_many(keys))
            return found
        twin = await self._twin(loop)

        async def get() -> Mapping[str, Any]:
            with deadline(self.timeout):
                answer: Mapping[str, Any] = await twin.get_many(keys)
                return answer

        return await port.run_coroutine(get, self.timeout)

    def chunks(self, keys: Sequence[str]) -> Iterator[Sequence[str]]:
        """Cut keys into what one call takes."""
        size = self.capabilities.max_batch or (CHUNK if self.capabilities.blocking else len(keys) or 1)
        for start in range(0, len(keys), size):
            yield keys[start : start + size]

    def run_off_path(self, call: Callable[[], None]) -> bool:
        """Run a call where no caller waits for it; False where no thread can be had for it."""
        try:
            self._ports.workers.submit(call)
        except RuntimeError:  # the interpreter is ending and starts no threads any more
            return False
        return True

    # --- async twins --------------------------------------------------------------------------

    async def _twin(self, loop: asyncio.AbstractEventLoop) -> Any:
        held = self._twins.get(loop)
        if held is None:
            # A twin holds its loop, and so would stay, with its connections, when the loop has ended.
            for ended in [other for other in list(self._twins) if other.is_closed()]:
                self._twins.pop(ended, None)
            life = self._live()
            held = self._twins[loop] = await anext(life), life
        return held[0]

    async def _live(self) -> AsyncGenerator[Any, None]:
        """Yield a twin once. A loop that ends ends its async generators, and so this one."""
        import asyncio

        twin = self.backend.twin()
        try:
            yield twin
        finally:
            try:
                async with asyncio.timeout(self.timeout):
                    await twin.close()
            except Exception as error:  # noqa: BLE001  (the rest is closed all the same)
                log.warning("tier %r: closing its async client failed (%s)", self.name, type(error).__name__)

    async def close_twin(self, port: Port) -> None:
        """Close the native async client of the running loop, if there is one."""
        held = self._twins.pop(port.loop, None) if port.loop is not None else None
        if held is not None:
            await held[1].aclose()

    # --- failures -----------------------------------------------------------------------------

    def note_failure(self, breaker: Breaker, error: Exception, *, probe: bool = False) -> str:
        """Tell the breaker of a failed call; return the cause."""
        if isinstance(error, PartialAnswer) and isinstance(error.__cause__, Exception):
            error = error.__cause__
        cause = "timeout" if isinstance(error, TimeoutError) else type(error).__name__
        if not isinstance(error, TierBusy):
            breaker.failed(cause)
        elif probe:  # whoever is busy is there; and until its probe is settled a breaker lets nobody else ask
            breaker.succeeded()
        return cause

    def tier_error(self, error: Exception) -> TierError:
        """Return what is raised for a backend's error where the tier must not fail."""
        cause = type(error).__name__
        if isinstance(error, TimeoutError):
            return TierTimeout(f"tier {self.name!r} did not answer within {self.timeout} s", self.name)
        return TierError(f"tier {self.name!r} failed ({cause})", self.name)

    def skipped_error(self) -> TierError:
        """Return what is raised where the breaker skips a tier that must not fail."""
        return TierError(f"tier {self.name!r} has failed and is left out until it answers again", self.name)


def split_partial(keys: Sequence[str], error: Exception, kind: type) -> tuple[Sequence[str], Any]:
    """Return the keys that a call failed for and the answer for the others; without a sound one all have failed."""
    if isinstance(error, PartialAnswer) and isinstance(error.answer, kind):
        failed = [key for key in keys if key in error.failed]
        if failed:
            return failed, error.answer
    return keys, ()
