"""Calls that compute their texts even if a tier has them.

The computed vectors are compared with the stored ones. A stored entry is never replaced, because an entry never
changes.
"""

from __future__ import annotations

from embedonce.errors import ReplayMiss
from embedonce.vectors import Entry

from .call import Answer, Call
from .drift import FRESH_SUFFIX, compute_cosine
from .plan import Engine
from .ports import Port


async def compute_anew(engine: Engine, port: Port, answer: Answer) -> None:
    """Compute all texts of an answer, store those that no tier has, and note those whose stored vector is different.

    Raises:
        TierError: a tier with ``on_error = "raise"`` failed.
    """
    answer.is_fresh = True
    keys = answer.find_missing()
    try:
        computed = await _compute(engine, port, answer, keys)
        answer.entries.add(computed)
        stored = Answer(
            answer.route, list(computed), [answer.texts_by_key()[key] for key in computed], store=answer.store
        )
        stored.is_fresh = True
        if answer.store and computed:
            await engine.put(port, stored, computed)
        elif computed:
            with engine.in_flight.new_ticket() as ticket:
                await engine.read_tiers(Call(port, ticket, stored), stored.keys)
        for key, entry in stored.entries.items():
            if 1.0 - compute_cosine(entry, computed[key]) > engine.tolerance:
                answer.changed.add(key)
        answer.errors.update(stored.errors)
    finally:
        if not answer.route.source.fallback:
            engine.requests.count(len(keys), 0)


async def _compute(engine: Engine, port: Port, answer: Answer, keys: list[str]) -> dict[str, Entry]:
    """Return the new entries by key, and add the errors of the other texts to the answer.

    The flights have keys of their own, so that the call does not share a computation whose result is stored already.
    """
    texts = answer.texts_by_key()
    fresh = Answer(answer.route, [key + FRESH_SUFFIX for key in keys], [texts[key] for key in keys], store=False)
    fresh.admit = answer.admit
    fresh.metadata = {key + FRESH_SUFFIX: answer.metadata[key] for key in answer.metadata.keys() & set(keys)}
    refusal: Exception | None
    if engine.replays:
        refusal = ReplayMiss('mode = "replay" computes nothing, so no vector can be computed again')
    else:
        refusal = await engine.find_refusal(port, answer.route) if keys else None
    if refusal is not None:
        answer.failed.update(dict.fromkeys(keys, refusal))
        return {}
    with engine.in_flight.new_ticket() as ticket:
        await engine.compute_all(Call(port, ticket, fresh))
    answer.waste += fresh.waste
    answer.refusal, answer.settle_error = fresh.refusal, fresh.settle_error
    answer.spent += fresh.spent
    strip = len(FRESH_SUFFIX)
    answer.failed.update({key[:-strip]: error for key, error in fresh.failed.items()})
    answer.failed_alone.update(key[:-strip] for key in fresh.failed_alone)
    answer.shared.update(key[:-strip] for key in fresh.shared)
    answer.has_made_entries = fresh.has_made_entries
    return {key[:-strip]: entry for key, entry in fresh.entries.items()}
