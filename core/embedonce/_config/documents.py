"""Where a configuration comes from: a file, a dict, or nothing; and what variables add to it."""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embedonce._messages import written
from embedonce.errors import ConfigError, Problem

from .places import Place, Places, TomlPath, places, syntax_error

FILE = "embedonce.toml"
PYPROJECT = "pyproject.toml"
TABLE = ("tool", "embedonce")
"""Where in a pyproject.toml the configuration is."""

CONFIG_VARIABLE = "EMBEDONCE_CONFIG"
OVERRIDE = "EMBEDONCE__"
"""First characters of each environment variable that overrides one value."""

DEEPEST = 32
"""Levels of tables and lists that any value may have."""


@dataclass(slots=True)
class Document:
    """A configuration as it was written, with what is needed to say where each value is."""

    data: dict[str, Any]
    source: str
    """What it was read from, in words."""
    file: Path | None = None
    text: str = ""
    prefix: tuple[str, ...] = ()
    """Path of the configuration's table in the file."""
    _places: Places | None = field(default=None, repr=False)

    @property
    def shown(self) -> str | None:
        """The file's name as messages write it: relative where it is in or below this folder."""
        return None if self.file is None else shown(self.file)

    @property
    def folder(self) -> Path:
        """What a relative path in it is relative to."""
        return Path.cwd() if self.file is None else self.file.parent

    def place(self, path: TomlPath, *, key: bool) -> Place | None:
        """Return the place of a key, or of its value; None where there is no file."""
        if self.file is None:
            return None
        if self._places is None:
            try:
                self._places = places(self.text)
            except RecursionError:  # nested more deeply than anything that has a meaning here
                self._places = Places()
        return (self._places.key if key else self._places.value)((*self.prefix, *path))

    def problem(self, path: TomlPath, message: str, *, key: bool) -> Problem:
        """Return a problem with the key at ``path``, or with its value."""
        place = self.place(path, key=key)
        return Problem(message, self.shown, *(place or (None, None)))

    def table(self, *names: str, array: bool = False) -> str:
        """Return a table's header as this document writes it: ``[tool.embedonce.cache]``."""
        name = ".".join(map(written, (*self.prefix, *names)))
        return f"[[{name}]]" if array else f"[{name}]"


def shown(file: Path) -> str:
    """Return a file's name relative to this folder where it is in or below it, else in full."""
    try:
        return str(file.relative_to(Path.cwd()))
    except (ValueError, OSError):  # OSError: this folder is gone
        return str(file)


# --- finding ----------------------------------------------------------------------------------


def document(source: str | os.PathLike[str] | Mapping[str, Any] | None) -> Document:
    """Return the configuration that ``source`` stands for; None looks for one.

    Raises:
        ConfigError: a file that is named or found cannot be read.
    """
    if isinstance(source, Mapping):
        return Document(dict(source), "a dict")
    if source is None:
        return _found()
    if not isinstance(source, str | os.PathLike):
        raise ConfigError(
            f"a configuration is a path, a dict or None (then one is looked for), not {type(source).__name__}"
        )
    return read(Path(os.fsdecode(source)))


def _found() -> Document:
    """Look for a configuration: the variable, then this folder and those above, then defaults."""
    named = os.environ.get(CONFIG_VARIABLE)
    if named:
        found = read(Path(named), said_by=f" ({CONFIG_VARIABLE})")
        found.source = f"{CONFIG_VARIABLE}={named}"
        return found
    here = Path.cwd()
    for folder in (here, *here.parents):
        if os.path.lexists(folder / FILE):  # a link that leads nowhere too: passing over it would hide a mistake
            return read(folder / FILE)
        if _has_table(folder / PYPROJECT):
            return read(folder / PYPROJECT)
    return _defaults()


def _has_table(pyproject: Path) -> bool:
    """Whether a pyproject.toml has a configuration; one that has not may be anybody's, and as broken as they like."""
    try:
        content = pyproject.read_bytes()
    except OSError:
        return False
    if b"embedonce" not in content:
        return False
    try:
        return _inner(tomllib.loads(content.decode("utf-8-sig"))) is not None
    except (ValueError, RecursionError):
        return b"tool.embedonce" in content  # then reading it says what is wrong


def _inner(data: Any) -> Any:
    for name in TABLE:
        data = data.get(name) if isinstance(data, dict) else None
    return data


def _defaults() -> Document:
    import platformdirs

    folder = platformdirs.user_cache_path("embedonce", appauthor=False) / "vectors"
    tiers = [{"type": "memory"}, {"type": "disk", "path": str(folder)}]
    return Document({"provider": {"type": "ngram"}, "tiers": tiers}, "defaults, since no configuration was found")


