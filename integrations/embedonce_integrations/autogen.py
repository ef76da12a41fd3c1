"""AutoGen: a memory that embeds each chunk once and gives an agent the chunks nearest to what it was asked.

AutoGen's other door, an embedding function for its Chroma memory, is
:class:`embedonce_integrations.chroma.CachedEmbeddingFunction`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from embedonce.similarity import top_k

from .wrapping import shared_cache, writable

try:
    from autogen_core import CancellationToken, Component
    from autogen_core.memory import Memory, MemoryContent, MemoryMimeType, MemoryQueryResult, UpdateContextResult
    from autogen_core.model_context import ChatCompletionContext
    from autogen_core.models import LLMMessage, SystemMessage
except ImportError as error:
    raise ImportError("AutoGen is not installed: pip install 'embedonce[autogen]'") from error

T = TypeVar("T")

TEXTS = (MemoryMimeType.TEXT, MemoryMimeType.MARKDOWN)


class CachedMemoryConfig(BaseModel):
    """What a :class:`CachedMemory` is made of, as AutoGen dumps and loads it."""

    config: str | dict[str, Any] | None = None
    """A TOML file, a dict of its shape, or None to look for a file. Write secrets as ``${VARIABLE}``."""
    name: str = "embedonce"
    k: int = 3
    score_threshold: float | None = None
    store_metadata: bool = False
    memory_contents: list[MemoryContent] = []


class CachedMemory(Memory, Component[CachedMemoryConfig]):
    """Holds chunks of text in order, with their vectors; an embedding is computed once, by whichever process.

    Chunks are held in this process, vectors in the tiers of ``config`` as well: adding the same chunks after a
    restart computes nothing.

    Args:
        config: what :func:`embedonce.open` takes; its ``[provider]`` makes the vectors.
        name: for whoever has several memories.
        k: how many chunks a query finds.
        score_threshold: chunks whose cosine similarity is below are not found.
        store_metadata: store a chunk's metadata beside its vector in the tiers, too (small JSON).
        memory_contents: chunks to begin with; they are embedded by the first query.
    """

    component_config_schema = CachedMemoryConfig
    component_provider_override = "embedonce_integrations.autogen.CachedMemory"

    def __init__(
        self,
        config: str | dict[str, Any] | None = None,
        *,
        name: str = "embedonce",
        k: int = 3,
        score_threshold: float | None = None,
        store_metadata: bool = False,
        memory_contents: Sequence[MemoryContent] = (),
    ) -> None:
        if not isinstance(k, int) or isinstance(k, bool):
            raise TypeError(f"k is an integer, not {type(k).__name__}")
        if k < 1:
            raise ValueError(f"k is at least 1, not {k}")
        self.cache = shared_cache(config)
        self._config = config
        self._name = name
        self._k = k
        self._score_threshold = score_threshold
        self._store_metadata = store_metadata
        self._contents: list[MemoryContent] = []
        self._rows: list[NDArray[np.float32]] = []
        self._matrix: NDArray[np.float32] | None = None
        self._not_embedded = _copies(memory_contents)
        self._lock = asyncio.Lock()

    @property
    def name(self) -> str:
        return self._name

    async def add(self, content: MemoryContent, cancellation_token: CancellationToken | None = None) -> None:
        """Add one chunk; what cannot be embedded is not added.

        Raises:
            ValueError: the content is no text and no JSON.
            Exception: whatever the provider raised.
        """
        await self.add_all([content], cancellation_token)

    async def add_all(
        self, contents: Sequence[MemoryContent], cancellation_token: CancellationToken | None = None
    ) -> list[str | None]:
        """Add chunks, all in one batch or none of them. Return where each vector came from.

        That is a tier's name for a hit, ``"provider"`` for one that was computed. Raises as :meth:`add`.
        """
        return await _linked(self._add(_copies(contents)), cancellation_token)

    async def query(
        self, query: str | MemoryContent, cancellation_token: CancellationToken | None = None, **kwargs: Any
    ) -> MemoryQueryResult:
        """Return the chunks nearest to the query, nearest first, with their metadata and the cosine as ``score``.

        ``k`` and ``score_threshold`` as keywords stand for those of the memory.
        """
        k = kwargs.get("k", self._k)
        threshold = kwargs.get("score_threshold", self._score_threshold)
        return MemoryQueryResult(results=await _linked(self._nearest(_text(query), k, threshold), cancellation_token))

    async def update_context(self, model_context: ChatCompletionContext) -> UpdateContextResult:
        """Add the chunks nearest to the last message, and their metadata, to an agent's context."""
        messages = await model_context.get_messages()
        asked = _asked(messages[-1]) if messages else ""
        memories = await self.query(asked) if asked else MemoryQueryResult(results=[])
        if memories.results:
            lines = [f"{i}. {_line(content)}" for i, content in enumerate(memories.results, 1)]
            await model_context.add_message(SystemMessage(content="\n".join(["Relevant memory content:", *lines])))
        return UpdateContextResult(memories=memories)

    async def clear(self) -> None:
        """Remove all chunks from this memory. The vectors stay in the cache: they are right for whoever asks next."""
        async with self._lock:
            self._contents, self._rows, self._not_embedded, self._matrix = [], [], [], None

    async def close(self) -> None:
        """Wait until all vectors are written. The cache is shared, and stays open for the others."""
        await self.cache.aflush()

    async def _add(self, contents: list[MemoryContent]) -> list[str | None]:
        async with self._lock:
            return await self._embed(contents)

    async def _embed(self, contents: list[MemoryContent]) -> list[str | None]:
        texts = [_text(content) for content in contents]
        metadata = [content.metadata for content in contents] if self._store_metadata else None
        fetched = await self.cache.afetch(texts, metadata=metadata)
        for error in fetched.failed.values():
            raise error
        self._contents += contents
        self._rows += list(fetched.vectors)
        self._matrix = None
        return list(fetched.sources)

    async def _nearest(self, text: str, k: int, threshold: float | None) -> list[MemoryContent]:
        async with self._lock:
            if self._not_embedded:
                await self._embed(self._not_embedded)
                self._not_embedded = []
            if self._matrix is None and self._rows:
                self._matrix = np.stack(self._rows)
                self._rows = list(self._matrix)
            contents, matrix = list(self._contents), self._matrix
        if matrix is None:
            return []
        query = await self.cache.aembed(text, task="query")
        places, scores = top_k(query[None, :], matrix, k)
        return [
            _scored(contents[place], score)
            for place, score in zip(places[0].tolist(), scores[0].tolist(), strict=True)
            if threshold is None or score >= threshold
        ]

    def _to_config(self) -> CachedMemoryConfig:
        return CachedMemoryConfig(
            config=writable(self._config),
            name=self._name,
            k=self._k,
            score_threshold=self._score_threshold,
            store_metadata=self._store_metadata,
            memory_contents=[*self._contents, *self._not_embedded],
        )

    @classmethod
    def _from_config(cls, config: CachedMemoryConfig) -> Self:
        return cls(
            config.config,
            name=config.name,
            k=config.k,
            score_threshold=config.score_threshold,
            store_metadata=config.store_metadata,
            memory_contents=config.memory_contents,
        )


