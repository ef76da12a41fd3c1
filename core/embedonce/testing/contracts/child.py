"""What another process does for the contracts: make a plugin, use it, tell. Run by :mod:`.support`.

Reads a line with a JSON object from standard input, makes the plugin, says so with an empty line, waits for one, and
writes a JSON object to standard output. One that writes until it is killed waits for nothing, and tells after each
batch how many keys it has stored.
"""

from __future__ import annotations

import asyncio
import json
import sys
from importlib import import_module
from itertools import count
from typing import Any, NoReturn, TextIO

import numpy as np

from embedonce._plugins.options import options_of
from embedonce.contracts import Embedded
from embedonce.errors import PluginError
from embedonce.keys import VectorSpace

from .values import key, values_for

WRITE_BATCH = 20
"""Keys that a process which is to be killed stores in one call."""


def main() -> None:
    """Answer the request on standard input."""
    # What a plugin prints is no answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    request = json.loads(sys.stdin.readline())
    module, _, name = request["plugin"].partition(":")
    made: Any = import_module(module)
    for part in name.split("."):
        made = getattr(made, part)
    if "forms" in request:
        _wait(answers)
        json.dump([made(text) for text in request["forms"]], answers)
        return
    plugin = made(**_typed(made, request["options"]))
    if "scope" in request:
        _write(plugin, request, answers)
    try:
        _wait(answers)
        answer = _answer(plugin, request)
    finally:
        plugin.close()
    json.dump(answer, answers)


def _wait(answers: TextIO) -> None:
    """Say that the plugin is made, and wait until the other processes have made theirs."""
    print(file=answers, flush=True)
    sys.stdin.readline()


def _answer(plugin: Any, request: dict[str, Any]) -> dict[str, Any]:
    if "texts" in request:
        return _embed(plugin, request)
    return _add(plugin, request) if "add" in request else _store(plugin, request)


def _typed(made: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return options in the types that a plugin declares, as TOML gives them: JSON has no paths."""
    try:
        declared = options_of(made) if isinstance(made, type) else {}
    except PluginError:  # a class that TOML could not make
        declared = {}
    return {name: declared[name].check(value) if name in declared else value for name, value in options.items()}


def _write(backend: Any, request: dict[str, Any], answers: TextIO) -> NoReturn:
    """Store samples, batch after batch, and tell after each how many there are: until the process is killed.

    It tells when the next batch is made, so that it is writing while it is being killed.
    """
    values = values_for(request["holds"], request["dimensions"])
    for stored in count(0, WRITE_BATCH):
        numbers = range(stored, stored + WRITE_BATCH)
        items = {key(number, request["scope"]): values.sample(number) for number in numbers}
        if stored:
            print(stored, file=answers, flush=True)
        backend.set_many(items, None)
    raise AssertionError("unreachable")


def _store(backend: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Store a sample under each key of ``store``, one a call; say which keys of ``expect`` do not hold theirs."""
    values = values_for(request["holds"], request["dimensions"])
    for name, seed in request["store"].items():
        backend.set_many({name: values.sample(seed)}, None)
    found = backend.get_many(list(request["expect"]))
    wrong = [key for key, seed in request["expect"].items() if not values.same(found.get(key), values.sample(seed))]
    return {"wrong": wrong}


def _add(backend: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Add a lease under each key of ``add``, one a call; say which this process has stored."""
    won = [name for name in request["add"] if backend.add_many({name: b"lease"}, None)]
    return {"won": won}


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
