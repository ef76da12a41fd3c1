"""What the importers of LangChain's CacheBackedEmbeddings share: the keys, the options and the source."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Mapping
from typing import Annotated, Literal, TypeAlias, get_args

from embedonce.contracts import Source
from embedonce.errors import ConfigError
from embedonce.options import Doc

KeyEncoder: TypeAlias = Literal["sha1", "blake2b", "sha256", "sha512"]

NamespaceOption: TypeAlias = Annotated[
    str,
    Doc(
        "The argument namespace of CacheBackedEmbeddings.from_bytes_store, which is usually the name of the model. "
        "Without it, the keys do not tell models apart."
    ),
]
KeyEncoderOption: TypeAlias = Annotated[
    KeyEncoder,
    Doc("The argument key_encoder of from_bytes_store. The keys of a function of your own cannot be read."),
]
QueryCacheOption: TypeAlias = Annotated[
    bool | None,
    Doc(
        "The argument query_embedding_cache of from_bytes_store: false if it was not set, true if queries are in the "
        "same store. It matters only to models that embed queries and documents differently."
    ),
]

_NAMESPACE = uuid.UUID(int=1985)


def _hash_sha1(text: bytes) -> str:
    return str(uuid.uuid5(_NAMESPACE, hashlib.sha1(text, usedforsecurity=False).hexdigest()))


_ENCODERS: Mapping[KeyEncoder, Callable[[bytes], str]] = {
    "sha1": _hash_sha1,
    "blake2b": lambda text: hashlib.blake2b(text).hexdigest(),
    "sha256": lambda text: hashlib.sha256(text).hexdigest(),
    "sha512": lambda text: hashlib.sha512(text).hexdigest(),
}

PATTERNS: Mapping[KeyEncoder, str] = {
    "sha1": "[0-9a-f]{8}-[0-9a-f]{4}-5[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}",
    "sha256": "[0-9a-f]{64}",
    "blake2b": "[0-9a-f]{128}",
    "sha512": "[0-9a-f]{128}",
}
"""For each encoder, a regular expression of what follows the namespace in a key."""


def check_key_encoder(key_encoder: str) -> None:
    """Raise :class:`~embedonce.errors.ConfigError` if there is no such encoder."""
    if key_encoder not in _ENCODERS:
        raise ConfigError(f"key_encoder must be one of {', '.join(get_args(KeyEncoder))}")


def encode_key(text: str, namespace: str, key_encoder: KeyEncoder) -> str | None:
    """Return LangChain's key of a text: the namespace and the hash, with nothing between them.

    The source is ``_make_default_key_encoder`` of langchain_classic 1.0.8. None: the text has a lone surrogate, which
    has no UTF-8, so LangChain cannot have stored it.
    """
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        return None
    return namespace + _ENCODERS[key_encoder](encoded)


def make_source(name: str, *, query_embedding_cache: bool | None) -> Source:
    """Return the source of a LangChain store. ``name`` names the store and all other options."""
    if query_embedding_cache is None:
        mixing = (
            "LangChain stores queries and documents under the same keys if query_embedding_cache is True; set the "
            "option query_embedding_cache to false if the program that wrote the store did not set it"
        )
        return Source(name, mixing=mixing)
    if query_embedding_cache:
        return Source(name, mixing="query_embedding_cache is true, so queries and documents share their keys")
    return Source(name, task="document")