def _copies(contents: Sequence[MemoryContent]) -> list[MemoryContent]:
    """Return chunks that stay what their vectors were made of, whatever becomes of those that were given."""
    wrong = next((item for item in contents if not isinstance(item, MemoryContent)), None)
    if wrong is not None:
        raise TypeError(f"a memory holds MemoryContent, not {type(wrong).__name__}")
    return [content.model_copy(deep=True) for content in contents]


def _scored(content: MemoryContent, score: float) -> MemoryContent:
    found = content.model_copy(deep=True)
    found.metadata = {**(found.metadata or {}), "score": score}
    return found


async def _linked(work: Coroutine[Any, Any, T], token: CancellationToken | None) -> T:
    """Await work that a cancellation token cancels."""
    if token is None:
        return await work
    future = asyncio.ensure_future(work)
    token.link_future(future)
    return await future


def _text(content: str | MemoryContent) -> str:
    """Return what is embedded for a chunk or a query; JSON in a form that does not depend on the order of keys."""
    if isinstance(content, str):
        return content
    inner, kind = content.content, content.mime_type
    if isinstance(inner, str) and (kind in TEXTS or kind in [text.value for text in TEXTS]):
        return inner
    if isinstance(inner, Mapping) and kind in (MemoryMimeType.JSON, MemoryMimeType.JSON.value):
        return json.dumps(inner, sort_keys=True, ensure_ascii=False)
    shown = kind.value if isinstance(kind, MemoryMimeType) else kind
    raise ValueError(f"a {type(inner).__name__} of type {shown} has no text to embed: add text, Markdown or JSON")


def _asked(message: LLMMessage) -> str:
    """Return the text of a message; empty where it has none (an image, the result of a tool)."""
    content = message.content
    if isinstance(content, str):
        return content
    return "\n".join(part for part in content if isinstance(part, str))


def _line(content: MemoryContent) -> str:
    metadata = {name: value for name, value in (content.metadata or {}).items() if name != "score"}
    if not metadata:
        return _text(content)
    return f"{_text(content)} ({', '.join(f'{name}: {value}' for name, value in metadata.items())})"
