"""A text embedder with a cache."""

import os
from collections.abc import Mapping
from typing import Any, ClassVar

from haystack import component

from embedonce import Fetched
from embedonce.contracts import Task

from ._cached import CachedEmbedder


@component
class CachedTextEmbedder(CachedEmbedder):
    """Embeds a string, such as a query, unless a tier of embedonce's holds its vector.

    Args:
        embedder: any text embedder of Haystack's. None: the ``[provider]`` of the configuration, asked for queries.
        config: a TOML file, a dict of the same shape, or None, which finds an ``embedonce.toml``. Components with
            equal configurations share one cache.
        space: what decides the embedder's vectors, such as ``{"model": "my-model-v2"}``, where it cannot say so.
    """

    _task: ClassVar[Task] = "query"
    _input: ClassVar[str] = "text"
    _output: ClassVar[str] = "embedding"

    def __init__(
        self,
        embedder: Any | None = None,
        *,
        config: str | os.PathLike[str] | dict[str, Any] | None = None,
        space: dict[str, Any] | None = None,
    ) -> None:
        CachedEmbedder.__init__(self, embedder, config, space)

    def to_dict(self) -> dict[str, Any]:
        """Describe the component, its embedder in it, for YAML.

        Raises:
            ConfigError: ``config`` is a dict that holds a secret in the clear.
        """
        return self._to_dict()

    @component.output_types(embedding=list[float], meta=dict[str, Any])
    def run(self, text: str, **kwargs: Any) -> dict[str, Any]:
        """Return the text's ``embedding``, and ``meta``: what the embedder says of it, and ``cache``.

        ``kwargs`` are what the embedder's own ``run`` takes beside the text.

        Raises:
            TypeError: ``text`` is not a str.
            Exception: whatever the embedder raised.
        """
        _check(text)
        return _answer(*self._fetch([text], kwargs))

    @component.output_types(embedding=list[float], meta=dict[str, Any])
    async def run_async(self, text: str, **kwargs: Any) -> dict[str, Any]:
        """As :meth:`run`. An embedder without ``run_async`` works in a thread."""
        _check(text)
        return _answer(*await self._afetch([text], kwargs))

    def _questions(self, texts: list[str]) -> list[tuple[list[str], Any]]:
        return [([text], text) for text in texts]

    def _vectors(self, texts: list[str], answer: Mapping[str, Any]) -> dict[str, Any]:
        vector = answer["embedding"]
        return {} if vector is None else {texts[0]: vector}


def _check(text: Any) -> None:
    if not isinstance(text, str):
        raise TypeError(
            f"CachedTextEmbedder embeds a str, not {type(text).__name__}; for Documents take CachedDocumentEmbedder"
        )


def _answer(fetched: Fetched, meta: dict[str, Any]) -> dict[str, Any]:
    for error in fetched.failed.values():
        raise error
    return {"embedding": fetched.vectors[0].tolist(), "meta": meta}
