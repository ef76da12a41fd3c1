"""Copy and pickle the embedder inside a component.

A warm embedder holds connections, locks and weights, which cannot be copied or need not be. So an embedder is made
again from its ``to_dict``, and warms up at the first miss. Only if that would lose something that affects its vectors
is the embedder itself copied or pickled.
"""

from __future__ import annotations

import pickle
from copy import deepcopy
from typing import Any, NamedTuple

from haystack.core.serialization import component_from_dict, component_to_dict

from embedonce import SpaceError, VectorSpace

from ._described import describe_component


class Packed(NamedTuple):
    """An embedder in the form of its ``to_dict``."""

    cls: type[Any]
    data: dict[str, Any]


def copy_embedder(embedder: Any, memo: dict[int, Any]) -> Any:
    """Return an embedder made again from the ``to_dict`` of another; else a deep copy; else the embedder itself."""
    if embedder is not None and id(embedder) not in memo:
        packed = _pack(embedder)
        try:
            # A copy that fails leaves unfinished objects in the memo, so it has a memo of its own.
            memo[id(embedder)] = _build(packed) if packed is not None else deepcopy(embedder, dict(memo))
        except Exception:  # noqa: BLE001  (an embedder may hold anything; what cannot be copied is shared)
            memo[id(embedder)] = embedder
    return None if embedder is None else memo[id(embedder)]


def pack_embedder(embedder: Any) -> Any:
    """Return an embedder's ``to_dict`` as a :class:`Packed`, or the embedder itself if it can only be pickled as it is.

    Raises:
        SpaceError: the embedder can be neither pickled nor made again from its ``to_dict``.
    """
    packed = None if embedder is None else _pack(embedder)
    if packed is not None:
        return packed
    try:
        pickle.dumps(embedder)
    except Exception as error:
        raise SpaceError(
            f"{type(embedder).__name__} can be neither pickled ({type(error).__name__}) nor made again from its "
            "to_dict with the same vectors; construct it, and its component, in the process that uses it"
        ) from error
    return embedder


def unpack_embedder(packed: Any) -> Any:
    """Return the embedder that :func:`pack_embedder` packed."""
    return _build(packed) if isinstance(packed, Packed) else packed


def _pack(embedder: Any) -> Packed | None:
    """Return an embedder's ``to_dict``, or None if an embedder that is made from it may make different vectors."""
    described = _describe(embedder)
    if described is None:
        return None
    try:
        packed = Packed(type(embedder), component_to_dict(embedder, "embedder"))
        again = _build(packed)
    except Exception:  # noqa: BLE001  (an embedder may be unable to serialise itself)
        return None
    return packed if _describe(again) == described else None


def _build(packed: Packed) -> Any:
    return component_from_dict(packed.cls, packed.data, "embedder")


def _describe(embedder: Any) -> VectorSpace | None:
    try:
        return describe_component(embedder, space=None, ignore=())("document")
    except SpaceError:
        return None
