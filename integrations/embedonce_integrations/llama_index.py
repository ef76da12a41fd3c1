"""LlamaIndex: an embedding model that embeds each text once, for pipelines, indexes and retrievers."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from embedonce import Cache, Limits, SpaceError, VectorSpace, config
from embedonce.config import Source
from embedonce.contracts import Task

from .wrapping import ClientInOrder, WrappedProvider, WrappedSpaces, declared_space, model_space, shared_cache

try:
    from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding
    from llama_index.core.bridge.pydantic import BaseModel, Field, PrivateAttr
    from llama_index.core.callbacks import CallbackManager
except ImportError as error:
    raise ImportError("LlamaIndex is not installed: pip install 'embedonce[llama-index]'") from error

Floats: TypeAlias = NDArray[np.float32]
TASKS = ("document", "query")

ENGINES = ("_text_engine", "_query_engine")
"""Attributes of LlamaIndex's OpenAI embeddings, beside their fields, that decide the vectors."""


class CachedEmbedding(BaseEmbedding):
    """Embeds texts and queries through a cache. Queries and texts never share vectors, unless said otherwise.

    Args:
        embed_model: what makes the vectors; None for the ``[provider]`` of ``config``.
        config: a TOML file, a dict of its shape, or None to look for a file.
        space: the vector space of an embedding model that cannot describe it: at least its model.
        symmetric: ``embed_model`` treats queries as it treats texts, so that both share their vectors.
        kwargs: fields of BaseEmbedding. ``embed_batch_size`` is how many texts are looked up at once, by default what
            the embedding model computes at once.

    Raises:
        ConfigError: the configuration cannot be used.
        SpaceError: ``embed_model`` does not say what decides its vectors.
    """

    vectors: dict[str, Any] = Field(
        default_factory=dict, description="What decides the vectors, hashed: it tells one cached model from another."
    )
    _handle: _Handle = PrivateAttr()

    def __init__(
        self,
        embed_model: BaseEmbedding | None = None,
        *,
        config: Source = None,
        space: VectorSpace | Mapping[str, Any] | None = None,
        symmetric: bool = False,
        **kwargs: Any,
    ) -> None:
        if embed_model is not None and not isinstance(embed_model, BaseEmbedding):
            raise TypeError(
                f"CachedEmbedding wraps a LlamaIndex embedding model, not {type(embed_model).__name__}; "
                "a configuration is given as config="
            )
        for name, why in REFUSED.items():
            if kwargs.get(name) is not None:
                raise TypeError(f"{name} is not for CachedEmbedding: {why}")
        handle = _Handle(embed_model, config, space, symmetric)
        defaults = {"model_name": handle.model}
        if embed_model is not None:
            defaults |= {name: getattr(embed_model, name) for name in ("embed_batch_size", "num_workers")}
        super().__init__(**{**defaults, **kwargs, "vectors": handle.vectors})
        self._handle = handle

    @classmethod
    def class_name(cls) -> str:
        return "CachedEmbedding"

    @property
    def cache(self) -> Cache:
        """The cache: its ``stats`` say what was found and what was computed."""
        return self._handle.cache

    def _get_query_embedding(self, query: str) -> Embedding:
        return _floats(self.cache.embed(query, "query"))

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return _floats(await self.cache.aembed(query, "query"))

    def _get_text_embedding(self, text: str) -> Embedding:
        return _floats(self.cache.embed(text))

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return _floats(await self.cache.aembed(text))

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return _lists(self.cache.embed_batch(texts))

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return _lists(await self.cache.aembed_batch(texts))

    @classmethod
    def from_dict(cls, data: dict[str, Any], **kwargs: Any) -> NoReturn:
        """Refuse: what ``to_dict`` gives names neither the embedding model nor the tiers, which may hold secrets."""
        raise TypeError(
            "CachedEmbedding cannot be made from a dict; make it from its embedding model and configuration"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process makes it again from.

        Raises:
            SpaceError: the embedding model would make other vectors there.
        """
        # Here and not there: a multiprocessing pool waits for ever for a worker that cannot unpickle its work.
        self._handle.check_pickling()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Not BaseComponent's way, which calls __init__ with the fields and so loses the embedding model.
        for name, default in (("callback_manager", CallbackManager([])), ("rate_limiter", None)):
            state["__dict__"].setdefault(name, default)  # left out where it could not be pickled
        BaseModel.__setstate__(self, state)


REFUSED = {
    "embeddings_cache": "it is a cache itself; leave it out",
    "rate_limiter": "hits need not wait; give it to the embedding model, and only what is computed waits",
    "vectors": "it follows from the embedding model",
}


class _Handle:
    """An embedding model and the cache before it, made again from their parts in another process."""

    def __init__(
        self,
        embed_model: BaseEmbedding | None,
        source: Source,
        space: VectorSpace | Mapping[str, Any] | None,
        symmetric: bool,
    ) -> None:
        if embed_model is None and (space is not None or symmetric):
            raise SpaceError("space= and symmetric= describe an embedding model; a [provider] describes itself")
        loaded = config.load(source, own_provider=embed_model is not None)
        # Found again wherever the other process runs.
        source = loaded.file or (deepcopy(dict(source)) if isinstance(source, Mapping) else source)
        self._parts = (embed_model, source, space, symmetric)
        provider = None if embed_model is None else _provider(embed_model, space, symmetric)
        self.cache = shared_cache(loaded, provider=provider)
        spaces = {task: self.cache.provider.space(task) for task in TASKS}
        self.model = spaces["document"].model
        self.vectors = {
            **{task: space.fingerprint().hex() for task, space in spaces.items()},
            "normalize": list(loaded.key.normalize),
            "dtype": loaded.cache.dtype,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return _Handle, self._parts

    def check_pickling(self) -> None:
        """See that the embedding model comes out of pickling as it was: LlamaIndex leaves out what it cannot pickle.

        Raises:
            SpaceError: it does not.
        """
        try:
            again = pickle.loads(pickle.dumps(self))
            changed = again.vectors != self.vectors
        except Exception as error:
            raise SpaceError(f"the embedding model cannot be pickled ({type(error).__name__}: {error})") from error
        if changed:
            raise SpaceError(
                "the embedding model would make other vectors in another process: pickling loses a part of it that is "
                "no field. Make it anew there, or leave num_workers out"
            )


def _provider(inner: BaseEmbedding, space: VectorSpace | Mapping[str, Any] | None, symmetric: bool) -> WrappedProvider:
    def describe(task: Task) -> VectorSpace:
        told = None if symmetric else task
        return _described(inner, told) if space is None else declared_space(space, task=told)

    spaces = WrappedSpaces(describe)
    ordered: Any = _in_order(inner)

    # One that was unpickled may have lost the attribute with its rate limiter.
    limiter = getattr(inner, "rate_limiter", None)

    def embed(texts: list[str], task: Task) -> Any:
        spaces.check(task)
        if limiter is not None:
            limiter.acquire()
        if task == "query":
            return [_vector(ordered._get_query_embedding(text)) for text in texts]
        return [_vector(answer) for answer in ordered._get_text_embeddings(texts)]

    async def aembed(texts: list[str], task: Task) -> Any:
        spaces.check(task)
        if limiter is not None:
            await limiter.async_acquire()
        if task == "query":
            return [_vector(await ordered._aget_query_embedding(text)) for text in texts]
        return [_vector(answer) for answer in await ordered._aget_text_embeddings(texts)]

    return WrappedProvider(
        embed=embed,
        aembed=aembed,
        space=spaces,
        limits=Limits(max_batch=inner.embed_batch_size),
    )


def _described(inner: BaseEmbedding, task: Task | None) -> VectorSpace:
    return model_space(inner, task=task, also={name.strip("_"): getattr(inner, name, None) for name in ENGINES})


def _vector(answer: Any) -> Any:
    """Return the vector of an answer: some versions of LlamaIndex have it in an EmbeddingResponse."""
    return getattr(answer, "embedding", answer)


def _floats(vector: Floats) -> list[float]:
    floats: list[float] = vector.tolist()
    return floats


def _lists(vectors: Floats) -> list[list[float]]:
    lists: list[list[float]] = vectors.tolist()
    return lists


def _in_order(inner: BaseEmbedding) -> BaseEmbedding:
    """Return an embedding model that reads an OpenAI answer by its ``index``: LlamaIndex's own does not."""
    if not any(cls.__module__.startswith("llama_index.embeddings.openai.") for cls in type(inner).__mro__):
        return inner
    ordered = inner.model_copy()
    for name in ("_get_client", "_get_aclient"):
        make = getattr(inner, name)
        object.__setattr__(ordered, name, lambda make=make: ClientInOrder(make()))
    return ordered
