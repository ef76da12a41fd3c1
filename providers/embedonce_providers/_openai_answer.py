"""Read the answer of an OpenAI-compatible endpoint.

Each answer is checked strictly, because the cache would store a misplaced vector for the wrong text.
"""

from __future__ import annotations

import binascii
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedonce import Embedded, ProviderError
from embedonce.answer_order import order_by_index
from embedonce.errors import ErrorInAnswer

from ._reasons import describe_reason

TOO_LONG = re.compile(
    r"context length|input length|sequence length|token limit|maximum number of tokens|max(?:imum)? (?:input )?tokens"
    r"|too (?:long|many tokens)|must have less than|exceed\w* .*(?:tokens|length|context)|max_tokens_per_request",
    re.IGNORECASE | re.DOTALL,
)
"""Phrases that OpenAI, Azure, vLLM, TEI and others use in an error about a text that is too long."""

TOO_LONG_STATUS = (400, 413, 422)

POSITION = re.compile(r"\binputs?\[(\d+)\]")


def read_answer(content: bytes, texts: Sequence[str], secrets: Iterable[str | None] = ()) -> Embedded:
    """Return an answer's vectors in the order of the texts, its number of tokens, and the model that it names.

    A text has None in place of a vector if the endpoint returned null or an embedding that cannot be read.

    Raises:
        ErrorInAnswer: the answer is an error, or has no vectors.
        ProviderError: the answer is invalid, does not have one vector for each text, does not show which vector belongs
            to which text, or has no embedding that can be read. The message contains no text and none of the
            ``secrets``.
    """
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        raise ProviderError("the endpoint's answer is not JSON; check base_url") from None
    data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(data, list) or (texts and not data):
        what = "an error" if isinstance(answer, dict) and answer.get("error") else "no vectors"
        reason = describe_reason(answer, texts=texts, secrets=secrets)
        raise ErrorInAnswer(
            f"the endpoint's answer has status 200 but contains {what}; nothing was stored{reason}", _read_code(answer)
        )
    items = [item if isinstance(item, dict) else {} for item in data]
    tokens = _read_tokens(answer.get("usage"))
    try:
        order = order_by_index([item.get("index") for item in items], len(texts))
        vectors = [_read_vector(items[position].get("embedding")) for position in order]
        if texts and all(vector is None for vector in vectors):
            raise ProviderError(
                "the endpoint returned only embeddings that are neither lists of numbers nor base64; nothing was stored"
            )
    except ProviderError as error:
        error.tokens = tokens
        raise
    model = answer.get("model")
    return Embedded(vectors, tokens, model if isinstance(model, str) and model else None)


def _read_vector(embedding: Any) -> NDArray[Any] | None:
    """Return the vector of an embedding, or None if the embedding cannot be read.

    The embedding is a list of numbers, or a string of little-endian float32 values in base64.
    """
    try:
        if isinstance(embedding, str):
            return np.frombuffer(binascii.a2b_base64(embedding, strict_mode=True), "<f4")
        vector = np.array(embedding)
    except ValueError:  # invalid base64, bytes that do not fill the last float32, or lists of different lengths
        return None
    return vector if vector.dtype.kind in "fi" and vector.ndim == 1 else None


def _read_code(answer: Any) -> int | str | None:
    """Return the status or the name of an error that the body of an answer contains, or None if it has none."""
    bodies = [answer.get("error"), answer] if isinstance(answer, dict) else []
    for body in bodies:
        for name in ("code", "status", "type"):
            code = body.get(name) if isinstance(body, dict) else None
            if isinstance(code, int | str) and not isinstance(code, bool) and code != "":
                return code
    return None


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
