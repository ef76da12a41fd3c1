"""Copy and pickle the embedder inside a component.

A warm embedder holds connections and locks, which can be neither copied nor pickled. Such an embedder is made again
from its ``to_dict``, and warms up at the first miss.
"""

from __future__ import annotations

import pickle
from copy import deepcopy
from typing import Any, NamedTuple

from haystack.core.serialization import component_from_dict, component_to_dict

from embedonce import SpaceError

from ._described import describe_component


class Packed(NamedTuple):
    """An embedder in the form of its ``to_dict``."""

    cls: type[Any]
    data: dict[str, Any]


def copy_embedder(embedder: Any, memo: dict[int, Any]) -> Any:
    """Return a deep copy of an embedder; else an embedder made again from its ``to_dict``; else the embedder itself."""
    if id(embedder) not in memo:
        try:
            # A copy that fails leaves unfinished objects in the memo, so it has a memo of its own.
            memo[id(embedder)] = deepcopy(embedder, dict(memo))
        except Exception as error:  # noqa: BLE001  (an embedder may hold anything)
            memo[id(embedder)] = _rebuild(embedder, error)
    return memo[id(embedder)]


def _rebuild(embedder: Any, reason: Exception) -> Any:
    try:
        return _build(_dump(embedder, reason))
    except SpaceError:
        return embedder


def pack_embedder(embedder: Any) -> Any:
    """Return an embedder if it can be pickled, and otherwise its ``to_dict`` as a :class:`Packed`.

    Raises:
        SpaceError: it has no ``to_dict`` that describes it.
    """
    try:
        pickle.dumps(embedder)
    except Exception as error:  # noqa: BLE001  (an embedder may hold anything)
        return _dump(embedder, error)
    return embedder


def unpack_embedder(packed: Any) -> Any:
    """Return the embedder that :func:`pack_embedder` packed."""
    return _build(packed) if isinstance(packed, Packed) else packed


def _build(packed: Packed) -> Any:
    return component_from_dict(packed.cls, packed.data, "embedder")


def _dump(embedder: Any, reason: Exception) -> Packed:
    cls = type(embedder)
    try:
        packed = Packed(cls, component_to_dict(embedder, "embedder"))
        again = _build(packed)
    except Exception as error:
        raise SpaceError(
            f"{cls.__name__} can be neither pickled ({reason}) nor made again from its to_dict "
            f"({type(error).__name__}); pickle the component before its first run, or make a new one"
        ) from error
    if _describe(embedder) != _describe(again):
        raise SpaceError(
            f"{cls.__name__} cannot be pickled ({reason}), and its to_dict does not contain everything that affects "
            "its vectors; pickle the component before its first run, or make a new one"
        )
    return packed


def _describe(embedder: Any) -> Any:
    try:
        return describe_component(embedder, space=None, ignore=())("document")
    except SpaceError:
        return None
