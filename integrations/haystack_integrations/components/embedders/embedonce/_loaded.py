"""What a folder held when its model was loaded.

Haystack's embedders of sentence-transformers share what one of them has loaded in this process, by the folder's name.
An embedder that is made after the weights have changed would get the former ones.
"""

from __future__ import annotations

import json
import sys
from typing import Any
from weakref import WeakKeyDictionary

from embedonce import SpaceError

_contents: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
"""By what Haystack has loaded: the folder's content, as the vector space has it in ``revision``."""


def load_anew(embedder: Any, content: str | None) -> None:
    """See to it that ``warm_up`` takes no model from Haystack's shared ones that is not known to be of this content."""
    if content is None or getattr(embedder, "embedding_backend", None) is not None:
        return
    name = str(embedder.model)
    for shared in _shared(embedder):
        for key, loaded in list(shared.items()):
            if (name in key or json.dumps(name)[1:-1] in key) and _contents.get(loaded) != content:
                shared.pop(key, None)


def remember(embedder: Any, content: str | None) -> None:
    """Remember what was loaded.

    Raises:
        SpaceError: it was loaded when the folder held something else.
    """
    loaded = getattr(embedder, "embedding_backend", None)
    if content is not None and loaded is not None and _contents.setdefault(loaded, content) != content:
        raise SpaceError("the embedder was warmed up before its model's folder changed: make a new embedder")


def _shared(embedder: Any) -> list[dict[str, Any]]:
    """Return Haystack's tables of loaded models, which the modules of its embedders import under one name."""
    modules = [sys.modules.get(cls.__module__) for cls in type(embedder).__mro__]
    factories = [getattr(module, "_SentenceTransformersEmbeddingBackendFactory", None) for module in modules]
    tables = [getattr(factory, "_instances", None) for factory in factories]
    return [table for table in tables if isinstance(table, dict)]
