"""What decides the vectors of one of Haystack's embedders, as its own ``to_dict`` and attributes say it."""

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
from embedonce_integrations.wrapping import MODEL_FIELDS, asked_with, declared_space, described_space

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
"""Beside :data:`embedonce_integrations.wrapping.NOT_IN_SPACE`. Metadata and separator are part of the text."""


def init_parameters(embedder: Any) -> Mapping[str, Any]:
    """Return what an embedder was made with, without secrets.

    Raises:
        SpaceError: neither its ``to_dict`` nor its attributes say so.
    """
    name = type(embedder).__name__
    try:
        found = component_to_dict(embedder, name)["init_parameters"]
    except (ValueError, SerializationError) as error:
        # A secret that is not a variable cannot be written, but its neighbours can be read.
        names = [one for one in inspect.signature(type(embedder).__init__).parameters if one != "self"]
        if not all(hasattr(embedder, one) for one in names):
            raise SpaceError(f"{name} does not say what it was made with: {error}") from error
        found = {one: getattr(embedder, one) for one in names}
    return {one: value for one, value in found.items() if not _is_secret(value)}


def _is_secret(value: Any) -> bool:
    return isinstance(value, Secret) or (isinstance(value, Mapping) and value.get("type") == "env_var")


def space_of(
    embedder: Any, run: Mapping[str, Any], *, task: Task, declared: Mapping[str, Any] | None = None
) -> VectorSpace:
    """Return the vector space of an embedder that is called with ``run`` beside the texts.

    Raises:
        SpaceError: it cannot be described, and was not declared; the message says how to.
    """
    space = _described(embedder, task) if declared is None else declared_space(declared, task=task)
    return asked_with(space, run)


def _described(embedder: Any, task: Task) -> VectorSpace:
    name = type(embedder).__name__
    if type(embedder).__module__ == "__main__":
        raise SpaceError(
            f"{name} is defined in the script that runs, and another script may have another one of that name; "
            f"move it to a module, or {_DECLARE}"
        )
    fields = dict(init_parameters(embedder))
    if fields.get("precision") in ("int8", "uint8") and fields.get("quantization_ranges") is None:
        raise SpaceError(
            f"{name} with precision={fields['precision']!r} and no quantization_ranges takes the range from the texts "
            "that come in one batch: a text has no vector of its own that could be cached. Give it quantization_ranges"
        )
    if "api_base_url" in fields and fields["api_base_url"] is None:
        fields["api_base_url"] = os.environ.get("OPENAI_BASE_URL")  # where the client then looks
    model = next((fields.pop(one) for one in MODEL_FIELDS if isinstance(fields.get(one), str)), None)
    if model is None:
        if not fields.get("api_params"):  # those of Hugging Face's APIs name a model or a server
            raise SpaceError(f"{name} does not say which model it uses (it has no 'model'); {_DECLARE}")
        model = str(fields["api_params"].get("model", ""))
    return described_space(embedder, fields, model=model, task=task, leave_out=NOT_IN_SPACE)


_DECLARE: Final = (
    'declare what decides its vectors: space={"model": "my-model-v2"}, '
    "with whatever else does (dimensions, prompt, ...)"
)
