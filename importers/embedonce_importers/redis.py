"""The ``redis`` importer: strings or hashes in Redis under keys that are made from texts.

Programs after the pattern of many tutorials write ``embed:v1:`` and the SHA-256 of the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

from embedonce import hookimpl
from embedonce.contracts import FoundVectors, Source
from embedonce.errors import ConfigError, SourceError
from embedonce.options import Doc

from ._found import collect_vectors
from ._key_templates import KeyOption, KeyTemplate, ModelOption, StepsOption
from ._redis import RedisReader, UrlOption, WrongType
from ._values import DECODERS, DecodedVector, ValueOption

api = 1


class RedisImporter:
    """Finds vectors under keys such as ``embed:v1:`` and the hash of the text."""

    def __init__(
        self,
        *,
        url: UrlOption,
        key: KeyOption,
        prefix: Annotated[str, Doc('Text before every key, such as "embed:v1:".')] = "",
        model: ModelOption = None,
        steps: StepsOption = (),
        value: ValueOption = "json",
        field: Annotated[
            str | None, Doc("Field with the vector, if the value of a key is a hash. By default, it is a string.")
        ] = None,
    ) -> None:
        if value not in DECODERS:
            raise ConfigError(f"value must be one of {', '.join(DECODERS)}")
        self._template = KeyTemplate(key, model=model, steps=steps)
        self._reader = RedisReader(url)
        self._prefix = prefix
        self._decode_value = DECODERS[value]
        self._field = field
        self.source = Source(
            f"redis: {self._reader.name}, prefix={prefix!r}, {self._template.name}, value={value}, field={field!r}"
        )

    def check(self) -> None:
        """Look for a key with the prefix, and for the field.

        Raises:
            SourceError: Redis cannot be read, or it has no such key or field.
        """
        kind, other = ("string", "hash") if self._field is None else ("hash", "string")
        prefix = self._prefix.encode()
        with self._reader.explain_errors():
            keys, has_all = self._reader.sample_keys(prefix, kind)
            others = [] if keys or not has_all else self._reader.sample_keys(prefix, other)[0]
            rows = [] if self._field is None else self._reader.get_fields(keys, [self._field])
        named = f"that starts with {self._prefix!r} " if self._prefix else ""
        if others:
            advice = "set field to the field with the vector" if self._field is None else "remove the option field"
            raise SourceError(f"in {self._reader.name}, each key {named}is a {other} and not a {kind}; {advice}")
        if not keys and has_all:
            raise SourceError(
                f"{self._reader.name} has no key {named}that is a {kind}; check prefix, and the database in url"
            )
        if rows and not any(isinstance(row, list) and row[0] is not None for row in rows):
            raise SourceError(f"no hash {named}in {self._reader.name} has a field {self._field!r}; check field")

    def lookup(self, texts: Sequence[str], /) -> FoundVectors:
        """Return the texts that the store has."""
        groups = self._template.group_by_key(texts)
        keys = list(groups)
        encoded = [(self._prefix + key).encode("utf-8", "surrogatepass") for key in keys]
        values: list[bytes | WrongType | None]
        if self._field is None:
            values = [*self._reader.get_values(encoded)]
        else:
            rows = self._reader.get_fields(encoded, [self._field])
            values = [row if isinstance(row, WrongType) else row[0] for row in rows]

        def pair_texts() -> Iterator[tuple[str, bytes | WrongType]]:
            for key, value in zip(keys, values, strict=True):
                if value is not None:
                    yield from ((text, value) for text in groups[key])

        return collect_vectors(pair_texts(), self._read)

    def close(self) -> None:
        """Close the connections."""
        self._reader.close()

    def _read(self, item: tuple[str, bytes | WrongType]) -> tuple[str, DecodedVector]:
        text, value = item
        if isinstance(value, WrongType):
            raise ValueError("not a hash")
        return text, self._decode_value(value)


@hookimpl
def embedonce_importers() -> Mapping[str, type[RedisImporter]]:
    return {"redis": RedisImporter}
