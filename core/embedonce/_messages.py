"""What messages say: what somebody probably meant, and names that are safe to print."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

LONGEST = 60
"""Characters of a value that a message shows."""


def closest(word: str, words: Iterable[str], *, likeness: float = 0.65) -> str | None:
    """Return the one of ``words`` that ``word`` is most likely a slip of, or None."""
    import difflib  # only needed once something is wrong

    by_form = {_form(known): known for known in words}
    found = difflib.get_close_matches(_form(word), by_form, n=1, cutoff=likeness)
    return by_form[found[0]] if found else None


def _form(word: str) -> str:
    return word.lower().replace("-", "_")


def listed(words: Iterable[str], last: str = "and") -> str:
    """Return ``a, b and c``."""
    *front, end = list(words) or ["nothing"]
    return f"{', '.join(front)} {last} {end}" if front else end


_IN_URL = re.compile(r"//[^/\s]*@")


def without_credentials(text: str) -> str:
    """Return a URL without user, password and query; other text as it is."""
    if "://" not in text:
        return text
    return _IN_URL.sub("//***@", text).partition("?")[0]


def quoted(text: str) -> str:
    """Return text in quotes, shortened, without a URL's credentials; what a terminal would obey is an escape."""
    text = without_credentials(text)
    short = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
    return json.dumps(short, ensure_ascii=not short.isprintable())  # nor is a lone surrogate printable


def written(name: str) -> str:
    """Return a key as TOML writes it: bare where it may be, else in quotes."""
    return name if len(name) <= LONGEST and re.fullmatch(r"[A-Za-z0-9_-]+", name) else quoted(name)
