"""Describe what determines the vectors of a Haystack embedder: its attributes, and the arguments in its ``to_dict``."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

from haystack.core.serialization import component_to_dict

from embedonce import VectorSpace
from embedonce.contracts import Task
from embedonce_integrations.describing import read_state
from embedonce_integrations.wrapping import make_describer

TEXT_FIELDS: Final = ("meta_fields_to_embed", "embedding_separator")
"""Attributes of document embedders that affect only the text that is embedded. The key is made from that text."""


def describe_component(
    embedder: Any, *, space: Mapping[str, Any] | None, ignore: Collection[str]
) -> Callable[[Task], VectorSpace]:
    """Return a function that takes a task and returns the vector space of an embedder in its present state.

    ``space`` is the vector space that the user has declared, if any. ``ignore`` names attributes that the user knows to
    be irrelevant.

    Raises:
        SpaceError: the embedder does not say what determines its vectors. The message says how to declare it.
    """
    return make_describer(embedder, space=space, ignore=ignore, more=lambda: _read_more(embedder))


def _read_more(embedder: Any) -> dict[str, Any]:
    """Return arguments of the embedder that are not attributes, and corrections of attributes."""
    state = read_state(embedder)
    more = {name: value for name, value in _read_arguments(embedder).items() if name not in state}
    more |= dict.fromkeys(TEXT_FIELDS)  # None leaves the attribute out
    if {**state, **more}.get("api_base_url", "") is None:
        more["api_base_url"] = os.environ.get("OPENAI_BASE_URL")  # the client uses this variable too
    return more


def _read_arguments(embedder: Any) -> Mapping[str, Any]:
    """Return the arguments in the embedder's ``to_dict``, without secrets, or nothing if ``to_dict`` fails."""
    try:
        found = component_to_dict(embedder, type(embedder).__name__)["init_parameters"]
    except Exception:  # noqa: BLE001  (a component may be unable to serialise itself; its attributes describe it)
        return {}
    return {name: value for name, value in found.items() if not _is_serialized_secret(value)}


def _is_serialized_secret(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("type") in ("env_var", "token")
