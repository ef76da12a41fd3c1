"""Chroma: an embedding function that embeds each text once.

Around another embedding function it goes by that one's name and configuration, which Chroma stores with a
collection: a collection that exists is opened as before, and the new one can be opened without embedonce. Without
one it goes by the name ``embedonce``, and its configuration names the provider.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import copy
from typing import Any, cast

from embedonce import SpaceError, VectorSpace
from embedonce.config import Source
from embedonce.contracts import Task

from .wrapping import (
    ClientInOrder,
    WrappedProvider,
    WrappedSpaces,
    declared_space,
    described_space,
    is_openai_resource,
    shared_cache,
    writable,
)

try:
    from chromadb.api.types import Documents, EmbeddingFunction, Embeddings, Space
    from chromadb.utils.embedding_functions import register_embedding_function
except ImportError as error:
    raise ImportError("Chroma is not installed: pip install 'embedonce[chroma]'") from error

NOT_IN_SPACE = ("api_key_env_var", "organization_id", "default_headers")
"""Of the configurations of Chroma's own embedding functions."""


@register_embedding_function
class CachedEmbeddingFunction(EmbeddingFunction[Documents]):
    """Embeds documents and queries through a cache.

    Args:
        embedding_function: what makes the vectors; None for the ``[provider]`` of ``config``.
        config: a TOML file, a dict of its shape, or None to look for a file. What is stored with a collection must be
            JSON: a path or a dict.
        space: the vector space of an embedding function that has no configuration to describe it.

    Raises:
        ConfigError: the configuration cannot be used.
        SpaceError: ``embedding_function`` does not say what decides its vectors.
    """

    def __init__(
        self,
        embedding_function: EmbeddingFunction[Documents] | None = None,
        *,
        config: Source = None,
        space: VectorSpace | Mapping[str, Any] | None = None,
    ) -> None:
        self._config = os.fspath(config) if isinstance(config, os.PathLike) else config
        if embedding_function is None:
            if space is not None:
                raise SpaceError(
                    "space= describes an embedding function; the [provider] of a configuration has its own"
                )
            self.cache = shared_cache(config)
            return
        if isinstance(embedding_function, type) or not hasattr(embedding_function, "embed_query"):
            raise TypeError(
                "CachedEmbeddingFunction wraps one of Chroma's embedding functions, not "
                f"{embedding_function if isinstance(embedding_function, type) else type(embedding_function).__name__}; "
                "a configuration is given as config="
            )
        self.cache = shared_cache(config, provider=_provider(embedding_function, space))
        # Chroma asks the instance for these. On the class, where they are registered, they stay our own.
        for name in ("name", "get_config", "build_from_config", "validate_config", "validate_config_update"):
            setattr(self, name, getattr(embedding_function, name))
        for name in ("default_space", "supported_spaces", "is_legacy"):
            setattr(self, name, getattr(embedding_function, name))

    def __call__(self, input: Documents) -> Embeddings:
        """Return one float32 array of shape (d,) per document; raises what the embedding function raises."""
        return list(self.cache.embed_batch(input))

    def embed_query(self, input: Documents) -> Embeddings:
        """Return one float32 array of shape (d,) per query."""
        return list(self.cache.embed_batch(input, task="query"))

    def default_space(self) -> Space:
        return "cosine"

    @staticmethod
    def name() -> str:
        return "embedonce"

    def get_config(self) -> dict[str, Any]:
        """Return what :meth:`build_from_config` takes. Chroma stores it with the collection.

        Raises:
            ConfigError: it holds a secret in the clear; write it as ``${VARIABLE}``.
        """
        return {"config": writable(self._config)}

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> CachedEmbeddingFunction:
        return CachedEmbeddingFunction(config=config["config"])

    def validate_config_update(self, old_config: dict[str, Any], new_config: dict[str, Any]) -> None:
        """Allow another configuration as long as it makes the same vectors.

        Raises:
            ValueError: its provider describes another vector space.
        """
        old, new = (shared_cache(config["config"]).provider.space("document") for config in (old_config, new_config))
        if old != new:
            raise ValueError("the new configuration makes other vectors; embed the documents into another collection")


def _provider(inner: EmbeddingFunction[Documents], space: VectorSpace | Mapping[str, Any] | None) -> WrappedProvider:
    function = _in_order(inner)
    asymmetric = type(inner).embed_query is not EmbeddingFunction.embed_query
    spaces = WrappedSpaces(lambda task: _space(inner, space, task if asymmetric else None))

    def embed(texts: list[str], task: Task) -> Any:
        spaces.check(task)
        return function.embed_query(texts) if asymmetric and task == "query" else function(texts)

    return WrappedProvider(embed=embed, space=spaces)


def _in_order(inner: EmbeddingFunction[Documents]) -> EmbeddingFunction[Documents]:
    """Return a function that reads an OpenAI answer by its ``index``: Chroma's own does not."""
    client = getattr(inner, "client", None)
    if not is_openai_resource(getattr(client, "embeddings", None)):
        return inner
    ordered: Any = copy(inner)
    ordered.client = ClientInOrder(client)
    return cast("EmbeddingFunction[Documents]", ordered)


def _space(
    inner: EmbeddingFunction[Documents], space: VectorSpace | Mapping[str, Any] | None, task: Task | None
) -> VectorSpace:
    if space is not None:
        return declared_space(space, task=task)
    name = type(inner).__name__
    if type(inner).get_config is EmbeddingFunction.get_config:
        raise SpaceError(
            f"{name} has no get_config, which says what decides its vectors; declare it: "
            'space={"model": "my-model-v2"}, with whatever else does'
        )
    fields = dict(inner.get_config())
    client = getattr(inner, "client", None)
    if is_openai_resource(getattr(client, "embeddings", None)):
        fields["api_base"] = str(client.base_url)  # type: ignore[union-attr]  # it may be the environment's
    model = next((fields[key] for key in ("model_name", "model", "model_id") if fields.get(key)), name)
    return described_space(inner, fields, model=str(model), task=task, leave_out=NOT_IN_SPACE)
