"""Providers that call a user's function, which turns texts into vectors. The user declares the vector space."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from types import UnionType
from typing import Annotated, Any, Literal, TypeAlias, Union, cast, get_args, get_origin

from .contracts import AnyProvider, Embedded, Limits, Task, Vectors
from .errors import ProviderError, SpaceError
from .keys import VectorSpace
from .tasks import TASKS, check_task

Answer: TypeAlias = Vectors | Embedded
Function: TypeAlias = Callable[..., Answer] | Callable[..., Awaitable[Answer]]
"""A sync or async function ``list[str] -> vectors``. A function with a parameter ``task`` also gets the task.

If this parameter is annotated with ``Literal["document", "query", …]``, the function knows only these tasks. Otherwise,
it gets any task, except one that looks like a misspelled "document" or "query".
"""
Space: TypeAlias = VectorSpace | Mapping[str, Any]


class _FunctionBase:
    """Base of both function providers: the declared space, the limits, and the tasks that the function takes."""

    def __init__(self, function: Callable[..., Any], space: Space | None, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        parameter = _find_task_parameter(function)
        self._takes_task = parameter is not None
        names, self._accepts_others = ((), True) if parameter is None else _read_known_tasks(parameter.annotation)
        self._known_tasks: Collection[str] = names or TASKS
        self._space = _require_space(space)
        if self._takes_task and self._space.task is not None:
            raise SpaceError(
                'the function takes "task", so embedonce adds the task to the space; remove "task" from space='
            )

    def space(self, task: Task) -> VectorSpace:
        """Return the declared space; it includes the task if the function takes the task.

        Raises:
            SpaceError: the function does not know the task.
        """
        # A cache describes the space of each default task, even if no text is embedded for it.
        if task not in TASKS:
            self._check_task(task)
        return replace(self._space, task=task) if self._takes_task else self._space

    def _check_task(self, task: Task) -> None:
        check_task(
            task,
            self._known_tasks,
            what="the function",
            accepts_others=self._accepts_others,
            advice="To name the tasks that the function knows, annotate its parameter: task: Literal[...]",
        )

    def close(self) -> None:
        """Do nothing, because a function needs no closing."""


class FunctionProvider(_FunctionBase):
    """A provider that calls a function with a ``list[str]``, and with the task if the function takes it.

    A function without a parameter named ``task`` is symmetric: documents and queries share their vectors.
    """

    def __init__(self, function: Callable[..., Answer], space: Space | None, limits: Limits | None = None) -> None:
        super().__init__(function, space, limits)
        self._function = function

    def embed(self, texts: Sequence[str], task: Task) -> Answer:
        """Return the function's answer for the texts. The engine checks the answer.

        Raises:
            SpaceError: the function does not know the task.
            TypeError: the function returned a coroutine, although it is not declared with ``async def``.
        """
        self._check_task(task)
        answer = self._function(list(texts), task=task) if self._takes_task else self._function(list(texts))
        if inspect.isawaitable(answer):
            if inspect.iscoroutine(answer):
                answer.close()
            raise TypeError(
                "the function returned an awaitable; declare the function with async def, so that embedonce awaits it"
            )
        return answer


class AsyncFunctionProvider(_FunctionBase):
    """A provider that calls an async function; otherwise like :class:`FunctionProvider`."""

    def __init__(
        self, function: Callable[..., Awaitable[Answer]], space: Space | None, limits: Limits | None = None
    ) -> None:
        super().__init__(function, space, limits)
        self._function = function

    async def aembed(self, texts: Sequence[str], task: Task) -> Answer:
        """Return the function's answer for the texts. The engine checks the answer.

        Raises:
            SpaceError: the function does not know the task.
        """
        self._check_task(task)
        return await (self._function(list(texts), task=task) if self._takes_task else self._function(list(texts)))


class NoProvider:
    """A placeholder that computes nothing. Use it to inspect or purge tiers, or to call :meth:`Cache.for_provider`."""

    limits = Limits(lease=False)

    def space(self, task: Task) -> VectorSpace:
        """Return a space that has no vectors."""
        return VectorSpace(provider="none", model="none")

    def embed(self, texts: Sequence[str], task: Task) -> Answer:
        """Raise an error.

        Raises:
            ProviderError: always.
        """
        raise ProviderError(
            "this cache has no provider, so it cannot compute vectors; add [provider] to the configuration, or pass a "
            "provider to open() or compose()"
        )

    def close(self) -> None:
        """Do nothing."""


def wrap(source: AnyProvider | Function, space: Space | None = None, limits: Limits | None = None) -> AnyProvider:
    """Return ``source`` if it is a provider, else a provider that calls ``source``.

    Raises:
        SpaceError: ``source`` is a function, but no space was given. Or a space or limits were given, but ``source``
            is a provider, which has its own space and limits.
        TypeError: ``source`` is neither a provider nor a function.
    """
    if isinstance(source, type):
        raise TypeError(f"{source.__name__} is a class; pass an instance of it, {source.__name__}(...)")
    if _is_provider(source):
        if space is not None or limits is not None:
            raise SpaceError(
                f"{type(source).__name__} is a provider and describes its own space and limits; "
                "remove space= and limits="
            )
        return cast("AnyProvider", source)
    if not callable(source):
        raise TypeError(
            f"{type(source).__name__} is neither a provider (space, limits, embed or aembed, close) nor a function. "
            "Pass a function that takes a list of texts and returns their vectors, for example "
            'Cache(lambda texts: model.encode(texts), space={"model": "my-model-v2"})'
        )
    if _is_async(source):
        return AsyncFunctionProvider(cast("Callable[..., Awaitable[Answer]]", source), space, limits)
    return FunctionProvider(cast("Callable[..., Answer]", source), space, limits)


def _require_space(space: Space | None) -> VectorSpace:
    if space is None:
        raise SpaceError(
            'a function does not describe its vector space; pass space={"model": "my-model-v2"} with the name and '
            "version of the model, and add everything else that changes the vectors (dimensions, prompt, normalize, "
            "...)"
        )
    return VectorSpace.of(space)


def _is_provider(source: object) -> bool:
    return callable(getattr(source, "space", None)) and (hasattr(source, "embed") or hasattr(source, "aembed"))


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _find_task_parameter(function: Callable[..., Any]) -> inspect.Parameter | None:
    """Return the function's parameter ``task``. The first parameter does not count, because it gets the texts.

    ``**kwargs`` does not count as such a parameter. If the function is a partial with a keyword argument ``task``, its
    parameter ``task`` does not count either.
    """
    if isinstance(function, functools.partial) and "task" in function.keywords:
        return None
    try:
        parameters = list(_read_signature(function).parameters.values())
    except (TypeError, ValueError):  # a C function may have no signature
        return None
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return next((p for p in parameters[1:] if p.name == "task" and p.kind in kinds), None)


def _read_signature(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a function with its annotations evaluated, or as strings if they cannot be evaluated."""
    try:
        return inspect.signature(function, eval_str=True)
    except Exception:  # noqa: BLE001  (an annotation may name something that is imported only for type checkers)
        return inspect.signature(function)


def _read_known_tasks(annotation: Any) -> tuple[Sequence[str], bool]:
    """Return the tasks that an annotation of the parameter ``task`` names, and whether it allows other tasks too."""
    annotation = getattr(annotation, "__value__", annotation)  # the right side of a ``type`` statement
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return [name for name in args if isinstance(name, str)], False
    if origin is Annotated:
        return _read_known_tasks(args[0])
    if origin in (Union, UnionType):
        parts = [_read_known_tasks(part) for part in args if part is not type(None)]
        return [name for names, _ in parts for name in names], any(others for _, others in parts)
    return [], True
