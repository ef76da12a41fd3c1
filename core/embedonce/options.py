"""Types for a plugin's options, including sizes and durations, which may have units in TOML.

A plugin's options are the keyword-only parameters of its class's ``__init__``. ``Doc`` gives an option its
description in the JSON schema and in error messages::

    def __init__(self, *, max_bytes: Annotated[Size | None, Doc("Evict entries above this size.")] = None) -> None: ...

In Python, a :data:`Size` is an int of bytes, and a :data:`Duration` is a float of seconds. In TOML, both may also be
text, such as ``"512 MiB"`` or ``"250ms"``. Importing this module does not import pydantic. The class ``Parsed``
imports ``pydantic_core`` only when pydantic asks for the schema of an option.
"""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from typing_extensions import Doc

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
    from pydantic_core import CoreSchema

__all__ = [
    "BadValue",
    "Doc",
    "Duration",
    "FolderOrName",
    "NotAFolder",
    "Size",
    "check_secret",
    "parse_duration",
    "parse_size",
    "read_secret_variable",
]

# Units are case-insensitive, so "Mb" means megabytes; there are no units for bits. A plain "M" is refused, because
# "M" may mean 1000 * 1000 or 1024 * 1024. This module has its own parser of sizes, because pydantic's ByteSize accepts
# bits and negative sizes. It has its own parser of durations, because the packages for durations are no longer
# maintained.
BYTES: Mapping[str, int] = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
SECONDS: Mapping[str, float] = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}

MAX_BYTES = 2**63 - 1
MAX_SECONDS = 100 * 365.25 * 86400
"""A hundred years. Timeouts in the standard library overflow at about 290 years."""

_NUMBER = r"[0-9]{1,20}(?:\.[0-9]{1,20})?"
_SIZE = re.compile(rf"({_NUMBER})\s*([A-Za-z]*)")
_PART = re.compile(rf"({_NUMBER})\s*([A-Za-z]+)\s*")


class BadValue(ValueError):
    """A value of an option is invalid. The message says what is valid and never repeats the value.

    ``hint`` may say how to write this value. It is left out of an error if the value may be a secret.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def parse_size(value: object) -> int:
    """Return a size in bytes from an int of bytes or from text such as ``"512 MiB"``, ``"1GB"``, ``"1.5 GiB"``.

    Raises:
        BadValue: the value has an invalid form, is negative, is too large, or is not a whole number of bytes.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise BadValue('must be a whole number of bytes or text such as "512 MiB"')
    if isinstance(value, str):
        return _check_size(_parse_size_text(value.strip()))
    return _check_size(value)


def _parse_size_text(text: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise BadValue('must be a number with a unit, such as "512 MiB"')
    unit = match[2].lower() or "b"
    if unit not in BYTES:
        raise BadValue("has an unknown unit; use B, kB, MB, GB, TB, KiB, MiB, GiB or TiB")
    whole, _, fraction = match[1].partition(".")
    scaled, rest = divmod(int(whole + fraction) * BYTES[unit], int("1" + "0" * len(fraction)))
    if rest and unit == "b":
        raise BadValue("must be a whole number of bytes")
    return scaled


def _check_size(size: int) -> int:
    if size < 0:
        raise BadValue("must be at least 0")
    if size > MAX_BYTES:
        raise BadValue("must be less than 8 EiB")
    return size


def format_size(size: int) -> str:
    """Return a size as TOML can write it: with the largest unit of which it is a multiple, such as ``16 MiB``."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size and size % BYTES[unit.lower()] == 0:
            return f"{size // BYTES[unit.lower()]} {unit}"
    return str(size)


def parse_duration(value: object) -> float:
    """Return a duration in seconds from a number of seconds or from text such as ``"250ms"``, ``"1h"``, ``"1h30m"``.

    Raises:
        BadValue: the value has an invalid form, is negative, is NaN, or is more than a hundred years.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise BadValue('must be a number of seconds or text such as "250ms" or "1h30m"')
    seconds = _parse_duration_text(value.strip()) if isinstance(value, str) else value
    if not seconds >= 0:  # also refuses NaN
        raise BadValue("must be at least 0")
    if seconds > MAX_SECONDS:
        raise BadValue("must be at most a hundred years")
    return float(seconds)


def _parse_duration_text(text: str) -> float:
    if re.fullmatch(_NUMBER, text):
        return float(text)
    parts = _PART.findall(text)
    if not parts or _PART.sub("", text):
        raise BadValue('must be a number with a unit, such as "250ms" or "1h30m"')
    units = [unit for _, unit in parts]
    for unit in units:
        if unit not in SECONDS:
            raise BadValue("has an unknown unit; use ms, s, m (minutes), h, d or w")
    if len(set(units)) < len(units):
        raise BadValue("must not repeat a unit")
    return math.fsum(float(number) * SECONDS[unit] for number, unit in parts)


class Parsed:
    """Marks an option that may be text in TOML, and gives pydantic its parser and JSON schema."""

    __slots__ = ("_schema", "parse")

    def __init__(self, parse: Callable[[object], Any], schema: Mapping[str, Any]) -> None:
        self.parse = parse
        self._schema = dict(schema)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(self.parse)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return dict(self._schema)


_WHOLE_NUMBER = r"[0-9]{1,20}(?:\.0{1,20})?"  # a size without a unit, or with the unit B, must be a whole number
_SIZE_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": 0, "maximum": MAX_BYTES},
        {"type": "string", "pattern": rf"^\s*(?:{_WHOLE_NUMBER}\s*[bB]?|{_NUMBER}\s*[kKmMgGtT][iI]?[bB])\s*$"},
    ]
}
_DURATION_SCHEMA = {
    "anyOf": [
        {"type": "number", "minimum": 0, "maximum": MAX_SECONDS},
        {"type": "string", "pattern": rf"^\s*(?:{_NUMBER}|(?:{_NUMBER}\s*(?:ms|s|m|h|d|w)\s*)+)\s*$"},
    ]
}

