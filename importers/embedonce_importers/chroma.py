"""The ``chroma`` importer: a collection of Chroma, in a folder or on a server.

Chroma writes to its folder when it opens it: it inserts a row into ``acquire_write``, and applies migrations. So a copy
of the folder is opened, which is removed at the end. No embedding function is loaded, and telemetry is off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from embedonce import hookimpl
from embedonce.contracts import FoundVectors, Source
from embedonce.errors import ConfigError, SourceError
from embedonce.options import Doc

from ._http_urls import parse_http_url
from ._llama_index_texts import NODE_COLUMN, is_text_alone_embedded
from ._missing_names import describe_missing
from ._packages import require_package
from ._store_copies import StoreCopy

api = 1

PAGE = 1024
"""Number of records in a request."""
DEFAULT_PORT = 8000


class ChromaImporter:
    """Reads the documents and embeddings of a collection."""

    def __init__(
        self,
        *,
        path: Annotated[Path | None, Doc("Folder of a PersistentClient. It is copied and not changed.")] = None,
        url: Annotated[str | None, Doc("URL of a Chroma server, such as http://localhost:8000.")] = None,
        collection: Annotated[str | None, Doc("Collection to read. Default: the only one.")] = None,
        tenant: Annotated[str, Doc("Tenant that has the database.")] = "default_tenant",
        database: Annotated[str, Doc("Database that has the collection.")] = "default_database",
        api_key: Annotated[str | None, Doc("Key that is sent to the server as X-Chroma-Token.")] = None,
    ) -> None:
        require_package("chromadb")
        if (path is None) == (url is None):
            raise ConfigError("the importer chroma needs exactly one of the options path and url")
        if api_key is not None and url is None:
            raise ConfigError("api_key is for a server; leave it out with path")
        self._path = path
        self._url = None if url is None else parse_http_url(url, default_port=DEFAULT_PORT)
        self._collection = collection
        self._tenant = tenant
        self._database = database
        self._api_key = api_key
        self._copy = None if path is None else StoreCopy(path, "chroma.sqlite3", "Chroma")

    @property
    def _where(self) -> str:
        return str(self._path or self._url)

    @property
    def source(self) -> Source:
        """The place and the collection. Chroma stores the vectors of documents only."""
        named = "" if self._collection is None else f", collection {self._collection!r}"
        return Source(f"chroma {self._where}, {self._tenant}/{self._database}{named}", task="document")

    def check(self) -> None:
        """Open the collection and read a record.

        Raises:
            SourceError: the folder or the server is missing or is no Chroma, or the collection does not exist.
        """
        with self._open() as collection:
            collection.get(limit=1, include=["documents", "embeddings"])

    def scan(self) -> Iterator[FoundVectors]:
        """Yield the records in the order in which Chroma lists them.

        Raises:
            SourceError: the store cannot be read.
        """
        with self._open() as collection:
            offset = 0
            while True:
                # Chroma lists records in a fixed order, by their internal numbers.
                with self._translate():
                    page = collection.get(limit=PAGE, offset=offset, include=["documents", "embeddings", "metadatas"])
                if not page["ids"]:
                    return
                yield _read_page(page)
                offset += len(page["ids"])

    def count(self) -> int:
        """Return the number of records of the collection."""
        with self._open() as collection:
            return int(collection.count())

    def close(self) -> None:
        """Remove the copy of the folder."""
        if self._copy is not None:
            self._copy.close()

    @contextmanager
    def _open(self) -> Iterator[Any]:
        """Give the collection. Each call has a client of its own, so that threads and processes share no connection."""
        with self._translate():
            client = self._connect()
        try:
            with self._translate():
                collection = self._find_collection(client)
            yield collection
        finally:
            client.close()

    def _connect(self) -> Any:
        import chromadb
        from chromadb.config import Settings

        settings = Settings(anonymized_telemetry=False)
        options: dict[str, Any] = {"settings": settings, "tenant": self._tenant, "database": self._database}
        if self._copy is not None:
            return chromadb.PersistentClient(self._copy.get_path(), **options)
        assert self._url is not None
        headers = {} if self._api_key is None else {"X-Chroma-Token": self._api_key}
        # The settings of the environment must not name another server.
        settings.chroma_server_host = self._url.host
        settings.chroma_server_http_port = self._url.port
        return chromadb.HttpClient(self._url.host, self._url.port, ssl=self._url.is_tls, headers=headers, **options)

    def _find_collection(self, client: Any) -> Any:
        names = sorted(collection.name for collection in client.list_collections())
        name = self._collection
        if name is None:
            if len(names) != 1:
                shown = ", ".join(repr(known) for known in names[:20]) or "none"
                raise SourceError(f"{self._where}: choose a collection with the option collection; it has {shown}")
            name = names[0]
        elif name not in names:
            raise SourceError(describe_missing(f"{self._where} has no collection", name, names, "collections"))
        return client.get_collection(name, embedding_function=None)

    @contextmanager
    def _translate(self) -> Iterator[None]:
        from chromadb.errors import ChromaError
        from httpx import HTTPError

        try:
            yield
        except SourceError:
            raise
        except (ChromaError, HTTPError, ValueError, OSError) as error:
            # Chroma's message may repeat what a server answered, so only the names that it is about are shown.
            if self._url is not None and not isinstance(error, ChromaError):
                raise SourceError(
                    f"{self._url} does not answer as a Chroma server ({type(error).__name__}); check the URL, and that "
                    "the server is running"
                ) from None
            raise SourceError(
                f"{self._where} cannot be read as a Chroma store with the tenant {self._tenant!r} and the database "
                f"{self._database!r} ({type(error).__name__}); check these options"
            ) from None


def _read_page(page: Mapping[str, Any]) -> FoundVectors:
    documents: Sequence[str | None] = page["documents"]
    metadatas: Sequence[Mapping[str, Any] | None] = page["metadatas"]
    counts: Counter[str] = Counter()
    kept: list[int] = []
    for index, (document, metadata) in enumerate(zip(documents, metadatas, strict=True)):
        node = (metadata or {}).get(NODE_COLUMN)
        if document is None:
            counts["record without a document"] += 1
        elif isinstance(node, str) and not is_text_alone_embedded(node):
            counts["LlamaIndex node that was embedded together with its metadata"] += 1
        else:
            kept.append(index)
    # Chroma returns the numbers as float64, although it stores float32.
    vectors = np.asarray(page["embeddings"], np.float32)
    return FoundVectors([documents[index] or "" for index in kept], vectors[kept], counts)


@hookimpl
def embedonce_importers() -> Mapping[str, type[ChromaImporter]]:
    return {"chroma": ChromaImporter}
