"""``POST /v1/embeddings``: from a body to vectors."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from embedonce import Cache, EmbedonceError, Fetched, SpaceError, TextError
from embedonce.config import Tenant

from .answered import Asked, Embeddings, make_embeddings
from .api.answer_memory import PART_BYTES
from .api.api_errors import ApiError, explain_error, explain_failures
from .api.cache_control import DEFAULT, CacheControl, read_cache_control
from .api.encoding import format_end
from .api.request_body import MAX_INPUTS, EmbeddingRequest, parse_body, read_request
from .models import Model
from .service import Generation, Service
from .tenants.budgets import BudgetExceeded, fetch_within_budget

MAX_REMEMBERED = 2048
"""Maximum length in bytes of a body that is remembered with what it asks for. Most questions of users are shorter."""

ROWS_AT_ONCE = 64
"""Number of vectors that are encoded before other requests get their turn."""

_BEFORE_ROW = [b'%b{"object":"embedding","index":%d,"embedding":' % (b"}," * (i > 0), i) for i in range(MAX_INPUTS)]

_AROUND_ROW = 64
"""Bytes that an answer has for each vector, beside the vector."""

_BEFORE_HIT = b'{"object":"list","data":[' + _BEFORE_ROW[0]

_NO_PARTS: list[bytes] = []

_HIT_HEADERS = (
    (b"content-type", b"application/json"),
    (b"x-embedonce-cache", b"hit"),
    (b"x-embedonce-hits", b"1"),
    (b"x-embedonce-computed", b"0"),
)


def find_model(generation: Generation, tenant: Tenant | None, name: Any) -> Model:
    """Return the model that a request names.

    Raises:
        ApiError: the name is missing, or the tenant cannot use such a model.
    """
    if name is None:
        raise ApiError(400, 'the field "model" is missing', param="model")
    if type(name) is not str:
        raise ApiError(400, "model must be a string", param="model")
    model = generation.models.find(name)
    if model is None or (tenant is not None and tenant.models is not None and name not in tenant.models):
        known = ", ".join(list_models(generation, tenant))
        or_hidden = "" if tenant is None else ", or this tenant may not use it"
        message = f"the model does not exist{or_hidden}; available: {known}"
        raise ApiError(404, message, param="model", code="model_not_found")
    return model


def list_models(generation: Generation, tenant: Tenant | None) -> list[str]:
    """Return the names of the models that a tenant can use."""
    names = generation.models.names
    return names if tenant is None or tenant.models is None else [name for name in names if name in tenant.models]


def read_asked(generation: Generation, tenant: Tenant | None, cache_control: bytes | None, body: bytes) -> Asked:
    """Check a request, unless the same tenant has sent the same one before.

    Raises:
        ApiError: the request is invalid.
    """
    place = ("" if tenant is None else tenant.name, body)
    if cache_control is None and (asked := generation.recent.get(place)) is not None:
        return asked
    data = parse_body(body, surrogates_in="input")
    model = find_model(generation, tenant, data.get("model"))
    try:
        control = DEFAULT if cache_control is None else read_cache_control(cache_control)
        request = read_request(data, model.forward, can_forward=model.can_forward)
    except ApiError as error:
        error.model = model.name
        raise
    namespace = "" if tenant is None else tenant.namespace
    is_plain = request.dimensions in (None, model.dimensions) and not request.forwarded and not request.are_tokens
    asked = Asked(model, request, control, namespace, model.get_cache(namespace) if is_plain else None)
    if control is DEFAULT and len(body) <= MAX_REMEMBERED:
        generation.recent.keep(place, asked)
    return asked


def find_hit(service: Service, asked: Asked) -> Embeddings | None:
    """Return the answer to a request of one text that the first tier has, if this tier is in this process.

    This is the shortest way to an answer: it does not wait, and makes nothing that such an answer does not need.
    """
    model, request, control, _, cache = asked
    if cache is None or len(request.texts) > 1 or control.no_cache:
        return None
    try:
        entry = cache.find_in_memory(request.texts[0], request.task)
    except TextError:
        return None
    if entry is None:
        return None
    vector = service.encoded[request.encoding].encode(entry.vector)
    body = b"%b%b%b" % (_BEFORE_HIT, vector, model.after_hit)
    size = len(body)
    is_short = size <= PART_BYTES
    if not is_short and not service.answers.try_take(size):
        return None
    headers = [
        *_HIT_HEADERS,
        (b"content-length", b"%d" % size),
        (b"x-embedonce-saved-tokens", b"%d" % (tokens := entry.tokens or 0)),
    ]
    whole, parts = (body, _NO_PARTS) if is_short else (None, [body])
    tiers = {model.first_tier: 1}
    return make_embeddings((whole, parts, headers, model, model.price, 1, tiers, 1, tokens, 0, 0))


async def embed(service: Service, tenant: Tenant | None, asked: Asked) -> Embeddings:
    """Answer a request.

    Raises:
        ApiError: some inputs have no vector.
    """
    try:
        return await _embed(service, tenant, asked)
    except ApiError as error:
        error.model = asked.model.name
        raise


async def _embed(service: Service, tenant: Tenant | None, asked: Asked) -> Embeddings:
    model, request, control, namespace, plain_cache = asked
    if plain_cache is not None:
        fetched = await _fetch(service, tenant, model, plain_cache, request, control)
    else:
        variation = model.find_variation(request.dimensions, request.forwarded, are_tokens=request.are_tokens)
        with model.use(variation):
            cache = model.get_cache(namespace, variation)
            fetched = await _fetch(service, tenant, model, cache, request, control)
    sources = fetched.sources
    count = len(sources)
    first = sources[0]
    imported = len(fetched.imported)
    tiers: Mapping[str, int]
    if not imported and sources.count(first) == count:
        tiers = {} if first == "provider" else {str(first): count}
    else:
        from_tiers = (source for i, source in enumerate(sources) if source != "provider" and i not in fetched.imported)
        tiers = Counter(map(str, from_tiers))
    hits = sum(tiers.values())
    parts = await _encode(service, request, model, fetched)
    state = b"hit" if hits == count else b"partial" if hits else b"miss"
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % sum(map(len, parts))),
        (b"x-embedonce-cache", state),
        (b"x-embedonce-hits", b"%d" % hits),
        (b"x-embedonce-computed", b"%d" % (count - hits - imported)),
        (b"x-embedonce-saved-tokens", b"%d" % fetched.saved.tokens),
    ]
    if imported:
        headers.append((b"x-embedonce-imported", b"%d" % imported))
    return Embeddings(
        None,
        parts,
        headers,
        model,
        model.get_price(fetched.space),
        count,
        tiers,
        hits,
        fetched.saved.tokens,
        _sum_charged(fetched),
        len(fetched.changed),
    )


async def _fetch(
    service: Service,
    tenant: Tenant | None,
    model: Model,
    cache: Cache,
    request: EmbeddingRequest,
    control: CacheControl,
) -> Fetched:
    """Return the vectors of all inputs.

    Raises:
        ApiError: some inputs have no vector.
    """
    texts, task, count = request.texts, request.task, len(request.texts)
    store, fresh = not control.no_store, control.no_cache
    try:
        if control.only_if_cached:
            fetched = await cache.alookup(texts, task)
        elif tenant is not None and tenant.tokens_per_day is not None:
            fetched = await fetch_within_budget(service.budgets, tenant, cache, texts, task, store=store, fresh=fresh)
        else:
            fetched = await cache.afetch(texts, task, store=store, fresh=fresh)
    except SpaceError as error:  # the provider does not know the task
        raise ApiError(400, str(error), param=request.task_field) from None
    except EmbedonceError as error:
        service.failures.record(model.name, [error])
        raise explain_error(error, count) from None
    missing = [i for i, row in enumerate(fetched.rows) if row is None and i not in fetched.failed]
    if missing:  # the request has only-if-cached
        be = "is" if len(missing) == 1 else "are"
        message = (
            f"{len(missing):,} of {count:,} inputs {be} not in the cache; error.positions lists the missing inputs"
        )
        raise ApiError(404, message, param="input", code="not_cached", positions=missing)
    if fetched.failed:
        errors = fetched.failed.values()
        service.failures.record(model.name, errors)
        service.counters.count_charged(tenant, model.name, model.get_price(fetched.space), _sum_charged(fetched))
        if tenant is not None and any(isinstance(error, BudgetExceeded) for error in errors):
            service.counters.count_refused(tenant, "budget")
        is_stored = store and not fresh and bool(cache.tiers)
        raise explain_failures(fetched.failed, count, is_stored=is_stored)
    return fetched


def _sum_charged(fetched: Fetched) -> int:
    return fetched.computed.tokens + fetched.wasted.tokens


async def _encode(service: Service, request: EmbeddingRequest, model: Model, fetched: Fetched) -> list[bytes]:
    """Return the parts of the body of the answer. Their bytes are taken from the memory for answers.

    Raises:
        ApiError: the answer is too large, or there is no memory for it at the moment.
    """
    encode = service.encoded[request.encoding].encode
    memory = service.answers
    rows: Sequence[Any] = fetched.rows
    first = encode(rows[0])
    # All vectors have the same dimensions, so the others are about as long as the first one.
    taken = len(rows) * (len(first) + _AROUND_ROW)
    await memory.take(taken)
    try:
        parts: list[bytes] = []
        part = [_BEFORE_HIT, first]
        size = len(first)
        for i in range(1, len(rows)):
            if i % ROWS_AT_ONCE == 0:
                await asyncio.sleep(0)
            if size >= PART_BYTES:
                parts.append(b"".join(part))
                part, size = [], 0
            encoded = encode(rows[i])
            size += len(encoded)
            part += (_BEFORE_ROW[i], encoded)
        tokens = fetched.computed.tokens
        part.append(format_end(model.get_json_name(fetched.space), tokens))
        parts.append(b"".join(part))
    except BaseException:
        memory.give(taken)
        raise
    memory.give(taken - sum(map(len, parts)))
    return parts
