"""``/admin/forget`` and ``/admin/purge``: erasures over all workers of a host. No answer contains a text.

No failure of one tier, cache or worker ends an erasure. Failures are collected, and the answer names all of them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from embedonce import Cache, EraseIncomplete, SpaceError
from embedonce.answers import Purged
from embedonce.config import Tenant
from embedonce.keys import SpaceCard, extend_namespace
from embedonce_server.api.api_errors import ApiError
from embedonce_server.api.request_body import read_inputs
from embedonce_server.api.task_names import read_task
from embedonce_server.models import PLAIN, Model, Variation
from embedonce_server.siblings import PREFIX, SiblingAnswer

from .admin_fields import check_texts, find_models, find_tenant, read_flag, read_text
from .calls import Call
from .served_scopes import ServedScopes

if TYPE_CHECKING:
    from embedonce_server.service import Generation, Service

log = logging.getLogger("embedonce.serve")

T = TypeVar("T")

ERASE_SECONDS: Final = 60.0
"""Seconds that other workers get to erase."""

FORGET_FIELDS: Final = ("input", "model", "tenant", "namespace", "task")

PARTS: Final = ("scope", "model", "version", "namespace", "tenant")
"""The fields that choose what ``/admin/purge`` removes."""

MAX_SHOWN: Final = 128
"""Number of characters of a namespace that an answer shows. Another program may have stored a very long one."""


# --- what could not be erased -----------------------------------------------------------------


@dataclass(slots=True)
class _Incomplete:
    """What could not be erased, with the reasons."""

    tiers: dict[str, str] = field(default_factory=dict)
    unable: set[str] = field(default_factory=set)
    """Those of ``tiers`` that cannot list or delete their keys, so that asking again does not help."""
    kept: dict[str, Mapping[str, int]] = field(default_factory=dict)
    """By read-only tier, the number of entries that it keeps of each scope."""
    models: dict[str, str] = field(default_factory=dict)
    workers: dict[str, str] = field(default_factory=dict)
    scopes: dict[str, str] = field(default_factory=dict)

    def add_tiers(
        self, tiers: Mapping[str, str], unable: Collection[str], kept: Mapping[str, Mapping[str, int]]
    ) -> None:
        """Add tiers. A tier that has also failed in another way may work the next time.

        The reason of a read-only tier has a number of entries, so the reason with the largest number is used.
        """
        for name, reason in tiers.items():
            is_more = name in kept and sum(kept[name].values()) > sum(self.kept.get(name, {}).values())
            if name not in self.tiers or (name in self.unable and (name not in unable or is_more)):
                self.tiers[name] = reason
                self.unable.discard(name)
                self.unable |= {name} & set(unable)
                self.kept.pop(name, None)
                self.kept |= {name: kept[name]} if name in kept else {}

    def add_worker(self, answer: SiblingAnswer) -> None:
        """Add what another worker could not erase."""
        if answer.error is None:
            return
        error = answer.body.get("error", {}) if isinstance(answer.body, dict) else {}
        if error.get("code") != "erase_incomplete":
            self.workers[str(answer.worker)] = answer.error
            return
        where = f" (worker {answer.worker})"
        # All workers read the same store of a read-only tier.
        tiers = {name: reason + ("" if name in error["kept"] else where) for name, reason in error["tiers"].items()}
        self.add_tiers(tiers, error["unable"], error["kept"])
        self.models = {**{name: reason + where for name, reason in error["models"].items()}, **self.models}
        self.scopes = {**error["scopes"], **self.scopes}

    @property
    def can_pass(self) -> bool:
        """Whether something is left because of a failure that may pass."""
        return bool(self.tiers.keys() - self.unable or self.models or self.workers)

    def check(self) -> None:
        """Check that nothing is left.

        Raises:
            ApiError: something is left. The error names it and says what to do.
        """
        if not (self.tiers or self.models or self.workers or self.scopes):
            return
        names = [
            *(f"tier {name!r}" for name in self.tiers),
            *(f"model {name!r}" for name in self.models),
            *(f"worker {number}" for number in self.workers),
            *(f"scope {scope}" for scope in self.scopes),
        ]
        advice: list[str] = []
        if self.can_pass:
            advice.append("send the request again once the tiers, models and workers work")
        if unlisted := self.unable - self.kept.keys():
            advice.append(
                f"sending it again does not help for {_list_names(unlisted)}, which cannot list or delete keys; "
                "error.tiers says what was removed there, and the rest stays until it expires or is evicted"
            )
        if self.kept:
            advice.append(
                f"sending it again does not help for {_list_names(self.kept)}, which cannot be changed; error.tiers "
                "says how to rebuild its store without the entries"
            )
        if self.scopes:
            advice.append("error.scopes says why scopes are left; /admin/purge can remove a scope")
        raise ApiError(
            503,
            f"the erasure is incomplete because of {', '.join(names)}; {'; '.join(advice)}",
            kind="server_error",
            code="erase_incomplete",
            retry_after=1 if self.can_pass else None,
            tiers=self.tiers,
            unable=sorted(self.unable),
            kept=self.kept,
            models=self.models,
            workers=self.workers,
            scopes=self.scopes,
        )


def _list_names(tiers: Iterable[str]) -> str:
    return " and ".join(f"tier {name!r}" for name in sorted(tiers))


def _check_erased(incomplete: _Incomplete, answers: Iterable[SiblingAnswer]) -> None:
    """Check that an erasure is complete in this worker and in the others.

    Raises:
        ApiError: it is not.
    """
    for answer in answers:
        incomplete.add_worker(answer)
    incomplete.check()


# --- forgetting -------------------------------------------------------------------------------


class _Erasure(NamedTuple):
    """The texts to forget, and where."""

    texts: list[str]
    are_tokens: bool
    models: list[Model]
    """The models that may have vectors of the texts now. Scopes of other models are found by their cards."""
    namespaces: list[str]
    """The namespaces of the server that are meant, inside of the namespace of the configuration."""
    task: str | None
    is_of_request: Callable[[SpaceCard], bool]
    """Whether a scope may have vectors of the model and the task."""
    covers: Callable[[SpaceCard], bool]
    """Whether the namespace of a scope is meant."""
    names_others: bool
    """Whether the answer names scopes of other namespaces that hold one of the texts."""


def _read_erasure(service: Service, generation: Generation, fields: Mapping[str, Any]) -> _Erasure:
    if "input" not in fields:
        raise ApiError(400, 'the field "input" is missing', param="input")
    texts, are_tokens = read_inputs(fields["input"])
    check_texts(service.base, texts)
    tenant = find_tenant(generation, fields)
    namespace = read_text(fields, "namespace", may_be_empty=True)
    _refuse_two_namespaces(tenant, namespace)
    names, covers = _choose_namespaces(generation, tenant, namespace)
    task = None if fields.get("task") is None else read_task({"task": fields["task"]})
    models = find_models(generation, fields)
    scopes = ServedScopes(generation.models, generation.config.key)
    asks_for_model = fields.get("model") is not None

    def is_of_request(card: SpaceCard) -> bool:
        # A model that treats all tasks alike has no task in its cards.
        is_task = task is None or card.get("task") in (None, task)
        return is_task and (not asks_for_model or any(scopes.may_hold_vectors_of(model, card) for model in models))

    return _Erasure(
        texts,
        are_tokens,
        [model for model in models if model.accepts_tokens or not are_tokens],
        names,
        task,
        is_of_request,
        covers,
        names_others=tenant is None and namespace is None,
    )


def _choose_namespaces(
    generation: Generation, tenant: Tenant | None, namespace: str | None
) -> tuple[list[str], Callable[[SpaceCard], bool]]:
    """Return the server's own namespaces that are meant, and a function that says whether the one of a card is meant.

    A namespace includes all namespaces in it, whose names begin with it and a ``/``. The empty namespace includes all
    others, so without a namespace in ``[key]`` only the server's own namespaces are meant by default.
    """
    root = generation.config.key.namespace
    # Without a tenant, entries that were stored before there were tenants are meant too.
    known = ["", *(one.namespace for one in generation.settings.tenants)] if tenant is None else [tenant.namespace]
    full = {extend_namespace(root, name) if name else root: name for name in known}
    outer = namespace if namespace is not None else root if tenant is None and root else None

    def is_meant(found: object) -> bool:
        if not isinstance(found, str):  # another program may have stored anything as a card
            return False
        return found in full if outer is None else f"{found}/".startswith(f"{outer}/" if outer else "")

    return [name for whole, name in full.items() if is_meant(whole)], lambda card: is_meant(card.get("namespace"))


def _refuse_two_namespaces(tenant: Tenant | None, namespace: str | None) -> None:
    if tenant is not None and namespace is not None:
        raise ApiError(400, "tenant and namespace exclude each other; send one of them", param="namespace")


async def forget(call: Call) -> dict[str, Any]:
    """Remove texts from all tiers, in all vector spaces of the models, over all workers."""
    fields = await call.read_fields(FORGET_FIELDS)
    erasure = _read_erasure(call.service, call.generation, fields)
    await _refuse_unknown_task(call.service.base, erasure)
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
    _check_erased(await _forget(call, _read_erasure(call.service, call.generation, fields)), [])
    return {}


async def _refuse_unknown_task(base: Cache, erasure: _Erasure) -> None:
    """Check that a served model knows the task, or that a former model knew it and has entries in the tiers.

    Raises:
        ApiError: neither is so. Nothing has been erased.
    """
    task, refusal = erasure.task, None
    if task is None:
        return
    for model in erasure.models:
        cache = model.get_cache("")
        for provider in (cache.provider, *([] if cache.fallback is None else [cache.fallback])):
            try:
                provider.space(task)
            except SpaceError as error:
                refusal = refusal or error
            except Exception:  # noqa: BLE001  (a provider may raise anything; it has not said that the task is unknown)
                return
            else:
                return
    found = False

    def find_task(card: SpaceCard) -> bool:
        nonlocal found
        found = found or card.get("task") == task
        return False

    try:
        await base.apurge(where=find_task, dry_run=True)
    except EraseIncomplete as error:
        if error.tiers.keys() - error.unable:  # a tier that is not reachable may have the task
            return
    if not found:
        message = "no model and no entry has this task" if refusal is None else str(refusal)
        raise ApiError(400, message, param="task")


async def _forget(call: Call, erasure: _Erasure) -> _Incomplete:
    """Remove texts from the tiers. Return what could not be erased."""
    incomplete, problems = await _forget_in_caches(erasure)
    left: Mapping[str, SpaceCard]
    try:
        left = await call.service.base.aforget(
            erasure.texts, where=lambda card: erasure.is_of_request(card) and erasure.covers(card)
        )
    except EraseIncomplete as error:
        left = error.left
        # Lists of keys cover the spaces of all caches, so problems with caches matter only where there are no lists.
        if error.tiers:
            incomplete.models |= problems
        incomplete.add_tiers(_explain_tiers(error, incomplete.tiers), error.unable, error.kept)
        incomplete.scopes |= error.scopes
    call.generation.recent.clear()  # the bodies have texts
    for scope, card in left.items() if erasure.names_others else ():
        if erasure.is_of_request(card):
            incomplete.scopes[scope] = _explain_namespace(str(card.get("namespace")))
    return incomplete


async def _forget_in_caches(erasure: _Erasure) -> tuple[_Incomplete, dict[str, str]]:
    """Remove texts from the caches that requests use now, which needs no list of the tiers' keys and no space cards.

    Return the tiers that failed, and the models whose caches could not be used, with the reasons.
    """
    incomplete = _Incomplete()
    problems: dict[str, str] = {}
    for model, variation, namespace in _open_spaces(erasure):
        try:
            await model.get_cache(namespace, variation).aforget(erasure.texts, erasure.task)
        except EraseIncomplete as error:
            incomplete.add_tiers(_explain_tiers(error, error.tiers), error.unable, error.kept)
            if not error.tiers:
                problems[model.name] = str(error)
        except SpaceError:  # the model does not know the task
            continue
        except ApiError as error:
            if error.status >= 500:  # otherwise, the model does not have this variation any more
                problems[model.name] = str(error)
        except Exception as error:  # noqa: BLE001  (a provider may raise anything)
            problems[model.name] = f"its caches could not be used ({type(error).__name__})"
            log.warning('model "%s": texts could not be forgotten in a cache (%s)', model.name, type(error).__name__)
    return incomplete, problems


def _open_spaces(erasure: _Erasure) -> Iterator[tuple[Model, Variation, str]]:
    """Yield each namespace in each vector space of the models that this worker has open, and keep the space open."""
    for model in erasure.models:
        plain = Variation(are_tokens=True) if erasure.are_tokens else PLAIN
        for variation in dict.fromkeys([plain, *model.list_variations(are_tokens=erasure.are_tokens)]):
            with model.look_at(variation):
                for namespace in erasure.namespaces:
                    yield model, variation, namespace


def _explain_tiers(error: EraseIncomplete, failed: Collection[str]) -> dict[str, str]:
    """Return the reasons for the tiers of an error. ``failed`` has those where nothing could be removed by its key."""
    done = "; the texts were removed only from spaces that this worker knows or that the configuration names"
    unlisted = error.unable - error.kept.keys()
    return {
        name: f"{reason}{'; nothing was removed' if name in failed else done}" if name in unlisted else reason
        for name, reason in error.tiers.items()
    }


def _explain_namespace(namespace: str) -> str:
    if not namespace:
        return 'it has no namespace; to erase in all namespaces, send "namespace": ""'
    # The card of another program may have a namespace that is not valid Unicode.
    shown = namespace[:MAX_SHOWN].encode(errors="replace").decode()
    return f'its namespace "{shown}" is not one of this server; to erase there too, send it as namespace'


# --- purging ----------------------------------------------------------------------------------


async def purge(call: Call) -> dict[str, Any]:
    """Remove all entries of the scopes that match, over all workers. Without ``"dry_run": false``, only count them."""
    fields = await call.read_fields((*PARTS, "dry_run"))
    is_dry = read_flag(fields, "dry_run", default=True)
    own: list[tuple[Purged, _Incomplete]]
    if is_dry:
        own = [await _purge(call.service, call.generation, fields, is_dry)]
        answers = await call.service.siblings.call("POST", f"{PREFIX}purge", fields, timeout=ERASE_SECONDS)
    else:
        own, answers = await _erase_everywhere(
            call.service, "purge", fields, lambda: _purge(call.service, call.generation, fields, is_dry)
        )
    incomplete = own[-1][1]
    for answer in answers:
        incomplete.add_worker(answer)
    _check_purged(incomplete, is_dry)
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
        "kept": own[-1][0].kept,
        "unable": incomplete.tiers,
        "workers": _list_workers(call.service, answers),
    }


def _list_workers(service: Service, answers: Iterable[SiblingAnswer]) -> list[int]:
    """Return the numbers of the workers that have erased."""
    return sorted({service.worker, *(answer.worker for answer in answers)})


async def purge_here(call: Call) -> dict[str, Any]:
    """Remove entries as another worker asks for."""
    fields = await call.read_fields((*PARTS, "dry_run"))
    is_dry = read_flag(fields, "dry_run", default=True)
    purged, incomplete = await _purge(call.service, call.generation, fields, is_dry)
    _check_purged(incomplete, is_dry)
    return {"scopes": purged.scopes, "removed": purged.removed}


def _check_purged(incomplete: _Incomplete, is_dry: bool) -> None:
    """Check that a purge is complete. A dry run may lack tiers that cannot be listed at all.

    Raises:
        ApiError: it is not.
    """
    if not is_dry or incomplete.can_pass:
        incomplete.check()


async def _purge(
    service: Service, generation: Generation, fields: Mapping[str, Any], is_dry: bool
) -> tuple[Purged, _Incomplete]:
    """Remove entries from the tiers. Return what was removed, and what could not be erased.

    Raises:
        ApiError: a field is invalid, or scopes belong to the named model and to another one.
    """
    parts = {name: value for name in PARTS if (value := read_text(fields, name)) is not None}
    if not parts:
        raise ApiError(400, f"at least one of {', '.join(PARTS)} is required")
    tenant = find_tenant(generation, fields)
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
        incomplete = _Incomplete()
        incomplete.add_tiers(_explain_tiers(error, error.tiers), error.unable, error.kept)
        return Purged(error.matched, error.removed, error.kept), incomplete
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
    shared = await _count(service, parts, lambda card: len(known.list_owners(model, card)) > 1)
    owners: dict[str, list[str]] = {}
    for scope, card in shared.scopes.items():
        held = await _count(service, {"scope": scope}, None)
        # A process also knows the cards of scopes without entries.
        if card is not None and (held.kept or any(held.removed.values())):
            owners[scope] = known.list_owners(model, card)
    if owners:
        raise ApiError(
            400,
            f"scopes of {model.name} may belong to another model too: {', '.join(owners)}; send scope to remove one",
            param="model",
            code="shared_scopes",
            scopes={scope: f"it belongs to {' and '.join(names)}" for scope, names in owners.items()},
        )


async def _count(service: Service, parts: Mapping[str, str], where: Callable[[SpaceCard], bool] | None) -> Purged:
    """Return the scopes that match, and their entries. Tiers that cannot be listed have none."""
    try:
        return await _purge_scopes(service, parts, where, is_dry=True)
    except EraseIncomplete as error:  # the purge itself has the same error
        return Purged(error.matched, error.removed, error.kept)


def _list_private_tiers(generation: Generation) -> Collection[str]:
    """Return the names of the tiers that each worker has for itself."""
    return {tier.name for tier in generation.config.tiers if tier.scope == "process"}


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
