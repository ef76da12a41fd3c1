"""The ``qdrant`` importer: a collection of a Qdrant server.

It does not open the folder of qdrant-client's local mode: that mode stores each point as a pickle, and a pickle can run
code when it is read. There is no ``lookup``: without an index of the texts, Qdrant would read every payload of the
collection for each call.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from embedonce import hookimpl
from embedonce.contracts import FoundVectors, Source, time_left
from embedonce.errors import SourceError
from embedonce.options import Doc

from ._http_urls import parse_http_url
from ._llama_index_texts import NODE_COLUMN, read_text
from ._missing_names import describe_missing
from ._packages import require_package

api = 1

log = logging.getLogger("embedonce")

PAGE = 512
"""Number of points in a request. With 384 dimensions, an answer has 4 MB."""
SAMPLE = 64
"""Number of points whose fields are looked at to find the texts."""
TIMEOUT = 60
"""Seconds that a request without a deadline may take."""
DEFAULT_PORT = 6333
TEXT_FIELDS = ("page_content", "content", "text", "document")
"""Fields in which LangChain, Haystack, other programs and FastEmbed store the texts."""


@dataclass(frozen=True, slots=True)
class _Fields:
    """What is read from each point."""

    collection: str
    text: str
    """The field with the text. It is ``_node_content`` for the points of LlamaIndex, which has the text in JSON."""
    vector: str
    """The name of the vector; empty for the vector without a name."""


class QdrantImporter:
    """Reads the payloads and vectors of a collection."""

    def __init__(
        self,
        *,
        url: Annotated[str, Doc("URL of the server, such as http://localhost:6333.")],
        collection: Annotated[str | None, Doc("Collection to read. Default: the only one.")] = None,
        text_field: Annotated[
            str | None,
            Doc("Field of the payload that has the text. Default: page_content, content, text or document."),
        ] = None,
        vector: Annotated[str | None, Doc("Name of the vector. Default: the only one.")] = None,
        api_key: Annotated[str | None, Doc("Key of the server, if it needs one.")] = None,
    ) -> None:
        require_package("qdrant_client")
        self._url = parse_http_url(url, default_port=DEFAULT_PORT)
        self._collection = collection
        self._text_field = text_field
        self._vector = vector
        self._api_key = api_key

    @property
    def source(self) -> Source:
        """The server and the other options. Vector databases store the vectors of documents."""
        options = {"collection": self._collection, "text_field": self._text_field, "vector": self._vector}
        named = "".join(f", {option} {value!r}" for option, value in options.items() if value is not None)
        return Source(f"qdrant {self._url}{named}", task="document")

    def check(self) -> None:
        """Find the collection, the vector and the field with the texts.

        Raises:
            SourceError: the server does not answer, or an option must say what to read.
        """
        with self._connect() as client:
            found = self._find_fields(client)
            if found is None:
                return
            parameters = _list_vectors(client.get_collection(found.collection))[found.vector]
            if str(parameters.distance).rpartition(".")[2].lower() == "cosine":
                log.info(
                    "%s, collection %r has the distance Cosine, for which Qdrant normalises each vector to length 1; "
                    "the import needs a provider that returns such vectors",
                    self._url,
                    found.collection,
                )

    def scan(self) -> Iterator[FoundVectors]:
        """Yield the points in the order of their numbers.

        Raises:
            SourceError: the server does not answer, or an option must say what to read.
        """
        with self._connect() as client:
            found = self._find_fields(client)
            if found is None:
                return
            offset = None
            while True:
                with self._translate():
                    points, offset = client.scroll(
                        found.collection,
                        limit=PAGE,
                        offset=offset,
                        with_payload=sorted({found.text, NODE_COLUMN}),
                        with_vectors=[found.vector] if found.vector else True,
                    )
                yield _read_points(points, found)
                if offset is None:
                    return

    def count(self) -> int:
        """Return about how many points the collection has."""
        with self._connect() as client, self._translate():
            return int(client.count(self._find_collection(client), exact=False).count)

    def close(self) -> None:
        """Do nothing, because each call has a client of its own."""

    @contextmanager
    def _connect(self) -> Iterator[Any]:
        from qdrant_client import QdrantClient

        left = time_left()
        with self._translate():
            client = QdrantClient(
                url=str(self._url),
                api_key=self._api_key,
                timeout=TIMEOUT if left is None else max(1, math.ceil(left)),
                check_compatibility=False,  # this would be a request of its own, and only prints a warning
            )
        try:
            yield client
        finally:
            client.close()

    def _find_fields(self, client: Any) -> _Fields | None:
        """Return what to read; None if the collection is empty."""
        with self._translate():
            name = self._find_collection(client)
            where = f"{self._url}, collection {name!r},"
            vector = _choose_vector(_list_vectors(client.get_collection(name)), self._vector, where)
            points, _ = client.scroll(name, limit=SAMPLE, with_payload=True, with_vectors=False)
            if not points:
                return None
            if self._text_field is not None and _has_field(client, name, self._text_field, points):
                return _Fields(name, self._text_field, vector)
        payloads = [point.payload or {} for point in points]
        return _Fields(name, _choose_text_field(payloads, self._text_field, where), vector)

    def _find_collection(self, client: Any) -> str:
        names: list[str] = sorted(collection.name for collection in client.get_collections().collections)
        if self._collection is not None:
            # An alias is not in the list of collections.
            if self._collection not in names and not client.collection_exists(self._collection):
                message = f"{self._url} has no collection"
                raise SourceError(describe_missing(message, self._collection, names, "collections"))
            return self._collection
        if len(names) != 1:
            shown = ", ".join(repr(name) for name in names[:20]) or "none"
            raise SourceError(f"{self._url}: choose a collection with the option collection; it has {shown}")
        return names[0]

    @contextmanager
    def _translate(self) -> Iterator[None]:
        """Raise :class:`SourceError` for the client's errors. Their messages may repeat what the server answered."""
        from qdrant_client.http.exceptions import ApiException, UnexpectedResponse

        try:
            yield
        except UnexpectedResponse as error:
            if error.status_code in (401, 403):
                raise SourceError(f"{self._url} refused the login; set api_key to a key that may read") from None
            raise SourceError(
                f"{self._url} answered with status {error.status_code}; check that the URL is that of a Qdrant server"
            ) from None
        except (ApiException, OSError, ValueError) as error:
            raise SourceError(
                f"{self._url} does not answer as a Qdrant server ({type(error).__name__}); check the URL, and that the "
                "server is running"
            ) from None


