"""The body of ``POST /v1/embeddings``, checked before anything is looked up or sent."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any, Final, NamedTuple, NoReturn

import orjson

from embedonce import SpaceError
from embedonce.batch_settings import refuse_batch_settings

from .api_errors import ApiError
from .encoding import Encoding
from .task_names import TASK_FIELDS, find_task_field, read_task

MAX_INPUTS = 2048
"""Number of inputs of one request, as for OpenAI's endpoint."""
MAX_TOKEN_ID = 2**31 - 1
MAX_SHOWN = 64
"""Number of characters of a field's name that an answer repeats."""
MAX_DIMENSIONS = 65_536
MAX_DEPTH = 900
"""Number of lists and objects inside each other, in a body that orjson does not accept."""

OWN_FIELDS = frozenset({"input", "model", "dimensions", "encoding_format", "user", *TASK_FIELDS})
"""Fields that the server knows. All others are refused, or forwarded to the model."""


NOTHING: Final[Mapping[str, Any]] = {}

_ENCODINGS: Final[Mapping[str | None, Encoding]] = {None: "float", "float": "float", "base64": "base64"}


class EmbeddingRequest(NamedTuple):
    """A valid request for vectors. It is a tuple, because one is made for each request."""

    texts: list[str]
    """The texts. For inputs of token numbers: each input as JSON, such as ``[1,2,3]``."""
    are_tokens: bool
    """Whether the inputs are token numbers."""
    task: str
    encoding: Encoding
    dimensions: int | None
    forwarded: Mapping[str, Any]
    """Other fields, which are sent to the model and are part of the vector space."""
    task_field: str | None = None
    """The field that names the task, for the error of an unknown task."""


_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def parse_body(body: bytes, *, surrogates_in: str | None = None) -> dict[str, Any]:
    """Return the JSON object of a body. The field ``surrogates_in`` may have strings with lone surrogates.

    Raises:
        ApiError: the body is not a JSON object, or has a lone surrogate in another field.
    """
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        # JavaScript writes a text that was cut within an emoji with a lone surrogate, which orjson does not accept.
        if _ESCAPED_SURROGATE.search(body) is None:
            raise _refuse_json(error) from None
        return _parse_with_surrogates(body, surrogates_in)
    if type(data) is not dict:
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return data


def _refuse_json(error: json.JSONDecodeError) -> ApiError:
    # The parser's message may show a part of the body.
    where = f" (line {error.lineno}, column {error.colno})"
    return ApiError(400, f"the body is not valid JSON in UTF-8{where}", code="invalid_json")


def _parse_with_surrogates(body: bytes, surrogates_in: str | None) -> dict[str, Any]:
    """Parse with the standard library, which is slower, and accept only what orjson accepts, and lone surrogates."""
    try:
        data = json.loads(
            body.decode(), parse_int=_parse_number, parse_float=_parse_float, parse_constant=_refuse_constant
        )
    except json.JSONDecodeError as error:
        raise _refuse_json(error) from None
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not valid JSON in UTF-8", code="invalid_json") from None
    if type(data) is not dict:
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    for name, value in data.items():
        if _SURROGATE.search(name):
            raise ApiError(400, "the name of a field has a lone surrogate, which is not valid Unicode")
        _check_values(name, value, accepts_surrogates=name == surrogates_in)
    return data


def _check_values(name: str, value: Any, *, accepts_surrogates: bool) -> None:
    """Check the strings and the depth of a field.

    Raises:
        ApiError: a string has a lone surrogate, or the value is too deep.
    """
    level = [value]
    for _ in range(MAX_DEPTH):
        if not accepts_surrogates and any(type(item) is str and _SURROGATE.search(item) for item in level):
            message = f"{show_field(name)} has a lone surrogate, which is not valid Unicode"
            raise ApiError(400, message, param=name[:MAX_SHOWN])
        level = _list_inner(level)
        if not level:
            return
    raise ApiError(400, f"{show_field(name)} has too many lists and objects inside each other", param=name[:MAX_SHOWN])


def _list_inner(values: list[Any]) -> list[Any]:
    """Return the items of all lists, and the names and values of all objects."""
    inner: list[Any] = []
    for value in values:
        if type(value) is list:
            inner += value
        elif type(value) is dict:
            inner += value
            inner += value.values()
    return inner


def _parse_number(digits: str) -> int | float:
    """Return a whole number as orjson does: those beyond 64 bits are floats."""
    number = int(digits) if len(digits) <= 20 else None
    return number if number is not None and -(2**63) <= number < 2**64 else _parse_float(digits)


