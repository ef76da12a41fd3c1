"""Reads the answers that OpenAI clients inside an embedder receive, so that each text gets its own vector.

Frameworks take the items of an answer as they come and ignore their ``index``. If a vector were missing, superfluous
or out of order, the cache would store vectors for the wrong texts. A wrapper cannot reach every client: an embedder may
make its client at the first call, or a new client for each call, and may call it in threads of its own. So this module
replaces the methods that all clients have in common: ``create`` of their ``embeddings``, and ``post`` of the clients
themselves. The replacements do nothing unless an embedder is called inside :func:`reading_answers`, or the client was
found in a wrapped embedder.

A thread that does not copy the context of the embedder's call cannot be told from a thread that has nothing to do with
the embedder. So while a call runs, the answers in all threads are sorted. This is harmless for other clients, because
each item keeps its ``index``. If an answer cannot be sorted, its client gets it as it is, and all calls that are
running fail, because the answer may belong to any of them.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final
from weakref import WeakSet

from embedonce import Embedded, ProviderError
from embedonce.answer_order import order_by_index


class AnswersRead:
    """What the answers in one call of an embedder say besides their vectors. Several threads may add answers."""

    def __init__(self) -> None:
        self._models: list[str | None] = []
        self._tokens: list[int | None] = []
        self._error: ProviderError | None = None

    def add(self, answer: Any) -> None:
        """Add one answer of the endpoint."""
        model = _get(answer, "model")
        tokens = _get(_get(answer, "usage"), "total_tokens")
        self._models.append(model if isinstance(model, str) and model else None)
        self._tokens.append(tokens if type(tokens) is int and tokens >= 0 else None)

    def fail(self, error: ProviderError) -> None:
        """Add an answer that does not say which vector belongs to which text."""
        self._error = error

    def make_answer(self, vectors: Any) -> Embedded:
        """Return an embedder's vectors as a provider's answer, with what the endpoint's answers say about them."""
        return Embedded(vectors, self.tokens, self.model)

    def raise_error(self) -> None:
        """Raise the error of an invalid answer, in case the embedder has caught the error and gone on.

        Raises:
            ProviderError: an answer was invalid.
        """
        if self._error is not None:
            raise self._error

    @property
    def model(self) -> str | None:
        """The name of the model in the answers; None if an answer, or no answer, names one.

        An embedder may join the vectors of several models. The name then consists of all of their names, so that it
        is the same for each call, unless the endpoint changes a model.
        """
        names = {name for name in self._models if name is not None}
        return " + ".join(sorted(names)) if names and None not in self._models else None

    @property
    def tokens(self) -> int | None:
        """The tokens that the endpoint charged; None if an answer does not say so."""
        counts = [count for count in self._tokens if count is not None]
        return sum(counts) if counts and len(counts) == len(self._tokens) else None


_current: ContextVar[AnswersRead | None] = ContextVar("embedonce_openai_answers", default=None)
_is_inside: ContextVar[bool] = ContextVar("embedonce_is_inside_create", default=False)
"""Whether ``create`` is running, which reads the answer that it gets from ``post``."""
_watched: WeakSet[Any] = WeakSet()
_running: list[AnswersRead] = []
"""The calls of embedders that are running in this process."""
_lock = threading.Lock()


def _forget_calls_in_child() -> None:
    global _lock
    _lock = threading.Lock()  # a thread that exists only in the parent may hold the old lock
    _running[:] = [read for read in (_current.get(),) if read is not None]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_calls_in_child)


@contextmanager
def reading_answers() -> Iterator[AnswersRead]:
    """Sort the answers of all OpenAI clients that are called in the ``with`` block, and collect what else they say.

    Raises:
        ProviderError: an answer does not say which vector belongs to which text.
    """
    is_ready = _replace_methods()
    read = AnswersRead()
    token = _current.set(read)
    with _lock:
        _running.append(read)
    try:
        yield read
    finally:
        with _lock:
            _running[:] = [other for other in _running if other is not read]
        _current.reset(token)
    read.raise_error()
    if not is_ready and _replace_methods():
        raise ProviderError(
            "the embedder has imported openai during its call, so the order of the answers was not checked and nothing "
            "was stored; call it again, or import openai earlier"
        )


