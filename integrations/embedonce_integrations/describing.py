"""Describes what determines the vectors of a framework's embedder: everything plain that the embedder holds.

One walk reads an embedder's fields, its private attributes, its ``__dict__`` and its slots, and does the same for the
objects inside it. Every plain value becomes a part of the vector space, unless its name is on the list of settings that
cannot change a vector. An object that the walk cannot read is refused, because it may hold a setting that can.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import random
import re
import sys
import threading
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Collection, Mapping
from contextvars import ContextVar
from difflib import get_close_matches
from enum import Enum
from typing import Any, Final

import numpy as np

from embedonce import Cache, SpaceError, VectorSpace
from embedonce.batch_settings import refuse_batch_settings
from embedonce.contracts import Task
from embedonce.keys import Value

from ._description_changes import CLIENT, ENDPOINT
from .embedder_fields import (
    CLIENT_PACKAGES,
    CLIENT_SETTINGS,
    ENDPOINT_FIELDS,
    MACHINERY,
    MODEL_FIELDS,
    MODEL_PACKAGES,
    NO_MODEL,
    SENTENCE_TRANSFORMER,
    decides_nothing,
    holds_phrases,
    holds_settings,
    is_secret,
    is_unmistakable,
    to_plain_name,
)
from .openai_answers import watch_client
from .plain_values import (
    BY_REPR,
    NOTHING,
    PLAIN,
    describe_array,
    describe_generator,
    describe_memory,
    describe_plain,
    find_name,
    identify_model,
    is_builtin,
    is_connection,
    is_model_folder,
    is_replaceable,
    is_secret_object,
    is_value,
    keeps_hidden_state,
    package_of,
    read_local_values,
    remove_class,
    strip_credentials,
    to_unicode,
)

HOW_TO_DECLARE: Final = (
    'declare what determines its vectors: space={"model": "my-model-v2"}, plus anything else that changes them '
    "(dimensions, prompt, ...)"
)


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


def describe_embedder(
    embedder: object, *, task: Task | None = None, ignore: Collection[str] = (), more: Mapping[str, Any] | None = None
) -> VectorSpace:
    """Return the vector space of a framework's embedder: its class and everything plain that it holds.

    The description contains no secrets, no fields that are None, and no settings named in
    :data:`~embedonce_integrations.embedder_fields.NOT_IN_SPACE` or in ``ignore``. Credentials are removed from URLs. If
    the model is a folder, its content identifies it: the space stays the same if the folder is moved, and changes if
    the weights change.

    Args:
        embedder: the embedder; it is not called.
        task: the task, if the embedder treats documents and queries differently.
        ignore: names of fields that the user knows to be irrelevant. ``"name"`` leaves out the fields of that name at
            any depth, ``"inner.name"`` only the one of the object ``inner``.
        more: values that affect the vectors and that the embedder does not hold. They replace fields of the same name.

    Raises:
        SpaceError: a field holds an object that cannot be described, a setting makes a vector depend on the other texts
            of its batch, another class may have the same name, or ``ignore`` names a field that does not exist. The
            message names the field or the class, and says what to do.
    """
    cls = type(embedder)
    check_class(cls)
    fields = {**_read_embedder(embedder), **(more or {})}
    described = Description(embedder, ignore).describe_fields(fields)
    model = find_model(fields) or getattr(cls, "MODEL_NAME", None)
    told = [name for name, value in described.items() if value not in ("", [], {})]
    if model is None and all(name.strip("_") in MODEL_FIELDS for name in told):
        raise SpaceError(f"{cls.__name__} does not say what determines its vectors; {HOW_TO_DECLARE}")
    name, content = identify_model(model or cls.__name__)
    return VectorSpace(
        provider=f"{cls.__module__}.{cls.__qualname__}",
        model=name,
        revision=content,
        task=task,
        extra=described or None,
    )


def refuse_tied_settings(embedder: object, ignore: Collection[str] = ()) -> None:
    """Refuse an embedder with a setting that makes a vector depend on the other texts of its batch.

    This is all that is checked of an embedder whose vector space the user has declared. Objects that cannot be
    described are skipped. ``ignore`` names settings as in :func:`describe_embedder`.

    Raises:
        SpaceError: there is such a setting, or ``ignore`` names a field that does not exist.
    """
    Description(embedder, ignore, refuses=False).describe_fields(_read_embedder(embedder))


def describe_request(request: Mapping[str, Any]) -> dict[str, Value]:
    """Return the arguments of a call that may affect its vectors.

    Raises:
        SpaceError: an argument cannot be described, or makes a vector depend on the other texts of its batch.
    """
    return Description(None).describe_fields(request)


# --- what an object holds ---------------------------------------------------------------------


def read_state(item: object) -> dict[str, Any]:
    """Return everything that an object holds, by name: ``__dict__``, pydantic's private and extra fields, and slots.

    What a ``cached_property`` keeps is left out, because it follows from the rest.
    """
    state: dict[str, Any] = {}
    derived = set()
    for cls in reversed(type(item).__mro__):
        for name, member in vars(cls).items():
            if isinstance(member, functools.cached_property):
                derived.add(name)
            if isinstance(member, types.MemberDescriptorType):
                try:
                    state[name] = member.__get__(item, type(item))
                except AttributeError:
                    continue  # the slot is empty
    for more in ("__dict__", "__pydantic_extra__", "__pydantic_private__"):
        try:
            held = object.__getattribute__(item, more)
        except AttributeError:
            continue
        if isinstance(held, Mapping):
            state |= held
    return {name: value for name, value in state.items() if name not in derived and not _is_internal(name)}


def _read_embedder(embedder: object) -> dict[str, Any]:
    """Return everything that an embedder holds, and the items of one that is a collection."""
    state = read_state(embedder)
    if isinstance(embedder, Mapping):
        state["settings"] = dict(embedder)
    elif isinstance(embedder, list | tuple | deque | set | frozenset):
        state["items"] = list(embedder)
    return state


def _is_internal(name: object) -> bool:
    """Return whether a framework, such as pydantic or Haystack, keeps something of its own under this name."""
    return str(name).startswith("__") and str(name).endswith("__")


def find_model(fields: Mapping[Any, Any]) -> str | None:
    """Return the name of the model among an embedder's fields, or None if no field names one."""
    plain = {str(name).strip("_"): value for name, value in fields.items()}
    names = (plain.get(name) for name in MODEL_FIELDS)
    return next((name for name in names if isinstance(name, str) and name not in NO_MODEL), None)


