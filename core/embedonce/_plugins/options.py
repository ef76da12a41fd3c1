"""A class's options, read from its ``__init__``, and one value checked against one of them.

pydantic does the checking, with the strictness of JSON: text is never taken for a number or a bool.
It is imported for the first value that is not plainly right, which saves 150 ms where there is none.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import tomllib
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedonce._messages import closest, listed
from embedonce.errors import PluginError
from embedonce.options import BadValue

from .plain_values import UNSURE, simply

REQUIRED = inspect.Parameter.empty
"""The default of an option that has none."""


class Refused(ValueError):
    """A value is not of an option's type; ``details`` is what pydantic says of it."""

    def __init__(self, details: Sequence[Any]) -> None:
        super().__init__("the value is not of the option's type")
        self.details = details


@dataclass(frozen=True, slots=True)
class Option:
    """One keyword-only parameter of a plugin's ``__init__``."""

    name: str
    hint: Any
    default: Any = REQUIRED

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    @property
    def doc(self) -> str | None:
        """The sentence of its ``Doc`` (anybody's), wherever in the type that is."""
        said = (getattr(part, "documentation", None) for part in metadata(self.hint))
        return next((text for text in said if isinstance(text, str)), None)

    @property
    def is_path(self) -> bool:
        """Whether it names a file or folder: its type mentions ``Path`` or ``os.PathLike``."""
        return any(
            isinstance(part, type) and (issubclass(part, Path) or part is os.PathLike) for part in _members(self.hint)
        )

    @property
    def is_closed(self) -> bool:
        """Whether it takes one of some words that everybody may know."""
        return typing.Literal in _members(self.hint)

    def check(self, value: Any) -> Any:
        """Return ``value`` in the option's type.

        Raises:
            Refused: it is none.
            PluginError: TOML cannot write one.
        """
        read = simply(self.hint, value)
        return read if read is not UNSURE else self._validated(value)

    def _validated(self, value: Any) -> Any:
        from pydantic import ValidationError

        try:
            return adapter(self).validate_json(json.dumps(value, allow_nan=False), strict=True)
        except ValidationError as error:
            raise Refused(error.errors(include_url=False)) from None  # its own text repeats the value


def options_of(cls: type[Any]) -> Mapping[str, Option]:
    """Return a class's options by name, in the order in which it writes them.

    Raises:
        PluginError: the class cannot be made from options alone, or its types cannot be read.
    """
    init = inspect.unwrap(cls.__init__)
    if init is object.__init__:
        return {}
    try:
        parameters = list(inspect.signature(init).parameters.values())[1:]
        hints = typing.get_type_hints(init, include_extras=True)
    except (NameError, TypeError, ValueError, AttributeError) as error:
        raise PluginError(
            f"the types of {_named(cls)}'s options cannot be read: {error}; its module must import each at run time"
        ) from error
    for parameter in parameters:
        if parameter.kind in _POSITIONAL and parameter.default is REQUIRED:
            raise PluginError(
                f'{_named(cls)} cannot be made from TOML: its parameter "{parameter.name}" must be keyword-only '
                "(written after *)"
            )
    named = (p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)
    return {p.name: Option(p.name, hints.get(p.name, Any), p.default) for p in named}


def options_beside(cls: type[Any], own: Mapping[str, Option], taken: Collection[str]) -> dict[str, Option]:
    """Return embedonce's ``own`` options of a table and a plugin's.

    Raises:
        PluginError: as :func:`options_of` does, or an option has a name that is taken.
    """
    options = options_of(cls)
    both = sorted(options.keys() & {*own, *taken})
    if both:
        raise PluginError(
            f"{_named(cls)} has an option named {listed(both)}, which TOML uses for something else; its author must "
            "rename it"
        )
    return {**own, **options}


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _named(cls: type[Any]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def metadata(hint: Any) -> list[Any]:
    """Return what ``Annotated`` says, at the top or inside a union."""
    found = list(getattr(hint, "__metadata__", ()))
    for part in typing.get_args(hint):
        if typing.get_origin(part) is typing.Annotated or typing.get_args(part):
            found += metadata(part)
    return found


def _members(hint: Any) -> list[Any]:
    """Return the types that a hint is a union of, or the type itself."""
    if typing.get_origin(hint) is typing.Annotated:
        return _members(typing.get_args(hint)[0])
    if inspect.isclass(hint) and typing.get_origin(hint) is None:
        return [hint]
    origin = typing.get_origin(hint)
    if origin is not typing.Union and type(hint).__name__ != "UnionType":
        return [origin] if origin is not None else []
    return [member for part in typing.get_args(hint) for member in _members(part)]


def adapter(option: Option) -> Any:
    """Return the ``pydantic.TypeAdapter`` of an option.

    Raises:
        PluginError: TOML cannot write a value of its type.
    """
    try:
        return _built(option)
    except TypeError:  # a default or a type that cannot be hashed
        return _build(option)


def _build(option: Option) -> Any:
    from pydantic import PydanticSchemaGenerationError, PydanticUserError, TypeAdapter

    try:
        return TypeAdapter(option.hint)
    except (PydanticSchemaGenerationError, PydanticUserError) as error:
        raise PluginError(
            f'"{option.name}" can only be given in Python: TOML cannot write a value of its type'
        ) from error


_built = functools.lru_cache(maxsize=1024)(_build)


# --- text that stands for a value -------------------------------------------------------------


def read_text(option: Option, text: str) -> Any:
    """Return what ``text``, from a variable, means to this option: itself, or the value that it writes.

    A list may be written as in TOML or JSON, or with commas between its items. What fits nothing is
    returned as it is, to be refused like any other wrong value.
    """
    readings = [text, *_readings(text)]
    return next((value for value in readings if _fits(option, value)), text)


def _readings(text: str) -> list[Any]:
    found: list[Any] = []
    for written in (text, f"[{text}]"):
        try:
            found.append(tomllib.loads(f"value = {written}")["value"])
        except (ValueError, RecursionError):
            continue
    with contextlib.suppress(ValueError, RecursionError):
        found.append(json.loads(text))
    if text.strip().lower() in ("true", "false"):
        found.append(text.strip().lower() == "true")
    found.append([part.strip() for part in text.split(",") if part.strip()])
    return found


def _fits(option: Option, value: Any) -> bool:
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return False
    try:
        option.check(value)
    except (ValueError, TypeError):  # among them what JSON cannot write: infinity, a date
        return False
    return True


# --- what is wrong with a value ---------------------------------------------------------------

WANTED: Mapping[str, str] = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a table",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller number",
    "int_type": "a whole number",
    "list_type": "a list",
    "mapping_type": "a table",
    "none_required": "left out",
    "path_type": "a path",
    "set_type": "a list",
    "string_type": "text",
    "tuple_type": "a list",
}
BOUNDS: Mapping[str, tuple[str, str]] = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
    "multiple_of": ("a multiple of", "multiple_of"),
}
LENGTHS: Mapping[str, tuple[str, str]] = {
    "string_too_short": ("at least", "min_length"),
    "string_too_long": ("at most", "max_length"),
    "too_short": ("at least", "min_length"),
    "too_long": ("at most", "max_length"),
}


