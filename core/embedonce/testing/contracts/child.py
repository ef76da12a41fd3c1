"""The program of the child processes that the contracts use. :mod:`.support` starts each child.

A child reads its request, one line of JSON, from standard input, and makes the plugin. Then the child writes an empty
line to standard output, and waits. When all children are ready, the parent sends an empty line to each child, so that
all children begin at the same moment. At the end, each child writes its answer as JSON.

There is one exception: a request with a ``scope`` asks the child to store keys until it is killed. The child then does
not wait. After each batch, it writes the number of keys that it has stored so far.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterable
from importlib import import_module
from itertools import count
from typing import Any, NoReturn, TextIO

import numpy as np

from embedonce._plugins.options import options_of
from embedonce.contracts import Embedded, FoundVectors
from embedonce.errors import PluginError
from embedonce.keys import VectorSpace

from .support import Recipe, encode_options
from .values import key, make_values

WRITE_BATCH = 20
"""Number of keys in each call of a child that stores keys until it is killed."""


def main() -> None:
    """Read the request from standard input, and answer it on standard output."""
    # A plugin may print, and its output must not mix with the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    request = json.loads(sys.stdin.readline())
    module, _, name = request["plugin"].partition(":")
    made: Any = import_module(module)
    for part in name.split("."):
        made = getattr(made, part)
    if "forms" in request:
        _wait_for_start(answers)
        json.dump([made(text) for text in request["forms"]], answers)
        return
    plugin = made(**_convert_options(made, request["options"]))
    if "scope" in request:
        _write_until_killed(plugin, request, answers)
    try:
        _wait_for_start(answers)
        answer = _handle_request(plugin, request)
    finally:
        plugin.close()
    json.dump(answer, answers)


def _wait_for_start(answers: TextIO) -> None:
    """Report that the plugin is made, and wait until the other processes have made their plugins."""
    print(file=answers, flush=True)
    sys.stdin.readline()


def _handle_request(plugin: Any, request: dict[str, Any]) -> dict[str, Any]:
    if "texts" in request:
        return _embed(plugin, request)
    if "lookup" in request:
        return _find(plugin, request)
    return _add(plugin, request) if "add" in request else _store_and_check(plugin, request)


def _convert_options(made: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Convert options to the types that the plugin declares, because JSON cannot represent a path."""
    try:
        declared = options_of(made) if isinstance(made, type) else {}
    except PluginError:  # TOML cannot express the arguments of this class, so no argument is converted
        declared = {}
    return {name: declared[name].check(value) if name in declared else value for name, value in options.items()}


def make_from_recipe(recipe: Recipe) -> Any:
    """Make the plugin of a recipe in this process, with the same options as in another process."""
    return recipe.plugin(**_convert_options(recipe.plugin, json.loads(encode_options(recipe))))


def _write_until_killed(backend: Any, request: dict[str, Any], answers: TextIO) -> NoReturn:
    """Store batches of samples until the process is killed. After each batch, write the number of keys stored so far.

    The number is written after the samples of the next batch are made, and directly before they are stored. So the kill
    most likely interrupts a call of ``set_many``.
    """
    values = make_values(request["holds"], request["dimensions"])
    for stored in count(0, WRITE_BATCH):
        numbers = range(stored, stored + WRITE_BATCH)
        items = {key(number, request["scope"]): values.sample(number) for number in numbers}
        if stored:
            print(stored, file=answers, flush=True)
        backend.set_many(items, None)
    raise AssertionError("unreachable")


def _store_and_check(backend: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Store a sample under each key of ``store``, one key per call.

    Return the keys of ``expect`` for which the backend returns a wrong value.
    """
    values = make_values(request["holds"], request["dimensions"])
    for name, seed in request["store"].items():
        backend.set_many({name: values.sample(seed)}, None)
    found = backend.get_many(list(request["expect"]))
    wrong = [key for key, seed in request["expect"].items() if not values.is_equal(found.get(key), values.sample(seed))]
    return {"wrong": wrong}


def _add(backend: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Add a lease under each key of ``add``, one key per call. Return the keys that this process added."""
    won = [name for name in request["add"] if backend.add_many({name: b"lease"}, None)]
    return {"won": won}


def _embed(provider: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Return, for each task, the fingerprint of the space and the vectors of the texts (as lists of floats)."""
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


def _find(importer: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Return the name of the source, and the texts and vectors that ``lookup`` and ``scan`` find."""
    answer: dict[str, Any] = {"source": importer.source.name}
    if request["lookup"]:
        answer["lookup"] = _list_found([importer.lookup(request["lookup"])])
    if request["scan"]:
        answer["scan"] = _list_found(importer.scan())
    return answer


def _list_found(parts: Iterable[FoundVectors]) -> list[tuple[str, list[float]]]:
    return [
        (text, np.asarray(row, np.float32).tolist())
        for part in parts
        for text, row in zip(part.texts, part.vectors, strict=True)
    ]


if __name__ == "__main__":
    main()
