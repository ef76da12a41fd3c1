"""Find and read a configuration (a file, a dict or the default), and expand its ``${VAR}`` references."""

from __future__ import annotations

import logging
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embedonce._cache_folder import NoCacheFolder, find_cache_path
from embedonce._messages import quote_toml_key
from embedonce.errors import ConfigError, Problem

from .found_files import PYPROJECT, TABLE, find_file, get_table, relative_name
from .places import Place, Places, TomlPath, find_places, read_syntax_error
from .secrets import is_secret

log = logging.getLogger("embedonce")

CONFIG_VARIABLE = "EMBEDONCE_CONFIG"
OVERRIDE = "EMBEDONCE__"
"""Prefix of environment variables. Each variable with this prefix overrides one value of the configuration."""

MAX_DEPTH = 32
"""Maximum depth to which tables and lists may be nested."""


@dataclass(slots=True)
class Document:
    """A configuration that has not been checked yet. The class can find the line and column of each value."""

    data: dict[str, Any]
    source: str
    """Description of where the configuration comes from."""
    file: Path | None = None
    text: str = ""
    prefix: tuple[str, ...] = ()
    """Names of the nested tables that lead to the configuration in the file; empty except in a pyproject.toml."""
    is_found: bool = False
    """Whether the file was found in the current folder or above it, and not named."""
    _places: Places | None = field(default=None, repr=False)

    @property
    def relative_name(self) -> str | None:
        """The file's name in messages. The name is relative if the file is in or below the current folder."""
        return None if self.file is None else relative_name(self.file)

    @property
    def folder(self) -> Path:
        """The folder that relative paths in the configuration start from."""
        return Path.cwd() if self.file is None else self.file.parent

    def place(self, path: TomlPath, *, key: bool) -> Place | None:
        """Return the place of a key or of its value; None if unknown, for example because there is no file."""
        if self.file is None:
            return None
        if self._places is None:
            try:
                self._places = find_places(self.text)
            except RecursionError:  # nested too deeply to be a valid configuration
                self._places = Places()
        return (self._places.key if key else self._places.value)((*self.prefix, *path))

    def problem(self, path: TomlPath, message: str, *, key: bool) -> Problem:
        """Return a problem about the key at ``path`` or about its value, with the line and column."""
        place = self.place(path, key=key)
        return Problem(message, self.relative_name, *(place or (None, None)))

    def table(self, *names: str, array: bool = False) -> str:
        """Return a table's header as this document writes it, such as ``[tool.embedonce.cache]``."""
        name = ".".join(map(quote_toml_key, (*self.prefix, *names)))
        return f"[[{name}]]" if array else f"[{name}]"


# --- finding ----------------------------------------------------------------------------------


def find_document(source: str | os.PathLike[str] | Mapping[str, Any] | None) -> Document:
    """Return the configuration that ``source`` names: a file, a dict, or None to look for a file.

    Raises:
        ConfigError: the given file, or the file that was found, cannot be read.
    """
    if isinstance(source, Mapping):
        return Document(dict(source), "a dict")
    if source is None:
        return _find_default()
    if not isinstance(source, str | os.PathLike):
        raise ConfigError(
            f"expected a path or a dict as configuration, or None to look for a file, got {type(source).__name__}"
        )
    return read_document(Path(os.fsdecode(source)))


def _find_default() -> Document:
    """Read the file that the environment variable ``EMBEDONCE_CONFIG`` names.

    If the variable is not set, read the nearest configuration in the current folder or above it. If there is no
    configuration, return the default.
    """
    path = os.environ.get(CONFIG_VARIABLE)
    if path:
        found = read_document(Path(path), origin=f" ({CONFIG_VARIABLE})")
        found.source = f"{CONFIG_VARIABLE}={path}"
        return found
    nearest = find_file()
    if nearest is not None:
        return parse_document(nearest.path, nearest.content, is_found=True)
    return _make_default()


def _make_default() -> Document:
    """Return the default: the ngram provider, a memory tier, and a disk tier if there is a place for it."""
    tiers = [{"type": "memory"}]
    source = "defaults, since no configuration was found"
    try:
        tiers.append({"type": "disk", "path": str(find_cache_path("vectors"))})
    except NoCacheFolder as error:
        source += f"; memory tier only, because {error}"
        _warn_once(
            f"no disk tier: {error}, so vectors are kept only in memory, until the program ends; to keep them, set "
            "HOME or XDG_CACHE_HOME to a folder that can be written to, or write a configuration"
        )
    return Document({"provider": {"type": "ngram"}, "tiers": tiers}, source)


_WARNED: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _WARNED:
        _WARNED.add(message)
        log.warning("%s", message)


def read_document(file: Path, origin: str = "") -> Document:
    """Read a TOML file. From a pyproject.toml, read only ``[tool.embedonce]``.

    Raises:
        ConfigError: the file does not exist, cannot be read, or is not valid TOML.
    """
    name = relative_name(file)
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        if os.path.islink(file):
            raise ConfigError([Problem(f"is a broken symbolic link{origin}", name)]) from None
        raise ConfigError([Problem(f"there is no such file{origin}; embedonce init writes one", name)]) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError([Problem(f"cannot be read{origin}: {reason}", name)]) from error
    return parse_document(file, content)


def parse_document(file: Path, content: bytes, *, is_found: bool = False) -> Document:
    """Return the configuration that ``content``, the content of a TOML file, describes.

    Raises:
        ConfigError: the content is not valid TOML, or the file is a pyproject.toml without ``[tool.embedonce]``.
    """
    name = relative_name(file)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte, place = _locate_bad_byte(content, error)
        raise ConfigError([Problem(f"cannot be read: byte {byte} is not UTF-8", name, *place)]) from error
    data = _parse_toml(text, name)
    found = Document(data, name, Path(os.path.abspath(file)), text, is_found=is_found)
    if file.name == PYPROJECT:
        _narrow_to_table(found)
    return found


