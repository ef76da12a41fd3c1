"""Check plain values without pydantic, because importing pydantic takes 150 ms.

This module accepts the common valid values. It leaves every other value to pydantic, which accepts or rejects it. A
test checks that pydantic accepts every value that this module accepts, and that both return the same result.
"""

from __future__ import annotations

import collections.abc
import math
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from annotated_types import Ge, Gt, Le, Lt, MinLen

from embedonce.options import BadValue, Doc, Parsed

UNSURE = object()
"""Result of :func:`convert_plain_value` if pydantic must decide."""


def convert_plain_value(hint: Any, value: Any) -> Any:
    """Convert ``value``, which JSON can represent, to the type ``hint``; return UNSURE if pydantic must decide."""
    if hint in (str, int, bool):
        return value if type(value) is hint else UNSURE
    if hint is float:
        return float(value) if type(value) in (int, float) and math.isfinite(value) else UNSURE
    if hint is Path:
        return Path(value) if type(value) is str else UNSURE
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _convert_annotated(args[0], args[1:], value)
    if origin is typing.Literal:
        return value if any(value == choice and type(value) is type(choice) for choice in args) else UNSURE
    if origin in (typing.Union, types.UnionType):
        return _convert_union(args, value)
    if origin in (list, collections.abc.Sequence) and type(value) is list:
        return _convert_items(args[0], value)
    return UNSURE


def _convert_annotated(hint: Any, metadata: Sequence[Any], value: Any) -> Any:
    first, *_ = metadata
    if isinstance(first, Parsed):
        try:
            converted = first.parse(value)
        except BadValue:
            return UNSURE
        metadata = metadata[1:]
    else:
        converted = convert_plain_value(hint, value)
    if converted is UNSURE or all(_is_within(part, converted) for part in metadata):
        return converted
    return UNSURE


def _is_within(part: Any, value: Any) -> bool:
    """Return whether a value meets ``part`` of an ``Annotated``. Return False if only pydantic can check this."""
    if isinstance(part, Doc):
        return True
    if value is None:
        return isinstance(part, Gt | Ge | Lt | Le)
    match part:
        case Gt(gt=bound):
            return bool(value > bound)
        case Ge(ge=bound):
            return bool(value >= bound)
        case Lt(lt=bound):
            return bool(value < bound)
        case MinLen(min_length=bound):
            return len(value) >= bound
        case Le(le=bound):
            return bool(value <= bound)
    return False


def _convert_union(members: Sequence[Any], value: Any) -> Any:
    if value is None:
        return None if type(None) in members else UNSURE
    if type(value) in (str, int, bool) and type(value) in members:
        return value
    others = [member for member in members if member is not type(None)]
    return convert_plain_value(others[0], value) if len(others) == 1 else UNSURE


def _convert_items(hint: Any, value: list[Any]) -> Any:
    items = [convert_plain_value(hint, item) for item in value]
    return UNSURE if any(item is UNSURE for item in items) else items
