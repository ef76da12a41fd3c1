"""The steps of the read-through plan that ask the importers for texts that no tier has."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from embedonce.errors import ProviderError, ReplayMiss, TierError
from embedonce.keys import IMPORT_PREFIX
from embedonce.vectors import Dtype, Entry, Vector, freeze, freeze_rows

from .call import Call
from .checks import round_matrix
from .flights import Claims, Flight, InFlight
from .importing import LiveImporter, SpaceOfImporter
from .ports import Port
from .routes import Route
from .tiers import LiveTier

log = logging.getLogger("embedonce")

VERIFIED_SECONDS = 30 * 86_400.0
"""Seconds for which a successful verification counts. A source may get other vectors later."""
REFUSED_SECONDS = 86_400.0
"""Seconds for which a failed verification counts."""


@dataclass(frozen=True, slots=True)
class Pending:
    """What an importer that is not verified has found for a call."""

    importer: LiveImporter
    space: SpaceOfImporter
    sample_id: object
    """Stands for the sample in the importer's records."""
    found: Mapping[str, Vector]
    sample: Sequence[str]
    """Keys of the texts that the call computes as well."""
    rest: Sequence[str]
    """Keys of the texts that are imported if the computed vectors are equal to the found ones."""


class ImportSteps:
    """Asks the importers of a chain, stores what they find, and verifies them."""

    def __init__(
        self,
        importers: Sequence[LiveImporter],
        tiers: Sequence[LiveTier],
        in_flight: InFlight,
        *,
        dtype: Dtype,
        replays: bool,
        store: Callable[[Call, Mapping[str, Entry]], Coroutine[Any, Any, None]],
        take_flights: Callable[[Call, Mapping[str, Flight]], Coroutine[Any, Any, None]],
        clock: Callable[[], float],
    ) -> None:
        self.importers = importers
        self._in_flight = in_flight
        self._dtype: Dtype = dtype
        self._replays = replays
        self._store = store
        self._take_flights = take_flights
        self._clock = clock
        self._tier = next((tier for tier in reversed(tiers) if _can_keep_records(tier)), None)
        """The tier that keeps the results of verifications."""

    async def find(self, call: Call, missing: list[str], pending: list[Pending], *, can_verify: bool) -> list[str]:
        """Import what the importers have, and return the keys that are still missing.

        What waits for a verification is added to ``pending``. The missing keys do not include the keys in its ``rest``.
        The caller computes the missing keys, and then calls :meth:`finish`. In any case, it calls :meth:`end` at last.
        Without ``can_verify``, an importer that is not verified is not asked.
        """
        answer = call.answer
        for importer in self.importers:
            if not missing:
                break
            space = importer.find_space(answer.route)
            if space is None or not await self._is_usable(call, importer, space, can_verify=can_verify):
                continue
            is_verified = space.verification != "unverified"
            dimensions = (answer.dimensions or space.dimensions) if is_verified else None
            normalized = answer.normalize_texts(missing)
            texts = {key: normalized[key] for key in missing}
            found = await importer.find(call.port, texts, answer.route, dimensions)
            if not found:
                continue
            keys = list(found)
            sample = object()
            size = 0 if is_verified else importer.begin_sample(space, sample, len(keys))
            if not is_verified and not size:
                # Other calls are computing enough texts. Do not compute these texts only because they came early.
                await importer.wait_for_samples(call.port, space)
                is_verified = space.verification == "verified"
            if is_verified:
                await self._take(call, importer, found)
                missing = answer.entries.lacking(missing)
                continue
            if not size:
                size = importer.begin_sample(space, sample, len(keys)) or len(keys)
            pending.append(Pending(importer, space, sample, found, keys[:size], keys[size:]))
            held = set(keys[size:])
            missing = [key for key in missing if key not in held]
        return missing

    async def finish(self, call: Call, pending: Sequence[Pending]) -> None:
        """Compare the computed vectors with the found ones. If they are equal, import the other vectors."""
        entries = call.answer.entries
        for one in pending:
            # A vector that another call has imported proves nothing. One that another process has computed does.
            imported = {key for _, keys in call.answer.imported for key in keys}
            pairs = {
                key: (one.found[key], entries[key].vector)
                for key in one.sample
                if key in entries and key not in imported
            }
            importer, space = one.importer, one.space
            is_clear = bool(pairs) and importer.compare(space, pairs)
            importer.end_sample(space, one.sample_id)
            if pairs and (is_clear or space.verification == "unverified"):
                await self._keep_record(call, importer, space)
            if space.verification == "verified":
                await self._take(call, importer, {key: one.found[key] for key in one.rest})

    def end(self, pending: Sequence[Pending]) -> None:
        """End the samples of a call, also if it has failed."""
        for one in pending:
            one.importer.end_sample(one.space, one.sample_id)

    def explain_miss(self, route: Route) -> ReplayMiss | None:
        """Return the error of a text that no tier has, if an importer could not be asked in replay mode; else None."""
        spaces = {one.name: one.find_space(route) for one in self.importers}
        names = [name for name, space in spaces.items() if space is not None and space.verification == "unverified"]
        if not names:
            return None
        return ReplayMiss(
            f'a text is in no tier, and mode = "replay" computes nothing. The importer {names[0]!r} was not asked, '
            "because it is not verified, and a verification computes some texts; use the cache once with "
            'mode = "read-through", or set verify = 0 in [[imports]] if you trust the source'
        )

    # --- importing ----------------------------------------------------------------------------

    async def _take(self, call: Call, importer: LiveImporter, found: Mapping[str, Vector]) -> None:
        """Add found vectors to the answer, and store them in the tiers.

        A key for which another call has an entry already gets that entry. A key that another call is computing is left
        out, so that both calls return the same vector.
        """
        answer = call.answer
        rounded = self._round(importer, found, answer.route)
        if not rounded:
            return
        claims = Claims()
        created = self._clock()
        try:
            # The call claims its other keys later. Until then, the flights of other calls must stay readable.
            self._in_flight.claim(call.ticket, list(rounded), call.port.loop, claims, has_more=True)
            # In replay mode nothing is computed, so another call that has a key imports it too.
            taken: Collection[str] = [*claims.led, *claims.followed] if self._replays else claims.led
            entries = {
                key: Entry(rounded[key], created, metadata=answer.metadata.get(key), dtype=self._dtype) for key in taken
            }
            answer.entries.add(entries)
            answer.imported.append((importer.name, list(entries)))
            importer.count_imported(len(entries))
            if answer.store:
                await self._store(call, entries)
            for flight in claims.led.values():
                flight.importer = importer.name
            self._in_flight.land(claims.led, {key: entries[key] for key in claims.led}, stored=answer.store)
        except BaseException:
            self._in_flight.abandon({key: flight for key, flight in claims.led.items() if flight.entry is None})
            raise
        await self._take_flights(call, claims.landed)

    def _round(self, importer: LiveImporter, found: Mapping[str, Vector], route: Route) -> dict[str, Vector]:
        """Return the vectors, rounded to the cache's dtype, that fit the dimensions of the space."""
        fitting = {key: row for key, row in found.items() if route.settle_dimensions(row.size) == row.size}
        importer.count_invalid(len(found) - len(fitting))
        if not fitting:
            return {}
        try:
            return dict(zip(fitting, self._round_rows(list(fitting.values())), strict=True))
        except ProviderError:
            pass  # find the rows that cannot be rounded
        rounded: dict[str, Vector] = {}
        for key, row in fitting.items():
            try:
                rounded[key] = self._round_rows([row])[0]
            except ProviderError:
                importer.count_invalid(1)
        return rounded

    def _round_rows(self, rows: Sequence[Vector]) -> list[Vector]:
        return freeze_rows(round_matrix(np.stack(rows), self._dtype, "it has"))

    # --- the results of verifications ---------------------------------------------------------

    async def _is_usable(self, call: Call, importer: LiveImporter, space: SpaceOfImporter, *, can_verify: bool) -> bool:
        if space.verification == "unverified" and not space.has_read_record:
            await self._read_record(call.port, importer, space, call.answer.route)
        if space.verification == "unverified":
            return can_verify and not self._replays
        return space.verification != "refused"

    async def _read_record(self, port: Port, importer: LiveImporter, space: SpaceOfImporter, route: Route) -> None:
        """Take over the result of a verification that this or another process has made."""
        tier = self._tier
        if tier is None or tier.reader.breaker.is_open:
            return
        key = _make_key(importer, route)
        try:
            values = await tier.peek(port, [key])
            entry = tier.decode(values, dtype="int8", dimensions=None).entries.get(key)
        except TierError:
            return  # the importer is verified again
        space.has_read_record = True
        record = None if entry is None else entry.metadata
        if not isinstance(record, dict):
            return
        is_equal, compared, dimensions = (record.get(name) for name in ("equal", "compared", "dimensions"))
        if not isinstance(is_equal, bool) or not isinstance(compared, int) or not isinstance(dimensions, int):
            return  # another version has written it
        importer.take_result(space, is_equal=is_equal, compared=compared, dimensions=dimensions)

    async def _keep_record(self, call: Call, importer: LiveImporter, space: SpaceOfImporter) -> None:
        tier, route = self._tier, call.answer.route
        if tier is None:
            return
        is_equal = space.verification != "refused"
        seconds = VERIFIED_SECONDS if is_equal else REFUSED_SECONDS
        now = self._clock()
        compared = importer.count_compared(space)
        metadata = {"equal": is_equal, "compared": compared, "dimensions": space.dimensions or 0}
        items = tier.codec.encode({_make_key(importer, route): Entry(freeze(()), now, now + seconds, metadata)})
        try:
            await tier.calls.call(call.port, partial(tier.backend.set_many, items, seconds))
        except Exception as error:  # noqa: BLE001  (the next process verifies the importer again)
            log.info("tier %r did not store the result of a verification (%s)", tier.name, type(error).__name__)


def _make_key(importer: LiveImporter, route: Route) -> str:
    return f"{IMPORT_PREFIX}{route.keyer.scope}.{importer.hash_source()}"


def _can_keep_records(tier: LiveTier) -> bool:
    return tier.capabilities.scope != "process" and tier.writer.mode != "none"
