"""The ``sentence-transformers`` provider, whose models run in this process.

The provider reads the vector space from the model's small files (:mod:`._model_folder`, :mod:`._hub_cache`). It
loads torch, the library and the weights at the first miss, or in ``prepare``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import numpy as np
from annotated_types import Gt, MinLen
from numpy.typing import NDArray

from embedonce import Limits, TextRefused, VectorSpace, hookimpl
from embedonce.contracts import Task
from embedonce.errors import ConfigError, SpaceError
from embedonce.model_files import digest
from embedonce.options import Doc, FolderOrName, NotAFolder
from embedonce.tasks import TASKS, check_task

from ._hub_cache import find_snapshot, full_name
from ._model_folder import ModelDescription, is_model, read_description
from ._model_tokens import TokenCounter, load_token_counter

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

api = 1

if importlib.util.find_spec("sentence_transformers") is None:  # fail at startup, not at the first miss
    raise ModuleNotFoundError("No module named 'sentence_transformers'", name="sentence_transformers")

BATCHES: Final = 16
"""Number of model batches per call. The model sorts the texts of a call by length, so calls with more texts need less
padding."""


class SentenceTransformersProvider:
    """Embeds texts with a model of the sentence-transformers library, in this process."""

    def __init__(
        self,
        *,
        model: Annotated[
            FolderOrName, MinLen(1), Doc("A folder, or the name of a model on the Hugging Face hub: owner/name.")
        ],
        revision: Annotated[
            str | None, Doc("Branch, tag or commit on the hub. For a branch, the commit in the local cache is used.")
        ] = None,
        device: Annotated[
            str | None, Doc('"cpu", "cuda", "cuda:1" or "mps". Default: the fastest available device.')
        ] = None,
        batch_size: Annotated[int, Gt(0), Doc("Number of texts that the model embeds at the same time.")] = 32,
        dtype: Annotated[
            Literal["auto", "float32", "float16", "bfloat16"],
            Doc('Precision of the weights. "auto" keeps the precision in which they were saved.'),
        ] = "auto",
        truncate_dim: Annotated[
            int | None, Gt(0), Doc("Truncate vectors to this many dimensions. Default: the model's setting.")
        ] = None,
        normalize_embeddings: Annotated[bool, Doc("Scale each vector to unit length.")] = False,
        query_prompt: Annotated[str | None, Doc("Text to put before each query. Default: the model's prompt.")] = None,
        document_prompt: Annotated[
            str | None, Doc("Text to put before each document. Default: the model's prompt.")
        ] = None,
        query_prompt_name: Annotated[str | None, Doc("Name of the model's prompt to use for queries.")] = None,
        document_prompt_name: Annotated[str | None, Doc("Name of the model's prompt to use for documents.")] = None,
        max_length: Annotated[
            int | None,
            Gt(0),
            Doc("Maximum number of tokens per text, including the prompt. Default: the model's limit."),
        ] = None,
        truncate: Annotated[
            Literal["provider", "error"],
            Doc('What to do with a text that is too long: "provider" truncates it, "error" refuses it.'),
        ] = "provider",
        trust_remote_code: Annotated[bool, Doc("Run Python code that comes with the model.")] = False,
    ) -> None:
        if not model:
            raise ConfigError("model is empty; set it to a folder, or to a model on the Hugging Face hub")
        for name, number in (("batch_size", batch_size), ("truncate_dim", truncate_dim), ("max_length", max_length)):
            if number is not None and number < 1:
                raise ConfigError(f"{name} must be at least 1, got {number}")
        for task, prompt, prompt_name in (
            ("query", query_prompt, query_prompt_name),
            ("document", document_prompt, document_prompt_name),
        ):
            if prompt is not None and prompt_name is not None:
                raise ConfigError(f"{task}_prompt and {task}_prompt_name cannot be used together; remove one of them")
        self.limits = Limits(max_batch=batch_size * BATCHES)
        self._model_name = os.fspath(model)
        self._revision = revision
        self._device = device
        self._batch_size = batch_size
        self._dtype = dtype
        self._truncate_dim = truncate_dim
        self._normalize = normalize_embeddings
        self._prompts: Mapping[str, str | None] = {"query": query_prompt, "document": document_prompt}
        self._prompt_names: Mapping[str, str | None] = {"query": query_prompt_name, "document": document_prompt_name}
        self._max_length = max_length
        self._truncate = truncate
        self._trust_remote_code = trust_remote_code
        self._source: _ModelSource | None = None
        self._model: SentenceTransformer | None = None
        self._token_counter: TokenCounter | None = None
        self._lock = threading.RLock()
        self._was_forked = False
        _all_providers.add(self)

    # --- the vector space ---------------------------------------------------------------------

    def space(self, task: Task) -> VectorSpace:
        """Return the vector space of a task, as the model's small files describe it.

        Raises:
            SpaceError: the model does not exist, or has no prompt of the configured name. Or the model has prompts,
                but neither one for this task nor a default one. Otherwise, only a misspelled task is refused.
        """
        source = self._find_source()
        description = source.description
        check_task(
            task,
            list(dict.fromkeys([*TASKS, *description.prompts])),
            what=f"model {source.model!r}",
            accepts_others=not description.prompts or bool(description.default_prompt),
        )
        dimensions, truncate_dim = description.dimensions, self._truncate_dim or description.truncate_dim
        if dimensions is not None and truncate_dim is not None:
            dimensions, truncate_dim = min(dimensions, truncate_dim), None
        extra = {"truncate_dim": truncate_dim, "trust_remote_code": self._trust_remote_code or None}
        return VectorSpace(
            provider="sentence-transformers",
            model=source.model,
            revision=source.revision,
            task=task if description.depends_on_task else None,
            precision=None if self._dtype == "auto" else self._dtype,
            dimensions=dimensions,
            max_length=self._max_length,
            truncate=self._truncate,
            prompt=self._find_prompt(task) or None,
            normalize=self._normalize or None,
            extra={name: value for name, value in extra.items() if value is not None} or None,
        )

    def _find_source(self) -> _ModelSource:
        if self._source is None:
            self._source = self._read_source()
        return self._source

    def _read_source(self) -> _ModelSource:
        folder = Path(self._model_name).expanduser()
        if isinstance(self._model_name, NotAFolder) or not folder.is_dir():
            name = full_name(self._model_name)
            commit, folder = find_snapshot(name, self._revision)
            return _ModelSource(name, commit, folder, is_on_hub=True, description=read_description(folder))
        if self._revision is not None:
            raise SpaceError("revision applies only to models on the hub, but model is a folder; remove revision")
        if not is_model(folder):
            raise SpaceError(
                f"{folder} holds no model: it has neither modules.json nor config.json; set model to a folder that "
                "sentence-transformers saved"
            )
        folder = folder.absolute()
        content = digest(folder, pytorch=True)
        description = read_description(folder)
        return _ModelSource(f"folder:{content[:12]}", content, folder, is_on_hub=False, description=description)

    def _find_prompt(self, task: Task) -> str:
        """Return the text to put before each text of a task, or "" if there is none.

        Raises:
            SpaceError: the model has no prompt of the configured name.
        """
        declared = self._find_source().description
        prompt, name = self._prompts.get(task), self._prompt_names.get(task)
        if prompt is not None:
            return prompt
        if name is not None:
            if name not in declared.prompts:
                known = ", ".join(sorted(declared.prompts)) or "none"
                raise SpaceError(f"the model has no prompt named {name!r}; its prompts: {known}")
            return declared.prompts[name]
        # Choose the same prompt as the library's encode_query and encode_document. Both use "" if the model has no
        # prompt with the name of the task. For another task, the library uses the model's default prompt.
        return declared.prompts.get(task, "" if task in self._prompts else declared.default_prompt)

    # --- vectors ------------------------------------------------------------------------------

    def embed(self, texts: Sequence[str], task: Task) -> NDArray[np.floating[Any]]:
        """Return an array of shape (n, dimensions). The dtype is the model's, usually float32.

        Raises:
            TextRefused: a text is too long and ``truncate = "error"``, or the model knows no word of a text.
        """
        prompt = self._find_prompt(task)
        # Only one call runs at a time, because torch uses every core for one call, and because threads must not share a
        # tokenizer.
        with self._lock:
            model = self._get_model()
            if self._truncate == "error":
                _refuse_long(model, [prompt + text for text in texts])
            encode = {"query": model.encode_query, "document": model.encode_document}.get(task, model.encode)
            # An empty prompt must be "", because None means the model's default prompt.
            vectors: NDArray[np.floating[Any]] = encode(
                list(texts),
                prompt=prompt,
                batch_size=self._batch_size,
                normalize_embeddings=self._normalize,
                show_progress_bar=False,
            )
        zero_rows = np.flatnonzero(~vectors.any(axis=1))
        if zero_rows.size:
            raise TextRefused("a text has no word that the model knows, so its vector is all zero", zero_rows.tolist())
        return vectors

    def count_exact_tokens(self, texts: Sequence[str], task: Task) -> list[int] | None:
        """Return the number of tokens that the model reads of each text, or None if its tokenizer is not in its folder.

        The prompt and the special tokens count, and the tokens that the model truncates do not. The model is not
        loaded, and nothing is downloaded.
        """
        counter = self._token_counter
        if counter is None:
            counter = self._token_counter = load_token_counter(self._find_source().folder, self._max_length)
        prompt = self._find_prompt(task)
        return None if counter is None else counter.count([prompt + text for text in texts])

    def prepare(self) -> None:
        """Load the model, unless its weights would have to be downloaded."""
        source = self._find_source()
        if not source.is_on_hub or _has_weights(source.folder):
            with self._lock:
                self._get_model()

    def close(self) -> None:
        """Free the model's memory."""
        self._token_counter = None
        with self._lock:
            self._model = None

    def _get_model(self) -> SentenceTransformer:
        if self._was_forked:
            # OpenMP's threads exist only in the parent, and a child that used them would wait for them forever. So the
            # child uses one thread, and thus only one core.
            sys.modules["torch"].set_num_threads(1)
            self._was_forked = False
        if self._model is None:
            self._model = self._load_model()
        return self._model

    def _load_model(self) -> SentenceTransformer:
        source = self._find_source()
        cls, dtype_option = _import_library()
        options: dict[str, Any] = {
            "device": self._device,
            "trust_remote_code": self._trust_remote_code,
            "truncate_dim": self._truncate_dim,
            "model_kwargs": {dtype_option: self._dtype},
        }
        if not source.is_on_hub:
            model = cls(str(source.folder), local_files_only=True, **options)
            if digest(source.folder, pytorch=True) != source.revision:
                raise SpaceError(
                    f"the model in {source.folder} has changed since the cache was opened; open the cache again"
                )
        else:
            model = _load_from_hub(cls, source, options)
        if self._max_length is not None:
            model.max_seq_length = self._max_length
        return model

    def _reset_in_child(self) -> None:
        self._lock = threading.RLock()
        self._was_forked = "torch" in sys.modules


