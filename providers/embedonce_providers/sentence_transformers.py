"""The ``sentence-transformers`` provider: models that run in this process.

The vector space is read from small files (:mod:`._model_folder`, :mod:`._hub_cache`); torch, the library and the
weights are loaded at the first text that is in no tier.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import numpy as np
from annotated_types import Gt, MinLen
from numpy.typing import NDArray

from embedonce import Limits, TextRefused, VectorSpace, hookimpl
from embedonce.contracts import Task
from embedonce.errors import ConfigError, SpaceError
from embedonce.model_files import digest
from embedonce.options import Doc

from ._hub_cache import full_name, snapshot
from ._model_folder import Declared, declared, is_model

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

api = 1

if importlib.util.find_spec("sentence_transformers") is None:  # say so at the start, not at the first miss
    raise ModuleNotFoundError("No module named 'sentence_transformers'", name="sentence_transformers")

BATCHES: Final = 16
"""Batches of the model in one call: it sorts the texts of a call by length, and pads less the more there are."""


class SentenceTransformersProvider:
    """Embeds texts with a model of the sentence-transformers library, in this process."""

    def __init__(
        self,
        *,
        model: Annotated[str, MinLen(1), Doc("A folder, or a model of the Hugging Face hub by its name: owner/name.")],
        revision: Annotated[
            str | None, Doc("Branch, tag or commit on the hub; one that moves is the commit in the local cache.")
        ] = None,
        device: Annotated[str | None, Doc('"cpu", "cuda", "cuda:1", "mps"; the fastest there is, if left out.')] = None,
        batch_size: Annotated[int, Gt(0), Doc("Texts that go through the model at once.")] = 32,
        dtype: Annotated[
            Literal["auto", "float32", "float16", "bfloat16"],
            Doc('Precision of the weights; "auto" is the one that they were saved in.'),
        ] = "auto",
        truncate_dim: Annotated[int | None, Gt(0), Doc("Keep the first values of each vector only.")] = None,
        normalize_embeddings: Annotated[bool, Doc("Scale each vector to length 1.")] = False,
        query_prompt: Annotated[str | None, Doc("Put before each query; the model's own, if left out.")] = None,
        document_prompt: Annotated[str | None, Doc("Put before each document; the model's own, if left out.")] = None,
        query_prompt_name: Annotated[str | None, Doc("One of the model's prompts, for queries.")] = None,
        document_prompt_name: Annotated[str | None, Doc("One of the model's prompts, for documents.")] = None,
        max_length: Annotated[int | None, Gt(0), Doc("Most tokens of a text; the model's own, if left out.")] = None,
        truncate: Annotated[
            Literal["provider", "error"],
            Doc('Texts that are too long: "provider" cuts them, "error" refuses them.'),
        ] = "provider",
        trust_remote_code: Annotated[bool, Doc("Run Python code that comes with the model.")] = False,
    ) -> None:
        if not model:
            raise ConfigError("model is empty; it is a folder, or a model of the Hugging Face hub")
        for name, number in (("batch_size", batch_size), ("truncate_dim", truncate_dim), ("max_length", max_length)):
            if number is not None and number < 1:
                raise ConfigError(f"{name} is at least 1, not {number}")
        for task, text, named in (
            ("query", query_prompt, query_prompt_name),
            ("document", document_prompt, document_prompt_name),
        ):
            if text is not None and named is not None:
                raise ConfigError(
                    f"{task}_prompt is a prompt and {task}_prompt_name names one of the model's: give one"
                )
        self.limits = Limits(max_batch=batch_size * BATCHES)
        self._model_name = os.fspath(model)
        self._revision = revision
        self._device = device
        self._batch_size = batch_size
        self._dtype = dtype
        self._truncate_dim = truncate_dim
        self._normalize = normalize_embeddings
        self._texts: Mapping[str, str | None] = {"query": query_prompt, "document": document_prompt}
        self._names: Mapping[str, str | None] = {"query": query_prompt_name, "document": document_prompt_name}
        self._max_length = max_length
        self._truncate = truncate
        self._trust_remote_code = trust_remote_code
        self._described: _Described | None = None
        self._model: SentenceTransformer | None = None
        self._lock = threading.RLock()
        self._forked = False
        _all.add(self)

    # --- the vector space ---------------------------------------------------------------------

    def space(self, task: Task) -> VectorSpace:
        """Describe the vectors of a task from the model's small files.

        Raises:
            SpaceError: there is no such model, or no such prompt.
        """
        found = self._describe()
        files = found.files
        dimensions, cut = files.dimensions, self._truncate_dim or files.truncate_dim
        if dimensions is not None and cut is not None:
            dimensions, cut = min(dimensions, cut), None
        extra = {"truncate_dim": cut, "trust_remote_code": self._trust_remote_code or None}
        return VectorSpace(
            provider="sentence-transformers",
            model=found.model,
            revision=found.revision,
            task=task if files.routed else None,
            precision=None if self._dtype == "auto" else self._dtype,
            dimensions=dimensions,
            max_length=self._max_length,
            truncate=self._truncate,
            prompt=self._prompt(task) or None,
            normalize=self._normalize or None,
            extra={name: value for name, value in extra.items() if value is not None} or None,
        )

    def _describe(self) -> _Described:
        if self._described is None:
            self._described = self._found()
        return self._described

    def _found(self) -> _Described:
        folder = Path(self._model_name).expanduser()
        if not folder.is_dir():
            name = full_name(self._model_name)
            commit, folder = snapshot(name, self._revision)
            return _Described(model=name, revision=commit, folder=folder, on_hub=True, files=declared(folder))
        if self._revision is not None:
            raise SpaceError("a folder has no revision: its content decides; leave revision out")
        if not is_model(folder):
            raise SpaceError(f"{folder} holds no model: it has no modules.json and no config.json")
        folder = folder.absolute()
        content = digest(folder, pytorch=True)
        return _Described(
            model=f"folder:{content[:12]}", revision=content, folder=folder, on_hub=False, files=declared(folder)
        )

    def _prompt(self, task: Task) -> str:
        """Return what is put before each text of a task, "" where nothing is."""
        files = self._describe().files
        text, name = self._texts.get(task), self._names.get(task)
        if text is not None:
            return text
        if name is not None:
            if name not in files.prompts:
                known = ", ".join(sorted(files.prompts)) or "none"
                raise SpaceError(f"the model has no prompt named {name!r}; its prompts: {known}")
            return files.prompts[name]
        # As encode_query and encode_document choose. They are never without a prompt of their name: it is "" then.
        return files.prompts.get(task, "" if task in self._texts else files.default_prompt)

    # --- vectors ------------------------------------------------------------------------------

    def embed(self, texts: Sequence[str], task: Task) -> NDArray[np.floating[Any]]:
        """Return shape (n, dimensions), the dtype that the model gives, mostly float32.

        Raises:
            TextRefused: a text is too long, where ``truncate = "error"``, or has nothing that the model knows.
        """
        prompt = self._prompt(task)
        # One call at a time: torch uses every core for one, and tokenizers must not be used by two threads at once.
        with self._lock:
            model = self._loaded()
            if self._truncate == "error":
                _refuse_long(model, [prompt + text for text in texts])
            encode = {"query": model.encode_query, "document": model.encode_document}.get(task, model.encode)
            # An empty prompt, not None: that would be the model's default one.
            vectors: NDArray[np.floating[Any]] = encode(
                list(texts),
                prompt=prompt,
                batch_size=self._batch_size,
                normalize_embeddings=self._normalize,
                show_progress_bar=False,
            )
        nothing = np.flatnonzero(~vectors.any(axis=1))
        if nothing.size:
            raise TextRefused("a text has nothing that the model knows", nothing.tolist())
        return vectors

    def close(self) -> None:
        """Let go of the model's memory."""
        with self._lock:
            self._model = None

    def _loaded(self) -> SentenceTransformer:
        if self._forked:
            # The threads of OpenMP stayed with the parent, and a child that uses them waits for ever. Without them
            # the child computes, on one core.
            sys.modules["torch"].set_num_threads(1)
            self._forked = False
        if self._model is None:
            self._model = self._load()
        return self._model

    def _load(self) -> SentenceTransformer:
        found = self._describe()
        cls, dtype_option = _imported()
        options: dict[str, Any] = {
            "device": self._device,
            "trust_remote_code": self._trust_remote_code,
            "truncate_dim": self._truncate_dim,
            "model_kwargs": {dtype_option: self._dtype},
        }
        if not found.on_hub:
            model = cls(str(found.folder), local_files_only=True, **options)
            if digest(found.folder, pytorch=True) != found.revision:
                raise SpaceError(f"the model in {found.folder} has changed since the cache was opened; open it again")
        else:
            model = _of_hub(cls, found, options)
        if self._max_length is not None:
            model.max_seq_length = self._max_length
        return model

    def _after_fork_in_child(self) -> None:
        self._lock = threading.RLock()
        self._forked = "torch" in sys.modules


