"""The message about a table, column or key that a store does not have."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

MAX_SHOWN = 20
"""Maximum number of existing names that a message lists."""


def describe_missing(problem: str, name: str, known: Sequence[str], plural: str) -> str:
    """Return a message that lists what exists, and suggests the closest name.

    ``problem`` ends before the name, such as ``cache.db has no table``. ``plural`` is what ``known`` has, such as
    ``tables``.
    """
    message = f'{problem} "{name}"'
    if not known:
        return f"{message}; it has no {plural}"
    by_form = {item.lower(): item for item in known}
    closest = difflib.get_close_matches(name.lower(), by_form, n=1, cutoff=0.65)
    suggestion = f'; did you mean "{by_form[closest[0]]}"?' if closest else "."
    shown = ", ".join(f'"{item}"' for item in known[:MAX_SHOWN])
    others = f" and {len(known) - MAX_SHOWN} others" if len(known) > MAX_SHOWN else ""
    return f"{message}{suggestion} Its {plural}: {shown}{others}"
