"""Finds the plugin to test with ``embedonce conformance``, and converts the plugin's options from text to values."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeAlias

from embedonce import hookspecs
from embedonce._config.inspection import installed
from embedonce._config.secrets import find_credentials, is_secret
from embedonce._messages import find_closest, join_words, quote
from embedonce._plugins import entry_points, loading
from embedonce._plugins.options import Option, Refused, list_invalid_parts, options_of, read_text
from embedonce.errors import PluginError
from embedonce.options import BadValue

Kind: TypeAlias = Literal["backend", "provider", "normalizer"]

NEW = "{new}"
"""Placeholder in an option. The placeholder is replaced by a text that is different for every store."""
SERVER = "{server}"
"""Placeholder in an option. The address of the server replaces the placeholder."""


IMPORTER_REFUSED = (
    "this is an importer, and its tests must write the stores that it reads, which options cannot do; write a test "
    "file with embedonce.testing.ImporterContract (see docs/testing.md), or start with `embedonce new importer NAME`"
)


class InvalidTarget(ValueError):
    """Raised if the plugin does not exist, or cannot be made or tested as requested. The message says why."""


@dataclass(frozen=True, slots=True)
class Target:
    """A plugin to test, and the options for the plugin's constructor, as the text that the user wrote."""

    written: str
    kind: Kind
    plugin: Callable[..., Any]
    options: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def declared(self) -> Mapping[str, Option]:
        """Options that the plugin's class declares, by name."""
        return options_of(self.plugin) if isinstance(self.plugin, type) else {}

    @property
    def secrets(self) -> list[str]:
        """Secrets that the values of the options contain. A message must not contain any of these secrets."""
        named = (text for name, text in self.options.items() if is_secret((name,)))
        return [
            secret for secret in (*named, *(c for t in self.options.values() for c in find_credentials(t))) if secret
        ]

    def fill_placeholders(self, *, new: str, server: str = "") -> dict[str, str]:
        """Return the options with ``{new}`` and ``{server}`` filled in."""
        return {name: text.replace(NEW, new).replace(SERVER, server) for name, text in self.options.items()}

    def read(self, options: Mapping[str, str]) -> dict[str, Any]:
        """Convert options from text to their declared types.

        Raises:
            InvalidTarget: options are invalid or missing; the message lists all problems.
        """
        declared, problems = self.declared, []
        values: dict[str, Any] = {}
        for name, text in options.items():
            if name not in declared:
                problems.append(f"unknown option {quote(name)}{_hint(name, declared)}")
                continue
            option = declared[name]
            try:
                values[name] = option.check(read_text(option, text))
            except Refused as refused:
                problems += [
                    f"option {name} {wrong.message}" for wrong in list_invalid_parts(option, text, refused, hidden=True)
                ]
            except (PluginError, BadValue) as error:
                problems.append(f"option {name}: {error}")
        missing = [option.name for option in declared.values() if option.required and option.name not in options]
        if missing:
            problems.append(f"missing --option {join_words(f'{name}=...' for name in missing)}")
        if problems:
            raise InvalidTarget("; ".join(problems))
        return {name: declared[name].resolve_path(value, Path.cwd()) for name, value in values.items()}

    def make_plugin(self, options: Mapping[str, str]) -> Any:
        """Make the plugin. Errors of :meth:`read` and of the plugin's constructor are raised unchanged."""
        return self.plugin(**self.read(options))


def _hint(name: str, declared: Mapping[str, Option]) -> str:
    meant = find_closest(name, declared)
    if meant:
        return f"; did you mean {meant}?"
    return f"; the plugin takes {join_words(declared)}" if declared else "; the plugin takes no options"


def find_target(written: str, options: Mapping[str, str]) -> Target:
    """Find a plugin. ``written`` is ``plugin``, ``distribution:plugin`` or ``module:Class``.

    Raises:
        InvalidTarget: the plugin cannot be found or imported.
    """
    if ":" not in written or written in entry_points.names() or _is_installed(written):
        return _find_installed(written, options)
    module, _, name = written.partition(":")
    plugin = _import_class(module, name)
    return Target(written, detect_kind(plugin, written), plugin, options)


