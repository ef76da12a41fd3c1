"""The ``litellm-redis`` importer: the answers that LiteLLM's proxy or library has cached in Redis.

The key of a text is the SHA-256 of the parameters of the request, such as ``model: groupinput: textencoding_format:
float``. Only the hash is stored. Entries expire, after 60 seconds by default.
"""

from __future__ import annotations

import ast
import base64
import binascii
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from annotated_types import Gt

# The parser of pydantic, which is a dependency of embedonce, is several times faster than the module json.
from pydantic_core import from_json

from embedonce import hookimpl
from embedonce.contracts import FoundVectors, Source
from embedonce.errors import ConfigError, SourceError
from embedonce.options import Doc

from ._found import collect_vectors
from ._redis import RedisReader, UrlOption
from ._values import MAX_VALUE_BYTES, DecodedVector, convert_numbers

api = 1

FORMATS = ("", "encoding_format: float", "encoding_format: base64")
"""What the encoding_format of a request adds to its key. OpenAI's Python client asks for base64."""

VERSION = 2
"""The format_version of entries; LiteLLM itself does not use those of another version."""

LOOKS_LIKE_PARAMETERS = re.compile(r"(?:encoding_format: (?:float|base64)|dimensions: \d+|user: \S+)\s*\Z")
LOOKS_LIKE_TOKENS = re.compile(r"\s*(?:\d+|\[.*\])\s*", re.DOTALL)
AMBIGUOUS = "a text that looks like parameters or tokens of a request, so its key may belong to another text"
ASYMMETRIC = "LiteLLM stores the vectors of queries and of documents (input_type) under the same key"


class LiteLLMRedisImporter:
    """Finds vectors that LiteLLM has cached in Redis, for requests without other parameters than ``dimensions``."""

    def __init__(
        self,
        *,
        url: UrlOption,
        group: Annotated[
            str,
            Doc(
                "Name of the model in requests: for the proxy and the Router, the model_name of its configuration; "
                'for the library, the argument model, such as "openai/text-embedding-3-small".'
            ),
        ],
        namespace: Annotated[str, Doc("The namespace in cache_params.")] = "",
        dimensions: Annotated[int | None, Gt(0), Doc("The parameter dimensions, if requests have it.")] = None,
    ) -> None:
        if not group or "input: " in group:
            raise ConfigError("group must be the name of a model in LiteLLM")
        self._reader = RedisReader(url)
        self._group = group
        self._prefix = f"{namespace}:" if namespace else ""
        self._suffixes = list(FORMATS)
        if dimensions is not None:
            ordered = [(f"dimensions: {dimensions}", form) for form in FORMATS]
            self._suffixes = list(dict.fromkeys("".join(pair) for pair in [*ordered, *(p[::-1] for p in ordered)]))
        self.source = Source(
            f"litellm-redis: {self._reader.name}, group={group!r}, namespace={namespace!r}, dimensions={dimensions}",
            mixing=ASYMMETRIC,
        )

    def check(self) -> None:
        """Look for a key of LiteLLM.

        Raises:
            SourceError: Redis cannot be read, or it has no key of LiteLLM with this namespace.
        """
        prefix = self._prefix.encode()
        with self._reader.explain_errors():
            keys, has_all = self._reader.sample_keys(prefix, "string")
        if has_all and not any(re.fullmatch(rb"[0-9a-f]{64}", key[len(prefix) :]) for key in keys):
            named = f"with the namespace {self._prefix[:-1]!r}" if self._prefix else "without a namespace"
            raise SourceError(
                f"{self._reader.name} has no entry of LiteLLM {named}; check namespace and the database in url. "
                "Entries expire, after 60 seconds unless ttl is set in cache_params"
            )

    def lookup(self, texts: Sequence[str], /) -> FoundVectors:
        """Return the texts that the cache has."""
        keys = [(text, key) for text in texts for key in self._list_keys(text)]
        stored: dict[str, list[bytes]] = {}
        for (text, _), value in zip(keys, self._reader.get_values([key for _, key in keys]), strict=True):
            if value is not None:
                stored.setdefault(text, []).append(value)
        return collect_vectors(stored.items(), _read)

    def close(self) -> None:
        """Close the connections."""
        self._reader.close()

    def _list_keys(self, text: str) -> Iterator[bytes]:
        # The parameters have the order of the request. The proxy and the Router put the model and the input first. A
        # caller of the library may put the input before the model. Other orders are not looked for, because there are
        # dozens of them.
        for start in (f"model: {self._group}input: {text}", f"input: {text}model: {self._group}"):
            try:
                common = hashlib.sha256(start.encode())
            except UnicodeEncodeError:  # a lone surrogate, so LiteLLM cannot have stored the text
                return
            for suffix in self._suffixes:
                hashed = common.copy()
                hashed.update(suffix.encode())
                yield f"{self._prefix}{hashed.hexdigest()}".encode()


