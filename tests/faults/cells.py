"""One cell of the fault matrix: a cache over one store, a fault, and what must hold before, during and after it."""

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
"""Of the tier, in seconds, where calls get no answer. What does not keep it never ends: see FAULTS."""
PATIENT = 60.0
"""The tier's timeout for all else: a busy machine must not make one of its own."""
RESUME = 60.0
"""Seconds after which service is taken for lost, once the fault has ended."""
CALLS = 5
"""Calls while the fault lasts."""
KNOWN = 12


@dataclass(frozen=True, slots=True)
class Strike:
    """What a fault does to one store."""

    how: str
    """How the test brings it about, for the docs."""
    causes: frozenset[str]
    """Under which of these errors are counted; which of them, chance decides. Empty: there are none."""
    read: Effect = "fails"
    """What becomes of reads: they fail, are served, find nothing, or one or the other."""
    write: Effect = "fails"
    twice: bool = True
    """It may be brought about and ended again for each call of a test."""

    def effect(self, operation: Operation) -> Effect:
        """Return what becomes of reads, or of writes."""
        return self.read if operation == "read" else self.write

    def causes_of(self, operation: Operation) -> frozenset[str]:
        """Return the causes that errors of reads, or of writes, may have."""
        return self.causes if self.effect(operation) in ("fails", "partly") else frozenset()


class Store(Protocol):
    """A real store, and the faults that it can have."""

    name: str
    strikes: Mapping[str, Strike]
    absent: Mapping[str, str]
    """Why a fault makes no sense here."""
    apart: int
    """Of how many nodes each is left out by itself, and costs a timeout of its own."""

    def backend(self, fault: str) -> Backend: ...

    def fault(self, fault: str) -> AbstractContextManager[None]: ...


class Cell(NamedTuple):
    """Where a row and a column of the matrix meet."""

    store: str
    fault: str
    operation: Operation
    face: Face


@dataclass(slots=True)
class Outcome:
    """What a cell showed; times in seconds."""

    causes: set[str] = field(default_factory=set)
    """Under which causes errors were counted; ``corrupt`` for values that were refused."""
    timeouts: int = 0
    """How many calls waited until the tier's timeout while the fault lasted."""
    first: float = 0.0
    """How much longer the first call took than one without the fault."""
    later: float = 0.0
    """The same of a later call, the median."""
    resumed: float = 0.0
    """From the end of the fault until the tier answers again."""


class Caller:
    """Makes the same calls through either face; the event loop stays the same from first to last."""

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


class StruckProvider(CountingProvider):
    """Lets something happen when it is asked: after the cache has read, before it writes."""

    happens: Callable[[], None] | None = None

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        answer = self.embed

        def embed(texts: Sequence[str], task: Task, /) -> Embedded:
            happens, self.happens = self.happens, None
            if happens is not None:
                happens()
            return answer(texts, task)

        self.embed = embed


