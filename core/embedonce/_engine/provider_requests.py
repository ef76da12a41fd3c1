"""Sends a chunk of texts to the provider, checks the answers, and counts the work."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

from embedonce.contracts import LostRequests
from embedonce.errors import DriftError, ProviderError
from embedonce.events import Computed, Event
from embedonce.vectors import Dtype, Entry, Work, freeze_rows, make_entries

from . import ahead
from .admitting import Admitted, send_if_admitted
from .call import PROVIDER, Call
from .checks import check_matrix, check_rows
from .isolation import Patience, embed_chunk
from .ledger import Ledger
from .provider_calls import (
    call_at_rate,
    call_provider,
    log_batch_limit,
    measure_waste,
    pause_after_failure,
    read_tokens,
    split_costs,
    sum_tokens,
)
from .routes import Route
from .served import ServedModels, read_served_model

Take: TypeAlias = Callable[[dict[str, Entry], Mapping[str, Exception]], Awaitable[None]]
"""Takes the answer to one request: the entries by key, and the errors of the texts whose vector is invalid."""

Errors: TypeAlias = dict[str, Exception]
"""Errors of texts, by key."""


class ProviderRequests:
    """Makes entries from texts with the requests to the provider that this takes. The base class of the engine."""

    def __init__(
        self,
        *,
        served: ServedModels,
        dtype: Dtype,
        ledger: Ledger,
        emit: Callable[[Event], None],
        clock: Callable[[], float],
    ) -> None:
        self.dtype: Dtype = dtype
        self._served = served
        self._ledger = ledger
        self._emit = emit
        self._clock = clock

    async def request_chunk(
        self,
        call: Call,
        keys: list[str],
        texts: Mapping[str, str],
        take: Take,
        patience: Patience,
        admitted: Admitted | None = None,
    ) -> tuple[Errors, Errors]:
        """Send the texts of some keys in as few requests as the provider accepts, and ``take`` each answer.

        Return the errors of the texts that failed alone, and the error of the texts that were given up together.

        The function ``admit`` of the call is asked about each request, except about the first one if that is
        ``admitted`` already. If it refuses, its error is that of the texts that have neither worked nor failed.
        """
        source = call.answer.route.source
        # The parts of a larger chunk that failed are sent one by one, which repeats the request often enough.
        repeats_failures = len(keys) == 1

        async def request(keys_of_request: list[str]) -> Exception | None:
            nonlocal admitted
            first, admitted = admitted, None

            async def send(paying: Call, made: list[Entry]) -> Exception | None:
                return await self.request_once(
                    paying, keys_of_request, texts, take, made, repeats_failures=repeats_failures
                )

            if call.answer.admit is None:
                return await send(call, [])
            return await send_if_admitted(call, [texts[key] for key in keys_of_request], send, first)

        async def pause(error: Exception, failures: int) -> None:
            await pause_after_failure(call, error, failures)

        alone, together = await embed_chunk(
            keys,
            texts,
            request,
            pause=pause,
            batches=source.batches,
            patience=patience,
            is_retried=source.provider.limits.max_retries > 0,
        )
        if source.batches.has_limit:
            log_batch_limit(source)
        return alone, together

    async def request_once(
        self,
        call: Call,
        keys: list[str],
        texts: Mapping[str, str],
        take: Take,
        computed: list[Entry],
        *,
        repeats_failures: bool,
    ) -> Exception | None:
        """Send the texts of some keys in one request, and ``take`` its answer. Return its error.

        The new entries are added to ``computed`` before they are taken, because they are paid for then.
        """
        source = call.answer.route.source
        chunk = [texts[key] for key in keys]
        try:
            embed = partial(self._embed, keys=keys)
            compute = partial(call_at_rate, call, chunk, embed, repeats_failures=repeats_failures)
            entries, bad = await ahead.call_in_turn(call.port, source, source.provider.limits.concurrency, compute)
        except Exception as error:  # noqa: BLE001  (the error belongs to the texts, not to the call)
            return error
        computed += entries
        invalid = {keys[i]: problem for i, problem in bad.items()}
        made = [key for key in keys if key not in invalid] if invalid else keys
        await take(dict(zip(made, entries, strict=True)), invalid)
        return None

    async def _embed(
        self, call: Call, texts: list[str], *, keys: Sequence[str]
    ) -> tuple[list[Entry], dict[int, ProviderError]]:
        """Make one call to the provider with the texts of some keys, and check its answer.

        Return the entries of the valid vectors in order, and the errors of the other texts by position.
        """
        answer = call.answer
        route = answer.route
        source = route.source
        start = time.perf_counter()
        made: Sequence[int] = ()
        tokens: int | list[int | None] | None = None
        lost = LostRequests()
        failure: Exception | None = None
        is_answered = False
        try:
            reply = await call_provider(call, list(texts), lost)
            is_answered = True
            tokens = read_tokens(reply, len(texts))
            await self._check_served_model(call, reply)
            who = f"provider {source.name!r} returned"
            matrix, bad = check_rows(reply, len(texts), dimensions=answer.dimensions, dtype=self.dtype, who=who)
            # A concurrent call may have set different dimensions.
            if route.settle_dimensions(matrix.shape[1]) != matrix.shape[1]:
                check_matrix(matrix, len(matrix), dimensions=route.dimensions, who=who)
            made = [i for i in range(len(texts)) if i not in bad] if bad else range(len(texts))
        except Exception as error:
            failure = error
            raise
        finally:
            waste = measure_waste(texts, made, tokens, failure, lost.count, is_answered=is_answered)
            if waste:
                answer.waste += zip(keys, waste, strict=True)
            seconds = time.perf_counter() - start
            answer.spent.append((PROVIDER, seconds))
            self._count_computed(route, made, len(texts) - len(made), tokens, seconds)
        created = self._clock()
        own_tokens, own_seconds = split_costs(tokens, seconds, texts)
        if bad:
            own_tokens, own_seconds = [own_tokens[i] for i in made], [own_seconds[i] for i in made]
        return make_entries(freeze_rows(matrix), created, self.dtype, own_tokens, own_seconds), bad

    def _count_computed(
        self, route: Route, made: Sequence[int], failed: int, tokens: int | list[int | None] | None, seconds: float
    ) -> None:
        """Count a call of the provider. ``made`` has the positions of the texts that got a vector."""
        source = route.source
        tokens, unknown = sum_tokens(tokens, made)
        source.count(texts=len(made), failed=0, tokens=tokens or 0, seconds=seconds)
        self._ledger.count_computed(route.keyer.scope, source.price, Work(len(made), tokens or 0, seconds, unknown))
        self._emit(
            Computed(
                provider=source.name,
                task=route.task,
                texts=len(made),
                failed=failed,
                tokens=tokens,
                seconds=seconds,
                fallback=source.fallback,
                scope=route.keyer.scope,
                price=source.price,
            )
        )

    async def _check_served_model(self, call: Call, reply: Any) -> None:
        name = read_served_model(reply)
        if name is not None:
            error = await self._served.find_other_model(call, name)
            if error is not None:
                await self.handle_other_model(call, error)

    async def handle_other_model(self, call: Call, error: DriftError) -> None:
        """Raise ``error``, because an answer names a different model than earlier answers in the same space."""
        raise error
