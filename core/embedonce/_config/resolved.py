"""Immutable classes for a configuration that was read and checked. :mod:`embedonce.config` exports them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from embedonce.keys import KeyPolicy

if TYPE_CHECKING:
    from pathlib import Path

    from embedonce.drift import DriftGuard

    from .documents import Document
    from .tables import CacheTable, EmbedTable

PluginClass: TypeAlias = type[Any]


@dataclass(frozen=True, slots=True)
class Setting:
    """One effective setting: its value and where the value comes from."""

    name: str
    """Dotted name, with the tier's name instead of its index: ``tiers.redis.ttl``."""
    value: Any
    """The value, or ``"(hidden)"`` if the value is a secret or may contain one."""
    origin: str
    """Source of the value: ``embedonce.toml:14``, an environment variable, ``a dict`` or ``default``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugged:
    """A plugin's class, and the options with which an instance is created."""

    type: str
    cls: PluginClass
    options: Mapping[str, Any] = field(repr=False)
    """Options that the configuration sets. For all other options, the class uses its defaults."""
    label: str
    """Name of the plugin's table in messages: ``[[tiers]] "redis"``."""
    path: tuple[str | int, ...] = field(repr=False)
    secrets: frozenset[str] = field(default=frozenset(), repr=False)
    """Secret texts in the options, which must not appear in a message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderConfig(Plugged):
    """The provider of ``[provider]``, or the fallback of ``[provider.fallback]``."""

    price: str | None = None
    """Price of the provider's tokens, such as ``0.02 USD / 1M tokens``."""
    coalesce: float | None = None
    """Seconds for which texts that no tier has wait for texts of other calls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierConfig(Plugged):
    """One tier of ``[[tiers]]``."""

    name: str
    ttl: float | None = None
    timeout: float | None = None
    on_error: Literal["skip", "raise"] = "skip"
    write: Literal["inline", "background", "none"] | None = None
    encryption: str | Sequence[str] | None = field(default=None, repr=False)
    lease: float | Literal["off"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A checked configuration.

    Two configurations are equal if they describe the same cache, even if their files differ.
    """

    source: str = field(compare=False)
    """Description of where the configuration comes from, for the command line."""
    file: Path | None = field(compare=False)
    cache: CacheTable
    key: KeyPolicy
    allow: Sequence[str] | None
    """Names of the third-party plugins that may be loaded, or of their distributions; None allows every plugin."""
    provider: ProviderConfig | None
    """The provider; None if the configuration was loaded for a caller's own provider."""
    fallback: ProviderConfig | None
    fallback_fetch_only: bool
    drift: DriftGuard | None
    tiers: tuple[TierConfig, ...]
    embed: EmbedTable = field(compare=False)
    """How the command ``embedonce embed`` reads files."""
    document: Document = field(repr=False, compare=False)
    _settings: Callable[[], list[Setting]] = field(repr=False, compare=False)

    def settings(self) -> list[Setting]:
        """Return every setting with its source, including settings that have their default. Secrets are hidden."""
        return self._settings()