def _parse_float(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError("the number is too large")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def read_request(data: Mapping[str, Any], forward: Collection[str], *, can_forward: bool = False) -> EmbeddingRequest:
    """Check the fields of a request. ``forward`` has the names of the fields that are sent to the model.

    ``can_forward`` says whether other fields could be in ``forward``, for the error of an unknown field.

    Raises:
        ApiError: a field is invalid, missing or unknown.
    """
    if "input" not in data:
        raise ApiError(400, 'the field "input" is missing', param="input")
    texts, are_tokens = read_inputs(data["input"])
    if len(data) == 2:
        return EmbeddingRequest(texts, are_tokens, "document", "float", None, NOTHING)
    given = data.get("encoding_format")
    encoding = _ENCODINGS.get(given) if given is None or type(given) is str else None
    if encoding is None:
        raise ApiError(400, 'encoding_format must be "float" or "base64"', param="encoding_format")
    dimensions = read_dimensions(data)
    user = data.get("user")
    if user is not None and type(user) is not str:
        raise ApiError(400, "user must be a string", param="user")
    forwarded = NOTHING
    if not OWN_FIELDS.issuperset(data):
        forwarded = {name: value for name, value in data.items() if name not in OWN_FIELDS and value is not None}
        for name in forwarded:
            if name not in forward:
                raise _refuse_field(name, forward, can_forward=can_forward)
        for name, value in forwarded.items():
            _check_numbers(name, value)
    task, field = read_task(data), find_task_field(data)
    return EmbeddingRequest(texts, are_tokens, task, encoding, dimensions, forwarded, field)


def read_dimensions(data: Mapping[str, Any]) -> int | None:
    """Return the field ``dimensions``, or None if it is missing.

    Raises:
        ApiError: it is not a number of dimensions.
    """
    value = data.get("dimensions")
    if value is None:
        return None
    dimensions = read_whole_number(value)
    if dimensions is None or not 0 < dimensions <= MAX_DIMENSIONS:
        message = f"dimensions must be a whole number from 1 to {MAX_DIMENSIONS:,}"
        raise ApiError(400, message, param="dimensions")
    return dimensions


def read_whole_number(value: Any) -> int | None:
    """Return a whole number, which JSON may also write as ``3.0``; None if the value is something else."""
    if type(value) is float and value.is_integer():
        return int(value)
    return value if type(value) is int else None


def _check_numbers(name: str, value: Any) -> None:
    """Check that each number of a forwarded field is the number that the client has sent.

    Raises:
        ApiError: a number is so large that it may have been a whole number beyond 64 bits, which was rounded.
    """
    level = [value]
    while level:
        if any(type(item) is float and abs(item) >= 2**63 for item in level):
            message = f"{show_field(name)} has a number beyond 64 bits, which cannot be passed on exactly"
            raise ApiError(400, message, param=name[:MAX_SHOWN])
        level = _list_inner(level)


def show_field(name: str) -> str:
    """Return how a message names a field of a request."""
    return f'the field "{name[:MAX_SHOWN]}"' if name.isprintable() else "a field"


def _refuse_field(name: str, forward: Collection[str], *, can_forward: bool) -> ApiError:
    why, what = "it may change the vectors", "remove it"
    try:
        refuse_batch_settings({name: True})
    except SpaceError:
        why = "it makes the vector of a text depend on the other texts of the request"
    else:
        if can_forward:
            what = "remove it, or list it in forward of the model's [[serve.models]]"
    known = f". The model accepts {', '.join(sorted(forward))}" if forward else ""
    message = f"{show_field(name)} is not supported, because {why}; {what}{known}"
    return ApiError(400, message, param=name[:MAX_SHOWN], code="unsupported_field")


def read_inputs(value: Any) -> tuple[list[str], bool]:
    """Return the texts of ``input``, and whether they are token numbers.

    ``input`` is a text, a list of texts, a list of token numbers, or a list of lists of token numbers.

    Raises:
        ApiError: it is something else, it is empty, or it is too large.
    """
    if type(value) is str:
        if not value:
            raise ApiError(400, "the input is empty; send a text that is not empty", param="input")
        return [value], False
    if type(value) is not list:
        message = "input must be a text, a list of texts, a list of token numbers, or a list of such lists"
        raise ApiError(400, message, param="input")
    if not value:
        raise ApiError(400, "the input is an empty list; send at least one text", param="input")
    kinds = set(map(type, value))
    if kinds <= {int, float}:
        return [format_tokens(value, "the input")], True
    if len(value) > MAX_INPUTS:
        message = f"the request has {len(value):,} inputs; the maximum is {MAX_INPUTS:,}; split the request"
        raise ApiError(400, message, param="input")
    if kinds == {str}:
        if not all(value):
            empty = value.index("")
            message = f"input {empty} is empty; remove it or send a text that is not empty"
            raise ApiError(400, message, param="input")
        return value, False
    if kinds == {list}:
        return [format_tokens(tokens, f"input {i}") for i, tokens in enumerate(value)], True
    message = "input must be a text, a list of texts, a list of token numbers, or a list of such lists"
    raise ApiError(400, message, param="input")


def format_tokens(tokens: list[Any], where: str) -> str:
    """Return token numbers as canonical JSON, which stands for the text.

    Raises:
        ApiError: the list is empty, or an item is not a token number.
    """
    if not tokens:
        raise ApiError(400, f"{where} is an empty list of token numbers", param="input")
    if set(map(type, tokens)) != {int}:
        tokens = list(map(read_whole_number, tokens))
    if None in tokens or min(tokens) < 0 or max(tokens) > MAX_TOKEN_ID:
        raise ApiError(400, f"{where} must have only token numbers from 0 to {MAX_TOKEN_ID:,}", param="input")
    return orjson.dumps(tokens).decode()
