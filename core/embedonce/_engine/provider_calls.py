"""Cuts texts into chunks that a provider accepts, and calls the provider within its timeout and its limits."""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from typing import Any, TypeVar

import numpy as np

from embedonce._messages import format_count
from embedonce.contracts import AnyProvider, Embedded, LostRequests, lost_requests
from embedonce.errors import LoopBusy, ProviderError, ProviderTimeout
from embedonce.vectors import MAX_TOKENS, Work, apportion

from .batch_sizes import count_bytes
from .call import Call
from .flights import calls_in_provider
from .ports import Port
from .rate import MAX_PAUSE, guess_backoff, guess_pause
from .refusals import find_cause, is_final, is_server_failure, is_timeout, may_be_charged, read_wait
from .routes import LiveProvider

T = TypeVar("T")

log = logging.getLogger("embedonce")

PROVIDER_GRACES = 2
"""How often a call gets its timeout again because the event loop was blocked. Giving a call up costs a paid answer."""


def read_tokens(reply: Any, count: int) -> int | list[int | None] | None:
    """Return the tokens that a provider reports for its answer: one number, one number per text, or None.

    An invalid number counts as unknown. A list of numbers must have ``count`` items; otherwise all of them are unknown.
    """
    tokens: Any = reply.tokens if isinstance(reply, Embedded) else None
    is_array = isinstance(tokens, np.ndarray) and tokens.ndim > 0
    if is_array or (isinstance(tokens, Sequence) and not isinstance(tokens, str | bytes)):
        return list(map(_read_number, tokens)) if len(tokens) == count else None
    return _read_number(tokens)


