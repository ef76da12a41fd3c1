"""Read TOML, or a dict of the same shape, into a frozen :class:`Config`, and create a :class:`Cache` from it.

This module imports nothing heavy. The first call of :func:`load` reads the metadata of plugins, and imports pydantic
if the check of a value needs pydantic.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from ._config.resolved import (
    Config,
    ImportConfig,
    Plugged,
    ProviderConfig,
    ServeConfig,
    ServedModel,
    Setting,
    Tenant,
    TierConfig,
)
from .errors import ConfigError, EmbedonceError, Problem, SpaceError

if TYPE_CHECKING:
    from pathlib import Path

    from ._engine.chain import ChainError
    from .answers import ChainWarning
    from .cache import Cache
    from .contracts import AnyProvider
    from .encryption import Encryption
    from .keys import VectorSpace

__all__ = [
    "Config",
    "ImportConfig",
    "Plugged",
    "ProviderConfig",
    "ServeConfig",
    "ServedModel",
    "Setting",
    "Source",
    "Tenant",
    "TierConfig",
    "compose",
    "list_options",
    "load",
    "load_text",
    "make_provider",
    "open",
    "read_allow_list",
    "read_bundle",
    "schema",
    "secrets_in",
    "warnings",
]

Source: TypeAlias = "str | os.PathLike[str] | Mapping[str, Any] | None"
"""Argument of :func:`load` and :func:`open`: a file, a dict, or None to look for a file."""


def open(
    source: Source = None,
    *,
    provider: AnyProvider | Callable[..., Any] | None = None,
    space: VectorSpace | Mapping[str, Any] | None = None,
) -> Cache:
    """Return the cache that a configuration describes.

    ``source`` is a TOML file, a dict of the same shape, or None. With None, the file is the one that
    ``EMBEDONCE_CONFIG`` names. If that variable is not set, the file is the nearest ``embedonce.toml`` or
    ``pyproject.toml`` (with ``[tool.embedonce]``) in the current folder or a folder above it. If there is
    no such file, the cache has the ngram provider, a memory tier, and a disk tier in the user's cache folder.

    ``provider`` is your own provider, or a function that you pass together with its ``space``. With ``provider``,
    the table ``[provider]`` is ignored and may be missing.

    Raises:
        ConfigError: the configuration cannot be used; ``problems`` lists everything that is wrong.
        SpaceError: ``provider`` does not describe a vector space.
    """
    return compose(load(source, own_provider=provider is not None), provider=provider, space=space)


def load(source: Source = None, *, own_provider: bool = False) -> Config:
    """Read and check a configuration without creating anything. ``source`` is the same as for :func:`open`.

    With ``own_provider``, ``[provider]`` and ``[serve]`` are not read. In that case, pass a provider to
    :func:`compose`. Without a provider, the cache computes nothing.

    Raises:
        ConfigError: the configuration cannot be used; ``problems`` lists everything that is wrong.
    """
    from ._config.documents import find_document
    from ._config.loader import load_document

    return load_document(find_document(source), own_provider=own_provider)


def load_text(text: str, file: str | os.PathLike[str], *, is_found: bool = False) -> Config:
    """Read and check the text of a TOML file that was read before, for example by another process.

    Messages name ``file``, and relative paths start from its folder. The file itself is not read. ``is_found`` says
    that :func:`load` has found the file, and that nobody named it (``Config.document.is_found``).

    Raises:
        ConfigError: the configuration cannot be used; ``problems`` lists everything that is wrong.
    """
    from pathlib import Path

    from ._config.documents import parse_document
    from ._config.loader import load_document

    path = Path(os.fsdecode(file))
    return load_document(parse_document(path, text.encode(), is_found=is_found), own_provider=False)


def read_allow_list(source: Source = None) -> Sequence[str] | None:
    """Return the list ``allow`` in ``[plugins]``, even if other tables have problems.

    The result is None if there is no such list. All plugins are allowed then.

    Raises:
        ConfigError: the file cannot be read, or its ``[plugins]`` table has a problem.
    """
    from ._config.documents import find_document
    from ._config.loader import read_allow_list

    return read_allow_list(find_document(source))


def read_bundle(source: Source = None) -> Path | None:
    """Return the folder that ``bundle`` names, for a session of tests, even if other values have problems.

    The result is None if the configuration has no ``bundle``.

    Raises:
        ConfigError: the file cannot be read, or the value has a problem.
    """
    from ._config.documents import find_document
    from ._config.loader import read_bundle

    return read_bundle(find_document(source))


def schema() -> dict[str, Any]:
    """Return the JSON schema (draft 7) of ``embedonce.toml``, with the options of every installed plugin.

    Plugins that cannot be loaded are omitted.
    """
    from ._config.schema import schema

    return schema()


def secrets_in(document: Mapping[str, Any]) -> list[str]:
    """Return the dotted names of values that contain a secret as plain text. Do not write such a value to a file.

    A value that refers to a variable, ``${NAME}``, contains no secret.
    """
    from ._config.secrets import secrets_in

    return secrets_in(document)


def compose(
    config: Config,
    *,
    provider: AnyProvider | Callable[..., Any] | None = None,
    space: VectorSpace | Mapping[str, Any] | None = None,
) -> Cache:
    """Create the provider and the backends of a configuration, and a cache that uses them.

    ``provider`` replaces the configuration's provider. If ``provider`` is a function, pass its ``space`` too. Without
    any provider, the cache computes nothing; it only reads, stores and removes entries of the tiers.

    Raises:
        ConfigError: a plugin refused its options, or the parts do not fit together. Parts that were already
            created are closed.
        SpaceError: ``provider`` does not describe a vector space.
    """
    from ._plugins import entry_points

    if provider is None and space is not None:
        raise TypeError(
            "space= can only be used if provider= is a function; without provider=, the [provider] of the "
            "configuration describes its own vector space"
        )
    made: list[Any] = []
    try:
        with entry_points.restrict_plugins(config.allow):
            return _compose_parts(config, made, provider, space)
    except BaseException as error:
        _close_parts(made, error)
        raise


def _compose_parts(config: Config, made: list[Any], own: Any, space: VectorSpace | Mapping[str, Any] | None) -> Cache:
    from ._engine.chain import ChainError, Tier
    from ._engine.imports import Import, ImportOptionError
    from ._plugins import loading
    from ._plugins.entry_points import strip_distribution
    from .cache import Cache
    from .functions import NoProvider

    problems: list[Problem] = []
    causes: list[BaseException] = []

    def make(part: Plugged) -> Any:
        try:
            made.append(_create_part(config, part, {}))
        except ConfigError as error:
            problems.extend(error.problems)
            causes.extend([error.__cause__] if error.__cause__ is not None else [])
            return None
        return made[-1]

    provider = own
    if own is None:
        provider = NoProvider() if config.provider is None else make(config.provider)
    fallback = make(config.fallback) if own is None and config.fallback is not None else None
    backends = [make(tier) for tier in config.tiers]
    importers = [make(one) for one in config.imports]
    encryptions = [_make_encryption(config, tier, problems) for tier in config.tiers]
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
    imports = [
        Import(
            importer,
            name=strip_distribution(one.type),
            task=one.task,
            verify=one.verify,
            timeout=one.timeout,
        )
        for one, importer in zip(config.imports, importers, strict=True)
    ]
    providers = (config.provider, config.fallback, *(model.provider for model in config.serve.models))
    used = [part.type for part in (*providers, *config.tiers) if part is not None]
    try:
        return Cache(
            provider,
            tiers,
            imports=imports,
            space=space,
            key=config.key,
            dtype=config.cache.dtype,
            mode=config.cache.mode,
            fallback=fallback,
            fallback_fetch_only=config.fallback_fetch_only,
            price=config.provider.price if config.provider is not None and own is None else None,
            fallback_price=None if config.fallback is None else config.fallback.price,
            coalesce=config.provider.coalesce if config.provider is not None and own is None else None,
            fallback_coalesce=None if config.fallback is None else config.fallback.coalesce,
            drift=config.drift,
            max_wait=config.cache.max_wait,
            flush_timeout=config.cache.flush_timeout,
            max_queued=config.cache.max_queued,
            listeners=loading.listeners([*used, *config.key.normalize], [one.type for one in config.imports]),
        )
    except ChainError as error:
        raise ConfigError([_locate_chain_error(config, error)]) from error
    except ImportOptionError as error:
        one = config.imports[error.place]
        where = (*one.path, error.option) if error.option else one.path
        raise ConfigError([config.document.problem(where, f"{one.label}: {error}", key=True)]) from error
    except ConfigError as error:
        shown = config.document.relative_name
        raise ConfigError([Problem(p.message, p.file or shown, p.line, p.column) for p in error.problems]) from error
    except SpaceError as error:
        at = config.fallback or config.provider
        if own is not None or at is None:
            raise
        raise ConfigError([config.document.problem(at.path, f"{at.label}: {error}", key=True)]) from error


def make_provider(config: Config, provider_config: ProviderConfig, **changes: Any) -> AnyProvider:
    """Create a provider of a configuration, with other values for some options, such as ``dimensions=256``.

    ``provider_config`` is ``config.provider``, ``config.fallback`` or the provider of a model in
    ``config.serve.models``. The caller closes the provider.

    Raises:
        ConfigError: the provider's class refused its options. The problem has the place of the provider's table.
        TypeError: the class does not have one of the options in ``changes``; :func:`list_options` returns those that
            it has.
    """
    from ._plugins import entry_points

    unknown = sorted(changes.keys() - list_options(provider_config))
    if unknown:
        raise TypeError(f"the provider {provider_config.type!r} does not have the option {unknown[0]!r}")
    with entry_points.restrict_plugins(config.allow):
        provider: AnyProvider = _create_part(config, provider_config, changes)
    return provider


def list_options(part: Plugged) -> frozenset[str]:
    """Return the names of all options that the class of a provider or a backend accepts."""
    from ._plugins.options import options_of

    return frozenset(options_of(part.cls))


def _create_part(config: Config, part: Plugged, changes: Mapping[str, Any]) -> Any:
    """Create a provider or a backend. ``changes`` replace some of its options.

    Raises:
        ConfigError: the class raised an error. That error is the cause, unless it contains a secret.
    """
    from ._config.secrets import contains_secret

    try:
        return part.cls(**{**part.options, **changes})
    except (Exception, SystemExit) as error:  # noqa: BLE001  (any error becomes a problem at the plugin's table)
        problem = _describe_failure(config, part, error)
        cause = None if contains_secret(error, part.secrets) else error
    raise ConfigError([problem]) from cause


def _locate_chain_error(config: Config, error: ChainError) -> Problem:
    """Return a problem for a chain's error.

    The place of the problem is the option that the error names, or else the table of the tier.
    """
    tier = config.tiers[error.place]
    return config.document.problem((*tier.path, error.option) if error.option else tier.path, str(error), key=True)


def warnings(config: Config, found: Sequence[ChainWarning]) -> list[Problem]:
    """Return ``Cache.warnings`` as problems, each at the table of its tier."""
    paths = {tier.name: tier.path for tier in config.tiers}
    return [config.document.problem(paths[warning.tier], warning.message, key=True) for warning in found]


def _make_encryption(config: Config, tier: TierConfig, problems: list[Problem]) -> Encryption | None:
    """Return the encryption of a tier. If its encryption keys have a problem, add the problem to ``problems``."""
    from .encryption import Encryption

    if tier.encryption is None:
        return None
    try:
        return Encryption(tier.encryption)
    except ConfigError as error:
        problems.append(config.document.problem((*tier.path, "encryption"), f"{tier.label}: {error}", key=False))
        return None


def _describe_failure(config: Config, part: Plugged, error: BaseException) -> Problem:
    """Return a problem for the error of a plugin's constructor, at the plugin's table.

    If the message of the error contains a secret, the message is left out.
    """
    from ._config.secrets import contains_secret

    said = "(message hidden, because it contains a secret)" if contains_secret(error, part.secrets) else str(error)
    kind = "" if isinstance(error, EmbedonceError) else type(error).__name__
    message = f"{part.label} cannot be created: " + ": ".join(piece for piece in (kind, said) if piece)
    return config.document.problem(part.path, " ".join(message.split()), key=True)


def _close_parts(made: list[Any], error: BaseException) -> None:
    for part in reversed(made):
        try:
            part.close()
        except Exception as failed:  # noqa: BLE001  (added as a note to the error being raised)
            error.add_note(f"closing {type(part).__name__} also failed: {type(failed).__name__}")
