"""Describes single values: texts, numbers, arrays, the names of functions, and what kind of object an item is."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import os
import random
import struct
import sys
import threading
import types
from collections import deque
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import date, datetime, time, timedelta, tzinfo
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID

import numpy as np

from embedonce.model_files import digest

from .embedder_fields import CLIENT_PACKAGES, MACHINERY, MODEL_FIELDS, TOOLS, holds_phrases, is_secret, looks_secret

NOTHING: Final = object()
"""Says that an item holds no setting."""

MAX_DIGITS: Final = 600
"""Maximum bits of an integer that is described as it is. Python refuses to write integers with thousands of digits."""

BY_REPR: Final = (
    *(complex, range, slice, date, datetime, time, timedelta, tzinfo, Decimal, Fraction, UUID),
    *(types.EllipsisType, types.GenericAlias, types.UnionType, np.dtype),
)
"""Types whose ``repr`` shows everything that a value holds."""

PLAIN: Final = (bool, int, float, str, bytes, bytearray, memoryview)


def remove_class(item: Any) -> Any:
    """Return the value of an instance of a subclass of :data:`PLAIN`, without what the subclass adds."""
    if isinstance(item, str):
        return str.__str__(item)  # the subclass may have a ``__str__`` of its own
    kind: Any = next(kind for kind in PLAIN if isinstance(item, kind))
    return kind(item)


def describe_plain(item: Any, name: str) -> Any:
    """Describe a text, a number or bytes that an embedder keeps in the field ``name``."""
    if isinstance(item, str):
        return NOTHING if looks_secret(item) else _describe_text(item, name)
    if isinstance(item, bytearray | memoryview):
        return bytes(item)
    if isinstance(item, float) and math.isnan(item):
        return {"float": "nan"}  # NaN is not equal to itself, so a vector space cannot contain it
    if isinstance(item, int) and item.bit_length() > MAX_DIGITS:
        return {"int": f"{item:x}"}
    return item


def _describe_text(text: str, name: str) -> Any:
    if name.strip("_") in MODEL_FIELDS:
        text = identify_model(text)[1] or text
    stripped = text if holds_phrases(name) else strip_credentials(text)
    unicode = to_unicode(stripped)
    return stripped if unicode == stripped else {"text with surrogates": unicode}


def to_unicode(text: str) -> str:
    """Write lone surrogates, which UTF-8 cannot encode, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def describe_generator(item: random.Random) -> Any:
    """Describe a random generator by the SHA-256 of its state. The system's generator has no state."""
    try:
        state = repr(item.getstate())
    except NotImplementedError:
        return NOTHING
    return {"random state": hashlib.sha256(state.encode()).hexdigest()}


def describe_memory(item: io.StringIO | io.BytesIO) -> Any:
    """Describe a file in memory by the SHA-256 of its content, and its position."""
    if item.closed:
        return NOTHING
    value = item.getvalue()
    content = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    return {"content": hashlib.sha256(content).hexdigest(), "position": item.tell()}


def read_local_values(item: threading.local | ContextVar[Any]) -> list[Any]:
    """Return the values that a thread-local object or a context variable has at present."""
    if isinstance(item, ContextVar):
        try:
            value = item.get()
        except LookupError:
            return []
        return [] if value is None else [value]
    return [value for value in vars(item).values() if value is not None]


def describe_array(array: Any) -> dict[str, Any]:
    """Describe a numpy array by the SHA-256 of its content."""
    content = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return {"array": content, "dtype": repr(array.dtype), "shape": list(array.shape)}


def find_name(item: Any) -> str | None:
    """Return the name under which anybody can import a class or function, or None if there is no such name."""
    module, name = getattr(item, "__module__", None), getattr(item, "__qualname__", None)
    if isinstance(item, np.ufunc):
        module, name = "numpy", item.__name__
    if isinstance(item, types.MethodDescriptorType | types.WrapperDescriptorType):
        module = item.__objclass__.__module__
    if not isinstance(module, str) or not isinstance(name, str) or module == "__main__":
        return None
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return f"{module}.{name}" if found is item or isinstance(item, np.ufunc) else None


