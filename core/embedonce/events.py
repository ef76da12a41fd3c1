"""What happened, a batch at a time, for counters, metrics and logs. No event holds a text or a key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias


@dataclass(frozen=True, slots=True, kw_only=True)
class LookedUp:
    """One tier was asked for some keys."""

    tier: str
    task: str
    hits: int = 0
    misses: int = 0
    errors: int = 0
    corrupt: int = 0
    skipped: int = 0
    seconds: float = 0.0
    cause: str | None = None
    """Of the errors: ``"timeout"`` or the exception's class name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One tier was given some entries."""

    tier: str
    stored: int = 0
    dropped: int = 0
    errors: int = 0
    seconds: float = 0.0
    cause: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """A provider embedded one chunk of texts."""

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
    """What a tier did since the cache was made, in texts."""

    hits: int
    misses: int
    errors: int
    corrupt: int
    skipped: int
    stored: int
    dropped: int
    seconds: float
    """Spent in calls to it. Single-text hits in a first memory tier are not timed: the clock costs as much."""
    causes: Mapping[str, int]
    """Errors by cause: ``"timeout"`` or the exception's class name."""
    drops: Mapping[str, int]
    """Dropped entries by cause: ``"too large"``, ``"queue full"``, ``"skipped"`` (the breaker was open)."""


@dataclass(frozen=True, slots=True)
class ProviderStats:
    """What a provider did since the cache was made."""

    texts: int
    """Computed: each is one that no tier had."""
    failed: int
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Stats:
    """What ``Cache.stats`` returns: by name of the tier, by name of the provider."""

    tiers: Mapping[str, TierStats]
    providers: Mapping[str, ProviderStats]
    shared: int
    """Texts answered by a computation that another call had under way."""