_URLS: Final = (
    ("base_url",),
    ("_base_url",),
    ("_client", "base_url"),
    ("_endpoint",),
    ("meta", "endpoint_url"),
    ("_api_client", "_http_options", "base_url"),
    ("sdk_configuration", "server_url"),
)
"""Where the clients of services keep the URL of their endpoint."""

_DEFAULT_URL: Final = "https://api.openai.com/v1"
"""A client that sends its requests there needs no URL in its description."""


def find_url(client: object) -> str | None:
    """Return the URL to which a client sends its requests, without credentials, or None if it does not show one."""
    for path in _URLS:
        found: Any = client
        for name in path:
            found = getattr(found, name, None)
        text = str(found or "")
        if "://" in text and text.rstrip("/") != _DEFAULT_URL:
            return strip_credentials(text)
    return None


def find_query(client: object) -> dict[str, Any]:
    """Return the query parameters that a client, or the HTTP client inside it, adds to every request."""
    found: dict[str, Any] = {}
    inner: Any = client
    for _ in range(3):  # ``embeddings``, then the client of a package, then the HTTP client
        params = getattr(inner, "params", None) or ()
        multiple = getattr(params, "multi_items", None)
        if callable(multiple):  # httpx
            params = multiple()
        elif isinstance(params, Mapping):
            params = list(params.items())
        if isinstance(params, list | tuple):
            pairs = [pair for pair in params if isinstance(pair, tuple) and len(pair) == 2]
            for name in dict.fromkeys(name for name, _ in pairs):
                values = [value for key, value in pairs if key == name]
                found[name] = values[0] if len(values) == 1 else values
        inner = getattr(inner, "_client", None)
    return found


# --- the walk ---------------------------------------------------------------------------------

_NAMED: Final = (
    *(type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.MethodDescriptorType),
    *(types.WrapperDescriptorType, types.MethodWrapperType, functools.partial, np.ufunc),
)
"""Types of classes and functions, which are described by their name."""


