"""Finds the texts of LlamaIndex that were embedded without metadata.

LlamaIndex embeds a node's metadata in front of its text, except the keys in ``excluded_embed_metadata_keys``. Its
vector stores keep the node as JSON in a field called ``_node_content``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

NODE_COLUMN = "_node_content"


def is_text_alone_embedded(node: str) -> bool:
    """Tell whether the text of a node was embedded without metadata. ``node`` is JSON; False if it is not valid."""
    content = _parse(node)
    return content is not None and _has_no_embedded_metadata(content)


def read_text(node: str) -> str | None:
    """Return the text of a node; None if it was embedded together with metadata, or if the node has no text."""
    content = _parse(node)
    if content is None or not _has_no_embedded_metadata(content):
        return None
    text = content.get("text")
    return text if isinstance(text, str) else None


def _parse(node: str) -> Mapping[str, Any] | None:
    try:
        content = json.loads(node)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _has_no_embedded_metadata(content: Mapping[str, Any]) -> bool:
    metadata = content.get("metadata") or {}
    excluded = content.get("excluded_embed_metadata_keys") or []
    if not isinstance(metadata, dict) or not isinstance(excluded, list):
        return False
    return all(key in excluded for key in metadata)
