"""Opening the cache that a command works on."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from embedonce.errors import TierError

from .output import Failed, say

if TYPE_CHECKING:
    from embedonce.cache import Cache
    from embedonce.config import Config


def load(source: str | None, *, computes: bool = True) -> Config:
    """Read the configuration; say so where there is none. What computes nothing needs no ``[provider]``.

    Raises:
        ConfigError: with every problem of it.
    """
    from embedonce import config

    loaded = config.load(source, own_provider=not computes)
    if loaded.file is None:
        say(
            "No configuration found: using the ngram provider, which needs no model and knows no meaning,\n"
            "a memory tier, and a disk tier in your cache folder.\n"
            "`embedonce init` writes an embedonce.toml that says how a model is used instead."
        )
    return loaded


@contextmanager
def opened(source: str | Config | None, *, computes: bool = True) -> Iterator[Cache]:
    """Compose the cache of a configuration, which is read here unless it was before, and close it at the end."""
    from embedonce import config

    loaded = source if isinstance(source, config.Config) else load(source, computes=computes)
    with telling(loaded), config.compose(loaded) as cache:
        yield cache


@contextmanager
def telling(loaded: Config) -> Iterator[None]:
    """Say of a tier that fails which one it is, and its store's own words where they repeat no secret.

    Raises:
        Failed: in the place of a TierError.
    """
    try:
        yield
    except TierError as error:
        parts = (loaded.provider, *loaded.tiers)
        hidden = [secret for part in parts if part is not None for secret in part.secrets]
        raise Failed(told(error, hidden)) from error


def told(error: TierError, hidden: Collection[str] = ()) -> str:
    """Return what is said of a tier's error: its name, what failed, and why."""
    said = str(error)
    if error.tier and not said.startswith("tier "):
        said = f"tier {error.tier!r}: {said}"
    cause = " ".join(str(error.__cause__ or "").split())
    if not cause or cause in said or any(secret in cause for secret in hidden):
        return said
    return f"{said}: {cause}"
