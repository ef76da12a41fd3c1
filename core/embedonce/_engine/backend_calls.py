"""Calls a tier's backend within its timeout, in a thread or through its async twin, and handles its failures."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from embedonce.contracts import Capabilities
from embedonce.errors import LoopBusy, PartialAnswer, TierBusy, TierError, TierTimeout

from .breaker import Breaker
from .chain import Tier
from .ports import Port, Ports, call_with_deadline
from .repeated_warnings import RepeatedWarnings
from .workers import Workers

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")

MAX_CALLS = 32
"""Maximum number of calls to one backend that run in threads at the same time.

A call raises TierBusy if no thread becomes free in time.
"""

CHUNK_SIZE = 1024
"""Maximum number of keys per call to a blocking backend without ``max_batch``.

A larger request is split into several calls, and each call has its own deadline.
"""

DEFAULT_TIMEOUTS: Mapping[str, float | None] = {"process": None, "single": 2.0, "host": 2.0, "network": 0.25}
"""Timeout of a call in seconds, for each scope of a backend. A tier's own timeout takes precedence."""


class BackendCalls:
    """Calls one tier's backend, for both reads and writes."""

    def __init__(self, tier: Tier, name: str, ports: Ports) -> None:
        self.name = name
        self.backend: Any = tier.backend
        self.capabilities: Capabilities = tier.backend.capabilities
        self.timeout = tier.timeout if tier.timeout is not None else DEFAULT_TIMEOUTS[self.capabilities.scope]
        self.on_error = tier.on_error
        self.is_quick = not self.capabilities.blocking and self.capabilities.deadline
        """Whether calls never block, so that they are made in the caller's thread and without a deadline."""
        self.can_get_inline = self.is_quick or self.capabilities.deadline or self.timeout is None
        """Whether :meth:`get_inline` can be used."""
        self._chunk_size = self.capabilities.max_batch or (CHUNK_SIZE if self.capabilities.blocking else None)
        """Maximum number of keys per call; None means no limit."""
        self.warnings = RepeatedWarnings()
        self._ports = ports
        self._twins: WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[Any, AsyncGenerator[Any, None]]]
        self._twins = WeakKeyDictionary()
        self._inherited: list[Any] = []
        """In a forked child, the parent's twins. This list keeps garbage collection from closing these twins."""
        self.reset()

    def reset(self) -> None:
        """Start over in a forked child, without closing the parent's twins."""
        self.warnings.renew_lock()
        self._workers = Workers(MAX_CALLS)
        self._inherited += self._twins.values()
        self._twins = WeakKeyDictionary()

    # --- calling ------------------------------------------------------------------------------

    async def call(
        self, port: Port, call: Callable[[], Any], *, listing: bool = False, min_timeout: float = 0.0
    ) -> Any:
        """Make one call to the backend within the tier's timeout, or within ``min_timeout`` seconds if this is longer.

        Raises:
            TimeoutError, TierBusy: as in :meth:`Port.call`.
            Exception: any error that the backend raised.
        """
        # A listing walks the whole store, so the timeout for a lookup does not apply to a listing.
        timeout = None if listing or self.timeout is None else max(self.timeout, min_timeout)
        return await port.call(call, timeout, self._workers, inline=self.capabilities.deadline, quick=self.is_quick)

    async def call_strictly(self, port: Port, call: Callable[[], Any], *, listing: bool = False) -> Any:
        """Make one call that must not fail silently, such as erasing or listing.

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

    def call_in_this_thread(self, call: Callable[[], Any]) -> Any:
        """Make a call in the current thread, with the tier's timeout as its deadline."""
        return call_with_deadline(call, self.timeout)

    def get_inline(self, key: str) -> Any:
        """Read one key in the current thread. Return None if the backend does not have it."""
        return self._get(key) if self.is_quick else call_with_deadline(partial(self._get, key), self.timeout)

    def _get(self, key: str) -> Any:
        return self.backend.get(key) if self.capabilities.get else self.backend.get_many([key]).get(key)

    async def get(self, port: Port, keys: Sequence[str]) -> Mapping[str, Any]:
        """Read some keys; on an event loop, use the backend's async twin if it has one."""
        loop = port.loop if self.capabilities.twin else None
        if loop is None:
            get_many: Callable[[], Mapping[str, Any]] = partial(self.backend.get_many, keys)
            if self.is_quick:
                return get_many()
            return await port.call(
                get_many, self.timeout, self._workers, inline=self.capabilities.deadline, quick=False
            )
        entry = self._twins.get(loop)
        twin = await self._open_twin_of(loop) if entry is None else entry[0]
        return await port.run_coroutine(lambda: twin.get_many(keys), self.timeout)

    def split_into_chunks(self, keys: Sequence[str]) -> Sequence[Sequence[str]]:
        """Return the keys in chunks, one for each backend call."""
        size = self._chunk_size or len(keys)
        if 0 < len(keys) <= size:
            return (keys,)
        return [keys[start : start + size] for start in range(0, len(keys), size or 1)]

    def split_items(self, items: Mapping[str, T]) -> Iterable[Mapping[str, T]]:
        """Return the items in parts, one for each backend call."""
        if len(items) <= (self._chunk_size or len(items)):
            return (items,) if items else ()
        return [{key: items[key] for key in chunk} for chunk in self.split_into_chunks(list(items))]

    def run_in_background(self, call: Callable[[], None]) -> bool:
        """Start a call in another thread and do not wait for its end. Return False if no thread can be started."""
        try:
            self._ports.workers.submit(call)
        except RuntimeError:  # the interpreter is shutting down and starts no new threads
            return False
        return True

    # --- async twins --------------------------------------------------------------------------

    async def _open_twin_of(self, loop: asyncio.AbstractEventLoop) -> Any:
        """Open and return the async twin of a loop that has none."""
        # Remove the twins of closed loops here. A twin refers to its loop, so the weak dictionary never drops the
        # loop's entry, and the connections of the twin would leak.
        for ref in self._twins.keyrefs():  # iterating over the dictionary fails if another loop adds its twin
            other = ref()
            if other is not None and other.is_closed():
                self._twins.pop(other, None)
        generator = self._open_twin()
        twin, _ = self._twins[loop] = await anext(generator), generator
        return twin

    async def _open_twin(self) -> AsyncGenerator[Any, None]:
        """Open a twin, yield it once, and close it when this generator is closed.

        An event loop that shuts down closes its async generators. So the loop closes the twin, too.
        """
        from embedonce.event_loops import async_deadline

        twin = self.backend.twin()
        try:
            yield twin
        finally:
            try:
                async with async_deadline(self.timeout):
                    await twin.close()
            except Exception as error:  # noqa: BLE001  (the async clients of other tiers must be closed too)
                self.warnings.warn(
                    "closing", "tier %r: cannot close its async client (%s)", self.name, type(error).__name__
                )

    async def close_twin(self, port: Port) -> None:
        """Close the async twin of the running loop, if there is one."""
        entry = self._twins.pop(port.loop, None) if port.loop is not None else None
        if entry is not None:
            _, generator = entry
            await generator.aclose()

    # --- failures -----------------------------------------------------------------------------

    def note_failure(self, breaker: Breaker, error: Exception, *, probe: bool = False) -> str:
        """Report a failed call to the breaker, and return the cause of the failure."""
        if isinstance(error, PartialAnswer) and isinstance(error.__cause__, Exception):
            error = error.__cause__
        if isinstance(error, LoopBusy) and not breaker.record_busy_loop(error.started):
            self.warnings.warn(
                "busy loop",
                "tier %r: other tasks blocked the event loop, so an answer could not be read in time; run work that "
                "blocks in a thread, for example with asyncio.to_thread",
                self.name,
            )
            return "busy_loop"
        cause = "timeout" if isinstance(error, TimeoutError) else type(error).__name__
        if not isinstance(error, TierBusy):
            breaker.record_failure(cause)
        elif probe:  # a busy store is reachable, so the probe counts as a success
            breaker.record_success()
        return cause

    def make_error(self, error: Exception) -> TierError:
        """Return the error to raise when a backend fails and the tier has ``on_error = "raise"``."""
        cause = type(error).__name__
        if isinstance(error, LoopBusy):
            return LoopBusy(error.started, self.name)
        if isinstance(error, TimeoutError):
            return TierTimeout(f"tier {self.name!r} did not answer within {self.timeout} s", self.name)
        return TierError(f"tier {self.name!r} failed ({cause})", self.name)

    def make_skipped_error(self) -> TierError:
        """Return the error to raise when the breaker skips a tier that has ``on_error = "raise"``."""
        return TierError(f"tier {self.name!r} was skipped because earlier calls failed; retry later", self.name)


def split_partial(keys: Sequence[str], error: Exception, kind: type) -> tuple[Sequence[str], Any]:
    """Return the keys that failed, and the answer for the other keys.

    All keys count as failed unless ``error`` is a :class:`PartialAnswer` whose ``answer`` has the type ``kind``.
    """
    if isinstance(error, PartialAnswer) and isinstance(error.answer, kind):
        failed = [key for key in keys if key in error.failed]
        if failed:
            return failed, error.answer
    return keys, ()
