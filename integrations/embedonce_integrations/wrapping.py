"""The common part of all integrations: the shared cache of a configuration, and a provider that wraps an embedder."""

from __future__ import annotations

import os
import pickle
import threading
import weakref
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any, Self, TypeAlias

from embedonce import Cache, ConfigError, Limits, SpaceError, VectorSpace, config
from embedonce.contracts import AnyProvider, Embedded, Task, Vectors
from embedonce.tasks import check_task

from ._description_changes import list_differences
from .describing import describe_embedder, describe_request, refuse_tied_settings
from .openai_answers import AnswersRead, reading_answers

Answer: TypeAlias = Vectors | Embedded

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


def keep_source(source: config.Source, loaded: config.Config) -> config.Source:
    """Return a configuration in a form from which a copy or another process can load the same configuration.

    The path of the file that was found is kept, because another process may look for the file in a different folder.
    """
    return loaded.file or (deepcopy(dict(source)) if isinstance(source, Mapping) else source)


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
        self._known = {task: _extra_of(space) for task, space in self._spaces.items()}
        self._running = 0
        self._lock = threading.Lock()

    def __call__(self, task: Task) -> VectorSpace:
        return self._spaces[_side(task)]

    def check(self, task: Task) -> None:
        """Check that the embedder has not changed since it was wrapped.

        The keys are made from the description that the embedder had when it was wrapped. If the embedder has changed
        since then, its vectors would be stored under the wrong keys.

        Raises:
            SpaceError: a field that may affect vectors has changed.
        """
        self._check(_side(task), is_calling=False)

    @contextmanager
    def calling(self, task: Task) -> Iterator[AnswersRead]:
        """Check the embedder before and after it is called in the ``with`` block, and read the answers that it gets.

        An embedder may write down what it does. So a number or a collection that has grown by the end of the block is
        no change if its name says that it is a record, such as ``calls`` or ``usage``. A field that was None may be
        filled with anything except a text. Everything else is a change, and then the vectors must not be stored.

        Raises:
            SpaceError: a field that may affect vectors has changed.
            ProviderError: an answer of an OpenAI client does not say which vector belongs to which text.
        """
        side = _side(task)
        self._check(side, is_calling=False)
        with self._lock:
            self._running += 1
        try:
            with reading_answers() as read:
                yield read
            self._check(side, is_calling=True)
        finally:
            with self._lock:
                self._running -= 1

    def _check(self, side: Task, *, is_calling: bool) -> None:
        now = self._describe(side)
        with self._lock:
            may_grow = is_calling or self._running > 0
            # Model and revision are not compared, because the embedder reads its weights only once. A later change on
            # disk does not affect its vectors.
            changes = list_differences(self._known[side], _extra_of(now))
            names = [
                change.path
                for change in changes
                if not (may_grow and change.may_grow and _has_grown(change.then, change.now))
            ]
            if not names:
                if changes:
                    self._known = {task: _extra_of(self._describe(task)) for task in _TASKS}
                return
        what = f"{now.provider} was changed after it was wrapped"
        if is_calling:
            what = f"{now.provider} changed while it computed vectors, so nothing was stored"
        raise SpaceError(
            f"{what} ({', '.join(names)}); wrap it again, or pass ignore=[...] with these names if they do not affect "
            "the vectors"
        )


_TASKS: tuple[Task, ...] = ("document", "query")


def _side(task: Task) -> Task:
    return "query" if task == "query" else "document"


def _extra_of(space: VectorSpace) -> dict[str, Any]:
    return dict(space.extra or {})


def _has_grown(before: Any, after: Any) -> bool:
    """Return whether a value has grown: a larger number, a longer list, or a mapping with more keys or larger values.

    Nothing can grow into a number or a collection, but not into a text, because a text may be the name of a model.
    """
    if isinstance(before, str | bool) or isinstance(after, str | bool):
        return bool(before == after)
    if before is None:
        return after is not None
    if isinstance(before, int | float) and isinstance(after, int | float):
        return after >= before
    if isinstance(before, list) and isinstance(after, list):
        return len(after) >= len(before) and all(map(_has_grown, before, after))
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        return before.keys() <= after.keys() and all(_has_grown(value, after[name]) for name, value in before.items())
    is_equal = bool(before == after)
    return type(before) is type(after) and is_equal


