"""The read-through plan, written once for the blocking and the async methods.

The plan is :meth:`Engine.fetch`, and the other methods are its steps. The steps are coroutines that wait only in the
methods of a port. The cache's blocking methods run the plan to its end without an event loop. The cache's async methods
await the plan.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from embedonce.drift import TOLERANCE
from embedonce.errors import ReplayMiss, TextRefused, TierError
from embedonce.events import Event
from embedonce.vectors import Dtype, Entries, Entry

from . import ahead
from .ahead import Gathered
from .call import Answer, BegunCall, Call, copy_error
from .coalescing import request_together
from .counters import RequestCounters
from .flights import Abandoned, Claims, Flight, InFlight, list_unlanded
from .isolation import Patience
from .leases import Leases
from .ledger import Ledger
from .ports import Port
from .provider_calls import cut_chunks
from .provider_requests import ProviderRequests
from .reading import ReadResult
from .routes import Route
from .served import ServedModels
from .tiers import LiveTier

if TYPE_CHECKING:
    from .import_steps import ImportSteps, Pending

ComputeChunk: TypeAlias = Callable[[Call, dict[str, Flight], Mapping[str, str], Patience], Coroutine[Any, Any, None]]
"""A step that computes one chunk. Its arguments: a call, some of its flights, the texts by key, the call's patience."""


