"""Values that are plainly right, without importing pydantic, which costs 150 ms of a program's start.

What is not plainly right is not wrong: pydantic decides. A test holds the two against each other.
"""

from __future__ import annotations

import collections.abc
import math
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from annotated_types import Ge, Gt, Le, Lt

from embedonce.options import BadValue, Doc, Parsed

UNSURE = object()
"""What :func:`simply` returns where pydantic must decide."""


def simply(hint: Any, value: Any) -> Any:
    """Return ``value``, as JSON would give it, in the type of ``hint``; UNSURE where that takes more than a look."""
    if hint in (str, int, bool):
        return value if type(value) is hint else UNSURE
    if hint is float:
        return float(value) if type(value) in (int, float) and math.isfinite(value) else UNSURE
    if hint is Path:
        return Path(value) if type(value) is str else UNSURE
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _annotated(args[0], args[1:], value)
    if origin is typing.Literal:
        return value if any(value == one and type(value) is type(one) for one in args) else UNSURE
    if origin in (typing.Union, types.UnionType):
        return _union(args, value)
    if origin in (list, collections.abc.Sequence) and type(value) is list:
        return _items(args[0], value)
    return UNSURE


def _annotated(hint: Any, metadata: Sequence[Any], value: Any) -> Any:
    first, *_ = metadata
    if isinstance(first, Parsed):
        try:
            read = first.parse(value)
        except BadValue:
            return UNSURE
        metadata = metadata[1:]
    else:
        read = simply(hint, value)
    return read if read is UNSURE or all(_holds(part, read) for part in metadata) else UNSURE


def _holds(part: Any, value: Any) -> bool:
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
        case Le(le=bound):
            return bool(value <= bound)
    return False


def _union(members: Sequence[Any], value: Any) -> Any:
    if value is None:
        return None if type(None) in members else UNSURE
    if type(value) in (str, int, bool) and type(value) in members:
        return value
    others = [member for member in members if member is not type(None)]
    return simply(others[0], value) if len(others) == 1 else UNSURE


def _items(hint: Any, value: list[Any]) -> Any:
    items = [simply(hint, item) for item in value]
    return UNSURE if any(item is UNSURE for item in items) else items
