"""``/admin/stats``, ``/admin/explain`` and ``/admin/check``. No answer contains a text.

Each worker has counters of its own, so statistics ask the other workers too. A worker that does not answer is named.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from embedonce import SpaceError, __version__
from embedonce_server.api.api_errors import ApiError
from embedonce_server.api.request_body import read_dimensions
from embedonce_server.api.task_names import read_task
from embedonce_server.models import Model
from embedonce_server.siblings import PREFIX, SiblingAnswer
from embedonce_server.tenants.budgets import BudgetsUnavailable

from .admin_counts import add_counts, describe_stats
from .admin_fields import check_texts, find_models, find_tenant, read_flag
from .calls import Call

if TYPE_CHECKING:
    from embedonce_server.service import Generation, Service

STATS_SECONDS: Final = 2.0
"""Seconds that other workers get to answer."""


# --- statistics -------------------------------------------------------------------------------


async def show_stats(call: Call) -> dict[str, Any]:
    """Answer with the counters of all workers since they started, and with the settings that are in use."""
    service, generation = call.service, call.generation
    wants_contents = call.scope["query_string"] == b"contents=true"
    if call.scope["query_string"] and not wants_contents:
        raise ApiError(400, "the only parameter is contents=true")
    own = await show_own_stats(call)
    answers = await service.siblings.call("POST", f"{PREFIX}stats", timeout=STATS_SECONDS)
    workers = sorted([own, *(answer.body for answer in answers if answer.error is None)], key=lambda one: one["worker"])
    counts = add_counts([one.pop("counts") for one in workers])
    tenants: list[dict[str, Any]] | None
    try:
        tenants = await _describe_tenants(service, generation)
    except BudgetsUnavailable:
        tenants = None
    stats = {
        "version": __version__,
        "status": service.state,
        "workers": workers,
        "missing_workers": _list_errors(answers),
        **counts,
        "models": [_describe_model(model) for model in generation.models],
        "tenants": tenants,
    }
    if wants_contents:
        stats["contents"] = [asdict(held) for held in await service.base.acontents()]
    return stats


async def show_own_stats(call: Call) -> dict[str, Any]:
    """Answer with the counters of this worker."""
    service = call.service
    return {
        "worker": service.worker,
        "pid": os.getpid(),
        "status": service.state,
        "uptime_seconds": round(time.time() - service.started, 3),
        **service.read_gauges(),
        "counts": describe_stats(service.stats()),
    }


def _describe_model(model: Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "provider": model.own_space[0],
        "model": model.own_space[1],
        "dimensions": model.dimensions,
        "price": None if model.price is None else str(model.price),
        "forward": sorted(model.forward),
        "spaces": len(model.roots),
    }


async def _describe_tenants(service: Service, generation: Generation) -> list[dict[str, Any]]:
    usage = await service.budgets.read_usage(generation.settings.tenants)
    described = []
    for tenant in generation.settings.tenants:
        used = usage.get(tenant.name)
        described.append(
            {
                "name": tenant.name,
                "namespace": tenant.namespace,
                "models": tenant.models,
                "requests_per_minute": tenant.requests_per_minute,
                "tokens_per_day": tenant.tokens_per_day,
                "tokens_used": None if used is None else used.used,
                "tokens_reserved": None if used is None else used.reserved,
            }
        )
    return described


def _list_errors(answers: Iterable[SiblingAnswer]) -> dict[str, str]:
    return {str(answer.worker): answer.error for answer in answers if answer.error is not None}


# --- explaining -------------------------------------------------------------------------------


async def explain(call: Call) -> dict[str, Any]:
    """Answer how the key of a text is built, and what each tier has for it. Memory tiers are those of this worker."""
    fields = await call.read_fields(("input", "model", "tenant", "task", "dimensions"))
    generation = call.generation
    text = fields.get("input")
    if type(text) is not str or not text:
        raise ApiError(400, "input must be one text that is not empty", param="input")
    check_texts(call.service.base, [text])
    models = find_models(generation, fields)
    if len(models) > 1:
        known = ", ".join(generation.models.names)
        raise ApiError(400, f"model is missing; the models are: {known}", param="model")
    tenant = find_tenant(generation, fields)
    task = read_task({"task": fields.get("task")})
    dimensions = read_dimensions(fields)
    model = models[0]
    variation = model.find_variation(dimensions, {})
    with model.look_at(variation):
        cache = model.get_cache("" if tenant is None else tenant.namespace, variation)
        try:
            explanation = await cache.aexplain(text, task)
        except SpaceError as error:
            raise ApiError(400, str(error), param="task") from None
    return {"model": model.name, **explanation.as_dict()}


# --- checking ---------------------------------------------------------------------------------


async def check(call: Call) -> dict[str, Any]:
    """Check whether the tiers answer and store. With ``provider``, check the providers; ``embed`` calls them."""
    fields = await call.read_fields(("provider", "embed"))
    embeds = read_flag(fields, "embed", default=False)
    checks_providers = read_flag(fields, "provider", default=False) or embeds
    tiers = [asdict(one) for one in await call.service.base.acheck()]
    providers: list[dict[str, Any]] = []
    for model in call.generation.models if checks_providers else ():
        checks = await model.get_cache("").acheck_providers(embed=embeds)
        providers += [{"name": model.name, **asdict(one)} for one in checks]
    return {"ok": all(one["ok"] for one in (*tiers, *providers)), "tiers": tiers, "providers": providers}
