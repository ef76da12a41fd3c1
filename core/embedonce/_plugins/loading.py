"""Loading the plugin of an entry point: import its module, ask its hooks, and say what is wrong with either."""

from __future__ import annotations

import functools
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from embedonce import hookspecs
from embedonce._messages import closest, listed, quoted, without_credentials
from embedonce.contracts import API, Normalizer
from embedonce.errors import PluginError
from embedonce.events import Event
from embedonce.keys import NORMALIZERS

from .entry_points import (
    canonical,
    describe,
    distribution_of,
    find_entry_point,
    find_entry_points,
    full_name,
    names,
    origin_of,
)

if TYPE_CHECKING:
    from importlib.metadata import Distribution, EntryPoint

    import pluggy

Kind: TypeAlias = Literal["backend", "provider", "normalizer"]

HOOKS: Mapping[Kind, str] = {
    "backend": "embedonce_backends",
    "provider": "embedonce_providers",
    "normalizer": "embedonce_normalizers",
}
"""The hook that registers plugins of each kind."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A plugin whose module was imported and whose hooks were asked."""

    name: str
    origin: str
    """Distribution and version, for messages."""
    module: Any
    registered: Mapping[Kind, Mapping[str, Any]] = field(repr=False)


def backend(name: str) -> type[Any]:
    """Return the backend class that TOML calls ``name``, or ``distribution:name``.

    Raises:
        PluginError: it is not installed, not allowed, cannot be loaded, or is no backend.
    """
    cls: type[Any] = _registered("backend", name)
    return cls


def provider(name: str) -> type[Any]:
    """Return the provider class that TOML calls ``name``. Raises as :func:`backend` does."""
    cls: type[Any] = _registered("provider", name)
    return cls


def normalizer(name: str) -> Normalizer:
    """Return the normalisation step ``name``: one of embedonce's own, else a plugin's.

    Raises:
        PluginError: there is no such step, or its plugin cannot be loaded.
    """
    if name in NORMALIZERS:
        return NORMALIZERS[name]
    if not find_entry_points(name):
        raise PluginError(_no_step(name))
    step: Normalizer = _registered("normalizer", name)
    return step


def listeners(used: Iterable[str]) -> list[Callable[[Event], None]]:
    """Return the event hooks of those of the plugins ``used`` that have one, to be called with each event."""
    modules = {id(module): module for name in used if name not in NORMALIZERS for module in [_load(name).module]}
    return [function for module in modules.values() for function in event_hooks(module)]


_lock = threading.RLock()
_plugins: dict[str, Loaded] = {}
"""By ``distribution:name``."""


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.RLock()  # a thread of the parent may have held it, and is not here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


@functools.cache
def _manager() -> pluggy.PluginManager:
    import pluggy

    mark = pluggy.HookspecMarker(hookspecs.PROJECT)
    for hook in hookspecs.HOOKS:
        mark(hook)
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    return manager


def _registered(kind: Kind, name: str) -> Any:
    plugin = _load(name)
    found = plugin.registered[kind].get(plugin.name)
    if found is None:
        raise PluginError(_wrong_kind(kind, plugin))
    return found


def _load(name: str) -> Loaded:
    return load_entry_point(find_entry_point(name))


def load_entry_point(point: EntryPoint) -> Loaded:
    with _lock:
        known = _plugins.get(full_name(point))
        if known is None or known.origin != origin_of(point):
            known = _plugins[full_name(point)] = _load_anew(point)
        return known


def _load_anew(point: EntryPoint) -> Loaded:
    module = _import(point)
    _check_api(point, module)
    _register(point, module)
    registered: dict[Kind, Mapping[str, Any]] = {kind: _ask(point, module, kind) for kind in HOOKS}
    return Loaded(point.name, origin_of(point), module, registered)


def _import(point: EntryPoint) -> Any:
    try:
        return point.load()
    except ModuleNotFoundError as error:
        raise PluginError(f"{describe(point)} {_missing(point, error)}") from error
    except (Exception, SystemExit) as error:
        raise PluginError(f"{describe(point)} cannot be imported: {_said(error)}") from error


def _check_api(point: EntryPoint, module: Any) -> None:
    api = getattr(module, "api", API)
    if api == API:
        return
    newer = isinstance(api, int) and api > API
    what = "embedonce" if newer else distribution_of(point)
    raise PluginError(
        f"{describe(point)} is written for version {api!r} of the plugin contract, and this embedonce has "
        f"version {API}; upgrade it: pip install --upgrade {what}"
    )


def _register(point: EntryPoint, module: Any) -> None:
    manager = _manager()
    if manager.is_registered(module):  # one module may stand behind several names
        return
    try:
        manager.register(module, name=f"{full_name(point)}={point.value}")
        _check_hooks(manager, module)
    except (Exception, SystemExit) as error:
        if manager.is_registered(module):
            manager.unregister(module)
        raise PluginError(f"{describe(point)} cannot be registered: {_said(error)}") from error


