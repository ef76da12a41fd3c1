"""What both components are: an embedder of Haystack's as a provider, and before it the cache of a configuration."""

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
from embedonce_integrations.wrapping import InOrder, WrappedProvider, is_openai_resource, shared_cache, writable

from ._described import space_of
from ._loaded import load_anew, remember

CHUNK = 256
"""Texts of one call of the embedder, at least. It makes its own batches of them; each chunk is stored as it lands."""


class NotEmbedded(TextRefused):
    """The embedder left documents without an embedding; it has logged why."""


@dataclass(slots=True)
class Run:
    """One call of ``run``: what the embedder is given beside the texts, and what it answered."""

    extra: Mapping[str, Any]
    metas: list[Mapping[str, Any]] = field(default_factory=list)
    vectors: dict[str, Any] = field(default_factory=dict)
    """By text. They wait here while the engine asks again for what came together with a text that failed."""
    tokens: int | None = None

    def heard(self, answer: Mapping[str, Any], vectors: Mapping[str, Any]) -> None:
        """Take in an answer of the embedder and the vectors in it."""
        self.vectors.update(vectors)
        meta = answer.get("meta") or {}
        self.metas.append(meta)
        tokens = (meta.get("usage") or {}).get("total_tokens")
        if isinstance(tokens, int):
            self.tokens = (self.tokens or 0) + tokens

    def answer(self, texts: Sequence[str]) -> Embedded:
        """Hand over the vectors of texts.

        Raises:
            NotEmbedded: there is none for some.
        """
        failed = [position for position, text in enumerate(texts) if text not in self.vectors]
        if failed:
            raise NotEmbedded(f"the embedder gave no embedding to {len(failed)} of {len(texts)} texts", failed)
        tokens, self.tokens = self.tokens, None
        return Embedded([self.vectors.pop(text) for text in texts], tokens)


_run: ContextVar[Run] = ContextVar("embedonce_haystack_run")
"""The run for which the engine asks the embedder; its threads and tasks have a copy of the caller's context."""


@contextmanager
def _running(run: Run) -> Iterator[Run]:
    token = _run.set(run)
    try:
        yield run
    finally:
        _run.reset(token)


