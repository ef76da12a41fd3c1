"""Asks the function that the caller has passed as ``admit`` before a request is sent, and tells it what it has cost."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Collection, Sequence
from copy import copy
from typing import Any, NamedTuple

from embedonce.admission import Settle
from embedonce.vectors import Entry, Work

from .call import Call, sum_work
from .flights import calls_in_provider
from .isolation import Stop

Send = Callable[[Call, list[Entry]], Awaitable[Exception | None]]
"""Sends one request. Returns its error, or None if it worked, and adds the new entries to the list. The answer of the
call that it gets counts what only this request has wasted."""


class Admitted(NamedTuple):
    """The permission to send one request."""

    settle: Settle | None
    """The function that takes what the request has cost."""


async def ask_to_send(call: Call, texts: Sequence[str]) -> Admitted:
    """Ask ``admit`` whether texts may be sent in one request. After a refusal, the call asks no more.

    Raises:
        Stop: the texts are refused, now or earlier.
    """
    answer = call.answer
    if answer.refusal is None and answer.admit is not None:
        try:
            settle = await _call_function(call, answer.admit, texts, answer.route.space)
        except Exception as error:  # noqa: BLE001  (the error belongs to the texts, as an error of the provider does)
            answer.refusal = error
        else:
            if not _is_settle(settle):
                # It is a mistake in the program, so the call raises it, and pays for nothing more.
                message = f"admit must return a function or None, got {type(settle).__name__}"
                answer.refusal = answer.settle_error = TypeError(message)
                raise Stop(answer.refusal)
            return Admitted(settle)
    if answer.refusal is not None:
        raise Stop(answer.refusal)
    return Admitted(None)


def _is_settle(result: object) -> bool:
    """Return whether ``admit`` may return this."""
    return result is None or callable(result)


async def send_if_admitted(
    call: Call, texts: Sequence[str], send: Send, admitted: Admitted | None = None
) -> Exception | None:
    """Send one request if ``admit`` accepts its texts, or if it is ``admitted`` already. Return the request's error.

    If the request is interrupted, nobody knows what was charged, so it is not settled.

    Raises:
        Stop: the texts are refused.
        Exception: an unexpected error, after what was charged until then is settled.
    """
    if admitted is None:
        admitted = await ask_to_send(call, texts)
    own = copy(call.answer)
    own.waste = []
    made: list[Entry] = []
    error = unexpected = None
    try:
        error = await send(call._replace(answer=own), made)
    except Exception as problem:  # noqa: BLE001  (raised below)
        unexpected = problem
    call.answer.waste += own.waste
    await settle_request(call, admitted, made, own.sum_waste())
    if unexpected is not None:
        raise unexpected
    return error


async def settle_request(call: Call, admitted: Admitted, made: Collection[Entry], wasted: Work) -> None:
    """Report what a request has cost to the function that ``admit`` has returned."""
    if admitted.settle is None:
        return
    try:
        await _call_function(call, admitted.settle, sum_work(made), wasted)
    except Exception as error:  # noqa: BLE001  (raised at the end of the call, whose other requests may be paid for)
        call.answer.settle_error = error


async def _call_function(call: Call, function: Callable[..., Any], *args: object) -> Any:
    """Return the result of a function or of an async function.

    If the function uses the cache, it does not wait there for this call, as code of the provider does not.
    """
    outer_calls = calls_in_provider.get() | {call.ticket.number}
    token = calls_in_provider.set(outer_calls)
    try:
        result = function(*args)
    finally:
        calls_in_provider.reset(token)
    if not inspect.isawaitable(result):
        return result

    async def wait() -> Any:
        calls_in_provider.set(outer_calls)  # the asyncio task has its own context
        return await result

    return await call.port.run_coroutine(wait, None)
