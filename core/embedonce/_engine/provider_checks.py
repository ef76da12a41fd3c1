"""Proves that a provider can be called: with its own ``check``, and by embedding one harmless text."""

from __future__ import annotations

import time
from typing import Any

from embedonce.answers import ProviderCheck
from embedonce.contracts import Embedded
from embedonce.vectors import Dtype

from .call import Answer, Call
from .checks import check_matrix, round_matrix
from .flights import InFlight
from .ports import Port
from .provider_calls import call_provider
from .routes import Route
from .served import read_served_model

TEXT = "embedonce check"
"""The text that is embedded to check a provider. It never belongs to a user, and its vector is not stored."""

MAX_DETAIL = 500
"""Maximum number of characters of an error's message that are kept."""


async def check_provider(port: Port, route: Route, in_flight: InFlight, *, dtype: Dtype, embed: bool) -> ProviderCheck:
    """Return whether a provider can be called. With ``embed``, embed one text; nothing is stored or counted."""
    start = time.perf_counter()
    name = route.source.name
    vectors: Any = None
    reply: Any = None
    try:
        await _call_own_check(port, route)
        if embed:
            with in_flight.new_ticket() as ticket:
                reply = await call_provider(Call(port, ticket, Answer(route, [], [], store=False)), [TEXT])
            who = f"provider {name!r} returned"
            vectors = round_matrix(check_matrix(reply, 1, dimensions=route.dimensions, who=who), dtype, who)
    except Exception as error:  # noqa: BLE001  (a provider may raise anything)
        return ProviderCheck(name, False, time.perf_counter() - start, detail=_describe(error))
    model = read_served_model(reply) if isinstance(reply, Embedded) else None
    dimensions = None if vectors is None else int(vectors.shape[1])
    return ProviderCheck(name, True, time.perf_counter() - start, dimensions, model)


async def _call_own_check(port: Port, route: Route) -> None:
    source = route.source
    check = getattr(source.provider, "check", None)
    if callable(check):
        await port.call(check, source.provider.limits.timeout, source.workers, inline=False, quick=False)


def _describe(error: Exception) -> str:
    """Return an error on one line, with its type unless the error is about the configuration."""
    said = " ".join(str(error).split())[:MAX_DETAIL]
    return said if isinstance(error, ValueError) and said else ": ".join(filter(None, (type(error).__name__, said)))
