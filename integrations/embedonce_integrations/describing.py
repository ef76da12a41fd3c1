"""Describes what determines the vectors of a framework's embedder: everything plain that the embedder holds.

One walk reads an embedder's fields, its private attributes, its ``__dict__`` and its slots, and does the same for the
objects inside it. Every plain value becomes a part of the vector space, unless its name is on the list of settings that
cannot change a vector. An object that the walk cannot read is refused, because it may hold a setting that can.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import re
import struct
import types
from collections import deque
from collections.abc import Collection, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID

import numpy as np

from embedonce import SpaceError, VectorSpace
from embedonce.contracts import Task
from embedonce.keys import Value
from embedonce.model_files import digest

NOT_IN_SPACE: Final = frozenset(
    {
        # connections, credentials and accounts
        "additional_headers",
        "api_key",
        "api_key_env_var",
        "api_token",
        "api_version",
        "async_client_kwargs",
        "azure_ad_async_token_provider",
        "azure_ad_token",
        "azure_ad_token_provider",
        "boto3_config",
        "client_args",
        "client_kwargs",
        "cookies",
        "default_headers",
        "extra_headers",
        "headers",
        "http_client_kwargs",
        "keep_alive",
        "openai_api_version",
        "openai_organization",
        "openai_proxy",
        "org_id",
        "organization",
        "organization_id",
        "proxies",
        "proxy",
        "reuse_client",
        "sync_client_kwargs",
        "token",
        "use_async_client",
        "user",
        "user_agent",
        "validate_base_url",
        "validate_model_on_init",
        "verify_ssl",
        # how many texts a call holds, how many calls run at the same time, and what happens if a call fails
        "batch_size",
        "chunk_size",
        "concurrency",
        "embed_batch_size",
        "max_batch_size",
        "max_concurrency",
        "max_concurrent_requests",
        "max_retries",
        "max_workers",
        "multi_process",
        "num_thread",
        "num_threads",
        "num_workers",
        "parallel",
        "raise_on_failure",
        "rate_limiter",
        "request_timeout",
        "requests_per_minute",
        "requests_per_second",
        "retries",
        "retry_exponential_base",
        "retry_max_seconds",
        "retry_min_seconds",
        "threads",
        "timeout",
        "tokens_per_minute",
        "wait_time",
        # the machine
        "cache_dir",
        "cache_folder",
        "device",
        "local_files_only",
        "num_gpu",
        # what an embedder fills in at its first call
        "embedding_backend",
        "last_inputs",
        "last_response",
        # caches, logs and progress
        "callback_manager",
        "callbacks",
        "document_embedding_store",
        "embeddings_cache",
        "progress_bar",
        "query_embedding_store",
        "show_progress",
        "show_progress_bar",
        "usage_telemetry_enabled",
        "verbose",
        # how the answer is encoded on its way
        "encoding_format",
    }
)
"""Names of settings that cannot change a vector. Leading underscores do not count: ``_timeout`` is ``timeout``."""

MODEL_FIELDS: Final = (
    "model",
    "model_name",
    "model_id",
    "repo_id",
    "azure_deployment",
    "deployment",
    "deployment_name",
    "model_deployment_name",
    "MODEL_NAME",
)
"""Names of the fields in which embedders keep the name of their model."""

CLIENT_PACKAGES: Final = frozenset(
    {"aiobotocore", "aiohttp", "anthropic", "azure", "boto3", "botocore", "cohere", "google", "grpc", "httpcore"}
    | {"httpx", "httpx2", "huggingface_hub", "mistralai", "ollama", "openai", "requests", "urllib3", "voyageai"}
)
"""Packages whose objects, except values such as a request's options, are connections to a service."""

MACHINERY: Final = frozenset(
    {"_asyncio", "_contextvars", "_io", "_queue", "_random", "_thread", "_weakref", "asyncio", "concurrent"}
    | {"contextvars", "logging", "loguru", "multiprocessing", "opentelemetry", "prometheus_client", "queue", "random"}
    | {"rich", "socket", "ssl", "structlog", "tenacity", "threading", "tqdm", "weakref"}
)
"""Packages whose objects hold no setting: locks, loggers, executors, queues, retry policies, progress bars."""

