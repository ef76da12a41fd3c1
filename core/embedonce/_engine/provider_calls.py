"""Cuts texts into chunks that a provider accepts, and calls the provider within its timeout."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from embedonce._messages import format_count
from embedonce.contracts import AnyProvider, Embedded
from embedonce.errors import ProviderError, ProviderTimeout

from .call import Call
from .flights import calls_in_provider


def read_tokens(reply: Any) -> int | None:
    """Return the number of tokens that a provider reports for its answer, or None if the provider reports no number."""
    tokens = reply.tokens if isinstance(reply, Embedded) else None
    return tokens if isinstance(tokens, int) and tokens >= 0 else None


async def call_provider(call: Call, texts: list[str]) -> Any:
    """Call the provider: ``aembed`` on an event loop, else ``embed``. If only one of the two exists, call that one.

    Raises:
        ProviderTimeout: the provider did not answer within its ``timeout``.
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
        try:
            return embed(texts, task)
        finally:
            calls_in_provider.reset(token)

    async def embed_async() -> Any:
        # ``calls_in_provider`` needs no reset, because the asyncio task has its own context.
        calls_in_provider.set(calls_in_provider.get() | {number})
        return await aembed(texts, task)

    try:
        if aembed is not None and (port.loop is not None or embed is None):
            return await port.run_coroutine(embed_async, timeout)
        return await port.call(embed_blocking, timeout, source.workers, inline=False, quick=False)
    except TimeoutError as error:
        if timeout is None or time.monotonic() - start < timeout or isinstance(error, ProviderError):
            raise  # this is the provider's own error
        raise ProviderTimeout(
            f"provider {source.name!r} did not embed {format_count(count, 'text')} within {timeout} s"
        ) from error


def _count_tokens(count_tokens: Any, text: str, max_tokens: int | None) -> int:
    if count_tokens is None or max_tokens is None:
        return 0
    try:
        tokens: int = count_tokens(text)
    except Exception:  # noqa: BLE001  (an error in counting tokens must not make the whole call fail)
        # This number fills a chunk, so that the text gets its own chunk. If that chunk fails, no other text fails.
        return max_tokens
    return tokens


def cut_chunks(provider: AnyProvider, texts: Mapping[str, str]) -> Iterator[list[str]]:
    """Yield the keys of texts in chunks that are within the provider's limits.

    The number of texts is always limited. The number of tokens is limited only if the provider can count tokens.
    """
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
