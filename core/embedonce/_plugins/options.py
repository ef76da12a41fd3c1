"""Read a class's options from its ``__init__``, and check a value against an option.

pydantic checks the values in strict JSON mode, so text never becomes a number or a bool. Importing pydantic takes
150 ms. Therefore it is imported only for a value that :mod:`.plain_values` cannot check.
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

from embedonce._messages import find_closest, join_words, quote
from embedonce.errors import PluginError
from embedonce.options import BadValue, IsFolderOrName, NotAFolder, Parsed, format_size, parse_duration, parse_size

from .plain_values import UNSURE, convert_plain_value

REQUIRED = inspect.Parameter.empty
"""Value of :attr:`Option.default` for an option that has no default."""


class Refused(ValueError):
    """A value does not match an option's type. ``details`` are the errors that pydantic reports."""

    def __init__(self, details: Sequence[Any]) -> None:
        super().__init__("the value does not match the option's type")
        self.details = details


@dataclass(frozen=True, slots=True)
class Option:
    """One keyword-only parameter of a class's ``__init__``."""

    name: str
    hint: Any
    default: Any = REQUIRED

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    @property
    def doc(self) -> str | None:
        """The text of the first ``Doc`` in the type. The ``Doc`` class of any package works."""
        texts = (getattr(part, "documentation", None) for part in list_annotations(self.hint))
        return next((text for text in texts if isinstance(text, str)), None)

    @property
    def is_path(self) -> bool:
        """Whether the option names a file or folder: its type includes ``Path`` or ``os.PathLike``."""
        return any(
            isinstance(part, type) and (issubclass(part, Path) or part is os.PathLike)
            for part in _list_members(self.hint)
        )

    def resolve_path(self, value: Any, folder: Path) -> Any:
        """Make a path absolute. A relative path starts at ``folder``, the folder of the configuration.

        A name that may be a folder becomes an absolute path if there is such a folder, and otherwise a
        :class:`NotAFolder`.
        """
        if not isinstance(value, str | Path):
            return value
        path = folder / Path(value).expanduser()
        if self.is_path:
            return path if isinstance(value, Path) else str(path)
        if not any(isinstance(part, IsFolderOrName) for part in list_annotations(self.hint)):
            return value
        is_folder = path.is_dir() or str(value).startswith(("./", "../", "~", "/")) or str(value) in (".", "..")
        return str(path) if is_folder else NotAFolder(value)

    @property
    def is_choice(self) -> bool:
        """Whether the only texts of the type are the words of a ``Literal``. They are not secret and may be shown."""
        members = set(_list_members(self.hint))
        return typing.Literal in members and members <= {typing.Literal, type(None), bool, int, float}

    def format_bound(self, bound: float) -> str:
        """Return the smallest or largest valid value as a user writes it: with a unit, if the option has units."""
        parsers = [part.parse for part in list_annotations(self.hint) if isinstance(part, Parsed)]
        if parse_size in parsers:
            return format_size(int(bound))
        number = str(int(bound)) if float(bound).is_integer() else str(bound)
        return f"{number}s" if bound and parse_duration in parsers else number

    def check(self, value: Any) -> Any:
        """Return ``value`` converted to the option's type.

        Raises:
            Refused: the value does not match the type.
            PluginError: TOML has no values of this type.
        """
        converted = convert_plain_value(self.hint, value)
        return converted if converted is not UNSURE else self._validate(value)

    def _validate(self, value: Any) -> Any:
        from pydantic import ValidationError

        try:
            return type_adapter(self).validate_json(json.dumps(value, allow_nan=False), strict=True)
        except ValidationError as error:
            raise Refused(error.errors(include_url=False)) from None  # pydantic's message repeats the value


