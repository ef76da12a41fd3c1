"""What somebody probably meant."""

from __future__ import annotations

from collections.abc import Iterable


def closest(word: str, words: Iterable[str]) -> str | None:
    """Return the one of ``words`` that ``word`` is most likely a slip of, or None."""
    import difflib  # only needed once something is wrong

    by_form = {_form(known): known for known in words}
    found = difflib.get_close_matches(_form(word), by_form, n=1, cutoff=0.65)
    return by_form[found[0]] if found else None


def _form(word: str) -> str:
    return word.lower().replace("-", "_")


def listed(words: Iterable[str], last: str = "and") -> str:
    """Return ``a, b and c``."""
    *front, end = list(words) or ["nothing"]
    return f"{', '.join(front)} {last} {end}" if front else end
