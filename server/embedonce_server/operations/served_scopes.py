"""Which scopes of the tiers belong to a served model, according to their space cards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Any, Final

from embedonce import KeyPolicy
from embedonce.contracts import AnyProvider
from embedonce.keys import SETTINGS, SpaceCard, card
from embedonce_server.models import Model


class Fit(IntEnum):
    """How well the space card of a scope fits a model."""

    NONE = 0
    MODEL = 1
    """The provider and the model have the same names."""
    SPACE = 2
    """All settings are the same too, except for the dimensions and the forwarded fields."""
    OWN = 3
    """The scope is that of requests without dimensions and forwarded fields."""


_OF_VARIATIONS: Final = frozenset({"drift", "input"})
"""Settings that do not make another model: how often the provider has drifted, and whether inputs are token numbers."""


class ServedScopes:
    """Tells the scopes of the served models from each other."""

    def __init__(self, models: Iterable[Model], policy: KeyPolicy) -> None:
        self._models = list(models)
        self._policy = policy
        self._own: dict[tuple[int, str | None], SpaceCard] = {}

    def may_hold_vectors_of(self, model: Model, found: SpaceCard) -> bool:
        """Return whether a scope may belong to a model or its fallback. If in doubt, it does."""
        fit = self._fit_with_fallback(model, found)
        return fit > Fit.NONE and fit >= self._fit_others(model, found)

    def belongs_to(self, model: Model, found: SpaceCard) -> bool:
        """Return whether a scope belongs to a model and to no other served model."""
        fit = self._fit(model, model.get_cache("").provider, found)
        return fit >= Fit.SPACE and fit > self._fit_others(model, found)

    def list_owners(self, model: Model, found: SpaceCard) -> list[str]:
        """Return the names of the models to which a scope of ``model`` belongs as much as to ``model``."""
        fit = self._fit(model, model.get_cache("").provider, found)
        if fit < Fit.SPACE or fit < self._fit_others(model, found):
            return []
        return [one.name for one in self._models if one is model or self._fit_with_fallback(one, found) == fit]

    def _fit_others(self, model: Model, found: SpaceCard) -> Fit:
        others = [self._fit_with_fallback(other, found) for other in self._models if other is not model]
        return max(others, default=Fit.NONE)

    def _fit_with_fallback(self, model: Model, found: SpaceCard) -> Fit:
        cache = model.get_cache("")
        providers = [cache.provider, *([] if cache.fallback is None else [cache.fallback])]
        return max(self._fit(model, provider, found) for provider in providers)

    def _fit(self, model: Model, provider: AnyProvider, found: SpaceCard) -> Fit:
        own = self._describe(provider, found.get("task"))
        if (found.get("provider"), found.get("model")) != (own["provider"], own["model"]):
            return Fit.NONE
        settings, own_settings = found.get(SETTINGS), own[SETTINGS]
        if not isinstance(settings, Mapping) or not isinstance(own_settings, Mapping):
            return Fit.MODEL
        changed = {name for name in {*settings, *own_settings} if settings.get(name) != own_settings.get(name)}
        forwarded = {name for name in changed if any(f"{name}.".startswith(f"{field}.") for field in model.forward)}
        if found.get("task") != own["task"] or changed - forwarded - _OF_VARIATIONS:
            return Fit.MODEL
        return Fit.SPACE if forwarded or found.get("dimensions") != own["dimensions"] else Fit.OWN

    def _describe(self, provider: AnyProvider, task: Any) -> SpaceCard:
        """Return the card of a provider's own space for a task."""
        place = (id(provider), task if isinstance(task, str) else None)
        if place not in self._own:
            try:
                space = provider.space(place[1] or "document")
            except Exception:  # noqa: BLE001  (the provider does not know the task, which another one has known)
                space = provider.space("document")
            self._own[place] = card(self._policy, space)
        return self._own[place]
