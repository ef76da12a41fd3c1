"""What the tests of LangChain's and LlamaIndex' embedders share: texts, configurations, a server that misbehaves."""

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


def memory(**key: Any) -> dict[str, Any]:
    """Return the configuration of a memory tier that no other test shares."""
    return {"tiers": [{"type": "memory"}], "key": {"namespace": f"test {next(_numbers)}", **key}}


def on_disk(folder: Path) -> dict[str, Any]:
    """Return the configuration of a memory tier before a patient disk tier."""
    disk = {"type": "disk", "path": str(folder), "timeout": "60s"}  # a busy machine is no fault
    return {"tiers": [{"type": "memory"}, disk]}


def vector(text: str) -> list[float]:
    """Return eight numbers that float32 cannot hold exactly."""
    numbers: list[float] = (np.frombuffer(hashlib.shake_256(text.encode()).digest(32), "<i4") / 2**31 + 1e-9).tolist()
    return numbers


def same(left: Any, right: Any) -> bool:
    """Whether both are equal as float32."""
    return np.array_equal(np.asarray(left, np.float32), np.asarray(right, np.float32))


def never_wrong(server: OpenAIServer, kind: Any, right: Any, ask: Callable[[list[str]], Any], hasty: Any) -> None:
    """Require that half a batch of hits gets its own vectors or an error, and that nothing wrong is stored.

    ``right`` are the vectors of MIXED. ``hasty`` asks through the same cache, and only while the server misbehaves:
    with a short timeout a busy machine would fail it at any other time.
    """
    assert same(ask(HITS), [right[1], right[3]])
    server.misbehave(kind, seconds=0.0005)
    try:
        answer = hasty(MIXED)
    except Exception:
        assert kind not in ("out_of_order", "no_index", "drip")
    else:
        assert kind in ("out_of_order", "no_index", "drip")
        assert same(answer, right)
    server.heal()
    assert same(ask(HITS), [right[1], right[3]])
    assert same(ask(MIXED), right), "nothing wrong was stored"
