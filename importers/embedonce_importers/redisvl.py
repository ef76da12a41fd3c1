"""The ``redisvl`` importer: the EmbeddingsCache of RedisVL.

The key of a text is ``{name}:`` and the SHA-256 of ``{text}:{model}``. The value is a hash with the text, the model and
the vector as a JSON list. The SHA-256 does not tell the text "a:b" with the model "c" from the text "a" with the model
"b:c", so the stored text and model are compared with those that were asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, TypeAlias

from embedonce import hookimpl
from embedonce.contracts import FoundVectors, Source
from embedonce.errors import SourceError
from embedonce.options import Doc

from ._found import collect_vectors
from ._missing_names import describe_missing
from ._redis import RedisReader, UrlOption, WrongType
from ._values import DecodedVector, decode_json

api = 1

OTHER_CONTENT = "an entry of bytes, or of another text or model"
FIELDS = ("content", "model_name", "embedding")

Row: TypeAlias = "Sequence[bytes | None] | WrongType"


class RedisVLImporter:
    """Finds vectors of one model in an EmbeddingsCache."""

    def __init__(
        self,
        *,
        url: UrlOption,
        model: Annotated[str, Doc("Name of the model as RedisVL stores it: the attribute model of the vectorizer.")],
        name: Annotated[str, Doc("Name of the EmbeddingsCache.")] = "embedcache",
    ) -> None:
        self._reader = RedisReader(url)
        self._model = model
        self._prefix = f"{name}:".encode()
        self.source = Source(
            f"redisvl: {self._reader.name}, name={name!r}, model={model!r}",
            mixing="RedisVL stores the vectors of queries and of documents (input_type) under the same key",
        )

    def check(self) -> None:
        """Look for an entry of the model.

        Raises:
            SourceError: Redis cannot be read, or it has no cache of this name or no entry of this model.
        """
        with self._reader.explain_errors():
            keys, has_all = self._reader.sample_keys(self._prefix, "hash")
            rows = self._reader.get_fields(keys, ["model_name"])
        models = {row[0].decode("utf-8", "replace") for row in rows if not isinstance(row, WrongType) and row[0]}
        if self._model in models or not has_all:
            return
        name = self._prefix[:-1].decode()
        if not models:
            raise SourceError(
                f"{self._reader.name} has no EmbeddingsCache with the name {name!r}; set name to the one that the "
                "program gave it, and check the database in url"
            )
        problem = f"the EmbeddingsCache {name!r} of {self._reader.name} has no entry of the model"
        raise SourceError(describe_missing(problem, self._model, sorted(models), "models"))

    def lookup(self, texts: Sequence[str], /) -> FoundVectors:
        """Return the texts that the cache has."""
        keys = {text: key for text in texts if (key := self._make_key(text)) is not None}
        rows = self._reader.get_fields(list(keys.values()), FIELDS)
        stored = (item for item in zip(keys, rows, strict=True) if not _is_missing(item[1]))
        return collect_vectors(stored, self._read)

    def scan(self) -> Iterator[FoundVectors]:
        """Yield all texts of the model."""
        for keys in self._reader.scan_keys(self._prefix, "hash"):
            rows = self._reader.get_fields(keys, FIELDS)
            # The row of another model is skipped, and a key that was replaced by another type since it was listed.
            own = ((k, row) for k, row in zip(keys, rows, strict=True) if _get_model(row) == self._model.encode())
            yield collect_vectors(own, self._read_listed)

    def count(self) -> int | None:
        """Return None, because Redis does not count keys by their beginning."""
        return None

    def close(self) -> None:
        """Close the connections."""
        self._reader.close()

    def _make_key(self, text: str) -> bytes | None:
        """Return the key of a text; None if it has a lone surrogate, so that RedisVL cannot have stored it."""
        try:
            return self._prefix + hashlib.sha256(f"{text}:{self._model}".encode()).hexdigest().encode()
        except UnicodeEncodeError:
            return None

    def _read(self, item: tuple[str, Row]) -> tuple[str, DecodedVector]:
        text, row = item
        if isinstance(row, WrongType):
            raise ValueError("not a hash")
        content, model, embedding = row
        if content != text.encode() or model != self._model.encode():
            raise ValueError(OTHER_CONTENT)
        if embedding is None:
            raise ValueError("no embedding")
        return text, decode_json(embedding)

    def _read_listed(self, item: tuple[bytes, Row]) -> tuple[str, DecodedVector]:
        key, row = item
        content = b"" if isinstance(row, WrongType) else row[0] or b""
        # Bytes are embedded too, such as those of an image. Their key is the hash of their hexadecimal form, even if
        # they can be decoded as a text.
        text = content.decode("utf-8", "replace")
        if key != self._make_key(text):
            raise ValueError(OTHER_CONTENT)
        return self._read((text, row))


def _get_model(row: Row) -> bytes | None:
    return None if isinstance(row, WrongType) else row[1]


def _is_missing(row: Row) -> bool:
    return not isinstance(row, WrongType) and all(value is None for value in row)


@hookimpl
def embedonce_importers() -> Mapping[str, type[RedisVLImporter]]:
    return {"redisvl": RedisVLImporter}
