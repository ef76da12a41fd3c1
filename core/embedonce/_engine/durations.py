"""Reads durations as servers write them, such as ``14.9s``, ``1m3.2s`` and ``1 minute``."""

from __future__ import annotations

import re

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(milliseconds?|ms|seconds?|secs?|s|minutes?|mins?|m|hours?|hrs?|h|days?|d)")
_GAP = re.compile(r"(?:\s|,|and)*")


def parse_duration(text: str) -> float | None:
    """Return a duration in seconds, or None if the text is not a duration with units."""
    text = text.strip().lower()
    position, seconds = 0, 0.0
    while position < len(text):
        part = _PART.match(text, position)
        if part is None:
            return None
        unit = part[2]
        if unit.startswith(("ms", "milli")):
            seconds += float(part[1]) / 1000
        else:
            seconds += float(part[1]) * _SECONDS[unit[0]]
        gap = _GAP.match(text, part.end())
        position = part.end() if gap is None else gap.end()
    return seconds if position else None
