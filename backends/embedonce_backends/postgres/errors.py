"""Errors of Postgres: names for failed connections, and which failed statements to run again."""

from __future__ import annotations

import errno
import os
import random
import re

import psycopg

from embedonce.contracts import time_left
from embedonce.errors import TierTimeout
from embedonce_backends._error_names import LOCAL_ERRORS, find_local_error, rename_error

REPEATS = 20
"""How many times a statement is repeated at most."""
LONGEST_PAUSE = 0.2
"""Maximum number of seconds before a statement is repeated."""

CONFLICTS = (
    psycopg.errors.SerializationFailure,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.LockNotAvailable,
)
"""Errors of statements that failed only because of another transaction, and changed nothing."""

_CONNECTION_ERRORS = {
    "too many connections|too many clients|connection slots are": "TooManyConnections",
    "password authentication failed|no password supplied": "InvalidPassword",
    "no pg_hba.conf entry|role .* does not exist|not permitted to log in|authentication failed|not allowed": (
        "InvalidAuthorizationSpecification"
    ),
    "database .* does not exist": "InvalidCatalogName",
    "permission denied for database": "InsufficientPrivilege",
    "starting up|shutting down|not yet accepting|recovery": "CannotConnectNow",
    "does not support SSL|SSL error|certificate": "SSLError",
}
"""Patterns in the message of a failed connection, and the name of the error. libpq does not report the SQLSTATE of such
an error, so the message is all that there is. The names are those that psycopg uses for these SQLSTATEs."""


def name_connection_error(error: BaseException) -> BaseException:
    """Give the error of a failed connection the name of its reason, if the reason is known."""
    if type(error) is not psycopg.OperationalError:
        return error
    text = str(error)
    missing = find_local_error()
    if missing is not None and "FATAL" not in text:
        error.args = (f"cannot connect: {missing.strerror}",)
        return rename_error(error, errno.errorcode[missing.errno or 0])
    if "failed to resolve host" in text:
        return rename_error(error, "gaierror")
    for number in LOCAL_ERRORS:
        if os.strerror(number) in text:
            return rename_error(error, errno.errorcode[number])
    for pattern, name in _CONNECTION_ERRORS.items():
        if re.search(pattern, text):
            return rename_error(error, name)
    return error


def shorten_message(error: BaseException) -> None:
    """Keep only the first part of a server's message. The details can quote a row, and so a vector or a text."""
    if isinstance(error, psycopg.Error) and error.diag.message_primary:
        error.args = (error.diag.message_primary,)


class Repetition:
    """Decides whether a failed statement is run again.

    Statements fail because of other transactions if the database's default isolation level is not read committed, and
    also if ``lock_timeout`` is set.
    """

    def __init__(self) -> None:
        self._failures = 0

    def choose_pause(self, error: BaseException) -> float:
        """Return the number of seconds to wait before the statement is run again.

        Raises:
            BaseException: ``error``, if repeating cannot help or if no time is left.
        """
        if not isinstance(error, CONFLICTS) or self._failures >= REPEATS:
            raise error
        self._failures += 1
        pause = random.uniform(0, min(LONGEST_PAUSE, 0.005 * 2**self._failures))
        try:
            left = time_left()
        except TierTimeout:
            raise error from None
        if left is not None and left <= pause:
            raise error
        return pause
