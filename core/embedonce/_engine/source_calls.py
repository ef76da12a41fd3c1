"""Calls the methods of an importer, so that nothing that it does can end or repeat the call that needs it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from embedonce.errors import SourceError

T = TypeVar("T")

_running: ContextVar[tuple[Any, ...]] = ContextVar("embedonce_running_importers", default=())
"""The importers whose code is running in this context."""


def is_running(importer: Any) -> bool:
    """Return whether the code of this importer is running in this context, so that it must not be called again."""
    return any(one is importer for one in _running.get())


def call_source(importer: Any, call: Callable[[], T]) -> T:
    """Return the result of a call of an importer's method.

    Raises:
        SourceError: the method raised an exception such as SystemExit or CancelledError, which would end the caller.
        Exception: any other error of the method.
    """
    with run_source(importer):
        return call()


@contextmanager
def run_source(importer: Any) -> Iterator[None]:
    """Run code of an importer in the block. The errors are those of :func:`call_source`."""
    token = _running.set((*_running.get(), importer))
    try:
        yield
    except Exception:
        raise
    except BaseException as error:
        # Signals interrupt the main thread only, so an exception there may be a real Ctrl-C.
        if threading.current_thread() is threading.main_thread():
            raise
        raise SourceError(f"the importer raised {type(error).__name__}") from error
    finally:
        _running.reset(token)


def name_cause(error: Exception) -> str:
    """Return the cause of an importer's failure for counters: the name of the class of its error."""
    if isinstance(error, TimeoutError):
        return "timeout"
    cause = error.__cause__
    is_wrapped = isinstance(error, SourceError) and cause is not None and not isinstance(cause, Exception)
    return type(cause if is_wrapped else error).__name__
