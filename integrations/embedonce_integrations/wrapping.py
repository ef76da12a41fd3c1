"""The common part of all integrations: the shared cache of a configuration, and a provider that wraps an embedder."""

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
from embedonce.tasks import check_task

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
"""Names of embedder fields that do not affect vectors, collected from all frameworks."""

_SECRET = re.compile(
    r"(^|_)((api|access|account|private|subscription)_?key|secret|password|credentials?|authorization|bearer"
    r"|(api|access|auth|ad|ad_async|hf|session)_token)(_|$)"
)

MODEL_FIELDS = ("model", "model_name", "model_id", "repo_id", "azure_deployment", "deployment")
"""Names of the fields in which embedders keep the name of their model."""


# --- the cache of a configuration -------------------------------------------------------------

_lock = threading.Lock()
_caches: list[tuple[config.Config, weakref.ref[Cache]]] = []
"""The caches in use, each with its configuration. This is a list, because a configuration cannot be
hashed and so cannot be the key of a dict."""


def _renew_lock_in_child() -> None:
    global _lock
    _lock = threading.Lock()  # the old lock may be held by a thread that exists only in the parent


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock_in_child)


def open_shared_cache(source: config.Source | config.Config = None, *, provider: AnyProvider | None = None) -> Cache:
    """Return the cache of a configuration. Equal configurations in one process share their tiers and calls in flight.

    ``source`` is anything that :func:`embedonce.open` accepts, or the result of :func:`embedonce.config.load`. A
    ``provider`` takes the place of ``[provider]`` and computes the vectors that no shared tier has. Callers must not
    close a shared cache; it flushes when the program ends.

    Raises:
        ConfigError: the configuration is invalid.
        SpaceError: the provider describes no vector space.
    """
    loaded = source if isinstance(source, config.Config) else config.load(source, own_provider=provider is not None)
    with _lock:
        _caches[:] = [(known, ref) for known, ref in _caches if (cache := ref()) is not None and not cache.closed]
        cache = next((ref() for known, ref in _caches if known == loaded), None)
        if cache is None:
            cache = config.compose(loaded)
            _caches.append((loaded, weakref.ref(cache)))
    return cache if provider is None else cache.for_provider(provider)


def dump_config(source: config.Source) -> str | dict[str, Any] | None:
    """Return a configuration in a form that a framework can write to a file.

    Raises:
        ConfigError: ``source`` is a dict that holds a secret in plain text.
    """
    if source is None:
        return None
    if not isinstance(source, Mapping):
        return os.fspath(source)
    found = config.secrets_in(source)
    if found:
        raise ConfigError(
            f"{', '.join(found)}: a secret would be written to a file in plain text; use ${{NAME}} to take it from "
            "the environment variable NAME, or pass the path of a TOML file as config"
        )
    # If two components shared one dict, a YAML writer would write the dict once, and then a reference to it.
    return deepcopy(dict(source))


# --- an embedder as a provider ----------------------------------------------------------------


