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
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from embedonce import Cache, EraseIncomplete, SpaceError, __version__
from embedonce.answers import Purged
from embedonce.config import Tenant
from embedonce.keys import SpaceCard, extend_namespace
from embedonce_server.api.api_errors import ApiError
from embedonce_server.api.request_body import read_dimensions, read_inputs
from embedonce_server.api.task_names import read_task
from embedonce_server.models import PLAIN, Model, Variation
from embedonce_server.siblings import PREFIX, SiblingAnswer
from embedonce_server.tenants.budgets import BudgetsUnavailable

from .admin_counts import add_counts, describe_stats
from .calls import Call
from .served_scopes import ServedScopes

if TYPE_CHECKING:
    from embedonce_server.service import Generation, Service

T = TypeVar("T")

STATS_SECONDS: Final = 2.0
ERASE_SECONDS: Final = 60.0
"""Seconds that other workers get to answer."""

FORGET_FIELDS: Final = ("input", "model", "tenant", "namespace", "task")

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
    """The namespaces of the server that are meant, inside of the namespace of the configuration."""
    task: str | None
    is_of_request: Callable[[SpaceCard], bool]
    """Whether a scope may have vectors of the models and the task."""
    is_in_namespaces: Callable[[SpaceCard], bool]
    reports_others: bool
    """Whether other namespaces may be those of former tenants, because all tenants and namespaces are meant."""


class _Incomplete(NamedTuple):
    """What could not be erased, with the reasons."""

    tiers: Mapping[str, str] = MappingProxyType({})
    scopes: Mapping[str, str] = MappingProxyType({})


def _read_erasure(generation: Generation, fields: Mapping[str, Any]) -> _Erasure:
    if "input" not in fields:
        raise ApiError(400, 'the field "input" is missing', param="input")
    texts, are_tokens = read_inputs(fields["input"])
    tenant = _find_tenant(generation, fields)
    namespace = _read_text(fields, "namespace")
    _refuse_two_namespaces(tenant, namespace)
    root = generation.config.key.namespace
    # Without a tenant, entries that were stored before there were tenants are meant too.
    known = ["", *(one.namespace for one in generation.settings.tenants)] if tenant is None else [tenant.namespace]
    full: dict[str, str | None] = {extend_namespace(root, name) if name else root: name for name in known}
    if namespace is not None:
        full = {namespace: full.get(namespace)}
    is_open = tenant is None and namespace is None

    def is_in_namespaces(card: SpaceCard) -> bool:
        found = card.get("namespace")
        return found in full or (is_open and root != "" and str(found).startswith(f"{root}/"))

    task = None if fields.get("task") is None else read_task({"task": fields["task"]})
    models = _find_models(generation, fields)
    scopes = ServedScopes(generation.models, generation.config.key)
    asks_for_model = fields.get("model") is not None

    def is_of_request(card: SpaceCard) -> bool:
        # A model that treats all tasks alike has no task in its cards.
        is_task = task is None or card.get("task") in (None, task)
        return is_task and (not asks_for_model or any(scopes.may_hold_vectors_of(model, card) for model in models))

    if are_tokens:
        models = [model for model in models if model.accepts_tokens]
        if not models:
            raise ApiError(400, "the models accept texts only, not token numbers; send texts", param="input")
    names = [name for name in full.values() if name is not None]
    return _Erasure(
        texts, are_tokens, models, names, task, is_of_request, is_in_namespaces, reports_others=is_open and not root
    )


def _refuse_two_namespaces(tenant: Tenant | None, namespace: str | None) -> None:
    if tenant is not None and namespace is not None:
        raise ApiError(400, "tenant and namespace exclude each other; send one of them", param="namespace")


async def forget(call: Call) -> dict[str, Any]:
    """Remove texts from all tiers, in all vector spaces of the models, over all workers."""
    fields = await call.read_fields(FORGET_FIELDS)
    erasure = _read_erasure(call.generation, fields)
    own, answers = await _erase_everywhere(call.service, "forget", fields, lambda: _forget(call, erasure))
    _check_erased(own[-1], answers)
    return {
        "inputs": len(erasure.texts),
        "models": [model.name for model in erasure.models],
        "workers": _list_workers(call.service, answers),
    }


async def forget_here(call: Call) -> dict[str, Any]:
    """Remove texts as another worker asks for."""
    fields = await call.read_fields(FORGET_FIELDS)
    _check_erased(await _forget(call, _read_erasure(call.generation, fields)), [])
    return {}


