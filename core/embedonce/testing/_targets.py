"""What ``embedonce conformance`` is given: a plugin's name or an importable class, and options as text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeAlias

from embedonce._config.inspection import installed
from embedonce._config.secrets import credentials_in, is_secret
from embedonce._messages import closest, listed, quoted
from embedonce._plugins import entry_points, loading
from embedonce._plugins.options import Option, Refused, list_invalid_parts, options_of, read_text
from embedonce.errors import PluginError
from embedonce.options import BadValue

Kind: TypeAlias = Literal["backend", "provider", "normalizer"]

NEW = "{new}"
"""Stands in an option for what is different in every store that is made."""
SERVER = "{server}"
"""Stands in an option for where the server listens."""


class WrongTarget(ValueError):
    """There is no such plugin, or it cannot be made from these options; the message says why."""


@dataclass(frozen=True, slots=True)
class Target:
    """A plugin that is to be tried, and the options that it is made with, as they were written."""

    written: str
    kind: Kind
    plugin: Callable[..., Any]
    options: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def declared(self) -> Mapping[str, Option]:
        """The options that its class declares."""
        return options_of(self.plugin) if isinstance(self.plugin, type) else {}

    @property
    def secrets(self) -> list[str]:
        """Texts among the options that no message may repeat."""
        named = (text for name, text in self.options.items() if is_secret((name,)))
        return [secret for secret in (*named, *(c for t in self.options.values() for c in credentials_in(t))) if secret]

    def filled(self, *, new: str, server: str = "") -> dict[str, str]:
        """Return the options with ``{new}`` and ``{server}`` filled in."""
        return {name: text.replace(NEW, new).replace(SERVER, server) for name, text in self.options.items()}

    def read(self, options: Mapping[str, str]) -> dict[str, Any]:
        """Return options in their types.

        Raises:
            WrongTarget: with everything that is wrong with them.
        """
        declared, problems = self.declared, []
        values: dict[str, Any] = {}
        for name, text in options.items():
            if name not in declared:
                problems.append(f"unknown option {quoted(name)}{_hint(name, declared)}")
                continue
            try:
                values[name] = declared[name].check(read_text(declared[name], text))
            except Refused as refused:
                problems += [
                    f"option {name} {wrong.message}" for wrong in list_invalid_parts(text, refused, hidden=True)
                ]
            except (PluginError, BadValue) as error:
                problems.append(f"option {name}: {error}")
        missing = [option.name for option in declared.values() if option.required and option.name not in options]
        if missing:
            problems.append(f"it needs --option {listed(f'{name}=...' for name in missing)}")
        if problems:
            raise WrongTarget("; ".join(problems))
        return {name: value.absolute() if isinstance(value, Path) else value for name, value in values.items()}

    def made(self, options: Mapping[str, str]) -> Any:
        """Make the plugin. Raises what :meth:`read` does, and whatever its constructor does."""
        return self.plugin(**self.read(options))


def _hint(name: str, declared: Mapping[str, Option]) -> str:
    meant = closest(name, declared)
    if meant:
        return f"; did you mean {meant}?"
    return f"; it takes {listed(declared)}" if declared else "; it takes none"


def find(written: str, options: Mapping[str, str]) -> Target:
    """Return what ``written`` names: a plugin, ``distribution:plugin``, or ``module:Class``.

    Raises:
        WrongTarget: it cannot be found or imported.
    """
    if ":" not in written or written in entry_points.names() or _is_installed(written):
        return _installed(written, options)
    module, _, name = written.partition(":")
    plugin = _imported(module, name)
    return Target(written, kind_of(plugin, written), plugin, options)


def _is_installed(written: str) -> bool:
    distribution, _, name = written.rpartition(":")
    return any(one.name == name and one.distribution == distribution for one in installed())


def _installed(written: str, options: Mapping[str, str]) -> Target:
    finders: Mapping[Kind, Callable[[str], Any]] = {
        "backend": loading.backend,
        "provider": loading.provider,
        "normalizer": loading.normalizer,
    }
    said: list[str] = []
    for kind, finder in finders.items():
        try:
            return Target(written, kind, finder(written), options)
        except PluginError as error:
            said.append(str(error))
    raise WrongTarget(f"{said[0]}; a class that is not installed is named as module:Class")


def _imported(module: str, name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:  # as python -m pytest has it: the plugin that is being written
        sys.path.insert(0, here)
    try:
        found: Any = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise WrongTarget(f"{module} cannot be imported: it needs {error.name}, which is not installed") from error
        raise WrongTarget(f"there is no module {module}, neither installed nor in this folder") from error
    except (Exception, SystemExit) as error:
        raise WrongTarget(f"{module} cannot be imported: {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            meant = closest(part, vars(found)) if hasattr(found, "__dict__") else None
            raise WrongTarget(f"{module} has no {part}" + (f"; did you mean {meant}?" if meant else ""))
        found = getattr(found, part)
    return found


def kind_of(plugin: Any, written: str) -> Kind:
    """Return what a class or function is, by its methods.

    Raises:
        WrongTarget: it is nothing that a contract is for.
    """
    if isinstance(plugin, type):
        if hasattr(plugin, "get_many") or hasattr(plugin, "set_many"):
            return "backend"
        if hasattr(plugin, "embed") or hasattr(plugin, "aembed"):
            return "provider"
        raise WrongTarget(f"{written} is neither a backend (get_many, set_many) nor a provider (embed or aembed)")
    if callable(plugin):
        return "normalizer"
    raise WrongTarget(f"{written} is no class and no function")


def make(*, written: str, options: Mapping[str, str]) -> Any:
    """Make a plugin in another process, as a ``Recipe`` says."""
    return find(written, options).made(options)


def pairs(written: Iterable[str]) -> dict[str, str]:
    """Return ``name=value`` texts as a dict.

    Raises:
        WrongTarget: one has no ``=``, or a name comes twice.
    """
    found: dict[str, str] = {}
    for text in written:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise WrongTarget(f"an option is written as name=value, not as {quoted(name)}")
        if name.strip() in found:
            raise WrongTarget(f"option {name.strip()} is given twice")
        found[name.strip()] = value
    return found


def paths_of(target: Target) -> Sequence[str]:
    """Return the options that name a file or folder, given or needed."""
    options = target.declared.values()
    return [option.name for option in options if option.is_path and (option.required or option.name in target.options)]
