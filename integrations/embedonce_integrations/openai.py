"""OpenAI's own client with a cache inside ``client.embeddings.create``.

::

    client = cached(OpenAI(), config="embedonce.toml")
    client.embeddings.create(model="text-embedding-3-small", input=["one", "two"])

Each input of a call is looked up; the endpoint is asked, once, for those that no tier holds. Everything
else of the client is as it was.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from embedonce import Cache, Embedded, Fetched, Limits, ProviderError, SpaceError, VectorSpace, config
from embedonce.contracts import Task
from embedonce.keys import canonical_url

from .wrapping import WrappedProvider, shared_cache

try:
    import openai
    from openai.resources.embeddings import AsyncEmbeddings, Embeddings
    from openai.types import CreateEmbeddingResponse, Embedding
    from openai.types.create_embedding_response import Usage
except ModuleNotFoundError as error:
    raise ImportError("embedonce_integrations.openai needs openai: pip install 'embedonce[openai]'") from error

Client = TypeVar("Client", openai.OpenAI, openai.AsyncOpenAI)

SPACES = 64
"""Combinations of model, dimensions and other fields whose caches are kept; one more makes room by dropping all."""

MOST = 2048
"""Most inputs of a call to OpenAI."""

NOT_FOR_US = ("input", "encoding_format")
"""Fields that, given as ``extra_body``, take the place of what the client itself is told: such a call is left alone."""

RAW = "X-Stainless-Raw-Response"
"""The header by which ``client.with_raw_response`` and ``with_streaming_response`` tell ``create`` what to return."""


def cached(
    client: Client,
    *,
    config: config.Source = None,
    models: Mapping[str, str] | None = None,
    endpoint_name: str | None = None,
) -> Client:
    """Return a client like ``client``, over the same connections, whose ``embeddings.create`` is cached.

    It is an ``OpenAI``, ``AsyncOpenAI``, ``AzureOpenAI`` or ``AsyncAzureOpenAI`` as before, and so is what its
    ``copy`` and ``with_options`` return. Its ``embeddings.cache`` is the cache. ``client`` is left as it is.

    Args:
        client: a client, blocking or async.
        config: what :func:`embedonce.open` takes; ``[provider]`` is not read. Clients with equal
            configurations share their tiers.
        models: which model a name stands for, where the endpoint gives models names of its own, or says the
            same of several versions: ``{"my-deployment": "text-embedding-3-small"}``. Azure needs it.
        endpoint_name: stands in keys for the client's ``base_url``, where several hosts serve the same model.

    Raises:
        ConfigError: the configuration cannot be used.
        TypeError: this is no client of openai's.
    """
    if not isinstance(client, openai.OpenAI | openai.AsyncOpenAI):
        raise TypeError(f"cached takes a client of the openai package, not {type(client).__name__}")
    store = _Store(shared_cache(config, provider=_nobody()), dict(models or {}), endpoint_name)
    return _with(client.copy(), store)


@dataclass(frozen=True, slots=True)
class _Store:
    """What a client and its copies share."""

    cache: Cache
    models: Mapping[str, str]
    endpoint_name: str | None


def _with(client: Client, store: _Store) -> Client:
    """Give a client of our own the cached resource, and see to it that its copies have it too."""

    def copy(**options: Any) -> Client:
        return _with(type(client).copy(client, **options), store)

    if isinstance(client, openai.OpenAI):
        client.__dict__["embeddings"] = CachedEmbeddings(client, store)
    else:
        client.__dict__["embeddings"] = AsyncCachedEmbeddings(client, store)
    client.__dict__.update(copy=copy, with_options=copy)
    return client


# --- one call ---------------------------------------------------------------------------------


@dataclass(slots=True)
class _Call:
    """A call of ``create``: what it asks for, and what it was charged."""

    cache: Cache
    texts: list[str]
    """The inputs as texts, whose keys are looked up."""
    request: dict[str, Any]
    """The arguments beside ``input``."""
    model: str
    prompt_tokens: int = 0
    total_tokens: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, answer: CreateEmbeddingResponse, inputs: int) -> Embedded:
        """Return an answer's vectors in the order of the inputs, and count what they cost.

        Raises:
            ProviderError: the answer is not one vector for each input, each with an index of its own.
        """
        data: Any = getattr(answer, "data", None)
        if not isinstance(data, list) or len(data) != inputs:
            count = len(data) if isinstance(data, list) else "no"
            raise ProviderError(f"the endpoint answered {count} vectors for {inputs} inputs; none was stored")
        vectors: dict[int, NDArray[Any]] = {}
        for item in data:
            index = getattr(item, "index", None)
            if type(index) is not int or not 0 <= index < inputs or index in vectors:
                raise ProviderError(
                    f"the endpoint's answer does not give each of {inputs} vectors its own index, from 0; "
                    "none was stored"
                )
            vectors[index] = _vector(item.embedding)
        prompt, total = (_number(answer.usage, name) for name in ("prompt_tokens", "total_tokens"))
        with self.lock:
            self.prompt_tokens += prompt
            self.total_tokens += total
            self.model = answer.model
        return Embedded([vectors[index] for index in range(inputs)], total)

    def response(self, fetched: Fetched) -> CreateEmbeddingResponse:
        """Return what the endpoint would have answered.

        Raises:
            Exception: what the client, or the check of its answer, raised for the first input that failed.
        """
        if fetched.failed:
            raise fetched.failed[min(fetched.failed)]
        encode = _in_base64 if self.request["encoding_format"] == "base64" else _in_floats
        return CreateEmbeddingResponse(
            data=[encode(row, index) for index, row in enumerate(fetched.vectors)],
            model=self.model,
            object="list",
            usage=Usage(prompt_tokens=self.prompt_tokens, total_tokens=self.total_tokens),
        )


_under_way: ContextVar[_Call] = ContextVar("embedonce_openai_call")


@contextmanager
def _calling(call: _Call) -> Iterator[None]:
    """Make this the call whose arguments the endpoint is asked with: the engine's threads and tasks inherit it."""
    token = _under_way.set(call)
    try:
        yield
    finally:
        _under_way.reset(token)


