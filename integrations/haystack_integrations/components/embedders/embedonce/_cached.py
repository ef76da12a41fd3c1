"""The common part of both components, which puts a cache in front of a Haystack embedder."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, ClassVar

from haystack import component, default_from_dict, default_to_dict
from haystack.core.serialization import component_to_dict

from embedonce import Cache, Embedded, Fetched, Limits, SpaceError, TextRefused
from embedonce.contracts import Task
from embedonce_integrations.composite_texts import join_keywords, split_all, split_keywords
from embedonce_integrations.wrapping import (
    WrappedProvider,
    WrappedSpaces,
    add_request,
    dump_config,
    open_shared_cache,
)

from ._copying import copy_embedder, pack_embedder, unpack_embedder
from ._described import describe_component
from ._loaded import drop_stale_models, remember_content

CHUNK = 256
"""Number of texts per call of the embedder, rounded up to whole batches. The vectors of a call are stored when the call
returns."""


class NotEmbedded(TextRefused):
    """Raised if the embedder returned no embedding for some texts. The embedder has logged the reason."""


@dataclass(slots=True)
class Run:
    """One call of ``run``: the extra arguments for the embedder, and what the embedder has answered so far."""

    extra: Mapping[str, Any]
    """The arguments of the embedder other than the texts, without those that have one value per text."""
    per_text: Collection[str] = ()
    """Names of the arguments that have one value per text. Their values are joined with the texts."""
    metas: list[Mapping[str, Any]] = field(default_factory=list)
    vectors: dict[str, Any] = field(default_factory=dict)
    """Vectors by text. If one text of a call fails, the vectors of the other texts are kept here until the engine asks
    for them again."""
    tokens: int | None = None
    model: str | None = None
    """The model that the last answer named."""

    def add_answer(self, answer: Mapping[str, Any], vectors: Mapping[str, Any], model: str | None) -> None:
        """Record an answer of the embedder, its vectors, and the name of the model that the endpoint sent."""
        self.vectors.update(vectors)
        meta = answer.get("meta") or {}
        self.metas.append(meta)
        named = model or meta.get("model")
        self.model = named if isinstance(named, str) and named else None
        tokens = (meta.get("usage") or {}).get("total_tokens")
        if isinstance(tokens, int):
            self.tokens = (self.tokens or 0) + tokens

    def take_vectors(self, texts: Sequence[str]) -> Embedded:
        """Remove and return the vectors of texts.

        Raises:
            NotEmbedded: some texts have no vector.
        """
        failed = [position for position, text in enumerate(texts) if text not in self.vectors]
        if failed:
            raise NotEmbedded(f"the embedder returned no embedding for {len(failed)} of {len(texts)} texts", failed)
        tokens, self.tokens = self.tokens, None
        return Embedded([self.vectors.pop(text) for text in texts], tokens, self.model)


_current_run: ContextVar[Run] = ContextVar("embedonce_haystack_run")
"""The run for which the engine calls the embedder. The engine's threads and asyncio tasks copy the caller's context, so
they see this run."""


@contextmanager
def _set_current_run(run: Run) -> Iterator[Run]:
    token = _current_run.set(run)
    try:
        yield run
    finally:
        _current_run.reset(token)


class CachedEmbedder:
    """Looks up the vectors of texts. If a text has no vector in the tiers, the embedder or ``[provider]`` embeds it."""

    _task: ClassVar[Task]
    _input: ClassVar[str]
    """Name of the parameter of ``run`` that takes the texts. The wrapped component's ``run`` uses the same name."""
    _output: ClassVar[str]
    """Key of the vectors in the result of ``run``. The wrapped component's ``run`` uses the same key."""

    def __init__(
        self, embedder: Any, config: Any, space: Mapping[str, Any] | None, ignore: Collection[str] | None
    ) -> None:
        if isinstance(embedder, type):
            raise TypeError(f"{embedder.__name__} is a class; pass an instance, such as {embedder.__name__}(...)")
        for name, value in (("space", space), ("ignore", ignore)):
            if embedder is None and value is not None:
                raise TypeError(
                    f"{name}= can only be used with an embedder; without one, the [provider] of the configuration "
                    "describes its own vector space"
                )
        if isinstance(ignore, str):
            raise TypeError(f'ignore must be a list of names, such as ["{ignore}"]')
        sockets: Any = getattr(embedder, "__haystack_input__", ())
        outputs = getattr(embedder, "__haystack_output__", ())
        if embedder is not None and not (self._input in sockets and self._output in outputs):
            raise TypeError(
                f"{type(self).__name__} requires a Haystack component with a method run that takes {self._input!r} "
                f"and returns {self._output!r}, got {type(embedder).__name__}"
            )
        self.embedder: Any = embedder
        self.config = config
        self.space = space
        self.ignore = None if ignore is None else list(ignore)
        self._reset()
        self._parameters = [] if embedder is None else _extra_parameters(embedder, self._input)
        for parameter in self._parameters:
            socket = sockets.get(parameter.name)
            if socket is not None:
                component.set_input_type(self, socket.name, socket.type, socket.default_value)  # type: ignore[arg-type]

    def _reset(self) -> None:
        """Set what belongs to this process and not to the configuration."""
        self._lock = threading.Lock()
        self._cache: Cache | None = None
        self._spaces: WrappedSpaces | None = None
        self._is_warm = False

    # --- copies -------------------------------------------------------------------------------

    def __copy__(self) -> Any:
        """Return a component with the same embedder. It opens the cache by itself."""
        return self._rebuild(self._read_state())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return a component with a copy of the embedder, or the same embedder if it cannot be copied."""
        state = self._read_state()
        embedder = copy_embedder(state.pop("embedder"), memo)
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__({**deepcopy(state, memo), "embedder": embedder})
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """Return the state from which another process rebuilds this component.

        Raises:
            SpaceError: the embedder can be neither pickled nor made again from its ``to_dict``.
        """
        state = self._read_state()
        return {**state, "embedder": pack_embedder(state["embedder"])}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, embedder=unpack_embedder(state["embedder"]))
        self._reset()

    def _read_state(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _OF_PROCESS}

    def _rebuild(self, state: dict[str, Any]) -> Any:
        copied = type(self).__new__(type(self))
        copied.__setstate__(state)
        return copied

    # --- the component's life -----------------------------------------------------------------

    def warm_up(self) -> None:
        """Open the cache. The embedder itself is warmed up at the first miss.

        Raises:
            ConfigError: the configuration is invalid.
            SpaceError: the embedder cannot be described.
        """
        if self._cache is None:  # checked without the lock, so that a hit does not wait while the embedder warms up
            with self._lock:
                if self._cache is None:
                    self._cache = self._open_cache()

    async def warm_up_async(self) -> None:
        """Async twin of :meth:`warm_up`."""
        if self._cache is None:
            await asyncio.to_thread(self.warm_up)

    def close(self) -> None:
        """Wait for background writes, and call the embedder's ``close`` if it exists. The component stays usable."""
        if self._cache is not None:
            self._cache.flush()
        if hasattr(self.embedder, "close"):
            self.embedder.close()
        self._is_warm = False

    async def close_async(self) -> None:
        """Async twin of :meth:`close`."""
        if self._cache is not None:
            await self._cache.aflush()
        if hasattr(self.embedder, "close_async"):
            await self.embedder.close_async()
        elif hasattr(self.embedder, "close"):
            await asyncio.to_thread(self.embedder.close)
        self._is_warm = False

    def _to_dict(self, **more: Any) -> dict[str, Any]:
        """Serialize the component and its embedder.

        Raises:
            ConfigError: ``config`` is a dict that holds a secret in plain text.
        """
        embedder = None if self.embedder is None else component_to_dict(self.embedder, "embedder")
        return default_to_dict(
            self,
            embedder=embedder,
            config=dump_config(self.config),
            space=deepcopy(self.space),
            ignore=None if self.ignore is None else list(self.ignore),
            **more,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Any:
        """Construct the component from the result of ``to_dict``."""
        return default_from_dict(cls, data)

    # --- one run ------------------------------------------------------------------------------

    def _fetch(self, texts: list[str], given: Mapping[str, Any]) -> tuple[Fetched, dict[str, Any]]:
        """Return the vectors of texts, and the ``meta`` of the answer."""
        self._bind_arguments(given)
        self.warm_up()
        cache, texts, run = self._prepare_run(texts, given)
        with _set_current_run(run):
            fetched = cache.fetch(texts, self._task)
        return fetched, _make_meta(fetched, run)

    async def _afetch(self, texts: list[str], given: Mapping[str, Any]) -> tuple[Fetched, dict[str, Any]]:
        self._bind_arguments(given)
        await self.warm_up_async()
        cache, texts, run = self._prepare_run(texts, given)
        with _set_current_run(run):
            fetched = await cache.afetch(texts, self._task)
        return fetched, _make_meta(fetched, run)

    def _prepare_run(self, texts: list[str], given: Mapping[str, Any]) -> tuple[Cache, list[str], Run]:
        """Return the cache for a run, the texts, joined with the arguments that each text has, and the run.

        Raises:
            SpaceError: an argument has as many values as there are texts, so they may belong to one text each.
            ValueError: an argument that has one value per text has not as many values as there are texts.
        """
        per_text, _ = split_keywords(given, texts)
        extra = {name: value for name, value in self._bind_arguments(given).items() if name not in per_text}
        cache = self._cache_for(extra, per_text)
        if per_text:
            texts = join_keywords(texts, per_text, cache.normalize)
        return cache, texts, Run(extra, tuple(per_text))

    def _bind_arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of the embedder's ``run`` other than the texts, with defaults filled in.

        Raises:
            TypeError: the embedder's ``run`` does not accept these arguments.
        """
        try:
            bound = inspect.Signature(self._parameters).bind(**given)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}.run: {error}") from None
        bound.apply_defaults()
        return dict(bound.kwargs)

    def _cache_for(self, extra: Mapping[str, Any], per_text: Collection[str]) -> Cache:
        """Return the cache for a run. The embedder's extra arguments are part of the vector space."""
        assert self._cache is not None
        if not per_text and extra == self._default_arguments():
            return self._cache
        return self._cache.for_provider(self._make_provider(extra, per_text))

    def _default_arguments(self) -> dict[str, Any]:
        return {one.name: one.default for one in self._parameters if one.default is not one.empty}

    def _open_cache(self) -> Cache:
        if self.embedder is None:
            return open_shared_cache(self.config)
        describe = describe_component(self.embedder, space=self.space, ignore=self.ignore or ())
        self._spaces = WrappedSpaces(describe)
        return open_shared_cache(self.config, provider=self._make_provider(self._default_arguments()))

    # --- the embedder as a provider -----------------------------------------------------------

    def _make_provider(self, extra: Mapping[str, Any], per_text: Collection[str] = ()) -> WrappedProvider:
        assert self._spaces is not None
        request = {**extra, "one value per text": sorted(per_text)} if per_text else extra
        space = add_request(self._spaces(self._task), request)
        size = getattr(self.embedder, "batch_size", None)
        size = size if isinstance(size, int) and size > 0 else CHUNK
        return WrappedProvider(
            embed=self._embed,
            aembed=self._aembed if hasattr(self.embedder, "run_async") else None,
            space=lambda task: space,
            limits=Limits(max_batch=-(-CHUNK // size) * size),  # whole batches
        )

    def _embed(self, texts: list[str], task: Task) -> Embedded:
        assert self._spaces is not None
        run = _current_run.get()
        for part, arguments in self._split_into_calls(run, texts):
            with self._spaces.calling(self._task) as answers:
                self._warm_up_embedder()
                answer = self.embedder.run(**arguments)
            run.add_answer(answer, self._read_vectors(part, answer), answers.model)
        return run.take_vectors(texts)

    async def _aembed(self, texts: list[str], task: Task) -> Embedded:
        assert self._spaces is not None
        run = _current_run.get()
        for part, arguments in self._split_into_calls(run, texts):
            with self._spaces.calling(self._task) as answers:
                await self._warm_up_embedder_async()
                answer = await self.embedder.run_async(**arguments)
            run.add_answer(answer, self._read_vectors(part, answer), answers.model)
        return run.take_vectors(texts)

    def _split_into_calls(self, run: Run, texts: list[str]) -> list[tuple[list[str], dict[str, Any]]]:
        """Return one pair per call of the embedder's ``run``: the texts as the cache has them, and the arguments.

        Texts whose vector has already been computed in this run are left out.
        """
        todo = [text for text in texts if text not in run.vectors]
        plain, values = split_all(todo) if run.per_text else (todo, {})
        return [
            (
                todo[part],
                {
                    self._input: self._make_input(plain[part]),
                    **run.extra,
                    **{name: value[part] for name, value in values.items()},
                },
            )
            for part in self._cut(len(todo))
        ]

    def _cut(self, texts: int) -> list[slice]:
        """Return the texts of each call of the embedder's ``run``, as slices of all texts."""
        raise NotImplementedError

    def _make_input(self, texts: list[str]) -> Any:
        """Return the argument of the embedder's ``run`` that holds the texts of one call."""
        raise NotImplementedError

    def _read_vectors(self, texts: list[str], answer: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer's vectors as a dict from texts to vectors. Leave out texts whose vector is None.

        Raises:
            ProviderError: the answer does not show which vector belongs to which text.
        """
        raise NotImplementedError

    def _warm_up_embedder(self) -> None:
        with self._lock:
            if not self._is_warm:
                content = self._find_content()
                if hasattr(self.embedder, "warm_up"):
                    drop_stale_models(self.embedder, content)
                    self.embedder.warm_up()
                self._check_model()
                remember_content(self.embedder, content)
                self._is_warm = True

    async def _warm_up_embedder_async(self) -> None:
        if not hasattr(self.embedder, "warm_up_async"):
            await asyncio.to_thread(self._warm_up_embedder)
            return
        await self.embedder.warm_up_async()  # in every call, because each event loop needs its own client
        if not self._is_warm:
            await asyncio.to_thread(self._check_model)
            self._is_warm = True

    def _find_content(self) -> str | None:
        """Return the digest of the model's folder when the cache was opened, or None if the model is not a folder."""
        assert self._spaces is not None
        return self._spaces(self._task).revision if self.space is None else None

    def _check_model(self) -> None:
        assert self._spaces is not None
        then = self._spaces(self._task)
        now = describe_component(self.embedder, space=self.space, ignore=self.ignore or ())(self._task)
        if (then.model, then.revision) != (now.model, now.revision):
            raise SpaceError("the embedder's model has changed since the cache was opened; make a new component")


_OF_PROCESS = ("_lock", "_cache", "_spaces", "_is_warm")
"""Attributes of a component that are not copied or pickled."""


def _extra_parameters(embedder: Any, texts: str) -> list[inspect.Parameter]:
    """Return the parameters of an embedder's ``run`` other than the texts, as keyword-only parameters."""
    kept = []
    for parameter in inspect.signature(embedder.run).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            kept.append(parameter)
        elif parameter.name != texts and parameter.kind is not parameter.VAR_POSITIONAL:
            kept.append(parameter.replace(kind=parameter.KEYWORD_ONLY))
    return kept


def _make_meta(fetched: Fetched, run: Run) -> dict[str, Any]:
    """Merge the ``meta`` of all calls of the embedder, and add ``cache``.

    ``cache`` counts the hits by tier, the imported texts if there are any, the computed vectors and the failed texts.
    """
    sources = Counter(source for i, source in enumerate(fetched.sources) if i not in fetched.imported)
    failed = sources.pop(None, 0)
    sources.pop("provider", None)
    # Count distinct rows, because equal texts are embedded only once and share one row.
    computed = {id(row) for row, source in zip(fetched.rows, fetched.sources, strict=True) if source == "provider"}
    meta: dict[str, Any] = {"model": fetched.space.model}
    for answered in run.metas:
        usage = _add_usage(meta.get("usage"), answered.get("usage"))
        meta |= answered if usage is None else {**answered, "usage": usage}
    imported = {"imported": len(fetched.imported)} if fetched.imported else {}
    return meta | {"cache": {"hits": dict(sources), **imported, "computed": len(computed), "failed": failed}}


def _add_usage(one: Any, other: Any) -> Any:
    """Add two usages. Numbers with the same name are added up."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return {name: _add_usage(one.get(name), other.get(name)) for name in {**one, **other}}
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one + other
    return one if other is None else other
