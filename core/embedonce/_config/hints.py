"""Words in the loader's messages that suggest what was meant, or that hide a name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from embedonce._messages import find_closest, join_words, quote
from embedonce._plugins.options import Option
from embedonce.errors import PluginError


def suggest_key(key: str, names: Sequence[str]) -> str:
    """Return the end of a message about an unknown key: the key that was probably meant, or the valid keys."""
    meant = find_closest(key, names)
    if meant:
        return f'; did you mean "{meant}"?'
    return f"; valid keys are {join_words(names)}" if names else "; no key is valid here"


def explain_missing(option: Option) -> str:
    """Return the end of a message about a missing option: what to add."""
    if not option.doc:
        return "; add it"
    first, rest = option.doc[:1], option.doc[1:]
    is_abbreviation = rest[:1].isupper()  # such as "URL of the server"
    return f"; add it: {first if is_abbreviation else first.lower()}{rest.removesuffix('.')}"


def hide_name(error: PluginError, name: str) -> str:
    """Remove a plugin's name from an error's message. The name is from the environment, so it may be a secret."""
    message = str(error).replace(quote(name), "of that name")
    return f"a plugin {message}" if message.startswith("of that name") else message


def suggest_tier_name(name: str) -> str:
    """Return a valid tier name that resembles an invalid one."""
    return re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-_0123456789") or "memory"


def is_table(value: Any) -> bool:
    """Return whether a value is a table or a list of tables."""
    return isinstance(value, Mapping) or (isinstance(value, list) and any(isinstance(item, Mapping) for item in value))
