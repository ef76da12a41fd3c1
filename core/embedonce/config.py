"""TOML, or a dict of the same shape, to a frozen :class:`Config`, to a :class:`Cache`.

Nothing heavy is imported here: pydantic and the plugins' metadata wait for the first :func:`load`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from ._config.resolved import Config, Plugged, Setting, TierConfig
from .errors import ConfigError, EmbedonceError, Problem, SpaceError

if TYPE_CHECKING:
    from ._engine.chain import ChainError
    from .answers import ChainWarning
    from .cache import Cache
    from .contracts import AnyProvider
    from .encryption import Encryption
    from .keys import VectorSpace

__all__ = [
    "Config",
    "Plugged",
    "Setting",
    "Source",
    "TierConfig",
    "allowed",
    "compose",
    "load",
    "open",
    "schema",
    "secrets_in",
    "warnings",
]

Source: TypeAlias = "str | os.PathLike[str] | Mapping[str, Any] | None"
"""What :func:`load` and :func:`open` take: a file, a dict, or None to look for a file."""


def open(
    source: Source = None,
    *,
    provider: AnyProvider | Callable[..., Any] | None = None,
    space: VectorSpace | Mapping[str, Any] | None = None,
) -> Cache:
    """Return the cache that a configuration describes.

    ``source`` is a TOML file, a dict of the same shape, or None. None takes the file that
    ``EMBEDONCE_CONFIG`` names, else ``embedonce.toml`` or the ``[tool.embedonce]`` of a
    ``pyproject.toml`` in this folder or one above, else the ngram provider with a memory tier and a
    disk tier in the user's cache folder.

    A ``provider`` of yours, or a function together with its ``space``, takes the place of ``[provider]``,
    which may then be left out and is not read.

    Raises:
        ConfigError: it cannot be used; ``problems`` lists everything that is wrong.
        SpaceError: ``provider`` describes no vector space.
    """
    return compose(load(source, own_provider=provider is not None), provider=provider, space=space)


def load(source: Source = None, *, own_provider: bool = False) -> Config:
    """Return a configuration, read and checked, with nothing made yet. Takes and raises what :func:`open` does.

    ``own_provider``: its ``[provider]`` is not read; :func:`compose` is then given one, or nothing is computed.
    """
    from ._config.documents import document
    from ._config.loader import loaded

    return loaded(document(source), own_provider=own_provider)


def allowed(source: Source = None) -> Sequence[str] | None:
    """Return what ``[plugins] allow`` of a configuration says, whatever else is wrong with it; None: everything.

    Raises:
        ConfigError: the file cannot be read, or that table is wrong.
    """
    from ._config.documents import document
    from ._config.loader import allowed

    return allowed(document(source))


def schema() -> dict[str, Any]:
    """Return the JSON schema (draft 7) of ``embedonce.toml``, with the options of every installed plugin.

    A plugin that cannot be loaded is left out.
    """
    from ._config.schema import schema

    return schema()


def secrets_in(document: Mapping[str, Any]) -> list[str]:
    """Return the dotted names of values that hold a secret in the clear, so that nobody writes them to a file.

    A value that stands for a variable, ``${NAME}``, holds none.
    """
    from ._config.secrets import secrets_in

    return secrets_in(document)


def compose(
    config: Config,
    *,
    provider: AnyProvider | Callable[..., Any] | None = None,
    space: VectorSpace | Mapping[str, Any] | None = None,
) -> Cache:
    """Make the provider and the backends of a configuration, and the cache of them.

    ``provider``, and the ``space`` of one that is a function, take the place of the configuration's. Without either,
    the cache computes nothing: it looks into the tiers, and stores and removes what it is told.

    Raises:
        ConfigError: a plugin refused its options, or the parts do not go together. What was already
            made is closed.
        SpaceError: ``provider`` describes no vector space.
    """
    from ._plugins import entry_points

    if provider is None and space is not None:
        raise TypeError("space= describes a function that is given as provider=; a plugin describes its own")
    made: list[Any] = []
    try:
        with entry_points.restrict_plugins(config.allow):
            return _composed(config, made, provider, space)
    except BaseException as error:
        _close(made, error)
        raise


def _composed(config: Config, made: list[Any], own: Any, space: VectorSpace | Mapping[str, Any] | None) -> Cache:
    from ._engine.chain import ChainError, Tier
    from ._plugins import loading
    from .cache import Cache
    from .functions import NoProvider

    problems: list[Problem] = []
    causes: list[BaseException] = []

    def make(part: Plugged) -> Any:
        try:
            made.append(part.cls(**part.options))
        except (Exception, SystemExit) as error:  # noqa: BLE001  (whatever it is becomes a problem at its table)
            problems.append(_refusal(config, part, error))
            causes.extend([error] if not _repeats(error, part.secrets) else [])
            return None
        return made[-1]

    provider = own
    if own is None:
        provider = NoProvider() if config.provider is None else make(config.provider)
    fallback = make(config.fallback) if own is None and config.fallback is not None else None
    backends = [make(tier) for tier in config.tiers]
    encryptions = [_encryption(config, tier, problems) for tier in config.tiers]
    if problems:
        raise ConfigError(problems) from next(iter(causes), None)
    tiers = [
        Tier(
            backend,
            name=tier.name,
            ttl=tier.ttl,
            timeout=tier.timeout,
            on_error=tier.on_error,
            write=tier.write,
            encryption=encryption,
            lease=tier.lease,
        )
        for tier, backend, encryption in zip(config.tiers, backends, encryptions, strict=True)
    ]
    used = [part.type for part in (config.provider, config.fallback, *config.tiers) if part is not None]
    try:
        return Cache(
            provider,
            tiers,
            space=space,
            key=config.key,
            dtype=config.cache.dtype,
            mode=config.cache.mode,
            fallback=fallback,
            fallback_fetch_only=config.fallback_fetch_only,
            drift=config.drift,
            max_wait=config.cache.max_wait,
            flush_timeout=config.cache.flush_timeout,
            max_queued=config.cache.max_queued,
            listeners=loading.listeners([*used, *config.key.normalize]),
        )
    except ChainError as error:
        raise ConfigError([_refused(config, error)]) from error
    except ConfigError as error:
        shown = config.document.shown
        raise ConfigError([Problem(p.message, p.file or shown, p.line, p.column) for p in error.problems]) from error
    except SpaceError as error:
        at = config.fallback or config.provider
        if own is not None or at is None:
            raise
        raise ConfigError([config.document.problem(at.path, f"{at.label}: {error}", key=True)]) from error


def _refused(config: Config, error: ChainError) -> Problem:
    """Return what the chain refuses, at the option that it refuses, or at its tier."""
    tier = config.tiers[error.place]
    return config.document.problem((*tier.path, error.option) if error.option else tier.path, str(error), key=True)


def warnings(config: Config, found: Sequence[ChainWarning]) -> list[Problem]:
    """Return ``Cache.warnings``, each at the table of its tier."""
    paths = {tier.name: tier.path for tier in config.tiers}
    return [config.document.problem(paths[warning.tier], warning.message, key=True) for warning in found]


def _encryption(config: Config, tier: TierConfig, problems: list[Problem]) -> Encryption | None:
    """Return the encryption of a tier; what is wrong with its keys goes to ``problems``."""
    from .encryption import Encryption

    if tier.encryption is None:
        return None
    try:
        return Encryption(tier.encryption)
    except ConfigError as error:
        problems.append(config.document.problem((*tier.path, "encryption"), f"{tier.label}: {error}", key=False))
        return None


def _refusal(config: Config, part: Plugged, error: BaseException) -> Problem:
    """Return what a plugin's constructor said, at its table, unless it repeats what must stay hidden."""
    said = "(its message is hidden: it repeats a secret)" if _repeats(error, part.secrets) else str(error)
    kind = "" if isinstance(error, EmbedonceError) else type(error).__name__
    message = f"{part.label} cannot be made: " + ": ".join(part for part in (kind, said) if part)
    return config.document.problem(part.path, " ".join(message.split()), key=True)


def _repeats(error: BaseException | None, secrets: frozenset[str]) -> bool:
    """Whether an error, or what led to it, has a secret in its message."""
    if error is None:
        return False
    said = f"{error} {getattr(error, '__notes__', '')}"
    # A repr, as most messages have it, writes some characters as escapes.
    written = {form for secret in secrets for form in (secret, repr(secret)[1:-1], ascii(secret)[1:-1])}
    return any(secret in said for secret in written) or any(
        _repeats(before, secrets) for before in (error.__cause__, error.__context__)
    )


def _close(made: list[Any], error: BaseException) -> None:
    for part in reversed(made):
        try:
            part.close()
        except Exception as failed:  # noqa: BLE001  (noted on the error that is on its way)
            error.add_note(f"closing {type(part).__name__} failed too: {type(failed).__name__}")
