"""The ``chroma`` importer: a collection of Chroma, in a folder or on a server.

Chroma writes to its folder when it opens it: it inserts a row into ``acquire_write``, and applies migrations. So a copy
of the folder is opened, which is removed at the end. No embedding function is loaded, and telemetry is off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol
from urllib.parse import quote

import numpy as np
from pydantic_core import from_json

from embedonce import hookimpl
from embedonce.contracts import FoundVectors, Source, time_left
from embedonce.errors import ConfigError, SourceError
from embedonce.options import Doc

from ._http_urls import parse_http_url
from ._llama_index_texts import NODE_COLUMN, is_text_alone_embedded
from ._missing_names import describe_missing
from ._packages import require_package
from ._store_copies import StoreCopy

if TYPE_CHECKING:
    import httpx

api = 1

PAGE = 1024
"""Number of records in a request."""
DEFAULT_PORT = 8000
TIMEOUT = 60.0
"""Seconds that a request without a deadline may take."""


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
        with self._open() as collection, self._translate():
            collection.get(limit=1, offset=0, include=["documents", "embeddings", "metadatas"])

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
        with self._open() as collection, self._translate():
            return collection.count()

    def close(self) -> None:
        """Remove the copy of the folder."""
        if self._copy is not None:
            self._copy.close()

    @contextmanager
    def _open(self) -> Iterator[_Collection]:
        """Give the collection. Each call has a client of its own, so that threads and processes share no connection."""
        opened = self._open_server() if self._url is not None else self._open_folder()
        with opened as collection:
            yield collection

    @contextmanager
    def _open_folder(self) -> Iterator[_Collection]:
        import chromadb
        from chromadb.config import Settings

        assert self._copy is not None
        copy = self._copy.get_path()
        with self._translate():
            settings = Settings(anonymized_telemetry=False)
            place = {"tenant": self._tenant, "database": self._database}
            client: Any = chromadb.PersistentClient(copy, settings=settings, **place)
        try:
            with self._translate():
                name = self._choose_collection([collection.name for collection in client.list_collections()])
                collection = client.get_collection(name, embedding_function=None)
            yield collection
        finally:
            client.close()

    @contextmanager
    def _open_server(self) -> Iterator[_Collection]:
        import httpx

        left = time_left()
        headers = {} if self._api_key is None else {"X-Chroma-Token": self._api_key}
        with httpx.Client(
            base_url=str(self._url), headers=headers, timeout=TIMEOUT if left is None else left
        ) as client:
            place = f"/api/v2/tenants/{quote(self._tenant, '')}/databases/{quote(self._database, '')}/collections"
            with self._translate():
                found = self._find_on_server(client, place)
            yield _ServerCollection(client, f"{place}/{quote(found, '')}")

    def _find_on_server(self, client: httpx.Client, place: str) -> str:
        """Return the id of the collection. A server may list only some of its collections, so a name is tried first."""
        if self._collection is not None:
            answer = client.get(f"{place}/{quote(self._collection, '')}")
            if answer.is_success:
                return str(from_json(answer.content)["id"])
        listed = {entry["name"]: str(entry["id"]) for entry in _send(client, "GET", place)}
        return listed[self._choose_collection(list(listed))]

    def _choose_collection(self, names: Sequence[str]) -> str:
        names = sorted(names)
        if self._collection is None:
            if len(names) != 1:
                shown = ", ".join(repr(known) for known in names[:20]) or "none"
                raise SourceError(f"{self._where}: choose a collection with the option collection; it has {shown}")
            return names[0]
        if self._collection not in names:
            message = f"{self._where} has no collection"
            raise SourceError(describe_missing(message, self._collection, names, "collections"))
        return self._collection

    @contextmanager
    def _translate(self) -> Iterator[None]:
        """Raise :class:`SourceError` for the client's errors. Their messages may repeat what a server answered."""
        from chromadb.errors import ChromaError
        from httpx import HTTPError, HTTPStatusError

        options = f"the tenant {self._tenant!r} and the database {self._database!r}"
        try:
            yield
        except HTTPStatusError as error:
            status = error.response.status_code
            advice = "set api_key to a key that may read" if status in (401, 403) else "check the URL and these options"
            raise SourceError(f"{self._url} answered with status {status} for {options}; {advice}") from None
        except (ChromaError, HTTPError, ValueError, KeyError, TypeError, OSError) as error:
            if self._url is not None:
                raise SourceError(
                    f"{self._url} does not answer as a Chroma server ({type(error).__name__}); check the URL, and that "
                    "the server is running"
                ) from None
            raise SourceError(
                f"{self._where} cannot be read as a Chroma store with {options} ({type(error).__name__}); check these "
                "options"
            ) from None


class _Collection(Protocol):
    """The methods of Chroma's ``Collection`` that the importer calls."""

    def count(self) -> int: ...

    def get(self, *, limit: int, offset: int, include: Sequence[str]) -> Mapping[str, Any]: ...


class _ServerCollection:
    """A collection on a server, by version 2 of Chroma's REST interface.

    Chroma's own ``HttpClient`` has no timeout and does not close its connections.
    """

    def __init__(self, client: httpx.Client, place: str) -> None:
        self._client = client
        self._place = place

    def count(self) -> int:
        return int(_send(self._client, "GET", f"{self._place}/count"))

    def get(self, *, limit: int, offset: int, include: Sequence[str]) -> Mapping[str, Any]:
        request = {"limit": limit, "offset": offset, "include": list(include)}
        answer: Mapping[str, Any] = _send(self._client, "POST", f"{self._place}/get", request)
        return answer


def _send(client: httpx.Client, method: str, path: str, content: object = None) -> Any:
    answer = client.request(method, path, json=content)
    answer.raise_for_status()
    return from_json(answer.content)


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
