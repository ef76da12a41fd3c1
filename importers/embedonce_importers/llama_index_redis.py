"""The ``llama-index-redis`` importer: the embeddings cache of LlamaIndex in a RedisKVStore.

A collection is one hash of Redis, ``embeddings``. Its fields are the texts, and a value is a JSON object with one list
of numbers under a random name. The store does not say which model made the vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

from embedonce import hookimpl
from embedonce.contracts import FoundVectors, Source
from embedonce.errors import SourceError
from embedonce.options import Doc

from ._found import collect_vectors
from ._llama_index import UNKNOWN_LINE_BREAKS, LineBreaks, check_line_breaks, decode_entry, find_embedded_text
from ._redis import RedisReader, UrlOption
from ._values import DecodedVector

api = 1

OTHER_TEXT = "texts with a line break, because the vector is of the text with a space in its place"


class LlamaIndexRedisImporter:
    """Finds vectors in a collection of LlamaIndex's RedisKVStore."""

    def __init__(
        self,
        *,
        url: UrlOption,
        collection: Annotated[
            str, Doc("Collection of the store. LlamaIndex always calls it embeddings.")
        ] = "embeddings",
        line_breaks: LineBreaks = None,
    ) -> None:
        check_line_breaks(line_breaks)
        self._reader = RedisReader(url)
        self._collection = collection
        self._line_breaks = line_breaks
        self.source = Source(
            f"llama-index-redis: {self._reader.name}, collection={collection!r}, line_breaks={line_breaks}",
            mixing="LlamaIndex stores the vectors of queries and of documents under the same key, which is the text",
        )

    def check(self) -> None:
        """Read one entry of the collection.

        Raises:
            SourceError: Redis cannot be read, or it does not have the collection, or that has no embeddings.
        """
        key = self._collection.encode()
        with self._reader.explain_errors():
            if not self._reader.count_fields(key):
                raise SourceError(
                    f"{self._reader.name} has no collection {self._collection!r}; check the database in url. "
                    "LlamaIndex calls the collection 'embeddings'"
                )
            page = next(self._reader.scan_fields(key, page=1), [])
        try:
            for _, value in page[:1]:
                decode_entry(value)
        except ValueError as error:
            raise SourceError(
                f"collection {self._collection!r} of {self._reader.name} has something other than embeddings "
                f"({error}); set collection to the one that has them, which LlamaIndex calls 'embeddings'. An "
                "ingestion cache has the importer llama-index-ingestion"
            ) from None

    def lookup(self, texts: Sequence[str], /) -> FoundVectors:
        """Return the texts that the collection has."""
        fields = {text: field for text in texts if (field := _encode(text)) is not None}
        values = self._reader.get_fields_of(self._collection.encode(), list(fields.values()))
        stored = ((text, value) for text, value in zip(fields, values, strict=True) if value is not None)
        return collect_vectors(stored, self._read_asked)

    def scan(self) -> Iterator[FoundVectors]:
        """Yield all texts of the collection."""
        for page in self._reader.scan_fields(self._collection.encode()):
            yield collect_vectors(page, self._read_listed)

    def count(self) -> int | None:
        """Return the number of entries of the collection."""
        return self._reader.count_fields(self._collection.encode())

    def close(self) -> None:
        """Close the connections."""
        self._reader.close()

    def _read_asked(self, item: tuple[str, bytes]) -> tuple[str, DecodedVector]:
        text, value = item
        embedded = find_embedded_text(text, self._line_breaks)
        if embedded is None:
            raise ValueError(UNKNOWN_LINE_BREAKS)
        if embedded != text:
            raise ValueError(OTHER_TEXT)
        return text, decode_entry(value)

    def _read_listed(self, item: tuple[bytes, bytes]) -> tuple[str, DecodedVector]:
        field, value = item
        try:
            text = find_embedded_text(field.decode(), self._line_breaks)
        except UnicodeDecodeError:
            raise ValueError("a text that is not UTF-8") from None
        if text is None:
            raise ValueError(UNKNOWN_LINE_BREAKS)
        return text, decode_entry(value)


def _encode(text: str) -> bytes | None:
    """Return the field of a text; None if it has a lone surrogate, so that LlamaIndex cannot have stored it."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return None


@hookimpl
def embedonce_importers() -> Mapping[str, type[LlamaIndexRedisImporter]]:
    return {"llama-index-redis": LlamaIndexRedisImporter}
