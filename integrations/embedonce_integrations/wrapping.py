"""What every integration stands on: a configuration's shared cache, and a framework's embedder as a provider."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import threading
import weakref
from collections.abc import Awaitable, Callable, Collection, Mapping
from copy import deepcopy
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit, urlunsplit

from embedonce import Cache, ConfigError, Limits, ProviderError, SpaceError, VectorSpace, config
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
        "cookies",
        "default_headers",
        "device",
        "embed_batch_size",
        "embeddings_cache",
        "encoding_format",
        "extra_headers",
        "headers",
        "http_async_client",
        "http_client",
        "http_client_kwargs",
        "max_retries",
        "num_workers",
        "openai_organization",
        "openai_proxy",
        "organization",
        "progress_bar",
        "rate_limiter",
        "request_timeout",
        "reuse_client",
        "retry_max_seconds",
        "retry_min_seconds",
        "show_progress",
        "show_progress_bar",
        "timeout",
        "token",
        "user",
        "verbose",
    }
)
"""What embedders are given beside what decides their vectors, under the names that frameworks have for it."""

_SECRET = re.compile(
    r"(^|_)((api|access|account|private|subscription)_?key|secret|password|credentials?|authorization|bearer"
    r"|(api|access|auth|ad|ad_async|hf|session)_token)(_|$)"
)

MODEL_FIELDS = ("model", "model_name", "model_id", "repo_id", "azure_deployment", "deployment")
"""Where embedders keep the name of their model."""


# --- the cache of a configuration -------------------------------------------------------------

_lock = threading.Lock()
_open: list[tuple[config.Config, weakref.ref[Cache]]] = []
"""Configurations and their caches, as long as somebody uses them. A list: options cannot be hashed."""


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()  # a thread of the parent may have held it, and is not here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def shared_cache(source: config.Source | config.Config = None, *, provider: AnyProvider | None = None) -> Cache:
    """Return the cache of a configuration; equal configurations in one process share their tiers and flights.

    ``source`` is what :func:`embedonce.open` takes, or what :func:`embedonce.config.load` made of it. A ``provider``
    takes the place of ``[provider]``: the cache that comes back asks it for what the shared tiers do not hold. Nobody
    closes a shared cache; it flushes when the program ends.

    Raises:
        ConfigError: the configuration cannot be used.
        SpaceError: the provider describes no vector space.
    """
    loaded = source if isinstance(source, config.Config) else config.load(source, own_provider=provider is not None)
    with _lock:
        _open[:] = [(known, ref) for known, ref in _open if (cache := ref()) is not None and not cache.closed]
        cache = next((ref() for known, ref in _open if known == loaded), None)
        if cache is None:
            cache = config.compose(loaded)
            _open.append((loaded, weakref.ref(cache)))
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


class WrappedSpaces:
    """The vector spaces of an embedder, as it described itself when it was wrapped.

    Args:
        describe: the vector space, by task, as the embedder is now.

    Raises:
        SpaceError: whatever ``describe`` raises.
    """

    def __init__(self, describe: Callable[[Task], VectorSpace]) -> None:
        self._describe = describe
        self._spaces = {task: describe(task) for task in _TASKS}

    def __call__(self, task: Task) -> VectorSpace:
        return self._spaces["query" if task == "query" else "document"]

    def check(self, task: Task) -> None:
        """See that the embedder still is what it was: what it makes is stored under what it said then.

        Raises:
            SpaceError: a field that may decide vectors has changed.
        """
        then = self(task)
        now = self._describe("query" if task == "query" else "document")
        if (now.provider, now.extra) != (then.provider, then.extra):  # weights are read once, and may change on disk
            before, after = dict(then.extra or {}), dict(now.extra or {})
            names = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
            raise SpaceError(
                f"{then.provider} was changed after it was wrapped ({', '.join(names)}); wrap it anew, "
                "or wrap another one"
            )


_TASKS: tuple[Task, ...] = ("document", "query")


def described_space(
    embedder: object,
    fields: Mapping[str, Any],
    *,
    model: str,
    task: Task | None = None,
    leave_out: Collection[str] = (),
) -> VectorSpace:
    """Return the vector space of a framework's embedder, described by its fields.

    Left out are fields that are None, those in :data:`NOT_IN_SPACE` (in mappings too) and ``leave_out``, and secrets; a
    URL loses its credentials. ``task`` is given where the embedder treats documents and queries differently. Where
    ``model`` is a folder, its content is what counts: where it lies does not, and weights that change in place do.

    Raises:
        SpaceError: a field holds an object that cannot be described, or the class has no name that is its own. The
            message says which, and how to declare the space instead.
    """
    cls = type(embedder)
    if cls.__module__ == "__main__":
        raise SpaceError(
            f"{cls.__name__} is defined in the script that runs, and another script may have another one of that name; "
            f"move it to a module, or {_DECLARE}"
        )
    if "<locals>" in cls.__qualname__:
        raise SpaceError(
            f"{cls.__name__} is defined in a function, which may make another one of that name each time it runs; "
            f"move it out of there, or {_DECLARE}"
        )
    kept = {name: item for name, item in fields.items() if name not in leave_out}
    folder = Path(model).expanduser()
    content = digest(folder) if any((folder / name).is_file() for name in ("config.json", "modules.json")) else None
    return VectorSpace(
        provider=f"{cls.__module__}.{cls.__qualname__}",
        model=model if content is None else f"folder:{content[:12]}",
        revision=content,
        task=task,
        extra=_plain_fields(kept, cls.__name__) or None,
    )


def model_space(embedder: object, *, task: Task | None = None, also: Mapping[str, Any] | None = None) -> VectorSpace:
    """Return the vector space of an embedder that is a pydantic model or a dataclass, as its fields describe it.

    ``also`` is what decides its vectors beside the fields, or in their place.

    Raises:
        SpaceError: as :func:`described_space`, or the embedder is neither, or it keeps what decides its vectors where
            nobody sees it, or its class has no name that is its own.
    """
    cls = type(embedder)
    names = getattr(cls, "model_fields", None)
    if names is None:
        if not dataclasses.is_dataclass(embedder):
            raise SpaceError(f"{cls.__name__} does not say what decides its vectors; {_DECLARE}")
        names = [field.name for field in dataclasses.fields(embedder)]
    fields = {name: getattr(embedder, name, None) for name in names}
    fields |= {**(getattr(embedder, "model_extra", None) or {}), **(also or {})}
    found = {name: fields[name] for name in MODEL_FIELDS if isinstance(fields.get(name), str)}
    model = next((name for name in found.values() if name not in ("", "unknown")), None)
    if model is None and getattr(cls, "__private_attributes__", None):
        raise SpaceError(f"{cls.__name__} names no model and has private attributes; {_DECLARE}")
    return described_space(embedder, fields, model=model or cls.__name__, task=task)


def asked_with(space: VectorSpace, request: Mapping[str, Any]) -> VectorSpace:
    """Return the vector space of calls that are given more than texts: what is in ``request`` may change the vectors.

    Raises:
        SpaceError: it holds an object that cannot be described.
    """
    said = _plain_fields(request, "the call's")
    return replace(space, extra={**(space.extra or {}), "request": said}) if said else space


def declared_space(space: VectorSpace | Mapping[str, Any], *, task: Task | None = None) -> VectorSpace:
    """Return a vector space that a user has declared, with the task in it where the embedder tells tasks apart."""
    declared = VectorSpace.of(space)
    return declared if task is None or declared.task is not None else replace(declared, task=task)


_DECLARE = 'declare it: space={"model": "my-model-v2"}, with whatever else decides them (dimensions, prompt, ...)'


def _plain_fields(fields: Mapping[Any, Any], owner: str) -> dict[str, Value]:
    """Return what a vector space holds of fields: not what is None, a secret, or beside the point."""
    return {
        str(name): _plain(item, f"{owner}.{name}")
        for name, item in fields.items()
        if item is not None
        and name not in NOT_IN_SPACE
        and not _is_secret(str(name))
        and not hasattr(item, "get_secret_value")
    }


def _plain(item: Any, name: str) -> Value:
    """Return a value that a vector space can hold."""
    if isinstance(item, Enum):
        return _plain(item.value, name)
    if isinstance(item, os.PathLike):
        return str(os.fspath(item))
    if type(item).__module__ == "torch" and type(item).__name__ == "dtype":
        return str(item)
    if isinstance(item, str):
        return _without_credentials(item)
    if item is None or isinstance(item, bool | int | float | bytes):
        return item
    if isinstance(item, Mapping):
        return _plain_fields(item, name)
    if isinstance(item, list | tuple):
        return [_plain(value, f"{name}[{index}]") for index, value in enumerate(item)]
    if isinstance(item, set | frozenset) and all(isinstance(value, str) for value in item):
        return sorted(item)
    raise SpaceError(
        f"{name} is a {type(item).__name__}, of which embedonce cannot tell whether it changes the vectors; {_DECLARE}"
    )


def _is_secret(name: str) -> bool:
    return _SECRET.search(name.lower().replace("-", "_")) is not None


def _without_credentials(text: str) -> str:
    if "://" not in text or not ("@" in text or "?" in text):
        return text
    try:
        parts = urlsplit(text)
    except ValueError:
        return text
    query = "&".join(part for part in parts.query.split("&") if not _is_secret(part.partition("=")[0]))
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query))


# --- an OpenAI client inside an embedder ------------------------------------------------------


def is_openai_resource(client: object) -> bool:
    """Return whether this is the ``embeddings`` of a client of the ``openai`` package, blocking or async."""
    return any(cls.__module__ == "openai.resources.embeddings" for cls in type(client).__mro__)


class InOrder:
    """The ``embeddings`` of an OpenAI client, whose answers come in the order of the input, whatever their order was.

    Frameworks take the items of an answer as they come and do not read their ``index``; a vector that is missing, too
    many, or in another's place would be stored under another text.
    """

    def __init__(self, resource: Any) -> None:
        self._resource = resource

    def __getattr__(self, name: str) -> Any:
        return getattr(self._resource, name)

    def create(self, **request: Any) -> Any:
        """As the client's own; a coroutine where that one returns one.

        Raises:
            ProviderError: the answer does not say which vector belongs to which input.
        """
        given = request["input"]
        texts = 1 if isinstance(given, str) or (given and isinstance(given[0], int)) else len(given)
        answer = self._resource.create(**request)
        return _awaited(answer, texts) if inspect.isawaitable(answer) else _in_order(answer, texts)


class ClientInOrder:
    """An OpenAI client, as far as embedders use one: :class:`InOrder` at its ``embeddings``."""

    def __init__(self, client: Any) -> None:
        self.embeddings = InOrder(client.embeddings)


async def _awaited(answer: Awaitable[Any], texts: int) -> Any:
    return _in_order(await answer, texts)


def _in_order(answer: Any, texts: int) -> Any:
    items = list(answer.data or ())
    by_place = {getattr(item, "index", None): item for item in items}
    if by_place.keys() == {None}:  # a server that knows no index answers in order
        by_place = dict(enumerate(items))
    if len(items) != texts or by_place.keys() != set(range(texts)):
        raise ProviderError(
            f"the endpoint answered {texts} inputs with {len(items)} vectors, and their index does not say which is"
            " whose; none was stored"
        )
    answer.data = [by_place[place] for place in range(texts)]
    return answer
