"""The headers and the tokens with which a provider is allowed to use an endpoint."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib import import_module
from typing import Annotated, Any, TypeAlias
from urllib.parse import unquote, urlsplit, urlunsplit

from embedonce.options import BadValue, Parsed, check_secret, read_secret_variable

HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
FUNCTION_NAME = r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$"


def _parse_function_name(value: object) -> str:
    if not isinstance(value, str) or not re.match(FUNCTION_NAME, value):
        raise BadValue('must be the name of a function: "module:function"')
    return value


FunctionName: TypeAlias = Annotated[
    str | Callable[[], str] | None,
    Parsed(_parse_function_name, {"type": "string", "pattern": FUNCTION_NAME}),
]
"""A function without parameters that returns a str. In TOML, the text ``"module:function"``."""


def check_headers(headers: Mapping[str, str] | None) -> dict[str, str]:
    """Return headers with names in lower case.

    Raises:
        ValueError: a name or a value is invalid. The message does not contain the value, because it may be a secret.
    """
    checked: dict[str, str] = {}
    for name, value in (headers or {}).items():
        if not isinstance(name, str) or not HEADER_NAME.fullmatch(name):
            raise ValueError(f"headers has an invalid name, {name!r}; a name consists of letters, digits and -")
        if not isinstance(value, str):
            raise ValueError(f"headers: the value of {name} must be a str, got {type(value).__name__}")
        if value != value.strip() or not value.isascii() or not value.isprintable():
            raise ValueError(
                f"headers: the value of {name} starts or ends with white space, has a line end, or has characters "
                "that are not ASCII; remove these characters"
            )
        if name.lower() in checked:
            raise ValueError(f"headers has {name} twice, with different capital letters; remove one of them")
        checked[name.lower()] = value
    return checked


def check_key(key: str | None, name: str) -> None:
    """Check a key that is sent in a header. A client would repeat an invalid one in its error and in its log.

    Raises:
        ValueError: the key has a character that a header cannot have. The message contains ``name`` and not the key.
    """
    if key is None:
        return
    try:
        check_secret(key)
    except BadValue as error:
        raise ValueError(f"{name} {error}") from None
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"{name} has white space or a character that is not ASCII; remove it, or copy the key again")


def read_key_variable(*names: str) -> str | None:
    """Return the key in the first of these environment variables that is set, or None.

    Raises:
        ValueError: the key is invalid; see :func:`check_key`.
    """
    for name in names:
        key = read_secret_variable(name)
        if key:
            check_key(key, f"the environment variable {name}")
            return key
    return None


def split_credentials(url: str) -> tuple[str, tuple[str, str] | None]:
    """Return a URL without its user and password, and these two. A client writes its URL into its log."""
    parts = urlsplit(url)
    if parts.username is None and parts.password is None:
        return url, None
    plain = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    return plain, (unquote(parts.username or ""), unquote(parts.password or ""))


def require_key(given: str | None, variables: Sequence[str]) -> None:
    """Check that there is an API key: as an option, or in one of the environment variables.

    Raises:
        ValueError: there is none, or the key in a variable is invalid. The message names the variables.
    """
    if given is None and read_key_variable(*variables) is None:
        names = " or ".join(variables)
        raise ValueError(f"the API key is missing: set the environment variable {names}, or api_key in [provider]")


def load_token_provider(given: str | Callable[[], str] | None) -> Callable[[], str] | None:
    """Return the function that a ``token_provider`` names, with a check of what it returns.

    Raises:
        ValueError: the module cannot be imported, or has no such function.
    """
    if given is None:
        return None
    function: Any = _import_function(given) if isinstance(given, str) else given
    name = repr(given) if isinstance(given, str) else "the function"
    if not callable(function):
        raise ValueError(f"token_provider: {name} is a {type(function).__name__}, expected a function")
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"token_provider: {name} is a coroutine function; use a function that returns the token")

    def get_token() -> str:
        token = function()
        if not isinstance(token, str) or not token:
            got = "an empty str" if token == "" else f"a {type(token).__name__}"
            raise TypeError(f"token_provider must return a str that is not empty, got {got}")
        token = token.strip()  # a token that was read from a file ends with a line end
        if not token.isascii() or not token.isprintable() or " " in token:
            raise ValueError("token_provider returned a token with characters that a header cannot have")
        return token

    return get_token


def make_async(function: Callable[[], str]) -> Callable[[], Awaitable[str]]:
    """Return a coroutine function that calls ``function`` in a thread, because getting a token may use the network."""

    async def call() -> str:
        return await asyncio.to_thread(function)

    return call


def _import_function(name: str) -> Any:
    module_name, _, path = name.partition(":")
    try:
        found: Any = import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"token_provider: the module {module_name!r} cannot be imported ({type(error).__name__}: {error}); "
            "install it, or put its folder on PYTHONPATH"
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise ValueError(f"token_provider: the module {module_name!r} has no {path!r}; check the name")
        found = getattr(found, part)
    return found
