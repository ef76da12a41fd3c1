"""Find a plugin by the name that TOML says, load only that one, say what to install.

A plugin is an entry point in the group ``embedonce``: its name is what TOML says, its value a module
with hooks (:mod:`embedonce.hookspecs`). embedonce's own plugins are registered in the same way.

A name alone means embedonce's own plugin where there is one, so that no package which is installed
later changes what a configuration means; ``distribution:name`` chooses among several of one name.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from . import hookspecs
from ._messages import closest, listed, quoted, without_credentials
from .contracts import API, Normalizer
from .errors import PluginError
from .events import Event
from .keys import NORMALIZERS

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

DISABLE = "EMBEDONCE_DISABLE_PLUGINS"
"""The environment variable that lists plugins, or distributions, that must not be loaded."""


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


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A plugin whose module was imported and whose hooks were asked."""

    name: str
    origin: str
    """Distribution and version, for messages."""
    module: Any
    registered: Mapping[Kind, Mapping[str, Any]] = field(repr=False)


@contextmanager
def only(allow: Iterable[str] | None) -> Iterator[None]:
    """Let the calls inside the block load no plugins of others than ``allow``, by distribution or by name.

    None allows all. embedonce's own are always allowed.
    """
    token = _allow.set(None if allow is None else frozenset(map(_canonical, allow)))
    try:
        yield
    finally:
        _allow.reset(token)


_allow: ContextVar[frozenset[str] | None] = ContextVar("embedonce_allowed_plugins", default=None)


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
    if not _entry_points(name):
        raise PluginError(_no_step(name))
    step: Normalizer = _registered("normalizer", name)
    return step


def bare(name: str) -> str:
    """Return the plugin's own name of ``distribution:name``, or of a name alone."""
    return name.rpartition(":")[2]


def names() -> list[str]:
    """Return what TOML calls the installed plugins that may be loaded, without loading any."""
    return sorted({_type(point) for point in _all_entry_points() if _refusal(point) is None})


def installed_by_embedonce() -> list[str]:
    """Return the names of embedonce's own plugins, without loading any."""
    return sorted(point.name for point in _all_entry_points() if _is_own(point))


def installed() -> list[InstalledPlugin]:
    """Load every installed plugin, one by one, and return what each is or why it cannot be used."""
    points = sorted(_all_entry_points(), key=lambda point: (point.name, _distribution(point)))
    return [_inspect(point) for point in points]


def listeners(used: Iterable[str]) -> list[Callable[[Event], None]]:
    """Return the event hooks of those of the plugins ``used`` that have one, to be called with each event."""
    modules = {id(module): module for name in used if name not in NORMALIZERS for module in [_load(name).module]}
    return [function for module in modules.values() for function in _event_hooks(module)]


# --- entry points -----------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _scan(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Read the group from the metadata of everything installed: some 10 ms, hence once per ``sys.path``."""
    from importlib.metadata import entry_points

    return tuple(entry_points(group=hookspecs.PROJECT))


def _all_entry_points() -> tuple[EntryPoint, ...]:
    return _scan(tuple(sys.path))


def _entry_points(name: str) -> list[EntryPoint]:
    """Return the entry points that ``name``, with or without a distribution, may mean."""
    found = _named_so(name)
    if not found:  # it may have been installed since
        _scan.cache_clear()
        found = _named_so(name)
    return found


def _named_so(name: str) -> list[EntryPoint]:
    distribution, _, plugin = name.rpartition(":")
    return [
        point
        for point in _all_entry_points()
        if point.name == plugin and (not distribution or _canonical(_distribution(point)) == _canonical(distribution))
    ]


def _the_entry_point(name: str) -> EntryPoint:
    found = _entry_points(name)
    usable = [point for point in found if _refusal(point) is None]
    meant = [point for point in usable if _is_own(point)] or usable
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise PluginError(_ambiguous(name, meant))
    if found:
        raise PluginError(str(_refusal(next(filter(_is_own, found), found[0]))))
    raise PluginError(_not_installed(name))


def _type(point: EntryPoint) -> str:
    """Return what TOML says to choose this plugin."""
    others = [other for other in _named_so(point.name) if other is not point and _refusal(other) is None]
    hidden = others and not _is_own(point)
    return _full_name(point) if hidden else point.name


def _refusal(point: EntryPoint) -> str | None:
    """Return why a plugin must not be loaded: it is disabled, or not allowed."""
    names = {_canonical(point.name), _canonical(_distribution(point)), _canonical(_full_name(point))}
    if names & {_canonical(part) for part in os.environ.get(DISABLE, "").split(",") if part.strip()}:
        return f"{_named(point)} is disabled by {DISABLE}={os.environ[DISABLE]}"
    allow = _allow.get()
    if allow is None or _is_own(point) or names & allow:
        return None
    return f'{_named(point)} is not allowed: add "{_distribution(point)}" to allow in [plugins]'