class Description:
    """One walk over an embedder's settings; see :func:`describe_embedder`.

    Args:
        embedder: the embedder, or None if the settings are those of a call.
        ignore: names of fields that are left out.
        refuses: whether to refuse what cannot be described. Otherwise it is left out.
    """

    def __init__(self, embedder: object, ignore: Collection[str] = (), *, refuses: bool = True) -> None:
        if isinstance(ignore, str):
            raise TypeError(f'ignore must be a list of names, such as ["{ignore}"]')
        self._owner = "the call's" if embedder is None else type(embedder).__name__
        self._ignore = frozenset(ignore)
        self._refuses = refuses
        self._open = [] if embedder is None else [id(embedder)]
        self._has_model = hasattr(type(embedder), "MODEL_NAME")
        self._names: set[str] = set()

    def describe_fields(self, fields: Mapping[Any, Any]) -> dict[str, Value]:
        """Return the fields that belong in a vector space.

        Raises:
            SpaceError: a field holds an object that cannot be described, a setting makes a vector depend on the other
                texts of its batch, or ``ignore`` names a field that does not exist.
        """
        try:
            described = self._describe_fields(fields, "")
        except RecursionError:
            raise SpaceError(
                f"the settings of {self._owner} are nested too deeply to be described; {HOW_TO_DECLARE}"
            ) from None
        self._check_ignored_names()
        refuse_batch_settings(described)
        return described

    def _check_ignored_names(self) -> None:
        for name in sorted(self._ignore - self._names):
            close = get_close_matches(name, self._names, n=1)
            hint = f'did you mean "{close[0]}"?' if close else "remove it"
            raise SpaceError(f'ignore: {self._owner} has no field "{name}"; {hint}')

    # --- names --------------------------------------------------------------------------------

    def _describe_fields(
        self, fields: Mapping[Any, Any], path: str, *, are_names: bool = True, phrases: str = ""
    ) -> dict[str, Value]:
        """Describe an object's fields or a mapping.

        ``are_names`` says whether the keys are names of settings; the keys of a user's data may not be. ``phrases`` is
        the name of a mapping with prompts, which counts for each of its values.
        """
        has_model, self._has_model = self._has_model, self._has_model or find_model(fields) is not None
        described: dict[str, Any] = {}
        others: list[Any] = []
        clients: list[Any] = []
        for name, item in fields.items():
            if not isinstance(name, str):
                others += self._describe_pair(name, item, path)
                continue
            name = str(name.value) if isinstance(name, Enum) else str(name)
            where = f"{path}.{name}" if path else name
            if is_connection(item):
                watch_client(item)  # even if its name is on the list
            if self._is_ignored(name, where) or item is None:
                continue
            is_name = are_names or (not phrases and is_unmistakable(name))
            if is_name and (is_secret(name) or (decides_nothing(name) and is_replaceable(item))):
                described |= self._describe_query_below(item, name, where)
                continue
            if not path and name.strip("_") in MODEL_FIELDS and isinstance(item, str) and is_model_folder(item):
                continue  # the space's revision identifies its content
            if is_connection(item):
                clients.append(item)
                settings = self._describe_connection(item, where)
                described |= {f"{name}.{CLIENT}": settings} if settings else {}
                continue
            value = self._describe(item, phrases or name, where)
            if value is not NOTHING:
                described[to_unicode(name)] = value
        if others:
            described["keys of other types"] = others if isinstance(fields, OrderedDict) else sorted(others, key=repr)
        if isinstance(fields, OrderedDict) and len(described) > 1:
            described["order of the keys"] = list(described)
        self._has_model = has_model
        return _join_endpoints(described, [find_url(client) for client in clients])

    def _describe_pair(self, key: Any, item: Any, path: str) -> list[list[Any]]:
        where = f"{path}[{key if isinstance(key, int | float) else type(key).__name__}]"
        value = self._describe(item, "", where)
        return [] if value is NOTHING or item is None else [[self._describe_item(key, where), value]]

    def _is_ignored(self, name: str, where: str) -> bool:
        names = {name, name.strip("_"), where}
        self._names |= names
        return not self._ignore.isdisjoint(names)

    # --- values -------------------------------------------------------------------------------

    def _describe(self, item: Any, name: str, where: str) -> Any:
        """Return a value that a vector space can hold, or :data:`NOTHING` if the item holds no setting.

        Raises:
            SpaceError: the item cannot be described.
        """
        if item is None or isinstance(item, bool):
            return item
        if isinstance(item, Enum):
            return self._describe_enum(item, name, where)
        if type(item) in PLAIN:
            return describe_plain(item, name)
        if is_secret_object(item):
            return NOTHING
        if id(item) in self._open:
            return {"same object as": self._open.index(id(item))}
        self._open.append(id(item))
        try:
            return self._describe_object(item, name, where)
        finally:
            self._open.pop()

    def _describe_item(self, item: Any, where: str, name: str = "") -> Any:
        value = self._describe(item, name, where)
        return None if value is NOTHING else value

    def _describe_enum(self, item: Enum, name: str, where: str) -> Any:
        if type(item.value) in PLAIN:
            return self._describe(item.value, name, where)
        check_class(type(item))
        return f"{type(item).__module__}.{type(item).__qualname__}.{item.name}"

    def _describe_object(self, item: Any, name: str, where: str) -> Any:
        cls = type(item)
        if isinstance(item, weakref.ref):
            return self._describe(item(), name, where) if item() is not None else NOTHING
        if isinstance(item, random.Random):
            return describe_generator(item)
        if isinstance(item, io.StringIO | io.BytesIO):
            return describe_memory(item)
        if isinstance(item, threading.local | ContextVar):
            # Other threads may see other values. Connections and machinery are the same for all of them.
            if all(is_connection(value) or package_of(type(value)) in MACHINERY for value in read_local_values(item)):
                return NOTHING
            return self._refuse(item, where)
        if cls in weakref.ProxyTypes:
            return self._refuse(item, where)
        if package_of(cls) in MACHINERY:
            return NOTHING
        if is_connection(item):
            return _join_endpoints(self._describe_connection(item, where), [find_url(item)]) or NOTHING
        if isinstance(item, _NAMED):
            return self._describe_callable(item, where)
        value = self._describe_value(item, name, where)
        if value is NOTHING:
            return self._describe_instance(item, where)
        has_slots = isinstance(item, (*PLAIN, dict, list, tuple, set, frozenset, deque))
        held = read_state(item) if has_slots else getattr(item, "__dict__", {})
        own = {} if is_builtin(cls) else self._describe_fields(held, where)
        return {"value": value, "attributes": own} if own else value

    def _describe_value(self, item: Any, name: str, where: str) -> Any:
        """Describe a collection or another value of a well-known type, but not the attributes that it may have."""
        if isinstance(item, PLAIN):
            return describe_plain(remove_class(item), name)
        if isinstance(item, os.PathLike):
            return describe_plain(os.fspath(item), name)
        if isinstance(item, os._Environ):
            return self._refuse(item, where)
        if isinstance(item, Mapping):
            return self._describe_fields(
                item, where, are_names=holds_settings(name), phrases=name if holds_phrases(name) else ""
            )
        if isinstance(item, list | tuple | deque):
            return [self._describe_item(value, f"{where}[{index}]", name) for index, value in enumerate(item)]
        if isinstance(item, set | frozenset):
            return sorted((self._describe_item(value, where, name) for value in item), key=repr)
        if isinstance(item, np.generic):
            return (
                describe_array(np.asarray(item)) if item.dtype.kind == "V" else self._describe_item(item.item(), where)
            )
        if type(item) in (np.ndarray, np.memmap):
            return [self._describe_item(item.tolist(), where)] if item.dtype.hasobject else describe_array(item)
        if isinstance(item, re.Pattern):
            return {"pattern": self._describe_item(item.pattern, where), "flags": item.flags}
        if isinstance(item, BY_REPR) or type(item).__module__ == "typing":
            return f"{type(item).__qualname__} {item!r}"
        if isinstance(item, types.ModuleType):
            return item.__name__
        return NOTHING

    def _describe_callable(self, item: Any, where: str) -> Any:
        if isinstance(item, functools.partial):
            return {
                "function": self._describe_item(item.func, f"{where}.function"),
                "arguments": self._describe_item(item.args, f"{where}.arguments"),
                "keywords": self._describe_fields(item.keywords, f"{where}.keywords"),
            }
        owner = getattr(item, "__self__", None)
        if isinstance(item, types.MethodType | types.BuiltinFunctionType | types.MethodWrapperType) and not (
            owner is None or isinstance(owner, types.ModuleType)
        ):
            return {"method": item.__name__, "of": self._describe_item(owner, where)}
        name = find_name(item)
        return self._refuse(item, where) if name is None else name

    def _describe_instance(self, item: Any, where: str) -> Any:
        cls = type(item)
        name = find_name(item)
        if name is not None:  # a function of a type of its own, such as numpy's
            return name
        if isinstance(getattr(item, "cache", None), Cache):
            return self._describe_cache(item.cache)
        if package_of(cls) == "torch":
            return self._describe_torch(item, where)
        if package_of(cls) in MODEL_PACKAGES and not is_value(cls):
            return self._describe_model(item, where)
        if cls is object or keeps_hidden_state(cls):
            return self._refuse(item, where)
        if not self._refuses:
            return self._describe_fields(read_state(item), where)
        check_class(cls)
        return {"class": f"{cls.__module__}.{cls.__qualname__}", **self._describe_fields(read_state(item), where)}

    def _describe_cache(self, cache: Cache) -> dict[str, Any]:
        return {task: cache.provider.space(task).described() for task in ("document", "query")}

    def _describe_torch(self, item: Any, where: str) -> Any:
        cls = type(item)
        if cls.__name__ == "device":
            return NOTHING
        if cls.__name__ in ("dtype", "Size", "layout", "memory_format"):
            return str(item)
        if hasattr(item, "untyped_storage"):
            torch = sys.modules["torch"]
            flat = item.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            content = hashlib.sha256(flat).hexdigest()
            return {"array": content, "dtype": str(item.dtype), "shape": list(item.shape)}
        if hasattr(item, "_parameters"):
            fields = {name: value for name, value in read_state(item).items() if not name.endswith("_hooks")}
            return {"class": f"{cls.__module__}.{cls.__qualname__}", **self._describe_fields(fields, where)}
        return self._refuse(item, where)

    def _describe_model(self, item: Any, where: str) -> Any:
        """Describe a loaded model or tokenizer. Refuse it unless a field beside it, or further out, names the model."""
        if not self._has_model:
            return self._refuse(item, where)
        if package_of(type(item)) == "sentence_transformers" and hasattr(item, "max_seq_length"):
            return self._describe_fields({name: getattr(item, name, None) for name in SENTENCE_TRANSFORMER}, where)
        return NOTHING

    def _describe_connection(self, item: Any, where: str) -> dict[str, Any]:
        """Describe what a client adds to the requests of its embedder."""
        watch_client(item)
        state = {**read_state(getattr(item, "_client", None)), **read_state(item)}
        settings = {name: value for name, value in state.items() if name.strip("_") in CLIENT_SETTINGS}
        settings["params"] = find_query(item)
        described = {name: value for name, value in self._describe_fields(settings, where).items() if value != {}}
        if package_of(type(item)) not in CLIENT_PACKAGES:
            described["class"] = f"{type(item).__module__}.{type(item).__qualname__}"
        return described

    def _describe_query_below(self, item: Any, name: str, where: str) -> dict[str, Any]:
        """Describe only the query parameters of a client that is left out because of its name."""
        query = find_query(item) if is_connection(item) else {}
        described = self._describe_fields(query, f"{where}.params") if query else {}
        return {f"{name}.{CLIENT}": {"params": described}} if described else {}

    def _refuse(self, item: Any, where: str) -> Any:
        if not self._refuses:
            return NOTHING
        dot = " " if self._owner.endswith("'s") else "."
        raise SpaceError(
            f"embedonce cannot tell whether {self._owner}{dot}{where} (of type {type(item).__name__}) changes the "
            f'vectors; if it does not, pass ignore=["{where}"]; otherwise {HOW_TO_DECLARE}'
        )


def _join_endpoints(described: dict[str, Any], of_clients: Collection[str | None]) -> dict[str, Any]:
    """Describe the URL of an endpoint in the same way, whether a field holds it or only a client knows it.

    An embedder may make its client at the first call. So if there is a field with the URL, the client's URL, which
    begins with it, adds nothing.
    """
    fields = {
        name: value.rstrip("/")
        for name, value in described.items()
        if to_plain_name(name) in ENDPOINT_FIELDS and isinstance(value, str) and "://" in value
    }
    in_fields = set(fields.values())
    unknown = {
        url.rstrip("/")
        for url in of_clients
        if url is not None and not any(f"{url.rstrip('/')}/".startswith(f"{known}/") for known in in_fields)
    }
    if len(in_fields) == 1:
        described = {name: value for name, value in described.items() if name not in fields}
        unknown |= in_fields
    # Two different endpoints keep the names of their fields, because they may have different purposes.
    return {**described, ENDPOINT: sorted(unknown)} if unknown else described
