"""Which values of a configuration are secret, and what is shown in their place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from embedonce._messages import quoted, without_credentials, written

from .places import TomlPath

HIDDEN = "(hidden)"
_SECRET = re.compile(
    r"secret|encryption|passw|passphrase|credential|authorization|cookie|(?:^|_)(?:pwd|token|key|apikey|auth|headers?|dsn|conninfo)s?$"
)


def is_secret(where: Sequence[str | int]) -> bool:
    """Whether a value with these names on its path is taken for a secret."""
    return any(isinstance(part, str) and _SECRET.search(part.lower()) is not None for part in where)


def secrets_in(value: Any, where: TomlPath = ()) -> list[str]:
    """Return the dotted names of values that hold a secret in the clear, not as ``${NAME}``."""
    if isinstance(value, Mapping):
        return [name for key, item in value.items() for name in secrets_in(item, (*where, str(key)))]
    if isinstance(value, list | tuple):
        return [name for index, item in enumerate(value) for name in secrets_in(item, (*where, index))]
    if not isinstance(value, str):
        return []
    found = secret_parts(value) if is_secret(where[1:]) else credentials_in(value)
    return [dotted(where)] if any("${" not in secret for secret in found) else []


def display(where: TomlPath, value: Any) -> str | None:
    """Return a value as TOML writes it, shortened; None where it must not be shown."""
    if is_secret(where[1:]):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    return quoted(value) if isinstance(value, str) else str(value)


def mask(where: TomlPath, value: Any) -> Any:
    if is_secret(where[1:]):
        return HIDDEN
    if isinstance(value, Mapping):
        return {key: mask((*where, key), item) for key, item in value.items()}
    if isinstance(value, list):
        return [mask(where, item) for item in value]
    return without_credentials(value) if isinstance(value, str) else value


def dotted(where: TomlPath) -> str:
    """Return names and places in lists as ``servers[0].host``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{written(part)}" for part in where)
    return text.removeprefix(".")


def texts_in(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from texts_in(item)


def secret_parts(text: str) -> Iterable[str]:
    """Yield what is secret of a secret text: all of it, and any credentials of a URL in it."""
    if text:
        yield text
    yield from credentials_in(text)


def credentials_in(text: str) -> Iterable[str]:
    """Yield what is secret in a URL: its password, or a user without one, and what has a secret's name."""
    if "://" not in text:
        return
    try:
        url = urlsplit(text)
        found = [url.password or url.username, *(value for name, value in parse_qsl(url.query) if is_secret((name,)))]
    except ValueError:  # no URL
        return
    yield from (unquoted for part in found if part for unquoted in {part, unquote(part)})
