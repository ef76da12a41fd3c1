"""``POST /v1/embeddings``: from a body to vectors."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from embedonce import Cache, Fetched, SpaceError
from embedonce.config import Tenant

from .answered import Embeddings
from .api_errors import ApiError, explain_failures
from .budgets import BudgetExceeded, fetch_within_budget
from .cache_control import CacheControl, read_cache_control
from .models import Model
from .request_body import MAX_INPUTS, EmbeddingRequest, parse_body, read_request
from .service import Generation, Service

ROWS_AT_ONCE = 64
"""Number of vectors that are encoded before other requests get their turn."""

_BEFORE_ROW = [b'{"object":"embedding","index":%d,"embedding":' % i for i in range(MAX_INPUTS)]


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


async def embed(
    service: Service, generation: Generation, tenant: Tenant | None, cache_control: bytes | None, body: bytes
) -> Embeddings:
    """Answer a request.

    Raises:
        ApiError: the request is invalid, or some inputs have no vector.
    """
    data = parse_body(body)
    model = find_model(generation, tenant, data.get("model"))
    try:
        return await _embed(service, model, tenant, cache_control, data)
    except ApiError as error:
        error.model = model.name
        raise


async def _embed(
    service: Service, model: Model, tenant: Tenant | None, cache_control: bytes | None, data: Mapping[str, Any]
) -> Embeddings:
    control = read_cache_control(cache_control)
    request = read_request(data, model.forward, can_forward=model.can_forward)
    namespace = "" if tenant is None else tenant.namespace
    if request.dimensions is None and not request.forwarded and not request.are_tokens:
        fetched = await _fetch(service, tenant, model.get_cache(namespace), request, control)
        _check_result(service, model, fetched)
    else:
        variation = model.find_variation(request.dimensions, request.forwarded, are_tokens=request.are_tokens)
        with model.use(variation):
            fetched = await _fetch(service, tenant, model.get_cache(namespace, variation), request, control)
            _check_result(service, model, fetched)
    sources = fetched.sources
    count = len(sources)
    first = sources[0]
    tiers: Mapping[str, int]
    if sources.count(first) == count:
        tiers = {} if first == "provider" else {str(first): count}
    else:
        tiers = {str(source): number for source, number in Counter(sources).items() if source != "provider"}
    hits = sum(tiers.values())
    answer = await _encode(service, request, model, fetched)
    state = b"hit" if hits == count else b"partial" if hits else b"miss"
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(answer)),
        (b"x-embedonce-cache", state),
        (b"x-embedonce-hits", b"%d" % hits),
        (b"x-embedonce-computed", b"%d" % (count - hits)),
        (b"x-embedonce-saved-tokens", b"%d" % fetched.saved.tokens),
    ]
    return Embeddings(answer, headers, model, hits, count, fetched, tiers)


async def _fetch(
    service: Service, tenant: Tenant | None, cache: Cache, request: EmbeddingRequest, control: CacheControl
) -> Fetched:
    texts, task = request.texts, request.task
    try:
        if control.only_if_cached:
            found = await cache.alookup(texts, task)
            missing = [i for i, row in enumerate(found.rows) if row is None and i not in found.failed]
            if missing:
                message = f"{len(missing):,} of {len(texts):,} inputs are not in the cache; see positions"
                raise ApiError(404, message, param="input", code="not_cached", positions=missing)
            return found
        store = not control.no_store
        if tenant is not None and tenant.tokens_per_day is not None:
            try:
                return await fetch_within_budget(
                    service.budgets, tenant, cache, texts, task, store=store, fresh=control.no_cache
                )
            except BudgetExceeded:
                service.counters.count_refused(tenant, "budget")
                raise
        return await cache.afetch(texts, task, store=store, fresh=control.no_cache)
    except SpaceError as error:  # the provider does not know the task
        raise ApiError(400, str(error), param="input_type") from None


def _check_result(service: Service, model: Model, fetched: Fetched) -> None:
    if fetched.failed:
        service.failures.record(model.name, fetched.failed.values())
        raise explain_failures(fetched.failed, len(fetched.rows))


async def _encode(service: Service, request: EmbeddingRequest, model: Model, fetched: Fetched) -> bytes:
    """Return the body of the answer."""
    encode = service.encoded[request.encoding].encode
    rows: Sequence[Any] = fetched.rows
    tokens = fetched.computed.tokens
    if len(rows) == 1:
        items = b'{"object":"embedding","index":0,"embedding":%b}' % encode(rows[0])
    else:
        parts: list[bytes] = []
        for start in range(0, len(rows), ROWS_AT_ONCE):
            if start:
                await asyncio.sleep(0)
            for i, row in enumerate(rows[start : start + ROWS_AT_ONCE], start):
                parts += (_BEFORE_ROW[i], encode(row), b"},")
        parts[-1] = b"}"
        items = b"".join(parts)
    return b'{"object":"list","data":[%b],"model":%b,"usage":{"prompt_tokens":%d,"total_tokens":%d}}' % (
        items,
        model.json_name if not model.has_fallback else model.get_json_name(fetched.space),
        tokens,
        tokens,
    )
