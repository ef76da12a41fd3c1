"""The read-through plan, once, for both faces.

Everything here is ``async`` and awaits nothing but a port, so that the blocking face can step
through it and the async face can await it. :meth:`Engine.fetch` is the plan; the rest are its steps.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedonce.answers import Fetched
from embedonce.contracts import AnyProvider, Embedded
from embedonce.errors import ProviderError, ProviderTimeout, ReplayMiss, TextRefused, TierError
from embedonce.events import Computed, Event
from embedonce.vectors import Dtype, Entries, Entry, Metadata, freeze_rows

from .checks import checked_matrix, rounded
from .flights import Abandoned, Claimed, Flight, Table, Ticket, leading
from .leases import Leases
from .ports import Port
from .routes import Route, Source
from .tiers import LiveTier

log = logging.getLogger("embedonce")

PROVIDER = "provider"

PREVIEW = 200
"""Characters of a text that a tier with ``text_preview`` keeps."""


@dataclass(slots=True)
class Answer:
    """What a call has gathered so far, by key."""

    route: Route
    keys: list[str]
    texts: Sequence[str]
    store: bool
    metadata: Mapping[str, Metadata] = field(default_factory=dict)
    entries: Entries = field(default_factory=Entries)
    found: list[tuple[str, Iterable[str]]] = field(default_factory=list)
    failed: dict[str, Exception] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    errors: dict[str, str] = field(default_factory=dict)
    failing: set[str] = field(default_factory=set)
    """Tiers that are not written to in this call, because they failed in it or are left out."""
    unknown: dict[str, set[str]] = field(default_factory=dict)
    """By tier the keys that a part of it failed for, which are not written to it."""
    refusal: TierError | None = None
    """A tier with ``on_error = "raise"`` that could not be written to."""
    _text_of: dict[str, str] | None = None

    @property
    def dimensions(self) -> int | None:
        if self.route.dimensions is None and self.entries:
            return next(iter(self.entries.sizes()))
        return self.route.dimensions

    def preview(self, key: str) -> str:
        """Return the beginning of the text of a key, as it was asked for."""
        return self.text_of()[key][:PREVIEW]

    def text_of(self) -> dict[str, str]:
        """Return the text of each key, the first one where normalisation makes several the same."""
        if self._text_of is None:
            self._text_of = dict(zip(reversed(self.keys), reversed(self.texts), strict=True))
        return self._text_of

    def missing(self) -> list[str]:
        failed = self.failed
        missing = self.entries.lacking(dict.fromkeys(self.keys))
        return [key for key in missing if key not in failed] if failed else missing

    def rows(self) -> list[Any]:
        """Return every row in order.

        Raises:
            Exception: what the first text that failed, failed with.
        """
        self._check()
        entries = self.entries.as_dict()
        return [entries[key].vector for key in self.keys]

    def matrix(self) -> NDArray[np.float32]:
        """Return every row in order, as a matrix (n, d). Raises as :meth:`rows` does."""
        self._check()
        return self.entries.matrix(self.keys, self.route.dimensions)

    def _check(self) -> None:
        if self.failed:
            for key in self.entries.lacking(self.keys):
                raise self.failed[key]

    def fetched(self) -> Fetched:
        sources = dict.fromkeys(self.entries, PROVIDER)
        for name, keys in self.found:
            sources.update(dict.fromkeys(keys, name))
        held = self.entries.as_dict()
        entries = [held.get(key) for key in self.keys]
        return Fetched(
            rows=[None if entry is None else entry.vector for entry in entries],
            sources=[sources.get(key) for key in self.keys],
            failed={i: self.failed[key] for i, key in enumerate(self.keys) if key in self.failed},
            # Copies: what is returned must not be a way to change what is cached.
            metadata=[
                None if entry is None or entry.metadata is None else deepcopy(entry.metadata) for entry in entries
            ],
            space=self.route.space,
            seconds=dict(self.seconds),
            errors=self.errors,
            dimensions=self.dimensions,
        )


class Engine:
    """Looks through the tiers, computes what is missing, once, and stores it."""

    def __init__(
        self,
        tiers: Sequence[LiveTier],
        table: Table,
        *,
        dtype: Dtype,
        replay: bool,
        max_wait: float,
        emit: Callable[[Event], None],
        clock: Callable[[], float],
    ) -> None:
        self.tiers = tiers
        self.table = table
        self.dtype: Dtype = dtype
        self.shared = 0
        self._replay = replay
        self.leases = next((Leases(tier, tier.lease) for tier in tiers if tier.lease is not None), None)
        self._max_wait = max_wait
        self._emit = emit
        self._clock = clock

    # --- the plan -----------------------------------------------------------------------------

    async def fetch(self, port: Port, answer: Answer, *, compute: bool = True) -> None:
        """Fill the answer: tiers first, then flights of others, then the provider.

        Raises:
            TierError: a tier with ``on_error = "raise"`` failed.
        """
        missing = answer.missing()
        for again in (False, True):
            with self.table.call() as ticket:
                missing = await self._look(port, ticket.number, answer, missing)
                if missing and compute and not self._replay:
                    refusal = await self.refusal(port, answer.route)
                    if refusal is not None:
                        answer.failed.update(dict.fromkeys(missing, refusal))
                        break
                    leases = self.leases if answer.store else None
                    await self._claim(port, ticket, answer, missing, leases=leases, last=again)
                elif missing:
                    await self._share(port, ticket.number, answer, self.table.landed(missing))
            missing = answer.missing() if missing else missing
            if not compute or not missing:
                break
            if self._replay:
                miss = ReplayMiss('a text is in no tier, and mode = "replay" computes nothing')
                answer.failed.update(dict.fromkeys(missing, miss))
                break
        if answer.refusal is not None:
            raise answer.refusal

    moves = False
    """Whether :meth:`current` may lead to another space."""

    async def refusal(self, port: Port, route: Route) -> Exception | None:
        """Return why nothing may be computed in this space, or None."""
        return None

    async def current(self, port: Port, route: Route) -> Route:
        """Return the route to the space in which texts are embedded now."""
        return route

    async def _claim(
        self, port: Port, ticket: Ticket, answer: Answer, keys: list[str], *, leases: Leases | None, last: bool
    ) -> None:
        """Compute the keys that nobody computes, then wait for the others."""
        claimed, blocking = Claimed(), port.loop is None
        try:
            self.table.claim(ticket.number, keys, port.loop, claimed)
            await self._share(port, ticket.number, answer, claimed.landed)
            await self._lead(port, ticket, answer, claimed.led, leases=leases)
            await self._follow_all(port, ticket, answer, claimed, last=last)
        except BaseException:
            self._let_go(ticket, claimed, blocking)
            raise

    def _let_go(self, ticket: Ticket, claimed: Claimed, blocking: bool) -> None:
        """Give up what a call leads that ends early, so that nobody waits for it.

        On an event loop a computation that has begun is a task of its own: it goes on, and looks after its flights.
        """
        if blocking:
            self.table.abandon(claimed.led)
            ticket.end()
        else:
            self.table.abandon({key: flight for key, flight in claimed.led.items() if not flight.guarded})

    async def put(self, port: Port, answer: Answer, entries: Mapping[str, Entry]) -> None:
        """Store entries that no tier has. They are readable at once, as a landed flight is.

        Raises:
            TierError: a tier with ``on_error = "raise"`` failed.
        """
        claimed = Claimed()
        with self.table.call() as ticket:
            missing = await self._look(port, ticket.number, answer, answer.missing())
            fresh = {key: entries[key] for key in missing}
            try:
                self.table.claim(ticket.number, missing, port.loop, claimed)
                for key, flight in claimed.landed.items():
                    if flight.stored:  # and not yet written: the entry that was first stays
                        del fresh[key]
                # Also what others compute at this moment: they may fail, or not store it.
                await self.store(port, ticket.number, answer, fresh)
            finally:
                self.table.land(claimed.led, {key: entries[key] for key in claimed.led}, stored=True)
        if answer.refusal is not None:
            raise answer.refusal

    # --- tiers --------------------------------------------------------------------------------

    async def _look(self, port: Port, ticket: int, answer: Answer, keys: list[str]) -> list[str]:
        """Ask tier by tier for what is still missing, and promote what is found. Return what is not."""
        for depth, tier in enumerate(self.tiers):
            if not keys:
                break
            read = await tier.read(port, keys, task=answer.route.task, dtype=self.dtype, dimensions=answer.dimensions)
            answer.seconds[tier.name] += read.seconds
            if read.errors:
                answer.errors[tier.name] = read.cause or "error"
            if read.failed:
                answer.failing.add(tier.name)
            if read.unknown:
                answer.unknown.setdefault(tier.name, set()).update(read.unknown)
            if read.entries:
                self._agree(tier, answer, read.entries)
                answer.entries.add(read.entries)
                answer.found.append((tier.name, read.entries))
                if answer.store and depth:
                    await self._promote(port, ticket, answer, read.entries, self.tiers[:depth])
                keys = read.entries.lacking(keys) if len(read.entries) < len(keys) else []
        return keys

    def _agree(self, tier: LiveTier, answer: Answer, entries: Entries) -> None:
        """Leave out entries of another dimension, where only the entries themselves can tell the right one."""
        if answer.dimensions is not None:
            return
        sizes = entries.sizes()
        if len(sizes) > 1:
            usual = sizes.most_common(1)[0][0]
            odd = [key for key, entry in entries.as_dict().items() if entry.vector.size != usual]
            for key in odd:
                del entries[key]
            tier.counters.count(corrupt=len(odd), hits=-len(odd))

    async def _promote(
        self, port: Port, ticket: int, answer: Answer, entries: Entries, tiers: Sequence[LiveTier]
    ) -> None:
        await self._give(port, ticket, answer, entries.as_dict(), tiers, patience=False)

    async def store(self, port: Port, ticket: int, answer: Answer, entries: Mapping[str, Entry]) -> None:
        """Give entries to every tier."""
        await self._give(port, ticket, answer, entries, self.tiers, patience=True)

    async def _give(
        self,
        port: Port,
        ticket: int,
        answer: Answer,
        entries: Mapping[str, Entry],
        tiers: Sequence[LiveTier],
        *,
        patience: bool,
    ) -> None:
        """Give entries to the tiers that have not failed in this call; a raising tier does not stop the others."""
        for tier in tiers:
            if tier.name not in answer.failing:
                unknown = answer.unknown.get(tier.name)
                known = entries if not unknown else {k: e for k, e in entries.items() if k not in unknown}
                try:
                    await tier.store(port, ticket, known, answer.preview, patience=patience)
                except TierError as error:
                    answer.refusal = error

    # --- flights ------------------------------------------------------------------------------

    async def _share(self, port: Port, ticket: int, answer: Answer, flights: Mapping[str, Flight]) -> None:
        """Take what other calls' flights have brought, and store what they did not."""
        expected = answer.dimensions
        unstored: dict[str, Entry] = {}
        for key, flight in flights.items():
            entry = flight.entry
            if entry is not None and (expected is None or entry.vector.size == expected):
                answer.entries[key] = entry
                self.shared += 1
                if answer.store and not flight.stored:
                    unstored[key] = entry
        if unstored:
            await self.store(port, ticket, answer, unstored)

    async def _follow_all(self, port: Port, ticket: Ticket, answer: Answer, claimed: Claimed, *, last: bool) -> None:
        """Wait for the flights of others; only now, with everything that we claimed landed."""
        end = time.monotonic() + self._max_wait
        alone: list[str] = []
        for key, flight in claimed.followed.items():
            await self._follow(port, key, flight, end)
            error = flight.error
            if flight.entry is not None:
                continue
            if error is None or (last and isinstance(error, Abandoned)):
                alone.append(key)
            elif isinstance(error, TextRefused) or (last and isinstance(error, Exception)):
                answer.failed[key] = own_error(error)
        await self._share(port, ticket.number, answer, claimed.followed)
        if alone:
            flights = {key: Flight(ticket.number, port.loop) for key in alone}
            await self._lead(port, ticket, answer, flights, leases=None)

    async def _follow(self, port: Port, key: str, flight: Flight, end: float) -> None:
        """Wait until a flight has landed or failed, its leader is gone, or waiting makes no sense."""
        if flight.entry is not None or flight.error is not None or flight.waits_for_us(port.loop):
            return
        gone = partial(self.table.abandoned, flight)
        if not await port.wait(flight.landed(), end - time.monotonic(), lambda: not gone()) and gone():
            self.table.disown(key, flight)
            flight.error = flight.error or Abandoned()

    async def _lead(
        self, port: Port, ticket: Ticket, answer: Answer, flights: dict[str, Flight], *, leases: Leases | None
    ) -> None:
        """Compute, store and land flights, chunk by chunk, even when the caller is cancelled meanwhile."""
        if not flights:
            return
        texts = self._normalized(answer, flights)

        def done() -> None:  # also when interrupted, or the loop ended: whoever follows must not wait for us
            self.table.abandon(flights)
            ticket.release()

        ticket.hold()
        for flight in flights.values():
            flight.guarded = True
        number = ticket.number
        if leases is None:
            await port.shielded(partial(self._compute, port, number, answer, flights, texts), done)
        else:
            await port.shielded(partial(self._compute_leased, port, number, answer, flights, texts, leases), done)

    async def _compute(
        self, port: Port, ticket: int, answer: Answer, flights: dict[str, Flight], texts: Mapping[str, str]
    ) -> None:
        provider = answer.route.source.provider
        jobs = [
            partial(self._chunk, port, ticket, answer, {key: flights[key] for key in chunk}, texts)
            for chunk in _chunks(provider, {key: texts[key] for key in flights})
        ]
        await port.each(jobs, provider.limits.concurrency)

    async def _compute_leased(
        self,
        port: Port,
        ticket: int,
        answer: Answer,
        flights: dict[str, Flight],
        texts: Mapping[str, str],
        leases: Leases,
    ) -> None:
        """Compute what no other process computes, then wait for what others do; lead where a leader has died."""
        ours = await self._ours(port, answer, list(flights), leases)
        await self._compute(port, ticket, answer, {key: flights[key] for key in flights if key in ours}, texts)
        theirs = {key: flight for key, flight in flights.items() if key not in ours}
        if not theirs:
            return
        for pause, last in leases.pauses(self._max_wait):
            await port.sleep(pause)
            answered = await self._take_written(port, ticket, answer, theirs, leases.tier)
            theirs = {key: flight for key, flight in theirs.items() if key not in answer.entries}
            if theirs:
                ours = await self._ours(port, answer, list(theirs), leases) if answered and not last else set(theirs)
                await self._compute(port, ticket, answer, {key: theirs[key] for key in theirs if key in ours}, texts)
                theirs = {key: flight for key, flight in theirs.items() if key not in ours}
            if not theirs:
                return

    async def _ours(self, port: Port, answer: Answer, keys: Sequence[str], leases: Leases) -> set[str]:
        """Return the keys that are ours to compute; of a tier that has failed in this call nobody asks for a lease."""
        tier = leases.tier.name
        if tier in answer.failing:
            return set(keys)
        unknown = answer.unknown.get(tier, set()).intersection(keys)
        return unknown | await leases.take(port, [key for key in keys if key not in unknown])

    async def _take_written(
        self, port: Port, ticket: int, answer: Answer, flights: Mapping[str, Flight], tier: LiveTier
    ) -> bool:
        """Land what another process has written meanwhile. Return whether the tier answered."""
        try:
            read = await tier.read(
                port, list(flights), task=answer.route.task, dtype=self.dtype, dimensions=answer.dimensions, again=True
            )
        except TierError as error:
            answer.refusal = error
            answer.failing.add(tier.name)
            return False
        if read.failed:
            answer.failing.add(tier.name)
        if read.entries:
            self._agree(tier, answer, read.entries)
            answer.entries.add(read.entries)
            answer.found.append((tier.name, read.entries))
            await self._promote(
                port, ticket, answer, read.entries, [other for other in self.tiers if other is not tier]
            )
            self.table.land({key: flights[key] for key in read.entries}, read.entries, stored=True)
        return not read.failed

    def _normalized(self, answer: Answer, keys: Iterable[str]) -> dict[str, str]:
        normalize = answer.route.keyer.normalize
        texts = answer.text_of()
        return {key: normalize(texts[key]) for key in keys}

    # --- the provider -------------------------------------------------------------------------

    async def _chunk(
        self, port: Port, ticket: int, answer: Answer, flights: dict[str, Flight], texts: Mapping[str, str]
    ) -> None:
        """Compute one chunk, store it and land it."""
        entries = await self._ask(port, ticket, answer, texts, flights)
        if not entries:
            return
        answer.entries.add(entries)
        landed = {key: flights[key] for key in entries}
        try:
            if answer.store:
                await self.store(port, ticket, answer, entries)
        finally:
            self.table.land(landed, entries, stored=answer.store)

    async def _ask(
        self, port: Port, ticket: int, answer: Answer, texts: Mapping[str, str], flights: Mapping[str, Flight]
    ) -> dict[str, Entry]:
        """Ask the provider; a text that it refuses fails alone. Return the entries of the others."""
        entries: dict[str, Entry] = {}
        todo = [list(flights)]
        while todo:
            part = todo.pop()
            try:
                made = await self._embed(port, ticket, answer, [texts[key] for key in part])
            except TextRefused as error:
                refused = {part[i] for i in error.positions if type(i) is int and 0 <= i < len(part)}
                if not refused and len(part) > 1:
                    todo += [part[len(part) // 2 :], part[: len(part) // 2]]
                    continue
                refused = refused or set(part)
                rest = [key for key in part if key not in refused]
                if rest:
                    todo.append(rest)
                self._fail(answer, {key: flights[key] for key in refused}, error)
            except Exception as error:  # noqa: BLE001  (whatever a provider raises reaches the caller, by position)
                self._fail(answer, {key: flights[key] for key in part}, error)
            else:
                for key, entry in zip(part, made, strict=True):
                    metadata = answer.metadata.get(key)
                    entries[key] = entry if metadata is None else entry._replace(metadata=metadata)
        return entries

    def _fail(self, answer: Answer, flights: Mapping[str, Flight], error: Exception) -> None:
        answer.failed.update(dict.fromkeys(flights, error))
        source = answer.route.source
        source.count(texts=0, failed=len(flights), tokens=0, seconds=0.0)
        self.table.fail(flights, error)

    async def _embed(self, port: Port, ticket: int, answer: Answer, texts: list[str]) -> list[Entry]:
        """Make one call to the provider and check its answer."""
        route = answer.route
        source = route.source
        start = time.perf_counter()
        made = 0
        tokens: int | None = None
        try:
            reply = await _call_provider(port, ticket, source, list(texts), route.task)
            tokens = _tokens(reply)
            who = f"provider {source.name!r} returned"
            matrix = checked_matrix(reply, len(texts), dimensions=answer.dimensions, who=who)
            matrix = rounded(matrix, self.dtype, who)
            if route.settle(matrix.shape[1]) != matrix.shape[1]:  # another chunk or call was first, just now
                checked_matrix(matrix, len(texts), dimensions=route.dimensions, who=who)
            made = len(texts)
        finally:
            seconds = time.perf_counter() - start
            answer.seconds[PROVIDER] += seconds
            source.count(texts=made, failed=0, tokens=tokens or 0, seconds=seconds)
            self._emit(
                Computed(
                    provider=source.name,
                    task=route.task,
                    texts=made,
                    failed=len(texts) - made,
                    tokens=tokens,
                    seconds=seconds,
                    fallback=source.fallback,
                )
            )
        created = self._clock()
        return [Entry(row, created, None, None, self.dtype) for row in freeze_rows(matrix)]


def _tokens(reply: Any) -> int | None:
    tokens = reply.tokens if isinstance(reply, Embedded) else None
    return tokens if isinstance(tokens, int) and tokens >= 0 else None


def own_error(error: Exception) -> Exception:
    """Return an exception of its own for each caller: one that many raise gathers all their tracebacks."""
    try:
        own = copy(error)
    except Exception:  # noqa: BLE001  (an exception whose class takes other arguments than it keeps)
        return error
    return own if type(own) is type(error) else error


async def _call_provider(port: Port, ticket: int, source: Source, texts: list[str], task: str) -> Any:
    """Call the face of the provider that fits the port best.

    Raises:
        ProviderTimeout: no answer within the provider's ``timeout``.
    """
    provider = source.provider
    timeout = provider.limits.timeout
    count = len(texts)
    embed: Any = getattr(provider, "embed", None)
    aembed: Any = getattr(provider, "aembed", None)
    start = time.monotonic()

    def call() -> Any:
        token = leading.set(leading.get() | {ticket})
        try:
            return embed(texts, task)
        finally:
            leading.reset(token)

    async def drive() -> Any:
        leading.set(leading.get() | {ticket})  # never reset: the context is the flight's own task's
        return await aembed(texts, task)

    try:
        if aembed is not None and (port.loop is not None or embed is None):
            return await port.drive(drive, timeout)
        return await port.call(call, timeout, source.workers, inline=False, quick=False)
    except TimeoutError as error:
        if timeout is None or time.monotonic() - start < timeout or isinstance(error, ProviderError):
            raise  # the provider's own
        raise ProviderTimeout(f"the provider did not answer {count} texts within {timeout} s") from error


def _counted(count_tokens: Any, text: str, most: int | None) -> int:
    if count_tokens is None or most is None:
        return 0
    try:
        tokens: int = count_tokens(text)
    except Exception:  # noqa: BLE001  (a chunk of its own: embedding it says what is wrong, for this text alone)
        return most
    return tokens


def _chunks(provider: AnyProvider, texts: Mapping[str, str]) -> Iterator[list[str]]:
    """Cut texts into chunks of the provider's size, by count and, where it can count them, by tokens."""
    limits = provider.limits
    count_tokens: Any = getattr(provider, "count_tokens", None) if limits.max_tokens is not None else None
    chunk: list[str] = []
    tokens = 0
    for key, text in texts.items():
        more = _counted(count_tokens, text, limits.max_tokens)
        full = len(chunk) >= limits.max_batch or (
            limits.max_tokens is not None and bool(chunk) and tokens + more > limits.max_tokens
        )
        if full:
            yield chunk
            chunk, tokens = [], 0
        chunk.append(key)
        tokens += more
    if chunk:
        yield chunk