class Lines(logging.Handler):
    """The lines that embedonce logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@contextmanager
def listening() -> Iterator[Lines]:
    lines = Lines()
    logger = logging.getLogger("embedonce")
    logger.addHandler(lines)
    try:
        yield lines
    finally:
        logger.removeHandler(lines)


class Run:
    """One run of one cell."""

    def __init__(self, store: Store, cell: Cell) -> None:
        self.store = store
        self.cell = cell
        self.strike = store.strikes[cell.fault]
        self.effect = self.strike.effect(cell.operation)
        self.provider = StruckProvider(model=f"{cell.store}-{uuid4().hex}", dimensions=64)
        self.events: list[Event] = []
        self.thread = threading.get_ident()
        self.waited: list[Event] = []
        """Those of the thread that calls: what they tell of, a call has waited for."""
        self.numbers = count()
        self.outcome = Outcome()
        self.known = self.texts(KNOWN)

    def heard(self, event: Event) -> None:
        """Take note of an event."""
        self.events.append(event)
        if threading.get_ident() == self.thread:
            self.waited.append(event)

    def texts(self, number: int) -> list[str]:
        """Return texts that nobody has asked for yet."""
        return [f"text {next(self.numbers)}" for _ in range(number)]

    @contextmanager
    def opened(self) -> Iterator[Caller]:
        write: Literal["inline", "background"] = "inline" if self.cell.operation == "write" else "background"
        timeout = TIMEOUT if "timeout" in self.strike.causes_of(self.cell.operation) else PATIENT
        tier = Tier(self.store.backend(self.cell.fault), name=self.store.name, timeout=timeout, write=write)
        cache = Cache(self.provider, [tier], listeners=[self.heard])
        with ExitStack() as stack:
            runner = stack.enter_context(asyncio.Runner()) if self.cell.face == "async" else None
            caller = Caller(cache, runner)
            stack.callback(caller.close)
            yield caller

    def fetch(self, caller: Caller, texts: Sequence[str]) -> tuple[Fetched, float]:
        """Fetch, see that every row is right and that one timeout is the most it cost, and return how long it took."""
        before = self.timeouts()
        start = time.perf_counter()
        fetched = caller.fetch(texts)
        seconds = time.perf_counter() - start
        assert not fetched.failed
        for text, row in zip(texts, fetched.rows, strict=True):
            assert row is not None
            assert row.tobytes() == self.provider.vector_of(text).tobytes(), f"a wrong vector for {text!r}"
        assert self.timeouts() - before <= 1, "a call waited for the tier more than once"
        return fetched, seconds

    def timeouts(self, *operations: Operation) -> int:
        """Return how many calls to the backend were waited for until their timeout."""
        kinds = tuple(KINDS[operation] for operation in operations or OPERATIONS)
        return sum(isinstance(event, kinds) and event.cause == "timeout" for event in self.waited)

    def settle(self, caller: Caller, texts: Sequence[str]) -> float:
        """Call until every text comes from the store, and return how long that took."""
        start = time.monotonic()
        while True:
            fetched, _ = self.fetch(caller, texts)
            seconds = time.monotonic() - start
            if set(fetched.sources) == {self.store.name}:
                return seconds
            assert seconds < RESUME, f"not back after {seconds:.0f} s: {caller.cache.stats()}"
            time.sleep(0.02)

    # --- the three parts of a cell --------------------------------------------------------------

    def run(self) -> Outcome:
        with listening() as lines, self.opened() as caller:
            usual = self.prepared(caller)
            self.events.clear()
            self.waited.clear()
            lines.said.clear()
            seconds = self.reads(caller) if self.cell.operation == "read" else self.writes(caller)
            self.outcome.first = max(0.0, seconds[0] - usual)
            self.outcome.later = max(0.0, median(seconds[1:]) - usual)
            struck = list(self.events)
            self.outcome.timeouts = self.timeouts(self.cell.operation)
            self.check_timeouts(struck)
            self.outcome.resumed = self.settle(caller, [*self.known, *self.texts(4)])
            self.settled(caller)
        self.check_counts(struck)
        self.check_lines(lines.said)
        return self.outcome

    def prepared(self, caller: Caller) -> float:
        """Let the known texts be stored, and return the seconds of a call without a fault.

        On a machine that is busy enough a call may time out here already: then that is over before the fault begins.
        """
        self.settle(caller, self.known)
        usual = median(self.fetch(caller, self.mixed())[1] for _ in range(3))
        self.settled(caller)
        self.settle(caller, self.known)
        return usual

    def mixed(self) -> list[str]:
        """Return texts of which some are stored; for writes none is."""
        new = self.texts(3)
        return [*self.known[:5], *new, *self.known[5:]] if self.cell.operation == "read" else new

    def reads(self, caller: Caller) -> list[float]:
        """Ask again and again while the fault lasts."""
        with self.store.fault(self.cell.fault):
            return [self.fetch(caller, self.mixed())[1] for _ in range(CALLS)]

    def writes(self, caller: Caller) -> list[float]:
        """Let the fault begin when the texts have been looked up and are about to be stored."""
        if not self.strike.twice:
            return self.struck_write(caller, CALLS - 1)
        seconds = self.struck_write(caller, 0)
        while not any(isinstance(event, Stored) for event in self.events):  # the look-up before it had timed out
            self.settled(caller)
            seconds = self.struck_write(caller, 0)
        if self.effect == "fails":  # later a probe may come when the fault has just ended
            assert not [event for event in self.events if isinstance(event, Stored) and event.stored]
        return [*seconds, *(self.struck_write(caller, 0)[0] for _ in range(1, CALLS))]

    def struck_write(self, caller: Caller, later: int) -> list[float]:
        with ExitStack() as fault:
            self.provider.happens = lambda: fault.enter_context(self.store.fault(self.cell.fault))
            seconds = [self.fetch(caller, self.mixed())[1] for _ in range(1 + later)]
            self.provider.happens = None
            return seconds

    def settled(self, caller: Caller) -> None:
        """Let both breakers close, so that every line that is still to come is there."""
        end = time.monotonic() + RESUME
        while self.open_now():
            self.fetch(caller, self.mixed())
            caller.cache.flush(RESUME)
            assert time.monotonic() < end, "a breaker stays open"
            time.sleep(0.02)
        assert caller.cache.flush(RESUME)

    def open_now(self) -> bool:
        state = {event.operation: event.state for event in self.events if isinstance(event, TierChanged)}
        return "open" in state.values()

    # --- what was counted and said --------------------------------------------------------------

    def check_timeouts(self, struck: Sequence[Event]) -> None:
        """A fault costs one timeout; after that the breaker keeps calls away, until a probe finds an answer."""
        if self.cell.fault in ("black hole", "slow") and self.effect == "fails":
            assert self.outcome.timeouts
        changes = [event for event in struck if isinstance(event, TierChanged)]
        for operation in OPERATIONS:
            opened = sum(change.operation == operation and change.state == "open" for change in changes)
            assert self.timeouts(operation) <= opened + self.store.apart - 1, struck

    def check_counts(self, struck: Sequence[Event]) -> None:
        """An error is counted as one, under its cause; never as a hit or a miss."""
        found: Counter[str] = Counter()
        kind = KINDS[self.cell.operation]
        for event in struck:
            if isinstance(event, kind):
                for name in ("hits", "misses", "errors", "corrupt", "skipped", "stored", "dropped"):
                    found[name] += getattr(event, name, 0)
                if event.errors:
                    assert event.cause
                    self.outcome.causes.add(event.cause)
        if found["corrupt"]:
            self.outcome.causes.add("corrupt")
        assert self.outcome.causes <= self.strike.causes_of(self.cell.operation)
        if self.effect == "partly":
            return
        wrong = {name: number for name, number in found.items() if number}
        if self.effect == "fails":
            assert found["errors"] + found["corrupt"] > 0, wrong
            assert found["hits"] == found["misses"] == 0, wrong
        else:
            assert found["errors"] == found["corrupt"] == found["skipped"] == found["dropped"] == 0, wrong
        if self.effect == "serves" and self.cell.operation == "read":
            assert found["hits"] == CALLS * KNOWN, wrong

    def check_lines(self, said: Sequence[str]) -> None:
        """One line per change of state."""
        changes = [event for event in self.events if isinstance(event, TierChanged)]
        for operation in OPERATIONS:
            states = ["closed", *(change.state for change in changes if change.operation == operation)]
            assert all(one != next_ for one, next_ in pairwise(states)), states
            assert states[-1] == "closed"
            opened = [line for line in said if f"{operation}s are failing" in line]
            closed = [line for line in said if f"{operation}s work again" in line]
            assert (len(opened), len(closed)) == (states.count("open"), states.count("closed") - 1), said
        # Beside those: a node's own state, values that were refused, and one line for background writes that fail.
        rest = [line for line in said if line not in {*opened_or_closed(said)}]
        nodes = [line for line in rest if NODE.match(line)]
        for node in {NODE.match(line)[1] for line in nodes}:  # type: ignore[index]
            mine = ["answers again" in line for line in nodes if NODE.match(line)[1] == node]  # type: ignore[index]
            assert mine[0] is False, said
            assert all(one != next_ for one, next_ in pairwise(mine)), said
        rest = [line for line in rest if line not in nodes]
        assert len(rest) == len({line.partition(": ")[2][:20] for line in rest}), said


NODE = re.compile(r"(memcached \S+) (?:does not answer|answers again)")


def opened_or_closed(said: Sequence[str]) -> list[str]:
    """Return the lines that tell that a breaker has opened or closed."""
    return [line for line in said if "s are failing (" in line or "s work again" in line]


def run_cell(store: Store, cell: Cell) -> Outcome:
    """Run one cell, and return what it showed."""
    return Run(store, cell).run()
