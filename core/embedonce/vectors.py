"""Entries and frames: a vector with its dates, in memory and as bytes.

The frame's layout is in ``docs/frames.md``, byte by byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Dtype: TypeAlias = Literal["float32", "float16", "int8"]
Metadata: TypeAlias = Mapping[str, Any]


class Entry(NamedTuple):
    """A vector, when it was made and when it expires."""

    vector: NDArray[np.float32]
    """Shape (d,), read-only. Whatever ``dtype`` is, the values are float32."""
    created: float
    """Unix time in seconds."""
    expires: float | None = None
    """Unix time in seconds; None: never."""
    metadata: Metadata | None = None
    """Small JSON, from whoever wrote the entry first."""
    dtype: Dtype = "float32"
    """How finely the values are rounded."""
