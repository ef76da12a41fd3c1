"""Read-only access to the Postgres databases of other programs, for the importers that read from Postgres.

Every statement runs in a read-only transaction of its own, and a scan in one such transaction. Nothing is prepared and
no setting outlives its transaction, so a transaction pooler such as PgBouncer may be in between.
"""

from __future__ import annotations

import os
import re
import selectors
import threading
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias, TypeVar

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from embedonce.contracts import time_left
from embedonce.errors import ConfigError, SourceError, TierBusy, TierTimeout

Statement: TypeAlias = sql.SQL | sql.Composed
Row: TypeAlias = tuple[Any, ...]
T = TypeVar("T")

MAX_CONNECTIONS = 4
"""Maximum number of connections of an importer, so that it leaves the connections of the server to other programs."""
CONNECT_SECONDS = 10
"""Time limit in seconds for one attempt to connect, unless the URL has a ``connect_timeout``."""
POLL_SECONDS = 0.05
"""Seconds after which a call that waits for the server looks at its deadline again."""
COUNT_SECONDS = 5.0
"""Time limit in seconds for counting rows. A count is only for the progress, so a slow one is given up."""
SCAN_ROWS = 1000
"""Number of rows that a scan reads per round trip."""


# --- connections ------------------------------------------------------------------------------


class _Connection(psycopg.Connection[Row]):
    """A connection whose calls end when the deadline of the current call has passed."""

    def wait(self, gen: Generator[Any, Any, T], *given: Any, **named: Any) -> T:
        # psycopg itself would wait for a server that has stopped answering, as long as its system is up.
        named.setdefault("interval", POLL_SECONDS)
        return super().wait(_limit_wait(gen), *given, **named)


def _limit_wait(steps: Generator[Any, Any, T]) -> Generator[Any, Any, T]:
    """Do the same as ``steps``, which yields when it waits for the server, and raise TierTimeout at the deadline."""
    try:
        wanted = next(steps)
        while True:
            ready = yield wanted
            if not ready:
                time_left()
            wanted = steps.send(ready)
    except StopIteration as end:
        result: T = end.value
        return result


