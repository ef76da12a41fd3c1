"""Keep Haystack from reusing a loaded model after the files in its folder have changed.

Within a process, Haystack's sentence-transformers embedders share loaded models by the name of the folder. Without this
module, an embedder that is made after a change of the weights would use the old weights.
"""

from __future__ import annotations

import json
import sys
from typing import Any
from weakref import WeakKeyDictionary

from embedonce import SpaceError

_contents: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
"""For each loaded model, the digest of the folder that it was loaded from. The digest is also the ``revision`` in the
vector space."""


def drop_stale_models(embedder: Any, content: str | None) -> None:
    """Remove the embedder's model from Haystack's shared models, unless it was loaded from ``content``.

    After the removal, ``warm_up`` loads the model again.
    """
    if content is None or getattr(embedder, "embedding_backend", None) is not None:
        return
    name = str(embedder.model)
    for shared in _shared_tables(embedder):
        for key, loaded in list(shared.items()):
            if (name in key or json.dumps(name)[1:-1] in key) and _contents.get(loaded) != content:
                shared.pop(key, None)


def remember_content(embedder: Any, content: str | None) -> None:
    """Remember the content from which the embedder's model was loaded.

    Raises:
        SpaceError: the model was loaded from different content.
    """
    loaded = getattr(embedder, "embedding_backend", None)
    if content is not None and loaded is not None and _contents.setdefault(loaded, content) != content:
        raise SpaceError("the embedder was warmed up before its model's folder changed; make a new embedder")


def _shared_tables(embedder: Any) -> list[dict[str, Any]]:
    """Return Haystack's tables of loaded models.

    Each table belongs to a factory class. Every module with an embedder imports its factory class under the same
    name.
    """
    modules = [sys.modules.get(cls.__module__) for cls in type(embedder).__mro__]
    factories = [getattr(module, "_SentenceTransformersEmbeddingBackendFactory", None) for module in modules]
    tables = [getattr(factory, "_instances", None) for factory in factories]
    return [table for table in tables if isinstance(table, dict)]