class CachedEmbedder:
    """Looks texts up, and asks the embedder, or the configuration's provider, for those that no tier holds."""

    _task: ClassVar[Task]
    _input: ClassVar[str]
    """The parameter of ``run`` that this component and the one that it wraps have."""
    _output: ClassVar[str]
    """The key of their answer with the vectors in it."""

    def __init__(self, embedder: Any, config: Any, space: Mapping[str, Any] | None) -> None:
        if isinstance(embedder, type):
            raise TypeError(f"{embedder.__name__} is a class: pass an instance of it, {embedder.__name__}(...)")
        if embedder is None and space is not None:
            raise TypeError("space= describes an embedder that is passed; a configuration's provider describes its own")
        sockets: Any = getattr(embedder, "__haystack_input__", ())
        made = getattr(embedder, "__haystack_output__", ())
        if embedder is not None and not (self._input in sockets and self._output in made):
            raise TypeError(
                f"{type(self).__name__} wraps a component of Haystack's whose run takes {self._input!r} and returns "
                f"{self._output!r}; {type(embedder).__name__} is none"
            )
        self.embedder: Any = embedder
        self.config = config
        self.space = space
        self._lock = threading.Lock()
        self._cache: Cache | None = None
        self._model: tuple[str, str | None] = ("", None)
        self._warm = False
        self._parameters = [] if embedder is None else _parameters(embedder, self._input)
        for parameter in self._parameters:
            socket = sockets.get(parameter.name)
            if socket is not None:
                component.set_input_type(self, socket.name, socket.type, socket.default_value)  # type: ignore[arg-type]

    # --- the component's life -----------------------------------------------------------------

    def warm_up(self) -> None:
        """Open the cache. The embedder is warmed up when the first text is in no tier, and not before.

        Raises:
            ConfigError: the configuration cannot be used.
            SpaceError: the embedder cannot be described.
        """
        if self._cache is None:  # a hit must not wait while the embedder is being warmed up
            with self._lock:
                if self._cache is None:
                    self._cache = self._opened()

    async def warm_up_async(self) -> None:
        """As :meth:`warm_up`."""
        if self._cache is None:
            await asyncio.to_thread(self.warm_up)

    def close(self) -> None:
        """Wait for background writes, and close the embedder if it can be closed. The component may be used again."""
        if self._cache is not None:
            self._cache.flush()
        if hasattr(self.embedder, "close"):
            self.embedder.close()
        self._warm = False

    async def close_async(self) -> None:
        """As :meth:`close`."""
        if self._cache is not None:
            await self._cache.aflush()
        if hasattr(self.embedder, "close_async"):
            await self.embedder.close_async()
        elif hasattr(self.embedder, "close"):
            await asyncio.to_thread(self.embedder.close)
        self._warm = False

    def _to_dict(self, **more: Any) -> dict[str, Any]:
        """Describe the component, its embedder in it.

        Raises:
            ConfigError: ``config`` is a dict that holds a secret in the clear.
        """
        embedder = None if self.embedder is None else component_to_dict(self.embedder, "embedder")
        return default_to_dict(
            self, embedder=embedder, config=writable(self.config), space=deepcopy(self.space), **more
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Any:
        """Return the component that ``to_dict`` described."""
        return default_from_dict(cls, data)

    # --- one run ------------------------------------------------------------------------------

    def _fetch(self, texts: list[str], given: Mapping[str, Any]) -> tuple[Fetched, dict[str, Any]]:
        """Return what was fetched, and the ``meta`` that says so."""
        extra = self._extra(given)
        self.warm_up()
        with _running(Run(extra)) as run:
            fetched = self._cache_for(extra).fetch(texts, self._task)
        return fetched, _meta(fetched, run)

    async def _afetch(self, texts: list[str], given: Mapping[str, Any]) -> tuple[Fetched, dict[str, Any]]:
        extra = self._extra(given)
        await self.warm_up_async()
        with _running(Run(extra)) as run:
            fetched = await self._cache_for(extra).afetch(texts, self._task)
        return fetched, _meta(fetched, run)

    def _extra(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the embedder's ``run`` gets beside the texts, defaults included.

        Raises:
            TypeError: it takes nothing of that name.
        """
        try:
            bound = inspect.Signature(self._parameters).bind(**given)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}.run: {error}") from None
        bound.apply_defaults()
        return dict(bound.kwargs)

    def _cache_for(self, extra: Mapping[str, Any]) -> Cache:
        """Return the cache for a run: what it gives to the embedder beside the texts is part of the vector space."""
        assert self._cache is not None
        if extra == self._defaults():
            return self._cache
        return self._cache.for_provider(self._provider(extra))

    def _defaults(self) -> dict[str, Any]:
        return {one.name: one.default for one in self._parameters if one.default is not one.empty}

    def _opened(self) -> Cache:
        if self.embedder is None:
            return shared_cache(self.config)
        provider = self._provider(self._defaults())
        self._model = _model(provider.space(self._task))
        return shared_cache(self.config, provider=provider)

    # --- the embedder as a provider -----------------------------------------------------------

    def _provider(self, extra: Mapping[str, Any]) -> WrappedProvider:
        space = self._space(extra)
        size = getattr(self.embedder, "batch_size", None)
        size = size if isinstance(size, int) and size > 0 else CHUNK
        return WrappedProvider(
            embed=self._embed,
            aembed=self._aembed if hasattr(self.embedder, "run_async") else None,
            space=lambda task: space,
            limits=Limits(max_batch=-(-CHUNK // size) * size),  # whole batches
        )

    def _space(self, extra: Mapping[str, Any]) -> VectorSpace:
        return space_of(self.embedder, extra, task=self._task, declared=self.space)

    def _embed(self, texts: list[str], task: Task) -> Embedded:
        run = _run.get()
        for part, question in self._questions([text for text in texts if text not in run.vectors]):
            self._warm_up_embedder()
            answer = self.embedder.run(**{self._input: question}, **run.extra)
            run.heard(answer, self._vectors(part, answer))
        return run.answer(texts)

    async def _aembed(self, texts: list[str], task: Task) -> Embedded:
        run = _run.get()
        for part, question in self._questions([text for text in texts if text not in run.vectors]):
            await self._warm_up_embedder_async()
            answer = await self.embedder.run_async(**{self._input: question}, **run.extra)
            run.heard(answer, self._vectors(part, answer))
        return run.answer(texts)

    def _questions(self, texts: list[str]) -> list[tuple[list[str], Any]]:
        """Return texts and what the embedder's ``run`` is given for them, call by call."""
        raise NotImplementedError

    def _vectors(self, texts: list[str], answer: Mapping[str, Any]) -> dict[str, Any]:
        """Return the vectors of an answer by text, without those that are None.

        Raises:
            ProviderError: it cannot be said which vector is whose.
        """
        raise NotImplementedError

    def _warm_up_embedder(self) -> None:
        with self._lock:
            if not self._warm:
                _, content = self._model
                if hasattr(self.embedder, "warm_up"):
                    load_anew(self.embedder, content)
                    self.embedder.warm_up()
                _put_in_order(self.embedder)
                self._check_model()
                remember(self.embedder, content)
                self._warm = True

    async def _warm_up_embedder_async(self) -> None:
        if not hasattr(self.embedder, "warm_up_async"):
            await asyncio.to_thread(self._warm_up_embedder)
            return
        await self.embedder.warm_up_async()  # each time: its clients belong to an event loop
        _put_in_order(self.embedder)
        if not self._warm:
            await asyncio.to_thread(self._check_model)
            self._warm = True

    def _check_model(self) -> None:
        if _model(self._space(self._defaults())) != self._model:
            raise SpaceError("the embedder's model has changed since the cache was opened: make a new component")


def _put_in_order(embedder: Any) -> None:
    """Let an OpenAI client inside an embedder answer in the order of its input: the embedder ignores ``index``."""
    for name in ("client", "async_client"):
        client: Any = getattr(embedder, name, None)
        if is_openai_resource(getattr(client, "embeddings", None)):
            client.embeddings = InOrder(client.embeddings)


def _model(space: VectorSpace) -> tuple[str, str | None]:
    return space.model, space.revision


def _parameters(embedder: Any, texts: str) -> list[inspect.Parameter]:
    """Return the parameters of an embedder's ``run`` beside the texts, as they are given by name."""
    kept = []
    for parameter in inspect.signature(embedder.run).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            kept.append(parameter)
        elif parameter.name != texts and parameter.kind is not parameter.VAR_POSITIONAL:
            kept.append(parameter.replace(kind=parameter.KEYWORD_ONLY))
    return kept


def _meta(fetched: Fetched, run: Run) -> dict[str, Any]:
    """Return what the embedder said of the texts that it embedded, and under ``cache`` where the others came from."""
    sources = Counter(fetched.sources)
    failed = sources.pop(None, 0)
    sources.pop("provider", None)
    # Equal texts have one vector, and are computed once.
    computed = {id(row) for row, source in zip(fetched.rows, fetched.sources, strict=True) if source == "provider"}
    meta: dict[str, Any] = {"model": fetched.space.model}
    for said in run.metas:
        usage = _sum(meta.get("usage"), said.get("usage"))
        meta |= said if usage is None else {**said, "usage": usage}
    return meta | {"cache": {"hits": dict(sources), "computed": len(computed), "failed": failed}}


def _sum(one: Any, other: Any) -> Any:
    """Add up what two calls used: numbers under the same name."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return {name: _sum(one.get(name), other.get(name)) for name in {**one, **other}}
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one + other
    return one if other is None else other
