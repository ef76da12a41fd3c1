"""Opening the cache that a command works on."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from embedonce._engine.read_only import describe_kept
from embedonce._plugins.options import options_of
from embedonce.errors import ConfigError, Problem, TierError

from .output import Failed, say

if TYPE_CHECKING:
    from embedonce.cache import Cache
    from embedonce.config import Config, TierConfig

FOLDER_OPTIONS = ("path", "folder")
"""Names of options that hold the folder of a store, even if the folder does not exist yet."""


def load_config(source: str | None, *, needs_provider: bool = True, hint: str = "") -> Config:
    """Read the configuration, and tell the user if none was found, or if it was found above the current folder.

    A command that embeds no text passes ``needs_provider=False``, so that ``[provider]`` may be missing. If it
    is missing for another command, ``hint`` says what to do instead of adding one.

    Raises:
        ConfigError: the configuration has problems; the error lists all of them. Or there is no ``[provider]``,
            because all providers belong to models of ``[[serve.models]]``.
    """
    from embedonce import config

    loaded = config.load(source, own_provider=not needs_provider)
    if needs_provider and loaded.provider is None:
        provider, models = loaded.document.table("provider"), loaded.document.table("serve", "models", array=True)
        hint = hint or f"add {provider}"
        message = f"{provider} is missing, and only embedonce serve can use the providers of {models}; {hint}"
        raise ConfigError([Problem(message, loaded.document.relative_name)])
    describe_source(loaded)
    return loaded


def describe_source(loaded: Config) -> None:
    """Tell the user if no configuration was found, or if it was found above the current folder."""
    if loaded.file is None:
        say(
            f"No configuration found: using {_describe_default_tiers(loaded)} and the ngram provider.\n"
            "The ngram provider needs no model. Its vectors reflect the spelling of a text, not its meaning.\n"
            "To use a model, write an embedonce.toml with `embedonce init --provider NAME`."
        )
    elif loaded.document.is_found and loaded.file.parent != Path.cwd():
        say(f"using the configuration {loaded.file}")


def _describe_default_tiers(loaded: Config) -> str:
    return "a memory tier, a disk tier in your cache folder," if len(loaded.tiers) > 1 else "a memory tier"


@contextmanager
def open_cache(source: str | Config | None, *, needs_provider: bool = True) -> Iterator[Cache]:
    """Compose the cache, and close it at the end; ``source`` is a file or a configuration that was already read."""
    from embedonce import config

    loaded = source if isinstance(source, config.Config) else load_config(source, needs_provider=needs_provider)
    with translate_tier_errors(loaded), config.compose(loaded) as cache:
        yield cache


@contextmanager
def open_for_upkeep(source: str | None) -> Iterator[tuple[Config, Cache]]:
    """Compose the cache with its provider if possible; otherwise without it, so that tiers can still be inspected.

    The provider says which scopes are in use. It may be missing, or its package may not be installed here.
    """
    from embedonce import config

    try:
        loaded = config.load(source)
        cache = config.compose(loaded)
    except ConfigError:
        loaded = load_config(source, needs_provider=False)
        cache = config.compose(loaded)
    else:
        describe_source(loaded)
    with translate_tier_errors(loaded), cache:
        yield loaded, cache


def list_persistent_tiers(loaded: Config) -> list[str]:
    """Return the names of the tiers that keep entries after this process has ended, and that are written to."""
    return [tier.name for tier in loaded.tiers if tier.scope != "process" and _is_written(tier)]


def _is_written(tier: TierConfig) -> bool:
    return tier.write != "none" and not tier.is_read_only


def list_folders(loaded: Config) -> dict[str, str]:
    """Return the folder of each tier that keeps its entries in a folder of this machine, by the tier's name."""
    folders: dict[str, str] = {}
    for tier in loaded.tiers:
        for name, option in options_of(tier.cls).items():
            value = tier.options.get(name)
            if option.is_path and value is not None and (name in FOLDER_OPTIONS or os.path.isdir(value)):
                folders.setdefault(tier.name, str(value))
    return folders


def explain_kept(
    loaded: Config, kept: Mapping[str, Mapping[str, int]], exclude: Callable[[Mapping[str, int]], str]
) -> dict[str, str]:
    """Return, by read-only tier, why it keeps entries, and the command that makes its store without them.

    ``kept`` has the number of these entries by tier and scope. ``exclude`` returns the options of ``embedonce export``
    that leave them out. A configuration that was named is named in the command, too.
    """
    folders = list_folders(loaded)
    named = None if loaded.file is None or loaded.document.is_found else loaded.document.relative_name
    config = f" --config {shlex.quote(named)}" if named is not None else ""
    return {
        tier.name: describe_kept(
            tier.name,
            tier.cls,
            kept[tier.name],
            exclude(kept[tier.name]) + config,
            **({"folder": shlex.quote(folders[tier.name])} if tier.name in folders else {}),
        )
        for tier in loaded.tiers
        if tier.name in kept
    }


def measure_folder(folder: str) -> int:
    """Return the size of all files in a folder in bytes, or the size of a single file; 0 if it does not exist."""
    path = Path(folder)
    files = [path] if path.is_file() else path.rglob("*")
    size = 0
    for file in files:
        with suppress(OSError):  # another process may remove a file meanwhile, for example SQLite's log
            size += file.stat().st_size if file.is_file() else 0
    return size


@contextmanager
def translate_tier_errors(loaded: Config) -> Iterator[None]:
    """Turn a TierError into a message with the tier's name and the cause. A cause that contains a secret is left out.

    Raises:
        Failed: the block raised a TierError.
    """
    try:
        yield
    except TierError as error:
        raise Failed(describe_tier_error(error, list_secrets(loaded))) from error


def list_secrets(loaded: Config) -> list[str]:
    """Return the secrets in the options of providers, tiers and importers. No message may contain one of them."""
    parts = (loaded.provider, loaded.fallback, *loaded.tiers, *loaded.imports)
    return [secret for part in parts if part is not None for secret in part.secrets]


def describe_tier_error(error: TierError, secrets: Collection[str] = ()) -> str:
    """Return the tier's name, what failed, and why; leave out a cause that contains one of ``secrets``."""
    message = str(error)
    if error.tier and not message.startswith("tier "):
        message = f"tier {error.tier!r}: {message}"
    cause = " ".join(str(error.__cause__ or "").split())
    if not cause or cause in message or any(secret in cause for secret in secrets):
        return message
    return f"{message}: {cause}"
