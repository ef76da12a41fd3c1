"""OpenAI's client with a cache inside ``client.embeddings.create``.

::

    client = cached(OpenAI(), config="embedonce.toml")
    client.embeddings.create(model="text-embedding-3-small", input=["one", "two"])

The cache looks up the vector of each input. Inputs whose vector is in no tier go to the endpoint, in one request. The
rest of the client is unchanged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit
from zlib import crc32

from embedonce import Cache, Embedded, Limits, SpaceError, VectorSpace, config
from embedonce.batch_settings import refuse_batch_settings
from embedonce.contracts import Task
from embedonce.keys import canonical_url

try:
    import openai
    from openai.resources.embeddings import AsyncEmbeddings, Embeddings
    from openai.types import CreateEmbeddingResponse
except ModuleNotFoundError as error:
    raise ImportError("openai is not installed: pip install 'embedonce[openai]'") from error

from ._openai_responses import RAW_HEADER, Call, current_call, set_current_call
from .composite_texts import join_keywords, split_all, split_keywords
from .wrapping import WrappedProvider, open_shared_cache

Client = TypeVar("Client", openai.OpenAI, openai.AsyncOpenAI)

MAX_CACHES = 64
"""Maximum number of caches that are kept, one per combination of model, dimensions and other fields. If a call needs
one cache more than this, all older caches are dropped. Their vectors stay in the tiers."""

MAX_INPUTS = 2048
"""Maximum number of inputs in a call to OpenAI."""

CLIENT_FIELDS = ("input", "encoding_format")
"""Fields that override the client's own arguments if ``extra_body`` contains them. A call whose ``extra_body`` contains
one of these fields is not cached."""

OPTIONAL = ("dimensions", "encoding_format", "user")
"""Arguments of ``create`` for which None means that the argument is absent."""

NOT_IN_SPACE = ("encoding_format", "user")
"""Fields of a request that do not affect vectors: the encoding of the answer, and the name of the end user."""

log = logging.getLogger(__name__)


def cached(
    client: Client,
    *,
    config: config.Source = None,
    models: Mapping[str, str] | None = None,
    endpoint_name: str | None = None,
) -> Client:
    """Return a copy of ``client`` that uses the same connections and has a cache in its ``embeddings.create``.

    The copy has the class of ``client`` (``OpenAI``, ``AsyncOpenAI``, ``AzureOpenAI`` or ``AsyncAzureOpenAI``). The
    methods ``copy`` and ``with_options`` of the new client return clients with the same cache. The cache is at
    ``embeddings.cache``. ``client`` itself does not change.

    Args:
        client: a client, blocking or async.
        config: anything that :func:`embedonce.open` accepts; ``[provider]`` is not read. Clients with equal
            configurations share their tiers.
        models: a dict from the endpoint's names to models: ``{"my-deployment": "text-embedding-3-small"}``. Pass it if
            the endpoint has its own names for models, or if it uses the same name for several versions of a model.
            The argument is required for Azure.
        endpoint_name: name that replaces the client's ``base_url`` in keys, so that hosts with the same model share
            their vectors.

    Raises:
        ConfigError: the configuration is invalid.
        TypeError: ``client`` is not a client of the openai package.
    """
    if not isinstance(client, openai.OpenAI | openai.AsyncOpenAI):
        raise TypeError(f"expected a client of the openai package, got {type(client).__name__}")
    shared = _Shared(open_shared_cache(config, provider=_make_placeholder()), dict(models or {}), endpoint_name)
    return _install_cache(client.copy(), shared)


@dataclass(frozen=True, slots=True)
class _Shared:
    """The state that a client shares with its copies."""

    cache: Cache
    models: Mapping[str, str]
    endpoint_name: str | None
    reasons: set[str] = field(default_factory=set)
    """The reasons, already logged, why calls did not use the cache."""


def _install_cache(client: Client, shared: _Shared) -> Client:
    """Replace the ``embeddings`` of a client with the cached resource, and do the same for its future copies."""

    def copy(**options: Any) -> Client:
        return _install_cache(type(client).copy(client, **options), shared)

    cls: Any = CachedEmbeddings if isinstance(client, openai.OpenAI) else AsyncCachedEmbeddings
    embeddings = cls(client, shared)
    client.__dict__.update(embeddings=embeddings, post=embeddings.post, copy=copy, with_options=copy)
    return client


# --- inputs, as texts and as tokens -------------------------------------------------------------


def _to_lists(given: Any) -> Any:
    """Return ``input`` with its iterables as lists, because some iterables can be read only once."""
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        return given
    return [item if isinstance(item, str) or not isinstance(item, Iterable) else list(item) for item in given]


def _to_texts(given: Any) -> list[str] | None:
    """Return the inputs as texts, in which tokens are written as digits.

    Return None if ``input`` is not a string, a list of strings, a list of tokens or a list of lists of tokens. The call
    then goes to the API, which may reject this input.
    """
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not given:
        return None
    if all(isinstance(item, str) for item in given):
        return given
    items = [given] if all(type(item) is int for item in given) else given
    if not all(isinstance(item, list) and item and all(type(token) is int for token in item) for item in items):
        return None
    return [_tokens_to_text(item) for item in items]


def _tokens_to_text(tokens: Sequence[int]) -> str:
    """Write tokens as a text that ends with a checksum.

    The checksum shows whether ``[key] normalize`` has changed the text.
    """
    text = ",".join(map(str, tokens))
    return f"{text}:{crc32(text.encode()).to_bytes(4, 'big').hex().translate(_DIGITS_TO_LETTERS)}"


def _text_to_tokens(text: str) -> list[int]:
    """Return the tokens in a text that :func:`_tokens_to_text` has written.

    Raises:
        SpaceError: the text has been changed.
    """
    tokens = [int(token) for token in text.partition(":")[0].split(",") if token.removeprefix("-").isdecimal()]
    if _tokens_to_text(tokens) != text:
        raise SpaceError(
            "[key] normalize turns these tokens into different tokens; pass texts as input, or change the steps of "
            "normalize"
        )
    return tokens


_DIGITS_TO_LETTERS = str.maketrans("0123456789", "ghijklmnop")


def _are_tokens(given: Any) -> bool:
    return isinstance(given, list) and not isinstance(given[0], str)


class _NotCacheable(Exception):
    """The reason why a call cannot be cached. The call then goes to the endpoint unchanged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """The arguments of one call, in the same form for ``create`` and for ``client.post``."""

    input: Any
    fields: Mapping[str, Any]
    """The fields of the body, other than ``input``, that are arguments. Fields that are absent are left out."""
    extra_body: Any
    extra_query: Any
    headers: Mapping[str, str] | None
    default_format: Literal["base64", "float"]
    """How the endpoint encodes vectors if ``fields`` has no ``encoding_format``."""
    send: Callable[[list[Any], Mapping[str, Any]], Any]
    """Send inputs to the endpoint, with these arguments and with the fields that have one value per input."""
    post_parser: Callable[[Any], Any] | None = None

    def read_texts(self) -> list[str]:
        """Return the inputs as texts.

        Raises:
            _NotCacheable: ``input`` has a form that is not known.
        """
        texts = _to_texts(self.input)
        if texts is None:
            raise _NotCacheable("input is neither a text, nor a list of texts, nor one or more lists of tokens")
        return texts

    def read_body(self) -> dict[str, Any]:
        """Return the fields that may affect vectors.

        Raises:
            _NotCacheable: the call cannot be cached.
        """
        extra = self.extra_body or {}
        if not isinstance(extra, Mapping):
            raise _NotCacheable("extra_body is not a mapping")
        for name in CLIENT_FIELDS:
            if name in extra:
                raise _NotCacheable(f"extra_body replaces the argument {name}; pass {name} as an argument")
        body = {**self.fields, **extra}
        body = {name: value for name, value in body.items() if name not in OPTIONAL or value is not None}
        if not isinstance(body.get("model"), str):
            raise _NotCacheable("model is not a str")
        if type(body.get("dimensions", 1)) is not int:
            raise _NotCacheable("dimensions is not an int")
        return {name: value for name, value in body.items() if name not in NOT_IN_SPACE}

    def refuse_batch_settings(self, query: Mapping[str, Any]) -> None:
        """Refuse settings that make a vector depend on the other inputs of the call.

        Raises:
            SpaceError: there is such a setting.
        """
        refuse_batch_settings(self.fields, "body")
        refuse_batch_settings(self.extra_body, "extra_body")
        refuse_batch_settings(query, "extra_query")


