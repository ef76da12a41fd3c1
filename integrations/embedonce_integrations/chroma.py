"""Chroma: an embedding function that embeds each text once.

Chroma stores the name and configuration of a collection's embedding function. A wrapper reports the name and
configuration of the function that it wraps. So existing collections can be opened as before, and new ones can be opened
without embedonce. If nothing is wrapped, the name is ``embedonce``, and the configuration is the argument ``config``.
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
    HOW_TO_DECLARE,
    OrderedClient,
    WrappedProvider,
    WrappedSpaces,
    describe_space,
    dump_config,
    is_openai_resource,
    open_shared_cache,
    resolve_declared_space,
)

try:
    from chromadb.api.types import Documents, EmbeddingFunction, Embeddings, Space
    from chromadb.utils.embedding_functions import register_embedding_function
except ImportError as error:
    raise ImportError("Chroma is not installed: pip install 'embedonce[chroma]'") from error

NOT_IN_SPACE = ("api_key_env_var", "organization_id", "default_headers")
"""Configuration fields that do not affect the vectors of Chroma's embedding functions."""


@register_embedding_function
class CachedEmbeddingFunction(EmbeddingFunction[Documents]):
    """Embeds documents and queries through a cache.

    Args:
        embedding_function: the embedding function to wrap; None to use the ``[provider]`` of ``config``.
        config: a TOML file, a dict of the same shape, or None to look for a file. If nothing is wrapped, Chroma stores
            this argument with each collection, as JSON.
        space: the vector space; required if the configuration of ``embedding_function`` does not describe its vectors.

    Raises:
        ConfigError: the configuration is invalid.
        SpaceError: ``embedding_function`` does not say what determines its vectors.
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
                    "space= can only be used with an embedding function; without one, the [provider] of the "
                    "configuration describes its own vector space"
                )
            self.cache = open_shared_cache(config)
            return
        if isinstance(embedding_function, type) or not hasattr(embedding_function, "embed_query"):
            raise TypeError(
                "expected one of Chroma's embedding functions, got "
                f"{embedding_function if isinstance(embedding_function, type) else type(embedding_function).__name__}; "
                "to pass a configuration, use config="
            )
        self.cache = open_shared_cache(config, provider=_wrap(embedding_function, space))
        # Chroma reads these attributes from the instance, so the instance gets the attributes of the wrapped function.
        # The class keeps its own attributes, because Chroma's registry needs them.
        for name in ("name", "get_config", "build_from_config", "validate_config", "validate_config_update"):
            setattr(self, name, getattr(embedding_function, name))
        for name in ("default_space", "supported_spaces", "is_legacy"):
            setattr(self, name, getattr(embedding_function, name))

    def __call__(self, input: Documents) -> Embeddings:
        """Return one float32 array of shape (d,) per document. Raises whatever the embedding function raises."""
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
        """Return the argument of :meth:`build_from_config`. Chroma stores it with the collection.

        Raises:
            ConfigError: the configuration holds a secret in plain text; write the secret as ``${VARIABLE}``.
        """
        return {"config": dump_config(self._config)}

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> CachedEmbeddingFunction:
        return CachedEmbeddingFunction(config=config["config"])

    def validate_config_update(self, old_config: dict[str, Any], new_config: dict[str, Any]) -> None:
        """Check that a new configuration makes the same vectors as the old one.

        Raises:
            ValueError: the new provider describes a different vector space.
        """
        old, new = (open_shared_cache(config["config"]).provider for config in (old_config, new_config))
        if old.space("document") != new.space("document"):
            raise ValueError("the new configuration makes different vectors; use a new collection for it")


def _wrap(inner: EmbeddingFunction[Documents], space: VectorSpace | Mapping[str, Any] | None) -> WrappedProvider:
    function = _sort_answers(inner)
    is_asymmetric = type(inner).embed_query is not EmbeddingFunction.embed_query
    spaces = WrappedSpaces(lambda task: _describe(inner, space, task if is_asymmetric else None))

    def embed(texts: list[str], task: Task) -> Any:
        spaces.check(task)
        return function.embed_query(texts) if is_asymmetric and task == "query" else function(texts)

    return WrappedProvider(embed=embed, space=spaces)


def _sort_answers(inner: EmbeddingFunction[Documents]) -> EmbeddingFunction[Documents]:
    """Return an embedding function that puts the vectors of an OpenAI answer in the order of their ``index``.

    The original function ignores the ``index``.
    """
    client = getattr(inner, "client", None)
    if not is_openai_resource(getattr(client, "embeddings", None)):
        return inner
    ordered: Any = copy(inner)
    ordered.client = OrderedClient(client)
    return cast("EmbeddingFunction[Documents]", ordered)


def _describe(
    inner: EmbeddingFunction[Documents], space: VectorSpace | Mapping[str, Any] | None, task: Task | None
) -> VectorSpace:
    if space is not None:
        return resolve_declared_space(space, task=task)
    name = type(inner).__name__
    if type(inner).get_config is EmbeddingFunction.get_config:
        raise SpaceError(f"{name} has no get_config to describe its vectors; {HOW_TO_DECLARE}")
    fields = dict(inner.get_config())
    client = getattr(inner, "client", None)
    if is_openai_resource(getattr(client, "embeddings", None)):
        fields["api_base"] = str(client.base_url)  # type: ignore[union-attr]  # may come from the environment
    model = next((fields[key] for key in ("model_name", "model", "model_id") if fields.get(key)), name)
    return describe_space(inner, fields, model=str(model), task=task, leave_out=NOT_IN_SPACE)