@dataclass(frozen=True, slots=True)
class InvalidPart:
    """One thing that is wrong inside one option's value."""

    where: tuple[str | int, ...]
    """Keys and places in lists, from the value down; empty for the value itself."""
    message: str
    value: Any


def list_invalid_parts(value: Any, refused: Refused, *, hidden: bool) -> list[InvalidPart]:
    """Return what is wrong with a value, one for each place in it.

    With ``hidden`` no message repeats anything of the value.
    """
    by_place: dict[tuple[str | int, ...], list[Any]] = {}
    for detail in refused.details:
        by_place.setdefault(_inside(value, detail["loc"]), []).append(detail)
    return [
        InvalidPart(where, _explained(details, _at(value, where), hidden=hidden), _at(value, where))
        for where, details in by_place.items()
    ]


def _inside(value: Any, loc: Sequence[str | int]) -> tuple[str | int, ...]:
    """Return the part of pydantic's ``loc`` that is a place in the value; it also names branches of unions."""
    where: list[str | int] = []
    for step in loc:
        if _has(value, step):
            value = value[step]
            where.append(step)
    return tuple(where)


def _has(value: Any, step: str | int) -> bool:
    if isinstance(value, list):
        return isinstance(step, int) and 0 <= step < len(value)
    return isinstance(value, dict) and step in value


def _at(value: Any, where: Sequence[str | int]) -> Any:
    for step in where:
        value = value[step]
    return value


def _explained(details: Sequence[Any], value: Any, *, hidden: bool) -> str:
    said: list[str] = []
    for detail in details:
        message = _phrase(detail, value, hidden=hidden)
        if message not in said:
            said.append(message)
    return listed(said, "or")


def _phrase(detail: Any, value: Any, *, hidden: bool) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in WANTED:
        return f"must be {WANTED[kind]}"
    if kind in BOUNDS:
        words, name = BOUNDS[kind]
        return f"must be {words} {context[name]}"
    if kind in LENGTHS:
        if value in ("", [], {}):
            return "must not be empty"
        words, name = LENGTHS[kind]
        what = "character" if kind.startswith("string") else "item"
        return f"must have {words} {context[name]} {what}{'' if context[name] == 1 else 's'}"
    if kind in ("literal_error", "enum"):
        return f"must be {context['expected'].replace(chr(39), chr(34))}" + _meant(value, context["expected"], hidden)
    if kind == "missing":
        return f'lacks "{detail["loc"][-1]}"'
    if kind == "extra_forbidden":
        return "is an unknown key"
    if kind in ("value_error", "assertion_error"):
        return _raised(context.get("error"), hidden)
    # Another type's own words; pydantic repeats no input in them, but a plugin's custom error might.
    return "is not valid" if hidden else f"is not valid: {detail['msg'][:1].lower()}{detail['msg'][1:]}"


def _meant(value: Any, expected: str, hidden: bool) -> str:
    if hidden or not isinstance(value, str):
        return ""
    meant = closest(value, [part.strip(" '") for part in expected.replace(" or ", ",").split(",")])
    return f'; did you mean "{meant}"?' if meant else ""


def _raised(error: Any, hidden: bool) -> str:
    if isinstance(error, BadValue):
        return str(error)
    return "is not valid" if hidden or not str(error) else f"is not valid: {error}"
