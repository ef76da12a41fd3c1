"""Reads of one text, from one tier after the other, in the caller's thread.

A chat application sends one text at a time. For one text, the objects and the coroutines of the plan take several times
as long as the call to a store, so a plain hit uses none of them. Everything else goes on in the plan, which gets what
was read so far.
"""

from __future__ import annotations

import time

from embedonce.vectors import Entry

from .call import Answer, BegunCall, Call
from .plan import Engine
from .ports import Port, run_blocking
from .reading import MISSED, ReadResult
from .routes import Route


def can_read_singly(engine: Engine) -> bool:
    """Return whether a hit needs no step of the plan, and every tier can be asked in the caller's thread."""
    return not engine.can_change_space and all(tier.calls.can_get_inline for tier in engine.tiers)


def read_one(engine: Engine, port: Port, route: Route, key: str, text: str, dimensions: int) -> Entry | BegunCall:
    """Return the entry of one text if a tier has it, else the call that the plan goes on with.

    Raises:
        TierError: a tier with ``on_error = "raise"`` failed.
    """
    read_at = time.monotonic()
    ticket = engine.in_flight.new_ticket()
    reads: list[ReadResult] = []
    hits = 0
    try:
        for tier in engine.tiers:
            found = tier.reader.read_one(key, route=route, dtype=engine.dtype, dimensions=dimensions)
            if isinstance(found, Entry):
                hits = 1
                if reads:
                    answer = Answer(route, [key], [text], True)
                    run_blocking(engine.promote(Call(port, ticket, answer), {key: found}, len(reads)))
                ticket.release()
                engine.requests.count(1, 1)
                return found
            if found is None:
                break
            reads.append(found)
            if found is not MISSED:
                break
    except BaseException:
        ticket.release()
        engine.requests.count(1, hits)
        raise
    return BegunCall(ticket, read_at, reads)
