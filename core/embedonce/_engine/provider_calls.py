"""The one way to call a provider: the face that fits the port, its timeout, and chunks of the size that it takes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from embedonce.contracts import AnyProvider, Embedded
from embedonce.errors import ProviderError, ProviderTimeout

from .call import Call
from .flights import calls_in_provider


def read_tokens(reply: Any) -> int | None:
    """Return how many tokens a provider says that its answer took; None where it does not say."""
    tokens = reply.tokens if isinstance(reply, Embedded) else None
    return tokens if isinstance(tokens, int) and tokens >= 0 else None


async def call_provider(call: Call, texts: list[str]) -> Any:
    """Call the face of the provider that fits the port best.

    Raises:
        ProviderTimeout: no answer within the provider's ``timeout``.
    """
    port, number, task = call.port, call.ticket.number, call.answer.route.task
    source = call.answer.route.source
    provider = source.provider
    timeout = provider.limits.timeout
    count = len(texts)
    embed: Any = getattr(provider, "embed", None)
    aembed: Any = getattr(provider, "aembed", None)
    start = time.monotonic()

    def block() -> Any:
        token = calls_in_provider.set(calls_in_provider.get() | {number})
        try:
            return embed(texts, task)
        finally:
            calls_in_provider.reset(token)

    async def drive() -> Any:
        calls_in_provider.set(calls_in_provider.get() | {number})  # never reset: the context is the flight's own task's
        return await aembed(texts, task)

    try:
        if aembed is not None and (port.loop is not None or embed is None):
            return await port.run_coroutine(drive, timeout)
        return await port.call(block, timeout, source.workers, inline=False, quick=False)
    except TimeoutError as error:
        if timeout is None or time.monotonic() - start < timeout or isinstance(error, ProviderError):
            raise  # the provider's own
        raise ProviderTimeout(f"the provider did not answer {count} texts within {timeout} s") from error


def _count_tokens(count_tokens: Any, text: str, max_tokens: int | None) -> int:
    if count_tokens is None or max_tokens is None:
        return 0
    try:
        tokens: int = count_tokens(text)
    except Exception:  # noqa: BLE001  (a chunk of its own: embedding it says what is wrong, for this text alone)
        return max_tokens
    return tokens


def cut_chunks(provider: AnyProvider, texts: Mapping[str, str]) -> Iterator[list[str]]:
    """Cut texts into chunks of the provider's size, by count and, where it can count them, by tokens."""
    limits = provider.limits
    count_tokens: Any = getattr(provider, "count_tokens", None) if limits.max_tokens is not None else None
    chunk: list[str] = []
    tokens = 0
    for key, text in texts.items():
        more = _count_tokens(count_tokens, text, limits.max_tokens)
        full = len(chunk) >= limits.max_batch or (
            limits.max_tokens is not None and bool(chunk) and tokens + more > limits.max_tokens
        )
        if full:
            yield chunk
            chunk, tokens = [], 0
        chunk.append(key)
        tokens += more
    if chunk:
        yield chunk
