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
    """Returns the vector of a string, such as a query. The embedder is called only if no tier has the vector.

    Args:
        embedder: any text embedder of Haystack; None to use the ``[provider]`` of the configuration, with the task
            ``"query"``.
        config: a TOML file, a dict of the same shape, or None to look for an ``embedonce.toml``. Components with equal
            configurations share one cache.
        space: what determines the embedder's vectors, such as ``{"model": "my-model-v2"}``; required if the embedder
            does not describe its vectors.
        ignore: names of the embedder's attributes that do not affect its vectors, such as ``["log_file"]``. They are
            left out of the description.
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
        ignore: list[str] | None = None,
    ) -> None:
        CachedEmbedder.__init__(self, embedder, config, space, ignore)

    def to_dict(self) -> dict[str, Any]:
        """Serialize the component and its embedder, for YAML.

        Raises:
            ConfigError: ``config`` is a dict that holds a secret in plain text.
        """
        return self._to_dict()

    @component.output_types(embedding=list[float], meta=dict[str, Any])
    def run(self, text: str, **kwargs: Any) -> dict[str, Any]:
        """Return the text's ``embedding``, and the embedder's ``meta`` with the item ``cache``.

        ``kwargs`` are extra arguments for the embedder's own ``run``.

        Raises:
            TypeError: ``text`` is not a str.
            Exception: the embedder's own error.
        """
        _check_text(text)
        return _make_answer(*self._fetch([text], kwargs))

    @component.output_types(embedding=list[float], meta=dict[str, Any])
    async def run_async(self, text: str, **kwargs: Any) -> dict[str, Any]:
        """Async twin of :meth:`run`. An embedder without ``run_async`` runs in a thread."""
        _check_text(text)
        return _make_answer(*await self._afetch([text], kwargs))

    def _cut(self, texts: int) -> list[slice]:
        return [slice(position, position + 1) for position in range(texts)]

    def _make_input(self, texts: list[str]) -> str:
        return texts[0]

    def _read_vectors(self, texts: list[str], answer: Mapping[str, Any]) -> dict[str, Any]:
        vector = answer["embedding"]
        return {} if vector is None else {texts[0]: vector}


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise TypeError(f"expected a str, got {type(text).__name__}; use CachedDocumentEmbedder for Documents")


def _make_answer(fetched: Fetched, meta: dict[str, Any]) -> dict[str, Any]:
    for error in fetched.failed.values():
        raise error
    return {"embedding": fetched.vectors[0].tolist(), "meta": meta}