class WrappedProvider:
    """A provider that wraps a framework's embedder.

    Args:
        embed: blocking function that takes texts and a task and returns vectors; None if the embedder is only async.
        aembed: async function that does the same; None if the embedder is only blocking. In that case,
            ``embed`` runs in a thread.
        space: function that takes a task and returns the vector space of that task.
        limits: limits for each call of the embedder.
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
        """Return the embedder's vector space for a task.

        Raises:
            SpaceError: the task is neither "document" nor "query", the only ones that embedders distinguish.
        """
        check_task(task, what="a framework's embedder")
        return self._space(task)

    def close(self) -> None:
        """Do nothing, because the embedder belongs to the caller."""


class WrappedSpaces:
    """The vector spaces of an embedder at the time when it was wrapped.

    Args:
        describe: function that takes a task and returns the vector space of the embedder in its present state.

    Raises:
        SpaceError: the error of ``describe``.
    """

    def __init__(self, describe: Callable[[Task], VectorSpace]) -> None:
        self._describe = describe
        self._spaces = {task: describe(task) for task in _TASKS}

    def __call__(self, task: Task) -> VectorSpace:
        return self._spaces["query" if task == "query" else "document"]

    def check(self, task: Task) -> None:
        """Check that the embedder has not changed since it was wrapped.

        The keys are made from the description that the embedder had when it was wrapped. If the embedder has changed
        since then, its vectors would be stored under the wrong keys.

        Raises:
            SpaceError: a field that may affect vectors has changed.
        """
        then = self(task)
        now = self._describe("query" if task == "query" else "document")
        # Model and revision are not compared, because the embedder reads its weights only once. A later change on disk
        # does not affect its vectors.
        if (now.provider, now.extra) != (then.provider, then.extra):
            before, after = dict(then.extra or {}), dict(now.extra or {})
            names = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
            raise SpaceError(f"{then.provider} was changed after it was wrapped ({', '.join(names)}); wrap it again")


_TASKS: tuple[Task, ...] = ("document", "query")


def describe_space(
    embedder: object,
    fields: Mapping[str, Any],
    *,
    model: str,
    task: Task | None = None,
    leave_out: Collection[str] = (),
) -> VectorSpace:
    """Return the vector space of a framework's embedder, described by ``fields``.

    Secrets, fields that are None and the fields in ``leave_out`` are left out. The fields in :data:`NOT_IN_SPACE` are
    left out at every level of nesting. Credentials are removed from URLs. Pass ``task`` if the embedder treats
    documents and queries differently. If ``model`` is a folder, the digest of the folder's content identifies the
    model. So the vector space stays the same if the folder is moved, and changes if the weights change.

    Raises:
        SpaceError: a field holds an object that cannot be described; or the embedder's class is defined in a script or
            in a function, so that a different class may have the same name. The message names the field or the class,
            and says what to do.
    """
    cls = type(embedder)
    if cls.__module__ == "__main__":
        raise SpaceError(
            f"{cls.__name__} is defined in the script that runs, and another script may define a different class of "
            f"the same name; move the class to a module, or {HOW_TO_DECLARE}"
        )
    if "<locals>" in cls.__qualname__:
        raise SpaceError(
            f"{cls.__name__} is defined in a function, which may define a different class of the same name each time "
            f"it runs; move the class out of the function, or {HOW_TO_DECLARE}"
        )
    kept = {name: item for name, item in fields.items() if name not in leave_out}
    folder = Path(model).expanduser()
    content = digest(folder) if any((folder / name).is_file() for name in ("config.json", "modules.json")) else None
    return VectorSpace(
        provider=f"{cls.__module__}.{cls.__qualname__}",
        model=model if content is None else f"folder:{content[:12]}",
        revision=content,
        task=task,
        extra=_to_plain_fields(kept, cls.__name__) or None,
    )


def describe_by_fields(
    embedder: object, *, task: Task | None = None, overrides: Mapping[str, Any] | None = None
) -> VectorSpace:
    """Return the vector space of an embedder that is a pydantic model or a dataclass, as its fields describe it.

    ``overrides`` are extra values that affect the embedder's vectors. They replace fields of the same name.

    Raises:
        SpaceError: as for :func:`describe_space`; or the embedder is neither a pydantic model nor a dataclass; or the
            embedder names no model and has private attributes, which may affect its vectors.
    """
    cls = type(embedder)
    names = getattr(cls, "model_fields", None)
    if names is None:
        if not dataclasses.is_dataclass(embedder):
            raise SpaceError(f"{cls.__name__} does not say what determines its vectors; {HOW_TO_DECLARE}")
        names = [field.name for field in dataclasses.fields(embedder)]
    fields = {name: getattr(embedder, name, None) for name in names}
    fields |= {**(getattr(embedder, "model_extra", None) or {}), **(overrides or {})}
    found = {name: fields[name] for name in MODEL_FIELDS if isinstance(fields.get(name), str)}
    model = next((name for name in found.values() if name not in ("", "unknown")), None)
    if model is None and getattr(cls, "__private_attributes__", None):
        raise SpaceError(
            f"{cls.__name__} names no model and has private attributes, which may affect its vectors; {HOW_TO_DECLARE}"
        )
    return describe_space(embedder, fields, model=model or cls.__name__, task=task)


def add_request(space: VectorSpace, request: Mapping[str, Any]) -> VectorSpace:
    """Return a vector space with the extra arguments of a call added, because they may change the vectors.

    Raises:
        SpaceError: ``request`` holds an object that cannot be described.
    """
    described = _to_plain_fields(request, "the call's")
    return replace(space, extra={**(space.extra or {}), "request": described}) if described else space


def resolve_declared_space(space: VectorSpace | Mapping[str, Any], *, task: Task | None = None) -> VectorSpace:
    """Return a vector space that a user declared. ``task`` is added unless the space already has a task."""
    declared = VectorSpace.of(space)
    return declared if task is None or declared.task is not None else replace(declared, task=task)


HOW_TO_DECLARE = (
    'declare what determines its vectors: space={"model": "my-model-v2"}, plus anything else that changes them '
    "(dimensions, prompt, ...)"
)


def _to_plain_fields(fields: Mapping[Any, Any], owner: str) -> dict[str, Value]:
    """Return the fields of a vector space. Leave out None, secrets and the names in :data:`NOT_IN_SPACE`."""
    return {
        str(name): _to_plain(item, f"{owner}.{name}")
        for name, item in fields.items()
        if item is not None
        and name not in NOT_IN_SPACE
        and not _is_secret(str(name))
        and not hasattr(item, "get_secret_value")
    }


def _to_plain(item: Any, name: str) -> Value:
    """Convert a value to a type that a vector space can hold.

    Raises:
        SpaceError: the value cannot be converted.
    """
    if isinstance(item, Enum):
        return _to_plain(item.value, name)
    if isinstance(item, os.PathLike):
        return str(os.fspath(item))
    if type(item).__module__ == "torch" and type(item).__name__ == "dtype":
        return str(item)
    if isinstance(item, str):
        return _strip_credentials(item)
    if item is None or isinstance(item, bool | int | float | bytes):
        return item
    if isinstance(item, Mapping):
        return _to_plain_fields(item, name)
    if isinstance(item, list | tuple):
        return [_to_plain(value, f"{name}[{index}]") for index, value in enumerate(item)]
    if isinstance(item, set | frozenset) and all(isinstance(value, str) for value in item):
        return sorted(item)
    raise SpaceError(
        f"embedonce cannot tell whether {name} (of type {type(item).__name__}) changes the vectors; {HOW_TO_DECLARE}"
    )


def _is_secret(name: str) -> bool:
    return _SECRET.search(name.lower().replace("-", "_")) is not None


def _strip_credentials(text: str) -> str:
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
    """Return whether ``client`` is the ``embeddings`` attribute of an ``openai`` client, blocking or async."""
    return any(cls.__module__ == "openai.resources.embeddings" for cls in type(client).__mro__)


class OrderedEmbeddings:
    """The ``embeddings`` of an OpenAI client. Each answer is sorted into the order of the input.

    Frameworks take the items of an answer as they come and ignore their ``index``. If a vector were missing,
    superfluous or out of order, the cache would store vectors for the wrong texts.
    """

    def __init__(self, resource: Any) -> None:
        self._resource = resource

    def __getattr__(self, name: str) -> Any:
        return getattr(self._resource, name)

    def create(self, **request: Any) -> Any:
        """Like the client's ``create``, but with a sorted answer. Returns a coroutine if the client's ``create`` does.

        Raises:
            ProviderError: the answer does not say which vector belongs to which input.
        """
        given = request["input"]
        texts = 1 if isinstance(given, str) or (given and isinstance(given[0], int)) else len(given)
        answer = self._resource.create(**request)
        return _await_and_sort(answer, texts) if inspect.isawaitable(answer) else _sort_answer(answer, texts)


class OrderedClient:
    """The part of an OpenAI client that embedders use: its ``embeddings``, wrapped in :class:`OrderedEmbeddings`."""

    def __init__(self, client: Any) -> None:
        self.embeddings = OrderedEmbeddings(client.embeddings)


async def _await_and_sort(answer: Awaitable[Any], texts: int) -> Any:
    return _sort_answer(await answer, texts)


def _sort_answer(answer: Any, texts: int) -> Any:
    items = list(answer.data or ())
    by_index = {getattr(item, "index", None): item for item in items}
    if by_index.keys() == {None}:  # without indexes, assume that the vectors are in the order of the texts
        by_index = dict(enumerate(items))
    if len(items) != texts or by_index.keys() != set(range(texts)):
        raise ProviderError(
            f"the indexes in the endpoint's answer do not say which vector belongs to which input; inputs: {texts}, "
            f"vectors: {len(items)}; nothing was stored"
        )
    answer.data = [by_index[index] for index in range(texts)]
    return answer
