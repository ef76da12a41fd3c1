"""Measures texts before they are sent to a provider."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from embedonce.contracts import AnyProvider, Task

from .budget_file import Load


async def measure_texts(provider: AnyProvider, texts: Sequence[str], task: Task) -> Load:
    """Return the size of normalised texts. The tokens are counted if the provider has the model's tokenizer."""
    size = sum(len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass")) for text in texts)
    tokens = None
    if hasattr(provider, "count_exact_tokens"):
        tokens = await asyncio.to_thread(_count_exactly, provider, list(texts), task)  # it takes long for many texts
    return Load(len(texts), size, tokens)


def _count_exactly(provider: Any, texts: list[str], task: Task) -> int | None:
    """Return the tokens of all texts as the provider's tokenizer counts them, or None if it cannot."""
    try:
        tokens = provider.count_exact_tokens(texts, task)
    except Exception:  # noqa: BLE001  (without a tokenizer, the tokens are estimated)
        return None
    if tokens is None or len(tokens) != len(texts) or not all(type(n) is int and n >= 0 for n in tokens):
        return None
    total: int = sum(tokens)
    return total
