"""Reads the answers that OpenAI clients inside an embedder receive, so that each text gets its own vector.

Frameworks take the items of an answer as they come and ignore their ``index``. If a vector were missing, superfluous
or out of order, the cache would store vectors for the wrong texts. A wrapper cannot reach every client: an embedder may
make its client at the first call, or a new client for each call. So this module replaces the method that all clients
have in common, ``create`` of their ``embeddings``. The replacement does nothing unless an embedder is called inside
:func:`reading_answers`, or the client was found in a wrapped embedder.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
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
        model = getattr(answer, "model", None)
        tokens = getattr(getattr(answer, "usage", None), "total_tokens", None)
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
_watched: WeakSet[Any] = WeakSet()
_lock = threading.Lock()


@contextmanager
def reading_answers() -> Iterator[AnswersRead]:
    """Sort the answers of all OpenAI clients that are called in this context, and collect what else they say.

    Raises:
        ProviderError: an answer does not say which vector belongs to which text.
    """
    is_ready = _replace_create()
    read = AnswersRead()
    token = _current.set(read)
    try:
        yield read
    finally:
        _current.reset(token)
    read.raise_error()
    if not is_ready and _replace_create():
        raise ProviderError(
            "the embedder has imported openai during its call, so the order of the answers was not checked and nothing "
            "was stored; call it again, or import openai earlier"
        )


def watch_client(item: object) -> None:
    """Sort the answers of a client, or of its ``embeddings``, even if an embedder calls it in a thread of its own."""
    if any(cls.__module__.partition(".")[0] == "openai" for cls in type(item).__mro__):
        _replace_create()
        with _lock:
            _watched.add(getattr(item, "_client", item) if hasattr(item, "create") else item)


def _replace_create() -> bool:
    """Replace ``create`` of ``openai``'s resources, once. Return False if nothing has imported ``openai`` yet."""
    if "openai" not in sys.modules:
        return False
    try:
        module = importlib.import_module("openai.resources.embeddings")  # openai itself imports it at the first call
    except ImportError:
        return True  # a stand-in or another version, which has no such clients
    for name in ("Embeddings", "AsyncEmbeddings"):
        cls = getattr(module, name, None)
        with _lock:
            if cls is not None and not hasattr(cls.create, "__embedonce_original__"):
                cls.create = _sorting(cls.create)
    return True


def _sorting(create: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(create)
    def sorting(self: Any, *args: Any, **request: Any) -> Any:
        read = _current.get()
        if (read is None and self._client not in _watched) or "input" not in request:
            return create(self, *args, **request)
        given = request["input"]
        if isinstance(given, Iterable) and not isinstance(given, Sized):
            request["input"] = given = list(given)  # an iterator can be read only once, and its items are counted
        answer = create(self, *args, **request)
        if inspect.isawaitable(answer):
            return _await_and_read(answer, _count_inputs(given), read)
        return _read(answer, _count_inputs(given), read)

    sorting.__embedonce_original__ = create  # type: ignore[attr-defined]
    return sorting


def _count_inputs(given: Any) -> int:
    """Return how many vectors an answer must have: one for a text or a list of tokens, otherwise one per item."""
    if isinstance(given, str) or not isinstance(given, Sized) or isinstance(given, Mapping):
        return 1
    first = next(iter(given), None) if isinstance(given, Iterable) else None
    return 1 if hasattr(first, "__index__") else len(given)


async def _await_and_read(awaitable: Awaitable[Any], count: int, read: AnswersRead | None) -> Any:
    answer = await awaitable
    parsed = getattr(answer, "parse", None)
    if inspect.iscoroutinefunction(parsed):  # a streamed response: its parsed answer is kept, as below
        _sort(await parsed(), count, read)
        return answer
    return _read(answer, count, read)


def _read(answer: Any, count: int, read: AnswersRead | None) -> Any:
    # ``with_raw_response`` returns an object that parses the answer when it is asked to, and then keeps it.
    _sort(answer.parse() if hasattr(answer, "http_response") else answer, count, read)
    return answer


def _sort(answer: Any, count: int, read: AnswersRead | None) -> None:
    try:
        items = list(getattr(answer, "data", None) or ())
        order = order_by_index([getattr(item, "index", None) for item in items], count)
    except ProviderError as error:
        if read is not None:
            read.fail(error)
        raise
    answer.data = [items[position] for position in order]
    for index, item in enumerate(answer.data):
        if getattr(item, "index", None) is None:
            item.index = index  # an embedder may sort by it
    if read is not None:
        read.add(answer)
