"""Load the plugin of an entry point: import its module and call its hooks. An error names the step that failed."""

from __future__ import annotations

import functools
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from embedonce import hookspecs
from embedonce._messages import find_closest, join_words, quote, strip_credentials
from embedonce.contracts import API, Normalizer
from embedonce.errors import PluginError
from embedonce.events import Event
from embedonce.keys import NORMALIZERS

from .entry_points import (
    describe,
    distribution_of,
    find_entry_point,
    find_entry_points,
    full_name,
    names,
    normalize_name,
    origin_of,
)

if TYPE_CHECKING:
    from importlib.metadata import Distribution, EntryPoint

    import pluggy

Kind: TypeAlias = Literal["backend", "provider", "importer", "normalizer"]

HOOKS: Mapping[Kind, str] = {
    "backend": "embedonce_backends",
    "provider": "embedonce_providers",
    "importer": "embedonce_importers",
    "normalizer": "embedonce_normalizers",
}
"""For each kind of plugin, the name of the hook that registers plugins of this kind."""


def group_of(kind: Kind) -> str:
    """Return the entry-point group of the plugins of a kind."""
    return hookspecs.IMPORTERS if kind == "importer" else hookspecs.PROJECT


@dataclass(frozen=True, slots=True)
class LoadedPlugin:
    """A plugin whose module was imported and whose hooks were called."""

    name: str
    origin: str
    """Distribution and version, for messages."""
    module: Any
    registered: Mapping[Kind, Mapping[str, Any]] = field(repr=False)


def backend(name: str) -> type[Any]:
    """Return the backend class with this name in TOML: ``name`` or ``distribution:name``.

    Raises:
        PluginError: the plugin is not installed, not allowed, cannot be loaded, or is not a backend.
    """
    cls: type[Any] = _get_registered("backend", name)
    return cls


def provider(name: str) -> type[Any]:
    """Return the provider class with this name in TOML. Raises the same errors as :func:`backend`."""
    cls: type[Any] = _get_registered("provider", name)
    return cls


def importer(name: str) -> type[Any]:
    """Return the importer class with this name. Raises the same errors as :func:`backend`."""
    cls: type[Any] = _get_registered("importer", name)
    return cls


def normalizer(name: str) -> Normalizer:
    """Return the normalisation step ``name``: the built-in step, or else the step that a plugin provides.

    Raises:
        PluginError: there is no such step, or its plugin cannot be loaded.
    """
    if name in NORMALIZERS:
        return NORMALIZERS[name]
    if not find_entry_points(name):
        raise PluginError(_explain_unknown_step(name))
    step: Normalizer = _get_registered("normalizer", name)
    return step


def listeners(used: Iterable[str], importers: Iterable[str] = ()) -> list[Callable[[Event], None]]:
    """Return the event hooks of some plugins, as functions to call with each event.

    ``used`` has the names of backends, providers and normalisation steps.
    """
    loaded = [_load_plugin(name) for name in used if name not in NORMALIZERS]
    loaded += [_load_plugin(name, hookspecs.IMPORTERS) for name in importers]
    modules = {id(plugin.module): plugin.module for plugin in loaded}
    return [function for module in modules.values() for function in list_event_hooks(module)]


_lock = threading.RLock()
_plugins: dict[tuple[str, str], LoadedPlugin] = {}
"""Loaded plugins by entry-point group and ``distribution:name``."""


def _renew_lock() -> None:
    global _lock
    # A thread of the parent process may have held the lock during the fork. This process does not have that thread, so
    # nothing would ever release the lock.
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


@functools.cache
def _get_manager() -> pluggy.PluginManager:
    import pluggy

    mark = pluggy.HookspecMarker(hookspecs.PROJECT)
    for hook in hookspecs.HOOKS:
        mark(hook)
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    return manager


def _get_registered(kind: Kind, name: str) -> Any:
    plugin = _load_plugin(name, group_of(kind))
    found = plugin.registered[kind].get(plugin.name)
    if found is None:
        raise PluginError(_explain_wrong_kind(kind, plugin))
    return found


def _load_plugin(name: str, group: str = hookspecs.PROJECT) -> LoadedPlugin:
    return load_entry_point(find_entry_point(name, group))


def load_entry_point(point: EntryPoint) -> LoadedPlugin:
    place = (point.group, full_name(point))
    with _lock:
        known = _plugins.get(place)
        if known is None or known.origin != origin_of(point):
            known = _plugins[place] = _import_and_register_module(point)
        return known


def _import_and_register_module(point: EntryPoint) -> LoadedPlugin:
    module = _import_module(point)
    _check_api(point, module)
    _register_module(point, module)
    registered: dict[Kind, Mapping[str, Any]] = {kind: _call_hook(point, module, kind) for kind in HOOKS}
    return LoadedPlugin(point.name, origin_of(point), module, registered)


def _import_module(point: EntryPoint) -> Any:
    try:
        return point.load()
    except ModuleNotFoundError as error:
        raise PluginError(f"{describe(point)} {explain_missing_module(point, error)}") from error
    except (Exception, SystemExit) as error:
        raise PluginError(f"{describe(point)} cannot be imported: {_describe_error(error)}") from error


def _check_api(point: EntryPoint, module: Any) -> None:
    api = getattr(module, "api", API)
    if api == API:
        return
    newer = isinstance(api, int) and api > API
    outdated = "embedonce" if newer else distribution_of(point)
    raise PluginError(
        f"{describe(point)} is written for version {api!r} of the plugin contract, but this embedonce supports "
        f"version {API}; upgrade {outdated}: pip install --upgrade {outdated}"
    )