async def _forget(call: Call, erasure: _Erasure) -> _Incomplete:
    """Remove texts from the tiers. Return what could not be erased.

    Raises:
        ApiError: no model knows the task.
    """
    failed: dict[str, str] = {}
    unknown: dict[str, str] = {}
    refusals: list[SpaceError] = []
    done = 0
    # These are the caches that requests use now. They need no list of the tiers' keys, and no space cards.
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
    left: dict[str, SpaceCard] = {}
    try:
        left = await call.service.base.aforget(
            erasure.texts, where=lambda card: erasure.is_of_request(card) and erasure.is_in_namespaces(card)
        )
    except EraseIncomplete as error:
        failed.update(error.tiers)
        unknown.update(error.scopes)
    call.generation.recent.clear()  # the bodies have texts
    for scope, card in left.items() if erasure.reports_others else ():
        namespace = card.get("namespace")
        # A tenant's namespace has no "/", so other ones belong to other programs.
        if isinstance(namespace, str) and "/" not in namespace and erasure.is_of_request(card):
            unknown[scope] = f'no tenant has its namespace "{namespace}"; send that as namespace to erase there too'
    return _Incomplete(failed, unknown)


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
    own: list[tuple[Purged, _Incomplete]]
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
) -> tuple[Purged, _Incomplete]:
    """Remove entries from the tiers. Return what was removed, and what could not be erased.

    Raises:
        ApiError: a field is invalid, or scopes belong to the named model and to another one.
    """
    parts = {name: value for name in PARTS if (value := _read_text(fields, name)) is not None}
    if not parts:
        raise ApiError(400, f"at least one of {', '.join(PARTS)} is required")
    tenant = _find_tenant(generation, fields)
    _refuse_two_namespaces(tenant, parts.get("namespace"))
    if tenant is not None:
        del parts["tenant"]
        parts["namespace"] = extend_namespace(generation.config.key.namespace, tenant.namespace)
    model, where = generation.models.find(parts.get("model", "")), None
    if model is not None:
        del parts["model"]
        known = ServedScopes(generation.models, generation.config.key)
        where = partial(known.belongs_to, model)
        await _refuse_shared_scopes(service, model, known, parts)
    try:
        purged = await _purge_scopes(service, parts, where, is_dry)
    except EraseIncomplete as error:
        return Purged({}), _Incomplete(error.tiers or {"all": str(error)})
    return purged, _Incomplete()


async def _purge_scopes(
    service: Service, parts: Mapping[str, str], where: Callable[[SpaceCard], bool] | None, is_dry: bool
) -> Purged:
    return await service.base.apurge(
        scope=parts.get("scope"),
        model=parts.get("model"),
        version=parts.get("version"),
        namespace=parts.get("namespace"),
        where=where,
        dry_run=is_dry,
    )


async def _refuse_shared_scopes(service: Service, model: Model, known: ServedScopes, parts: Mapping[str, str]) -> None:
    """Check that no scope belongs to ``model`` as much as to other models.

    Raises:
        ApiError: there are such scopes. It names them.
    """
    try:
        shared = await _purge_scopes(service, parts, lambda card: len(known.list_owners(model, card)) > 1, is_dry=True)
    except EraseIncomplete:  # the purge itself has the same error, and leaves the shared scopes of other tiers
        return
    owners: dict[str, list[str]] = {}
    for scope, card in shared.scopes.items():
        held = await service.base.apurge(scope=scope, dry_run=True)
        if card is not None and any(held.removed.values()):  # a process also knows cards of scopes without entries
            owners[scope] = known.list_owners(model, card)
    if owners:
        raise ApiError(
            400,
            f"scopes of {model.name} may belong to another model too: {', '.join(owners)}; send scope to remove one",
            param="model",
            code="shared_scopes",
            scopes={scope: f"it belongs to {' and '.join(names)}" for scope, names in owners.items()},
        )


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
    round removes such copies. It leaves out workers that have not answered, because that could take the whole time
    again.
    """
    own, answers = (
        [await erase()],
        await service.siblings.call("POST", f"{PREFIX}{what}", fields, timeout=ERASE_SECONDS),
    )
    if answers:
        own.append(await erase())
        silent = [answer.worker for answer in answers if answer.error is not None and answer.body is None]
        answers += await service.siblings.call("POST", f"{PREFIX}{what}", fields, timeout=ERASE_SECONDS, skip=silent)
    return own, answers


def _check_erased(incomplete: _Incomplete, workers: Sequence[SiblingAnswer]) -> None:
    """Check that an erasure is complete.

    Raises:
        ApiError: tiers or workers failed, or scopes may still hold a text. It names them.
    """
    tiers, scopes = dict(incomplete.tiers), dict(incomplete.scopes)
    missing: dict[str, str] = {}
    for answer in workers:
        if answer.error is None:
            continue
        error = answer.body.get("error", {}) if isinstance(answer.body, dict) else {}
        if error.get("code") == "erase_incomplete":
            tiers |= {name: f"{reason} (worker {answer.worker})" for name, reason in error["tiers"].items()}
            scopes = {**error["scopes"], **scopes}
        else:
            missing[str(answer.worker)] = answer.error
    if not (tiers or missing or scopes):
        return
    names = [
        *(f"tier {name!r}" for name in tiers),
        *(f"worker {number}" for number in missing),
        *(f"scope {scope}" for scope in scopes),
    ]
    advice = [
        *(["send the request again once the tiers and workers work"] if tiers or missing else ()),
        *(["error.scopes says why scopes are left; /admin/purge can remove a scope"] if scopes else ()),
    ]
    raise ApiError(
        503,
        f"the erasure is incomplete because of {', '.join(names)}; {'; '.join(advice)}",
        kind="server_error",
        code="erase_incomplete",
        retry_after=1,
        tiers=tiers,
        workers=missing,
        scopes=scopes,
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