def _locate_bad_byte(content: bytes, error: UnicodeDecodeError) -> tuple[int, Place]:
    """Return the position (from 1) of the first byte that is not UTF-8, and the line and column of that byte."""
    start = len(content) - len(error.object) + error.start  # error.start does not count a byte order mark
    before = content[:start].decode("utf-8-sig").split("\n")
    return start + 1, Place(len(before), len(before[-1]) + 1)


def _parse_toml(text: str, name: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigError([Problem("is nested too deeply", name)]) from None
    except ValueError as error:
        if "integer string conversion" in str(error):  # Python's own message would name an internal function
            raise ConfigError([Problem("has a number that is far too large", name)]) from None
        message, place = read_syntax_error(error, text)
        problem = Problem(f"not valid TOML: {message}", name, *(place or (None, None)))
        raise ConfigError([problem]) from error


def _narrow_to_table(found: Document) -> None:
    inner = get_table(found.data)
    if inner is None:
        raise ConfigError([Problem("has no [tool.embedonce]", found.relative_name)])
    if not isinstance(inner, dict):
        raise ConfigError([found.problem(TABLE, "[tool.embedonce] must be a table", key=True)])
    found.data, found.prefix, found.source = inner, TABLE, f"[tool.embedonce] in {found.relative_name}"


# --- values -----------------------------------------------------------------------------------

_VARIABLE = re.compile(
    r"\$(?:(?P<dollar>\$)|\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}|(?P<bad>\{))"
)


@dataclass(slots=True)
class Values:
    """A document's values with their variables expanded, and the errors that were found in the values."""

    data: dict[str, Any]
    expanded: set[TomlPath] = field(default_factory=set)
    """Paths of texts that contained a variable. Each of these texts is later converted to the type of its option."""
    private: set[TomlPath] = field(default_factory=set)
    """Paths of texts that contain the value of an environment variable. These texts are never shown."""
    variables: dict[TomlPath, dict[str, str]] = field(default_factory=dict)
    """Variables and their values for each path in ``private``."""
    errors: list[tuple[TomlPath, str]] = field(default_factory=list)
    """Path of each unusable value, and why the value is unusable."""


def expand_values(data: Mapping[str, Any]) -> Values:
    """Copy ``data`` as dicts, lists, text, finite numbers and bools, and expand each ``${VAR}`` in text."""
    found = Values({})
    found.data = {str(key): _expand_value(item, (str(key),), found) for key, item in data.items()}
    return found


UNUSABLE = object()
"""Replaces a value that is listed in ``Values.errors``."""


def contains_unusable(value: Any) -> bool:
    """Return whether a value, at any depth, contains a part that cannot be used."""
    if isinstance(value, Mapping):
        return any(contains_unusable(item) for item in value.values())
    if isinstance(value, list):
        return any(contains_unusable(item) for item in value)
    return value is UNUSABLE


def _expand_value(value: Any, path: TomlPath, found: Values) -> Any:
    if len(path) > MAX_DEPTH:
        return _record_error("is nested too deeply", path, found)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        return _expand_text(value, path, found)
    if isinstance(value, Mapping):
        return {str(key): _expand_value(item, (*path, str(key)), found) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_expand_value(item, (*path, index), found) for index, item in enumerate(value)]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        if -(2**63) <= value < 2**63:
            return value
        return _record_error("is too large; an integer must fit in 64 bits", path, found)
    if isinstance(value, float):
        return value if math.isfinite(value) else _record_error("must be a finite number", path, found)
    kind = type(value).__name__
    return _record_error(f"must be text, a number, true or false, a list or a table, got {kind}", path, found)


def _record_error(message: str, path: TomlPath, found: Values) -> Any:
    found.errors.append((path, message))
    return UNUSABLE


def _expand_text(value: str, path: TomlPath, found: Values) -> Any:
    if not is_unicode(value):
        return _record_error("is not valid Unicode", path, found)
    if "$" not in value:
        return value
    errors: list[str] = []
    text = _VARIABLE.sub(_make_filler(path, found, errors), value)
    if errors:
        return _record_error(errors[0], path, found)
    if not is_unicode(text):
        return _record_error("contains a variable whose value is not valid Unicode", path, found)
    return text


def _make_filler(path: TomlPath, found: Values, errors: list[str]) -> Callable[[re.Match[str]], str]:
    def fill(match: re.Match[str]) -> str:
        if match["dollar"]:
            return "$"
        if match["bad"]:
            errors.append("has a ${ that is not ${NAME} or ${NAME:-default}; write $$ for a dollar sign")
            return ""
        found.expanded.add(path)
        value, default = os.environ.get(match["name"]), match["default"]
        if value is None and default is None:
            # A default for a secret would be a secret in the file.
            hint = "set it before you start the program"
            if not is_secret(path[1:]):
                hint = f"set it, or write ${{{match['name']}:-default}}"
            errors.append(f"needs the environment variable {match['name']}, which is not set; {hint}")
        if value or default is None:
            found.private.add(path)
            found.variables.setdefault(path, {})[match["name"]] = value or ""
            return value or ""
        return default

    return fill


def is_unicode(text: str) -> bool:
    """Return whether text can be encoded as UTF-8, which means that it has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def list_overrides() -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Yield three items for each environment variable that overrides a value of the configuration.

    The items are the variable's name, the parts of the name after the prefix, and the variable's text.
    """
    for variable, text in sorted(os.environ.items()):
        if variable.upper().startswith(OVERRIDE):
            yield variable, tuple(variable[len(OVERRIDE) :].lower().split("__")), text
