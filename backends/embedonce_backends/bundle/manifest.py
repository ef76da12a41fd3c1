"""The manifest of a bundle: which parts it has, and the space cards. Everything in it is checked when it is read.

The checks are plain Python, because a process that opens a bundle would otherwise spend most of the time on importing
pydantic and on building its models.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self, TypeAlias, TypeVar, cast

from embedonce.errors import ConfigError
from embedonce.keys import KEY_PREFIX
from embedonce.vectors import Dtype, is_valid_metadata

from .rows import ENTRY_KEY, SCOPE_DIGITS, Layout

T = TypeVar("T")

MANIFEST: Final = "manifest.json"
FORMAT: Final = "embedonce bundle"
VERSION: Final = 1
MAX_MANIFEST_BYTES: Final = 256 * 2**20
"""Maximum size of a manifest. A space card has at most 64 KiB."""
MAX_PART_ROWS: Final = 2**31 - 1
MAX_DIMENSIONS: Final = 2**22

_SCOPE: Final = re.compile(rf"[0-9a-f]{{{SCOPE_DIGITS}}}")
PART_NAME: Final = re.compile(rf"{_SCOPE.pattern}-[0-9a-f]{{32}}\.arrow")
"""Names of the files with entries. They are plain names, so a part cannot be outside the folder."""
_CHECKSUM: Final = re.compile(r"[0-9a-f]{32}")
_DTYPES: Final = ("float32", "float16", "int8")

Card: TypeAlias = Mapping[str, Any] | bytes
"""A space card: a JSON object, or an encrypted frame."""


class _Invalid(ValueError):
    """Something in a manifest is invalid; the message says what is expected."""

    def __init__(self, reason: str, *place: str | int) -> None:
        super().__init__(reason)
        self.place = place
        """Names and numbers on the way to the invalid value."""


_Check = tuple[Callable[[Any], bool], str]
"""A check of a value, and the reason if it fails."""


def _match(pattern: re.Pattern[str], expected: str) -> _Check:
    return lambda value: type(value) is str and pattern.fullmatch(value) is not None, f"expected {expected}"


def _limit(low: int, high: int) -> _Check:
    return lambda value: type(value) is int and low <= value <= high, f"expected a number from {low:,} to {high:,}"


_PART_CHECKS: Final[Mapping[str, _Check]] = {
    "file": _match(PART_NAME, "<scope>-<checksum>.arrow"),
    "scope": _match(_SCOPE, f"{SCOPE_DIGITS} hex digits"),
    "rows": _limit(1, MAX_PART_ROWS),
    "bytes": _limit(1, 2**62),
    "checksum": _match(_CHECKSUM, "32 hex digits"),
    "first": _match(ENTRY_KEY, "the key of an entry"),
    "last": _match(ENTRY_KEY, "the key of an entry"),
    "encrypted": (lambda value: type(value) is bool, "expected true or false"),
    "dtype": (lambda value: value is None or value in _DTYPES, f"expected one of {', '.join(_DTYPES)}"),
    "dimensions": (
        lambda value: value is None or (type(value) is int and 1 <= value <= MAX_DIMENSIONS),
        f"expected a number from 1 to {MAX_DIMENSIONS:,}",
    ),
}
_OPTIONAL: Final = {"dtype", "dimensions"}


def _read_fields(found: Any, required: set[str], optional: set[str]) -> dict[str, Any]:
    """Return a JSON object that has the required names, and no others than these and the optional ones.

    Raises:
        _Invalid: this is no such object.
    """
    if type(found) is not dict:
        raise _Invalid("expected an object")
    for name in sorted(required - found.keys()):
        raise _Invalid(f"{name} is missing")
    if not found.keys() <= required | optional:
        # The name is not shown, because it may be anything.
        raise _Invalid(f"it has other fields than {', '.join(sorted(required | optional))}")
    return cast("dict[str, Any]", found)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRecord:
    """What the manifest says about a part."""

    file: str
    scope: str
    rows: int
    bytes: int
    checksum: str
    """XXH3-128 of the whole file, as hex digits. It is a part of the file's name, too."""
    first: str
    last: str
    encrypted: bool
    dtype: Dtype | None = None
    """None if the entries are encrypted."""
    dimensions: int | None = None

    @classmethod
    def parse(cls, found: Any) -> Self:
        """Return the record that JSON has.

        Raises:
            _Invalid: the record is invalid.
        """
        fields = _read_fields(found, _PART_CHECKS.keys() - _OPTIONAL, _OPTIONAL)
        for name, value in fields.items():
            is_valid, reason = _PART_CHECKS[name]
            if not is_valid(value):
                raise _Invalid(reason, name)
        part = cls(**fields)
        if part.encrypted != (part.dtype is None) or part.encrypted != (part.dimensions is None):
            raise _Invalid("a part has a dtype and dimensions, unless it is encrypted")
        beginning = f"{KEY_PREFIX}{part.scope}."
        if not part.first <= part.last or not part.first.startswith(beginning) or not part.last.startswith(beginning):
            raise _Invalid("the first and the last key must be keys of the scope, in this order")
        if part.file != f"{part.scope}-{part.checksum}.arrow":
            raise _Invalid("the file must be named after the scope and the checksum")
        return part

    @property
    def layout(self) -> Layout | None:
        """The form of the entries; None if they are encrypted."""
        return None if self.dtype is None or self.dimensions is None else Layout(self.dtype, self.dimensions)


