"""Checks of the arguments of a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .contracts import Normalizer
from .drift import DriftGuard
from .errors import ConfigError
from .events import Event
from .keys import NORMALIZERS, KeyPolicy
from .prices import Price

MAX_COALESCE = 1.0
"""Maximum number of seconds for which texts wait for texts of other calls. They delay each call that nobody joins."""


def check_options(dtype: str, mode: str, max_wait: float, flush_timeout: float, max_queued: int) -> None:
    """Raise ConfigError if an option is invalid."""
    if dtype not in ("float32", "float16", "int8"):
        raise ConfigError(f'dtype must be "float32", "float16" or "int8", got {dtype!r}')
    if mode not in ("read-through", "replay"):
        raise ConfigError(f'mode must be "read-through" or "replay", got {mode!r}')
    for name, number, least in (
        ("max_wait", max_wait, 0),
        ("flush_timeout", flush_timeout, 0),
        ("max_queued", max_queued, 1),
    ):
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ConfigError(f"{name} must be a number, got {type(number).__name__}")
        if not number >= least:
            raise ConfigError(f"{name} must be at least {least}, got {number}")


def check_parts(key: object, drift: object, listeners: Any, clock: object) -> list[Callable[[Event], None]]:
    """Check the types of arguments that are used only later, and return the listeners as a list."""
    for name, value, kind in (("key", key, KeyPolicy), ("drift", drift, DriftGuard)):
        if value is not None and not isinstance(value, kind):
            got = value.__name__ if isinstance(value, type) else f"a {type(value).__name__}"
            raise ConfigError(f"{name} must be a {kind.__name__}, such as {kind.__name__}(...), got {got}")
    functions: list[Callable[[Event], None]] = list(listeners) if isinstance(listeners, Iterable) else []
    if not isinstance(listeners, Iterable) or not all(map(callable, functions)):
        raise ConfigError("listeners must be a list of functions, each of which is called with every event")
    if not callable(clock):
        raise ConfigError(f"clock must be a function that returns Unix time, got a {type(clock).__name__}")
    return functions


def read_price(name: str, price: Any) -> Price | None:
    """Return a price from a :class:`Price` or from a text; None stays None. ``name`` is the name of the argument.

    Raises:
        ConfigError: the argument is not a price; the message names the argument.
    """
    if price is None or isinstance(price, Price):
        return price
    try:
        return Price.parse(price)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def read_coalesce(name: str, seconds: Any) -> float | None:
    """Return the seconds for which misses wait for other calls; None stays None. ``name`` is the name of the argument.

    Raises:
        ConfigError: the argument is not a valid number of seconds; the message names the argument.
    """
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise ConfigError(f"{name} must be a number of seconds or None, got {type(seconds).__name__}")
    if not 0 < seconds <= MAX_COALESCE:
        raise ConfigError(f"{name} must be above 0 s and at most {MAX_COALESCE:g} s, got {seconds}")
    return float(seconds)


def find_normalizer(name: str) -> Normalizer:
    """Return the normalisation step with a name, which may be a plugin's."""
    if not isinstance(name, str):
        raise ConfigError(f"normalize in KeyPolicy must list names of steps, got a {type(name).__name__}")
    if name in NORMALIZERS:
        return NORMALIZERS[name]
    from ._plugins.loading import normalizer

    return normalizer(name)