def _register_module(point: EntryPoint, module: Any) -> None:
    manager = _get_manager()
    if manager.is_registered(module):  # several entry points may name the same module
        return
    try:
        manager.register(module, name=f"{full_name(point)}={point.value}")
        _check_hooks(manager, module)
    except (Exception, SystemExit) as error:
        if manager.is_registered(module):
            manager.unregister(module)
        raise PluginError(f"{describe(point)} cannot be registered: {_describe_error(error)}") from error


def _check_hooks(manager: pluggy.PluginManager, module: Any) -> None:
    known = [hook.__name__ for hook in hookspecs.HOOKS]
    callers = manager.get_hookcallers(module) or []
    for caller in callers:
        if not caller.has_spec():
            meant = find_closest(caller.name, known)
            raise PluginError(f"there is no hook {caller.name}" + (f"; did you mean {meant}?" if meant else ""))
    if not callers:
        names = join_words(known, "or")
        raise PluginError(f"the module has no hooks; mark functions named {names} with @embedonce.hookimpl")


def _call_hook(point: EntryPoint, module: Any, kind: Kind) -> Mapping[str, Any]:
    """Call the module's hook for this kind, and return the classes or functions that the hook registers, by name."""
    manager, hook = _get_manager(), HOOKS[kind]
    others = [plugin for plugin in manager.get_plugins() if plugin is not module]
    try:
        answers = manager.subset_hook_caller(hook, others)()
    except (Exception, SystemExit) as error:
        raise PluginError(f"{describe(point)} failed in its hook {hook}: {_describe_error(error)}") from error
    found: dict[str, Any] = {}
    for answer in answers:
        found.update(_check_answer(point, kind, answer))
    return found


def _check_answer(point: EntryPoint, kind: Kind, answer: Any) -> Mapping[str, Any]:
    expected = "functions" if kind == "normalizer" else "classes"
    is_valid = callable if kind == "normalizer" else lambda item: isinstance(item, type)
    if isinstance(answer, Mapping) and all(isinstance(name, str) and is_valid(item) for name, item in answer.items()):
        return answer
    raise PluginError(f"{describe(point)}: its hook {HOOKS[kind]} must return a dict from names to {expected}")


def list_event_hooks(module: Any) -> list[Callable[[Event], None]]:
    """Return the event hooks of a loaded plugin's module."""
    impls = _get_manager().hook.embedonce_event.get_hookimpls()
    return [_make_listener(impl) for impl in impls if impl.plugin is module]


def _make_listener(impl: pluggy.HookImpl) -> Callable[[Event], None]:
    function = impl.function
    takes_event = bool(impl.argnames)  # pluggy lets a hook omit its argument

    def listen(event: Event) -> None:
        function(event) if takes_event else function()

    return listen


def _describe_error(error: BaseException) -> str:
    # Join all lines of pluggy's message, because its last lines explain what is wrong with a hook. Of any other
    # message, only the first line is used.
    text = " ".join(str(error).split()) if type(error).__name__ == "PluginValidationError" else str(error)
    first = strip_credentials(next(iter(text.splitlines()), ""))
    if isinstance(error, PluginError):
        return first
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def explain_missing_module(point: EntryPoint, error: ModuleNotFoundError) -> str:
    """Return what a plugin needs and how to install it, as the end of a sentence about the plugin."""
    module = error.name or ""
    if not module:
        return f"cannot be imported: {_describe_error(error)}"
    if f"{point.module}.".startswith(f"{module}."):
        command = f"pip install --force-reinstall {distribution_of(point)}"
        return (
            f"has its entry point in the module {module}, but does not contain this module; reinstall "
            f"{distribution_of(point)}: {command}"
        )
    extra = find_extra(point.dist, point.name, module) if point.dist is not None else None
    if extra:
        return f"needs {module}, which is not installed: pip install '{distribution_of(point)}[{extra}]'"
    return f"needs the module {module}, which is not installed"


def find_extra(distribution: Distribution, plugin: str, module: str) -> str | None:
    """Return the extra to install for a missing module, or None. The extra belongs to the plugin's distribution.

    Prefer the extra that has the plugin's name. Otherwise, take an extra that requires a package with the module's
    name. The extras come from the distribution's metadata, so a message never names an extra that does not exist.
    """
    extras = distribution.metadata.get_all("Provides-Extra") or []
    for extra in extras:
        if normalize_name(extra) == normalize_name(plugin):
            return str(extra)
    candidates = {normalize_name(module), normalize_name(module.partition(".")[0])}
    for requirement in distribution.requires or []:
        package = re.match(r"[A-Za-z0-9._-]+", requirement)
        extra = re.search(r"""extra\s*==\s*["']([^"']+)["']""", requirement)
        if package and extra and normalize_name(package[0]) in candidates:
            return extra[1]
    return None


def _explain_unknown_step(name: str) -> str:
    meant = find_closest(name, [*NORMALIZERS, *names()])
    hint = f'; did you mean "{meant}"?' if meant else "."
    more = "plugins can add steps; an entry point must have the name of the step"
    return f"no normalisation step {quote(name)}{hint} embedonce provides {', '.join(NORMALIZERS)}; {more}"


def _explain_wrong_kind(kind: Kind, plugin: LoadedPlugin) -> str:
    provided = join_words(list_registered(plugin))
    article = "an" if kind == "importer" else "a"
    return f'"{plugin.name}" is not {article} {kind}; {plugin.origin} provides {provided}'


def list_registered(plugin: LoadedPlugin) -> list[str]:
    """Return a description of everything that a plugin registers, for messages."""
    return [f'{kind} "{name}"' for kind, found in plugin.registered.items() for name in found]
