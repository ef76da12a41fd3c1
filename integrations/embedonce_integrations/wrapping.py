"""What every integration stands on: a configuration's shared cache, and a framework's embedder as a provider."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit, urlunsplit

from embedonce import Cache, ConfigError, Limits, SpaceError, VectorSpace, config
from embedonce.contracts import AnyProvider, Embedded, Task, Vectors
from embedonce.keys import Value
from embedonce.model_files import digest

Answer: TypeAlias = Vectors | Embedded

NOT_IN_SPACE = frozenset(
    {
        "api_key",
        "api_token",
        "async_client",
        "batch_size",
        "cache_folder",
        "callback_manager",
        "callbacks",
        "chunk_size",
        "client",
        "default_headers",
        "device",
        "embed_batch_size",
        "embeddings_cache",
        "http_async_client",
        "http_client",
        "http_client_kwargs",
        "max_retries",
        "num_workers",
        "organization",
        "progress_bar",
        "rate_limiter",
        "request_timeout",
        "retry_max_seconds",
        "retry_min_seconds",
        "show_progress",
        "show_progress_bar",
        "timeout",
        "token",
        "verbose",
    }
)
"""What embedders are given beside what decides their vectors, under the names that frameworks have for it."""


# --- the cache of a configuration -------------------------------------------------------------

_lock = threading.Lock()
_open: list[tuple[object, weakref.ref[Cache]]] = []
"""Configurations and their caches, as long as somebody uses them. A list: options cannot be hashed."""


def shared_cache(source: config.Source = None, *, provider: AnyProvider | None = None) -> Cache:
    """Return the cache of a configuration; equal configurations in one process share their tiers and flights.

    ``source`` is what :func:`embedonce.open` takes. A ``provider`` takes the place of ``[provider]``: the cache
    that comes back asks it for what the shared tiers do not hold. Nobody closes a shared cache; it flushes when the
    program ends.

    Raises:
        ConfigError: the configuration cannot be used.
        SpaceError: the provider describes no vector space.
    """
    loaded = config.load(source, own_provider=provider is not None)
    wanted = (
        loaded.cache,
        loaded.key,
        loaded.provider,
        loaded.fallback,
        loaded.fallback_fetch_only,
        loaded.tiers,
    )
    with _lock:
        _open[:] = [(known, ref) for known, ref in _open if (cache := ref()) is not None and not cache.closed]
        cache = next((ref() for known, ref in _open if known == wanted), None)
        if cache is None:
            cache = config.compose(loaded, provider=None if provider is None else _NoProvider())
            _open.append((wanted, weakref.ref(cache)))
    return cache if provider is None else cache.for_provider(provider)


def writable(source: config.Source) -> str | dict[str, Any] | None:
    """Return a configuration as a framework may write it to a file.

    Raises:
        ConfigError: a dict holds a secret in the clear.
    """
    if source is None:
        return None
    if not isinstance(source, Mapping):
        return os.fspath(source)
    found = config.secrets_in(source)
    if found:
        raise ConfigError(
            f"{', '.join(found)}: a secret would be written to a file; write ${{NAME}}, which stands for an "
            "environment variable, or name a TOML file as config"
        )
    return deepcopy(dict(source))  # a writer of YAML makes references of what is the same object


class _NoProvider:
    """Stands in a shared cache that is only ever asked through :meth:`Cache.for_provider`."""

    limits = Limits()

    def space(self, task: Task) -> VectorSpace:
        return VectorSpace(provider="embedonce-integrations", model="none")

    def embed(self, texts: Sequence[str], task: Task) -> Answer:
        raise TypeError("this cache has no provider of its own; use for_provider")

    def close(self) -> None:
        pass


# --- an embedder as a provider ----------------------------------------------------------------


class WrappedProvider:
    """A framework's embedder as a provider.

    Args:
        embed: from texts and task to vectors, blocking; None where the embedder is async alone.
        aembed: the same as a coroutine; None where the embedder is blocking alone, and then runs in a thread.
        space: the vector space, by task.
        limits: how the embedder wants to be called.
    """

    def __init__(
        self,
        *,
        embed: Callable[[list[str], Task], Answer] | None = None,
        aembed: Callable[[list[str], Task], Awaitable[Answer]] | None = None,
        space: Callable[[Task], VectorSpace],
        limits: Limits | None = None,
    ) -> None:
        self.embed: Any = embed
        self.aembed: Any = aembed
        self.limits = limits or Limits()
        self._space = space

    def space(self, task: Task) -> VectorSpace:
        """Return what the wrapper says of the embedder."""
        return self._space(task)

    def close(self) -> None:
        """Do nothing: the embedder belongs to whoever made it."""


def described_space(
    embedder: object,
    fields: Mapping[str, Any],
    *,
    model: str,
    task: Task | None = None,
    leave_out: Collection[str] = (),
) -> VectorSpace:
    """Return the vector space of a framework's embedder, described by its fields.

    Left out are fields that are None, those in :data:`NOT_IN_SPACE` and ``leave_out``, and secrets; a URL loses its
    credentials. ``task`` is given where the embedder treats documents and queries differently. Where ``model`` is a
    folder, its content is what counts: where it lies changes nothing, and weights that change in place do.

    Raises:
        SpaceError: a field holds an object that cannot be described. The message names the field and says how to
            declare the space instead.
    """
    cls = type(embedder)
    kept = {name: item for name, item in fields.items() if name not in NOT_IN_SPACE and name not in leave_out}
    folder = Path(model).expanduser()
    content = digest(folder) if any((folder / name).is_file() for name in ("config.json", "modules.json")) else None
    return VectorSpace(
        provider=f"{cls.__module__}.{cls.__qualname__}",
        model=model if content is None else f"folder:{content[:12]}",
        revision=content,
        task=task,
        extra={name: _plain(item, f"{cls.__name__}.{name}") for name, item in kept.items() if _counts(item)} or None,
    )


def declared_space(space: VectorSpace | Mapping[str, Any], *, task: Task | None = None) -> VectorSpace:
    """Return a vector space that a user has declared, with the task in it where the embedder tells tasks apart."""
    declared = VectorSpace.of(space)
    return declared if task is None or declared.task is not None else replace(declared, task=task)


def _counts(item: Any) -> bool:
    return item is not None and not hasattr(item, "get_secret_value")


def _plain(item: Any, name: str) -> Value:
    """Return a value that a vector space can hold."""
    if isinstance(item, Enum):
        return _plain(item.value, name)
    if isinstance(item, str):
        return _without_credentials(item)
    if item is None or isinstance(item, bool | int | float | bytes):
        return item
    if isinstance(item, Mapping):
        return {str(key): _plain(value, f"{name}.{key}") for key, value in item.items() if _counts(value)}
    if isinstance(item, list | tuple):
        return [_plain(value, f"{name}[{index}]") for index, value in enumerate(item)]
    if isinstance(item, set | frozenset) and all(isinstance(value, str) for value in item):
        return sorted(item)
    raise SpaceError(
        f"{name} is a {type(item).__name__}, of which embedonce cannot tell whether it changes the vectors; declare "
        'what decides them instead: space={"model": "my-model-v2"}, with whatever else does (dimensions, prompt, ...)'
    )


def _without_credentials(text: str) -> str:
    if "://" not in text or "@" not in text:
        return text
    try:
        parts = urlsplit(text)
    except ValueError:
        return text
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
