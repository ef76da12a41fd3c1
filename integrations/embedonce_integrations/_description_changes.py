"""Compares two descriptions of one embedder, to find out whether the embedder has changed since it was wrapped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from .embedder_fields import is_record

CLIENT: Final = "client"
"""The end of the name under which the settings of a connection are described: ``_client.client``."""


ENDPOINT: Final = "URL of the endpoint"
"""The name under which the URL of an embedder's endpoint is described."""


class Difference(NamedTuple):
    """A difference between two descriptions of an embedder. A value that is absent is None."""

    path: str
    then: Any
    now: Any
    may_grow: bool
    """Whether the embedder may have written down what it does, or made a part of itself at the first call."""


def list_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Return the fields that differ between two descriptions of an embedder.

    A connection that is only in ``now`` is no difference, because embedders make their connections at the first call.
    """
    return list(_compare(then, now, "", is_object=True, in_record=False))


def _compare(then: Any, now: Any, path: str, *, is_object: bool, in_record: bool) -> Iterator[Difference]:
    """Yield the differences below ``path``, which an object's field or an item of a collection holds."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        is_object = not path or "class" in then or "class" in now
        in_record = in_record and not is_object
        for name in sorted({*then, *now}):
            is_new_client = name not in then and name.endswith(f".{CLIENT}")
            if is_new_client or (name == ENDPOINT and {*then.get(name, ())} <= {*now.get(name, ())}):
                continue
            yield from _compare(
                *(then.get(name), now.get(name), f"{path}.{name}" if path else name),
                is_object=is_object,
                in_record=in_record or is_record(name),
            )
    elif _are_lists_of_objects(then, now):
        for index, (one, other) in enumerate(zip(then, now, strict=True)):
            yield from _compare(one, other, f"{path}[{index}]", is_object=False, in_record=in_record)
    elif type(then) is not type(now) or then != now:
        yield Difference(path, then, now, in_record or (then is None and is_object))


def _are_lists_of_objects(then: Any, now: Any) -> bool:
    return (
        isinstance(then, list)
        and isinstance(now, list)
        and len(then) == len(now)
        and any(isinstance(item, Mapping) for item in then)
    )
