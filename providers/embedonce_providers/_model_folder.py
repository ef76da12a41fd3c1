"""Read what the folder of a sentence-transformers model says about the vectors, without loading the model.

This module reads the same small files as the library: ``modules.json``, ``config_sentence_transformers.json`` and the
``config.json`` of each module. A local folder has no commit, so a digest of its content serves as its revision
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
class ModelDescription:
    """The properties of a model according to its files."""

    prompts: Mapping[str, str]
    default_prompt: str
    """Prompt for a task that has no prompt of its own."""
    dimensions: int | None
    """Number of dimensions before truncation; None if only the loaded model knows it."""
    truncate_dim: int | None
    """Number of dimensions to which the model truncates its vectors, unless an option overrides it."""
    depends_on_task: bool
    """Whether a vector may depend on the task itself and not only on the prompt for the task."""


def is_model(folder: Path) -> bool:
    return (folder / MODULES).is_file() or (folder / TRANSFORMER).is_file()


def read_description(folder: Path) -> ModelDescription:
    """Read what the model in a folder declares.

    Raises:
        SpaceError: a file cannot be read, or does not have the expected content.
    """
    config = read_json(folder, "config_sentence_transformers.json", dict) or {}
    modules = read_json(folder, MODULES, list) or []
    prompts = {str(name): text for name, text in (config.get("prompts") or {}).items() if isinstance(text, str)}
    return ModelDescription(
        prompts=prompts,
        default_prompt=prompts.get(config.get("default_prompt_name") or "", ""),
        dimensions=_find_dimensions(folder, modules),
        truncate_dim=_positive_or_none(config.get("truncate_dim")),
        depends_on_task=any(get_library_class(module) in (None, "Router", "Asym") for module in modules),
    )


def read_json(folder: Path, name: str, kind: type[Any]) -> Any:
    """Return the content of a JSON file, or None if there is no such file."""
    file = folder / name
    try:
        content = json.loads(file.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise SpaceError(f"cannot read the model's {file}: {error}") from error
    if not isinstance(content, kind):
        raise SpaceError(
            f"the model's {file} is invalid: expected a JSON {'object' if kind is dict else 'array'}, as "
            "sentence-transformers writes it; download the model again"
        )
    return content


def get_library_class(module: Any) -> str | None:
    """Return the class name of a module of the library, or None for custom code, whose effect is unknown."""
    name = module.get("type") if isinstance(module, dict) else None
    if not isinstance(name, str) or not name.startswith("sentence_transformers."):
        return None
    return name.rpartition(".")[2]


def _find_dimensions(folder: Path, modules: list[Any]) -> int | None:
    """Return the number of dimensions of the model's vectors, or None if the files do not declare the number.

    Only the last module that can change the number of dimensions is read, because that module decides the number.
    """
    for module in reversed(modules):
        kind = get_library_class(module)
        if kind in ("Normalize", "Dropout"):
            continue
        config = read_json(folder / str(module.get("path", "")), "config.json", dict) if kind else None
        if config is None:
            return None
        if kind == "Dense":
            return _positive_or_none(config.get("out_features"))
        if kind == "Pooling":
            width = _positive_or_none(config.get("embedding_dimension", config.get("word_embedding_dimension")))
            return width if _has_single_pooling_mode(config) else None
        return None
    return None


def _positive_or_none(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _has_single_pooling_mode(config: Mapping[str, Any]) -> bool:
    """Return whether a pooling module has only one mode.

    The library concatenates the vectors of several modes, so a module with several modes returns vectors with
    more dimensions.
    """
    mode = config.get("pooling_mode")
    if mode is not None:
        return isinstance(mode, str) or len(mode) == 1
    return sum(bool(value) for name, value in config.items() if name.startswith("pooling_mode_")) == 1
