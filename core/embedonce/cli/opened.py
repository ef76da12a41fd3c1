"""Opening the cache that a command works on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .output import say

if TYPE_CHECKING:
    from embedonce.cache import Cache
    from embedonce.config import Config


def load(source: str | None) -> Config:
    """Read the configuration; say so where there is none.

    Raises:
        ConfigError: with every problem of it.
    """
    from embedonce import config

    loaded = config.load(source)
    if loaded.file is None:
        say(
            "No configuration found: using the ngram provider, which needs no model and knows no meaning,\n"
            "a memory tier, and a disk tier in your cache folder.\n"
            "`embedonce init` writes an embedonce.toml that says how a model is used instead."
        )
    return loaded


@contextmanager
def opened(source: str | None) -> Iterator[Cache]:
    """Compose the cache of a configuration, and close it at the end."""
    from embedonce import config

    with config.compose(load(source)) as cache:
        yield cache
