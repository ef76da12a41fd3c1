"""The OpenAPI document of a server under test."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from embedonce_server.api.openapi import make_document


def narrow_document(*, model: str, dimensions: Sequence[int], tenant: str) -> dict[str, Any]:
    """Return the document with the values that one server accepts, which the general document cannot know.

    So a request that fits the narrowed document must be accepted, and any other request must be refused.
    """
    document = copy.deepcopy(make_document())
    schemas = document["components"]["schemas"]
    for name in ("EmbeddingRequest", "ExplainRequest", "ForgetRequest"):
        properties = schemas[name]["properties"]
        properties["model"] = {"enum": [model]} if name == "EmbeddingRequest" else {"enum": [None, model]}
        if "dimensions" in properties:
            properties["dimensions"] = {"enum": [None, *dimensions]}
    for name in ("ExplainRequest", "ForgetRequest", "PurgeRequest"):
        schemas[name]["properties"]["tenant"] = {"enum": [None, tenant]}
    request = schemas["EmbeddingRequest"]
    for name in ("EmbeddingRequest", "ForgetRequest"):
        schemas[name]["properties"]["input"]["anyOf"] = _leave_out_tokens(schemas[name])
    # Two fields with a task must name the same one.
    tasks = ("input_type", "task", "task_type")
    request["not"] = {
        "anyOf": [
            {"required": pair, "properties": {field: {"type": "string"} for field in pair}}
            for pair in map(list, combinations(tasks, 2))
        ]
    }
    parameter = document["paths"]["/v1/models/{model}"]["get"]["parameters"][0]
    parameter["schema"] = {"enum": [model]}
    return document


def _leave_out_tokens(schema: Mapping[str, Any]) -> list[Any]:
    """Return the kinds of input that are texts. Only some models accept token numbers."""
    return [kind for kind in schema["properties"]["input"]["anyOf"] if '"integer"' not in str(kind).replace("'", '"')]