def options_of(cls: type[Any]) -> Mapping[str, Option]:
    """Return a class's options by name, in the order of its ``__init__``.

    Raises:
        PluginError: ``__init__`` has a required positional parameter, or its type hints cannot be resolved.
    """
    init = inspect.unwrap(cls.__init__)
    if init is object.__init__:
        return {}
    try:
        parameters = list(inspect.signature(init).parameters.values())[1:]
        hints = typing.get_type_hints(init, include_extras=True)
    except (NameError, TypeError, ValueError, AttributeError) as error:
        raise PluginError(
            f"the types of {_full_name(cls)}'s options cannot be read: {error}; the module of the class "
            "must import these types at run time, not only under TYPE_CHECKING"
        ) from error
    for parameter in parameters:
        if parameter.kind in _POSITIONAL and parameter.default is REQUIRED:
            raise PluginError(
                f'{_full_name(cls)} cannot be made from TOML: its parameter "{parameter.name}" must be keyword-only '
                "(written after *)"
            )
    keywords = (p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)
    return {p.name: Option(p.name, hints.get(p.name, Any), p.default) for p in keywords}


def merge_options(cls: type[Any], own: Mapping[str, Option], reserved: Collection[str]) -> dict[str, Option]:
    """Return the options of a plugin's table: embedonce's own options, and those of the plugin's class.

    Raises:
        PluginError: :func:`options_of` fails, or an option of the class has a name in ``own`` or ``reserved``.
    """
    options = options_of(cls)
    conflicts = sorted(options.keys() & {*own, *reserved})
    if conflicts:
        raise PluginError(
            f"{_full_name(cls)} must not have an option named {join_words(conflicts, 'or')}, because embedonce uses "
            "that name in the same table; the author of the plugin must rename the option"
        )
    return {**own, **options}


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _full_name(cls: type[Any]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def list_annotations(hint: Any) -> list[Any]:
    """Return the metadata of every ``Annotated`` in a type, at any depth."""
    found = list(getattr(hint, "__metadata__", ()))
    for part in typing.get_args(hint):
        if typing.get_origin(part) is typing.Annotated or typing.get_args(part):
            found += list_annotations(part)
    return found


def _list_members(hint: Any) -> list[Any]:
    """Return the members of a union, or the type itself if it is not a union."""
    if typing.get_origin(hint) is typing.Annotated:
        return _list_members(typing.get_args(hint)[0])
    if inspect.isclass(hint) and typing.get_origin(hint) is None:
        return [hint]
    origin = typing.get_origin(hint)
    if origin is not typing.Union and type(hint).__name__ != "UnionType":
        return [origin] if origin is not None else []
    return [member for part in typing.get_args(hint) for member in _list_members(part)]


def type_adapter(option: Option) -> Any:
    """Return the ``pydantic.TypeAdapter`` of an option.

    Raises:
        PluginError: TOML has no values of the option's type.
    """
    try:
        return _build_cached(option)
    except TypeError:  # the default or the type cannot be hashed
        return _build_adapter(option)


def _build_adapter(option: Option) -> Any:
    from pydantic import PydanticSchemaGenerationError, PydanticUserError, TypeAdapter

    try:
        return TypeAdapter(option.hint)
    except (PydanticSchemaGenerationError, PydanticUserError) as error:
        raise PluginError(
            f'"{option.name}" can only be given in Python, because TOML has no values of the option\'s type'
        ) from error


_build_cached = functools.lru_cache(maxsize=1024)(_build_adapter)


# --- values written as text -------------------------------------------------------------------


def read_text(option: Option, text: str) -> Any:
    """Convert the text of an environment variable to a value for this option.

    The result is the first of these values that the option accepts: the text itself, the text read as TOML or as
    JSON, a bool, or a list of the parts between commas. If the option accepts none of them, the text is returned, so
    that checking the text reports the error.
    """
    return next((value for value in [text, *_list_readings(text)] if _is_accepted(option, value)), text)


def _list_readings(text: str) -> list[Any]:
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


def _is_accepted(option: Option, value: Any) -> bool:
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return False
    try:
        option.check(value)
    except (ValueError, TypeError):  # also raised for values that JSON cannot write, such as infinity or a date
        return False
    return True


# --- errors in a value ------------------------------------------------------------------------

EXPECTED: Mapping[str, str] = {
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
    """An invalid part of an option's value."""

    where: tuple[str | int, ...]
    """Keys and list indexes that lead from the value to its invalid part; empty if the whole value is invalid."""
    message: str
    value: Any


def list_invalid_parts(option: Option, value: Any, refused: Refused, *, hidden: bool) -> list[InvalidPart]:
    """Return one item for each invalid part of a value that ``option.check`` refused.

    With ``hidden``, no message repeats any part of the value.
    """
    by_place: dict[tuple[str | int, ...], list[Any]] = {}
    for detail in refused.details:
        by_place.setdefault(_path_inside(value, detail["loc"]), []).append(detail)
    return [
        InvalidPart(where, _join_messages(option, details, part, hidden=hidden), part)
        for where, details in by_place.items()
        for part in [_value_at(value, where)]
    ]


def _path_inside(value: Any, loc: Sequence[str | int]) -> tuple[str | int, ...]:
    """Return the steps of pydantic's ``loc`` that lead into the value. Leave out steps that name union branches."""
    where: list[str | int] = []
    for step in loc:
        if _contains_step(value, step):
            value = value[step]
            where.append(step)
    return tuple(where)


def _contains_step(value: Any, step: str | int) -> bool:
    if isinstance(value, list):
        return isinstance(step, int) and 0 <= step < len(value)
    return isinstance(value, dict) and step in value


def _value_at(value: Any, where: Sequence[str | int]) -> Any:
    for step in where:
        value = value[step]
    return value


def _join_messages(option: Option, details: Sequence[Any], value: Any, *, hidden: bool) -> str:
    messages = (_describe_detail(option, detail, value, hidden=hidden) for detail in details)
    return join_words(dict.fromkeys(messages), "or")


def _describe_detail(option: Option, detail: Any, value: Any, *, hidden: bool) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in EXPECTED:
        example = ""
        if EXPECTED[kind] == "a list" and isinstance(value, str):
            example = ', such as ["${NAME}"]' if hidden else f", such as [{quote(value)}]"
        return f"must be {EXPECTED[kind]}{example}"
    if kind in BOUNDS:
        words, name = BOUNDS[kind]
        return f"must be {words} {option.format_bound(context[name])}"
    if kind in LENGTHS:
        if value in ("", [], {}):
            return "must not be empty"
        words, name = LENGTHS[kind]
        unit = "character" if kind.startswith("string") else "item"
        return f"must have {words} {context[name]} {unit}{'' if context[name] == 1 else 's'}"
    if kind in ("literal_error", "enum"):
        words = context["expected"].replace("'", '"')
        return f"must be {words}{_suggest_word(value, context['expected'], hidden)}"
    if kind == "missing":
        return f'must have the key "{detail["loc"][-1]}"'
    if kind == "extra_forbidden":
        return "is an unknown key"
    if kind in ("value_error", "assertion_error"):
        return _describe_error(context.get("error"), hidden)
    # For any other kind of error, use the error's own message, unless the value is hidden. pydantic's messages do not
    # repeat the value, but the message of a plugin's custom error may repeat the value.
    return "is invalid" if hidden else f"is invalid: {detail['msg'][:1].lower()}{detail['msg'][1:]}"


def _suggest_word(value: Any, expected: str, hidden: bool) -> str:
    if hidden or not isinstance(value, str):
        return ""
    word = find_closest(value, [part.strip(" '") for part in expected.replace(" or ", ",").split(",")])
    return f'; did you mean "{word}"?' if word else ""


def _describe_error(error: Any, hidden: bool) -> str:
    if isinstance(error, BadValue):
        return str(error) if hidden or not error.hint else f"{error}; {error.hint}"
    return "is invalid" if hidden or not str(error) else f"is invalid: {error}"
