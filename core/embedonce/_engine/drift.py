"""An engine that checks for drift before it embeds texts: at the first miss, and then at intervals.

A check embeds the canary texts and compares their new vectors with the stored ones. The stored canary vectors are
ordinary entries of their scope, so ``purge``, encryption, rounding and TTL apply to them. A check that finds no drift
stores the *old* canary vectors again, with the date of the check. This has three effects:

- A new process can read when the last check was made.
- A slow drift is measured against the first vectors and not against the latest ones.
- The TTL of the canaries starts again.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedonce.drift import DriftGuard
from embedonce.errors import DriftError
from embedonce.vectors import Entry

from .call import Answer, Call, copy_error
from .plan import Engine
from .ports import Port
from .repeated_warnings import RepeatedWarnings
from .routes import Route

log = logging.getLogger("embedonce")

RETRY_SECONDS = 60.0
"""Seconds that must pass after a failed check before the next check. With the action ``"refuse"``, the same time must
pass after a check that found drift."""

MAX_SPACES = 1000
"""Maximum number of vector spaces whose state is remembered."""

DRIFTED_MARK = "embedonce_drifted"
"""Metadata field that marks the canaries of a drifted space.

A process that reads this mark uses the next generation of the space.
"""

FRESH_SUFFIX = ".now"
"""Suffix of the keys for flights that compute new canary vectors. No tier stores an entry under these keys."""


@dataclass(slots=True)
class _SpaceState:
    """The state of the drift checks in one vector space."""

    next_check: float = -np.inf
    """Unix time of the next check."""
    error: DriftError | None = None
    generation: int = 0
    """Current generation of the space. Missing texts are embedded in this generation."""
    is_generation_known: bool = False
    """Whether all tiers have been searched for the generation that other processes use."""


class SpaceLeft(DriftError):
    """The space of a request is no longer in use, because the provider has drifted. Retry in the current space."""


class DriftCheckingEngine(Engine):
    """An engine that, before it embeds texts in a space, checks whether the provider still returns the same vectors."""

    def __init__(self, *args: Any, guard: DriftGuard, **options: Any) -> None:
        super().__init__(*args, **options)
        self.tolerance = guard.tolerance
        self._guard = guard
        self.can_change_space = guard.action == "new-space"
        self._states: dict[tuple[bytes, str], _SpaceState] = {}
        """By fingerprint and namespace, because each namespace has canaries of its own. The oldest states are dropped:
        the tiers hold what is needed to make them again."""
        self._warnings = RepeatedWarnings()

    async def find_refusal(self, port: Port, route: Route) -> Exception | None:
        state = self._get_state(route)
        # Without the lower bound, setting the clock back would postpone the next check.
        is_early = state.next_check - max(self._guard.every, RETRY_SECONDS) <= self._clock() < state.next_check
        if route.generation == state.generation and not is_early:
            await self._check_for_drift(port, route, state)
        if route.generation != state.generation:
            return SpaceLeft("the provider has drifted; texts are now embedded in a new vector space")
        return None if state.error is None else copy_error(state.error)

    async def find_current_route(self, port: Port, route: Route) -> Route:
        if not self.can_change_space:
            return route
        state = self._get_state(route)
        if not state.is_generation_known:
            state.is_generation_known = await self._find_generation(
                port, route.with_generation(state.generation), state
            )
        return route if route.generation == state.generation else route.with_generation(state.generation)

    def _get_state(self, route: Route) -> _SpaceState:
        place = route.origin, route.policy.namespace
        state = self._states.get(place)
        if state is None:
            state = self._states.setdefault(place, _SpaceState())
            for oldest in list(self._states)[:-MAX_SPACES]:
                self._states.pop(oldest, None)
        return state

    async def _find_generation(self, port: Port, route: Route, state: _SpaceState) -> bool:
        """Find the first generation whose canaries are not marked as drifted. Return whether every tier answered."""
        while True:
            stored = self._new_canary_answer(route)
            with self.in_flight.new_ticket() as ticket:
                await self.read_tiers(Call(port, ticket, stored), stored.keys)
            if not _is_marked(stored):
                state.generation = max(state.generation, route.generation)
                return not stored.errors
            route = route.with_generation(route.generation + 1)

    def _new_canary_answer(self, route: Route) -> Answer:
        texts = list(dict.fromkeys(map(route.keyer.normalize, self._guard.texts)))
        return Answer(route, [route.keyer.key(text) for text in texts], texts, store=True)

    async def _check_for_drift(self, port: Port, route: Route, state: _SpaceState) -> None:
        stored = self._new_canary_answer(route)
        fresh = Answer(route, [key + FRESH_SUFFIX for key in stored.keys], stored.texts, store=False, is_joinable=False)
        every, due = self._guard.every, state.next_check
        with self.in_flight.new_ticket() as ticket:
            call = Call(port, ticket, stored)
            missing = await self.read_tiers(call, stored.keys)
            if self.can_change_space and _is_marked(stored):  # another process has found drift
                state.next_check, state.generation = -np.inf, route.generation + 1
                return
            now = self._clock()
            last = min((entry.created for entry in stored.entries.values()), default=-np.inf)
            if not missing and now - every < last <= now:
                state.next_check, state.error = last + every, None
                return
            if missing and stored.errors:
                # A tier that failed may hold the old canaries, which new canaries must not replace.
                state.next_check = now + RETRY_SECONDS
                return
            # Calls that check at the same time share one computation.
            await self.compute_or_follow(Call(port, ticket, fresh), fresh.keys, leases=None, is_last_try=True)
            if state.next_check != due or state.generation != route.generation:
                # Another call shared this check and has handled its result, or the answer named a different model.
                return
            if not fresh.entries:
                # The provider failed. The call that embeds the requested texts will report why.
                state.next_check = now + RETRY_SECONDS
                return
            new = {key.removesuffix(FRESH_SUFFIX): entry for key, entry in fresh.entries.items()}
            cosines = [compute_cosine(entry, new[key]) for key, entry in stored.entries.items() if key in new]
            worst = min(cosines, default=1.0)
            if 1.0 - worst <= self._guard.tolerance:
                state.next_check, state.error = now + every, None
                kept = {**new, **stored.entries}
                dated = {key: entry._replace(created=now, expires=None) for key, entry in kept.items()}
                await self.store(call, dated)
                return
            self._handle_drift(route, state, worst, now)
            if self.can_change_space:
                await self._mark_as_drifted(call)

    async def _mark_as_drifted(self, call: Call) -> None:
        """Mark the canaries that a call has read, so that other processes use the next generation of the space too."""
        marked = {
            key: entry._replace(expires=None, metadata={DRIFTED_MARK: True})
            for key, entry in call.answer.entries.items()
        }
        await self.store(call, marked)

    async def handle_other_model(self, call: Call, error: DriftError) -> None:
        """Do what the guard's action says when an answer names a different model than earlier answers.

        Raises:
            DriftError: the action is ``"refuse"``; or it is ``"new-space"``, and the texts belong in a new space.
        """
        if self._guard.action == "refuse":
            raise error
        self._warnings.warn(call.answer.route.origin.hex(), "%s", error)
        if not self.can_change_space:
            return
        route = call.answer.route
        state = self._get_state(route)
        if state.generation == route.generation:
            self._open_next_space(route, state)
            canaries = self._new_canary_answer(route)
            with self.in_flight.new_ticket() as ticket:
                reading = Call(call.port, ticket, canaries)
                await self.read_tiers(reading, canaries.keys)
                await self._mark_as_drifted(reading)
        raise SpaceLeft("the provider answers with another model; texts are now embedded in a new vector space")

    def _handle_drift(self, route: Route, state: _SpaceState, worst: float, now: float) -> None:
        error = DriftError(
            f"provider {route.source.name!r}, model {route.space.model!r}, no longer returns the vectors that are "
            f"stored: the cosine of a canary text's new and stored vector is {worst:.4f}. Change [key] version to "
            "embed all texts again, or go back to the previous model"
        )
        log.warning("%s", error)
        if self._guard.action == "refuse":
            state.next_check, state.error = now + RETRY_SECONDS, error
        elif self._guard.action == "warn":
            state.next_check = now + self._guard.every
        else:
            self._open_next_space(route, state)

    def _open_next_space(self, route: Route, state: _SpaceState) -> None:
        state.next_check, state.generation = -np.inf, route.generation + 1
        log.warning(
            "opening a new vector space, in which every text is embedded again; "
            "provider %r, model %r, has now drifted %d time(s)",
            route.source.name,
            route.space.model,
            state.generation,
        )


def _is_marked(canaries: Answer) -> bool:
    return any((entry.metadata or {}).get(DRIFTED_MARK) for entry in canaries.entries.values())


def compute_cosine(one: Entry, other: Entry) -> float:
    """Return the cosine of two entries' vectors, or 0 if their dimensions differ."""
    first, second = (np.asarray(entry.vector, np.float64) for entry in (one, other))
    if first.shape != second.shape:
        return 0.0  # the dimensions differ, so treat the vectors as unrelated
    return float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second)))
