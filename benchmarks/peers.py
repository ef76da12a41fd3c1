"""The peers that embedonce is compared with: raw stores as floors, loops as in tutorials, other libraries' caches.

Each is a small class with the same methods: ``store(texts, vectors)`` is called once, and then ``read(texts)`` returns
float32 of shape (n, d). A peer that works with lists of floats gets lists and returns lists; turning them into a matrix
counts as part of its cost, because applications need a matrix.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Peer(ABC):
    """One way to store vectors. ``folder`` is an empty folder for peers that write files."""

    name: str
    note: str = ""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def store(self, texts: Sequence[str], vectors: Matrix) -> None: ...

    @abstractmethod
    def read(self, texts: Sequence[str]) -> Matrix: ...

    def read_one(self, text: str) -> Any:
        """Return the vector of one text, by the peer's own method for a single text."""
        return self.read([text])[0]

    def close(self) -> None:  # noqa: B027  (only peers with files override it)
        """Close files and connections."""


# --- floors ---------------------------------------------------------------------------------------


class DictOfArrays(Peer):
    """A SHA-256 per text and ``np.stack`` over a dict of arrays: the floor for a batch in memory."""

    name = "floor: sha256 + np.stack over a dict"

    def store(self, texts: Sequence[str], vectors: Matrix) -> None:
        self.held = {sha256(text): vector.copy() for text, vector in zip(texts, vectors, strict=True)}

    def read(self, texts: Sequence[str]) -> Matrix:
        return np.stack([self.held[sha256(text)] for text in texts])

    def read_one(self, text: str) -> Any:
        return self.held[sha256(text)]


class SelectIn(Peer):
    """A SHA-256 per text and one ``SELECT … IN`` per batch in SQLite, joined into one matrix: the floor on disk."""

    name = "floor: sha256 + SELECT IN"

    def store(self, texts: Sequence[str], vectors: Matrix) -> None:
        self.connection = sqlite3.connect(self.folder / "floor.db", isolation_level=None)
        self.connection.execute("PRAGMA page_size = 8192")
        self.connection.execute("PRAGMA journal_mode = WAL")
        self.connection.execute("PRAGMA cache_size = 8192")
        self.connection.execute("PRAGMA mmap_size = 67108864")
        self.connection.execute("CREATE TABLE vectors (key TEXT PRIMARY KEY, value BLOB)")
        self.connection.execute("BEGIN")
        rows = [(sha256(text), vector.tobytes()) for text, vector in zip(texts, vectors, strict=True)]
        self.connection.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", rows)
        self.connection.execute("COMMIT")

    def read(self, texts: Sequence[str]) -> Matrix:
        keys = [sha256(text) for text in texts]
        marks = ",".join("?" * len(keys))
        found = dict(self.connection.execute(f"SELECT key, value FROM vectors WHERE key IN ({marks})", keys))
        return np.frombuffer(b"".join([found[key] for key in keys]), np.float32).reshape(len(keys), -1)

    def close(self) -> None:
        self.connection.close()


# --- loops as in tutorials ------------------------------------------------------------------------


class DictOfLists(Peer):
    """A dict of lists of floats under a SHA-256, read text by text."""

    name = "sha256 + dict of lists"

    def store(self, texts: Sequence[str], vectors: Matrix) -> None:
        self.held = {sha256(text): vector.tolist() for text, vector in zip(texts, vectors, strict=True)}

    def read(self, texts: Sequence[str]) -> Matrix:
        return np.array([self.held[sha256(text)] for text in texts], np.float32)


