"""A bundle that is open: its manifest, its space cards and its parts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from embedonce.errors import ConfigError
from embedonce.keys import CARD_PREFIX
from embedonce.vectors import Entry, freeze

from .manifest import (
    CREATE_HINT,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    PART_NAME,
    Card,
    Manifest,
    parse_manifest,
    restore_hint,
)
from .parts import Part

MAX_ATTEMPTS: Final = 5
"""How often a bundle is opened anew if an export replaces it meanwhile."""
_FINENESS: Final = {"float32": 0, "float16": 1, "int8": 2, None: 3}


class ScopeParts(NamedTuple):
    """The parts of one scope, the finest dtype first, and the range of prefixes of each part."""

    parts: Sequence[Part]
    firsts: NDArray[np.uint64]
    lasts: NDArray[np.uint64]
    is_disjoint: bool
    """Whether the ranges of their keys do not overlap. They may overlap in a bundle that was merged from several."""


class OpenedBundle(NamedTuple):
    """The state of a bundle at one moment. Nothing changes it."""

    manifest: Manifest
    parts: Sequence[Part]
    scopes: Mapping[str, ScopeParts]
    cards: Mapping[str, Entry | bytes]


def open_bundle(folder: Path) -> OpenedBundle:
    """Open a bundle.

    Raises:
        ConfigError: there is no bundle in the folder, or the bundle is damaged. The message says what to do.
    """
    written = read_manifest(folder)
    for _ in range(MAX_ATTEMPTS):
        manifest = parse_manifest(written, folder)
        try:
            parts = [Part(folder, record) for record in manifest.parts]
        except FileNotFoundError as error:
            before, written = written, read_manifest(folder)
            if written == before:
                raise ConfigError(
                    f"{folder} is damaged: its part {error.filename} is missing; {restore_hint(folder)}"
                ) from None
            continue  # an export has replaced the bundle, and removed the parts of the previous one
        cards = {CARD_PREFIX + scope: _make_card(card) for scope, card in manifest.spaces.items()}
        return OpenedBundle(manifest, parts, _group_parts(parts), cards)
    raise ConfigError(f"{folder} is being replaced again and again; try again when no export writes to it")


def read_manifest(folder: Path) -> bytes:
    """Return the contents of the manifest's file.

    Raises:
        ConfigError: there is no manifest, or it cannot be read.
    """
    path = folder / MANIFEST
    try:
        # The file may be a link out of the folder, because its contents are checked, whatever they are.
        with path.open("rb") as file:
            written = file.read(MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(_explain_missing(folder)) from None
    except NotADirectoryError:
        raise ConfigError(
            f"{folder} is a file and not the folder of a bundle; give the folder that has its {MANIFEST}"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    if len(written) > MAX_MANIFEST_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_MANIFEST_BYTES:,} bytes; {restore_hint(folder)}")
    return written


def _explain_missing(folder: Path) -> str:
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError:
        return f"there is no bundle at {folder}; {CREATE_HINT}, or correct the path"
    if any(map(is_own_file, names)):
        return f"{folder} is not a bundle: the export did not finish; run `embedonce export --out {folder}` again"
    return f"{folder} is not a bundle, because it has no {MANIFEST}; {CREATE_HINT}, or correct the path"


UNFINISHED: Final = ".unfinished"
"""End of the names of files that a writer has not finished. It renames them when they are complete."""
_UNFINISHED_NAME: Final = re.compile(rf"([0-9a-f]{{16}}|{re.escape(MANIFEST)}){re.escape(UNFINISHED)}")


def is_own_file(name: str) -> bool:
    """Return whether a writer of bundles has made a file with this name, other than the manifest."""
    return PART_NAME.fullmatch(name) is not None or _UNFINISHED_NAME.fullmatch(name) is not None


def _make_card(card: Card) -> Entry | bytes:
    # The date at which a card was written tells nothing about the space, so a bundle does not keep it.
    return card if isinstance(card, bytes) else Entry(freeze(()), 0.0, metadata=card)


def _group_parts(parts: Sequence[Part]) -> dict[str, ScopeParts]:
    scopes: dict[str, list[Part]] = {}
    for part in sorted(parts, key=lambda part: _FINENESS[part.record.dtype]):
        scopes.setdefault(part.record.scope, []).append(part)
    return {scope: _make_scope(group) for scope, group in scopes.items()}


def _make_scope(parts: Sequence[Part]) -> ScopeParts:
    ordered = sorted(parts, key=lambda part: part.record.first)
    is_disjoint = all(a.record.last < b.record.first for a, b in pairwise(ordered))
    firsts, lasts = (np.array([getattr(part, name) for part in parts], np.uint64) for name in ("first", "last"))
    return ScopeParts(parts, firsts, lasts, is_disjoint)