def make_describer(
    embedder: object,
    *,
    space: VectorSpace | Mapping[str, Any] | None = None,
    ignore: Collection[str] = (),
    has_tasks: bool = True,
    more: Callable[[], Mapping[str, Any]] = dict,
) -> Callable[[Task], VectorSpace]:
    """Return a function that takes a task and returns the vector space of an embedder in its present state.

    Args:
        embedder: the embedder.
        space: the vector space that the user has declared; None if the embedder describes itself. Settings that make a
            vector depend on the other texts of its batch are refused in both cases.
        ignore: names of the embedder's fields that the user knows to be irrelevant.
        has_tasks: whether the embedder treats documents and queries differently.
        more: function that returns values that affect the vectors and that the embedder does not hold.
    """

    def describe(task: Task) -> VectorSpace:
        space_task = task if has_tasks else None
        if space is None:
            return describe_embedder(embedder, task=space_task, ignore=ignore, more=more())
        refuse_tied_settings(embedder, ignore)
        return resolve_declared_space(space, task=space_task)

    return describe


class Rebuilt:
    """A wrapper that is copied and pickled as its embedder and its arguments. Each process makes a cache of its own."""

    _embedder: Any
    """The embedder; None if the ``[provider]`` computes the vectors."""
    _arguments: dict[str, Any]
    """The arguments besides the embedder."""

    def _describe_spaces(self, embedder: Any) -> Callable[[Task], VectorSpace]:
        """Return the result of :func:`make_describer` for the wrapper's arguments and an embedder."""
        raise NotImplementedError

    def __copy__(self) -> Self:
        return type(self)(self._embedder, **self._arguments)  # type: ignore[call-arg]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Copies share the embedder, as they share the tiers, because connections cannot be copied.
        return type(self)(self._embedder, **deepcopy(self._arguments, memo))  # type: ignore[call-arg]

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what another process rebuilds the wrapper from.

        Raises:
            SpaceError: the embedder cannot be pickled, or would make different vectors in that process.
        """
        if self._embedder is not None:
            check_pickling(self._embedder, self._describe_spaces)
        return _rebuild, (type(self), self._embedder, self._arguments)


def _rebuild(cls: type[Any], embedder: Any, arguments: dict[str, Any]) -> Any:
    return cls(embedder, **arguments)


def check_pickling(embedder: Any, describe_spaces: Callable[[Any], Callable[[Task], VectorSpace]]) -> None:
    """Check that an embedder can be pickled, and that pickling loses nothing that determines its vectors.

    The check is made while pickling and not while unpickling, because a multiprocessing pool hangs if a worker cannot
    unpickle its work.

    Args:
        embedder: the embedder.
        describe_spaces: function that returns the result of :func:`make_describer` for an embedder.

    Raises:
        SpaceError: pickling fails or changes the embedder.
    """
    name = type(embedder).__name__
    try:
        copy = pickle.loads(pickle.dumps(embedder))
    except Exception as error:
        raise SpaceError(
            f"cannot pickle {name} ({type(error).__name__}); construct it, and its cache, in the process that uses it"
        ) from error
    if any(describe_spaces(copy)(task) != describe_spaces(embedder)(task) for task in _TASKS):
        raise SpaceError(
            f"{name} would make different vectors in another process, because pickling loses a part of it; construct "
            "it, and its cache, in the process that uses it"
        )


def add_request(space: VectorSpace, request: Mapping[str, Any]) -> VectorSpace:
    """Return a vector space with the extra arguments of a call added, because they may change the vectors.

    Raises:
        SpaceError: ``request`` holds an object that cannot be described, or a setting that makes a vector depend on the
            other texts of its batch.
    """
    described = describe_request(request)
    return replace(space, extra={**(space.extra or {}), "request": described}) if described else space


def resolve_declared_space(space: VectorSpace | Mapping[str, Any], *, task: Task | None = None) -> VectorSpace:
    """Return a vector space that a user declared. ``task`` is added unless the space already has a task."""
    declared = VectorSpace.of(space)
    return declared if task is None or declared.task is not None else replace(declared, task=task)
