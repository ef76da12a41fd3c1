"""Texts, configurations and checks that the tests of LangChain's and LlamaIndex' embedders share."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from embedonce.testing import OpenAIServer

NGRAM = {"provider": {"type": "ngram", "dimensions": 64}, "tiers": [{"type": "memory"}]}
SECRET = "sk-0123456789-do-not-tell"
HITS = ["The first one is known.", "So is the second."]
MIXED = ["A new one", HITS[0], "and another", HITS[1], "A new one", "and a last one"]
_numbers = itertools.count()


def memory_config(**key: Any) -> dict[str, Any]:
    """Return the configuration of a memory tier that no other test shares."""
    return {"tiers": [{"type": "memory"}], "key": {"namespace": f"test {next(_numbers)}", **key}}


def disk_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of a memory tier in front of a disk tier."""
    disk = {"type": "disk", "path": str(folder), "timeout": "60s"}  # long enough for a busy machine
    return {"tiers": [{"type": "memory"}, disk]}


def vector(text: str) -> list[float]:
    """Return eight numbers that float32 cannot represent exactly."""
    numbers: list[float] = (np.frombuffer(hashlib.shake_256(text.encode()).digest(32), "<i4") / 2**31 + 1e-9).tolist()
    return numbers


def equal_as_float32(left: Any, right: Any) -> bool:
    """Return whether both are equal as float32."""
    return np.array_equal(np.asarray(left, np.float32), np.asarray(right, np.float32))


def check_only_own_vectors(
    server: OpenAIServer, kind: Any, right: Any, ask: Callable[[list[str]], Any], ask_hastily: Any
) -> None:
    """Check that a batch of hits and misses gets its own vectors or an error, and that nothing wrong is stored.

    ``right`` holds the vectors of MIXED. ``ask_hastily`` uses the same cache with a short timeout, and only while the
    server misbehaves, because a busy machine might exceed that timeout at any other time.
    """
    assert equal_as_float32(ask(HITS), [right[1], right[3]])
    server.misbehave(kind, seconds=0.0005)
    try:
        answer = ask_hastily(MIXED)
    except Exception:
        assert kind not in ("out_of_order", "no_index", "drip")
    else:
        assert equal_as_float32(answer, right)
    server.heal()
    assert equal_as_float32(ask(HITS), [right[1], right[3]])
    assert equal_as_float32(ask(MIXED), right), "nothing wrong was stored"
