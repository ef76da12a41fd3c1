"""Find the commit of a model on the Hugging Face hub, and the folder with the model's small files.

This module reads the local cache of ``huggingface_hub`` directly, in its documented layout: ``refs/<revision>`` holds a
commit, ``snapshots/<commit>`` holds the commit's files, and ``.no_exist/<commit>`` holds the names of files that the
commit does not have. Importing the hub's client takes 0.4 s, so the client is imported only to download a model that
is not in the local cache.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from embedonce.errors import SpaceError

from ._model_folder import MODULES, TRANSFORMER, is_model

SMALL_FILES: Final = (MODULES, TRANSFORMER, "config_sentence_transformers.json", "*/config.json", "*_config.json")
"""Patterns of all files that affect vectors, except weights and tokenizer. Every download includes all of them, because
the library does not report a missing file."""
COMMIT: Final = re.compile(r"[0-9a-f]{40}")
NAME: Final = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
OWNER: Final = "sentence-transformers"


def full_name(model: str) -> str:
    """Return ``owner/name``. If ``model`` has no owner, the owner is ``sentence-transformers``, as in the library.

    Raises:
        SpaceError: ``model`` is not a valid name of a model.
    """
    if not NAME.fullmatch(model) or ".." in model:
        raise SpaceError(
            f"model {model!r} is neither a folder that exists nor a valid name on the Hugging Face hub; "
            'a valid name looks like "sentence-transformers/all-MiniLM-L6-v2"'
        )
    return model if "/" in model else f"{OWNER}/{model}"


def find_snapshot(name: str, revision: str | None) -> tuple[str, Path]:
    """Return the commit of a model's revision, and a folder that has at least the model's small files.

    If ``revision`` is a branch or a tag, the local cache may have recorded a commit for it. That commit is used, even
    if the hub has a newer one. The hub is asked only if the local cache does not have the revision.

    Raises:
        SpaceError: the model is not in the local cache, and the hub did not answer or does not have the model.
    """
    revision = revision or "main"
    local = _find_local(name, revision)
    if local is not None:
        return local
    folder = _download_small_files(name, revision)
    return folder.name, folder


def cache_folder() -> Path:
    """Return the folder in which the library keeps models from the hub."""
    from huggingface_hub import constants

    return Path(os.environ.get("SENTENCE_TRANSFORMERS_HOME") or constants.HF_HUB_CACHE).expanduser()


def _find_local(name: str, revision: str) -> tuple[str, Path] | None:
    folder = cache_folder() / f"models--{name.replace('/', '--')}"
    commit = revision
    if not COMMIT.fullmatch(commit):
        ref = folder / "refs" / revision
        if not ref.resolve().is_relative_to((folder / "refs").resolve()):
            raise SpaceError("revision must be a branch, a tag or a commit")
        try:
            commit = ref.read_text("utf-8").strip()
        except (OSError, ValueError):
            return None
    files = folder / "snapshots" / commit
    is_complete = (files / MODULES).is_file() or (folder / ".no_exist" / commit / MODULES).is_file()
    return (commit, files) if is_complete and COMMIT.fullmatch(commit) else None


def _download_small_files(name: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(name, revision=revision, cache_dir=cache_folder(), allow_patterns=list(SMALL_FILES))
        )
    except Exception as error:
        raise SpaceError(
            f"model {name!r}, revision {revision!r}, is not in the local cache of Hugging Face models "
            f"({cache_folder()}) and could not be downloaded from the hub ({type(error).__name__}). Check the name. "
            f"Then go online and run `hf download {name}`, or set model to a folder that holds the model"
        ) from error
    if not COMMIT.fullmatch(folder.name) or not is_model(folder):
        raise SpaceError(
            f"model {name!r}, revision {revision!r}, has neither {MODULES} nor {TRANSFORMER}, so "
            "sentence-transformers cannot load it; check the name"
        )
    return folder