def _is_installed(written: str) -> bool:
    distribution, _, name = written.rpartition(":")
    return any(one.name == name and one.distribution == distribution for one in installed())


def _find_installed(written: str, options: Mapping[str, str]) -> Target:
    finders: Mapping[Kind, Callable[[str], Any]] = {
        "backend": loading.backend,
        "provider": loading.provider,
        "normalizer": loading.normalizer,
    }
    messages: list[str] = []
    for kind, finder in finders.items():
        try:
            return Target(written, kind, finder(written), options)
        except PluginError as error:
            messages.append(str(error))
    if written in entry_points.names(hookspecs.IMPORTERS):
        raise InvalidTarget(IMPORTER_REFUSED)
    raise InvalidTarget(f"{messages[0]}; to name a class that is not installed, write module:Class")


def _import_class(module: str, name: str) -> Any:
    here = str(Path.cwd())
    # A plugin under development is usually in the current folder, so add that folder to sys.path, as `python -m pytest`
    # does.
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise InvalidTarget(f"cannot import {module}: it requires {error.name}, which is not installed") from error
        raise InvalidTarget(f"there is no module {module}, neither installed nor in this folder") from error
    except (Exception, SystemExit) as error:
        raise InvalidTarget(f"cannot import {module}: {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            meant = find_closest(part, vars(found)) if hasattr(found, "__dict__") else None
            raise InvalidTarget(f"{module} has no {part}" + (f"; did you mean {meant}?" if meant else ""))
        found = getattr(found, part)
    return found


def detect_kind(plugin: Any, written: str) -> Kind:
    """Return the kind of a plugin. The methods of a class show its kind; a function is a normalisation step.

    Raises:
        InvalidTarget: ``plugin`` is neither a backend, nor a provider, nor a normalisation step, or is an importer.
    """
    if isinstance(plugin, type):
        if hasattr(plugin, "get_many") or hasattr(plugin, "set_many"):
            return "backend"
        if hasattr(plugin, "embed") or hasattr(plugin, "aembed"):
            return "provider"
        if hasattr(plugin, "lookup") or hasattr(plugin, "scan"):
            raise InvalidTarget(IMPORTER_REFUSED)
        raise InvalidTarget(
            f"{written} is neither a backend (get_many, set_many) nor a provider (embed or aembed) nor an importer "
            "(lookup or scan)"
        )
    if callable(plugin):
        return "normalizer"
    raise InvalidTarget(f"{written} is neither a class nor a function")


def make_from_recipe(*, written: str, options: Mapping[str, str]) -> Any:
    """Find and make a plugin. A ``Recipe`` has this function as its ``plugin``, so that other processes can call it."""
    return find_target(written, options).make_plugin(options)


def parse_options(written: Iterable[str]) -> dict[str, str]:
    """Parse ``name=value`` texts into a dict.

    Raises:
        InvalidTarget: a text has no ``=``, or a name occurs twice.
    """
    found: dict[str, str] = {}
    for text in written:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise InvalidTarget(f"an option must be written as name=value, got {quote(name)}")
        if name.strip() in found:
            raise InvalidTarget(f"option {name.strip()} is set twice")
        found[name.strip()] = value
    return found


def list_store_folders(target: Target) -> Sequence[str]:
    """Return the names of the options that hold the folder of a backend's store.

    These are its path options that are required or given. An option that names an existing file, such as a certificate,
    holds no store. The paths of a provider are read, so they are never replaced.
    """
    if target.kind != "backend":
        return ()
    given = target.options
    options = target.declared.values()
    paths = [option for option in options if option.is_path and (option.required or option.name in given)]
    return [option.name for option in paths if not Path(given.get(option.name, "")).expanduser().is_file()]
