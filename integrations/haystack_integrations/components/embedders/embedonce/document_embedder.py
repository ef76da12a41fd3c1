"""A document embedder with a cache."""

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from haystack import Document, component

from embedonce import Fetched, ProviderError, SpaceError
from embedonce.contracts import Task

from ._cached import CachedEmbedder, NotEmbedded

log = logging.getLogger(__name__)


@component
class CachedDocumentEmbedder(CachedEmbedder):
    """Gives each document its vector. Only documents that have no vector in the tiers are embedded.

    A document's key is made from its effective text. Haystack's embedders make this text from the embedded metadata
    fields and the content, joined by the separator. The embedder's prefix and suffix are not in this text, but in the
    vector space.

    Args:
        embedder: any document embedder of Haystack; None to use the ``[provider]`` of the configuration.
        config: a TOML file, a dict of the same shape, or None to look for an ``embedonce.toml``. Components with equal
            configurations share one cache.
        space: what determines the embedder's vectors, such as ``{"model": "my-model-v2"}``; required if the embedder
            does not describe its vectors.
        ignore: names of the embedder's attributes that do not affect its vectors, such as ``["log_file"]``. They are
            left out of the description.
        meta_fields_to_embed: metadata fields to embed. Pass this list only if ``embedder`` is None or has no
            ``meta_fields_to_embed``. An embedder without ``meta_fields_to_embed`` gets the effective text as content,
            and no metadata.
        embedding_separator: separator between ``meta_fields_to_embed`` and the content.

    Raises:
        SpaceError: neither the embedder nor ``meta_fields_to_embed`` says which metadata is embedded.
    """

    _task: ClassVar[Task] = "document"
    _input: ClassVar[str] = "documents"
    _output: ClassVar[str] = "documents"

    def __init__(
        self,
        embedder: Any | None = None,
        *,
        config: str | os.PathLike[str] | dict[str, Any] | None = None,
        space: dict[str, Any] | None = None,
        ignore: list[str] | None = None,
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
    ) -> None:
        CachedEmbedder.__init__(self, embedder, config, space, ignore)
        has_fields = hasattr(embedder, "meta_fields_to_embed")
        if has_fields and meta_fields_to_embed is not None:
            raise TypeError(f"{type(embedder).__name__} has its own meta_fields_to_embed; set it there")
        if embedder is not None and not has_fields and meta_fields_to_embed is None:
            raise SpaceError(
                f"{type(embedder).__name__} has no meta_fields_to_embed, so it does not say which metadata it embeds; "
                "pass meta_fields_to_embed to CachedDocumentEmbedder ([] if it embeds none)"
            )
        self.meta_fields_to_embed = meta_fields_to_embed
        self.embedding_separator = embedding_separator

    def to_dict(self) -> dict[str, Any]:
        """Serialize the component and its embedder, for YAML.

        Raises:
            ConfigError: ``config`` is a dict that holds a secret in plain text.
        """
        return self._to_dict(
            meta_fields_to_embed=self.meta_fields_to_embed, embedding_separator=self.embedding_separator
        )

    @component.output_types(documents=list[Document], meta=dict[str, Any])
    def run(self, documents: list[Document], **kwargs: Any) -> dict[str, Any]:
        """Return new ``documents`` with embeddings, in order, and the embedder's ``meta`` with the item ``cache``.

        A document that the embedder left without an embedding stays without one. The next run tries to embed it again.
        ``kwargs`` are extra arguments for the embedder's own ``run``.

        Raises:
            TypeError: ``documents`` is not a list of Documents.
            Exception: the embedder's own error. Vectors that were computed before the exception are stored.
        """
        texts = self._effective_texts(documents)
        return _make_answer(documents, *self._fetch(texts, kwargs))

    @component.output_types(documents=list[Document], meta=dict[str, Any])
    async def run_async(self, documents: list[Document], **kwargs: Any) -> dict[str, Any]:
        """Async twin of :meth:`run`. An embedder without ``run_async`` runs in a thread."""
        texts = self._effective_texts(documents)
        return _make_answer(documents, *await self._afetch(texts, kwargs))

    def _effective_texts(self, documents: list[Document]) -> list[str]:
        """Return each document's effective text, without prefix and suffix.

        Raises:
            TypeError: ``documents`` is not a list of Documents.
        """
        if not isinstance(documents, list) or not all(isinstance(one, Document) for one in documents):
            raise TypeError("expected a list of Documents; use CachedTextEmbedder for a str")
        source = self.embedder if hasattr(self.embedder, "meta_fields_to_embed") else self
        names = source.meta_fields_to_embed or []
        separator = getattr(source, "embedding_separator", "\n")
        texts = []
        for document in documents:
            values = [str(document.meta[name]) for name in names if document.meta.get(name) is not None]
            texts.append(separator.join([*values, document.content or ""]))
        return texts

    def _cut(self, texts: int) -> list[slice]:
        return [slice(texts)] if texts else []

    def _make_input(self, texts: list[str]) -> list[Document]:
        # The ids are positions, because the ids that Haystack makes from the content are equal for "" and "None".
        return [Document(id=str(position), content=text) for position, text in enumerate(texts)]

    def _read_vectors(self, texts: list[str], answer: Mapping[str, Any]) -> dict[str, Any]:
        waiting = {str(position): text for position, text in enumerate(texts)}
        vectors = {}
        for document in answer["documents"]:
            text = waiting.pop(document.id, None)
            if text is None:
                raise ProviderError("the embedder returned a document twice, or one that was not passed to it")
            if document.embedding is not None:
                vectors[text] = document.embedding
            elif document.sparse_embedding is not None:
                raise ProviderError(
                    "the embedder makes sparse embeddings, which cannot be cached; use it without "
                    "CachedDocumentEmbedder"
                )
        return vectors


def _make_answer(documents: list[Document], fetched: Fetched, meta: dict[str, Any]) -> dict[str, Any]:
    for error in fetched.failed.values():
        if not isinstance(error, NotEmbedded):
            raise error
    if fetched.failed:
        ids = ", ".join(documents[position].id for position in list(fetched.failed)[:5])
        more = ", ..." if len(fetched.failed) > 5 else ""
        log.warning("%d of %d documents got no embedding: %s%s", len(fetched.failed), len(documents), ids, more)
    embedded = [
        replace(document, embedding=None if row is None else row.tolist())
        for document, row in zip(documents, fetched.rows, strict=True)
    ]
    return {"documents": embedded, "meta": meta}
