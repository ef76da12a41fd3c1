"""Names for errors of client libraries. The engine counts and logs an error under the name of its class.

A client library often uses one class for many errors. These functions give an error a class of its own, which derives
from the library's class. Pass only names from a fixed list, because names are labels of metrics.
"""

from __future__ import annotations

import errno
import os
import socket
from functools import cache
from typing import Any, TypeVar

E = TypeVar("E", bound=BaseException)

LOCAL_ERRORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})
"""Errors of the system that say that this process or host lacks something. The server may be healthy."""


def rename_error(error: E, name: str) -> E:
    """Replace the error's class by one with this name that derives from the error's own class; return the error."""
    kind: Any = type(error)
    if kind.__module__ != __name__:
        error.__class__ = _make_class(name, kind)  # type: ignore[assignment]
    return error


@cache
def _make_class(name: str, base: type[BaseException]) -> type[BaseException]:
    return type(name, (base,), {"__module__": __name__})


def name_local_error(error: OSError) -> OSError:
    """Return an error of the same kind whose class has the symbol of its number, such as ``EMFILE``."""
    number = error.errno or 0
    named = _make_class(errno.errorcode[number], OSError)(number, os.strerror(number))
    assert isinstance(named, OSError)
    return named


def find_local_error() -> OSError | None:
    """Return the reason why this process cannot open a socket, or None if it can.

    Without free descriptors, a name lookup fails with a reason that misleads, such as "temporary failure in name
    resolution".
    """
    try:
        socket.socket().close()
    except OSError as error:
        return error
    return None