class SqliteJson(Peer):
    """SQLite with vectors as JSON, and one query per text."""

    name = "sqlite + JSON loop"

    def store(self, texts: Sequence[str], vectors: Matrix) -> None:
        self.connection = sqlite3.connect(self.folder / "cache.db")
        self.connection.execute("CREATE TABLE embeddings (hash TEXT PRIMARY KEY, embedding TEXT)")
        for text, vector in zip(texts, vectors, strict=True):
            row = (sha256(text), json.dumps(vector.tolist()))
            self.connection.execute("INSERT OR REPLACE INTO embeddings VALUES (?, ?)", row)
        self.connection.commit()

    def read(self, texts: Sequence[str]) -> Matrix:
        query = "SELECT embedding FROM embeddings WHERE hash = ?"
        rows = [json.loads(self.connection.execute(query, (sha256(text),)).fetchone()[0]) for text in texts]
        return np.array(rows, np.float32)

    def close(self) -> None:
        self.connection.close()


class _Diskcache(Peer):
    """diskcache, read text by text."""

    encode: Callable[[Matrix], Any]
    decode: Callable[[Any], Any]

    def store(self, texts: Sequence[str], vectors: Matrix) -> None:
        import diskcache

        self.cache = diskcache.Cache(str(self.folder))
        with self.cache.transact():
            for text, vector in zip(texts, vectors, strict=True):
                self.cache.set(sha256(text), type(self).encode(vector))

    def read(self, texts: Sequence[str]) -> Matrix:
        decode = type(self).decode
        return np.array([decode(self.cache.get(sha256(text))) for text in texts], np.float32)

    def close(self) -> None:
        self.cache.close()


class DiskcacheBytes(_Diskcache):
    name = "diskcache loop, bytes"
    encode = staticmethod(lambda vector: vector.tobytes())
    decode = staticmethod(lambda value: np.frombuffer(value, np.float32))

    def read(self, texts: Sequence[str]) -> Matrix:
        get = self.cache.get
        return np.frombuffer(b"".join([get(sha256(text)) for text in texts]), np.float32).reshape(len(texts), -1)


class DiskcacheArrays(_Diskcache):
    name = "diskcache loop, arrays"
    note = "pickles"
    encode = staticmethod(lambda vector: vector.copy())
    decode = staticmethod(lambda value: value)


class DiskcacheLists(_Diskcache):
    name = "diskcache loop, lists"
    note = "pickles"
    encode = staticmethod(lambda vector: vector.tolist())
    decode = staticmethod(lambda value: value)


class PickleFiles(Peer):
    """A folder with one pickle per text."""

    name = "a pickle file per text"
    note = "pickles"

    def store(self, texts: Sequence[str], vectors: Matrix) -> None:
        for text, vector in zip(texts, vectors, strict=True):
            (self.folder / sha256(text)).write_bytes(pickle.dumps(vector.tolist()))

    def read(self, texts: Sequence[str]) -> Matrix:
        return np.array([pickle.loads((self.folder / sha256(text)).read_bytes()) for text in texts], np.float32)


# --- other libraries ------------------------------------------------------------------------------


class _KnownVectors:
    """A model that returns known vectors, for libraries that compute what they store."""

    def __init__(self, texts: Iterable[str], vectors: Matrix) -> None:
        self.vectors = dict(zip(texts, vectors.tolist(), strict=True))

    def get_rows(self, texts: Sequence[str]) -> list[list[float]]:
        return [self.vectors[text] for text in texts]

    def forget(self) -> None:
        """Forget the vectors, so that a later miss is an error and every read comes from the cache."""
        self.vectors = {}


class _LangChain(Peer):
    """LangChain's CacheBackedEmbeddings, with documents and queries in one store under SHA-256 keys."""

    def byte_store(self) -> Any:
        raise NotImplementedError

    def store(self, texts: Sequence[str], vectors: Matrix) -> None:
        from langchain_classic.embeddings import CacheBackedEmbeddings
        from langchain_core.embeddings import Embeddings

        known = _KnownVectors(texts, vectors)

        class Model(Embeddings):
            def embed_documents(self, texts: list[str]) -> list[list[float]]:
                return known.get_rows(texts)

            def embed_query(self, text: str) -> list[float]:
                return known.get_rows([text])[0]

        self.cache = CacheBackedEmbeddings.from_bytes_store(
            Model(), self.byte_store(), namespace="model", key_encoder="sha256", query_embedding_cache=True
        )
        self.cache.embed_documents(list(texts))
        known.forget()

    def read(self, texts: Sequence[str]) -> Matrix:
        return np.array(self.cache.embed_documents(list(texts)), np.float32)

    def read_one(self, text: str) -> Any:
        return self.cache.embed_query(text)


