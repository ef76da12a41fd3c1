"""What another process does for the contracts: make a plugin, use it, tell. Run by :mod:`._support`.

Reads one JSON object from standard input and writes one to standard output.
"""

from __future__ import annotations

import asyncio
import json
import sys
from importlib import import_module
from typing import Any

import numpy as np

from embedonce.contracts import Embedded
from embedonce.keys import VectorSpace

from ._values import values_for


def main() -> None:
    """Answer the request on standard input."""
    request = json.load(sys.stdin)
    module, _, name = request["plugin"].partition(":")
    made: Any = import_module(module)
    for part in name.split("."):
        made = getattr(made, part)
    plugin = made(**request["options"])
    try:
        answer = _embed(plugin, request) if "texts" in request else _store(plugin, request)
    finally:
        plugin.close()
    json.dump(answer, sys.stdout)


def _store(backend: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Store a sample under each key of ``store``; say which keys of ``expect`` do not hold theirs."""
    values = values_for(backend, request["dimensions"])
    backend.set_many({key: values.sample(seed) for key, seed in request["store"].items()}, None)
    found = backend.get_many(list(request["expect"]))
    wrong = [key for key, seed in request["expect"].items() if not values.same(found.get(key), values.sample(seed))]
    return {"wrong": wrong}


def _embed(provider: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Return, by task, the fingerprint of the space and the vectors of the texts as lists of floats."""
    answer = {}
    for task in request["tasks"]:
        space: VectorSpace = provider.space(task)
        if hasattr(provider, "embed"):
            given = provider.embed(request["texts"], task)
        else:
            given = asyncio.run(provider.aembed(request["texts"], task))
        vectors = np.asarray(given.vectors if isinstance(given, Embedded) else given, np.float32)
        answer[task] = {"fingerprint": space.fingerprint().hex(), "vectors": vectors.tolist()}
    return answer


if __name__ == "__main__":
    main()
