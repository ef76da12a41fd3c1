"""Recognise secret values of a configuration, and hide them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from embedonce._messages import quote, quote_toml_key, strip_credentials
from embedonce.options import BadValue, check_secret

from .places import TomlPath

HIDDEN = "(hidden)"
_SECRET = re.compile(
    r"secret|encryption|passw|passphrase|credential|authorization|cookie|(?:^|_)(?:pwd|token|key|apikey|auth|headers?|dsn|conninfo)s?$"
)

_ADDRESS = re.compile(r"(?:^|_)(?:url|uri|endpoint|host|server|address|addresse)s?$")


def is_secret(where: Sequence[str | int]) -> bool:
    """Return whether a value counts as secret, judging by the names on its path."""
    return any(isinstance(part, str) and _SECRET.search(part.lower()) is not None for part in where)


def secrets_in(value: Any, where: TomlPath = ()) -> list[str]:
    """Return the dotted names of values that contain a secret as plain text, not as ``${NAME}``."""
    if isinstance(value, Mapping):
        return [name for key, item in value.items() for name in secrets_in(item, (*where, str(key)))]
    if isinstance(value, list | tuple):
        return [name for index, item in enumerate(value) for name in secrets_in(item, (*where, index))]
    if not isinstance(value, str):
        return []
    found = find_secrets(value) if is_secret(where[1:]) else find_credentials(value)
    return [format_path(where)] if any("${" not in secret for secret in found) else []


def display(where: TomlPath, value: Any) -> str | None:
    """Return a value in TOML syntax; shorten long text. Return None if the value is secret."""
    if is_secret(where[1:]):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    return quote(value) if isinstance(value, str) else str(value)


def mask(where: TomlPath, value: Any) -> Any:
    """Return a copy of a value, with ``HIDDEN`` in place of each secret and without the credentials of URLs."""
    if is_secret(where[1:]):
        return HIDDEN
    if isinstance(value, Mapping):
        return {key: mask((*where, key), item) for key, item in value.items()}
    if isinstance(value, list):
        return [mask(where, item) for item in value]
    return strip_credentials(value) if isinstance(value, str) else value


def format_path(where: TomlPath) -> str:
    """Format a path of names and list indexes, such as ``servers[0].host``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{quote_toml_key(part)}" for part in where)
    return text.removeprefix(".")


def find_texts(value: Any) -> Iterable[str]:
    """Yield every text in a value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from find_texts(item)


def find_secrets(text: str) -> Iterable[str]:
    """Yield the secrets in a secret text: the whole text, and the credentials if it is a URL."""
    if text:
        yield text
    yield from find_credentials(text)


def find_credentials(text: str) -> Iterable[str]:
    """Yield the secrets in a URL: the password (or the user if there is no password) and secret query parameters."""
    if "://" not in text:
        return
    try:
        url = urlsplit(text)
        found = [url.password or url.username, *(value for name, value in parse_qsl(url.query) if is_secret((name,)))]
    except ValueError:  # not a URL
        return
    yield from (unquoted for part in found if part for unquoted in {part, unquote(part)})


def contains_secret(error: BaseException | None, secrets: Collection[str]) -> bool:
    """Return whether the message of an error, or of an earlier error that led to it, contains a secret."""
    if error is None:
        return False
    text = f"{error} {getattr(error, '__notes__', '')}"
    # A message may contain the repr() or the ascii() of a secret, in which some characters are escaped.
    forms = {form for secret in secrets for form in (secret, repr(secret)[1:-1], ascii(secret)[1:-1])}
    return any(form in text for form in forms) or any(
        contains_secret(earlier, secrets) for earlier in (error.__cause__, error.__context__)
    )


def find_invisible(
    where: TomlPath, value: Any, variables: Mapping[TomlPath, Mapping[str, str]]
) -> Iterator[tuple[TomlPath, str]]:
    """Yield the path and the problem of each secret or URL that has white space or an invisible character around it.

    ``variables`` are the environment variables, and their values, that each text contains. A variable may stand in the
    middle of a URL, so the variable's own value is checked too.
    """
    if isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for step, item in items:
            yield from find_invisible((*where, step), item, variables)
    elif isinstance(value, str) and (is_secret(where) or _is_address(where) or "://" in value):
        for text in (value, *variables.get(where, {}).values()):
            try:
                check_secret(text)
            except BadValue as error:
                yield where, str(error)
                return


def _is_address(where: TomlPath) -> bool:
    names = [part for part in where if isinstance(part, str)]
    return bool(names) and _ADDRESS.search(names[-1].lower()) is not None