class _CachedResource:
    """The common base of the blocking and the async resource. It turns the arguments of a call into a ``Call``."""

    _client: Any
    _shared: _Shared
    _caches: dict[bytes, Cache]

    @property
    def cache(self) -> Cache:
        """The cache, for ``stats()`` and ``subscribe``. To get vectors, use the client and not this cache."""
        return self._shared.cache

    def _prepare_create(self, arguments: dict[str, Any], create: Callable[..., Any]) -> Call | None:
        """Return the call for the arguments of ``create``, or None if they must go to ``create`` unchanged.

        Raises:
            SpaceError: as for :meth:`_read_call`.
        """
        arguments["input"] = _to_lists(arguments["input"])
        fields = {name: arguments[name] for name in ("model", *OPTIONAL) if not _is_absent(arguments[name])}
        absent = dict.fromkeys((name for name in OPTIONAL if name not in fields), openai.omit)
        return self._prepare_call(
            _Request(
                input=arguments["input"],
                fields=fields,
                extra_body=arguments["extra_body"],
                extra_query=arguments["extra_query"],
                headers=arguments["extra_headers"],
                default_format="base64",
                send=lambda inputs, values: create(
                    **{**arguments, **absent, "input": inputs, "extra_body": _replace(arguments["extra_body"], values)}
                ),
            )
        )

    def _prepare_post(self, path: str, arguments: dict[str, Any], post: Callable[..., Any]) -> Call | None:
        """Return the call for the arguments of ``client.post``, or None if they must go to ``post`` unchanged.

        Raises:
            SpaceError: as for :meth:`_read_call`.
        """
        body, options = arguments.get("body"), arguments.get("options") or {}
        if path.strip("/") != "embeddings" or not isinstance(body, Mapping) or "input" not in body:
            return None
        inputs = _to_lists(body["input"])
        arguments["body"] = {**body, "input": inputs}
        if arguments.get("cast_to") is not CreateEmbeddingResponse or arguments.get("stream"):
            self._pass_by("client.post asks for an answer that is not a CreateEmbeddingResponse")
            return None
        return self._prepare_call(
            _Request(
                input=inputs,
                fields={name: value for name, value in body.items() if name != "input"},
                extra_body=options.get("extra_json"),
                extra_query=options.get("params"),
                headers=options.get("headers"),
                default_format="float",
                send=lambda inputs, values: post(
                    path,
                    **{
                        **arguments,
                        "body": {**body, "input": inputs, **values},
                        "options": {**options, "extra_json": _replace(options.get("extra_json"), values)},
                    },
                ),
                post_parser=options.get("post_parser"),
            )
        )

    def _prepare_call(self, request: _Request) -> Call | None:
        try:
            return self._read_call(request)
        except _NotCacheable as reason:
            self._pass_by(str(reason))
            return None

    def _pass_by(self, reason: str) -> None:
        """Count a call that does not use the cache, and log each reason once."""
        self._shared.cache.count_passed_by()
        if reason not in self._shared.reasons:
            self._shared.reasons.add(reason)
            log.warning(
                "a call of embeddings.create does not use the cache: %s; further calls of this kind are not logged, "
                "but counted in embeddings.cache.stats().passed_by",
                reason,
            )

    def _read_call(self, request: _Request) -> Call:
        """Return the call.

        Raises:
            SpaceError: a setting makes the vector of a text depend on the other texts, or has as many values as there
                are inputs; or on Azure, ``model`` names a deployment, and ``models`` has no entry for the deployment.
            ValueError: ``titles`` in ``extra_body`` has not as many values as there are inputs.
            _NotCacheable: the call cannot be cached.
        """
        raw = (request.headers or {}).get(RAW_HEADER)
        if raw not in (None, "true"):
            raise _NotCacheable("with_streaming_response reads the answer from the endpoint; use with_raw_response")
        texts, body = request.read_texts(), request.read_body()
        if not isinstance(request.extra_query or {}, Mapping):
            raise _NotCacheable("extra_query is not a mapping")
        query = {**self._client.default_query, **(request.extra_query or {})}
        request.refuse_batch_settings(query)
        split_keywords({"extra_query": query}, texts)
        per_text, body = split_keywords(body, texts)
        tokens = _are_tokens(request.input)
        cache = self._cache_for(self._describe(body, query, tokens=tokens, per_text=sorted(per_text)))
        given_format = request.fields.get("encoding_format")

        def send(texts: list[str]) -> Any:
            plain, values = split_all(texts) if per_text else (texts, {})
            return request.send([_text_to_tokens(text) for text in plain] if tokens else plain, values)

        return Call(
            cache=cache,
            client=self._client,
            texts=join_keywords(texts, per_text, cache.normalize) if per_text else texts,
            model=body["model"],
            send=send,
            returns_base64=given_format == "base64",
            sends_base64=(given_format or request.default_format) == "base64",
            is_raw=raw is not None,
            post_parser=request.post_parser,
        )

    def _describe(
        self, body: Mapping[str, Any], query: Mapping[str, Any], *, tokens: bool, per_text: list[str]
    ) -> VectorSpace:
        """Describe a request in the same way as embedonce's openai provider.

        Raises:
            SpaceError: on Azure, ``model`` names a deployment, and ``models`` has no entry for the deployment.
        """
        client, name = self._client, body["model"]
        model = self._shared.models.get(name)
        if model is None and _is_azure(client):
            raise SpaceError(
                "the name of a deployment does not say which model it runs; pass the model of each deployment: "
                'cached(client, models={"my-deployment": "text-embedding-3-small"})'
            )
        query = {key: value for key, value in query.items() if key != "api-version"}
        extra = {key: value for key, value in body.items() if key not in ("model", "dimensions")}
        if query:
            extra["query"] = query
        if tokens:
            extra["input"] = "tokens"
        if per_text:
            extra["one value per text"] = per_text
        return VectorSpace(
            provider="openai",
            model=model or name,
            endpoint=self._shared.endpoint_name or canonical_url(str(client.base_url)),
            dimensions=body.get("dimensions"),
            truncate="error",
            extra=extra or None,
        )

    def _cache_for(self, space: VectorSpace) -> Cache:
        """Return the cache of a vector space. The client requests the vectors that the cache does not have."""
        fingerprint = space.fingerprint()
        cache = self._caches.get(fingerprint)
        if cache is None:
            if len(self._caches) >= MAX_CACHES:
                self._caches.clear()
            cache = self._caches[fingerprint] = self._shared.cache.for_provider(self._make_provider(space))
        return cache

    def _make_provider(self, space: VectorSpace) -> WrappedProvider:
        raise NotImplementedError