def watch_client(item: object) -> None:
    """Sort the answers of a client, or of its ``embeddings``, even if an embedder calls it in a thread of its own."""
    if any(cls.__module__.partition(".")[0] == "openai" for cls in type(item).__mro__):
        _replace_methods()
        with _lock:
            _watched.add(getattr(item, "_client", item) if hasattr(item, "create") else item)


# --- the methods of openai -------------------------------------------------------------------


def _replace_methods() -> bool:
    """Replace ``create`` and ``post`` of ``openai``, once. Return False if nothing has imported ``openai`` yet."""
    if "openai" not in sys.modules:
        return False
    try:
        module = importlib.import_module("openai.resources.embeddings")  # openai itself imports it at the first call
    except ImportError:
        return True  # a stand-in or another version, which has no such clients
    for name in ("Embeddings", "AsyncEmbeddings"):
        _replace(getattr(module, name, None), "create", _sorting_create)
    for name in ("OpenAI", "AsyncOpenAI"):
        _replace(getattr(sys.modules["openai"], name, None), "post", _sorting_post)
    return True


def _replace(cls: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    with _lock:
        original = getattr(cls, name, None)
        if original is None or hasattr(original, "__embedonce_original__"):
            return
        method: Any = make(original)
        method.__embedonce_original__ = original
        method.__module__, method.__qualname__ = cls.__module__, f"{cls.__qualname__}.{name}"  # for pickle
        setattr(cls, name, method)


def _sorting_create(create: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(create)
    def sorting(self: Any, *args: Any, **request: Any) -> Any:
        reader = _find_reader(self._client)
        if reader is None or "input" not in request:
            return create(self, *args, **request)
        request["input"] = _keep_items(request["input"])
        given = _find_input(request, request.get("extra_body"))
        return reader.call(functools.partial(create, self, *args, **request), given)

    return sorting


def _sorting_post(post: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(post)
    def sorting(self: Any, path: Any, *args: Any, **request: Any) -> Any:
        body, extra = request.get("body"), (request.get("options") or {}).get("extra_json")
        is_ours = str(path).strip("/").rpartition("/")[2] == "embeddings" and not request.get("stream")
        reader = _find_reader(self) if is_ours and not _is_inside.get() else None
        if isinstance(body, Mapping) and "input" in body and reader is not None:
            request["body"] = body = {**body, "input": _keep_items(body["input"])}
        given = _find_input(body, extra)
        if reader is None or given is None:
            return post(self, path, *args, **request)
        return reader.call(functools.partial(post, self, path, *args, **request), given)

    return sorting


def _find_input(body: Any, extra: Any) -> Any:
    """Return the inputs of a request; None if it has no inputs. ``extra`` replaces fields of the body."""
    inputs = [fields["input"] for fields in (extra, body) if isinstance(fields, Mapping) and "input" in fields]
    return inputs[0] if inputs else None


def _keep_items(given: Any) -> Any:
    """Return ``input`` with an iterator as a list: an iterator can be read only once, and its items are counted."""
    return list(given) if isinstance(given, Iterable) and not isinstance(given, Sized) else given


def _count_inputs(given: Any) -> int:
    """Return how many vectors an answer must have: one for a text or a list of tokens, otherwise one per item."""
    if isinstance(given, str) or not isinstance(given, Sized) or isinstance(given, Mapping):
        return 1
    first = next(iter(given), None) if isinstance(given, Iterable) else None
    return 1 if hasattr(first, "__index__") else len(given)


# --- an answer -------------------------------------------------------------------------------


def _find_reader(client: Any) -> _Reader | None:
    """Return what reads the answer to a request that a client sends now; None if the answer is of no concern."""
    read = _current.get()
    if read is not None:
        return _Reader([read], is_known=True)
    with _lock:
        running, is_watched = list(_running), client in _watched
    return _Reader(running, is_known=is_watched) if running or is_watched else None


class _Reader:
    """Reads the answer to one request.

    Args:
        calls: the calls of embedders that the answer may belong to.
        is_known: whether the client is called by an embedder, or was found in one.
    """

    def __init__(self, calls: list[AnswersRead], *, is_known: bool) -> None:
        self._calls = calls
        self._is_known = is_known

    def call(self, send: Callable[[], Any], given: Any) -> Any:
        """Send a request with these inputs, and return its sorted answer, or a coroutine that returns it."""
        count = _count_inputs(given)
        token = _is_inside.set(True)
        try:
            answer = send()
        finally:
            _is_inside.reset(token)
        return self._await_and_read(answer, count) if inspect.isawaitable(answer) else self._read(answer, count)

    async def _await_and_read(self, awaitable: Awaitable[Any], count: int) -> Any:
        token = _is_inside.set(True)
        try:
            answer = await awaitable
        finally:
            _is_inside.reset(token)
        if inspect.iscoroutinefunction(getattr(answer, "parse", None)):
            await answer.read()  # a streamed response; it keeps what it has read
        return self._read(answer, count)

    def _read(self, answer: Any, count: int) -> Any:
        try:
            return self._sort(answer, count)
        except ProviderError as error:
            for call in self._calls:
                call.fail(error)
            if self._is_known:
                raise
            return answer

    def _sort(self, answer: Any, count: int) -> Any:
        """Return an answer of any form with its items in the order of the inputs."""
        if hasattr(answer, "http_response"):  # of ``with_raw_response`` or ``with_streaming_response``
            answer.http_response = self._sort(answer.http_response, count)
        elif hasattr(answer, "status_code"):
            return self._sort_response(answer, count)
        elif isinstance(answer, str):
            return self._sort_body(answer, count) or answer
        else:
            items, changed = _sort_items(answer, count)
            if isinstance(answer, dict):
                answer["data"] = items
            elif changed:
                answer.data = items
            self._add(answer)
        return answer

    def _sort_response(self, response: Any, count: int) -> Any:
        """Return an HTTP response with the items in order, however its reader decodes it."""
        body = self._sort_body(response.read(), count)
        if body is None:
            return response
        headers = [pair for pair in response.headers.multi_items() if pair[0].lower() not in _BODY_HEADERS]
        sorted_response = type(response)(
            response.status_code,
            headers=headers,
            content=body.encode(),
            request=response.request,
            extensions=response.extensions,
            history=response.history,
        )
        sorted_response.elapsed = response.elapsed
        return sorted_response

    def _sort_body(self, body: str | bytes, count: int) -> str | None:
        """Return the body of a response with the items in order; None if they are in order already."""
        try:
            answer = json.loads(body)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ProviderError("the endpoint's answer is not a JSON object; nothing was stored")
        items, changed = _sort_items(answer, count)
        self._add(answer)
        return json.dumps({**answer, "data": items}) if changed else None

    def _add(self, answer: Any) -> None:
        if self._is_known:
            for call in self._calls:
                call.add(answer if len(self._calls) == 1 else None)  # it is not known whose answer it is


_BODY_HEADERS: Final = ("content-encoding", "content-length", "transfer-encoding")


def _sort_items(answer: Any, count: int) -> tuple[list[Any], bool]:
    """Return the items of an answer in the order of the inputs, and whether they have changed.

    Raises:
        ProviderError: the items do not say which vector belongs to which text.
    """
    data = _get(answer, "data")
    items = list(data) if isinstance(data, list | tuple) else []
    order = order_by_index([_get(item, "index") for item in items], count)
    changed = order != list(range(count))
    items = [items[position] for position in order]
    for index, item in enumerate(items):
        if _get(item, "index") is None:  # an embedder may sort by it
            changed = True
            if isinstance(item, dict):
                item["index"] = index
            elif item is not None:
                item.index = index
    return items, changed


def _get(item: Any, name: str) -> Any:
    return item.get(name) if isinstance(item, Mapping) else getattr(item, name, None)
