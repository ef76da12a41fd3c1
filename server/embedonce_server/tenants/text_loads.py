"""Measures texts before they are sent to a provider, and cuts them into calls of the provider."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from embedonce import Cache
from embedonce.contracts import AnyProvider, Task

from .budget_file import Load


async def measure_texts(cache: Cache, texts: Sequence[str], task: Task) -> list[Load]:
    """Return the size of each text. The tokens are counted if the provider has the model's tokenizer."""
    if not hasattr(cache.provider, "count_exact_tokens"):
        return [Load(1, _count_bytes(_normalize(cache, text))) for text in texts]

    def measure() -> list[Load]:
        normalized = [_normalize(cache, text) for text in texts]
        tokens = _count_exactly(cache.provider, normalized, task)
        return [Load(1, _count_bytes(text), number) for text, number in zip(normalized, tokens, strict=True)]

    return await asyncio.to_thread(measure)  # a tokenizer takes long for many texts


def add_loads(loads: Sequence[Load]) -> Load:
    """Return the size of all texts together. Their tokens are known only if those of each text are known."""
    tokens = [load.tokens for load in loads]
    known = [number for number in tokens if number is not None]
    total = sum(known) if len(known) == len(tokens) else None
    return Load(sum(load.texts for load in loads), sum(load.bytes for load in loads), total)


def count_texts_of_call(provider: AnyProvider, texts: Sequence[str]) -> int:
    """Return how many of the texts, from the first on, the provider accepts in one call. It is at least one."""
    limits = provider.limits
    texts = texts[: limits.max_batch]
    count: Any = getattr(provider, "count_tokens", None)
    most = [limits.tokens_per_minute] if count is None else [limits.max_tokens, limits.tokens_per_minute]
    sizes = [size for size in most if size is not None]
    if not sizes:
        return len(texts)
    total = 0.0
    for i, text in enumerate(texts):
        total += _count_bytes(text) if count is None else _count_tokens(count, text)
        if i and total > min(sizes):
            return i
    return len(texts)


def _normalize(cache: Cache, text: str) -> str:
    try:
        return cache.normalize(text)
    except Exception:  # noqa: BLE001  (a plugin's step may raise anything; the text then fails in the cache, unsent)
        return text


def _count_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _count_tokens(count: Any, text: str) -> float:
    try:
        tokens: float = count(text)
    except Exception:  # noqa: BLE001  (the cache sends a text that cannot be counted alone, whatever this returns)
        return float(_count_bytes(text))
    return tokens


def _count_exactly(provider: Any, texts: list[str], task: Task) -> Sequence[int | None]:
    """Return the tokens of each text as the provider's tokenizer counts them, or None for each if it cannot."""
    unknown = [None] * len(texts)
    try:
        tokens = provider.count_exact_tokens(texts, task)
    except Exception:  # noqa: BLE001  (without a tokenizer, the tokens are estimated)
        return unknown
    if tokens is None or len(tokens) != len(texts) or not all(type(n) is int and n >= 0 for n in tokens):
        return unknown
    return tokens  # type: ignore[no-any-return]
