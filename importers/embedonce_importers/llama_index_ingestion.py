"""The ``llama-index-ingestion`` importer: the ingestion cache of LlamaIndex, in a JSON file or in Redis.

The cache of an IngestionPipeline has one entry per run and transformation: all nodes that the transformation returned.
After the embedding, the nodes have their vectors. What was embedded is the content of a node in the mode EMBED, which
is rebuilt from the node, see :mod:`._llama_index_nodes`.
"""

from __future__ import annotations

import io
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Final, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from embedonce import hookimpl
from embedonce.contracts import FoundVectors, Source
from embedonce.errors import ConfigError, SourceError
from embedonce.options import Doc

from ._json_stores import JsonReader, JsonStore
from ._llama_index import UNKNOWN_LINE_BREAKS, LineBreaks, check_line_breaks, find_embedded_text
from ._llama_index_nodes import Fields, read_nodes, rebuild_content
from ._values import DecodedVector, decode_json

api = 1

PART: Final = 1024
"""Number of nodes that a scan yields at once."""

CHANGED: Final = "nodes that a later step of the pipeline may have changed after they were embedded"
BROKEN: Final = "entries that are not valid JSON"


class LlamaIndexIngestionImporter:
    """Reads the nodes that have a vector from an ingestion cache of LlamaIndex.

    A scan reads the cache twice. A pipeline may have steps after the embedding that change the metadata or the text of
    a node, and the cache has the nodes of these steps too, with the vector of the content before the change. So the
    first pass compares the contents that a vector has, and nodes whose content is not always the same are left out.
    It remembers 16 bytes per node.
    """

    def __init__(
        self,
        *,
        path: Annotated[
            Path | None, Doc("The JSON file of the cache, named llama_cache in the folder of pipeline.persist.")
        ] = None,
        url: Annotated[str | None, Doc("URL of the Redis server, such as redis://host:6379/0.")] = None,
        collection: Annotated[str, Doc("Collection of the cache, the argument of IngestionCache.")] = "llama_cache",
        line_breaks: LineBreaks = None,
    ) -> None:
        if (path is None) == (url is None):
            raise ConfigError("set either path, for a JSON file, or url, for a Redis server")
        check_line_breaks(line_breaks)
        self._store: _Store = (
            _FileStore(Path(path), collection) if path is not None else _RedisStore(str(url), collection)
        )
        self._line_breaks = line_breaks
        self.source = Source(
            f"llama-index-ingestion: {self._store.name}, collection={collection}, line_breaks={line_breaks}",
            task="document",
        )

    def check(self) -> None:
        """Read the first entry of the cache.

        Raises:
            SourceError: the cache cannot be read, or the collection is missing or has something else than nodes.
        """
        self._store.check()

    def scan(self) -> Iterator[FoundVectors]:
        """Yield the content and the vector of each node that has a vector.

        Raises:
            SourceError: the cache cannot be read.
        """
        contents = _Contents()
        for fields in self._store.read_nodes({}):
            if _has_vector(fields):
                contents.add(_hash_vector(fields), _hash_content(fields))
        contents.freeze()
        found: list[str] = []
        vectors: list[DecodedVector] = []
        unreadable: dict[str, int] = {}
        for fields in self._store.read_nodes(unreadable):
            if fields and not _has_vector(fields):  # the output of a step before the embedding
                continue
            try:
                text, vector = self._read_node(fields, contents)
            except ValueError as error:
                unreadable[str(error)] = unreadable.get(str(error), 0) + 1
            else:
                found.append(text)
                vectors.append(vector)
            if len(found) + sum(unreadable.values()) >= PART:
                yield FoundVectors(found, vectors, dict(unreadable))
                found, vectors = [], []
                unreadable.clear()  # the store counts in the same dict
        if found or unreadable:
            yield FoundVectors(found, vectors, dict(unreadable))

    def count(self) -> None:
        """Return None, because only reading all entries tells the number of nodes."""

    def close(self) -> None:
        """Close the connections to Redis. A second call does nothing."""
        self._store.close()

    def _read_node(self, fields: Fields, contents: _Contents) -> tuple[str, DecodedVector]:
        content = rebuild_content(fields)
        text = find_embedded_text(content, self._line_breaks)
        if text is None:
            raise ValueError(UNKNOWN_LINE_BREAKS)
        vector = decode_json(fields["embedding"])
        if not contents.is_certain(_hash_vector(fields), _hash(content)):
            raise ValueError(CHANGED)
        return text, vector