def _check_hooks(manager: pluggy.PluginManager, module: Any) -> None:
    known = [hook.__name__ for hook in hookspecs.HOOKS]
    callers = manager.get_hookcallers(module) or []
    for caller in callers:
        if not caller.has_spec():
            meant = closest(caller.name, known)
            raise PluginError(f"there is no hook {caller.name}" + (f"; did you mean {meant}?" if meant else ""))
    if not callers:
        raise PluginError(f"it has no hooks; mark functions named {listed(known, 'or')} with @embedonce.hookimpl")


def _ask(point: EntryPoint, module: Any, kind: Kind) -> Mapping[str, Any]:
    """Return what the module's own hook of this kind registers, by name."""
    manager, hook = _manager(), HOOKS[kind]
    others = [plugin for plugin in manager.get_plugins() if plugin is not module]
    try:
        answers = manager.subset_hook_caller(hook, others)()
    except (Exception, SystemExit) as error:
        raise PluginError(f"{describe(point)} failed in its hook {hook}: {_said(error)}") from error
    found: dict[str, Any] = {}
    for answer in answers:
        found.update(_checked(point, kind, answer))
    return found


def _checked(point: EntryPoint, kind: Kind, answer: Any) -> Mapping[str, Any]:
    wanted = "functions" if kind == "normalizer" else "classes"
    right = callable if kind == "normalizer" else lambda item: isinstance(item, type)
    if isinstance(answer, Mapping) and all(isinstance(name, str) and right(item) for name, item in answer.items()):
        return answer
    raise PluginError(f"{describe(point)} must return {wanted} by name from its hook {HOOKS[kind]}")


def event_hooks(module: Any) -> list[Callable[[Event], None]]:
    impls = _manager().hook.embedonce_event.get_hookimpls()
    return [_listener(impl) for impl in impls if impl.plugin is module]


def _listener(impl: pluggy.HookImpl) -> Callable[[Event], None]:
    function = impl.function
    takes_event = bool(impl.argnames)  # pluggy lets a hook leave its argument out

    def listen(event: Event) -> None:
        function(event) if takes_event else function()

    return listen


def _said(error: BaseException) -> str:
    # pluggy says on its last lines what is wrong with a hook.
    said = " ".join(str(error).split()) if type(error).__name__ == "PluginValidationError" else str(error)
    first = without_credentials(next(iter(said.splitlines()), ""))
    if isinstance(error, PluginError):
        return first
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _missing(point: EntryPoint, error: ModuleNotFoundError) -> str:
    module = error.name or ""
    if not module:
        return f"cannot be imported: {_said(error)}"
    if f"{point.module}.".startswith(f"{module}."):
        again = f"pip install --force-reinstall {distribution_of(point)}"
        return f"has no module {module}, although it says so; install it again: {again}"
    extra = find_extra(point.dist, point.name, module) if point.dist is not None else None
    if extra:
        return f"needs {module}, which is not installed: pip install '{distribution_of(point)}[{extra}]'"
    return f"needs the module {module}, which is not installed"


def find_extra(distribution: Distribution, plugin: str, module: str) -> str | None:
    """Return the extra of the distribution that brings a missing module.

    That is the one named as the plugin is, else one whose requirement is named as the module is; all
    of it is read from the distribution's metadata, so that no message names an extra that is not there.
    """
    extras = distribution.metadata.get_all("Provides-Extra") or []
    for extra in extras:
        if canonical(extra) == canonical(plugin):
            return str(extra)
    wanted = {canonical(module), canonical(module.partition(".")[0])}
    for requirement in distribution.requires or []:
        package = re.match(r"[A-Za-z0-9._-]+", requirement)
        extra = re.search(r"""extra\s*==\s*["']([^"']+)["']""", requirement)
        if package and extra and canonical(package[0]) in wanted:
            return extra[1]
    return None


def _no_step(name: str) -> str:
    meant = closest(name, [*NORMALIZERS, *names()])
    hint = f'; did you mean "{meant}"?' if meant else "."
    more = "plugins may bring more, each with an entry point of its name"
    return f"no normalisation step {quoted(name)}{hint} embedonce has {', '.join(NORMALIZERS)}; {more}"


def _wrong_kind(kind: Kind, plugin: Loaded) -> str:
    has = listed(list_registered(plugin))
    return f'"{plugin.name}" is no {kind}: the plugin of {plugin.origin} brings {has}'


def list_registered(plugin: Loaded) -> list[str]:
    return [what for what, _ in registered_names(plugin)]


def registered_names(plugin: Loaded) -> Iterator[tuple[str, str]]:
    """Yield each thing that a plugin registers, as messages name it, with its name alone."""
    for kind, found in plugin.registered.items():
        for name in found:
            yield f'{kind} "{name}"', name
