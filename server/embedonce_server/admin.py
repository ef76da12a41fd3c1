"""``/admin/*``: statistics, explanations and erasures over all workers of a host. No answer contains a text.

Each worker has memory tiers of its own, so erasures and statistics ask the other workers too. A worker that does not
answer makes the answer incomplete, and the answer says so.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from embedonce import Cache, EraseIncomplete, SpaceError, __version__
from embedonce.answers import Purged
from embedonce.config import Tenant
from embedonce.keys import extend_namespace

from .admin_counts import add_counts, describe_stats
from .api_errors import ApiError
from .budgets import BudgetsUnavailable
from .calls import Call
from .models import PLAIN, Model, Variation
from .request_body import read_dimensions, read_inputs
from .siblings import PREFIX, SiblingAnswer
from .task_names import read_task

if TYPE_CHECKING:
    from .service import Generation, Service

T = TypeVar("T")

STATS_SECONDS: Final = 2.0
ERASE_SECONDS: Final = 60.0
"""Seconds that other workers get to answer."""

PARTS: Final = ("scope", "model", "version", "namespace", "tenant")
"""The fields that choose what ``/admin/purge`` removes."""


# --- fields -----------------------------------------------------------------------------------


def _read_text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is None:
        return None
    if type(value) is not str or not value:
        raise ApiError(400, f"{name} must be a string that is not empty", param=name)
    return value


def _read_flag(fields: Mapping[str, Any], name: str, default: bool) -> bool:
    value = fields.get(name)
    if value is None:
        return default
    if type(value) is not bool:
        raise ApiError(400, f"{name} must be true or false", param=name)
    return value


def _find_tenant(generation: Generation, fields: Mapping[str, Any]) -> Tenant | None:
    name = _read_text(fields, "tenant")
    if name is None:
        return None
    for tenant in generation.settings.tenants:
        if tenant.name == name:
            return tenant
    known = ", ".join(tenant.name for tenant in generation.settings.tenants) or "none"
    message = f"the tenant does not exist; the tenants are: {known}"
    raise ApiError(404, message, param="tenant", code="tenant_not_found")


def _find_models(generation: Generation, fields: Mapping[str, Any]) -> list[Model]:
    """Return the model that the fields name, or all models."""
    name = _read_text(fields, "model")
    if name is None:
        return list(generation.models)
    model = generation.models.find(name)
    if model is None:
        known = ", ".join(generation.models.names)
        raise ApiError(404, f"the model does not exist; the models are: {known}", param="model", code="model_not_found")
    return [model]


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
    models = _find_models(generation, fields)
    if len(models) > 1:
        known = ", ".join(generation.models.names)
        raise ApiError(400, f"model is missing; the models are: {known}", param="model")
    tenant = _find_tenant(generation, fields)
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


# --- erasing ----------------------------------------------------------------------------------


class _Erasure(NamedTuple):
    """The texts to forget, and where."""

    texts: list[str]
    are_tokens: bool
    models: list[Model]
    namespaces: list[str]
    task: str | None


def _read_erasure(generation: Generation, fields: Mapping[str, Any]) -> _Erasure:
    if "input" not in fields:
        raise ApiError(400, 'the field "input" is missing', param="input")
    texts, are_tokens = read_inputs(fields["input"])
    tenant = _find_tenant(generation, fields)
    tenants = generation.settings.tenants if tenant is None else [tenant]
    # Without a tenant, entries that were stored before there were tenants are meant too.
    common: list[str] = [""] if tenant is None else []
    namespaces: dict[str, None] = dict.fromkeys([*common, *(one.namespace for one in tenants)])
    task = None if fields.get("task") is None else read_task({"task": fields["task"]})
    models = _find_models(generation, fields)
    if are_tokens:
        models = [model for model in models if model.accepts_tokens]
        if not models:
            raise ApiError(400, "the models accept texts only, not token numbers; send texts", param="input")
    return _Erasure(texts, are_tokens, models, list(namespaces), task)


async def forget(call: Call) -> dict[str, Any]:
    """Remove texts from all tiers, in all vector spaces of the models, over all workers."""
    fields = await call.read_fields(("input", "model", "tenant", "task"))
    erasure = _read_erasure(call.generation, fields)
    own, answers = await _erase_everywhere(call.service, "forget", fields, lambda: _forget(erasure))
    _check_erased(own[-1], answers)
    return {
        "inputs": len(erasure.texts),
        "models": [model.name for model in erasure.models],
        "workers": _list_workers(call.service, answers),
    }


async def forget_here(call: Call) -> dict[str, Any]:
    """Remove texts as another worker asks for."""
    fields = await call.read_fields(("input", "model", "tenant", "task"))
    _check_erased(await _forget(_read_erasure(call.generation, fields)), [])
    return {}


async def _forget(erasure: _Erasure) -> dict[str, str]:
    """Remove texts from the tiers. Return the tiers that failed, with the reasons.

    Raises:
        ApiError: no model knows the task.
    """
    failed: dict[str, str] = {}
    refusals: list[SpaceError] = []
    done = 0
    for cache in _open_caches(erasure):
        try:
            await cache.aforget(erasure.texts, erasure.task)
        except EraseIncomplete as error:
            failed.update(error.tiers or {"all": str(error)})
        except SpaceError as error:
            refusals.append(error)
            continue
        done += 1
    if refusals and not done:
        raise ApiError(400, str(refusals[0]), param="task")
    return failed


def _open_caches(erasure: _Erasure) -> Iterator[Cache]:
    """Yield the cache of each namespace in each vector space of the models."""
    for model in erasure.models:
        plain = Variation(are_tokens=True) if erasure.are_tokens else PLAIN
        for variation in dict.fromkeys([plain, *model.list_variations(are_tokens=erasure.are_tokens)]):
            with ExitStack() as stack:
                stack.enter_context(model.look_at(variation))
                for namespace in erasure.namespaces:
                    yield model.get_cache(namespace, variation)


async def purge(call: Call) -> dict[str, Any]:
    """Remove all entries of the scopes that match, over all workers. Without ``"dry_run": false``, only count them."""
    fields = await call.read_fields((*PARTS, "dry_run"))
    is_dry = _read_flag(fields, "dry_run", default=True)
    own: list[tuple[Purged, dict[str, str]]]
    if is_dry:
        own = [await _purge(call.service, call.generation, fields, is_dry)]
        answers = await call.service.siblings.call("POST", f"{PREFIX}purge", fields, timeout=ERASE_SECONDS)
    else:
        own, answers = await _erase_everywhere(
            call.service, "purge", fields, lambda: _purge(call.service, call.generation, fields, is_dry)
        )
    _check_erased(own[-1][1], answers)
    removed: Counter[str] = Counter()
    scopes: dict[str, Any] = {}
    for purged, _ in own:
        removed.update(purged.removed)
        scopes |= purged.scopes
    private = _list_private_tiers(call.generation)
    for answer in answers:
        scopes = {**answer.body["scopes"], **scopes}
        # All workers share the other tiers, so a dry run counts the same entries in each worker.
        removed.update({name: n for name, n in answer.body["removed"].items() if name in private or not is_dry})
    return {
        "dry_run": is_dry,
        "scopes": scopes,
        "removed": removed,
        "workers": _list_workers(call.service, answers),
    }


def _list_workers(service: Service, answers: Iterable[SiblingAnswer]) -> list[int]:
    """Return the numbers of the workers that have erased."""
    return sorted({service.worker, *(answer.worker for answer in answers)})


async def purge_here(call: Call) -> dict[str, Any]:
    """Remove entries as another worker asks for."""
    fields = await call.read_fields((*PARTS, "dry_run"))
    is_dry = _read_flag(fields, "dry_run", default=True)
    purged, failed = await _purge(call.service, call.generation, fields, is_dry)
    _check_erased(failed, [])
    return {"scopes": purged.scopes, "removed": purged.removed}


async def _purge(
    service: Service, generation: Generation, fields: Mapping[str, Any], is_dry: bool
) -> tuple[Purged, dict[str, str]]:
    """Remove entries from the tiers, and return what was removed and the tiers that failed."""
    parts = {name: value for name in PARTS if (value := _read_text(fields, name)) is not None}
    if not parts:
        raise ApiError(400, f"at least one of {', '.join(PARTS)} is required")
    tenant = _find_tenant(generation, fields)
    if tenant is not None:
        if "namespace" in parts:
            raise ApiError(400, "tenant and namespace exclude each other; send one of them", param="namespace")
        del parts["tenant"]
        parts["namespace"] = extend_namespace(generation.config.key.namespace, tenant.namespace)
    served = generation.models.find(parts.get("model", ""))
    if served is not None:
        parts["model"] = served.own_space[1]
    try:
        purged = await service.base.apurge(
            scope=parts.get("scope"),
            model=parts.get("model"),
            version=parts.get("version"),
            namespace=parts.get("namespace"),
            dry_run=is_dry,
        )
    except EraseIncomplete as error:
        return Purged({}), error.tiers or {"all": str(error)}
    return purged, {}


def _list_private_tiers(generation: Generation) -> Collection[str]:
    """Return the names of the tiers that each worker has for itself."""
    return {
        tier.name
        for tier in generation.config.tiers
        if getattr(getattr(tier.cls, "capabilities", None), "scope", None) == "process"
    }


async def _erase_everywhere(
    service: Service, what: str, fields: Mapping[str, Any], erase: Callable[[], Awaitable[T]]
) -> tuple[list[T], list[SiblingAnswer]]:
    """Erase in this worker with ``erase``, and in the other workers. Return the results of all rounds.

    If there are other workers, there are two rounds. In the first one, a worker may copy an entry from a shared tier
    while another one still stores it there. After the first round, no worker stores an entry from before. The second
    round removes such copies.
    """
    own, answers = (
        [await erase()],
        await service.siblings.call("POST", f"{PREFIX}{what}", fields, timeout=ERASE_SECONDS),
    )
    if answers:
        own.append(await erase())
        answers += await service.siblings.call("POST", f"{PREFIX}{what}", fields, timeout=ERASE_SECONDS)
    return own, answers


def _check_erased(failed: Mapping[str, str], workers: Sequence[SiblingAnswer]) -> None:
    """Check that an erasure is complete.

    Raises:
        ApiError: tiers or workers failed. It names them.
    """
    tiers = dict(failed)
    missing: dict[str, str] = {}
    for answer in workers:
        if answer.error is None:
            continue
        error = answer.body.get("error", {}) if isinstance(answer.body, dict) else {}
        if error.get("code") == "erase_incomplete":
            tiers |= {name: f"{reason} (worker {answer.worker})" for name, reason in error["tiers"].items()}
        else:
            missing[str(answer.worker)] = answer.error
    if tiers or missing:
        names = [*(f"tier {name!r}" for name in tiers), *(f"worker {number}" for number in missing)]
        raise ApiError(
            503,
            f"the erasure is incomplete because of {', '.join(names)}; send the request again once they work",
            kind="server_error",
            code="erase_incomplete",
            retry_after=1,
            tiers=tiers,
            workers=missing,
        )


# --- checking ---------------------------------------------------------------------------------


async def check(call: Call) -> dict[str, Any]:
    """Check whether the tiers answer and store. With ``provider``, check the providers; ``embed`` calls them."""
    fields = await call.read_fields(("provider", "embed"))
    embeds = _read_flag(fields, "embed", default=False)
    checks_providers = _read_flag(fields, "provider", default=False) or embeds
    tiers = [asdict(one) for one in await call.service.base.acheck()]
    providers: list[dict[str, Any]] = []
    for model in call.generation.models if checks_providers else ():
        checks = await model.get_cache("").acheck_providers(embed=embeds)
        providers += [{"name": model.name, **asdict(one)} for one in checks]
    return {"ok": all(one["ok"] for one in (*tiers, *providers)), "tiers": tiers, "providers": providers}
