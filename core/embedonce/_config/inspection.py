"""Load and inspect every installed plugin: what it provides, or why it cannot be used."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from embedonce._messages import join_words
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
    LoadedPlugin,
    find_extra,
    group_of,
    list_event_hooks,
    list_registered,
    load_entry_point,
)
from embedonce.errors import PluginError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


@dataclass(frozen=True, slots=True)
class InstalledPlugin:
    """One installed entry point, as ``embedonce plugins`` shows it."""

    name: str
    kinds: tuple[Kind, ...]
    """Kinds of the plugins that the entry point registers; empty if the plugin cannot be loaded."""
    distribution: str
    version: str
    error: str | None = None
    """Reason why the plugin cannot be used, or None."""
    type: str = ""
    """The ``type`` that chooses this plugin in TOML: its name, or ``distribution:name`` if the name is ambiguous."""
    broken: bool = False
    """Whether only the plugin's author can fix ``error``.

    False if the plugin is disabled or not allowed, or if an extra is not installed.
    """


def installed() -> list[InstalledPlugin]:
    """Load every installed plugin and return what each one provides or why it cannot be used."""
    points = sorted(all_entry_points(), key=lambda point: (point.name, distribution_of(point)))
    return [_inspect_plugin(point) for point in points]


def _inspect_plugin(point: EntryPoint) -> InstalledPlugin:
    about = functools.partial(
        InstalledPlugin, point.name, distribution=distribution_of(point), version=version_of(point), type=type_of(point)
    )
    refusal = refusal_of(point)
    if refusal is not None:
        return about(kinds=(), error=refusal)
    try:
        plugin = load_entry_point(point)
    except PluginError as error:
        return about(kinds=(), error=str(error), broken=not _needs_extra(point, error))
    kinds: tuple[Kind, ...] = tuple(kind for kind in HOOKS if plugin.registered[kind])
    classes: list[tuple[Kind, Any]] = [(kind, cls) for kind in kinds for cls in plugin.registered[kind].values()]
    problems = [problem for kind, cls in classes for problem in _list_class_problems(kind, cls)]
    problems += _list_unreachable(point, plugin)
    try:
        find_entry_point(point.name, point.group)
    except PluginError as error:  # several plugins have this name
        problems.append(str(error))
    return about(kinds=kinds, error="; ".join(problems) or None, broken=bool(problems))


def _list_unreachable(point: EntryPoint, plugin: LoadedPlugin) -> Iterator[str]:
    """Yield a problem for each registered name that no configuration can use, because no entry point has that name."""
    provided = {name for found in plugin.registered.values() for name in found}
    if not provided:
        if not list_event_hooks(plugin.module):
            yield "it provides nothing"
        return
    if point.name not in provided:
        names = join_words(list_registered(plugin))
        yield f'its entry point is named "{point.name}", but it provides no plugin with this name; it provides {names}'
        return
    origin = origin_of(point)
    found_by = {
        (other.group, other.name)
        for other in all_entry_points()
        if origin_of(other) == origin and other.value == point.value
    }
    for kind, registered in plugin.registered.items():
        group = group_of(kind)
        for name in registered:
            if (group, name) not in found_by:
                where = f' to the group "{group}"' if group != point.group else ""
                yield f'{kind} "{name}" cannot be used: add an entry point {name} = "{point.value}"{where}'


def _list_class_problems(kind: Kind, cls: Any) -> Iterator[str]:
    """Yield the problems that can be found in a plugin's class without creating an instance of it."""
    from embedonce._plugins.options import merge_options, options_of  # needed only in this function

    from .tables import ImportTable, TierTable, is_read_only

    if kind == "normalizer":
        return
    # Check only methods, because attributes such as limits and capabilities may be set in __init__.
    methods = {
        "backend": ("get_many", "set_many", "close"),
        "provider": ("space", "close"),
        "importer": ("check", "close"),
    }
    missing = [name for name in methods[kind] if not callable(getattr(cls, name, None))]
    if kind == "backend" and is_read_only(cls):
        missing = [name for name in missing if name != "set_many"]
    if kind == "provider" and not (callable(getattr(cls, "embed", None)) or callable(getattr(cls, "aembed", None))):
        missing.insert(0, "(embed or aembed)")
    if kind == "importer" and not (callable(getattr(cls, "lookup", None)) or callable(getattr(cls, "scan", None))):
        missing.insert(0, "(lookup or scan)")
    if missing:
        yield f"{cls.__module__}.{cls.__qualname__} must define {join_words(missing)}"
    own = {"backend": TierTable, "importer": ImportTable}.get(kind)
    reserved = {"type", "fallback"} if kind == "provider" else {"type"}
    try:
        merge_options(cls, {} if own is None else options_of(own), reserved)
    except PluginError as error:
        yield str(error)


def _needs_extra(point: EntryPoint, error: PluginError) -> bool:
    """Return whether a plugin fails only because an extra of its distribution is not installed."""
    missing = error.__cause__.name if isinstance(error.__cause__, ModuleNotFoundError) else None
    if not missing or f"{point.module}.".startswith(f"{missing}.") or point.dist is None:
        return False
    return find_extra(point.dist, point.name, missing) is not None