class LangChainMemory(_LangChain):
    name = "LangChain CacheBackedEmbeddings, InMemoryByteStore"

    def byte_store(self) -> Any:
        from langchain_core.stores import InMemoryByteStore

        return InMemoryByteStore()


class LangChainFiles(_LangChain):
    name = "LangChain CacheBackedEmbeddings, LocalFileStore"

    def byte_store(self) -> Any:
        from langchain_classic.storage import LocalFileStore

        return LocalFileStore(self.folder)


def _llama_index_model(known: _KnownVectors, **options: Any) -> Any:
    from llama_index.core.base.embeddings.base import BaseEmbedding

    class Model(BaseEmbedding):
        def _get_text_embedding(self, text: str) -> list[float]:
            return known.get_rows([text])[0]

        def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
            return known.get_rows(texts)

        def _get_query_embedding(self, query: str) -> list[float]:
            return known.get_rows([query])[0]

        async def _aget_query_embedding(self, query: str) -> list[float]:
            return known.get_rows([query])[0]

    return Model(model_name="model", embed_batch_size=256, **options)


class LlamaIndexEmbeddingsCache(Peer):
    """LlamaIndex's ``BaseEmbedding(embeddings_cache=SimpleKVStore())``."""

    name = "LlamaIndex embeddings_cache, SimpleKVStore"
    note = "keys are raw texts, without the model"

    def store(self, texts: Sequence[str], vectors: Matrix) -> None:
        from llama_index.core.storage.kvstore import SimpleKVStore

        known = _KnownVectors(texts, vectors)
        self.model = _llama_index_model(known, embeddings_cache=SimpleKVStore())
        self.model.get_text_embedding_batch(list(texts))
        known.forget()

    def read(self, texts: Sequence[str]) -> Matrix:
        return np.array(self.model.get_text_embedding_batch(list(texts)), np.float32)

    def read_one(self, text: str) -> Any:
        return self.model.get_text_embedding(text)


class LlamaIndexIngestionCache(Peer):
    """LlamaIndex's ``IngestionPipeline(cache=IngestionCache())``: one entry for a whole list of nodes."""

    name = "LlamaIndex IngestionCache"
    note = "one entry per chunk; one changed text misses all of it"
    CHUNK = 256

    def store(self, texts: Sequence[str], vectors: Matrix) -> None:
        from llama_index.core.ingestion import IngestionCache, IngestionPipeline
        from llama_index.core.schema import TextNode

        known = _KnownVectors(texts, vectors)
        self.pipeline = IngestionPipeline(transformations=[_llama_index_model(known)], cache=IngestionCache())
        self.node = TextNode
        for start in range(0, len(texts), self.CHUNK):
            self.read(texts[start : start + self.CHUNK])
        for text in texts[: self.CHUNK]:
            self.read_one(text)
        known.forget()

    def read(self, texts: Sequence[str]) -> Matrix:
        nodes = self.pipeline.run(nodes=[self.node(text=text, id_=str(at)) for at, text in enumerate(texts)])
        return np.array([node.embedding for node in nodes], np.float32)


IN_MEMORY: tuple[type[Peer], ...] = (
    DictOfArrays,
    DictOfLists,
    LlamaIndexEmbeddingsCache,
    LlamaIndexIngestionCache,
    LangChainMemory,
)
ON_DISK: tuple[type[Peer], ...] = (
    SelectIn,
    DiskcacheBytes,
    DiskcacheArrays,
    DiskcacheLists,
    PickleFiles,
    SqliteJson,
    LangChainFiles,
)