class Database:
    """Runs statements in a Postgres database, and changes nothing in it. Several threads may use it.

    ``url`` is any connection string that libpq accepts. The name of a driver in it is ignored, so that the URLs of
    SQLAlchemy (``postgresql+psycopg://``) work too.

    Raises:
        ConfigError: the URL is invalid. The message does not repeat the URL, because it may contain a password.
    """

    def __init__(self, url: str) -> None:
        self._parameters = parse_url(url)
        self.name = format_address(self._parameters)
        """The address of the server and the name of the database, without user and password."""
        self.is_closed = False
        self._idle: list[_Connection] = []
        self.forget_connections()
        _databases.add(self)
        weakref.finalize(self, _close_all, self._idle)

    def __repr__(self) -> str:
        return f"<Database {self.name}>"

    def forget_connections(self) -> None:
        """Put all connections aside. A forked child calls this, because they belong to its parent."""
        # Closing a connection, or collecting it as garbage, would end the session of the parent.
        _inherited.extend(self._idle)
        self._idle.clear()
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)

    def run(self, statement: Statement, parameters: Sequence[Any] = ()) -> list[Row]:
        """Run one statement within :func:`time_left` seconds, and return its rows.

        Raises:
            SourceError: the server cannot be reached, or refuses the connection.
            TierTimeout: the deadline has passed.
            psycopg.Error: the server refuses the statement. The message has no values of the table.
        """
        try:
            return self._run_once(statement, parameters)
        except psycopg.OperationalError:
            # The server has ended the session, for example because it was restarted. Reading twice does no harm.
            return self._run_once(statement, parameters)

    def _run_once(self, statement: Statement, parameters: Sequence[Any]) -> list[Row]:
        with self._lend() as connection:
            _begin(connection, time_left())
            rows = connection.cursor(binary=True).execute(statement, parameters).fetchall()
            connection.execute("COMMIT")
        return rows

    def scan(self, statement: Statement, parameters: Sequence[Any] = ()) -> Iterator[list[Row]]:
        """Yield the rows of a statement, in parts. Rows of one table come in the order in which the table has them.

        All parts are from the same moment. The order is the same each time, as long as the table does not change.
        """
        with self._lend() as connection:
            _begin(connection, None)
            # Otherwise the server may start in the middle of a table that another scan is reading, and may end the
            # session while the caller stores the rows.
            connection.execute("SET LOCAL synchronize_seqscans = off")
            connection.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
            if connection.info.server_version >= 170000:
                connection.execute("SET LOCAL transaction_timeout = 0")
            with connection.cursor("embedonce", binary=True) as cursor:
                cursor.execute(statement, parameters)
                while rows := cursor.fetchmany(SCAN_ROWS):
                    yield rows
            connection.execute("COMMIT")

    def count(self, statement: Statement, parameters: Sequence[Any] = ()) -> int | None:
        """Return the number that a statement counts; None if the server has not counted it after a few seconds."""
        with self._lend() as connection:
            _begin(connection, COUNT_SECONDS)
            try:
                row = connection.execute(statement, parameters).fetchone()
            except psycopg.errors.QueryCanceled:
                row = None
            connection.execute("ROLLBACK")
        return None if row is None else int(row[0])

    def close(self) -> None:
        """Close the connections that are not in use; a connection in use is closed after its call."""
        self.is_closed = True
        _close_all(self._idle)

    @contextmanager
    def _lend(self) -> Iterator[_Connection]:
        """Lend a connection to a block. It is closed after an error, because its state is not known then."""
        free = self._free
        if not free.acquire(timeout=time_left()):
            raise TierBusy(f"all {MAX_CONNECTIONS} connections of the importer to Postgres are in use")
        connection: _Connection | None = None
        is_reusable = False
        try:
            connection = self._take()
            yield connection
            is_reusable = True
        except psycopg.errors.QueryCanceled:
            raise TierTimeout("Postgres did not answer in time") from None
        except psycopg.errors.CharacterNotInRepertoire:
            problem = f"{self.name} has text that is not UTF-8; convert it, or read a view without these rows"
            raise SourceError(problem) from None
        except psycopg.Error as error:
            if error.diag.message_primary:
                error.args = (error.diag.message_primary,)  # the details can quote a row
            raise
        finally:
            if connection is not None:
                self._give(connection, is_reusable)
            free.release()

    def _take(self) -> _Connection:
        if self.is_closed:
            raise SourceError("the importer is closed; make a new one")
        while self._idle:
            with suppress(IndexError):  # another thread was faster
                connection = self._idle.pop()
                if _is_usable(connection):
                    return connection
                connection.close()
        return self._connect()

    def _give(self, connection: _Connection, is_reusable: bool) -> None:
        if is_reusable and not self.is_closed:
            self._idle.append(connection)
        if not is_reusable or self.is_closed:
            connection.close()

    def _connect(self) -> _Connection:
        parameters = dict(self._parameters)
        if (left := time_left()) is not None:
            parameters["connect_timeout"] = min(int(parameters["connect_timeout"]), max(1, int(left)))
        try:
            return _Connection.connect(**parameters, autocommit=True, prepare_threshold=None)
        except psycopg.OperationalError as error:
            reason = _explain_failure(error)
        time_left()
        # The original error is not the cause, because it may quote a part of the URL.
        raise SourceError(f"cannot connect to {self.name}: {reason}")


def _begin(connection: _Connection, seconds: float | None) -> None:
    """Begin a read-only transaction, in which a statement may take ``seconds``."""
    begin: Statement = sql.SQL("BEGIN READ ONLY")
    if seconds is not None:
        begin += sql.SQL("; SET LOCAL statement_timeout = {}").format(max(1, int(1000 * seconds)))
    connection.execute(begin)


def _is_usable(connection: _Connection) -> bool:
    """Return whether an idle connection still has its session. The server sends something only when it ends one."""
    if connection.closed:
        return False
    with selectors.DefaultSelector() as selector:
        selector.register(connection.fileno(), selectors.EVENT_READ)
        return not selector.select(0)