def is_secret_object(item: object) -> bool:
    """Return whether an object exists to hold a secret, such as pydantic's ``SecretStr`` or Haystack's ``Secret``."""
    cls = type(item)
    return cls.__name__.endswith(("Credential", "Credentials", "Secret")) or any(
        hasattr(cls, name) for name in ("get_secret_value", "resolve_value")
    )


def is_connection(item: object) -> bool:
    """Return whether an object is a client of a service, or a part or a subclass of one."""
    cls = type(item)
    if isinstance(item, type) or is_value(cls) or isinstance(item, Exception | Enum | str | Mapping):
        return False
    return any(package_of(base) in CLIENT_PACKAGES for base in cls.__mro__)


def is_replaceable(item: object) -> bool:
    """Return whether an item holds only plain values, connections and machinery.

    Only such an item is left out because of its name. Any other object, such as a model, may change a vector.
    """
    try:
        return _is_replaceable(item)
    except RecursionError:
        return False


def _is_replaceable(item: Any) -> bool:
    if isinstance(item, Mapping):
        return all(_is_replaceable(part) for pair in item.items() for part in pair)
    if isinstance(item, list | tuple | set | frozenset | deque):
        return all(map(_is_replaceable, item))
    if item is None or isinstance(item, (*PLAIN, *BY_REPR, Enum, os.PathLike, np.generic)) or is_secret_object(item):
        return True
    named = isinstance(item, type | types.FunctionType | types.BuiltinFunctionType | types.MethodType)
    modules = [str(item.__module__)] if named else [cls.__module__ for cls in type(item).__mro__]
    return any(
        module.partition(".")[0] in CLIENT_PACKAGES | MACHINERY or f"{module}.".startswith(_TOOLS) for module in modules
    )


_TOOLS: Final = tuple(f"{module}." for module in TOOLS)


def is_value(cls: type[Any]) -> bool:
    """Return whether a class is a dataclass or a pydantic model."""
    return dataclasses.is_dataclass(cls) or hasattr(cls, "model_fields")


def is_builtin(cls: type[Any]) -> bool:
    """Return whether instances of a class have no attributes besides their value."""
    return cls.__module__ in ("builtins", "collections", "numpy") or cls in BY_REPR


def package_of(cls: type[Any]) -> str:
    """Return the name of the package that defines a class."""
    return cls.__module__.partition(".")[0]


_POINTER: Final = struct.calcsize("P")


def keeps_hidden_state(cls: type[Any]) -> bool:
    """Return whether instances have memory beside their attributes, as those of a class written in C may have.

    The size of an instance is that of an object, plus one pointer for each slot, for ``__dict__`` and for weak
    references. (``object.__reduce_ex__`` makes the same comparison to find out what it cannot pickle.)
    """
    slots = sum(
        isinstance(member, types.MemberDescriptorType) for base in cls.__mro__ for member in vars(base).values()
    )
    pointers = slots + (cls.__dictoffset__ > 0) + (cls.__weakrefoffset__ > 0)
    return cls.__itemsize__ != 0 or cls.__basicsize__ > object.__basicsize__ + pointers * _POINTER


# --- models and URLs ---------------------------------------------------------------------------


def identify_model(name: str) -> tuple[str, str | None]:
    """Return a model's name and None; for a folder, a name made from its content and the digest of its content.

    The description of a folder stays the same if the folder is moved, and changes if the weights change.
    """
    if not is_model_folder(name):
        return name, None
    content = digest(Path(name).expanduser())
    return f"folder:{content[:12]}", content


def is_model_folder(name: str) -> bool:
    """Return whether a model's name is the path of a folder with a model."""
    try:
        folder = Path(name).expanduser()
        return any((folder / file).is_file() for file in ("config.json", "modules.json"))
    except (OSError, ValueError, RuntimeError):  # too long for a path, a NUL character, no home folder
        return False


def strip_credentials(text: str) -> str:
    """Return a URL without user, password and query parameters that hold secrets. Return other texts unchanged."""
    if "://" not in text or not ("@" in text or "?" in text) or any(map(str.isspace, text)):
        return text
    try:
        parts = urlsplit(text)
    except ValueError:
        return text
    query = "&".join(part for part in parts.query.split("&") if not is_secret(part.partition("=")[0]))
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query))
