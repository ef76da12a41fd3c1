"""Every installed plugin, loaded and looked at: what it is, or why it cannot be used."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from embedonce._messages import listed
from embedonce._plugins.entry_points import (
    all_entry_points,
    distribution_of,
    find_entry_point,
    origin_of,
    refusal_of,
    type_of,
    version_of,
)
from embedonce._plugins.loading import (
    HOOKS,
    Kind,
    Loaded,
    event_hooks,
    find_extra,
    list_registered,
    load_entry_point,
    registered_names,
)
from embedonce.errors import PluginError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


@dataclass(frozen=True, slots=True)
class InstalledPlugin:
    """One entry point of the group, as ``embedonce plugins`` shows it."""

    name: str
    kinds: tuple[Kind, ...]
    """Empty where it could not be loaded."""
    distribution: str
    version: str
    error: str | None = None
    """Why it cannot be used."""
    type: str = ""
    """What TOML says to choose it: its name, or ``distribution:name`` where the name alone means another."""
    broken: bool = False
    """``error`` is its author's to put right; otherwise it is disabled, not allowed, or an extra is not installed."""


def installed() -> list[InstalledPlugin]:
    """Load every installed plugin, one by one, and return what each is or why it cannot be used."""
    points = sorted(all_entry_points(), key=lambda point: (point.name, distribution_of(point)))
    return [_inspect(point) for point in points]


def _inspect(point: EntryPoint) -> InstalledPlugin:
    about = functools.partial(
        InstalledPlugin, point.name, distribution=distribution_of(point), version=version_of(point), type=type_of(point)
    )
    refusal = refusal_of(point)
    if refusal is not None:
        return about(kinds=(), error=refusal)
    try:
        plugin = load_entry_point(point)
    except PluginError as error:
        return about(kinds=(), error=str(error), broken=not _lacks_extra(point, error))
    kinds: tuple[Kind, ...] = tuple(kind for kind in HOOKS if plugin.registered[kind])
    wrong = [problem for kind in kinds for cls in plugin.registered[kind].values() for problem in _lacks(kind, cls)]
    wrong += _unreachable(point, plugin)
    try:
        find_entry_point(point.name)
    except PluginError as error:  # its name alone means two
        wrong.append(str(error))
    return about(kinds=kinds, error="; ".join(wrong) or None, broken=bool(wrong))


def _unreachable(point: EntryPoint, plugin: Loaded) -> Iterator[str]:
    """Yield what is registered under a name by which no configuration finds it."""
    brought = {name for found in plugin.registered.values() for name in found}
    if point.name not in brought and (brought or not event_hooks(plugin.module)):
        named = f'and nothing that is named as its entry point, "{point.name}"'
        yield f"it brings {listed(list_registered(plugin))}, {named}" if brought else "it brings nothing"
        return
    origin = origin_of(point)
    found_by = {other.name for other in all_entry_points() if origin_of(other) == origin and other.value == point.value}
    for what, name in ((what, name) for what, name in registered_names(plugin) if name not in found_by):
        yield f'{what} cannot be used: add an entry point {name} = "{point.value}"'


def _lacks(kind: Kind, cls: Any) -> Iterator[str]:
    """Yield what can be seen to be wrong with a class before one is made."""
    from embedonce._plugins.options import options_beside, options_of  # only `embedonce plugins` asks

    from .tables import TierTable

    if kind == "normalizer":
        return
    # Attributes such as limits and capabilities may be set when one is made: methods are the class's own.
    methods = ["get_many", "set_many", "close"] if kind == "backend" else ["space", "close"]
    missing = [name for name in methods if not callable(getattr(cls, name, None))]
    if kind == "provider" and not (callable(getattr(cls, "embed", None)) or callable(getattr(cls, "aembed", None))):
        missing.insert(0, "embed or aembed")
    if missing:
        yield f"{cls.__module__}.{cls.__qualname__} has no method {listed(missing)}"
    own = options_of(TierTable) if kind == "backend" else {}
    taken = {"type"} if kind == "backend" else {"type", "fallback"}
    try:
        options_beside(cls, own, taken)
    except PluginError as error:
        yield str(error)


def _lacks_extra(point: EntryPoint, error: PluginError) -> bool:
    """Whether a plugin would work if an extra of its distribution were installed."""
    missing = error.__cause__.name if isinstance(error.__cause__, ModuleNotFoundError) else None
    if not missing or f"{point.module}.".startswith(f"{missing}.") or point.dist is None:
        return False
    return find_extra(point.dist, point.name, missing) is not None