class _Described:
    """Which model is meant, and what its files say."""

    __slots__ = ("files", "folder", "model", "on_hub", "revision")

    def __init__(self, *, model: str, revision: str, folder: Path, on_hub: bool, files: Declared) -> None:
        self.model = model
        self.revision = revision
        self.folder = folder
        self.on_hub = on_hub
        self.files = files


def _imported() -> tuple[type[SentenceTransformer], str]:
    """Return the library's class, and what transformers calls the option for the weights' dtype.

    In a thread of its own, which Ctrl-C does not reach: torch cannot be imported again in a process in which its
    import was broken off.
    """
    found: list[tuple[type[SentenceTransformer], str]] = []
    failed: list[BaseException] = []

    def load() -> None:
        try:
            from sentence_transformers import SentenceTransformer

            older = int(importlib.metadata.version("transformers").split(".")[0]) < 5
            found.append((SentenceTransformer, "torch_dtype" if older else "dtype"))
        except BaseException as error:  # noqa: BLE001  (raised below, in the thread that asked)
            failed.append(error)

    thread = threading.Thread(target=load, name="embedonce-import")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]


def _of_hub(cls: type[SentenceTransformer], found: _Described, options: Mapping[str, Any]) -> SentenceTransformer:
    """Load a commit: without the network where the local cache has it all."""
    weights = any(found.folder.rglob("*.safetensors")) or any(found.folder.rglob("pytorch_model*.bin"))
    if weights:
        try:
            return cls(found.model, revision=found.revision, local_files_only=True, **options)
        except OSError:  # some file of it is missing
            pass
    return cls(found.model, revision=found.revision, **options)


def _refuse_long(model: SentenceTransformer, texts: list[str]) -> None:
    longest = model.max_seq_length
    if longest is None:
        return
    tokens = model.tokenizer(texts, truncation=False, padding=False, verbose=False)["input_ids"]
    positions = [i for i, ids in enumerate(tokens) if len(ids) > longest]
    if positions:
        raise TextRefused(f'a text has more than {longest} tokens, and truncate = "error" refuses it', positions)


_all: weakref.WeakSet[SentenceTransformersProvider] = weakref.WeakSet()


def _in_child() -> None:
    for provider in list(_all):
        provider._after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


@hookimpl
def embedonce_providers() -> Mapping[str, type[SentenceTransformersProvider]]:
    return {"sentence-transformers": SentenceTransformersProvider}
