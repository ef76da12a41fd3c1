"""What a sentence-transformers model's folder says of its vectors, without loading it.

The same small files are read that the library reads: ``modules.json``, ``config_sentence_transformers.json`` and
the ``config.json`` of its modules. A folder of one's own has no commit: its content is its revision (:func:`digest`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import platformdirs

from embedonce.errors import SpaceError
from embedonce.keys import canonical

MODULES: Final = "modules.json"
TRANSFORMER: Final = "config.json"

OF_OTHERS: Final = frozenset({".h5", ".md", ".msgpack", ".onnx", ".ot"})
"""Suffixes of files from which PyTorch makes no vector: documents, and weights of other frameworks."""
FOLDERS_OF_OTHERS: Final = frozenset({"__pycache__", "onnx", "openvino"})

SMALL: Final = 1 << 20
"""Bytes up to which a file is hashed each time; what a larger one gave is remembered."""
SETTLED: Final = 10.0
"""Seconds after a file's last change from which its digest is remembered: within a tick of the file system's clock,
a second change leaves no trace in its times."""
REMEMBERED: Final = 1000


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


# --- content ----------------------------------------------------------------------------------


def digest(folder: Path) -> str:
    """Return the SHA-256, in hex, of what decides the vectors of the model in a folder.

    It is taken over the relative name and the SHA-256 of every file, except hidden ones and those of
    :data:`OF_OTHERS` and :data:`FOLDERS_OF_OTHERS`: where the folder lies and how old it is changes nothing.

    Raises:
        SpaceError: a file cannot be read.
    """
    memo = _Memo()
    try:
        files = {file.relative_to(folder).as_posix(): memo.sha256(file) for file in _files(folder)}
    except OSError as error:
        raise SpaceError(f"the model's folder cannot be read: {error}") from error
    memo.save()
    return hashlib.sha256(b"embedonce/model-folder/1" + canonical(files)).hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    seen = set()
    for where, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        real = os.path.realpath(where)
        folders[:] = sorted(name for name in folders if name not in FOLDERS_OF_OTHERS and not name.startswith("."))
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() not in OF_OTHERS:
                yield Path(where, name)


def _raise(error: OSError) -> None:
    raise error


class _Memo:
    """Digests of large files, by what changes whenever their content does; a file of the user's cache folder.

    Hashing 90 MB takes 0.2 s and 2 GB several seconds, which a warm start must not pay each time.
    """

    def __init__(self) -> None:
        self._file = platformdirs.user_cache_path("embedonce", appauthor=False) / "model-files.json"
        self._known: dict[str, str] | None = None
        self._new: dict[str, str] = {}

    def sha256(self, file: Path) -> str:
        with file.open("rb") as stream:
            before = os.fstat(stream.fileno())
            identity = _identity(before)
            known = self._read().get(identity) if before.st_size > SMALL else None
            if known is not None:
                return known
            made = hashlib.file_digest(stream, "sha256").hexdigest()
            settled = time.time() - max(before.st_ctime, before.st_mtime) > SETTLED
            if before.st_size > SMALL and settled and _identity(os.fstat(stream.fileno())) == identity:
                self._new[identity] = made
            return made

    def _read(self) -> dict[str, str]:
        if self._known is None:
            self._known = {}
            with contextlib.suppress(OSError, ValueError):  # what is lost is worked out again
                content = json.loads(self._file.read_text("utf-8"))
                self._known = {key: value for key, value in content.items() if isinstance(value, str)}
        return self._known

    def save(self) -> None:
        if not self._new:
            return
        kept = list((self._read() | self._new).items())[-REMEMBERED:]
        own = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        with contextlib.suppress(OSError):  # a cache folder that cannot be written costs time, and nothing else
            self._file.parent.mkdir(parents=True, exist_ok=True)
            own.write_text(json.dumps(dict(kept)), "utf-8")
            own.replace(self._file)


def _identity(stat: os.stat_result) -> str:
    """Name a state of a file: the time of its last change (ctime) is the system's own, nobody can set it."""
    return f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