def _has_field(client: Any, collection: str, field: str, sample: Sequence[Any]) -> bool:
    """Tell whether a point has a field. If none of the sample has it, the server looks for it in all points."""
    from qdrant_client import models

    if any(field in (point.payload or {}) for point in sample):
        return True
    if len(sample) < SAMPLE:
        return False
    is_empty = models.IsEmptyCondition(is_empty=models.PayloadField(key=field))
    points, _ = client.scroll(collection, limit=1, scroll_filter=models.Filter(must_not=[is_empty]))
    return bool(points)


def _list_vectors(collection: Any) -> Mapping[str, Any]:
    """Return the parameters of each dense vector by its name."""
    vectors = collection.config.params.vectors
    if vectors is None:
        return {}
    return vectors if isinstance(vectors, dict) else {"": vectors}


def _choose_vector(vectors: Mapping[str, Any], wanted: str | None, where: str) -> str:
    if wanted is None:
        if len(vectors) != 1:
            shown = ", ".join(repr(name) for name in sorted(vectors)) or "no dense vector"
            raise SourceError(f"{where} has {shown}; choose a vector with the option vector")
        wanted = next(iter(vectors))
    elif wanted not in vectors:
        raise SourceError(describe_missing(f"{where} has no vector", wanted, sorted(vectors), "vectors"))
    parameters = vectors[wanted]
    if parameters.multivector_config is not None:
        raise SourceError(f"{where} has several vectors per text (a multivector); embedonce stores one vector per text")
    datatype = str(parameters.datatype or "float32").rpartition(".")[2].lower()
    if datatype not in ("float32", "float16"):
        raise SourceError(f"{where} stores its vectors as {datatype}, and not as the provider returned them")
    return wanted


def _choose_text_field(payloads: Sequence[Mapping[str, Any]], wanted: str | None, where: str) -> str:
    fields = sorted({name for payload in payloads for name in payload})
    if wanted is not None:
        raise SourceError(describe_missing(f"{where} has no field", wanted, fields, "fields"))
    found = [name for name in TEXT_FIELDS if any(isinstance(payload.get(name), str) for payload in payloads)]
    if not found and NODE_COLUMN in fields:
        return NODE_COLUMN
    if len(found) != 1:
        problem = (
            f"has more than one field that may have the texts, {found}" if found else "has no known field of texts"
        )
        shown = ", ".join(repr(name) for name in fields[:20]) or "none"
        raise SourceError(f"{where} {problem}; choose it with the option text_field. Its fields: {shown}")
    return found[0]


def _read_points(points: Sequence[Any], found: _Fields) -> FoundVectors:
    counts: Counter[str] = Counter()
    texts: list[str] = []
    vectors: list[Any] = []
    for point in points:
        vector = point.vector.get(found.vector) if isinstance(point.vector, dict) else point.vector
        text = _read_text(point.payload or {}, found.text, counts)
        if text is None:
            continue
        if not isinstance(vector, list) or not vector or isinstance(vector[0], list):
            counts["point without the vector"] += 1
            continue
        texts.append(text)
        vectors.append(vector)
    if not texts:
        return FoundVectors([], np.empty((0, 0), np.float32), counts)
    return FoundVectors(texts, np.array(vectors, np.float32), counts)


def _read_text(payload: Mapping[str, Any], field: str, counts: Counter[str]) -> str | None:
    node = payload.get(NODE_COLUMN)
    if isinstance(node, str):
        text = read_text(node)
        if text is None:
            counts["LlamaIndex node that has no text or was embedded together with its metadata"] += 1
            return None
        if field == NODE_COLUMN:
            return text
    value = payload.get(field)
    if not isinstance(value, str):
        counts["point without a text"] += 1
        return None
    return value


@hookimpl
def embedonce_importers() -> Mapping[str, type[QdrantImporter]]:
    return {"qdrant": QdrantImporter}