MODEL_PACKAGES: Final = frozenset(
    {"fastembed", "flax", "jax", "keras", "llama_cpp", "model2vec", "onnxruntime", "optimum", "sentence_transformers"}
    | {"sentencepiece", "tensorflow", "tiktoken", "tokenizers", "torch", "transformers"}
)
"""Packages whose objects are loaded models and tokenizers. The name of the model stands for them."""

HOW_TO_DECLARE: Final = (
    'declare what determines its vectors: space={"model": "my-model-v2"}, plus anything else that changes them '
    "(dimensions, prompt, ...)"
)

_SECRET = re.compile(
    r"(^|_)((api|access|account|private|subscription)_?key|secret|password|credentials?|authorization|bearer"
    r"|(api|access|auth|ad|ad_async|hf|session)_token)(_|$)"
)
_PHRASES = re.compile(r"prompt|prefix|suffix|instruction|template|word|vocab|map|weights", re.IGNORECASE)
"""Names of mappings from tasks or words to values. Their keys are not names of settings."""


def check_class(cls: type[Any]) -> None:
    """Refuse a class whose name does not identify it.

    Raises:
        SpaceError: another class may have the same name. The message says what to do.
    """
    if cls.__module__ == "__main__":
        raise SpaceError(
            f"{cls.__name__} is defined in the script that runs, and another script may define a different class of "
            f"the same name; move the class to a module, or {HOW_TO_DECLARE}"
        )
    if "<locals>" in cls.__qualname__:
        raise SpaceError(
            f"{cls.__name__} is defined in a function, which may define a different class of the same name each time "
            f"it runs; move the class out of the function, or {HOW_TO_DECLARE}"
        )


def read_state(item: object) -> dict[str, Any]:
    """Return everything that an object holds, by name: ``__dict__``, pydantic's private and extra fields, and slots."""
    state: dict[str, Any] = {}
    for cls in reversed(type(item).__mro__):
        for name, member in vars(cls).items():
            if isinstance(member, types.MemberDescriptorType) and not name.startswith("__"):
                with_value = getattr(item, name, _UNSET)
                if with_value is not _UNSET:
                    state[name] = with_value
    for more in ("__dict__", "__pydantic_extra__", "__pydantic_private__"):
        held = getattr(item, more, None)
        if isinstance(held, Mapping):
            state |= {name: value for name, value in held.items() if not str(name).startswith("__")}
    return state


_UNSET: Final = object()


def describe_embedder(
    embedder: object, *, task: Task | None = None, ignore: Collection[str] = (), more: Mapping[str, Any] | None = None
) -> VectorSpace:
    """Return the vector space of a framework's embedder: its class and everything plain that it holds.

    The description contains no secrets, no fields that are None, and no settings named in :data:`NOT_IN_SPACE` or in
    ``ignore``. Credentials are removed from URLs. If the model is a folder, its content identifies it: the space stays
    the same if the folder is moved, and changes if the weights change.

    Args:
        embedder: the embedder; it is not called.
        task: the task, if the embedder treats documents and queries differently.
        ignore: names of fields that the user knows to be irrelevant. ``"name"`` leaves out the fields of that name at
            any depth, ``"inner.name"`` only the one of the object ``inner``.
        more: values that affect the vectors and that the embedder does not hold. They replace fields of the same name.

    Raises:
        SpaceError: a field holds an object that cannot be described, or another class may have the same name. The
            message names the field or the class, and says what to do.
    """
    cls = type(embedder)
    check_class(cls)
    state = {**read_state(embedder), **(more or {})}
    if all(value is None for value in state.values()):
        raise SpaceError(f"{cls.__name__} does not say what determines its vectors; {HOW_TO_DECLARE}")
    model = find_model(state) or getattr(cls, "MODEL_NAME", None) or cls.__name__
    name, content = identify_model(model)
    return VectorSpace(
        provider=f"{cls.__module__}.{cls.__qualname__}",
        model=name,
        revision=content,
        task=task,
        extra=Description(embedder, ignore).describe_fields(state) or None,
    )


