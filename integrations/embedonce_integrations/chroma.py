"""Chroma: an embedding function that embeds each text once.

Chroma stores the name and configuration of a collection's embedding function. A wrapper reports the name and
configuration of the function that it wraps. So existing collections can be opened as before, and new ones can be opened
without embedonce. If nothing is wrapped, the name is ``embedonce``, and the configuration is the argument ``config``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from embedonce import SpaceError, VectorSpace
from embedonce.config import Source, load
from embedonce.contracts import Task

from .wrapping import (
    Rebuilt,
    WrappedProvider,
    WrappedSpaces,
    dump_config,
    keep_source,
    make_describer,
    open_shared_cache,
)

try:
    from chromadb.api.types import Documents, EmbeddingFunction, Embeddings, Space
    from chromadb.utils.embedding_functions import register_embedding_function
except ImportError as error:
    raise ImportError("Chroma is not installed: pip install 'embedonce[chroma]'") from error


@register_embedding_function
class CachedEmbeddingFunction(Rebuilt, EmbeddingFunction[Documents]):
    """Embeds documents and queries through a cache.

    Args:
        embedding_function: the embedding function to wrap; None to use the ``[provider]`` of ``config``.
        config: a TOML file, a dict of the same shape, or None to look for a file. If nothing is wrapped, Chroma stores
            this argument with each collection, as JSON.
        space: the vector space; required if ``embedding_function`` does not describe its vectors.
        ignore: names of fields of ``embedding_function`` that do not affect the vectors, at any depth: ``["name"]``, or
            ``["inner.name"]`` for a field of one inner object.

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
        ignore: Collection[str] = (),
    ) -> None:
        self._config = os.fspath(config) if isinstance(config, os.PathLike) else config
        loaded = load(config, own_provider=embedding_function is not None)
        self._embedder = embedding_function
        self._arguments = {"config": keep_source(config, loaded), "space": space, "ignore": ignore}
        if embedding_function is None:
            if space is not None or ignore:
                raise SpaceError(
                    "space= and ignore= can only be used with an embedding function; without one, the [provider] of "
                    "the configuration describes its own vector space"
                )
            self.cache = open_shared_cache(loaded)
            return
        if isinstance(embedding_function, type) or not hasattr(embedding_function, "embed_query"):
            raise TypeError(
                "expected one of Chroma's embedding functions, got "
                f"{embedding_function if isinstance(embedding_function, type) else type(embedding_function).__name__}; "
                "to pass a configuration, use config="
            )
        describe = self._describe_spaces(embedding_function)
        self.cache = open_shared_cache(loaded, provider=_wrap(embedding_function, WrappedSpaces(describe)))
        # Chroma reads these attributes from the instance, so the instance gets the attributes of the wrapped function.
        # The class keeps its own attributes, because Chroma's registry needs them.
        for name in ("name", "get_config", "build_from_config", "validate_config", "validate_config_update"):
            setattr(self, name, getattr(embedding_function, name))
        for name in ("default_space", "supported_spaces", "is_legacy"):
            setattr(self, name, getattr(embedding_function, name))

    def _describe_spaces(self, embedder: EmbeddingFunction[Documents]) -> Callable[[Task], VectorSpace]:
        return make_describer(
            embedder,
            space=self._arguments["space"],
            ignore=self._arguments["ignore"],
            has_tasks=_is_asymmetric(embedder),
            more=partial(_read_config, embedder),
        )

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


def _wrap(inner: EmbeddingFunction[Documents], spaces: WrappedSpaces) -> WrappedProvider:
    is_asymmetric = _is_asymmetric(inner)

    def embed(texts: list[str], task: Task) -> Any:
        with spaces.calling(task) as read:
            vectors = inner.embed_query(texts) if is_asymmetric and task == "query" else inner(texts)
        return read.make_answer(vectors)

    return WrappedProvider(embed=embed, space=spaces)


def _is_asymmetric(inner: EmbeddingFunction[Documents]) -> bool:
    return type(inner).embed_query is not EmbeddingFunction.embed_query


def _read_config(inner: EmbeddingFunction[Documents]) -> dict[str, Any]:
    """Return what a function says about itself: its configuration, and the name under which Chroma knows it."""
    if type(inner).get_config is EmbeddingFunction.get_config:
        return {}
    return {"function": inner.name(), **inner.get_config()}