Size: TypeAlias = Annotated[int, Parsed(parse_size, _SIZE_SCHEMA)]
"""Bytes: an int, in TOML also ``"512 MiB"`` or ``"1GB"``. Zero is allowed; add ``Gt(0)`` if zero makes no sense."""

Duration: TypeAlias = Annotated[float, Parsed(parse_duration, _DURATION_SCHEMA)]
"""Seconds: a number, in TOML also ``"250ms"``, ``"1h"`` or ``"1h30m"``. Zero is allowed."""


class NotAFolder(str):
    """The value of a :data:`FolderOrName` in a configuration if no such folder exists beside the configuration.

    The plugin takes it as a name, even if the working directory has a folder of that name. Otherwise the same
    configuration would mean something else in another working directory.
    """

    __slots__ = ()


class IsFolderOrName:
    """Marks an option that is a folder if the folder exists, and otherwise a name."""

    def __repr__(self) -> str:
        return "IsFolderOrName()"


FolderOrName: TypeAlias = Annotated[str, IsFolderOrName()]
"""A folder, or the name of something else, such as a model on a hub. In TOML, a relative folder starts at the folder of
the file. A value that begins with ``./``, ``../``, ``~`` or ``/`` is always a folder."""


# --- secrets and URLs -------------------------------------------------------------------------

_CHARACTERS: Mapping[str, str] = {
    **dict.fromkeys("\n\r\v\f\x85\u2028\u2029", "a line end"),
    "\t": "a tab",
    "\0": "a NUL character",
    "\ufeff": "a byte order mark",
}
_INVISIBLE = {"Zs": "a space", "Zl": "a line end", "Zp": "a line end", "Cc": "a control character"}
"""Names of characters that cannot be seen, by their Unicode category."""
_DOCUMENTS = ("-----BEGIN ", "{")
"""Beginnings of secrets that are whole documents (PEM, JSON), which may end with a line end."""


def check_secret(text: str) -> None:
    """Check a secret or a URL that was read from a variable or a file: nothing invisible may be around it.

    A server would refuse such a secret, and its client may write the secret into the error or the log. The check covers
    white space, control characters, byte order marks and zero-width characters at both ends, and NUL anywhere. A PEM or
    JSON document may end with white space.

    Raises:
        BadValue: the text has such a character. The message never repeats the text.
    """
    if "\0" in text:
        raise BadValue("contains a NUL character; remove it")
    for position, verb in ((-1, "ends"), (0, "starts")):
        name = _name_invisible(text[position]) if text else None
        if name is None or (position == -1 and text.startswith(_DOCUMENTS)):
            continue
        advice = " (`echo` adds a line end to a Kubernetes secret, `echo -n` adds none)" if name == "a line end" else ""
        raise BadValue(f"{verb} with {name}; remove it{advice}")


def read_secret_variable(name: str) -> str | None:
    """Return the secret or the URL in an environment variable, checked by :func:`check_secret`.

    The result is None if the variable is not set or is empty. A provider uses this function for a variable that it
    reads by itself, such as the default of ``api_key``.

    Raises:
        BadValue: an invisible character is around the value. The message names the variable, and never its value.
    """
    text = os.environ.get(name)
    if not text:
        return None
    try:
        check_secret(text)
    except BadValue as error:
        raise BadValue(f"the environment variable {name} {error}") from None
    return text


def _name_invisible(character: str) -> str | None:
    """Return the name of a character that cannot be seen, or None for any other character."""
    category = unicodedata.category(character)
    if category == "Cf":
        return _CHARACTERS.get(character, "a zero-width character")
    return _CHARACTERS.get(character) or _INVISIBLE.get(category)
