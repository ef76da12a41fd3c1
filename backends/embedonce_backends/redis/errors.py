"""Errors of Redis. The name of their class is the cause that the engine counts and logs.

If the server replies with an error, the name is the first word of the reply, such as ``MISCONF``. If a connection
fails for a reason in this process or in TLS, the name is that reason, such as ``EMFILE``. Every class derives from the
class that redis-py uses for the same error.
"""

from __future__ import annotations

import errno
import re
import socket
import ssl

import redis
from redis.asyncio.connection import DefaultParser as AsyncDefaultParser
from redis.connection import DefaultParser
from redis.exceptions import ConnectionError, ResponseError

from embedonce.errors import TierTimeout
from embedonce_backends._error_names import LOCAL_ERRORS, find_local_error, rename_error

SLOW = "Redis did not answer in time"
CLOSED_BY_SERVER = "Connection closed by server."
"""Message of redis-py's error for a connection that the server has closed."""

WORDS = re.compile(
    "ASK|BUSY|CLUSTERDOWN|CROSSSLOT|DENIED|EXECABORT|INPROG|IOERR|LOADING|MASTERDOWN|MISCONF|MOVED|NOAUTH|NOPERM|"
    "NOREPLICAS|OOM|READONLY|TRYAGAIN|UNKILLABLE|WRONGPASS|WRONGTYPE"
)
"""First words of error replies that become names. ``ERR`` is missing, because it says nothing about the error."""
NO_FIRST_REPLY = (
    "the server closed a new connection without a reply; if this port expects TLS, write rediss instead of redis in url"
)
CLUSTER_NODE = "this server is a node of a cluster: write the URL as redis+cluster://host:port"
SENTINEL = (
    "the server does not know a command of embedonce: if it is a sentinel, write the URL as "
    "redis+sentinel://host:port/service"
)
NOT_A_SENTINEL = "this server is not a sentinel: write the URL as redis://host:port, or redis+cluster://host:port"
NOT_A_CLUSTER = "this server is not a node of a cluster: write the URL as redis://host:port"


class _NamedReplies:
    """Names the error replies that a parser of redis-py reads, including the replies to a login."""

    def parse_error(self, response: str) -> Exception:
        error: Exception = super().parse_error(response)  # type: ignore[misc]
        word = response.partition(" ")[0]
        return rename_error(error, word) if WORDS.fullmatch(word) else error


class Parser(_NamedReplies, DefaultParser):  # type: ignore[misc, valid-type]
    """redis-py's parser for blocking connections, with named errors."""


class AsyncParser(_NamedReplies, AsyncDefaultParser):  # type: ignore[misc, valid-type]
    """redis-py's parser for async connections, with named errors."""


def translate_error(error: BaseException) -> BaseException:
    """Return a TierTimeout for a timeout of redis-py or the standard library, and name other connection errors."""
    if isinstance(error, redis.TimeoutError) or (
        isinstance(error, TimeoutError) and not isinstance(error, TierTimeout)
    ):
        if type(error.__context__) is TierTimeout:  # redis-py has replaced our own error by a TimeoutError
            return error.__context__
        translated = TierTimeout(SLOW)
        translated.__cause__ = error
        return translated
    return _name_connection_error(error)


def _name_connection_error(error: BaseException) -> BaseException:
    """Name a connection error for its reason if the reason is TLS, the host name, or something missing on this host."""
    reason = error if isinstance(error, OSError) else error.__cause__ or error.__context__
    if not isinstance(error, ConnectionError | OSError) or not isinstance(reason, OSError):
        return error
    if isinstance(reason, socket.gaierror):
        missing = find_local_error()
        if missing is not None:
            error.args = (f"cannot connect: {missing.strerror}",)
        reason = missing or reason
    if reason.errno in LOCAL_ERRORS:
        named = ConnectionError(*error.args) if isinstance(error, OSError) else error
        named.__cause__ = reason
        return rename_error(named, errno.errorcode[reason.errno])
    if isinstance(reason, ssl.SSLError | socket.gaierror) and error is not reason:
        return rename_error(error, type(reason).__name__)
    return error


def explain_end(error: Exception, *, has_answered: bool, tls: object) -> Exception | None:
    """Return an error that mentions TLS if the server closed a new connection without TLS; otherwise return None."""
    was_closed = isinstance(error, OSError) or isinstance(error.__context__, OSError) or str(error) == CLOSED_BY_SERVER
    if has_answered or tls is not None or not was_closed or isinstance(error, TimeoutError | redis.TimeoutError):
        return None
    return ConnectionError(NO_FIRST_REPLY)


# --- the wrong kind of server ---------------------------------------------------------------------


def explain_one_server_reply(error: BaseException) -> bool:
    """Say in the message if a URL for one server leads to a node of a cluster or to a sentinel.

    Return whether the message has changed.
    """
    if not isinstance(error, ResponseError):
        return False
    text = str(error)
    name = type(error).__name__
    if name in ("MOVED", "ASK", "CROSSSLOT", "CLUSTERDOWN") or "not allowed in cluster mode" in text:
        error.args = (CLUSTER_NODE,)
    elif text.startswith("unknown command"):
        error.args = (SENTINEL,)
    return str(error) != text


def explain_sentinel_reply(error: BaseException) -> None:
    """Say in the message if a server that the URL lists as a sentinel is none."""
    if isinstance(error, ResponseError) and str(error).startswith("unknown command"):
        error.args = (NOT_A_SENTINEL,)


def explain_cluster_reply(error: BaseException) -> None:
    """Say in the message if a server that the URL lists as a node of a cluster is none."""
    text = str(error)
    if isinstance(error, ResponseError) and ("cluster support disabled" in text or text.startswith("unknown command")):
        error.args = (f"{NOT_A_CLUSTER} (cluster support disabled)" if "disabled" in text else NOT_A_CLUSTER,)