def _number(usage: Any, name: str) -> int:
    value = getattr(usage, name, None)
    return value if type(value) is int and value >= 0 else 0


def _vector(embedding: Any) -> NDArray[Any]:
    """Return what a list of numbers, or base64 of little-endian float32, holds."""
    try:
        if isinstance(embedding, str):
            return np.frombuffer(base64.b64decode(embedding, validate=True), "<f4")
        vector = np.array(embedding)
    except ValueError:
        vector = np.array(None)
    if vector.dtype.kind not in "fi" or vector.ndim != 1:
        raise ProviderError("the endpoint answered an embedding that is neither numbers nor base64; none was stored")
    return vector


def _in_floats(row: NDArray[np.float32], index: int) -> Embedding:
    return Embedding(embedding=row.tolist(), index=index, object="embedding")


def _in_base64(row: NDArray[np.float32], index: int) -> Embedding:
    """Return a string, which the class does not allow for and the client hands out unchecked."""
    encoded: Any = base64.b64encode(row.astype("<f4").tobytes()).decode()
    return Embedding.construct(embedding=encoded, index=index, object="embedding")


# --- what is looked up ------------------------------------------------------------------------


def _listed(given: Any) -> Any:
    """Return ``input`` with lists in the place of iterables, which may be read once only."""
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        return given
    return [item if isinstance(item, str) or not isinstance(item, Iterable) else list(item) for item in given]


