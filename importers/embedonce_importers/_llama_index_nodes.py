"""Rebuilds the text that LlamaIndex embedded for a node.

LlamaIndex embeds ``node.get_content(metadata_mode=MetadataMode.EMBED)``: the text of the node and those of its metadata
that are not excluded, put together with three templates of the node. A node is stored as JSON, and this module makes
the content from it without LlamaIndex. It refuses a node if the stored JSON does not determine the content.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Mapping
from typing import Final, TypeAlias, TypeVar

from ._json_stores import JsonReader, decode_string

T = TypeVar("T")

Fields: TypeAlias = Mapping[str, bytes]
"""Fields of a stored node by name, as JSON. Empty if the stored value is not a node."""

CLASSES: Final = {"TextNode": "1", "IndexNode": "3", "Document": "4", "Node": "5"}
"""The classes whose content is known, with the type under which LlamaIndex stores them."""
IMAGES: Final = frozenset({"ImageNode", "ImageDocument"})

_NEEDED: Final = frozenset(
    {"embedding", "metadata", "excluded_embed_metadata_keys", "metadata_template", "metadata_separator"}
    | {"text_template", "class_name", "id_"}
)
_OTHER_MEDIA: Final = ("image_resource", "audio_resource", "video_resource")
_WANTED: Final = _NEEDED | {"text", "text_resource", *_OTHER_MEDIA}

ANOTHER_VERSION: Final = "nodes that another version of LlamaIndex or another program has stored"


def read_nodes(reader: JsonReader) -> Iterator[Fields]:
    """Yield the fields of each node of an entry of the ingestion cache. The reader is in front of the entry.

    Raises:
        ValueError: the entry is not valid JSON.
    """
    if reader.peek() != b"{":
        reader.skip()
        yield {}
        return
    has_nodes = False
    for name in reader.members():
        if name != b'"nodes"' or reader.peek() != b"[":
            reader.skip()
            continue
        has_nodes = True
        for _ in reader.elements():
            yield _read_node(reader)
    if not has_nodes:
        yield {}


def rebuild_content(fields: Fields) -> str:
    """Return the text that was embedded for a node.

    Raises:
        ValueError: the text is not known. The message is a short reason to be counted.
    """
    name = _parse(fields, "class_name", str)
    if name in IMAGES:
        raise ValueError("image nodes, because the image may have been embedded and not the text")
    if CLASSES.get(name) != _parse(fields, "__type__", str):
        raise ValueError("nodes of other classes than TextNode, IndexNode, Node and Document")
    if not fields.keys() >= _NEEDED:
        raise ValueError(ANOTHER_VERSION)
    metadata = _join_metadata(fields)
    if name in ("TextNode", "IndexNode"):
        text = _parse(fields, "text", str)
        metadata = metadata.strip()
    else:
        text = _find_text_of_resource(fields)
    if not metadata:
        return text
    template = _parse(fields, "text_template", str)
    return _fill_template(template, {"content": text, "metadata_str": metadata}).strip()


def _read_node(reader: JsonReader) -> Fields:
    if reader.peek() != b"{":
        reader.skip()
        return {}
    fields: dict[str, bytes] = {}
    for name in reader.members():
        if name == b'"__type__"':
            fields["__type__"] = reader.read()
        elif name == b'"__data__"' and reader.peek() == b"{":
            for field in reader.members():
                key = decode_string(field)
                if key in _WANTED:
                    fields[key] = reader.read()
                else:
                    reader.skip()
        else:
            reader.skip()
    return fields


def _join_metadata(fields: Fields) -> str:
    metadata = _parse(fields, "metadata", dict)
    excluded = _parse(fields, "excluded_embed_metadata_keys", list)
    template = _parse(fields, "metadata_template", str)
    parts: list[str] = []
    for key, value in metadata.items():
        if key in excluded:
            continue
        # LlamaIndex embeds str(value). A list in JSON may have been a tuple, whose str is another one.
        if value is not None and not isinstance(value, str | int | float):
            raise ValueError("nodes whose embedded metadata has lists or objects")
        parts.append(_fill_template(template, {"key": key, "value": str(value)}))
    return _parse(fields, "metadata_separator", str).join(parts)


def _find_text_of_resource(fields: Fields) -> str:
    for name in _OTHER_MEDIA:
        if fields.get(name, b"null") != b"null":
            raise ValueError("nodes with an image, a sound or a video")
    resource = _parse(fields, "text_resource", dict)
    text = resource.get("text")
    if not isinstance(text, str):
        raise ValueError("nodes without a text")
    return text


def _fill_template(template: str, values: Mapping[str, str]) -> str:
    """Return the template with its fields replaced, as ``str.format`` does it for plain fields.

    ``str.format`` itself would read attributes of objects if the template says so, and the template comes from a file.
    """
    parts: list[str] = []
    try:
        for literal, name, form, conversion in string.Formatter().parse(template):
            parts.append(literal)
            if name is None:
                continue
            if form or conversion:
                raise ValueError
            parts.append(values[name])
    except (ValueError, KeyError):
        raise ValueError("nodes with a template that has other fields than LlamaIndex's own, or formats") from None
    return "".join(parts)


def _parse(fields: Fields, name: str, kind: type[T]) -> T:
    """Return a field, which must be of the type ``kind``.

    Raises:
        ValueError: it is missing, of another type or not valid JSON.
    """
    try:
        value = json.loads(fields[name])
    except (KeyError, ValueError, RecursionError):
        raise ValueError(ANOTHER_VERSION) from None
    if not isinstance(value, kind):
        raise ValueError(ANOTHER_VERSION)
    return value
