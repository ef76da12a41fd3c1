"""Writes a folder of diskcache, with lists of floats under SHA-256 digests."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def write(
    folder: Path, texts: Sequence[str], vectors: NDArray[np.floating[Any]], *, is_fanout: bool = False, **settings: Any
) -> dict[str, object]:
    """Write a new cache, and return the options of the importer."""
    import diskcache

    kind = diskcache.FanoutCache if is_fanout else diskcache.Cache
    with closing(kind(str(folder), **settings)) as cache, cache.transact():
        for text, row in zip(texts, vectors.tolist(), strict=True):
            cache[hashlib.sha256(text.encode()).hexdigest()] = row
    return {"path": folder}
