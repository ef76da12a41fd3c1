"""AutoGen: a memory that embeds each chunk once and gives an agent the chunks nearest to the last message.

For AutoGen's Chroma memory, use :class:`embedonce_integrations.chroma.CachedEmbeddingFunction`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, Self, TypeVar

import numpy as np
from pydantic import BaseModel

from embedonce.config import load
from embedonce.similarity import top_k
from embedonce.vectors import Matrix, Vector

from .wrapping import dump_config, keep_source, open_shared_cache

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
    """The arguments of a :class:`CachedMemory`, in the form in which AutoGen dumps and loads them."""

    config: str | dict[str, Any] | None = None
    """A TOML file, a dict of the same shape, or None to look for a file. Write secrets as ``${VARIABLE}``."""
    name: str = "embedonce"
    k: int = 3
    score_threshold: float | None = None
    store_metadata: bool = False
    memory_contents: list[MemoryContent] = []


class CachedMemory(Memory, Component[CachedMemoryConfig]):
    """Holds chunks of text in order, with their vectors. Each vector is computed once across all processes.

    The chunks exist only in this process, but their vectors are also in the tiers of ``config``. So after a restart,
    the same chunks can be added without embedding them again.

    Args:
        config: anything that :func:`embedonce.open` accepts. Its ``[provider]`` computes the vectors.
        name: name of the memory, to tell several memories apart.
        k: maximum number of chunks that a query returns.
        score_threshold: minimum cosine similarity of a chunk that a query returns.
        store_metadata: whether the tiers also store each chunk's metadata (small JSON) beside its vector.
        memory_contents: initial chunks; the first query embeds them.
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
            raise TypeError(f"k must be an integer, got {type(k).__name__}")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        loaded = load(config)
        self.cache = open_shared_cache(loaded)
        self._config = config
        self._source = keep_source(config, loaded)
        self._name = name
        self._k = k
        self._score_threshold = score_threshold
        self._store_metadata = store_metadata
        self._contents: list[MemoryContent] = []
        self._rows: list[Vector] = []
        self._matrix: Matrix | None = None
        self._not_embedded = _copy_chunks(memory_contents)
        self._lock = asyncio.Lock()

    @property
    def name(self) -> str:
        return self._name

    async def add(self, content: MemoryContent, cancellation_token: CancellationToken | None = None) -> None:
        """Add one chunk. If it cannot be embedded, it is not added.

        Raises:
            ValueError: the content is neither text nor JSON.
            Exception: the provider's own error.
        """
        await self.add_all([content], cancellation_token)

    async def add_all(
        self, contents: Sequence[MemoryContent], cancellation_token: CancellationToken | None = None
    ) -> list[str | None]:
        """Add chunks in one batch, either all or none, and return the source of each vector.

        The source is a tier's name for a hit, and ``"provider"`` for a computed vector. Raises the same errors as
        :meth:`add`.
        """
        return await _run_cancellable(self._add(_copy_chunks(contents)), cancellation_token)

    async def query(
        self, query: str | MemoryContent, cancellation_token: CancellationToken | None = None, **kwargs: Any
    ) -> MemoryQueryResult:
        """Return the chunks nearest to the query, nearest first. Their metadata includes the cosine as ``score``.

        The keywords ``k`` and ``score_threshold`` override the memory's own values.
        """
        k = kwargs.get("k", self._k)
        threshold = kwargs.get("score_threshold", self._score_threshold)
        found = await _run_cancellable(self._find_nearest(_text_of(query), k, threshold), cancellation_token)
        return MemoryQueryResult(results=found)

    async def update_context(self, model_context: ChatCompletionContext) -> UpdateContextResult:
        """Add the chunks nearest to the last message, and their metadata, to an agent's context."""
        messages = await model_context.get_messages()
        question = _message_text(messages[-1]) if messages else ""
        memories = await self.query(question) if question else MemoryQueryResult(results=[])
        if memories.results:
            lines = [f"{i}. {_format_chunk(content)}" for i, content in enumerate(memories.results, 1)]
            await model_context.add_message(SystemMessage(content="\n".join(["Relevant memory content:", *lines])))
        return UpdateContextResult(memories=memories)

    async def clear(self) -> None:
        """Remove all chunks from this memory. Their vectors stay in the cache, because they remain correct."""
        async with self._lock:
            self._contents, self._rows, self._not_embedded, self._matrix = [], [], [], None

    async def close(self) -> None:
        """Wait until all vectors are written. The cache stays open, because other memories may share it."""
        await self.cache.aflush()

    async def _add(self, contents: list[MemoryContent]) -> list[str | None]:
        async with self._lock:
            return await self._embed(contents)

    async def _embed(self, contents: list[MemoryContent]) -> list[str | None]:
        texts = [_text_of(content) for content in contents]
        metadata = [content.metadata for content in contents] if self._store_metadata else None
        fetched = await self.cache.afetch(texts, metadata=metadata)
        for error in fetched.failed.values():
            raise error
        self._contents += contents
        self._rows += list(fetched.vectors)
        self._matrix = None
        return list(fetched.sources)

    async def _find_nearest(self, text: str, k: int, threshold: float | None) -> list[MemoryContent]:
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
            _add_score(contents[place], score)
            for place, score in zip(places[0].tolist(), scores[0].tolist(), strict=True)
            if threshold is None or score >= threshold
        ]

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy, or a memory in another process, opens the cache by itself and finds the vectors there.
        arguments: dict[str, Any] = {
            "config": self._source,
            "name": self._name,
            "k": self._k,
            "score_threshold": self._score_threshold,
            "store_metadata": self._store_metadata,
            "memory_contents": [*self._contents, *self._not_embedded],
        }
        return partial(type(self), **arguments), ()

    def _to_config(self) -> CachedMemoryConfig:
        return CachedMemoryConfig(
            config=dump_config(self._config),
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


def _copy_chunks(contents: Sequence[MemoryContent]) -> list[MemoryContent]:
    """Copy the chunks, so that the copies match the vectors even if the caller changes the original chunks."""
    wrong = next((item for item in contents if not isinstance(item, MemoryContent)), None)
    if wrong is not None:
        raise TypeError(f"expected MemoryContent, got {type(wrong).__name__}")
    return [content.model_copy(deep=True) for content in contents]


def _add_score(content: MemoryContent, score: float) -> MemoryContent:
    found = content.model_copy(deep=True)
    found.metadata = {**(found.metadata or {}), "score": score}
    return found


async def _run_cancellable(work: Coroutine[Any, Any, T], token: CancellationToken | None) -> T:
    """Await a coroutine, and let the token cancel it."""
    if token is None:
        return await work
    future = asyncio.ensure_future(work)
    token.link_future(future)
    return await future


def _text_of(content: str | MemoryContent) -> str:
    """Return the text to embed for a chunk or a query. JSON is written with sorted keys, so equal
    objects have the same text.

    Raises:
        ValueError: the content is neither text nor JSON.
    """
    if isinstance(content, str):
        return content
    inner, kind = content.content, content.mime_type
    if isinstance(inner, str) and (kind in TEXTS or kind in [text.value for text in TEXTS]):
        return inner
    if isinstance(inner, Mapping) and kind in (MemoryMimeType.JSON, MemoryMimeType.JSON.value):
        return json.dumps(inner, sort_keys=True, ensure_ascii=False)
    shown = kind.value if isinstance(kind, MemoryMimeType) else kind
    raise ValueError(f"a {type(inner).__name__} of type {shown} has no text to embed; add text, Markdown or JSON")


def _message_text(message: LLMMessage) -> str:
    """Return the text of a message, or "" if the message has no text.

    For example, an image and the result of a tool have no text.
    """
    content = message.content
    if isinstance(content, str):
        return content
    return "\n".join(part for part in content if isinstance(part, str))


def _format_chunk(content: MemoryContent) -> str:
    metadata = {name: value for name, value in (content.metadata or {}).items() if name != "score"}
    if not metadata:
        return _text_of(content)
    return f"{_text_of(content)} ({', '.join(f'{name}: {value}' for name, value in metadata.items())})"
