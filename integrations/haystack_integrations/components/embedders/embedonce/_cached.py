"""The common part of both components, which puts a cache in front of a Haystack embedder."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, ClassVar

from haystack import component, default_from_dict, default_to_dict
from haystack.core.serialization import component_to_dict

from embedonce import Cache, Embedded, Fetched, Limits, SpaceError, TextRefused, VectorSpace
from embedonce.contracts import Task
from embedonce_integrations.wrapping import (
    OrderedEmbeddings,
    WrappedProvider,
    dump_config,
    is_openai_resource,
    open_shared_cache,
)

from ._described import describe_call
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
    """The arguments of the embedder other than the texts."""
    metas: list[Mapping[str, Any]] = field(default_factory=list)
    vectors: dict[str, Any] = field(default_factory=dict)
    """Vectors by text. If one text of a call fails, the vectors of the other texts are kept here until the engine asks
    for them again."""
    tokens: int | None = None

    def add_answer(self, answer: Mapping[str, Any], vectors: Mapping[str, Any]) -> None:
        """Record an answer of the embedder and its vectors."""
        self.vectors.update(vectors)
        meta = answer.get("meta") or {}
        self.metas.append(meta)
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
        return Embedded([self.vectors.pop(text) for text in texts], tokens)


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

    def __init__(self, embedder: Any, config: Any, space: Mapping[str, Any] | None) -> None:
        if isinstance(embedder, type):
            raise TypeError(f"{embedder.__name__} is a class; pass an instance, such as {embedder.__name__}(...)")
        if embedder is None and space is not None:
            raise TypeError(
                "space= can only be used with an embedder; without one, the [provider] of the configuration describes "
                "its own vector space"
            )
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
        self._lock = threading.Lock()
        self._cache: Cache | None = None
        self._model: tuple[str, str | None] = ("", None)
        self._is_warm = False
        self._parameters = [] if embedder is None else _extra_parameters(embedder, self._input)
        for parameter in self._parameters:
            socket = sockets.get(parameter.name)
            if socket is not None:
                component.set_input_type(self, socket.name, socket.type, socket.default_value)  # type: ignore[arg-type]

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
            self, embedder=embedder, config=dump_config(self.config), space=deepcopy(self.space), **more
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Any:
        """Construct the component from the result of ``to_dict``."""
        return default_from_dict(cls, data)

    # --- one run ------------------------------------------------------------------------------

    def _fetch(self, texts: list[str], given: Mapping[str, Any]) -> tuple[Fetched, dict[str, Any]]:
        """Return the vectors of texts, and the ``meta`` of the answer."""
        extra = self._bind_arguments(given)
        self.warm_up()
        with _set_current_run(Run(extra)) as run:
            fetched = self._cache_for(extra).fetch(texts, self._task)
        return fetched, _make_meta(fetched, run)

    async def _afetch(self, texts: list[str], given: Mapping[str, Any]) -> tuple[Fetched, dict[str, Any]]:
        extra = self._bind_arguments(given)
        await self.warm_up_async()
        with _set_current_run(Run(extra)) as run:
            fetched = await self._cache_for(extra).afetch(texts, self._task)
        return fetched, _make_meta(fetched, run)

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

    def _cache_for(self, extra: Mapping[str, Any]) -> Cache:
        """Return the cache for a run. The embedder's extra arguments are part of the vector space."""
        assert self._cache is not None
        if extra == self._default_arguments():
            return self._cache
        return self._cache.for_provider(self._make_provider(extra))

    def _default_arguments(self) -> dict[str, Any]:
        return {one.name: one.default for one in self._parameters if one.default is not one.empty}

    def _open_cache(self) -> Cache:
        if self.embedder is None:
            return open_shared_cache(self.config)
        provider = self._make_provider(self._default_arguments())
        self._model = _model_and_revision(provider.space(self._task))
        return open_shared_cache(self.config, provider=provider)

    # --- the embedder as a provider -----------------------------------------------------------

    def _make_provider(self, extra: Mapping[str, Any]) -> WrappedProvider:
        space = self._describe(extra)
        size = getattr(self.embedder, "batch_size", None)
        size = size if isinstance(size, int) and size > 0 else CHUNK
        return WrappedProvider(
            embed=self._embed,
            aembed=self._aembed if hasattr(self.embedder, "run_async") else None,
            space=lambda task: space,
            limits=Limits(max_batch=-(-CHUNK // size) * size),  # whole batches
        )

    def _describe(self, extra: Mapping[str, Any]) -> VectorSpace:
        return describe_call(self.embedder, extra, task=self._task, declared=self.space)

    def _embed(self, texts: list[str], task: Task) -> Embedded:
        run = _current_run.get()
        for part, argument in self._split_into_calls([text for text in texts if text not in run.vectors]):
            self._warm_up_embedder()
            answer = self.embedder.run(**{self._input: argument}, **run.extra)
            run.add_answer(answer, self._read_vectors(part, answer))
        return run.take_vectors(texts)

    async def _aembed(self, texts: list[str], task: Task) -> Embedded:
        run = _current_run.get()
        for part, argument in self._split_into_calls([text for text in texts if text not in run.vectors]):
            await self._warm_up_embedder_async()
            answer = await self.embedder.run_async(**{self._input: argument}, **run.extra)
            run.add_answer(answer, self._read_vectors(part, answer))
        return run.take_vectors(texts)

    def _split_into_calls(self, texts: list[str]) -> list[tuple[list[str], Any]]:
        """Return one pair per call of the embedder's ``run``: the texts, and the argument that holds these texts."""
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
                _, content = self._model
                if hasattr(self.embedder, "warm_up"):
                    drop_stale_models(self.embedder, content)
                    self.embedder.warm_up()
                _sort_answers(self.embedder)
                self._check_model()
                remember_content(self.embedder, content)
                self._is_warm = True

    async def _warm_up_embedder_async(self) -> None:
        if not hasattr(self.embedder, "warm_up_async"):
            await asyncio.to_thread(self._warm_up_embedder)
            return
        await self.embedder.warm_up_async()  # in every call, because each event loop needs its own client
        _sort_answers(self.embedder)
        if not self._is_warm:
            await asyncio.to_thread(self._check_model)
            self._is_warm = True

    def _check_model(self) -> None:
        if _model_and_revision(self._describe(self._default_arguments())) != self._model:
            raise SpaceError("the embedder's model has changed since the cache was opened; make a new component")


def _sort_answers(embedder: Any) -> None:
    """Let the OpenAI client of an embedder sort each answer by ``index``, because the embedder ignores ``index``."""
    for name in ("client", "async_client"):
        client: Any = getattr(embedder, name, None)
        if is_openai_resource(getattr(client, "embeddings", None)):
            client.embeddings = OrderedEmbeddings(client.embeddings)


def _model_and_revision(space: VectorSpace) -> tuple[str, str | None]:
    return space.model, space.revision


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

    ``cache`` counts the hits by tier, the computed vectors and the failed texts.
    """
    sources = Counter(fetched.sources)
    failed = sources.pop(None, 0)
    sources.pop("provider", None)
    # Count distinct rows, because equal texts are embedded only once and share one row.
    computed = {id(row) for row, source in zip(fetched.rows, fetched.sources, strict=True) if source == "provider"}
    meta: dict[str, Any] = {"model": fetched.space.model}
    for answered in run.metas:
        usage = _add_usage(meta.get("usage"), answered.get("usage"))
        meta |= answered if usage is None else {**answered, "usage": usage}
    return meta | {"cache": {"hits": dict(sources), "computed": len(computed), "failed": failed}}


def _add_usage(one: Any, other: Any) -> Any:
    """Add two usages. Numbers with the same name are added up."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return {name: _add_usage(one.get(name), other.get(name)) for name in {**one, **other}}
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one + other
    return one if other is None else other