def is_ambiguous(text: str) -> bool:
    """Return whether the key of the text may belong to another request.

    Keys have nothing between the text and the parameters after it, and requests may have tokens in place of a text.
    """
    return bool(LOOKS_LIKE_PARAMETERS.search(text) or LOOKS_LIKE_TOKENS.fullmatch(text))


def _read(item: tuple[str, Sequence[bytes]]) -> tuple[str, DecodedVector]:
    """Return a text and its first valid vector. Its values differ only in the encoding_format of the request.

    Raises:
        ValueError: no value is valid, or the text is ambiguous. The message is a short reason.
    """
    text, values = item
    if is_ambiguous(text):
        raise ValueError(AMBIGUOUS)
    problem = ValueError("no value")
    for value in values:
        try:
            return text, decode_answer(value)
        except ValueError as error:
            problem = error
    raise problem


def decode_answer(value: bytes) -> DecodedVector:
    """Return the vector of one cached answer.

    Raises:
        ValueError: the value is not an answer of LiteLLM for one text; the message is a short reason.
    """
    if len(value) > MAX_VALUE_BYTES:
        raise ValueError("larger than 1 MiB")
    item = _get_answer(value) if value.startswith(b"{'") else _get_entry(_parse_object(value))
    embedding = item.get("embedding")
    if isinstance(embedding, list):
        return convert_numbers(embedding)
    if isinstance(embedding, str):
        return _decode_base64(embedding)
    raise ValueError("an answer of LiteLLM without a vector")


def _get_entry(stored: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the answer to one text as the proxy and aembedding store it."""
    entry = stored.get("response")
    if not isinstance(entry, dict) or "embedding" not in entry:
        raise ValueError("not an embedding of LiteLLM")
    if entry.get("format_version") != VERSION:
        raise ValueError("an entry of an old version of LiteLLM, which LiteLLM does not use either")
    return entry


def _get_answer(value: bytes) -> Mapping[str, Any]:
    """Return the answer to one text as the blocking function ``embedding`` stores it: a dict as ``repr`` writes it."""
    try:
        stored = ast.literal_eval(value.decode())  # this reads literals and runs nothing
        data = _parse_object(stored["response"].encode())["data"]
        (item,) = data
    except (ValueError, SyntaxError, KeyError, TypeError, AttributeError, MemoryError, RecursionError):
        raise ValueError("not an embedding of LiteLLM") from None
    if not isinstance(item, dict):
        raise ValueError("not an embedding of LiteLLM")
    return item


def _parse_object(value: bytes) -> Mapping[str, Any]:
    try:
        parsed = from_json(value, cache_strings="none")
    except ValueError:
        raise ValueError("truncated or invalid JSON") from None
    if not isinstance(parsed, dict):
        raise ValueError("not an embedding of LiteLLM")
    return parsed


def _decode_base64(text: str) -> DecodedVector:
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("not base64") from None
    if not content or len(content) % 4:
        raise ValueError("not a multiple of 4 bytes")
    return np.frombuffer(content, "<f4").astype(np.float32)


@hookimpl
def embedonce_importers() -> Mapping[str, type[LiteLLMRedisImporter]]:
    return {"litellm-redis": LiteLLMRedisImporter}