class Engine(ProviderRequests):
    """Reads entries from the tiers. Computes each missing entry once, and stores it."""

    def __init__(
        self,
        tiers: Sequence[LiveTier],
        in_flight: InFlight,
        *,
        served: ServedModels,
        leases: Leases | None,
        dtype: Dtype,
        replay: bool,
        max_wait: float,
        ledger: Ledger,
        emit: Callable[[Event], None],
        clock: Callable[[], float],
    ) -> None:
        super().__init__(served=served, dtype=dtype, ledger=ledger, emit=emit, clock=clock)
        self.tiers = tiers
        self.in_flight = in_flight
        self.requests = RequestCounters()
        self.replays = replay
        self.leases = leases
        self._max_wait = max_wait
        self.imports: ImportSteps | None = None
        """The steps that ask the importers; None without importers."""

    # --- the plan -----------------------------------------------------------------------------

    async def fetch(self, port: Port, answer: Answer, *, compute: bool = True, begun: BegunCall | None = None) -> None:
        """Fill the answer from the tiers, landed flights, the importers, the provider and other calls' flights, in
        this order.

        If the provider fails in another call that computes a text, this call tries once more. If the other call is
        refused or ends early, this call goes on as if the other call had never begun.

        A call that has ``begun`` has read some tiers already.

        Raises:
            TierError: a tier with ``on_error = "raise"`` failed.
        """
        missing = answer.find_missing()
        requested = len(missing)
        is_repeat = is_last_try = False
        pending: list[Pending] = []
        try:
            while True:
                abandoned: list[str] = []
                with self.in_flight.new_ticket() if begun is None else begun.ticket as ticket:
                    call = Call(port, ticket, answer)
                    looked_up = len(missing)
                    missing = await self.read_tiers(call, missing, begun, is_repeat=is_repeat)
                    begun, is_repeat = None, True
                    answer.hits += looked_up - len(missing)
                    pending.clear()
                    if missing and compute and self.imports is not None:
                        # Entries that wait for a background write are in no tier yet.
                        await self.take_flights(call, self.in_flight.find_landed(missing))
                        missing = answer.entries.lacking(missing)
                    if missing and compute and self.imports is not None:
                        missing = await self.imports.find(call, missing, pending, can_verify=not is_last_try)
                    if missing and compute and not self.replays:
                        refusal = await self.find_refusal(port, answer.route)
                        if refusal is not None:
                            answer.failed.update(dict.fromkeys(answer.find_missing(), refusal))
                            break
                        leases = self._choose_leases(answer)
                        abandoned = await self.compute_or_follow(
                            call, missing, leases=leases, is_last_try=is_last_try, has_more=bool(pending)
                        )
                        if self.imports is not None and pending:
                            await self.imports.finish(call, pending)
                    elif missing:
                        await self.take_flights(call, self.in_flight.find_landed(missing))
                missing = answer.find_missing() if missing else missing
                if not compute or not missing:
                    break
                if self.replays:
                    answer.failed.update(dict.fromkeys(missing, self._make_replay_miss(answer.route)))
                    break
                if is_last_try and not abandoned:
                    break
                if not is_last_try and len(abandoned) < len(missing):
                    is_last_try, answer.waited = True, 0.0
            if answer.store_error is not None:
                raise answer.store_error
        finally:
            if pending and self.imports is not None:
                self.imports.end(pending)
            # For a fallback, the texts have already been counted.
            counts = (0, 0) if answer.route.source.fallback else (requested, answer.hits)
            self.requests.count(*counts)

    def _make_replay_miss(self, route: Route) -> ReplayMiss:
        miss = None if self.imports is None else self.imports.explain_miss(route)
        return miss or ReplayMiss('a text is in no tier, and mode = "replay" computes nothing')

    tolerance = TOLERANCE
    """A vector has changed if the cosine of the new and the stored vector is less than 1 minus this value."""
    can_change_space = False
    """Whether :meth:`find_current_route` may return a route to another vector space."""

    async def find_refusal(self, port: Port, route: Route) -> Exception | None:
        """Return None if missing texts can be embedded in this space, else the error that each missing text gets."""
        return None

    async def find_current_route(self, port: Port, route: Route) -> Route:
        """Return the route to the vector space in which texts are embedded now."""
        return route

    async def compute_all(self, call: Call) -> None:
        """Compute the vectors of an answer that no tier can have. Calls that do so at the same time share the work."""
        keys = call.answer.find_missing()
        while keys:
            keys = await self.compute_or_follow(call, keys, leases=None, is_last_try=True)

    async def compute_or_follow(
        self, call: Call, keys: list[str], *, leases: Leases | None, is_last_try: bool, has_more: bool = False
    ) -> list[str]:
        """Compute the vectors that no other call is computing. Then wait for the vectors that other calls compute.

        Return the keys to claim again, because the calls that were computing their vectors have ended without them.
        ``has_more``: the call will claim other keys later.
        """
        claims, loop = Claims(), call.port.loop
        try:
            self.in_flight.claim(call.ticket, keys, loop, claims, has_more=has_more)
            await self.take_flights(call, claims.landed)
            await self._compute_flights(call, claims.led, leases=leases)
            ahead.raise_if_run_has_ended()
            return await self._follow_flights(call, claims, is_last_try=is_last_try)
        except BaseException:
            self._give_up_flights(call, claims, blocking=loop is None)
            raise

    def _give_up_flights(self, call: Call, claims: Claims, *, blocking: bool) -> None:
        """Abandon the flights of a call that ends early, so that no other call waits for them.

        On an event loop, a computation that has begun continues in its own asyncio task, which lands the flights.
        """
        if blocking:
            self.in_flight.abandon(claims.led)
            call.ticket.end()
        else:
            self.in_flight.abandon({key: flight for key, flight in claims.led.items() if not flight.is_computing})

    async def put(self, port: Port, answer: Answer, entries: Mapping[str, Entry]) -> None:
        """Store the entries that no tier has, and land them as flights, so that other calls see them immediately.

        Raises:
            TierError: a tier with ``on_error = "raise"`` failed.
        """
        claims = Claims()
        with self.in_flight.new_ticket() as ticket:
            call = Call(port, ticket, answer)
            missing = await self.read_tiers(call, answer.find_missing())
            fresh = {key: entries[key] for key in missing}
            try:
                self.in_flight.claim(ticket, missing, port.loop, claims)
                for key, flight in claims.landed.items():
                    # Another call has given the tiers an entry of this key. Do not replace that entry, which may
                    # still be queued for a background write.
                    if flight.stored:
                        del fresh[key]
                # Also store entries whose vectors other calls are computing. These calls may fail or may store nothing.
                await self.store(call, fresh)
            finally:
                self.in_flight.land(claims.led, {key: entries[key] for key in claims.led}, stored=True)
        if answer.store_error is not None:
            raise answer.store_error

    # --- tiers --------------------------------------------------------------------------------

    async def read_tiers(
        self, call: Call, keys: list[str], begun: BegunCall | None = None, *, is_repeat: bool = False
    ) -> list[str]:
        """Read the keys from one tier after the other, promote found entries, and return the keys that no tier has.

        With ``is_repeat``, the tiers do not count the misses again.
        """
        answer = call.answer
        answer.read_at = time.monotonic() if begun is None else begun.read_at
        reads = () if begun is None else begun.reads
        for depth, tier in enumerate(self.tiers):
            if not keys:
                break
            read = reads[depth] if depth < len(reads) else await self._read_tier(call, tier, keys, is_repeat)
            answer.spent.append((tier.name, read.seconds))
            if read.errors:
                answer.errors[tier.name] = read.cause or "error"
            if read.failed:
                answer.failed_tiers.add(tier.name)
            if read.unknown:
                answer.failed_keys.setdefault(tier.name, set()).update(read.unknown)
            found = read.entries.list_keys()
            if found:
                answer.found.append((tier.name, found))
                if answer.store and depth:
                    await self._promote(call, read.entries, self.tiers[:depth])
                keys = read.entries.lacking(keys) if len(found) < len(keys) else []
                if answer.entries:
                    answer.entries.add(read.entries)
                else:
                    answer.entries = read.entries
        return keys

    async def promote(self, call: Call, entries: Mapping[str, Entry], depth: int) -> None:
        """Store entries of one tier in the tiers before it.

        Raises:
            TierError: a tier with ``on_error = "raise"`` failed.
        """
        await self._store_in(call, entries, self.tiers[:depth], wait_for_room=False)
        if call.answer.store_error is not None:
            raise call.answer.store_error

    async def _read_tier(self, call: Call, tier: LiveTier, keys: list[str], is_repeat: bool = False) -> ReadResult:
        answer = call.answer
        return await tier.read(
            call.port,
            keys,
            route=answer.route,
            dtype=self.dtype,
            dimensions=answer.dimensions,
            is_repeat=is_repeat,
            has_use=not answer.is_fresh,
        )

    async def _promote(self, call: Call, entries: Entries, tiers: Sequence[LiveTier]) -> None:
        await self._store_in(call, entries.as_dict(), tiers, wait_for_room=False)

    async def store(self, call: Call, entries: Mapping[str, Entry]) -> None:
        """Store entries in every tier."""
        await self._store_in(call, entries, self.tiers, wait_for_room=True)

    async def _store_in(
        self, call: Call, entries: Mapping[str, Entry], tiers: Sequence[LiveTier], *, wait_for_room: bool
    ) -> None:
        """Store entries in the tiers that have not failed in this call. If a tier raises, go on with the next tier."""
        answer = call.answer
        for tier in tiers:
            if tier.name not in answer.failed_tiers:
                failed = answer.failed_keys.get(tier.name)
                writable = entries if not failed else {k: e for k, e in entries.items() if k not in failed}
                try:
                    unstored = await tier.store(
                        call.port, call.ticket, writable, answer.preview, wait_for_room=wait_for_room
                    )
                except TierError as error:
                    answer.store_error = error
                    unstored = set(writable)
                if self.leases is not None and tier is self.leases.tier:
                    answer.unstored.update(unstored)

    # --- flights ------------------------------------------------------------------------------

    async def take_flights(self, call: Call, flights: Mapping[str, Flight]) -> None:
        """Add the entries of other calls' flights to the answer. Store the entries that those calls did not store."""
        answer = call.answer
        expected = answer.dimensions
        unstored: dict[str, Entry] = {}
        shared: list[str] = []
        for key, flight in flights.items():
            entry = flight.entry
            if entry is not None and (expected is None or entry.vector.size == expected):
                answer.entries[key] = entry
                shared.append(key)
                if flight.importer is not None:
                    answer.imported.append((flight.importer, (key,)))
                if answer.store and not flight.stored:
                    unstored[key] = entry
        answer.shared.update(shared)
        self.requests.count_shared(len(shared))
        if unstored:
            await self.store(call, unstored)

    async def _follow_flights(self, call: Call, claims: Claims, *, is_last_try: bool) -> list[str]:
        """Wait for the flights of other calls. Return the keys whose flights were abandoned.

        Begin to wait only after the flights that this call leads have landed. Otherwise two calls could wait for each
        other's flights for ever. A call that was refused does not wait, because its caller has to know soon.
        """
        answer = call.answer
        landed: dict[str, Flight] = {}
        late: dict[str, Flight] = {}
        abandoned: list[str] = []
        for key, flight in claims.followed.items():
            if answer.refusal is None:
                await self._follow_flight(call, key, flight)
            error = flight.error
            if flight.entry is not None:
                landed[key] = flight
            elif isinstance(error, TextRefused):
                answer.failed[key] = copy_error(error)
            elif answer.refusal is not None:
                answer.failed[key] = answer.refusal
            elif error is None:
                late[key] = flight
            elif isinstance(error, Abandoned):
                abandoned.append(key)
            elif is_last_try:
                answer.failed[key] = copy_error(error)
        await self.take_flights(call, landed)  # not the flights that land only now, because they count as late
        if late:
            flights = self.in_flight.take_over(call.ticket, late, call.port.loop, claims)
            await self._compute_flights(call, flights, leases=None)
        return abandoned

    async def _follow_flight(self, call: Call, key: str, flight: Flight) -> None:
        """Wait until a flight lands, fails or is abandoned, or for too long. Do not wait if waiting would deadlock."""
        port, answer = call.port, call.answer
        if flight.entry is not None or flight.error is not None or flight.would_deadlock(port.loop):
            return
        is_gone = partial(self.in_flight.is_abandoned, flight)
        start = time.monotonic()
        is_done = await port.wait(flight.get_future(), self._max_wait - answer.waited, lambda: not is_gone())
        answer.waited += time.monotonic() - start
        if not is_done and is_gone():
            self.in_flight.remove_abandoned(key, flight)
            flight.error = flight.error or Abandoned()

    async def _compute_flights(self, call: Call, flights: dict[str, Flight], *, leases: Leases | None) -> None:
        """Compute, store and land flights, chunk by chunk. On an event loop, go on even if the caller is cancelled."""
        if not flights:
            ahead.set_calls_to_begin(0)
            return
        texts = call.answer.normalize_texts(flights)
        ticket = call.ticket

        # ``done`` also runs after an interrupt and after the end of the loop, so that no other call waits for ever.
        def done() -> None:
            self.in_flight.abandon(flights)
            ticket.release()
            if leases is not None:
                leases.end(flights)

        ticket.hold()
        for flight in flights.values():
            flight.is_computing = True
        if leases is None:
            await call.port.run_shielded(partial(self._compute_chunks, call, flights, texts, self._compute_chunk), done)
        else:
            await call.port.run_shielded(partial(self._compute_with_leases, call, flights, texts, leases), done)

    async def _compute_chunks(
        self, call: Call, flights: dict[str, Flight], texts: Mapping[str, str], compute: ComputeChunk
    ) -> None:
        """Cut the flights into chunks for the provider, and compute them, several at the same time."""
        source = call.answer.route.source
        patience = Patience(len(flights))
        chunks = cut_chunks(source, {key: texts[key] for key in flights})
        jobs = [partial(compute, call, {key: flights[key] for key in chunk}, texts, patience) for chunk in chunks]
        concurrency = source.provider.limits.concurrency
        ahead.set_calls_to_begin(len(jobs))
        if len(jobs) > 1 and ahead.window_turns.get() is not None:
            call.answer.gathered = Gathered()
            concurrency *= 2  # the turns limit the calls; meanwhile, the next chunks take their leases
        try:
            await call.port.run_all([partial(ahead.run_unless_ended, job) for job in jobs], concurrency)
        finally:
            ahead.set_calls_to_begin(0)
            if call.answer.gathered is not None:
                await self._store_gathered(call, call.answer.gathered)
                call.answer.gathered = None

    # --- leases -------------------------------------------------------------------------------

    def _choose_leases(self, answer: Answer) -> Leases | None:
        """Return the leases that a call takes, or None. A call that stores nothing takes none."""
        leases = self.leases
        if leases is None or not answer.store:
            return None
        return leases if answer.route.source.provider.limits.lease or not leases.is_default else None

    async def _compute_with_leases(
        self, call: Call, flights: dict[str, Flight], texts: Mapping[str, str], leases: Leases
    ) -> None:
        """Compute the vectors whose leases we get. Then poll for the other vectors, and take over free leases."""
        answer = call.answer
        theirs: dict[str, Flight] = {}
        first = len(answer.found)
        try:
            # Each chunk takes its leases when its turn comes. So a call with many texts holds few leases, and several
            # processes that embed the same texts share the work.
            compute_free = partial(self._compute_free_texts, leases=leases, theirs=theirs)
            await self._compute_chunks(call, flights, texts, compute_free)
            if theirs:
                await self._poll(call, theirs, texts, leases)
        finally:
            answer.hits += sum(len(keys) for _, keys in answer.found[first:])

    async def _compute_free_texts(
        self,
        call: Call,
        flights: dict[str, Flight],
        texts: Mapping[str, str],
        patience: Patience,
        *,
        leases: Leases,
        theirs: dict[str, Flight],
    ) -> None:
        """Compute the vectors of a chunk whose leases we get, and add the other flights to ``theirs``."""
        ours = await self._take_leases(call, flights, leases, call.answer.read_at)
        theirs.update({key: flight for key, flight in flights.items() if key not in ours and flight.entry is None})
        if ours:
            await self._compute_leased(call, ours, texts, patience, leases=leases)

    async def _compute_leased(
        self, call: Call, flights: dict[str, Flight], texts: Mapping[str, str], patience: Patience, *, leases: Leases
    ) -> None:
        """Compute a chunk whose leases we have. Release the leases of texts that fail or are not stored."""
        await self._compute_chunk(call, flights, texts, patience)
        # Gathered entries are stored later, and their leases end then.
        ended = {key: flight for key, flight in flights.items() if flight.entry is not None or flight.error is not None}
        leases.end(ended, unstored=call.answer.unstored)

    async def _poll(self, call: Call, theirs: dict[str, Flight], texts: Mapping[str, str], leases: Leases) -> None:
        """Wait for vectors that other processes compute. Compute those whose leases become free."""
        for pause, is_last_look in leases.pauses(self._max_wait):
            if call.answer.refusal is not None:
                self._refuse_flights(call.answer, theirs, call.answer.refusal)
                return
            await call.port.sleep(pause)
            read_at = time.monotonic()
            answered = await self._read_written(call, theirs, leases.tier)
            ours = theirs = list_unlanded(theirs)
            if theirs and answered and not is_last_look:
                ours = await self._take_leases(call, theirs, leases, read_at)
            await self._compute_chunks(call, ours, texts, partial(self._compute_leased, leases=leases))
            theirs = list_unlanded({key: flight for key, flight in theirs.items() if key not in ours})
            if not theirs:
                return

    async def _take_leases(
        self, call: Call, flights: dict[str, Flight], leases: Leases, read_at: float
    ) -> dict[str, Flight]:
        """Take leases. Return the flights to compute: those whose leases we get, and those for which the tier failed.

        ``read_at`` is the time at which the tier did not have the entries.
        """
        tier = leases.tier.name
        if tier in call.answer.failed_tiers:
            return flights
        failed = call.answer.failed_keys.get(tier, set()).intersection(flights)
        taken = await leases.take(call.port, {key: flight for key, flight in flights.items() if key not in failed})
        ours = {key: flight for key, flight in flights.items() if key in taken or key in failed}
        if taken and leases.is_stale(read_at):
            await self._read_written(call, ours, leases.tier)
            leases.end({key: flight for key, flight in ours.items() if flight.entry is not None})
        return list_unlanded(ours)

    async def _read_written(self, call: Call, flights: Mapping[str, Flight], tier: LiveTier) -> bool:
        """Land the flights whose entries other processes have written by now. Return whether the tier answered."""
        answer = call.answer
        try:
            read = await tier.read(
                call.port,
                list(flights),
                route=answer.route,
                dtype=self.dtype,
                dimensions=answer.dimensions,
                is_repeat=True,
            )
        except TierError as error:
            answer.store_error = error
            answer.failed_tiers.add(tier.name)
            return False
        if read.failed:
            answer.failed_tiers.add(tier.name)
        if read.entries:
            answer.entries.add(read.entries)
            answer.found.append((tier.name, read.entries))
            await self._promote(call, read.entries, [other for other in self.tiers if other is not tier])
            self.in_flight.land({key: flights[key] for key in read.entries}, read.entries, stored=True)
        return not read.failed

    # --- the provider -------------------------------------------------------------------------

    async def _compute_chunk(
        self, call: Call, flights: dict[str, Flight], texts: Mapping[str, str], patience: Patience
    ) -> None:
        """Compute the entries of one chunk, store them, and land their flights. A text that is refused fails alone."""
        answer = call.answer

        async def take(entries: dict[str, Entry], invalid: Mapping[str, Exception]) -> None:
            answer.failed_alone.update(invalid)
            for key, error in invalid.items():
                self._fail_flights(answer, {key: flights[key]}, error)
            await self._take_entries(call, entries, flights)

        request = self.request_chunk
        if answer.route.source.coalesce is not None:
            request = partial(request_together, self, self.in_flight)
        alone, together = await request(call, list(flights), texts, take, patience)
        answer.failed_alone.update(alone)
        refused: dict[str, Flight] = {}
        for key, error in {**alone, **together}.items():
            if error is answer.refusal:
                refused[key] = flights[key]
            else:
                self._fail_flights(answer, {key: flights[key]}, error)
        if answer.refusal is not None:
            self._refuse_flights(answer, refused, answer.refusal)

    async def _take_entries(self, call: Call, entries: dict[str, Entry], flights: Mapping[str, Flight]) -> None:
        """Store the entries of one request and land their flights."""
        answer = call.answer
        answer.has_made_entries = answer.has_made_entries or bool(entries)
        for key in answer.metadata.keys() & entries.keys():
            entries[key] = entries[key]._replace(metadata=answer.metadata[key])
        answer.entries.add(entries)
        landed = {key: flights[key] for key in entries}
        gathered = answer.gathered
        if gathered is None:
            await self._store_and_land(call, entries, landed)
        elif gathered.add(entries, landed):
            await self._store_gathered(call, gathered)

    async def _store_and_land(self, call: Call, entries: Mapping[str, Entry], flights: Mapping[str, Flight]) -> None:
        try:
            if call.answer.store:
                await self.store(call, entries)
        finally:
            self.in_flight.land(flights, entries, stored=call.answer.store)

    async def _store_gathered(self, call: Call, gathered: Gathered) -> None:
        """Store what a call has computed, land the flights and end their leases, until nothing is left."""
        try:
            while (taken := gathered.take()) is not None:
                entries, flights = taken
                await self._store_and_land(call, entries, flights)
                leases = self._choose_leases(call.answer)
                if leases is not None:
                    leases.end(flights, unstored=call.answer.unstored)
        finally:
            gathered.stop()

    def _fail_flights(self, answer: Answer, flights: Mapping[str, Flight], error: Exception) -> None:
        answer.failed.update(dict.fromkeys(flights, error))
        answer.route.source.count_failed(len(flights), error)
        self.in_flight.fail(flights, error)

    def _refuse_flights(self, answer: Answer, flights: Mapping[str, Flight], error: Exception) -> None:
        """Set the error of texts that ``admit`` has refused.

        Another call may be allowed to compute the texts, so the refusal is not an error of the followers.
        """
        answer.failed.update(dict.fromkeys(flights, error))
        self.in_flight.abandon(flights)