def read(file: Path, said_by: str = "") -> Document:
    """Read a TOML file; of a pyproject.toml, its ``[tool.embedonce]``.

    Raises:
        ConfigError: it is not there, cannot be read, or is no TOML.
    """
    name = shown(file)
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        if os.path.islink(file):
            raise ConfigError([Problem(f"is a link that leads nowhere{said_by}", name)]) from None
        raise ConfigError([Problem(f"there is no such file{said_by}; embedonce init writes one", name)]) from None
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise ConfigError([Problem(f"cannot be read{said_by}: {said}", name)]) from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte, place = _not_utf8(content, error)
        raise ConfigError([Problem(f"cannot be read: byte {byte} is not UTF-8", name, *place)]) from error
    data = _parsed(text, name)
    found = Document(data, name, Path(os.path.abspath(file)), text)
    if file.name == PYPROJECT:
        _narrow(found)
    return found


def _not_utf8(content: bytes, error: UnicodeDecodeError) -> tuple[int, Place]:
    """Return which byte, from 1, is not UTF-8, and its place."""
    start = len(content) - len(error.object) + error.start  # the codec may have taken a byte order mark off
    before = content[:start].decode("utf-8-sig").split("\n")
    return start + 1, Place(len(before), len(before[-1]) + 1)


def _parsed(text: str, name: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigError([Problem("is nested too deeply", name)]) from None
    except ValueError as error:
        if "integer string conversion" in str(error):  # Python's own words, which name a function of Python's
            raise ConfigError([Problem("has a number that is far too large", name)]) from None
        message, place = syntax_error(error, text)
        problem = Problem(f"not valid TOML: {message}", name, *(place or (None, None)))
        raise ConfigError([problem]) from error


def _narrow(found: Document) -> None:
    inner = _inner(found.data)
    if inner is None:
        raise ConfigError([Problem("has no [tool.embedonce]", found.shown)])
    if not isinstance(inner, dict):
        raise ConfigError([found.problem(TABLE, "[tool.embedonce] must be a table", key=True)])
    found.data, found.prefix, found.source = inner, TABLE, f"[tool.embedonce] in {found.shown}"


# --- values -----------------------------------------------------------------------------------

_VARIABLE = re.compile(
    r"\$(?:(?P<dollar>\$)|\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}|(?P<bad>\{))"
)


@dataclass(slots=True)
class Values:
    """A document's values with variables filled in, plain ones only, and what is wrong with the others."""

    data: dict[str, Any]
    expanded: set[TomlPath] = field(default_factory=set)
    """Paths of text that had a variable in it: it may stand for a number."""
    private: set[TomlPath] = field(default_factory=set)
    """Paths of text with something out of the environment in it: never shown."""
    variables: dict[TomlPath, dict[str, str]] = field(default_factory=dict)
    """By the path of such text: what each variable in it holds."""
    wrong: list[tuple[TomlPath, str]] = field(default_factory=list)


def values(data: Mapping[str, Any]) -> Values:
    """Copy ``data`` as dicts, lists, text, finite numbers and bools, with the ``${VAR}`` of text filled in."""
    found = Values({})
    found.data = {str(key): _plain(item, (str(key),), found) for key, item in data.items()}
    return found


UNUSABLE = object()
"""Stands where a value was that is already in ``Values.wrong``."""


def _plain(value: Any, path: TomlPath, found: Values) -> Any:
    if len(path) > DEEPEST:
        return _refuse("is nested too deeply", path, found)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        return _text(value, path, found)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, (*path, str(key)), found) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, (*path, index), found) for index, item in enumerate(value)]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**63 else _refuse("is too large a number", path, found)
    if isinstance(value, float):
        return value if math.isfinite(value) else _refuse("must be a finite number", path, found)
    return _refuse(f"must be text, a number, true or false, a list or a table, not {type(value).__name__}", path, found)


def _refuse(message: str, path: TomlPath, found: Values) -> Any:
    found.wrong.append((path, message))
    return UNUSABLE


def _text(value: str, path: TomlPath, found: Values) -> Any:
    if not is_unicode(value):
        return _refuse("is not valid Unicode", path, found)
    if "$" not in value:
        return value
    missing: list[str] = []
    text = _VARIABLE.sub(_filler(path, found, missing), value)
    if missing:
        return _refuse(missing[0], path, found)
    return text if is_unicode(text) else _refuse("has a variable in it that is not valid Unicode", path, found)


def _filler(path: TomlPath, found: Values, missing: list[str]) -> Callable[[re.Match[str]], str]:
    def fill(match: re.Match[str]) -> str:
        if match["dollar"]:
            return "$"
        if match["bad"]:
            missing.append("has a ${ that is not ${NAME} or ${NAME:-default}; write $$ for a dollar sign")
            return ""
        found.expanded.add(path)
        value, default = os.environ.get(match["name"]), match["default"]
        if value is None and default is None:
            missing.append(
                f"needs the environment variable {match['name']}, which is not set; set it, or write "
                f"${{{match['name']}:-default}}"
            )
        if value or default is None:
            found.private.add(path)
            found.variables.setdefault(path, {})[match["name"]] = value or ""
            return value or ""
        return default

    return fill


def is_unicode(text: str) -> bool:
    """Whether text can be encoded: it has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def overrides() -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Yield each environment variable that overrides a value: its name, the parts of it, and its text."""
    for variable, text in sorted(os.environ.items()):
        if variable.upper().startswith(OVERRIDE):
            yield variable, tuple(variable[len(OVERRIDE) :].lower().split("__")), text
