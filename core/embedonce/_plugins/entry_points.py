"""List the entry points of plugins, find the entry point that a name means, and refuse plugins that must not be loaded.

Importers have an entry-point group of their own, because an importer and a backend may have the same name: the backend
``redis`` stores vectors in Redis, and the importer ``redis`` reads the vectors of another program there.

If embedonce and another package have a plugin with the same name, the name alone means the plugin of embedonce.
Therefore a package that is installed later cannot change the meaning of a configuration. ``distribution:name`` chooses
among several plugins with the same name.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from embedonce import hookspecs
from embedonce._messages import find_closest, join_words, quote
from embedonce.errors import PluginError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUPS = (hookspecs.PROJECT, hookspecs.IMPORTERS)

DISABLE = "EMBEDONCE_DISABLE_PLUGINS"
"""Environment variable with the names of plugins and distributions that must not be loaded, separated by commas."""


@contextmanager
def restrict_plugins(allow: Iterable[str] | None) -> Iterator[None]:
    """Inside the block, allow only the third-party plugins that ``allow`` lists, by distribution or by name.

    None allows every third-party plugin. embedonce's own plugins are always allowed.
    """
    token = _allowed_plugins.set(None if allow is None else frozenset(map(normalize_name, allow)))
    try:
        yield
    finally:
        _allowed_plugins.reset(token)


_allowed_plugins: ContextVar[frozenset[str] | None] = ContextVar("embedonce_allowed_plugins", default=None)


def strip_distribution(name: str) -> str:
    """Return ``name`` without the distribution that may precede it: ``distribution:name`` becomes ``name``."""
    return name.rpartition(":")[2]


def names(group: str = hookspecs.PROJECT) -> list[str]:
    """Return the TOML names of the installed plugins that may be loaded. This function loads no plugin.

    ``group`` is the entry-point group: that of importers, or that of all other plugins.
    """
    return sorted({type_of(point) for point in _list_points(group) if refusal_of(point) is None})


def installed_by_embedonce(group: str = hookspecs.PROJECT) -> list[str]:
    """Return the names of embedonce's own plugins in an entry-point group. This function loads no plugin."""
    return sorted(point.name for point in _list_points(group) if _is_own(point))


@functools.lru_cache(maxsize=1)
def _scan_metadata(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Read the entry points of embedonce's groups from the metadata of all installed packages.

    Reading the metadata takes about 10 ms, so the result is cached until ``sys.path`` changes.
    """
    from importlib.metadata import entry_points

    return tuple(point for group in GROUPS for point in entry_points(group=group))


def all_entry_points() -> tuple[EntryPoint, ...]:
    """Return the entry points of every installed plugin."""
    return _scan_metadata(tuple(sys.path))


def _list_points(group: str) -> list[EntryPoint]:
    return [point for point in all_entry_points() if point.group == group]


def find_entry_points(name: str, group: str = hookspecs.PROJECT) -> list[EntryPoint]:
    """Return the entry points of a group that match ``name``, which may include a distribution."""
    found = _list_matches(name, group)
    if not found:  # the plugin may have been installed since the last scan
        _scan_metadata.cache_clear()
        found = _list_matches(name, group)
    return found


def _list_matches(name: str, group: str) -> list[EntryPoint]:
    distribution, _, plugin = name.rpartition(":")
    found = [point for point in _list_points(group) if point.name == plugin]
    if not distribution:
        return found
    wanted = normalize_name(distribution)
    return [point for point in found if normalize_name(distribution_of(point)) == wanted]


def find_entry_point(name: str, group: str = hookspecs.PROJECT) -> EntryPoint:
    """Return the one entry point of a group that ``name`` means.

    Raises:
        PluginError: no plugin or more than one plugin has this name, or the plugin must not be loaded.
    """
    found = find_entry_points(name, group)
    usable = [point for point in found if refusal_of(point) is None]
    candidates = [point for point in usable if _is_own(point)] or usable
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise PluginError(_explain_ambiguity(name, candidates))
    if found:
        raise PluginError(str(refusal_of(next(filter(_is_own, found), found[0]))))
    raise PluginError(_explain_not_installed(name, group))


def type_of(point: EntryPoint) -> str:
    """Return the ``type`` that chooses this plugin in TOML: its name, or ``distribution:name`` if needed.

    The distribution is needed if the name alone means a different plugin or is ambiguous.
    """
    others = [
        other for other in _list_matches(point.name, point.group) if other is not point and refusal_of(other) is None
    ]
    needs_distribution = others and not _is_own(point)
    return full_name(point) if needs_distribution else point.name


def refusal_of(point: EntryPoint) -> str | None:
    """Return why a plugin must not be loaded (it is disabled or not allowed), or None if it can be loaded."""
    names = {normalize_name(point.name), normalize_name(distribution_of(point)), normalize_name(full_name(point))}
    if names & {normalize_name(part) for part in os.environ.get(DISABLE, "").split(",") if part.strip()}:
        return f"{describe(point)} is disabled by {DISABLE}={os.environ[DISABLE]}"
    allow = _allowed_plugins.get()
    if allow is None or _is_own(point) or names & allow:
        return None
    return f'{describe(point)} is not allowed: add "{distribution_of(point)}" to the list "allow" in [plugins]'


def _is_own(point: EntryPoint) -> bool:
    return normalize_name(distribution_of(point)) == hookspecs.PROJECT


def full_name(point: EntryPoint) -> str:
    return f"{distribution_of(point)}:{point.name}"


def normalize_name(name: str) -> str:
    """Return a distribution's name in the normal form of PEP 503, which is the same for all spellings of the name."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def distribution_of(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unknown distribution"


def version_of(point: EntryPoint) -> str:
    return point.dist.version if point.dist is not None else ""


def origin_of(point: EntryPoint) -> str:
    return f"{distribution_of(point)} {version_of(point)}".strip()


def name_kind(group: str) -> str:
    """Return what a plugin of an entry-point group is called in messages."""
    return "importer" if group == hookspecs.IMPORTERS else "plugin"


def describe(point: EntryPoint) -> str:
    return f'{name_kind(point.group)} "{point.name}" of {origin_of(point)}'


def _explain_ambiguity(name: str, points: Sequence[EntryPoint]) -> str:
    origins = join_words(origin_of(point) for point in points)
    full = join_words((f'"{full_name(point)}"' for point in points), "or")
    kind = "an importer" if points[0].group == hookspecs.IMPORTERS else "a plugin"
    return f'{len(points)} distributions provide {kind} "{name}": {origins}; choose one by writing {full}'


def _explain_not_installed(name: str, group: str) -> str:
    known, kind = names(group), name_kind(group)
    if not known:
        return (
            f"no {kind} {quote(name)} is installed: embedonce runs from a source folder that is not installed, so not "
            "even its own plugins are found; run this in the source folder: pip install -e ."
        )
    meant = find_closest(name, known, likeness=0.7)  # the default likeness would suggest "disk" for "redis"
    hint = f'; did you mean "{meant}"?' if meant else "; pip install the package that provides it."
    return f"no {kind} {quote(name)} is installed{hint} Installed: {', '.join(known)}"
