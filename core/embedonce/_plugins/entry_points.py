"""Entry points of plugins: which are installed, which one a name means, and which may not be loaded.

A name alone means embedonce's own plugin where there is one, so that no package which is installed
later changes what a configuration means; ``distribution:name`` chooses among several of one name.
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
from embedonce._messages import closest, listed, quoted
from embedonce.errors import PluginError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

DISABLE = "EMBEDONCE_DISABLE_PLUGINS"
"""The environment variable that lists plugins, or distributions, that must not be loaded."""


@contextmanager
def restrict_plugins(allow: Iterable[str] | None) -> Iterator[None]:
    """Let the calls inside the block load no plugins of others than ``allow``, by distribution or by name.

    None allows all. embedonce's own are always allowed.
    """
    token = _allow.set(None if allow is None else frozenset(map(canonical, allow)))
    try:
        yield
    finally:
        _allow.reset(token)


_allow: ContextVar[frozenset[str] | None] = ContextVar("embedonce_allowed_plugins", default=None)


def bare(name: str) -> str:
    """Return the plugin's own name of ``distribution:name``, or of a name alone."""
    return name.rpartition(":")[2]


def names() -> list[str]:
    """Return what TOML calls the installed plugins that may be loaded, without loading any."""
    return sorted({type_of(point) for point in all_entry_points() if refusal_of(point) is None})


def installed_by_embedonce() -> list[str]:
    """Return the names of embedonce's own plugins, without loading any."""
    return sorted(point.name for point in all_entry_points() if _is_own(point))


@functools.lru_cache(maxsize=1)
def _scan(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Read the group from the metadata of everything installed: some 10 ms, hence once per ``sys.path``."""
    from importlib.metadata import entry_points

    return tuple(entry_points(group=hookspecs.PROJECT))


def all_entry_points() -> tuple[EntryPoint, ...]:
    return _scan(tuple(sys.path))


def find_entry_points(name: str) -> list[EntryPoint]:
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
        for point in all_entry_points()
        if point.name == plugin and (not distribution or canonical(distribution_of(point)) == canonical(distribution))
    ]


def find_entry_point(name: str) -> EntryPoint:
    found = find_entry_points(name)
    usable = [point for point in found if refusal_of(point) is None]
    meant = [point for point in usable if _is_own(point)] or usable
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise PluginError(_ambiguous(name, meant))
    if found:
        raise PluginError(str(refusal_of(next(filter(_is_own, found), found[0]))))
    raise PluginError(_not_installed(name))


def type_of(point: EntryPoint) -> str:
    """Return what TOML says to choose this plugin."""
    others = [other for other in _named_so(point.name) if other is not point and refusal_of(other) is None]
    hidden = others and not _is_own(point)
    return full_name(point) if hidden else point.name


def refusal_of(point: EntryPoint) -> str | None:
    """Return why a plugin must not be loaded: it is disabled, or not allowed."""
    names = {canonical(point.name), canonical(distribution_of(point)), canonical(full_name(point))}
    if names & {canonical(part) for part in os.environ.get(DISABLE, "").split(",") if part.strip()}:
        return f"{describe(point)} is disabled by {DISABLE}={os.environ[DISABLE]}"
    allow = _allow.get()
    if allow is None or _is_own(point) or names & allow:
        return None
    return f'{describe(point)} is not allowed: add "{distribution_of(point)}" to allow in [plugins]'


def _is_own(point: EntryPoint) -> bool:
    return canonical(distribution_of(point)) == hookspecs.PROJECT


def full_name(point: EntryPoint) -> str:
    return f"{distribution_of(point)}:{point.name}"


def canonical(name: str) -> str:
    """Return a distribution's name in the form in which two spellings of it are equal."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def distribution_of(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unknown distribution"


def version_of(point: EntryPoint) -> str:
    return point.dist.version if point.dist is not None else ""


def origin_of(point: EntryPoint) -> str:
    return f"{distribution_of(point)} {version_of(point)}".strip()


def describe(point: EntryPoint) -> str:
    return f'plugin "{point.name}" of {origin_of(point)}'


def _ambiguous(name: str, points: Sequence[EntryPoint]) -> str:
    origins = listed(origin_of(point) for point in points)
    full = listed((f'"{full_name(point)}"' for point in points), "or")
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