def _replace(extra_body: Any, values: Mapping[str, Any]) -> Any:
    return {**(extra_body or {}), **values} if values else extra_body


def _is_absent(value: Any) -> bool:
    return value is None or isinstance(value, openai.Omit | openai.NotGiven)


def _make_placeholder() -> WrappedProvider:
    """Return the provider of the shared cache. This provider never embeds.

    The shared cache is there only for its tiers. Each call uses a cache from ``for_provider``, with its own provider.
    """
    return WrappedProvider(space=lambda task: VectorSpace(provider="openai", model="(named by each call)"))


def _is_azure(client: Any) -> bool:
    host = urlsplit(str(client.base_url)).hostname or ""
    return isinstance(client, openai.AzureOpenAI | openai.AsyncAzureOpenAI) or host.endswith(".azure.com")


# --- the resources ----------------------------------------------------------------------------


class CachedEmbeddings(_CachedResource, Embeddings):
    """``client.embeddings`` of a blocking client."""

    def __init__(self, client: openai.OpenAI, shared: _Shared) -> None:
        super().__init__(client)
        self._shared = shared
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
    ) -> Any:
        """Like the client's ``create``, but request only the vectors that the cache does not have.

        ``usage`` counts only the inputs sent to the endpoint. ``with_raw_response`` uses the cache too; the headers of
        its response say how many vectors were found (see :meth:`Call.make_raw_response`). A call that cannot be cached
        goes to the endpoint unchanged; ``cache.stats().passed_by`` counts such calls, and the reason is logged once.

        Raises:
            openai.OpenAIError: the client's own error.
            ProviderError: the endpoint's answer is invalid.
            SpaceError: a setting makes the vector of a text depend on the other texts of the call, or has as many
                values as there are inputs; or the client is for Azure, and ``models`` has no entry for the deployment.
            ValueError: ``titles`` in ``extra_body``, which has one value per input, has another number of values.
        """
        arguments = {
            "input": input,
            "model": model,
            "dimensions": dimensions,
            "encoding_format": encoding_format,
            "user": user,
            "extra_headers": extra_headers,
            "extra_query": extra_query,
            "extra_body": extra_body,
            "timeout": timeout,
        }
        call = self._prepare_create(arguments, super().create)
        if call is None:
            return super().create(**arguments)
        with set_current_call(call):
            return call.make_response(call.cache.fetch(call.texts))

    def post(self, path: str, **arguments: Any) -> Any:
        """Like the client's ``post``, but use the cache for a request to ``/embeddings``. LiteLLM sends such requests.

        Raises:
            Exception: as for :meth:`create`.
        """
        call = self._prepare_post(path, arguments, self._post)
        if call is None:
            return self._post(path, **arguments)
        with set_current_call(call):
            return call.make_response(call.cache.fetch(call.texts))

    def _make_provider(self, space: VectorSpace) -> WrappedProvider:
        def embed(texts: list[str], task: Task) -> Embedded:
            call = current_call.get()
            return call.read_answer(call.send(texts), len(texts))

        return WrappedProvider(embed=embed, space=lambda task: space, limits=Limits(max_batch=MAX_INPUTS))


