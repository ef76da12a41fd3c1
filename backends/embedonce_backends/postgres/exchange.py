"""Runs statements over connections. Parameters and values are in Postgres' binary format.

A psycopg cursor is not used, because for a statement with one key it takes three times as long as this module.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Sequence
from typing import Any, Literal, TypeAlias

import psycopg
from psycopg.abc import Transformer
from psycopg.errors import error_from_result
from psycopg.pq import ConnStatus, DiagnosticField, ExecStatus, Format, TransactionStatus
from psycopg.pq.abc import PGconn, PGresult

from .connections import AsyncConnection, Connection

Parameter: TypeAlias = bytes | None
"""A parameter in binary format, or None for NULL. The statement casts the parameter to the right type."""
Row: TypeAlias = tuple[Any, ...]
Readiness: TypeAlias = Literal["readable", "writable"]
"""What a socket has to be before a statement can go on."""

BEGIN = b"BEGIN ISOLATION LEVEL READ COMMITTED"
"""Starts a transaction whose statements each see what other transactions have committed. The statements of this backend
rely on that, and a database or role may have another default."""


def execute(connection: Connection, statement: bytes, values: Sequence[Parameter] = ()) -> list[Row]:
    """Run one statement and return its rows.

    Raises:
        TierTimeout: the deadline has passed. The connection cannot be used afterwards.
        psycopg.Error: the server refused the statement, or the connection is lost.
    """
    steps = _exchange(connection.pgconn, statement, values)
    waiter = connection.waiter
    try:
        while True:
            if next(steps) == "readable":
                waiter.wait_until_readable()
            else:
                waiter.wait_until_writable()
    except StopIteration as done:
        return _load_rows(connection.transformer, done.value)


async def execute_async(connection: AsyncConnection, statement: bytes, values: Sequence[Parameter] = ()) -> list[Row]:
    """Run one statement and return its rows. This raises the same errors as :func:`execute`, except TierTimeout."""
    steps = _exchange(connection.pgconn, statement, values)
    try:
        while True:
            await _wait_on_loop(connection.pgconn.socket, next(steps))
    except StopIteration as done:
        return _load_rows(connection.transformer, done.value)


def execute_isolated(connection: Connection, statement: bytes, values: Sequence[Parameter]) -> list[Row]:
    """Run a statement in a transaction whose isolation level is read committed."""
    execute(connection, BEGIN)
    try:
        rows = execute(connection, statement, values)
    except psycopg.Error:
        if connection.pgconn.transaction_status == TransactionStatus.INERROR:
            execute(connection, b"ROLLBACK")
        raise
    execute(connection, b"COMMIT")
    return rows


async def execute_isolated_async(
    connection: AsyncConnection, statement: bytes, values: Sequence[Parameter]
) -> list[Row]:
    """Run a statement in a transaction whose isolation level is read committed."""
    await execute_async(connection, BEGIN)
    try:
        rows = await execute_async(connection, statement, values)
    except psycopg.Error:
        if connection.pgconn.transaction_status == TransactionStatus.INERROR:
            await execute_async(connection, b"ROLLBACK")
        raise
    await execute_async(connection, b"COMMIT")
    return rows


def _exchange(pgconn: PGconn, statement: bytes, values: Sequence[Parameter]) -> Generator[Readiness, None, PGresult]:
    """Send a statement and read its result.

    The generator never waits. It yields what the caller has to wait for.
    """
    results: list[PGresult] = []
    try:
        pgconn.send_query_params(statement, values, None, [Format.BINARY] * len(values), Format.BINARY)
        while pgconn.flush():  # the socket does not take the whole statement at once
            yield "writable"
        while True:
            while pgconn.is_busy():
                yield "readable"
                pgconn.consume_input()
            result = pgconn.get_result()
            if result is None:
                return results[0]
            results.append(result)
    except psycopg.OperationalError as error:
        raise _find_reason(pgconn, results) or _shorten_loss(error) from None


def _find_reason(pgconn: PGconn, results: list[PGresult]) -> psycopg.Error | None:
    """Return the error that the server sent before it closed the connection, or None if it sent none."""
    # libpq has dropped the connection, so reading a result does not wait.
    while pgconn.status == ConnStatus.BAD and (result := pgconn.get_result()) is not None:
        results.append(result)
    for result in results:
        if result.error_field(DiagnosticField.SQLSTATE):  # libpq's own errors have no SQLSTATE
            return error_from_result(result)
    return None


def _shorten_loss(error: psycopg.OperationalError) -> psycopg.OperationalError:
    """Keep the first line of libpq's message. The other lines only guess at the reason."""
    error.args = (str(error).partition("\n")[0],)
    return error


async def _wait_on_loop(descriptor: int, wanted: Readiness) -> None:
    """Wait until the socket is ready. A cancelled wait ends at once; one of psycopg would wait for the reply first."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    add, remove = (
        (loop.add_reader, loop.remove_reader) if wanted == "readable" else (loop.add_writer, loop.remove_writer)
    )
    add(descriptor, wake)
    try:
        await ready
    finally:
        remove(descriptor)


def _load_rows(transformer: Transformer, result: PGresult) -> list[Row]:
    if result.status == ExecStatus.COMMAND_OK:
        return []
    if result.status != ExecStatus.TUPLES_OK:
        raise error_from_result(result)
    transformer.set_pgresult(result, format=Format.BINARY)
    rows = transformer.load_rows(0, result.ntuples, tuple)
    transformer.set_pgresult(None)  # an idle connection must not keep its last result in memory
    return rows
