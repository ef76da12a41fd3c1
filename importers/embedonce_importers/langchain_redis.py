"""The ``langchain-redis`` importer: LangChain's CacheBackedEmbeddings over a RedisStore of langchain_community.

The key of a text is ``{store_namespace}/{namespace}{hash}``, and the value is a JSON list of numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated

from embedonce import hookimpl
from embedonce.contracts import FoundVectors
from embedonce.errors import SourceError
from embedonce.options import Doc

from ._found import collect_vectors
from ._langchain_keys import (
    PATTERNS,
    KeyEncoder,
    KeyEncoderOption,
    NamespaceOption,
    QueryCacheOption,
    check_key_encoder,
    encode_key,
    make_source,
)
from ._redis import RedisReader, UrlOption
from ._values import DecodedVector, decode_json

api = 1


class LangChainRedisImporter:
    """Finds vectors that CacheBackedEmbeddings has stored in Redis."""

    def __init__(
        self,
        *,
        url: UrlOption,
        store_namespace: Annotated[str, Doc("The argument namespace of RedisStore.")] = "",
        namespace: NamespaceOption = "",
        key_encoder: KeyEncoderOption = "sha1",
        query_embedding_cache: QueryCacheOption = None,
    ) -> None:
        check_key_encoder(key_encoder)
        self._reader = RedisReader(url)
        self._prefix = f"{store_namespace}/" if store_namespace else ""
        self._namespace = namespace
        self._key_encoder: KeyEncoder = key_encoder
        self.source = make_source(
            f"langchain-redis: {self._reader.name}, store_namespace={store_namespace!r}, namespace={namespace!r}, "
            f"key_encoder={key_encoder}",
            query_embedding_cache=query_embedding_cache,
        )

    def check(self) -> None:
        """Look for a key of LangChain.

        Raises:
            SourceError: Redis cannot be read, or it has no key with these options.
        """
        prefix = self._prefix + self._namespace
        with self._reader.explain_errors():
            keys, has_all = self._reader.sample_keys(prefix.encode(), "string")
        hashes = [key[len(prefix.encode()) :].decode("ascii", "replace") for key in keys]
        forms = [name for name, pattern in PATTERNS.items() if any(re.fullmatch(pattern, hashed) for hashed in hashes)]
        if self._key_encoder in forms or not has_all:
            return
        problem = f"{self._reader.name} has no key of LangChain that starts with {prefix!r}"
        if forms:
            raise SourceError(
                f"{problem} and was made with {self._key_encoder}; set key_encoder to {' or '.join(forms)}"
            )
        raise SourceError(
            f"{problem}; set store_namespace to the argument namespace of RedisStore, namespace to the one of "
            "CacheBackedEmbeddings.from_bytes_store, and the database in url"
        )

    def lookup(self, texts: Sequence[str], /) -> FoundVectors:
        """Return the texts that the store has."""
        keys = {text: encode_key(text, self._prefix + self._namespace, self._key_encoder) for text in texts}
        asked = [(text, key) for text, key in keys.items() if key is not None]
        values = self._reader.get_values([key.encode() for _, key in asked])
        items = ((text, value) for (text, _), value in zip(asked, values, strict=True) if value is not None)
        return collect_vectors(items, _read)

    def close(self) -> None:
        """Close the connections."""
        self._reader.close()


def _read(item: tuple[str, bytes]) -> tuple[str, DecodedVector]:
    return item[0], decode_json(item[1])


@hookimpl
def embedonce_importers() -> Mapping[str, type[LangChainRedisImporter]]:
    return {"langchain-redis": LangChainRedisImporter}