def _parse_card(found: Any) -> Card:
    """Return the space card that JSON has. An encrypted frame is in base64 there.

    Raises:
        _Invalid: the card is invalid.
    """
    fields = _read_fields(found, set(), {"card", "frame"})
    if len(fields) != 1:
        raise _Invalid("a space has either a card or a frame")
    if "card" in fields:
        if type(fields["card"]) is not dict or not is_valid_metadata(fields["card"]):
            raise _Invalid("expected a JSON object of at most 64 KiB", "card")
        return cast("Card", fields["card"])
    try:
        return base64.b64decode(fields["frame"], validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise _Invalid("expected base64", "frame") from None


def _write_card(card: Card) -> dict[str, Any]:
    return {"frame": base64.b64encode(card).decode()} if isinstance(card, bytes) else {"card": dict(card)}


@dataclass(frozen=True, slots=True)
class Manifest:
    """All parts and space cards of a bundle."""

    spaces: Mapping[str, Card]
    """The space card of each scope."""
    parts: Sequence[PartRecord]

    @classmethod
    def parse(cls, found: Any) -> Self:
        """Return the manifest that JSON has.

        Raises:
            _Invalid: the manifest is invalid.
        """
        fields = _read_fields(found, {"format", "version", "spaces", "parts"}, set())
        if type(fields["version"]) is not int or fields["version"] != VERSION:
            raise _Invalid(f"expected {VERSION}", "version")
        if type(fields["spaces"]) is not dict or not all(map(_SCOPE.fullmatch, fields["spaces"])):
            raise _Invalid("expected an object with scopes as names", "spaces")
        if type(fields["parts"]) is not list:
            raise _Invalid("expected a list", "parts")
        spaces = {scope: _parse_at(_parse_card, card, "spaces", scope) for scope, card in fields["spaces"].items()}
        parts = [_parse_at(PartRecord.parse, part, "parts", place) for place, part in enumerate(fields["parts"])]
        if len({part.file for part in parts}) < len(parts):
            raise _Invalid("it contains a file twice", "parts")
        return cls(spaces, parts)

    @property
    def entries(self) -> int:
        """Number of entries in all parts."""
        return sum(part.rows for part in self.parts)

    @property
    def files(self) -> set[str]:
        """The names of all parts."""
        return {part.file for part in self.parts}

    def write(self) -> bytes:
        """Return the manifest as JSON. The same parts and cards give the same bytes."""
        spaces = {scope: _write_card(card) for scope, card in self.spaces.items()}
        parts = [{name: value for name, value in asdict(part).items() if value is not None} for part in self.parts]
        written = {"format": FORMAT, "version": VERSION, "spaces": spaces, "parts": parts}
        return (json.dumps(written, ensure_ascii=False, indent=1) + "\n").encode()


def _parse_at(parse: Callable[[Any], T], found: Any, *place: str | int) -> T:
    """Parse a value that is at a place of the manifest."""
    try:
        return parse(found)
    except _Invalid as error:
        raise _Invalid(str(error), *place, *error.place) from None


def make_manifest(spaces: Mapping[str, Card], parts: list[PartRecord]) -> Manifest:
    """Return the manifest of new parts, in the order of their keys."""
    ordered = sorted(parts, key=lambda part: (part.scope, part.first, part.file))
    return Manifest({scope: spaces[scope] for scope in sorted(spaces)}, ordered)


def parse_manifest(written: bytes, folder: Path) -> Manifest:
    """Return the checked manifest.

    Raises:
        ConfigError: the manifest is invalid, is of another program, or has a newer version.
    """
    try:
        found = json.loads(written)
    except (ValueError, RecursionError):
        raise ConfigError(f"{folder / MANIFEST} is damaged: it is not valid JSON; {restore_hint(folder)}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ConfigError(f"{folder} is not a bundle: {MANIFEST} belongs to another program; {CREATE_HINT}")
    version = found.get("version")
    if type(version) is int and version > VERSION:
        raise ConfigError(
            f"{folder} is a bundle of version {min(version, 2**31)}, and this embedonce reads only version {VERSION}; "
            "upgrade embedonce: pip install --upgrade embedonce"
        )
    try:
        return Manifest.parse(found)
    except _Invalid as error:
        place, reason = ".".join(map(str, error.place)), str(error)
    raise ConfigError(
        f"{folder / MANIFEST} is damaged{f' at {place}' if place else ''}: {reason}; {restore_hint(folder)}"
    )


CREATE_HINT: Final = "create a bundle with `embedonce export --out FOLDER`"


def restore_hint(folder: Path) -> str:
    """Return what to do about a damaged bundle, as the end of a sentence."""
    return f"copy the bundle again, or export it again with `embedonce export --out {folder} --replace`"