@dataclass(frozen=True, slots=True)
class _ModelSource:
    """The origin of a model, and its properties according to its files."""

    model: str
    """The model's name in the vector space."""
    revision: str
    """The commit on the hub, or the digest of a folder's content."""
    folder: Path
    is_on_hub: bool = field(kw_only=True)
    description: ModelDescription = field(kw_only=True)


def _import_library() -> tuple[type[SentenceTransformer], str]:
    """Import the library. Return ``SentenceTransformer``, and the name of the option for the dtype of the weights.

    The import runs in its own thread, so that Ctrl-C does not interrupt it. After an interrupted import, torch could
    not be imported again in the same process.
    """
    imported: list[tuple[type[SentenceTransformer], str]] = []
    failed: list[BaseException] = []

    def import_it() -> None:
        try:
            from sentence_transformers import SentenceTransformer

            is_older = int(importlib.metadata.version("transformers").split(".")[0]) < 5
            imported.append((SentenceTransformer, "torch_dtype" if is_older else "dtype"))
        except BaseException as error:  # noqa: BLE001  (raised below, in the caller's thread)
            failed.append(error)

    thread = threading.Thread(target=import_it, name="embedonce-import")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return imported[0]


def _load_from_hub(
    cls: type[SentenceTransformer], source: _ModelSource, options: Mapping[str, Any]
) -> SentenceTransformer:
    """Load the model at a commit. This uses no network if the local cache has all of the files."""
    if _has_weights(source.folder):
        try:
            return cls(source.model, revision=source.revision, local_files_only=True, **options)
        except OSError:  # a file other than the weights is missing in the local cache
            pass
    return cls(source.model, revision=source.revision, **options)


def _has_weights(folder: Path) -> bool:
    return any(folder.rglob("*.safetensors")) or any(folder.rglob("pytorch_model*.bin"))


def _refuse_long(model: SentenceTransformer, texts: list[str]) -> None:
    max_length = model.max_seq_length
    if max_length is None:
        return
    tokens = model.tokenizer(texts, truncation=False, padding=False, verbose=False)["input_ids"]
    positions = [i for i, ids in enumerate(tokens) if len(ids) > max_length]
    if positions:
        raise TextRefused(
            f'a text has more than {max_length} tokens; shorten it, or set truncate = "provider" to truncate it',
            positions,
        )


_all_providers: weakref.WeakSet[SentenceTransformersProvider] = weakref.WeakSet()


def _reset_in_child() -> None:
    for provider in list(_all_providers):
        provider._reset_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_in_child)


@hookimpl
def embedonce_providers() -> Mapping[str, type[SentenceTransformersProvider]]:
    return {"sentence-transformers": SentenceTransformersProvider}
