"""Asks the function that the caller has passed as ``admit`` before texts are computed, and tells it what they cost."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable, Sequence
from copy import copy
from typing import Any

from embedonce.admission import Settle
from embedonce.vectors import Entry

from .call import Call, sum_work
from .flights import calls_in_provider


async def compute_if_admitted(
    call: Call,
    texts: Sequence[str],
    compute: Callable[[Call], Awaitable[Iterable[Entry]]],
    refuse: Callable[[Exception], None],
) -> None:
    """Compute a chunk of texts if ``admit`` accepts them. After a refusal, all later chunks of the call are refused.

    ``compute`` gets a call whose answer counts what only this chunk has wasted, and returns the new entries. If it is
    interrupted, nobody knows what was charged, so the chunk is not settled.
    """
    answer = call.answer
    refusal = answer.refusal
    settle: Settle | None = None
    if refusal is None and answer.admit is not None:
        try:
            settle = await _call_function(call, answer.admit, texts, answer.route.space)
        except Exception as error:  # noqa: BLE001  (the error belongs to the texts, as an error of the provider does)
            refusal = answer.refusal = error
        if settle is not None and not callable(settle):
            # It is a mistake in the program, so the call raises it, and pays for nothing more.
            message = f"admit must return a function or None, got {type(settle).__name__}"
            refusal = answer.refusal = answer.settle_error = TypeError(message)
    if refusal is not None:
        refuse(refusal)
        return
    own = copy(answer)
    own.waste = []
    made = await compute(call._replace(answer=own))
    answer.waste += own.waste
    if settle is not None:
        try:
            await _call_function(call, settle, sum_work(list(made)), own.sum_waste())
        except Exception as error:  # noqa: BLE001  (raised at the end of the call, whose other chunks may be paid for)
            answer.settle_error = error


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