def _read_number(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    try:
        number = operator.index(value)
    except Exception:  # noqa: BLE001  (the vectors are paid, so an invalid number must not lose them)
        return None
    return number if 0 <= number <= MAX_TOKENS else None


def sum_tokens(tokens: int | list[int | None] | None, made: Sequence[int]) -> tuple[int | None, int]:
    """Return the sum of an answer's tokens, and how many of the texts that were ``made`` have an unknown number."""
    if not isinstance(tokens, list):
        return tokens, len(made) if tokens is None else 0
    known = [number for number in tokens if number is not None]
    return sum(known) if known else None, sum(tokens[i] is None for i in made)


def split_costs(
    tokens: int | list[int | None] | None, seconds: float, texts: Sequence[str]
) -> tuple[Sequence[int | None], Sequence[float]]:
    """Return the tokens and the seconds of each text of a call.

    The seconds, and a number of tokens for the whole call, are apportioned by the length of the texts in UTF-8.
    """
    if not texts:
        return [], []
    # Joining the texts tells in one step whether each of them has one byte per character.
    weights = list(map(len if "".join(texts).isascii() else count_bytes, texts))
    if not any(weights):
        weights = [1] * len(texts)
    pace = seconds / sum(weights)
    own_seconds = [pace * weight for weight in weights]
    if tokens is None:
        return [None] * len(texts), own_seconds
    return apportion(tokens, weights) if isinstance(tokens, int) else tokens, own_seconds


def measure_waste(
    texts: Sequence[str],
    made: Sequence[int],
    tokens: int | list[int | None] | None,
    failure: Exception | None,
    lost: int,
    *,
    is_answered: bool,
) -> list[Work]:
    """Return the work of a call that may be charged and gave no vector: one item per text, or nothing.

    ``made`` has the positions of the texts that got a vector, ``tokens`` are those of the answer, ``failure`` is the
    error of the call, and ``lost`` counts the requests whose loss the provider has noted.
    """
    count = len(texts)
    if is_answered:
        if len(made) == count and not lost:
            return []
        own, _ = split_costs(tokens, 0.0, texts)
    else:
        reported = _read_number(failure.tokens) if isinstance(failure, ProviderError) else None
        own, _ = split_costs(reported, 0.0, texts)
        is_answered = reported is not None
        is_noted = lost and failure is not None and is_timeout(failure)
        if not is_answered and not is_noted and failure is not None and may_be_charged(failure):
            lost += 1
    times = [lost] * count
    if is_answered:
        for i in set(range(count)).difference(made):
            times[i] += 1
    return [
        Work(n, (number or 0) * n, 0.0, n if number is None else 0, n) for n, number in zip(times, own, strict=True)
    ]


async def call_provider(call: Call, texts: list[str], lost: LostRequests | None = None) -> Any:
    """Call the provider: ``aembed`` on an event loop, else ``embed``. If only one of the two exists, call that one.

    ``lost`` counts the requests that the provider's client repeats because they got no answer in time.

    Raises:
        ProviderTimeout: the provider did not answer within its ``timeout``.
        ProviderError: the provider cancelled its own call.
    """
    port, number, task = call.port, call.ticket.number, call.answer.route.task
    source = call.answer.route.source
    provider = source.provider
    timeout = provider.limits.timeout
    count = len(texts)
    embed: Any = getattr(provider, "embed", None)
    aembed: Any = getattr(provider, "aembed", None)
    start = time.monotonic()

    def embed_blocking() -> Any:
        token = calls_in_provider.set(calls_in_provider.get() | {number})
        token_of_lost = lost_requests.set(lost)
        try:
            return embed(texts, task)
        finally:
            lost_requests.reset(token_of_lost)
            calls_in_provider.reset(token)

    async def embed_async() -> Any:
        # The variables need no reset, because the asyncio task has its own context.
        calls_in_provider.set(calls_in_provider.get() | {number})
        lost_requests.set(lost)
        return await aembed(texts, task)

    try:
        if aembed is not None and (port.loop is not None or embed is None):
            return await port.run_coroutine(embed_async, timeout, graces=PROVIDER_GRACES)
        return await port.call(embed_blocking, timeout, source.workers, inline=False, quick=False)
    except TimeoutError as error:
        hint = ""
        if isinstance(error, LoopBusy):
            hint = ", because other tasks blocked the event loop; run work that blocks in a thread"
        elif timeout is None or time.monotonic() - start < timeout or isinstance(error, ProviderError):
            raise  # this is the provider's own error
        raise ProviderTimeout(
            f"provider {source.name!r} did not embed {format_count(count, 'text')} within {timeout} s{hint}"
        ) from error
    except CancelledError as error:
        raise ProviderError(f"provider {source.name!r} cancelled its own call; nothing else cancelled it") from error


async def call_at_rate(
    call: Call, texts: list[str], send: Callable[[Call, list[str]], Awaitable[T]], *, repeats_failures: bool
) -> T:
    """Send texts when the provider's rate allows it.

    After a status 429, all calls of the provider pause, and the texts are sent again. With ``repeats_failures``, they
    are also sent again after a failure of the server, such as status 503.

    Raises:
        Exception: the error of ``send``, after ``max_retries`` repetitions.
    """
    source = call.answer.route.source
    retries = 0
    while True:
        if not source.rate.is_open():
            await _wait_for_turn(call.port, source, texts)
        pauses = source.rate.pauses
        try:
            answer = await send(call, texts)
        except Exception as error:
            if find_cause(error) == "rate":
                is_repeated = _pause_calls(source, error, retries)
            else:
                is_repeated = repeats_failures and is_server_failure(error)
                is_repeated = is_repeated and await pause_after_failure(call, error, retries)
            if not is_repeated:
                raise
        else:
            source.rate.note_success(pauses)
            return answer
        retries += 1


async def pause_after_failure(call: Call, error: Exception, failures: int) -> bool:
    """Wait before the next request, after ``failures`` + 1 failures of the server in a row.

    Return False, without waiting, if the provider's own client repeats such requests, or if the error asks for too long
    a pause.
    """
    seconds = read_wait(error)
    if seconds is None:
        seconds = guess_backoff(failures)
    if failures >= call.answer.route.source.provider.limits.max_retries or seconds > MAX_PAUSE:
        return False
    await call.port.sleep(seconds)
    return True


async def _wait_for_turn(port: Port, source: LiveProvider, texts: Sequence[str]) -> None:
    rate = source.rate
    turn = rate.reserve(count_sent_tokens(source.provider, texts) if rate.counts_tokens else 0)
    try:
        while (seconds := rate.time_left(turn)) > 0:
            await port.sleep(seconds)
    except BaseException:
        rate.give_back(turn)
        raise


def _pause_calls(source: LiveProvider, error: Exception, retries: int) -> bool:
    """Pause the provider's calls for as long as the error asks. Return whether the failed call is repeated."""
    is_repeated = retries < source.provider.limits.max_retries
    seconds = read_wait(error)
    if is_final(error) or (seconds is None and not is_repeated):
        return False
    if seconds is None:
        seconds = guess_pause(retries)
    if seconds > MAX_PAUSE:
        return False
    if source.rate.pause(seconds):
        source.warnings.warn(
            "rate", "provider %r is rate-limited; its calls pause for %g s", source.name, round(seconds, 1)
        )
    return is_repeated


def count_exactly(provider: AnyProvider, texts: Sequence[str], task: str) -> int | None:
    """Return the tokens of all texts as the provider's own tokenizer counts them, or None if it cannot count them."""
    count: Any = getattr(provider, "count_exact_tokens", None)
    if count is None:
        return None
    try:
        numbers = list(map(_read_number, count(list(texts), task)))
    except Exception:  # noqa: BLE001  (without a tokenizer, the tokens are estimated)
        return None
    known = [number for number in numbers if number is not None]
    return sum(known) if len(known) == len(numbers) == len(texts) else None


def count_sent_tokens(provider: AnyProvider, texts: Sequence[str]) -> float:
    """Return the tokens of all texts as the limits of the provider count them."""
    count_tokens: Any = getattr(provider, "count_tokens", None)
    return sum(_count_tokens(count_tokens, text, count_bytes(text)) for text in texts)


def _count_tokens(count_tokens: Any, text: str, unknown: float) -> float:
    """Return the tokens that a provider counts in a text, or ``unknown`` if the provider cannot count them."""
    if count_tokens is None:
        return unknown
    try:
        tokens: float = count_tokens(text)
    except Exception:  # noqa: BLE001  (an error in counting tokens must not make the whole call fail)
        return unknown
    return tokens


def find_token_limit(provider: AnyProvider) -> tuple[float, Callable[[str], float]] | None:
    """Return the most tokens of a request, and a function that counts those of a text; None if nothing limits them.

    If the provider fails to count a text, the text counts as a whole request. So if it fails, no other text fails.
    """
    limits = provider.limits
    count_tokens: Any = getattr(provider, "count_tokens", None)
    most: list[float] = [] if limits.max_tokens is None or count_tokens is None else [limits.max_tokens]
    most += [] if limits.tokens_per_minute is None else [limits.tokens_per_minute]
    if not most:
        return None
    max_tokens = min(most)
    return max_tokens, lambda text: _count_tokens(
        count_tokens, text, count_bytes(text) if count_tokens is None else max_tokens
    )


def cut_chunks(source: LiveProvider, texts: Mapping[str, str]) -> Iterator[list[str]]:
    """Yield the keys of texts in chunks that are within the provider's limits.

    The number of texts is always limited. The number of tokens is limited by ``max_tokens``, if the provider can count
    tokens, and by ``tokens_per_minute``.
    """
    max_batch = source.provider.limits.max_batch
    limit = find_token_limit(source.provider)
    if limit is None:
        keys = list(texts)
        yield from (keys[start : start + max_batch] for start in range(0, len(keys), max_batch))
        return
    max_tokens, count_tokens = limit
    chunk: list[str] = []
    tokens = 0.0
    for key, text in texts.items():
        more = count_tokens(text)
        if len(chunk) >= max_batch or (chunk and tokens + more > max_tokens):
            yield chunk
            chunk, tokens = [], 0.0
        chunk.append(key)
        tokens += more
    if chunk:
        yield chunk


def log_batch_limit(source: LiveProvider) -> None:
    """Log once that the provider accepts less in one call than its limits say, and which setting to change."""
    batches = source.batches
    if batches.is_reported:
        return
    batches.is_reported = True
    number = batches.max_texts
    if number is None:
        log.warning(
            "provider %r refuses calls with many long texts; its calls are now smaller. To avoid refused calls, lower "
            "batch_size or max_tokens in [provider] (in Python, Limits.max_batch or Limits.max_tokens)",
            source.name,
        )
    else:
        log.warning(
            "provider %r refuses large calls; its calls now have at most %s. To avoid refused calls, set "
            "batch_size = %d in [provider] (in Python, Limits(max_batch=%d))",
            source.name,
            format_count(number, "text"),
            number,
            number,
        )
