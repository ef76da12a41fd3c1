"""Immutable classes for a configuration that was read and checked. :mod:`embedonce.config` exports them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from embedonce._engine.imports import DEFAULT_TIMEOUT, DEFAULT_VERIFY
from embedonce.keys import KeyPolicy

from .tables import ServeTable, is_read_only, read_scope

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
    path: tuple[str | int, ...] = field(repr=False, compare=False)
    secrets: frozenset[str] = field(default=frozenset(), repr=False)
    """Secret texts in the options, which must not appear in a message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderConfig(Plugged):
    """The provider of ``[provider]``, of ``[provider.fallback]`` or of a ``[[serve.models]]``."""

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

    @property
    def scope(self) -> str | None:
        """The scope that the backend's class declares; None if the backend declares it only when it is made."""
        return read_scope(self.cls)

    @property
    def is_read_only(self) -> bool:
        """Whether the backend's class declares that its stores are read-only, so that nothing is written to them."""
        return is_read_only(self.cls)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportConfig(Plugged):
    """One importer of ``[[imports]]``."""

    task: str = "document"
    verify: int = DEFAULT_VERIFY
    timeout: float = DEFAULT_TIMEOUT


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One model of ``[[serve.models]]``."""

    name: str
    """The name that requests use for the model."""
    provider: ProviderConfig
    forward: tuple[str, ...] = ()
    """Fields of a request that are sent to the provider."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """One tenant of ``[[serve.tenants]]``."""

    name: str
    keys: tuple[str, ...] = field(repr=False)
    """The SHA-256 digests of the keys, each as ``sha256:`` and 64 hex digits in lowercase."""
    namespace: str
    """Namespace of the tenant's vectors, which is appended to that of ``[key]``."""
    models: tuple[str, ...] | None = None
    """Names of the models that the tenant may use; None for all."""
    requests_per_minute: float | None = None
    tokens_per_day: int | None = None
    """Maximum number of tokens that are embedded per day (UTC); 0 for hits only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig(ServeTable):
    """``[serve]``: how ``embedonce serve`` listens, its models and its tenants.

    ``admin_key`` is the SHA-256 digest of the key, as ``sha256:`` and 64 hex digits in lowercase.
    """

    models: tuple[ServedModel, ...] = ()
    """The models that are served. If it is empty, the provider of ``[provider]`` is served."""
    tenants: tuple[Tenant, ...] = ()
    """The tenants. If it is empty, the server has no keys."""


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
    """The provider; None without ``[provider]``.

    ``[provider]`` may be missing if there is a ``[[serve.models]]``. It is not read for a caller's own provider.
    """
    fallback: ProviderConfig | None
    fallback_fetch_only: bool
    drift: DriftGuard | None
    tiers: tuple[TierConfig, ...]
    imports: tuple[ImportConfig, ...]
    """The importers. They belong to the vector space of the provider."""
    embed: EmbedTable = field(compare=False)
    """How the command ``embedonce embed`` reads files."""
    serve: ServeConfig = field(compare=False)
    """What ``embedonce serve`` serves. It is not read for a caller's own provider, and has its defaults then."""
    document: Document = field(repr=False, compare=False)
    _settings: Callable[[], list[Setting]] = field(repr=False, compare=False)

    def settings(self) -> list[Setting]:
        """Return every setting with its source, including settings that have their default. Secrets are hidden."""
        return self._settings()