class Description:
    """One walk over an embedder's settings; see :func:`describe_embedder`."""

    def __init__(self, embedder: object, ignore: Collection[str] = ()) -> None:
        self._owner = type(embedder).__name__
        self._ignore = frozenset(ignore)
        self._open = [id(embedder)]
        self._has_model = hasattr(type(embedder), "MODEL_NAME")

    def describe_fields(self, fields: Mapping[Any, Any]) -> dict[str, Value]:
        """Return the fields that belong in a vector space.

        Raises:
            SpaceError: a field holds an object that cannot be described. The message names the field.
        """
        self._has_model = self._has_model or find_model(fields) is not None
        return self._describe_fields(fields, "")

    # --- names --------------------------------------------------------------------------------

    def _describe_fields(self, fields: Mapping[Any, Any], path: str) -> dict[str, Value]:
        urls = {text.rstrip("/") for text in fields.values() if isinstance(text, str)}
        described: dict[str, Value] = {}
        for name, item in fields.items():
            name = name if isinstance(name, str) else repr(name)
            where = f"{path}.{name}" if path else name
            if item is None or self._is_left_out(name, where, listed=not _PHRASES.search(path)):
                continue
            if _is_secret_object(item):
                continue
            if not path and name.strip("_") in MODEL_FIELDS and isinstance(item, str) and is_model_folder(item):
                continue  # the space's revision identifies its content
            value = self._describe(item, name, where)
            if value is _NOTHING:
                url = find_url(item)
                if url and url.rstrip("/") not in urls:
                    described[f"{name}.base_url"] = _strip_credentials(url)
                continue
            described[name] = value
        return described

    def _is_left_out(self, name: str, where: str, *, listed: bool) -> bool:
        plain = name.strip("_")
        if not self._ignore.isdisjoint((name, plain, where)) or is_secret(plain):
            return True
        return listed and plain in NOT_IN_SPACE

    # --- values -------------------------------------------------------------------------------

    def _describe(self, item: Any, name: str, where: str) -> Any:
        """Return a value that a vector space can hold, or :data:`_NOTHING` if the item holds no setting.

        Raises:
            SpaceError: the item cannot be described.
        """
        if isinstance(item, Enum):
            return self._describe(item.value, name, where)
        if isinstance(item, str):
            return _describe_text(str(item), name)
        if item is None or isinstance(item, bool | int | float | bytes):
            return item
        if isinstance(item, os.PathLike):
            return _describe_text(os.fspath(item), name)
        if id(item) in self._open:
            return {"same object as": self._open.index(id(item))}
        self._open.append(id(item))
        try:
            return self._describe_object(item, name, where)
        finally:
            self._open.pop()

    def _describe_object(self, item: Any, name: str, where: str) -> Any:
        if isinstance(item, Mapping):
            return self._describe_fields(item, where)
        if isinstance(item, list | tuple | deque):
            return [self._describe_item(value, f"{where}[{index}]") for index, value in enumerate(item)]
        if isinstance(item, set | frozenset):
            return sorted((self._describe_item(value, where) for value in item), key=repr)
        if isinstance(item, np.generic):
            return self._describe(item.item(), name, where)
        if isinstance(item, np.ndarray) and item.dtype.kind in "biufc":
            content = hashlib.sha256(np.ascontiguousarray(item).tobytes()).hexdigest()
            return {"array": content, "dtype": str(item.dtype), "shape": list(item.shape)}
        if isinstance(
            item, type | types.FunctionType | types.BuiltinFunctionType | types.MethodType | functools.partial
        ):
            return self._describe_callable(item, where)
        return self._describe_instance(item, where)

    def _describe_item(self, item: Any, where: str) -> Any:
        value = self._describe(item, "", where)
        return None if value is _NOTHING else value

    def _describe_callable(self, item: Any, where: str) -> Any:
        if isinstance(item, functools.partial):
            parts = {"function": item.func, "arguments": item.args, "keywords": item.keywords}
            return {part: self._describe_item(value, f"{where}.{part}") for part, value in parts.items()}
        if isinstance(item, types.MethodType):
            return {"method": item.__func__.__qualname__, "of": self._describe_item(item.__self__, where)}
        if (isinstance(item, types.FunctionType) and item.__closure__) or "<" in item.__qualname__:
            self._refuse(item, where)
        if getattr(item, "__module__", None) == "__main__":
            self._refuse(item, where)
        return f"{item.__module__}.{item.__qualname__}"

    def _describe_instance(self, item: Any, where: str) -> Any:
        cls = type(item)
        packages = {base.__module__.partition(".")[0] for base in cls.__mro__}
        is_value = dataclasses.is_dataclass(cls) or hasattr(cls, "model_fields")
        if cls.__module__ == "torch" and cls.__name__ == "dtype":
            return str(item)
        if cls.__module__.startswith("sentence_transformers") and hasattr(item, "max_seq_length"):
            return self._describe_fields({one: getattr(item, one, None) for one in _SENTENCE_TRANSFORMER}, where)
        if isinstance(item, types.ModuleType) or packages & MACHINERY:
            return _NOTHING
        if packages & CLIENT_PACKAGES and not is_value:
            return _NOTHING
        if cls.__module__.partition(".")[0] in MODEL_PACKAGES and not is_value and self._has_model:
            return _NOTHING
        if cls is object or _keeps_hidden_state(cls):
            self._refuse(item, where)
        check_class(cls)
        return {"class": f"{cls.__module__}.{cls.__qualname__}", **self._describe_fields(read_state(item), where)}

    def _refuse(self, item: Any, where: str) -> None:
        raise SpaceError(
            f"embedonce cannot tell whether {self._owner}.{where} (of type {type(item).__name__}) changes the vectors; "
            f'if it does not, pass ignore=["{where}"]; else {HOW_TO_DECLARE}'
        )


