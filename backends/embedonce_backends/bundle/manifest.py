"""The manifest of a bundle: which parts it has, and the space cards. Everything in it is checked when it is read."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from embedonce.errors import ConfigError
from embedonce.keys import KEY_PREFIX
from embedonce.vectors import is_valid_metadata

from .rows import SCOPE_DIGITS, Layout

MANIFEST: Final = "manifest.json"
FORMAT: Final = "embedonce bundle"
VERSION: Final = 1
MAX_MANIFEST_BYTES: Final = 256 * 2**20
"""Maximum size of a manifest. A space card has at most 64 KiB."""
MAX_PART_ROWS: Final = 2**31 - 1
MAX_DIMENSIONS: Final = 2**22

_SCOPE = rf"[0-9a-f]{{{SCOPE_DIGITS}}}"
_KEY = rf"^{re.escape(KEY_PREFIX)}{_SCOPE}\.[0-9a-f]{{64}}$"
PART_NAME: Final = re.compile(rf"{_SCOPE}-[0-9a-f]{{32}}\.arrow")
"""Names of the files with entries. They are plain names, so a part cannot be outside the folder."""

Key = Annotated[str, Field(pattern=_KEY)]


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class PartRecord(_Checked):
    """What the manifest says about a part."""

    file: Annotated[str, Field(pattern=rf"^{PART_NAME.pattern}$")]
    scope: Annotated[str, Field(pattern=rf"^{_SCOPE}$")]
    rows: Annotated[int, Field(ge=1, le=MAX_PART_ROWS)]
    bytes: Annotated[int, Field(ge=1, lt=2**62)]
    checksum: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    """XXH3-128 of the whole file, as hex digits. It is a part of the file's name, too."""
    first: Key
    last: Key
    encrypted: bool
    dtype: Literal["float32", "float16", "int8"] | None = None
    """None if the entries are encrypted."""
    dimensions: Annotated[int, Field(ge=1, le=MAX_DIMENSIONS)] | None = None

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        if self.encrypted != (self.dtype is None) or self.encrypted != (self.dimensions is None):
            raise ValueError("a part has a dtype and dimensions, unless it is encrypted")
        if not self.first <= self.last or self.first[4:20] != self.scope or self.last[4:20] != self.scope:
            raise ValueError("the first and the last key must be keys of the scope, in this order")
        if not self.file.startswith(self.scope) or self.checksum not in self.file:
            raise ValueError("the file must be named after the scope and the checksum")
        return self

    @property
    def layout(self) -> Layout | None:
        """The form of the entries; None if they are encrypted."""
        return None if self.dtype is None or self.dimensions is None else Layout(self.dtype, self.dimensions)


class SpaceRecord(_Checked):
    """The space card of a scope, as a JSON object or as an encrypted frame in base64."""

    card: dict[str, JsonValue] | None = None
    frame: str | None = None

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        if (self.card is None) == (self.frame is None):
            raise ValueError("a space has either a card or a frame")
        if not is_valid_metadata(self.card):
            raise ValueError("a card must be a JSON object of at most 64 KiB")
        self.read_frame()
        return self

    def read_frame(self) -> bytes | None:
        """Return the encrypted card, or None if the card is plain."""
        try:
            return None if self.frame is None else base64.b64decode(self.frame, validate=True)
        except (binascii.Error, ValueError):
            raise ValueError("frame must be base64") from None

    @classmethod
    def of(cls, card: Mapping[str, Any] | bytes) -> SpaceRecord:
        """Return the record of a card, which is a mapping or an encrypted frame."""
        if isinstance(card, bytes):
            return cls(frame=base64.b64encode(card).decode())
        return cls(card=dict(card))


class Manifest(_Checked):
    """All parts and space cards of a bundle."""

    format: Literal["embedonce bundle"]
    version: Literal[1]
    spaces: dict[Annotated[str, Field(pattern=rf"^{_SCOPE}$")], SpaceRecord]
    parts: list[PartRecord]

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        files = [part.file for part in self.parts]
        if len(set(files)) < len(files):
            raise ValueError("parts must not contain a file twice")
        return self

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
        spaces = {
            scope: {"frame": space.frame} if space.card is None else {"card": space.card}
            for scope, space in self.spaces.items()
        }
        parts = [part.model_dump(exclude_none=True) for part in self.parts]
        written = {"format": self.format, "version": self.version, "spaces": spaces, "parts": parts}
        return (json.dumps(written, ensure_ascii=False, indent=1) + "\n").encode()


def make_manifest(spaces: Mapping[str, SpaceRecord], parts: list[PartRecord]) -> Manifest:
    """Return the manifest of new parts, in the order of their keys."""
    ordered = sorted(parts, key=lambda part: (part.scope, part.first, part.file))
    return Manifest(format=FORMAT, version=VERSION, spaces={s: spaces[s] for s in sorted(spaces)}, parts=ordered)


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
    if type(version) is not int or version < 1:
        raise ConfigError(f"{folder / MANIFEST} is damaged at version: it must be {VERSION}; {restore_hint(folder)}")
    try:
        # JSON has no tuples, so the strict check of Python values is the check of the JSON.
        return Manifest.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(step) for step in first["loc"] if isinstance(step, int | str))[:100]
        reason = first["msg"].removeprefix("Value error, ")
    except RecursionError:
        place, reason = "", "it is nested too deeply"
    raise ConfigError(
        f"{folder / MANIFEST} is damaged{f' at {place}' if place else ''}: {reason}; {restore_hint(folder)}"
    )


CREATE_HINT: Final = "create a bundle with `embedonce export --out FOLDER`"


def restore_hint(folder: Path) -> str:
    """Return what to do about a damaged bundle, as the end of a sentence."""
    return f"copy the bundle again, or export it again with `embedonce export --out {folder} --replace`"