def _written(given: Any) -> list[str] | None:
    """Return the inputs of any of the four shapes as texts, tokens in digits; None for what the API is to judge."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not given:
        return None
    if all(isinstance(item, str) for item in given):
        return given
    items = [given] if all(type(item) is int for item in given) else given
    if not all(isinstance(item, list) and item and all(type(token) is int for token in item) for item in items):
        return None
    return [_write(item) for item in items]


def _write(tokens: Sequence[int]) -> str:
    """Return tokens as a text. Its end tells whether a step of ``[key] normalize`` has changed them."""
    text = ",".join(map(str, tokens))
    return f"{text}:{crc32(text.encode()).to_bytes(4, 'big').hex().translate(_LETTERS)}"


def _read(text: str) -> list[int]:
    """Return the tokens that a text was written for.

    Raises:
        SpaceError: it is not as it was written.
    """
    tokens = [int(token) for token in text.partition(":")[0].split(",") if token.removeprefix("-").isdecimal()]
    if _write(tokens) != text:
        raise SpaceError(
            "what [key] normalize makes of tokens stands for other tokens; embed texts, or change its steps"
        )
    return tokens


_LETTERS = str.maketrans("0123456789", "ghijklmnop")


def _of_tokens(given: Any) -> bool:
    return isinstance(given, list) and not isinstance(given[0], str)


def _body(request: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the fields that decide vectors, as they are sent; None for a call that is left alone."""
    extra = request["extra_body"] or {}
    if not isinstance(extra, Mapping) or any(name in extra for name in NOT_FOR_US):
        return None
    given = {name: request[name] for name in ("model", "dimensions") if not _is_absent(request[name])}
    body = {**given, **extra}
    return body if isinstance(body.get("model"), str) and type(body.get("dimensions", 1)) is int else None


def _is_absent(value: Any) -> bool:
    return isinstance(value, openai.Omit | openai.NotGiven)


class _Cached:
    """What both resources share: from the arguments of ``create`` to a call."""

    _client: Any
    _store: _Store
    _caches: dict[bytes, Cache]

    @property
    def cache(self) -> Cache:
        """The cache, for ``stats()`` and ``subscribe``; ask the client for vectors."""
        return self._store.cache

    def _call(self, given: Any, request: dict[str, Any]) -> _Call | None:
        """Return the call; None where it is none that can be cached, and the API has the say.

        Raises:
            SpaceError: the model is a deployment's name, which says nothing of the model.
        """
        texts, body = _written(given), _body(request)
        if texts is None or body is None or RAW in (request["extra_headers"] or {}):
            return None
        tokens = _of_tokens(given)
        space = self._space(body, request["extra_query"] or {}, tokens=tokens)
        return _Call(self._cache_of(space, tokens=tokens), texts, request, body["model"])

    def _space(self, body: Mapping[str, Any], query: Mapping[str, Any], *, tokens: bool) -> VectorSpace:
        """Describe a request, as embedonce's own openai provider does."""
        client, name = self._client, body["model"]
        model = self._store.models.get(name)
        if model is None and _is_azure(client):
            raise SpaceError(
                "a deployment's name does not say which model it is; name it: "
                'cached(client, models={"my-deployment": "text-embedding-3-small"})'
            )
        query = {key: value for key, value in {**client.default_query, **query}.items() if key != "api-version"}
        extra = {key: value for key, value in body.items() if key not in ("model", "dimensions", "user")}
        if query:
            extra["query"] = query
        if tokens:
            extra["input"] = "tokens"
        return VectorSpace(
            provider="openai",
            model=model or name,
            endpoint=self._store.endpoint_name or canonical_url(str(client.base_url)),
            dimensions=body.get("dimensions"),
            truncate="error",
            extra=extra or None,
        )

    def _cache_of(self, space: VectorSpace, *, tokens: bool) -> Cache:
        """Return the cache that asks the client for vectors of this space."""
        fingerprint = space.fingerprint()
        cache = self._caches.get(fingerprint)
        if cache is None:
            if len(self._caches) >= SPACES:
                self._caches.clear()
            cache = self._caches[fingerprint] = self._store.cache.for_provider(self._provider(space, tokens=tokens))
        return cache

    def _provider(self, space: VectorSpace, *, tokens: bool) -> WrappedProvider:
        raise NotImplementedError


def _nobody() -> WrappedProvider:
    """Stand for the provider of a cache that is asked through ``for_provider`` alone."""
    return WrappedProvider(space=lambda task: VectorSpace(provider="openai", model="(named by each call)"))


def _is_azure(client: Any) -> bool:
    host = urlsplit(str(client.base_url)).hostname or ""
    return isinstance(client, openai.AzureOpenAI | openai.AsyncAzureOpenAI) or host.endswith(".azure.com")


