"""One cell of the fault matrix: a cache over one store, a fault, and the checks before, during and after the fault."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count, pairwise
from statistics import median
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias
from uuid import uuid4

from embedonce import Cache, Tier
from embedonce.answers import Fetched
from embedonce.contracts import Backend, Embedded, Task
from embedonce.events import Event, LookedUp, Stored, TierChanged
from embedonce.testing import CountingProvider

Operation: TypeAlias = Literal["read", "write"]
Face: TypeAlias = Literal["sync", "async"]
Effect: TypeAlias = Literal["fails", "serves", "forgets", "partly"]

OPERATIONS: tuple[Operation, ...] = ("read", "write")
FACES: tuple[Face, ...] = ("sync", "async")
KINDS: Mapping[Operation, type[LookedUp | Stored]] = {"read": LookedUp, "write": Stored}
FAULTS = (
    "refused",
    "black hole",
    "slow",
    "reset mid-reply",
    "garbage",
    "killed and restarted",
    "out of memory or disk full",
    "read-only",
    "wrong password",
    "evicting",
)

TIMEOUT = 0.5
"""The tier's timeout, in seconds, for faults in which calls get no answer."""
LONG_TIMEOUT = 60.0
"""The tier's timeout for all other faults, so that a busy machine causes no timeout."""
RECOVERY_TIMEOUT = 60.0
"""Seconds after the end of the fault within which the store must serve again."""
CALLS = 5
"""Number of calls during the fault."""
KNOWN_COUNT = 12
"""Number of texts that are stored before the fault."""
NEW_COUNT = 3
"""Number of new texts in a call."""
NEW_COUNT_OF_NODES = 24
"""Number of new texts in a call to a store with separate nodes, so that each call has keys on every node. If a call had
all its keys on one node, the tier would not fail as a whole, and each node would have timeouts of its own."""


@dataclass(frozen=True, slots=True)
class StoreFault:
    """A fault of one store, and its effects."""

    method: str
    """Text for the docs that says how the test injects the fault."""
    causes: frozenset[str]
    """Possible causes of the counted errors; which of them occurs depends on timing. Empty if there are no errors."""
    read: Effect = "fails"
    """Effect on reads: they fail, are served, find nothing, or partly fail."""
    write: Effect = "fails"
    """Effect on writes."""
    is_repeatable: bool = True
    """Whether a test can start and end the fault for each call separately."""

    def get_effect(self, operation: Operation) -> Effect:
        """Return the effect on reads or on writes."""
        return self.read if operation == "read" else self.write

    def get_causes(self, operation: Operation) -> frozenset[str]:
        """Return the causes that errors of reads or of writes may have."""
        return self.causes if self.get_effect(operation) in ("fails", "partly") else frozenset()


class Store(Protocol):
    """A real store, and its possible faults."""

    name: str
    faults: Mapping[str, StoreFault]
    not_applicable: Mapping[str, str]
    """For each fault that does not apply to this store, the reason."""
    separate_nodes: int
    """Number of nodes that the backend skips separately. Before it skips a node, one call waits until the timeout."""

    def backend(self, fault: str) -> Backend: ...

    def inject(self, fault: str) -> AbstractContextManager[None]: ...


class Cell(NamedTuple):
    """One combination of store, fault, operation, and blocking or async methods (``face``)."""

    store: str
    fault: str
    operation: Operation
    face: Face


@dataclass(slots=True)
class Outcome:
    """The measurements of one cell; times in seconds."""

    causes: set[str] = field(default_factory=set)
    """Causes of the errors that were counted; ``corrupt`` for values that were refused."""
    timeouts: int = 0
    """Number of calls that waited until the tier's timeout during the fault."""
    first_delay: float = 0.0
    """Delay of the first call, compared with a call without the fault."""
    later_delay: float = 0.0
    """Median delay of the later calls."""
    recovery: float = 0.0
    """Time from the end of the fault until the tier serves again."""


