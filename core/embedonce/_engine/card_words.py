"""What messages say about space cards: the name of a space, and how the cards of two scopes differ."""

from __future__ import annotations

from collections.abc import Mapping

from embedonce._messages import format_count
from embedonce._reprs import shorten
from embedonce.keys import FINGERPRINT, SERVED_MODEL, SETTINGS, SpaceCard

MOST_NAMED = 5
"""Maximum number of settings, scopes or spaces that one message names."""


def compare_cards(own: SpaceCard, other: SpaceCard) -> list[str]:
    """Return a phrase for each part in which another scope's card differs from the own card."""
    parts = [part for part in own if part not in (SERVED_MODEL, SETTINGS, FINGERPRINT) and other.get(part) != own[part]]
    # Another program may have written the other card, so its values may be long.
    differences = [f"{part} {shorten(other.get(part))} instead of {own[part]!r}" for part in parts]
    mine, theirs = own.get(SETTINGS), other.get(SETTINGS)
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        names = sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
        more = f" and {len(names) - MOST_NAMED} more settings" if len(names) > MOST_NAMED else ""
        if names:
            differences.append(f"another {', '.join(names[:MOST_NAMED])}{more}")
    return differences


def name_space(card: SpaceCard) -> str:
    """Return the parts of a card that tell people which vector space it describes."""
    name = " ".join(filter(None, (_read_text(card, part) for part in ("provider", "model"))))
    dimensions = card.get("dimensions")
    details = [format_count(dimensions, "dimension")] if isinstance(dimensions, int) else []
    details += [f"{part} {text}" for part in ("task", "version", "namespace") if (text := _read_text(card, part))]
    listed = ", ".join(details)
    return f"{name or 'an unnamed model'}{f' ({listed})' if listed else ''}"


def _read_text(card: SpaceCard, part: str) -> str:
    """Return a part of a card without control characters and of limited length, or "" if it is no text."""
    value = card.get(part)
    return shorten(value)[1:-1] if isinstance(value, str) else ""
