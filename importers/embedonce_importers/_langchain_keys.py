"""The keys of LangChain's CacheBackedEmbeddings, and what all of its stores have in common."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

KeyEncoder: TypeAlias = Literal["sha1", "blake2b", "sha256", "sha512"]

MIXING = (
    "LangChain stores queries and documents under the same key if query_embedding_cache is True; if it was not set in "
    "the program that wrote the store, set the option query_embedding_cache to false"
)

_NAMESPACE = uuid.UUID(int=1985)


def _hash_sha1(text: bytes) -> str:
    return str(uuid.uuid5(_NAMESPACE, hashlib.sha1(text, usedforsecurity=False).hexdigest()))


_ENCODERS: Mapping[KeyEncoder, Callable[[bytes], str]] = {
    "sha1": _hash_sha1,
    "blake2b": lambda text: hashlib.blake2b(text).hexdigest(),
    "sha256": lambda text: hashlib.sha256(text).hexdigest(),
    "sha512": lambda text: hashlib.sha512(text).hexdigest(),
}


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