class AsyncCachedEmbeddings(_CachedResource, AsyncEmbeddings):
    """``client.embeddings`` of an async client."""

    def __init__(self, client: openai.AsyncOpenAI, shared: _Shared) -> None:
        super().__init__(client)
        self._shared = shared
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
    ) -> Any:
        """Async twin of :meth:`CachedEmbeddings.create`."""
        arguments = {
            "input": input,
            "model": model,
            "dimensions": dimensions,
            "encoding_format": encoding_format,
            "user": user,
            "extra_headers": extra_headers,
            "extra_query": extra_query,
            "extra_body": extra_body,
            "timeout": timeout,
        }
        call = self._prepare_create(arguments, super().create)
        if call is None:
            return await super().create(**arguments)
        with set_current_call(call):
            return call.make_response(await call.cache.afetch(call.texts))

    async def post(self, path: str, **arguments: Any) -> Any:
        """Async twin of :meth:`CachedEmbeddings.post`."""
        call = self._prepare_post(path, arguments, self._post)
        if call is None:
            return await self._post(path, **arguments)
        with set_current_call(call):
            return call.make_response(await call.cache.afetch(call.texts))

    def _make_provider(self, space: VectorSpace) -> WrappedProvider:
        async def aembed(texts: list[str], task: Task) -> Embedded:
            call = current_call.get()
            return call.read_answer(await call.send(texts), len(texts))

        return WrappedProvider(aembed=aembed, space=lambda task: space, limits=Limits(max_batch=MAX_INPUTS))
