"""Finds out whether LlamaIndex embedded the text of a node alone.

LlamaIndex embeds a node's metadata in front of its text, except the keys in ``excluded_embed_metadata_keys``. Its
vector stores keep the node as JSON in a field called ``_node_content``.
"""

from __future__ import annotations

import json

NODE_COLUMN = "_node_content"


def is_text_alone_embedded(node: str) -> bool:
    """Tell whether the text of a node was embedded without metadata. ``node`` is JSON; False if it is not valid."""
    try:
        content = json.loads(node)
    except (ValueError, RecursionError):
        return False
    if not isinstance(content, dict):
        return False
    metadata = content.get("metadata") or {}
    excluded = content.get("excluded_embed_metadata_keys") or []
    if not isinstance(metadata, dict) or not isinstance(excluded, list):
        return False
    return all(key in excluded for key in metadata)
