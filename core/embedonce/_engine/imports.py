"""The options of an importer in a cache, and the checks of a list of importers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from embedonce.contracts import Importer, Source, Task
from embedonce.errors import ConfigError
from embedonce.tasks import require_task

DEFAULT_VERIFY = 20
"""Number of texts that are computed as well before the vectors of an importer are used."""
DEFAULT_TIMEOUT = 2.0
"""Seconds after which a call to an importer is given up."""


@dataclass(frozen=True, slots=True)
class Import:
    """One importer, and how a cache uses it. The cache asks the importer for texts that no tier has."""

    importer: Importer
    name: str | None = field(default=None, kw_only=True)
    """Name of the importer in ``Fetched.sources``, statistics and messages. If a tier or an earlier importer has this
    name, ``-import`` is appended."""
    task: Task = field(default="document", kw_only=True)
    """The task of all vectors that the importer finds."""
    verify: int = field(default=DEFAULT_VERIFY, kw_only=True)
    """The first ``verify`` texts that the importer finds are computed as well. No vector of the importer is used before
    all of them were found to be equal. 0: trust the importer."""
    timeout: float = field(default=DEFAULT_TIMEOUT, kw_only=True)
    """Maximum duration of one call to the importer, in seconds."""


class ImportOptionError(ConfigError):
    """An importer cannot be used. ``place`` is its index. ``option`` is the invalid option, if any."""

    def __init__(self, message: str, place: int, option: str | None = None) -> None:
        super().__init__(message)
        self.place = place
        self.option = option


def check_imports(imports: Sequence[Import | Importer]) -> list[Import]:
    """Return the importers with their options.

    Raises:
        ImportOptionError: an item is not an importer, or one of its options is invalid.
        ConfigError: ``imports`` is not a list.
    """
    given: Any = imports
    if isinstance(given, str | bytes | Mapping | Import) or not isinstance(given, Iterable):
        kind = type(given).__name__
        raise ConfigError(f"imports must be a list of importers, got {kind}; write it in brackets: [{kind}(...)]")
    checked = [one if isinstance(one, Import) else Import(one) for one in given]
    for place, one in enumerate(checked):
        _check_import(one, place)
    return checked


def _check_import(one: Any, place: int) -> None:
    importer = one.importer
    if isinstance(importer, type):
        name = importer.__name__
        raise ImportOptionError(f"{name} is a class; pass an instance of it, {name}(...)", place)
    methods = [method for method in ("lookup", "scan") if callable(getattr(importer, method, None))]
    if not methods or not isinstance(getattr(importer, "source", None), Source):
        raise ImportOptionError(
            f"{type(importer).__name__} is not an importer, because it has no `source`, or neither `lookup` nor `scan` "
            "(see embedonce.contracts.Importer)",
            place,
        )
    require_task(one.task)
    if not isinstance(one.verify, int) or isinstance(one.verify, bool) or one.verify < 0:
        raise ImportOptionError(f"verify must be an int of at least 0, got {one.verify!r}", place, "verify")
    if one.name is not None and (not isinstance(one.name, str) or not one.name):
        raise ImportOptionError(f"name must be a str that is not empty, got {one.name!r}", place, "name")
    is_number = isinstance(one.timeout, int | float) and not isinstance(one.timeout, bool)
    if not is_number or not 0 < one.timeout < float("inf"):
        raise ImportOptionError(f"timeout must be a number of seconds above 0, got {one.timeout!r}", place, "timeout")


def choose_name(one: Import, taken: Collection[str]) -> str:
    """Return a name for an importer that is not among the ``taken`` names."""
    name = one.name or type(one.importer).__name__.removesuffix("Importer").lower() or "importer"
    if name in taken:
        name = f"{name}-import"
    others = (f"{name}-{number}" for number in range(2, len(taken) + 3))
    return name if name not in taken else next(other for other in others if other not in taken)
