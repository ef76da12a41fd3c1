"""A model of the Hugging Face hub: which commit is meant, and where its small files lie.

The local cache of ``huggingface_hub`` is read directly, in the layout that its documentation gives: ``refs/<revision>``
holds a commit, ``snapshots/<commit>`` its files, and ``.no_exist/<commit>`` the names of files that it does not have.
Importing the client costs 0.4 s, and so only what is not there asks the hub, once.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from embedonce.errors import SpaceError

from ._model_folder import MODULES, TRANSFORMER, is_model

SMALL_FILES: Final = (MODULES, TRANSFORMER, "config_sentence_transformers.json", "*/config.json", "*_config.json")
"""All that decides vectors beside weights and tokenizer: the library goes on silently without one that it misses."""
COMMIT: Final = re.compile(r"[0-9a-f]{40}")
NAME: Final = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
OWNER: Final = "sentence-transformers"


def full_name(model: str) -> str:
    """Return ``owner/name``; a name alone is a model of the library's own makers, as it is for the library.

    Raises:
        SpaceError: it cannot be the name of a model.
    """
    if not NAME.fullmatch(model) or ".." in model:
        raise SpaceError(
            f"there is no folder {model!r}, and it cannot be the name of a model on the Hugging Face hub, "
            'such as "sentence-transformers/all-MiniLM-L6-v2"'
        )
    return model if "/" in model else f"{OWNER}/{model}"


def snapshot(name: str, revision: str | None) -> tuple[str, Path]:
    """Return the commit of a model's revision and the folder with at least its small files.

    A moving revision is the commit that the local cache has for it.

    Raises:
        SpaceError: it is not in the local cache, and the hub did not answer or does not have it.
    """
    revision = revision or "main"
    local = _local(name, revision)
    if local is not None:
        return local
    folder = _fetched(name, revision)
    return folder.name, folder


def cache_folder() -> Path:
    """Return where the library keeps models of the hub."""
    from huggingface_hub import constants

    return Path(os.environ.get("SENTENCE_TRANSFORMERS_HOME") or constants.HF_HUB_CACHE).expanduser()


def _local(name: str, revision: str) -> tuple[str, Path] | None:
    folder = cache_folder() / f"models--{name.replace('/', '--')}"
    commit = revision
    if not COMMIT.fullmatch(commit):
        ref = folder / "refs" / revision
        if not ref.resolve().is_relative_to((folder / "refs").resolve()):
            raise SpaceError("revision is a branch, a tag or a commit")
        try:
            commit = ref.read_text("utf-8").strip()
        except (OSError, ValueError):
            return None
    files = folder / "snapshots" / commit
    known = (files / MODULES).is_file() or (folder / ".no_exist" / commit / MODULES).is_file()
    return (commit, files) if known and COMMIT.fullmatch(commit) else None


def _fetched(name: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(name, revision=revision, cache_dir=cache_folder(), allow_patterns=list(SMALL_FILES))
        )
    except Exception as error:
        raise SpaceError(
            f"model {name!r}, revision {revision!r}, is not in the local cache of Hugging Face models "
            f"({cache_folder()}), and the hub did not help ({type(error).__name__}). Check the name, be online once, "
            f"download it (hf download {name}), or name a folder that holds the model"
        ) from error
    if not COMMIT.fullmatch(folder.name) or not is_model(folder):
        raise SpaceError(f"model {name!r}, revision {revision!r}, has no {MODULES} and no {TRANSFORMER}")
    return folder
