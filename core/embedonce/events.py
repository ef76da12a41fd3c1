"""Events for listeners, and statistics. An event describes one batch, and contains no text and no key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias


@dataclass(frozen=True, slots=True, kw_only=True)
class LookedUp:
    """A tier was asked for keys. Counts are in texts."""

    tier: str
    task: str
    hits: int = 0
    misses: int = 0
    errors: int = 0
    corrupt: int = 0
    skipped: int = 0
    seconds: float = 0.0
    cause: str | None = None
    """Cause of ``errors``: ``"timeout"`` or the exception's class name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """Entries were written to a tier, or dropped."""

    tier: str
    stored: int = 0
    dropped: int = 0
    errors: int = 0
    seconds: float = 0.0
    cause: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """A provider was called with one chunk of texts."""

    provider: str
    task: str
    texts: int
    failed: int = 0
    tokens: int | None = None
    seconds: float = 0.0
    fallback: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TierChanged:
    """A tier's breaker opened or closed."""

    tier: str
    state: Literal["open", "closed"]
    operation: Literal["read", "write"]
    cause: str | None = None


Event: TypeAlias = LookedUp | Stored | Computed | TierChanged


@dataclass(frozen=True, slots=True)
class TierStats:
    """Counters of a tier since the cache was created, in texts."""

    hits: int
    misses: int
    errors: int
    corrupt: int
    skipped: int
    stored: int
    dropped: int
    seconds: float
    """Time spent in calls to it. Single-text hits in a first memory tier are not timed: the clock costs as much."""
    causes: Mapping[str, int]
    """Errors by cause: ``"timeout"`` or the exception's class name."""
    drops: Mapping[str, int]
    """Dropped entries by cause: ``"too large"``, ``"queue full"`` or ``"skipped"`` (the breaker was open)."""


@dataclass(frozen=True, slots=True)
class ProviderStats:
    """Counters of a provider since the cache was created."""

    texts: int
    """Texts that it embedded, each of which no tier had."""
    failed: int
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Stats:
    """The counters that ``Cache.stats`` returns, by the names of tiers and providers."""

    tiers: Mapping[str, TierStats]
    providers: Mapping[str, ProviderStats]
    shared: int
    """Texts answered by the computation of another call that was in flight."""
