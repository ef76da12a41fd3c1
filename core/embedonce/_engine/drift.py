"""An engine that looks for drift before it computes: at the first miss, and then now and again.

The canaries are ordinary entries of their scope, so that ``purge``, encryption, rounding and TTL hold for them as
well. When they were last found unchanged is the date of their entries: a look that finds no drift stores the *old*
vectors again, with a new date. So a process that starts knows when the last look was, a slow drift does not creep, and
the TTL begins anew.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedonce.drift import DriftGuard
from embedonce.errors import DriftError
from embedonce.vectors import Entry

from .call import Answer, Call
from .plan import Engine, copy_error
from .ports import Port
from .routes import Route

log = logging.getLogger("embedonce")

RETRY_SECONDS = 60.0
"""Seconds until the next look after one that found drift that is refused, or that the provider's failure prevented."""

LEFT_MARK = "embedonce_drifted"
"""In the metadata of canaries: their space was left for the next generation."""

FRESH_SUFFIX = ".now"
"""Ends the keys of the canaries' new vectors in the table of flights: they are not for the tiers."""


@dataclass(slots=True)
class _SpaceState:
    """What is known of one vector space."""

    next_look: float = -np.inf
    """Unix time of the next look."""
    error: DriftError | None = None
    generation: int = 0
    """The space in which texts are embedded now."""
    is_generation_known: bool = False
    """Whether the tiers were asked for the generation."""


class SpaceLeft(DriftError):
    """Nothing is computed in this space any more: ask again in the current one."""


class DriftCheckingEngine(Engine):
    """Computes nothing before it has looked whether the provider still makes the same vectors."""

    def __init__(self, *args: Any, guard: DriftGuard, **options: Any) -> None:
        super().__init__(*args, **options)
        self._guard = guard
        self.can_change_space = guard.action == "new-space"
        self._states: dict[bytes, _SpaceState] = {}

    async def find_refusal(self, port: Port, route: Route) -> Exception | None:
        state = self._state(route)
        # A clock that was set back must not put the next look off.
        waits = state.next_look - max(self._guard.every, RETRY_SECONDS) <= self._clock() < state.next_look
        if route.generation == state.generation and not waits:
            await self._look_for_drift(port, route, state)
        if route.generation != state.generation:
            return SpaceLeft("the provider has drifted, and this space was left")
        return None if state.error is None else copy_error(state.error)

    async def find_current_route(self, port: Port, route: Route) -> Route:
        if not self.can_change_space:
            return route
        state = self._state(route)
        if not state.is_generation_known:
            state.is_generation_known = await self._find_generation(
                port, route.with_generation(state.generation), state
            )
        return route if route.generation == state.generation else route.with_generation(state.generation)

    def _state(self, route: Route) -> _SpaceState:
        return self._states.setdefault(route.origin, _SpaceState())

    async def _find_generation(self, port: Port, route: Route, state: _SpaceState) -> bool:
        """Follow the marks that were left in spaces that have drifted. Return whether every tier answered."""
        while True:
            stored = self._new_canary_answer(route)
            with self.in_flight.new_ticket() as ticket:
                await self._read_tiers(Call(port, ticket, stored), stored.keys)
            if not _is_left(stored):
                state.generation = max(state.generation, route.generation)
                return not stored.errors
            route = route.with_generation(route.generation + 1)

    def _new_canary_answer(self, route: Route) -> Answer:
        texts = list(dict.fromkeys(map(route.keyer.normalize, self._guard.texts)))
        return Answer(route, [route.keyer.key(text) for text in texts], texts, store=True)

    async def _look_for_drift(self, port: Port, route: Route, state: _SpaceState) -> None:
        stored = self._new_canary_answer(route)
        fresh = Answer(route, [key + FRESH_SUFFIX for key in stored.keys], stored.texts, store=False)
        every, due = self._guard.every, state.next_look
        with self.in_flight.new_ticket() as ticket:
            looking = Call(port, ticket, stored)
            missing = await self._read_tiers(looking, stored.keys)
            if self.can_change_space and _is_left(stored):  # another process was first
                state.next_look, state.generation = -np.inf, route.generation + 1
                return
            now = self._clock()
            last = min((entry.created for entry in stored.entries.values()), default=-np.inf)
            if not missing and now - every < last <= now:
                state.next_look, state.error = last + every, None
                return
            if missing and stored.errors:
                state.next_look = (
                    now + RETRY_SECONDS
                )  # what a tier that is away holds is not replaced by what is made now
                return
            # Calls that look at the same time share one computation.
            await self._compute_or_follow(Call(port, ticket, fresh), fresh.keys, leases=None, is_last_try=True)
            if not fresh.entries:
                state.next_look = (
                    now + RETRY_SECONDS
                )  # the texts that are asked for will say what is wrong with the provider
                return
            if state.next_look != due or state.generation != route.generation:
                return  # a call that looked at the same time has said what was found
            new = {key.removesuffix(FRESH_SUFFIX): entry for key, entry in fresh.entries.items()}
            cosines = [_cosine(entry, new[key]) for key, entry in stored.entries.items() if key in new]
            worst = min(cosines, default=1.0)
            if 1.0 - worst <= self._guard.tolerance:
                state.next_look, state.error = now + every, None
                kept = {**new, **stored.entries}
                dated = {key: entry._replace(created=now, expires=None) for key, entry in kept.items()}
                await self.store(looking, dated)
                return
            self._handle_drift(route, state, worst, now)
            if self.can_change_space:
                marked = {
                    key: entry._replace(expires=None, metadata={LEFT_MARK: True})
                    for key, entry in stored.entries.items()
                }
                await self.store(looking, marked)

    def _handle_drift(self, route: Route, state: _SpaceState, worst: float, now: float) -> None:
        error = DriftError(
            f"provider {route.source.name!r}, model {route.space.model!r}, makes other vectors than those that are "
            f"stored: a canary's cosine with its stored vector is {worst:.4f}. Raise [key] version to leave the old "
            "vectors behind, or go back to the model that made them"
        )
        log.warning("%s", error)
        if self._guard.action == "refuse":
            state.next_look, state.error = now + RETRY_SECONDS, error
        elif self._guard.action == "warn":
            state.next_look = now + self._guard.every
        else:
            state.next_look, state.generation = -np.inf, route.generation + 1
            log.warning("a new vector space is opened: drift %d", state.generation)


def _is_left(canaries: Answer) -> bool:
    return any((entry.metadata or {}).get(LEFT_MARK) for entry in canaries.entries.values())


def _cosine(one: Entry, other: Entry) -> float:
    first, second = (np.asarray(entry.vector, np.float64) for entry in (one, other))
    if first.shape != second.shape:
        return 0.0  # nothing in common
    return float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second)))