def _sent(texts: Sequence[str], *, tokens: bool) -> list[Any]:
    """Return texts as ``input`` is sent: the tokens that they write, where that is what they are."""
    return [_read(text) for text in texts] if tokens else list(texts)


# --- the resources ----------------------------------------------------------------------------


class CachedEmbeddings(_Cached, Embeddings):
    """``client.embeddings`` of a blocking client."""

    def __init__(self, client: openai.OpenAI, store: _Store) -> None:
        super().__init__(client)
        self._store = store
        self._caches = {}

    def create(
        self,
        *,
        input: Any,
        model: Any,
        dimensions: Any = openai.omit,
        encoding_format: Any = openai.omit,
        user: Any = openai.omit,
        extra_headers: Any = None,
        extra_query: Any = None,
        extra_body: Any = None,
        timeout: Any = openai.not_given,
    ) -> CreateEmbeddingResponse:
        """As the client's own, with the cache's vector for each input that it has one for.

        ``usage`` counts the inputs that the endpoint was asked for. What cannot be cached is passed on as it is.

        Raises:
            openai.OpenAIError: what the client raises.
            ProviderError: the endpoint's answer is none.
        """
        request = {
            "model": model,
            "dimensions": dimensions,
            "encoding_format": encoding_format,
            "user": user,
            "extra_headers": extra_headers,
            "extra_query": extra_query,
            "extra_body": extra_body,
            "timeout": timeout,
        }
        input = _listed(input)
        call = self._call(input, request)
        if call is None:
            return super().create(input=input, **request)
        with _calling(call):
            return call.response(call.cache.fetch(call.texts))

    def _provider(self, space: VectorSpace, *, tokens: bool) -> WrappedProvider:
        create = super().create

        def embed(texts: list[str], task: Task) -> Embedded:
            call = _under_way.get()
            return call.read(create(input=_sent(texts, tokens=tokens), **call.request), len(texts))

        return WrappedProvider(embed=embed, space=lambda task: space, limits=Limits(max_batch=MOST))

    @property
    def with_raw_response(self) -> Any:
        """The endpoint's own answer, not cached: of a hit there is none."""
        return Embeddings(self._client).with_raw_response

    @property
    def with_streaming_response(self) -> Any:
        """The endpoint's own answer, not cached."""
        return Embeddings(self._client).with_streaming_response


class AsyncCachedEmbeddings(_Cached, AsyncEmbeddings):
    """``client.embeddings`` of an async client."""

    def __init__(self, client: openai.AsyncOpenAI, store: _Store) -> None:
        super().__init__(client)
        self._store = store
        self._caches = {}

    async def create(
        self,
        *,
        input: Any,
        model: Any,
        dimensions: Any = openai.omit,
        encoding_format: Any = openai.omit,
        user: Any = openai.omit,
        extra_headers: Any = None,
        extra_query: Any = None,
        extra_body: Any = None,
        timeout: Any = openai.not_given,
    ) -> CreateEmbeddingResponse:
        """As :meth:`CachedEmbeddings.create`."""
        request = {
            "model": model,
            "dimensions": dimensions,
            "encoding_format": encoding_format,
            "user": user,
            "extra_headers": extra_headers,
            "extra_query": extra_query,
            "extra_body": extra_body,
            "timeout": timeout,
        }
        input = _listed(input)
        call = self._call(input, request)
        if call is None:
            return await super().create(input=input, **request)
        with _calling(call):
            return call.response(await call.cache.afetch(call.texts))

    def _provider(self, space: VectorSpace, *, tokens: bool) -> WrappedProvider:
        create = super().create

        async def aembed(texts: list[str], task: Task) -> Embedded:
            call = _under_way.get()
            return call.read(await create(input=_sent(texts, tokens=tokens), **call.request), len(texts))

        return WrappedProvider(aembed=aembed, space=lambda task: space, limits=Limits(max_batch=MOST))

    @property
    def with_raw_response(self) -> Any:
        """The endpoint's own answer, not cached: of a hit there is none."""
        return AsyncEmbeddings(self._client).with_raw_response

    @property
    def with_streaming_response(self) -> Any:
        """The endpoint's own answer, not cached."""
        return AsyncEmbeddings(self._client).with_streaming_response