def _is_own(point: EntryPoint) -> bool:
    return _canonical(_distribution(point)) == hookspecs.PROJECT


def _full_name(point: EntryPoint) -> str:
    return f"{_distribution(point)}:{point.name}"


def _canonical(name: str) -> str:
    """Return a distribution's name in the form in which two spellings of it are equal."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unknown distribution"


def _version(point: EntryPoint) -> str:
    return point.dist.version if point.dist is not None else ""


def _origin(point: EntryPoint) -> str:
    return f"{_distribution(point)} {_version(point)}".strip()


# --- loading ----------------------------------------------------------------------------------

_lock = threading.RLock()
_plugins: dict[str, _Loaded] = {}
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


def _load(name: str) -> _Loaded:
    return _load_point(_the_entry_point(name))


def _load_point(point: EntryPoint) -> _Loaded:
    with _lock:
        known = _plugins.get(_full_name(point))
        if known is None or known.origin != _origin(point):
            known = _plugins[_full_name(point)] = _load_entry_point(point)
        return known


def _load_entry_point(point: EntryPoint) -> _Loaded:
    module = _import(point)
    _check_api(point, module)
    _register(point, module)
    registered: dict[Kind, Mapping[str, Any]] = {kind: _ask(point, module, kind) for kind in HOOKS}
    return _Loaded(point.name, _origin(point), module, registered)


def _import(point: EntryPoint) -> Any:
    try:
        return point.load()
    except ModuleNotFoundError as error:
        raise PluginError(f"{_named(point)} {_missing(point, error)}") from error
    except (Exception, SystemExit) as error:
        raise PluginError(f"{_named(point)} cannot be imported: {_said(error)}") from error


def _check_api(point: EntryPoint, module: Any) -> None:
    api = getattr(module, "api", API)
    if api == API:
        return
    newer = isinstance(api, int) and api > API
    what = "embedonce" if newer else _distribution(point)
    raise PluginError(
        f"{_named(point)} is written for version {api!r} of the plugin contract, and this embedonce has "
        f"version {API}; upgrade it: pip install --upgrade {what}"
    )


def _register(point: EntryPoint, module: Any) -> None:
    manager = _manager()
    if manager.is_registered(module):  # one module may stand behind several names
        return
    try:
        manager.register(module, name=f"{_full_name(point)}={point.value}")
        _check_hooks(manager, module)
    except (Exception, SystemExit) as error:
        if manager.is_registered(module):
            manager.unregister(module)
        raise PluginError(f"{_named(point)} cannot be registered: {_said(error)}") from error


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
        raise PluginError(f"{_named(point)} failed in its hook {hook}: {_said(error)}") from error
    found: dict[str, Any] = {}
    for answer in answers:
        found.update(_checked(point, kind, answer))
    return found


def _checked(point: EntryPoint, kind: Kind, answer: Any) -> Mapping[str, Any]:
    wanted = "functions" if kind == "normalizer" else "classes"
    right = callable if kind == "normalizer" else lambda item: isinstance(item, type)
    if isinstance(answer, Mapping) and all(isinstance(name, str) and right(item) for name, item in answer.items()):
        return answer
    raise PluginError(f"{_named(point)} must return {wanted} by name from its hook {HOOKS[kind]}")


def _event_hooks(module: Any) -> list[Callable[[Event], None]]:
    impls = _manager().hook.embedonce_event.get_hookimpls()
    return [_listener(impl) for impl in impls if impl.plugin is module]


def _listener(impl: pluggy.HookImpl) -> Callable[[Event], None]:
    function = impl.function
    takes_event = bool(impl.argnames)  # pluggy lets a hook leave its argument out

    def listen(event: Event) -> None:
        function(event) if takes_event else function()

    return listen


def _inspect(point: EntryPoint) -> InstalledPlugin:
    about = functools.partial(
        InstalledPlugin, point.name, distribution=_distribution(point), version=_version(point), type=_type(point)
    )
    refusal = _refusal(point)
    if refusal is not None:
        return about(kinds=(), error=refusal)
    try:
        plugin = _load_point(point)
    except PluginError as error:
        return about(kinds=(), error=str(error), broken=not _lacks_extra(point, error))
    kinds: tuple[Kind, ...] = tuple(kind for kind in HOOKS if plugin.registered[kind])
    wrong = [problem for kind in kinds for cls in plugin.registered[kind].values() for problem in _lacks(kind, cls)]
    wrong += _unreachable(point, plugin)
    try:
        _the_entry_point(point.name)
    except PluginError as error:  # its name alone means two
        wrong.append(str(error))
    return about(kinds=kinds, error="; ".join(wrong) or None, broken=bool(wrong))


def _unreachable(point: EntryPoint, plugin: _Loaded) -> Iterator[str]:
    """Yield what is registered under a name by which no configuration finds it."""
    brought = {name for found in plugin.registered.values() for name in found}
    if point.name not in brought and (brought or not _event_hooks(plugin.module)):
        named = f'and nothing that is named as its entry point, "{point.name}"'
        yield f"it brings {listed(_brought(plugin))}, {named}" if brought else "it brings nothing"
        return
    origin = _origin(point)
    found_by = {other.name for other in _all_entry_points() if _origin(other) == origin and other.value == point.value}
    for what, name in ((what, name) for what, name in _brought_names(plugin) if name not in found_by):
        yield f'{what} cannot be used: add an entry point {name} = "{point.value}"'


def _lacks(kind: Kind, cls: Any) -> Iterator[str]:
    """Yield what can be seen to be wrong with a class before one is made."""
    from ._config.tables import TierTable
    from ._plugins.options import options_beside, options_of  # only `embedonce plugins` asks

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


# --- messages ---------------------------------------------------------------------------------


def _named(point: EntryPoint) -> str:
    return f'plugin "{point.name}" of {_origin(point)}'


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
        again = f"pip install --force-reinstall {_distribution(point)}"
        return f"has no module {module}, although it says so; install it again: {again}"
    extra = _extra(point.dist, point.name, module) if point.dist is not None else None
    if extra:
        return f"needs {module}, which is not installed: pip install '{_distribution(point)}[{extra}]'"
    return f"needs the module {module}, which is not installed"


def _lacks_extra(point: EntryPoint, error: PluginError) -> bool:
    """Whether a plugin would work if an extra of its distribution were installed."""
    missing = error.__cause__.name if isinstance(error.__cause__, ModuleNotFoundError) else None
    if not missing or f"{point.module}.".startswith(f"{missing}.") or point.dist is None:
        return False
    return _extra(point.dist, point.name, missing) is not None


def _extra(distribution: Distribution, plugin: str, module: str) -> str | None:
    """Return the extra of the distribution that brings a missing module.

    That is the one named as the plugin is, else one whose requirement is named as the module is; all
    of it is read from the distribution's metadata, so that no message names an extra that is not there.
    """
    extras = distribution.metadata.get_all("Provides-Extra") or []
    for extra in extras:
        if _canonical(extra) == _canonical(plugin):
            return str(extra)
    wanted = {_canonical(module), _canonical(module.partition(".")[0])}
    for requirement in distribution.requires or []:
        package = re.match(r"[A-Za-z0-9._-]+", requirement)
        extra = re.search(r"""extra\s*==\s*["']([^"']+)["']""", requirement)
        if package and extra and _canonical(package[0]) in wanted:
            return extra[1]
    return None


def _ambiguous(name: str, points: Sequence[EntryPoint]) -> str:
    origins = listed(_origin(point) for point in points)
    full = listed((f'"{_full_name(point)}"' for point in points), "or")
    return f'{len(points)} distributions bring a plugin "{name}": {origins}; say which one is meant: {full}'


def _not_installed(name: str) -> str:
    known = names()
    if not known:
        return (
            f"no plugin {quoted(name)}: none is installed, not even embedonce's own, because embedonce runs from a "
            "folder that was not installed; in that folder: pip install -e ."
        )
    meant = closest(name, known, likeness=0.7)  # redis is no slip of disk
    hint = f'; did you mean "{meant}"?' if meant else "; pip install the package that brings it."
    return f"no plugin {quoted(name)} is installed{hint} Installed: {', '.join(known)}"


def _no_step(name: str) -> str:
    meant = closest(name, [*NORMALIZERS, *names()])
    hint = f'; did you mean "{meant}"?' if meant else "."
    more = "plugins may bring more, each with an entry point of its name"
    return f"no normalisation step {quoted(name)}{hint} embedonce has {', '.join(NORMALIZERS)}; {more}"


def _wrong_kind(kind: Kind, plugin: _Loaded) -> str:
    has = listed(_brought(plugin))
    return f'"{plugin.name}" is no {kind}: the plugin of {plugin.origin} brings {has}'


def _brought(plugin: _Loaded) -> list[str]:
    return [what for what, _ in _brought_names(plugin)]


def _brought_names(plugin: _Loaded) -> Iterator[tuple[str, str]]:
    """Yield each thing that a plugin registers, as messages name it, with its name alone."""
    for kind, found in plugin.registered.items():
        for name in found:
            yield f'{kind} "{name}"', name
