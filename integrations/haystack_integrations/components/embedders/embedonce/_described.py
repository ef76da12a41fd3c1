"""Describe what determines the vectors of a Haystack embedder, from its ``to_dict`` and its attributes."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any, Final

from haystack.core.errors import SerializationError
from haystack.core.serialization import component_to_dict
from haystack.utils import Secret

from embedonce import SpaceError, VectorSpace
from embedonce.contracts import Task
from embedonce_integrations.wrapping import (
    HOW_TO_DECLARE,
    MODEL_FIELDS,
    add_request,
    describe_space,
    resolve_declared_space,
)

NOT_IN_SPACE: Final = frozenset(
    {
        "azure_ad_token",
        "azure_ad_token_provider",
        "boto3_config",
        "cache_dir",
        "embedding_separator",
        "keep_alive",
        "local_files_only",
        "meta_fields_to_embed",
        "parallel",
        "raise_on_failure",
        "threads",
        "use_async_client",
    }
)
"""Names of fields that do not affect vectors, in addition to :data:`embedonce_integrations.wrapping.NOT_IN_SPACE`.

``meta_fields_to_embed`` and ``embedding_separator`` are in this list, because they affect only the text that is
embedded, and the key is made from that text.
"""


def read_init_parameters(embedder: Any) -> Mapping[str, Any]:
    """Return the arguments with which an embedder was constructed. Secrets are left out.

    Raises:
        SpaceError: neither the embedder's ``to_dict`` nor the embedder's attributes show the arguments.
    """
    name = type(embedder).__name__
    try:
        found = component_to_dict(embedder, name)["init_parameters"]
    except (ValueError, SerializationError) as error:
        # to_dict fails if a secret does not come from an environment variable. In that case, read the
        # arguments from the attributes.
        names = [one for one in inspect.signature(type(embedder).__init__).parameters if one != "self"]
        if not all(hasattr(embedder, one) for one in names):
            raise SpaceError(f"{name} does not expose its arguments ({error}); {HOW_TO_DECLARE}") from error
        found = {one: getattr(embedder, one) for one in names}
    return {one: value for one, value in found.items() if not _is_secret(value)}


def _is_secret(value: Any) -> bool:
    return isinstance(value, Secret) or (isinstance(value, Mapping) and value.get("type") == "env_var")


def describe_call(
    embedder: Any, run: Mapping[str, Any], *, task: Task, declared: Mapping[str, Any] | None = None
) -> VectorSpace:
    """Return the vector space of the vectors that one call of an embedder makes.

    ``run`` has all arguments of that call except the texts. ``declared`` is the vector space that the user declared,
    if any.

    Raises:
        SpaceError: the embedder cannot be described, and the user declared no vector space. The message says how to
            declare one.
    """
    space = _describe(embedder, task) if declared is None else resolve_declared_space(declared, task=task)
    return add_request(space, run)


def _describe(embedder: Any, task: Task) -> VectorSpace:
    name = type(embedder).__name__
    fields = dict(read_init_parameters(embedder))
    if fields.get("precision") in ("int8", "uint8") and fields.get("quantization_ranges") is None:
        raise SpaceError(
            f"with precision={fields['precision']!r} and without quantization_ranges, {name} scales each vector by the "
            "range of its batch, so the vector of a text depends on the other texts and cannot be cached. Set "
            "quantization_ranges"
        )
    if "api_base_url" in fields and fields["api_base_url"] is None:
        fields["api_base_url"] = os.environ.get("OPENAI_BASE_URL")  # the client uses this variable too
    model = next((fields.pop(one) for one in MODEL_FIELDS if isinstance(fields.get(one), str)), None)
    if model is None:
        if not fields.get("api_params"):  # the api_params of Hugging Face's embedders name a model or a server
            raise SpaceError(f"{name} does not say which model it uses (it has no 'model'); {HOW_TO_DECLARE}")
        model = str(fields["api_params"].get("model", ""))
    return describe_space(embedder, fields, model=model, task=task, leave_out=NOT_IN_SPACE)