class _Contents:
    """The content of each vector, as hashes. It tells whether a vector occurs with several contents."""

    def __init__(self) -> None:
        self._added_vectors, self._added_contents = array("Q"), array("Q")
        self._vectors: NDArray[np.uint64] = np.empty(0, np.uint64)
        self._contents: NDArray[np.uint64] = np.empty(0, np.uint64)

    def add(self, vector: int, content: int) -> None:
        self._added_vectors.append(vector)
        self._added_contents.append(content)

    def freeze(self) -> None:
        """Keep the vectors that have one content, sorted, for :meth:`is_certain`."""
        if not self._added_vectors:
            return
        vectors = np.frombuffer(self._added_vectors, np.uint64)
        order = np.argsort(vectors)
        contents: NDArray[np.uint64] = np.frombuffer(self._added_contents, np.uint64)[order]
        unique, starts = np.unique(vectors[order], return_index=True)
        lowest: NDArray[np.uint64] = np.minimum.reduceat(contents, starts)
        is_same = lowest == np.maximum.reduceat(contents, starts)
        self._vectors, self._contents = unique[is_same], lowest[is_same]

    def is_certain(self, vector: int, content: int) -> bool:
        """Return whether the vector had this content, and no other one."""
        wanted = np.uint64(vector)
        at = int(np.searchsorted(self._vectors, wanted))
        return at < len(self._vectors) and self._vectors[at] == wanted and int(self._contents[at]) == content


class _Store(Protocol):
    @property
    def name(self) -> str: ...

    def check(self) -> None: ...

    def read_nodes(self, unreadable: dict[str, int]) -> Iterator[Fields]:
        """Yield the fields of all nodes. Entries that cannot be read are counted in ``unreadable``."""
        ...

    def close(self) -> None: ...


class _FileStore:
    def __init__(self, path: Path, collection: str) -> None:
        self._store = JsonStore(path, collection, example="pipeline.persist(…) or cache.persist(…)")
        self.name = str(path)

    def check(self) -> None:
        with self._store.open() as (_, entries):
            for _, reader in entries:
                _check_first(next(read_nodes(reader), None), self.name, self._store.collection)
                return

    def read_nodes(self, unreadable: dict[str, int]) -> Iterator[Fields]:
        with self._store.open() as (check_unchanged, entries):
            for _, reader in entries:
                for number, fields in enumerate(read_nodes(reader)):
                    if not number % PART:
                        check_unchanged()
                    yield fields
            check_unchanged()

    def close(self) -> None:
        """Do nothing, because no file stays open."""


class _RedisStore:
    def __init__(self, url: str, collection: str) -> None:
        from ._redis import RedisReader  # needs redis-py, which a JSON file does not

        self._redis = RedisReader(url)
        self._collection = collection
        self.name = self._redis.name

    def check(self) -> None:
        with self._redis.explain_errors():
            if not self._redis.count_fields(self._collection.encode()):
                raise SourceError(
                    f"{self.name} has no hash {self._collection!r}; set collection to the one of the IngestionCache, "
                    "and check the database in url"
                )
            for page in self._redis.scan_fields(self._collection.encode(), page=1):
                for _, value in page:
                    try:
                        first = next(read_nodes(JsonReader(io.BytesIO(value))), None)
                    except ValueError:
                        first = {}
                    _check_first(first, self.name, self._collection)
                    return

    def read_nodes(self, unreadable: dict[str, int]) -> Iterator[Fields]:
        # An entry has all nodes of a run, so it may be as large as Redis allows. So each page has about one entry.
        for page in self._redis.scan_fields(self._collection.encode(), page=1):
            for _, value in page:
                try:
                    yield from read_nodes(JsonReader(io.BytesIO(value)))
                except ValueError:
                    unreadable[BROKEN] = unreadable.get(BROKEN, 0) + 1

    def close(self) -> None:
        self._redis.close()


def _check_first(fields: Fields | None, where: str, collection: str) -> None:
    """Check the first node of the first entry, which is None if the entry has no node.

    Raises:
        SourceError: it is not a node.
    """
    if fields is not None and not {"__type__", "id_", "class_name"} <= fields.keys():
        raise SourceError(
            f"{where}: collection {collection!r} has something other than the nodes of an ingestion cache; set "
            "collection to the one of the IngestionCache. An embeddings cache has the importers llama-index and "
            "llama-index-redis"
        )


def _has_vector(fields: Fields) -> bool:
    return fields.get("embedding", b"null") != b"null"


def _hash_vector(fields: Fields) -> int:
    """Return a hash of a node's identifier and vector, which a later step of a pipeline does not change."""
    return _hash(fields.get("id_", b"") + b"\0" + fields["embedding"])


def _hash_content(fields: Fields) -> int:
    try:
        return _hash(rebuild_content(fields))
    except ValueError:
        return 0  # another content than any that is known


def _hash(value: str | bytes) -> int:
    return xxhash.xxh3_64_intdigest(value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value)


@hookimpl
def embedonce_importers() -> Mapping[str, type[LlamaIndexIngestionImporter]]:
    return {"llama-index-ingestion": LlamaIndexIngestionImporter}