class Caller:
    """Makes the same calls with the blocking or the async methods; all async calls run in one event loop."""

    def __init__(self, cache: Cache, runner: asyncio.Runner | None) -> None:
        self.cache = cache
        self.runner = runner

    def fetch(self, texts: Sequence[str]) -> Fetched:
        if self.runner is None:
            return self.cache.fetch(texts)
        return self.runner.run(self.cache.afetch(texts))

    def close(self) -> None:
        if self.runner is None:
            self.cache.close()
        else:
            self.runner.run(self.cache.aclose())


class ProviderWithHook(CountingProvider):
    """Calls ``before_embed`` once, before the next embedding.

    At that moment, the cache has read the tier, but has not written to it.
    """

    before_embed: Callable[[], None] | None = None

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        answer = self.embed

        def embed(texts: Sequence[str], task: Task, /) -> Embedded:
            before_embed, self.before_embed = self.before_embed, None
            if before_embed is not None:
                before_embed()
            return answer(texts, task)

        self.embed = embed


class LogLines(logging.Handler):
    """A log handler that collects embedonce's warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def capture_log() -> Iterator[LogLines]:
    lines = LogLines()
    logger = logging.getLogger("embedonce")
    logger.addHandler(lines)
    try:
        yield lines
    finally:
        logger.removeHandler(lines)


class CellRun:
    """One run of one cell."""

    def __init__(self, store: Store, cell: Cell) -> None:
        self.store = store
        self.cell = cell
        self.fault = store.faults[cell.fault]
        self.effect = self.fault.get_effect(cell.operation)
        self.provider = ProviderWithHook(model=f"{cell.store}-{uuid4().hex}", dimensions=64)
        self.events: list[Event] = []
        self.thread = threading.get_ident()
        self.awaited_events: list[Event] = []
        """Events that were emitted in the test's thread. They describe operations for which a call waited."""
        self.numbers = count()
        self.outcome = Outcome()
        self.known = self.make_texts(KNOWN_COUNT)

    def record_event(self, event: Event) -> None:
        """Record an event."""
        self.events.append(event)
        if threading.get_ident() == self.thread:
            self.awaited_events.append(event)

    def make_texts(self, number: int) -> list[str]:
        """Return new texts, which the cache has not seen."""
        return [f"text {next(self.numbers)}" for _ in range(number)]

    @contextmanager
    def open_cache(self) -> Iterator[Caller]:
        write: Literal["inline", "background"] = "inline" if self.cell.operation == "write" else "background"
        timeout = TIMEOUT if "timeout" in self.fault.get_causes(self.cell.operation) else LONG_TIMEOUT
        tier = Tier(self.store.backend(self.cell.fault), name=self.store.name, timeout=timeout, write=write)
        cache = Cache(self.provider, [tier], listeners=[self.record_event])
        with ExitStack() as stack:
            runner = stack.enter_context(asyncio.Runner()) if self.cell.face == "async" else None
            caller = Caller(cache, runner)
            stack.callback(caller.close)
            yield caller

    def fetch(self, caller: Caller, texts: Sequence[str]) -> tuple[Fetched, float]:
        """Fetch texts, and return the answer and the duration.

        Check every row, and check that the call waited for at most one timeout.
        """
        before = self.count_timeouts()
        start = time.perf_counter()
        fetched = caller.fetch(texts)
        seconds = time.perf_counter() - start
        assert not fetched.failed
        for text, row in zip(texts, fetched.rows, strict=True):
            assert row is not None
            assert row.tobytes() == self.provider.vector_of(text).tobytes(), f"a wrong vector for {text!r}"
        assert self.count_timeouts() - before <= 1, "a call waited for more than one timeout of the tier"
        return fetched, seconds

    def count_timeouts(self, *operations: Operation) -> int:
        """Return the number of backend calls that timed out while a call of the cache waited for them."""
        kinds = tuple(KINDS[operation] for operation in operations or OPERATIONS)
        return sum(isinstance(event, kinds) and event.cause == "timeout" for event in self.awaited_events)

    def fetch_until_served(self, caller: Caller, texts: Sequence[str]) -> float:
        """Fetch until every text comes from the store, and return the seconds that this took."""
        start = time.monotonic()
        while True:
            fetched, _ = self.fetch(caller, texts)
            seconds = time.monotonic() - start
            if set(fetched.sources) == {self.store.name}:
                return seconds
            assert seconds < RECOVERY_TIMEOUT, f"the store does not serve after {seconds:.0f} s: {caller.cache.stats()}"
            time.sleep(0.02)

    # --- before, during and after the fault -----------------------------------------------------

    def run(self) -> Outcome:
        with capture_log() as lines, self.open_cache() as caller:
            baseline = self.store_known_texts(caller)
            self.events.clear()
            self.awaited_events.clear()
            lines.messages.clear()
            seconds = self.run_reads(caller) if self.cell.operation == "read" else self.run_writes(caller)
            self.outcome.first_delay = max(0.0, seconds[0] - baseline)
            self.outcome.later_delay = max(0.0, median(seconds[1:]) - baseline)
            during_fault = list(self.events)
            self.outcome.timeouts = self.count_timeouts(self.cell.operation)
            self.check_timeouts(during_fault)
            self.outcome.recovery = self.fetch_until_served(caller, [*self.known, *self.make_texts(4)])
            self.wait_for_closed_breakers(caller)
        self.check_counts(during_fault)
        self.check_lines(lines.messages)
        return self.outcome

    def store_known_texts(self, caller: Caller) -> float:
        """Store the known texts, and return the seconds of a call without a fault.

        On a busy machine a call may time out here. This method waits until the tier has recovered.
        """
        self.fetch_until_served(caller, self.known)
        baseline = median(self.fetch(caller, self.make_call_texts())[1] for _ in range(3))
        self.wait_for_closed_breakers(caller)
        self.fetch_until_served(caller, self.known)
        return baseline

    def make_call_texts(self) -> list[str]:
        """Return stored and new texts for a read, and only new texts for a write."""
        new = self.make_texts(NEW_COUNT if self.store.separate_nodes == 1 else NEW_COUNT_OF_NODES)
        return [*self.known[:5], *new, *self.known[5:]] if self.cell.operation == "read" else new

    def run_reads(self, caller: Caller) -> list[float]:
        """Make all calls during one fault, and return how many seconds each call took."""
        with self.store.inject(self.cell.fault):
            return [self.fetch(caller, self.make_call_texts())[1] for _ in range(CALLS)]

    def run_writes(self, caller: Caller) -> list[float]:
        """Make calls in which the fault begins between the lookup and the write. Return the seconds of each call."""
        if not self.fault.is_repeatable:
            return self.write_during_fault(caller, CALLS - 1)
        seconds = self.write_during_fault(caller, 0)
        # If the lookup timed out, the call did not write. Repeat the call until it writes.
        while not any(isinstance(event, Stored) for event in self.events):
            self.wait_for_closed_breakers(caller)
            seconds = self.write_during_fault(caller, 0)
        # Check this before the later calls, because a probe may succeed during one of them and write an entry.
        if self.effect == "fails":
            assert not [event for event in self.events if isinstance(event, Stored) and event.stored]
        return [*seconds, *(self.write_during_fault(caller, 0)[0] for _ in range(1, CALLS))]

    def write_during_fault(self, caller: Caller, later: int) -> list[float]:
        with ExitStack() as stack:
            self.provider.before_embed = lambda: stack.enter_context(self.store.inject(self.cell.fault))
            seconds = [self.fetch(caller, self.make_call_texts())[1] for _ in range(1 + later)]
            self.provider.before_embed = None
            return seconds

    def wait_for_closed_breakers(self, caller: Caller) -> None:
        """Wait until both breakers are closed and all writes are done. After that, no line of the log is missing."""
        end = time.monotonic() + RECOVERY_TIMEOUT
        while self.is_a_breaker_open():
            self.fetch(caller, self.make_call_texts())
            caller.cache.flush(RECOVERY_TIMEOUT)
            assert time.monotonic() < end, "a breaker stays open"
            time.sleep(0.02)
        assert caller.cache.flush(RECOVERY_TIMEOUT)

    def is_a_breaker_open(self) -> bool:
        state = {event.operation: event.state for event in self.events if isinstance(event, TierChanged)}
        return "open" in state.values()

    # --- checks of what was counted and logged --------------------------------------------------

    def check_timeouts(self, during_fault: Sequence[Event]) -> None:
        """Check that not too many calls timed out.

        The limit is the number of times that the breaker opened, plus ``separate_nodes`` - 1. Reads and writes are
        checked separately.
        """
        if self.cell.fault in ("black hole", "slow") and self.effect == "fails":
            assert self.outcome.timeouts
        changes = [event for event in during_fault if isinstance(event, TierChanged)]
        for operation in OPERATIONS:
            opened = sum(change.operation == operation and change.state == "open" for change in changes)
            assert self.count_timeouts(operation) <= opened + self.store.separate_nodes - 1, during_fault

    def check_counts(self, during_fault: Sequence[Event]) -> None:
        """Check that errors are never counted as hits or misses, and that each error has one of the fault's causes."""
        found: Counter[str] = Counter()
        kind = KINDS[self.cell.operation]
        for event in during_fault:
            if isinstance(event, kind):
                for name in ("hits", "misses", "errors", "corrupt", "skipped", "stored", "dropped"):
                    found[name] += getattr(event, name, 0)
                if event.errors:
                    assert event.cause
                    self.outcome.causes.add(event.cause)
        if found["corrupt"]:
            self.outcome.causes.add("corrupt")
        expected = self.fault.get_causes(self.cell.operation)
        assert self.outcome.causes <= expected, f"unexpected causes: {sorted(self.outcome.causes - expected)}"
        if self.effect == "partly":
            return
        wrong = {name: number for name, number in found.items() if number}
        if self.effect == "fails":
            assert found["errors"] + found["corrupt"] > 0, wrong
            assert found["hits"] == found["misses"] == 0, wrong
        else:
            assert found["errors"] == found["corrupt"] == found["skipped"] == found["dropped"] == 0, wrong
        if self.effect == "serves" and self.cell.operation == "read":
            assert found["hits"] == CALLS * KNOWN_COUNT, wrong

    def check_lines(self, messages: Sequence[str]) -> None:
        """Check that one line is logged per change of state."""
        changes = [event for event in self.events if isinstance(event, TierChanged)]
        for operation in OPERATIONS:
            states = ["closed", *(change.state for change in changes if change.operation == operation)]
            assert all(one != next_ for one, next_ in pairwise(states)), states
            assert states[-1] == "closed"
            opened = [line for line in messages if f"{operation}s are failing" in line]
            closed = [line for line in messages if f"{operation}s work again" in line]
            assert (len(opened), len(closed)) == (states.count("open"), states.count("closed") - 1), messages
        # Each change of a node's state has its own line. Any other kind of message, such as one about corrupt values or
        # failed background writes, has at most one line.
        rest = [line for line in messages if line not in {*list_breaker_lines(messages)}]
        nodes = [line for line in rest if NODE.match(line)]
        for node in {NODE.match(line)[1] for line in nodes}:  # type: ignore[index]
            mine = ["answers again" in line for line in nodes if NODE.match(line)[1] == node]  # type: ignore[index]
            assert mine[0] is False, messages
            assert all(one != next_ for one, next_ in pairwise(mine)), messages
        rest = [line for line in rest if line not in nodes]
        assert len(rest) == len({line.partition(": ")[2][:20] for line in rest}), messages


NODE = re.compile(r"(memcached \S+) (?:does not answer|answers again)")


def list_breaker_lines(messages: Sequence[str]) -> list[str]:
    """Return the messages that report that a breaker has opened or closed."""
    return [line for line in messages if "s are failing (" in line or "s work again" in line]


def run_cell(store: Store, cell: Cell) -> Outcome:
    """Run one cell, and return its measurements."""
    return CellRun(store, cell).run()
