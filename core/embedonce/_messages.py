"""Helpers for messages: suggestions for misspelled names, lists, and quoting that is safe to print."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

MAX_SHOWN = 60
"""Maximum number of characters of a value that a message shows."""


def find_closest(word: str, words: Iterable[str], *, likeness: float = 0.65) -> str | None:
    """Return the item of ``words`` that the misspelled ``word`` most likely stands for, or None."""
    import difflib  # imported here, because only error messages need it

    by_form = {_normalize(known): known for known in words}
    found = difflib.get_close_matches(_normalize(word), by_form, n=1, cutoff=likeness)
    return by_form[found[0]] if found else None


def _normalize(word: str) -> str:
    return word.lower().replace("-", "_")


def format_count(number: int, noun: str, plural: str = "") -> str:
    """Return a number and its noun: ``1 row`` or ``2 rows``."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def join_words(words: Iterable[str], last: str = "and") -> str:
    """Join words into a list in a sentence: ``a, b and c``."""
    *front, end = list(words) or ["nothing"]
    return f"{', '.join(front)} {last} {end}" if front else end


_USER_IN_URL = re.compile(r"//[^/\s]*@")


def strip_credentials(text: str) -> str:
    """Return a URL without its user, password and query; return other text unchanged."""
    if "://" not in text:
        return text
    return _USER_IN_URL.sub("//***@", text).partition("?")[0]


def quote(text: str) -> str:
    """Return text in quotes.

    Long text is shortened, credentials in a URL are replaced, and control characters are escaped.
    """
    text = strip_credentials(text)
    short = text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"
    # A lone surrogate is not printable either, so it is escaped.
    return json.dumps(short, ensure_ascii=not short.isprintable())


def quote_toml_key(name: str) -> str:
    """Return a key as TOML writes it: bare if possible, else in quotes."""
    return name if len(name) <= MAX_SHOWN and re.fullmatch(r"[A-Za-z0-9_-]+", name) else quote(name)