_NOTHING: Final = object()
_PLAIN: Final = (complex, range, datetime, date, time, timedelta, Decimal, Fraction, UUID, re.Pattern)
_CALLABLES: Final = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
_SENTENCE_TRANSFORMER: Final = ("max_seq_length", "prompts", "default_prompt_name", "truncate_dim")
_URLS: Final = (
    ("base_url",),
    ("_base_url",),
    ("_client", "base_url"),
    ("meta", "endpoint_url"),
    ("_api_client", "_http_options", "base_url"),
)
"""Where the clients of services keep the URL of their endpoint."""


def find_url(client: object) -> str | None:
    """Return the URL to which a client sends its requests, or None if the client does not show it."""
    for path in _URLS:
        found: Any = client
        for name in path:
            found = getattr(found, name, None)
        text = str(found or "")
        if "://" in text and text.rstrip("/") != "https://api.openai.com/v1":
            return text
    return None


def find_model(fields: Mapping[Any, Any]) -> str | None:
    """Return the name of the model among an embedder's fields, or None if no field names one."""
    plain = {str(name).strip("_"): value for name, value in fields.items()}
    names = (plain.get(name) for name in MODEL_FIELDS)
    return next((name for name in names if isinstance(name, str) and name not in ("", "unknown")), None)


def identify_model(name: str) -> tuple[str, str | None]:
    """Return a model's name and None; for a folder, a name made from its content and the digest of its content.

    The description of a folder stays the same if the folder is moved, and changes if the weights change.
    """
    if not is_model_folder(name):
        return name, None
    content = digest(Path(name).expanduser())
    return f"folder:{content[:12]}", content


def is_model_folder(name: str) -> bool:
    """Return whether a model's name is the path of a folder with a model."""
    folder = Path(name).expanduser()
    return any((folder / file).is_file() for file in ("config.json", "modules.json"))


def is_secret(name: str) -> bool:
    """Return whether a field of this name holds a secret."""
    return _SECRET.search(name.lower().replace("-", "_")) is not None


def _is_secret_object(item: object) -> bool:
    return hasattr(item, "get_secret_value") or (hasattr(item, "resolve_value") and not isinstance(item, type))


def _describe_text(text: str, name: str) -> str:
    if name.strip("_") in MODEL_FIELDS:
        text = identify_model(text)[1] or text
    return _strip_credentials(text)


def _strip_credentials(text: str) -> str:
    if "://" not in text or not ("@" in text or "?" in text):
        return text
    try:
        parts = urlsplit(text)
    except ValueError:
        return text
    query = "&".join(part for part in parts.query.split("&") if not is_secret(part.partition("=")[0]))
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query))


_POINTER: Final = struct.calcsize("P")


def _keeps_hidden_state(cls: type[Any]) -> bool:
    """Return whether instances have memory beside their attributes, as those of a class written in C may have.

    The size of an instance is that of an object, plus one pointer for each slot, for ``__dict__`` and for weak
    references. (``object.__reduce_ex__`` makes the same comparison to find out what it cannot pickle.)
    """
    slots = sum(
        isinstance(member, types.MemberDescriptorType) for base in cls.__mro__ for member in vars(base).values()
    )
    pointers = slots + (cls.__dictoffset__ > 0) + (cls.__weakrefoffset__ > 0)
    return cls.__itemsize__ != 0 or cls.__basicsize__ > object.__basicsize__ + pointers * _POINTER
