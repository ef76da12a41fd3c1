"""What a configuration is once it is read and checked; :mod:`embedonce.config` exports these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from embedonce.keys import KeyPolicy

if TYPE_CHECKING:
    from pathlib import Path

    from embedonce.drift import DriftGuard

    from .documents import Document
    from .tables import CacheTable

PluginClass: TypeAlias = type[Any]


@dataclass(frozen=True, slots=True)
class Setting:
    """One resolved value and where it came from."""

    name: str
    """Dotted, with a tier's name for its place: ``tiers.redis.ttl``."""
    value: Any
    """``"(hidden)"`` where it is, or may hold, a secret."""
    origin: str
    """``embedonce.toml:14``, the environment variable, ``a dict`` or ``default``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugged:
    """A plugin's class and the options to make it with."""

    type: str
    cls: PluginClass
    options: Mapping[str, Any] = field(repr=False)
    """What was given; the class's own defaults are the rest."""
    label: str
    """Its table, as messages write it: ``[[tiers]] "redis"``."""
    path: tuple[str | int, ...] = field(repr=False)
    secrets: frozenset[str] = field(default=frozenset(), repr=False)
    """Texts among the options that no message may repeat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierConfig(Plugged):
    """One of ``[[tiers]]``."""

    name: str
    ttl: float | None = None
    timeout: float | None = None
    on_error: Literal["skip", "raise"] = "skip"
    write: Literal["inline", "background", "none"] | None = None
    encryption: str | Sequence[str] | None = field(default=None, repr=False)
    lease: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A whole configuration, checked, every value resolved. Equal ones make the same cache, wherever they stand."""

    source: str = field(compare=False)
    """What it was read from, in words: for the command line to say."""
    file: Path | None = field(compare=False)
    cache: CacheTable
    key: KeyPolicy
    allow: Sequence[str] | None
    """Plugins of others that may be loaded, by distribution or by name; None: all."""
    provider: Plugged | None
    """None where it was loaded for a provider of the caller's own."""
    fallback: Plugged | None
    fallback_fetch_only: bool
    drift: DriftGuard | None
    tiers: tuple[TierConfig, ...]
    document: Document = field(repr=False, compare=False)
    _settings: Callable[[], list[Setting]] = field(repr=False, compare=False)

    def settings(self) -> list[Setting]:
        """Return every value, defaults included, and where each came from; secrets are hidden."""
        return self._settings()