def _close_all(idle: list[_Connection]) -> None:
    while idle:
        idle.pop().close()


_databases: weakref.WeakSet[Database] = weakref.WeakSet()
_inherited: list[_Connection] = []
"""The connections of the parent in a forked child."""


def _forget_after_fork() -> None:
    for database in list(_databases):
        database.forget_connections()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)


# --- URLs and errors --------------------------------------------------------------------------


def parse_url(url: str) -> dict[str, Any]:
    """Return the connection parameters of a URL.

    Raises:
        ConfigError: the URL is invalid. The message does not repeat the URL, because it may contain a password.
    """
    found: dict[str, Any] | None = None
    with suppress(psycopg.Error):  # its message quotes the URL, so it must not be the context of ours
        found = dict(conninfo_to_dict(re.sub(r"^\s*(postgres(?:ql)?)\+\w+://", r"\1://", url)))
    if found is None:
        raise ConfigError(
            "url is not a Postgres URL, or has an option that libpq does not have; expected a URL such as "
            "postgresql://user@host:5432/database"
        )
    found["connect_timeout"] = found.get("connect_timeout") or os.environ.get("PGCONNECT_TIMEOUT") or CONNECT_SECONDS
    if not str(found["connect_timeout"]).isdecimal():
        raise ConfigError("connect_timeout of the url must be a whole number of seconds")
    found.setdefault("fallback_application_name", "embedonce")
    found["client_encoding"] = "UTF8"
    return found


def format_address(parameters: Mapping[str, Any]) -> str:
    """Return a URL with the server and the database only, as far as the parameters name them."""
    # A password with an @ that is not escaped ends up in the host.
    host = str(parameters.get("host") or parameters.get("hostaddr") or os.environ.get("PGHOST", "")).rpartition("@")[2]
    port = parameters.get("port") or os.environ.get("PGPORT")
    database = parameters.get("dbname") or os.environ.get("PGDATABASE", "")
    return f"postgresql://{host}{f':{port}' if port else ''}/{database}"


_FAILURES: Mapping[str, str] = {
    "Connection refused|could not connect|No such file": "no server is listening there; check url, or start the server",
    "resolve host|translate host": "the host name is unknown; check url",
    "timeout expired|timed out": "the server did not answer in time",
    "password authentication failed|no password supplied": "the server refuses the user or the password; check url",
    "no pg_hba.conf entry|authentication failed|not permitted to log in|role .* does not exist": (
        "the server does not let this user in; check url, or ask the administrator of the server"
    ),
    "database .* does not exist": "the server has no database of this name; check the end of url",
    "permission denied for database": "this user may not connect to the database",
    "starting up|shutting down|not yet accepting|recovery": "the server is starting or stopping; try again later",
    "too many connections|too many clients|connection slots": "the server has no free connection; try again later",
    "SSL|certificate": "TLS failed; check sslmode and sslrootcert of url",
}
"""Patterns in the messages of failed connections, and what to tell the user. The messages themselves may quote a part
of the URL, and so a part of a password."""


def _explain_failure(error: psycopg.OperationalError) -> str:
    text = str(error)
    for pattern, reason in _FAILURES.items():
        if re.search(pattern, text):
            return reason
    return "the connection failed; check url, for example with psql"


@contextmanager
def explain_errors(database: Database) -> Iterator[None]:
    """Raise SourceError in place of the errors of Postgres in a block, for ``check`` of an importer."""
    try:
        yield
    except psycopg.errors.InsufficientPrivilege as error:
        raise SourceError(
            f"{database.name}: {error}. Let the role of url read it: GRANT SELECT ON TABLE … TO …, and GRANT USAGE ON "
            "SCHEMA … TO …"
        ) from error
    except psycopg.Error as error:
        raise SourceError(f"cannot read {database.name}: {error}") from error


def is_storable(text: str) -> bool:
    """Return whether a text can be in a Postgres database at all: it has no NUL and no lone surrogate."""
    if "\0" in text:
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
