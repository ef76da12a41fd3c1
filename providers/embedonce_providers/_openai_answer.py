"""Read the answer of an OpenAI-compatible endpoint.

Each answer is checked strictly, because the cache would store a misplaced vector for the wrong text.
"""

from __future__ import annotations

import binascii
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedonce import Embedded, ProviderError
from embedonce.answer_order import order_by_index

TOO_LONG = re.compile(
    r"context length|input length|sequence length|token limit|maximum number of tokens|max(?:imum)? (?:input )?tokens"
    r"|too (?:long|many tokens)|must have less than|exceed\w* .*(?:tokens|length|context)|max_tokens_per_request",
    re.IGNORECASE | re.DOTALL,
)
"""Phrases that OpenAI, Azure, vLLM, TEI and others use in an error about a text that is too long."""

TOO_LONG_STATUS = (400, 413, 422)

POSITION = re.compile(r"\binputs?\[(\d+)\]")


def read_answer(content: bytes, texts: int) -> Embedded:
    """Return an answer's vectors and number of tokens. The vectors are sorted by ``index``, so they match the texts.

    Raises:
        ProviderError: the answer is invalid, or the indexes in it are not exactly the numbers from 0 to ``texts`` - 1.
    """
    try:
        answer = json.loads(content)
    except ValueError:
        raise ProviderError("the endpoint's answer is not JSON; check base_url") from None
    data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(data, list):
        what = "an error" if isinstance(answer, dict) and answer.get("error") else "no list of vectors"
        raise ProviderError(f"the endpoint's answer has status 200 but contains {what}; nothing was stored")
    items = [item if isinstance(item, dict) else {} for item in data]
    order = order_by_index([item.get("index") for item in items], texts)
    vectors = [_read_vector(items[position].get("embedding")) for position in order]
    return Embedded(vectors, _read_tokens(answer.get("usage")))


def _read_vector(embedding: Any) -> NDArray[Any]:
    """Return the vector of an embedding.

    The embedding is a list of numbers, or a string of little-endian float32 values in base64.
    """
    try:
        if isinstance(embedding, str):
            return np.frombuffer(binascii.a2b_base64(embedding, strict_mode=True), "<f4")
        vector = np.array(embedding)
    except ValueError:  # invalid base64, bytes that do not fill the last float32, or lists of different lengths
        vector = np.array(None)
    if vector.dtype.kind not in "fi" or vector.ndim != 1:
        raise ProviderError(
            "the endpoint returned an embedding that is neither a list of numbers nor base64; nothing was stored"
        )
    return vector


def _read_tokens(usage: Any) -> int | None:
    if not isinstance(usage, dict):
        return None
    tokens = usage.get("total_tokens", usage.get("prompt_tokens"))
    return tokens if type(tokens) is int and tokens >= 0 else None


def find_too_long(status: int, message: str, texts: Sequence[str]) -> Sequence[int] | None:
    """Return the positions of the texts that are too long according to an error message.

    The result is empty if the message does not say which texts are too long, and None if the error is not about length.
    """
    if status not in TOO_LONG_STATUS or not TOO_LONG.search(message):
        return None
    named = {int(number) for number in POSITION.findall(message)}
    return sorted(position for position in named if position < len(texts))
