"""What a sentence-transformers model's folder says of its vectors, without loading it.

The same small files are read that the library reads: ``modules.json``, ``config_sentence_transformers.json`` and
the ``config.json`` of its modules. A folder of one's own has no commit: its content is its revision
(:func:`embedonce.model_files.digest`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from embedonce.errors import SpaceError

MODULES: Final = "modules.json"
TRANSFORMER: Final = "config.json"


@dataclass(frozen=True, slots=True)
class Declared:
    """What a model's files say of it."""

    prompts: Mapping[str, str]
    default_prompt: str
    """Of a task for which the model has none of its own."""
    dimensions: int | None
    """Of whole vectors; None where only the loaded model can tell."""
    truncate_dim: int | None
    """To how many values the model cuts its vectors, unless an option says otherwise."""
    routed: bool
    """True: the task itself may change the vector, not the prompt alone."""


def is_model(folder: Path) -> bool:
    return (folder / MODULES).is_file() or (folder / TRANSFORMER).is_file()


def declared(folder: Path) -> Declared:
    """Read what the model in a folder declares.

    Raises:
        SpaceError: a file is there and is not what it should be.
    """
    config = _read(folder, "config_sentence_transformers.json", dict) or {}
    modules = _read(folder, MODULES, list) or []
    prompts = {str(name): text for name, text in (config.get("prompts") or {}).items() if isinstance(text, str)}
    return Declared(
        prompts=prompts,
        default_prompt=prompts.get(config.get("default_prompt_name") or "", ""),
        dimensions=_dimensions(folder, modules),
        truncate_dim=_positive(config.get("truncate_dim")),
        routed=any(_kind(module) in (None, "Router", "Asym") for module in modules),
    )


def _read(folder: Path, name: str, kind: type[Any]) -> Any:
    """Return a JSON file's content, or None where there is no such file."""
    file = folder / name
    try:
        content = json.loads(file.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise SpaceError(f"the model's {file} cannot be read: {error}") from error
    if not isinstance(content, kind):
        raise SpaceError(f"the model's {file} is not what sentence-transformers writes there")
    return content


def _kind(module: Any) -> str | None:
    """Return the class of a module of the library's own, or None: code of a model's own may do anything."""
    name = module.get("type") if isinstance(module, dict) else None
    if not isinstance(name, str) or not name.startswith("sentence_transformers."):
        return None
    return name.rpartition(".")[2]


def _dimensions(folder: Path, modules: list[Any]) -> int | None:
    """Return what the last module that changes the length of vectors makes of it, where its file says so."""
    for module in reversed(modules):
        kind = _kind(module)
        if kind in ("Normalize", "Dropout"):
            continue
        config = _read(folder / str(module.get("path", "")), "config.json", dict) if kind else None
        if config is None:
            return None
        if kind == "Dense":
            return _positive(config.get("out_features"))
        if kind == "Pooling":
            width = _positive(config.get("embedding_dimension", config.get("word_embedding_dimension")))
            return width if _one_way_of_pooling(config) else None
        return None
    return None


def _positive(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _one_way_of_pooling(config: Mapping[str, Any]) -> bool:
    """Say whether there is one: the results of several are laid end to end."""
    mode = config.get("pooling_mode")
    if mode is not None:
        return isinstance(mode, str) or len(mode) == 1
    return sum(bool(value) for name, value in config.items() if name.startswith("pooling_mode_")) == 1
