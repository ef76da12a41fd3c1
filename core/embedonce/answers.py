"""What the cache answers with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import Incomplete
from .keys import Value, VectorSpace
from .vectors import Metadata, matrix


@dataclass(frozen=True, slots=True)
class Fetched:
    """What ``fetch`` and ``lookup`` found, text by text."""

    rows: Sequence[NDArray[np.float32] | None]
    """Per text: its vector of shape (d,), read-only, or None where there is none."""
    sources: Sequence[str | None]
    """Per text: a tier's name, ``"provider"``, or None where nothing was found or it failed."""
    failed: Mapping[int, Exception]
    """Position to what the provider raised for it."""
    metadata: Sequence[Metadata | None]
    """Per text: what was stored beside its vector."""
    space: VectorSpace
    """The vector space of every row: the fallback's, where the fallback answered."""
    seconds: Mapping[str, float]
    """Spent in each tier, and under ``"provider"`` in the provider (summed over concurrent chunks)."""
    errors: Mapping[str, str]
    """Tiers that failed in this call, and the cause."""
    dimensions: int | None = None
    """Of the rows; None where it is not known."""

    @property
    def vectors(self) -> NDArray[np.float32]:
        """All rows as one float32 matrix of shape (n, d).

        Raises:
            Incomplete: a row is missing.
        """
        rows = [row for row in self.rows if row is not None]
        if len(rows) < len(self.rows):
            raise Incomplete(
                f"{len(self.rows) - len(rows)} of {len(self.rows)} texts have no vector; "
                "read `rows`, and `failed` for the reasons"
            )
        return matrix(rows, self.dimensions)


@dataclass(frozen=True, slots=True)
class Explanation:
    """The parts of a text's key, where its entry is, and why it missed. The text itself is not in it."""

    key: str
    scope: str
    fingerprint: str
    task: str
    space: Mapping[str, Value]
    policy: Mapping[str, Value]
    normalized: bool
    """Whether normalisation changed the text."""
    tiers: Mapping[str, str]
    """Per tier: ``"hit"``, ``"miss"``, ``"expired"``, ``"coarser"``, ``"corrupt"``, ``"skipped"``, or the error."""
    reasons: Sequence[str] = ()
    """For a miss: what the tiers hold that is nearly, but not, what was asked for."""

    @property
    def found(self) -> str | None:
        """The first tier that has the entry, or None."""
        return next((tier for tier, outcome in self.tiers.items() if outcome == "hit"), None)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"found": self.found}


@dataclass(frozen=True, slots=True)
class Held:
    """What one tier holds of one scope."""

    tier: str
    scope: str
    card: Mapping[str, Value] | None
    """The space card; None where the tier has lost it."""
    entries: int
    error: str | None = None
    """Why the tier cannot say what it holds; ``scope`` is then empty."""


@dataclass(frozen=True, slots=True)
class TierCheck:
    """Whether a tier answers."""

    tier: str
    type: str
    ok: bool
    seconds: float
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ChainWarning:
    """Something about a chain of tiers that works and is hardly meant."""

    tier: str
    message: str


@dataclass(frozen=True, slots=True)
class Purged:
    """What ``purge`` removed, or with ``dry_run`` would remove."""

    scopes: Mapping[str, Mapping[str, Value] | None]
    """The scopes that matched, with their space cards."""
    removed: Mapping[str, int] = field(default_factory=dict)
    """Entries by tier."""
