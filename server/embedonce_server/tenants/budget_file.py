"""The SQLite file with the tokens that each tenant has used per day, shared by all workers of a host.

Each call of a provider is reserved before it begins and settled after it has ended. What is reserved by a worker that
died counts as used, with its upper bound, because nobody knows how much of it the provider has charged.

A reservation is *free* or *in turn*. Free reservations are held with an upper bound for their tokens, so any number of
them together stays within the budget. A reservation in turn is held with its estimate. Each worker has at most one of
them per tenant, for one call of the provider. So at the end, the tokens exceed the budget by at most what one call per
worker was charged more than it was estimated.

No upper bound is known for a model until one of its calls has been settled. Until then, all reservations are in turn.
The same is true after a call that was charged more than its upper bound, until another call is within the bound. So if
a provider reports one wrong number of tokens, the calls of other tenants wait only until the next call has ended. Nor
does that lock a tenant out, because an estimate is never more than the tokens that texts of this size can plausibly
have.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from embedonce.config import Tenant

DAY_SECONDS = 86_400
BUSY_SECONDS = 2.0
"""Maximum number of seconds to wait while other processes write to the file."""
VERSION = 1
"""Version of the tables."""
DEAD = 0
"""Number of the worker to which the reservations of dead workers are moved."""

USUAL_RATIO = 0.25
"""Tokens per byte, as long as nothing is known about a model."""
USUAL_BYTES = 4_096
"""Weight of :data:`USUAL_RATIO` among the texts whose tokens are known, in bytes."""
MAX_BYTES = 2**24
"""Number of bytes from which older texts count less in the ratio of a tenant."""
TEXT_BYTES = 16
"""Bytes that are added to each text for its bound, because a model may add tokens to each text."""
SAFETY = 4.0
"""Largest plausible number of tokens per byte. Tokenizers make at most one, so this covers prompts and errors."""
LARGEST_DECAY = 0.99
"""Factor by which the largest ratio of a model is forgotten with each settlement."""
MAX_RISE = 16.0
"""Factor by which one call can raise the upper bound. A wrong number of tokens would otherwise count for very long."""
DAY_DECAY = 0.1
"""Factor by which the texts of earlier days count less in the ratio of a tenant."""

KEEP_DAYS = 400

_TABLES = (
    "CREATE TABLE usage (tenant TEXT, day INTEGER, tokens INTEGER NOT NULL, PRIMARY KEY (tenant, day)) WITHOUT ROWID",
    """CREATE TABLE reservations (
        id INTEGER PRIMARY KEY, tenant TEXT NOT NULL, day INTEGER NOT NULL, worker INTEGER NOT NULL,
        estimate INTEGER NOT NULL, held INTEGER NOT NULL, bound INTEGER NOT NULL)""",
    "CREATE INDEX reservations_of_day ON reservations (tenant, day)",
    """CREATE TABLE ratios (
        model TEXT, tenant TEXT, day INTEGER NOT NULL, tokens REAL NOT NULL, bytes REAL NOT NULL,
        PRIMARY KEY (model, tenant)) WITHOUT ROWID""",
    """CREATE TABLE bounds (
        model TEXT PRIMARY KEY, largest REAL NOT NULL, is_known INTEGER NOT NULL) WITHOUT ROWID""",
    f"PRAGMA user_version = {VERSION}",
)


log = logging.getLogger("embedonce.serve")


class Load(NamedTuple):
    """The size of some texts."""

    texts: int
    bytes: int
    """Length in UTF-8, after normalisation."""
    tokens: int | None = None
    """Tokens as the provider's own tokenizer counts them, or None if it cannot count them."""

    @property
    def padded(self) -> int:
        """The bytes with :data:`TEXT_BYTES` more for each text, for upper bounds."""
        return self.bytes + TEXT_BYTES * self.texts


class Reservation(NamedTuple):
    """Tokens that are set aside for texts that are about to be computed."""

    id: int
    tenant: str
    day: int
    """Number of the day since 1970-01-01 in UTC. The tokens belong to this day, even if the call ends on the next."""
    model: str
    load: Load
    estimate: int
    is_free: bool
    """Whether the upper bound of the tokens fits into the budget, so that other calls may run at the same time."""


class Refusal(NamedTuple):
    """The answer for texts that do not fit into the rest of the budget of a day."""

    day: int
    """Number of the day since 1970-01-01 in UTC."""
    left: int
    """Tokens of this day that are not used."""
    seconds: float
    """Seconds until the next day begins."""


Outcome: TypeAlias = Reservation | Refusal | Literal["wait"]
"""``"wait"``: the tokens fit only if calls under way need less than is held for them."""


class Settlement(NamedTuple):
    """What a reserved call was charged."""

    reservation: Reservation
    tokens: int
    measured: float = 0.0
    """How many times the texts of the reservation were charged, if the provider has reported all tokens; else 0."""
    is_unreported: bool = False
    """Whether the provider has embedded texts and has reported no tokens at all, so that only estimates can count."""


class Usage(NamedTuple):
    """The tokens of a tenant on the current day (UTC)."""

    used: int
    """Tokens of calls that have ended, and an upper bound for those of workers that died."""
    reserved: int
    """Estimated tokens of the calls under way."""
    limit: int
    """The tenant's ``tokens_per_day``."""


class BudgetFile:
    """The file of one worker. It is opened at the first use, and again after each failure. One thread uses it.

    Args:
        path: the file. If it is missing, it is created, and all tenants have used nothing.
        worker: number of this worker, from 1. When the file is opened for the first time, reservations of a worker
            with this number count as used, because that worker is dead.
        clock: function that returns Unix time in seconds.

    All methods raise:
        sqlite3.Error: the file cannot be read or written.
        OSError: the file cannot be created.
    """

    def __init__(self, path: Path, worker: int, clock: Callable[[], float]) -> None:
        self._path = path
        self._worker = worker
        self._clock = clock
        self._connection: sqlite3.Connection | None = None
        self._identity = (0, 0)
        """Device and inode of the open file."""
        self._unsettled: list[Settlement] = []
        """Settlements that could not be written yet."""
        self._is_recovered = False

    def open(self) -> None:
        """Open the file, and create it if it is missing."""
        with self._write():
            pass

    # --- reservations -------------------------------------------------------------------------

    def reserve(self, tenant: str, limit: int, model: str, load: Load, *, has_turn: bool) -> Outcome:
        """Reserve tokens for texts of one call, freely if their bound is known and fits, else in turn."""
        with self._write() as connection:
            day, passed = divmod(self._clock(), DAY_SECONDS)
            day = int(day)
            tokens, size = self._read_sizes(connection, tenant, model, day)
            ratio = (tokens + USUAL_RATIO * USUAL_BYTES) / (size + USUAL_BYTES)
            factor, is_known = self._read_bound(connection, model)
            used, _, held = self._read_day(connection, tenant, day)
            estimate, bound = _estimate(load, ratio), _bound(load, factor)
            free = limit - used
            if limit == 0 or estimate > free:
                return Refusal(day, max(free, 0), DAY_SECONDS - passed)
            free -= held
            is_free = is_known and bound <= free
            if not is_free and (not has_turn or estimate > free):
                return "wait"
            reservation = Reservation(secrets.randbits(62), tenant, day, model, load, estimate, is_free)
            connection.execute(
                """INSERT INTO reservations (id, tenant, day, worker, estimate, held, bound)
                   VALUES (?, ?, ?, ?, ?, ?, ?)""",
                (reservation.id, tenant, day, self._worker, estimate, bound if is_free else estimate, bound),
            )
            return reservation

    def settle(self, settlement: Settlement) -> None:
        """Replace a reservation by what was charged. If this fails, the next call of any method tries it again."""
        self._unsettled.append(settlement)
        with self._write():
            pass

    def recover(self, worker: int) -> None:
        """Count the reservations of a dead worker as used. If it still lives, its settlements correct that."""
        with self._write() as connection:
            connection.execute("UPDATE reservations SET worker = ? WHERE worker = ?", (DEAD, worker))

    def recover_all(self) -> None:
        """Count all reservations as used. No worker may be running."""
        with self._write() as connection:
            connection.execute("UPDATE reservations SET worker = ?", (DEAD,))

    def read_usage(self, tenants: Sequence[Tenant]) -> Mapping[str, Usage]:
        """Return the usage of the tenants that have a budget, by name."""
        with self._write() as connection:
            day = self.find_day()
            usage = {}
            for tenant in tenants:
                if tenant.tokens_per_day is not None:
                    used, reserved, _ = self._read_day(connection, tenant.name, day)
                    usage[tenant.name] = Usage(used, reserved, tenant.tokens_per_day)
            return usage

    def find_day(self) -> int:
        return int(self._clock() // DAY_SECONDS)

    def close(self) -> None:
        """Write what is not settled yet, and close the file. A later call opens it again."""
        try:
            if self._unsettled:
                with self._write():
                    pass
        finally:
            self._disconnect()

    # --- reading and writing ------------------------------------------------------------------

    def _read_day(self, connection: sqlite3.Connection, tenant: str, day: int) -> tuple[int, int, int]:
        """Return a tenant's used tokens, the estimate of the calls under way, and what is held for these calls."""
        row = connection.execute("SELECT tokens FROM usage WHERE tenant = ? AND day = ?", (tenant, day)).fetchone()
        dead, estimate, held = connection.execute(
            """SELECT coalesce(sum(bound) FILTER (WHERE worker = :dead), 0),
                      coalesce(sum(estimate) FILTER (WHERE worker <> :dead), 0),
                      coalesce(sum(held) FILTER (WHERE worker <> :dead), 0)
               FROM reservations WHERE tenant = :tenant AND day = :day""",
            {"dead": DEAD, "tenant": tenant, "day": day},
        ).fetchone()
        return (0 if row is None else row[0]) + dead, estimate, held

    def _read_sizes(self, connection: sqlite3.Connection, tenant: str, model: str, day: int) -> tuple[float, float]:
        """Return the tokens and the bytes of a tenant's earlier texts. Those of earlier days count less."""
        row = connection.execute(
            "SELECT day, tokens, bytes FROM ratios WHERE model = ? AND tenant = ?", (model, tenant)
        ).fetchone()
        if row is None:
            return 0.0, 0.0
        weight = DAY_DECAY ** max(0, day - row[0])
        return row[1] * weight, row[2] * weight

    def _read_bound(self, connection: sqlite3.Connection, model: str) -> tuple[float, bool]:
        """Return the tokens per byte for upper bounds, and whether they are known. All tenants share them."""
        row = connection.execute("SELECT largest, is_known FROM bounds WHERE model = ?", (model,)).fetchone()
        largest, is_known = (0.0, False) if row is None else row
        return max(SAFETY, 2.0 * largest), bool(is_known)

    def _write_settlement(self, connection: sqlite3.Connection, settlement: Settlement) -> None:
        reservation, tokens, measured, is_unreported = settlement
        connection.execute("DELETE FROM reservations WHERE id = ?", (reservation.id,))
        if tokens:
            connection.execute(
                """INSERT INTO usage (tenant, day, tokens) VALUES (?, ?, ?)
                   ON CONFLICT (tenant, day) DO UPDATE SET tokens = tokens + excluded.tokens""",
                (reservation.tenant, reservation.day, tokens),
            )
        if measured:
            self._learn_ratio(connection, reservation, tokens, measured)
            self._learn_bound(connection, reservation, tokens / measured)
        elif is_unreported:
            self._write_bound(connection, reservation.model, 0.0, is_known=True)

    def _learn_ratio(
        self, connection: sqlite3.Connection, reservation: Reservation, tokens: int, measured: float
    ) -> None:
        model, tenant, load = reservation.model, reservation.tenant, reservation.load
        day = self.find_day()
        earlier, size = self._read_sizes(connection, tenant, model, day)
        keep = 0.5 if size > MAX_BYTES else 1.0
        tokens = min(tokens, math.ceil(_bound(load, SAFETY) * measured))
        connection.execute(
            "INSERT OR REPLACE INTO ratios (model, tenant, day, tokens, bytes) VALUES (?, ?, ?, ?, ?)",
            (model, tenant, day, earlier * keep + tokens, size * keep + load.bytes * measured),
        )

    def _learn_bound(self, connection: sqlite3.Connection, reservation: Reservation, tokens: float) -> None:
        """Learn from the tokens of a call. If they are beyond the bound, it is not known until the next call."""
        factor, _ = self._read_bound(connection, reservation.model)
        ratio = tokens / reservation.load.padded
        is_known = ratio <= factor
        self._write_bound(connection, reservation.model, min(ratio, MAX_RISE * factor), is_known=is_known)

    def _write_bound(self, connection: sqlite3.Connection, model: str, ratio: float, *, is_known: bool) -> None:
        connection.execute(
            f"""INSERT INTO bounds (model, largest, is_known) VALUES (?, ?, ?)
                ON CONFLICT (model) DO UPDATE SET
                    largest = max(largest * {LARGEST_DECAY}, excluded.largest), is_known = excluded.is_known""",
            (model, ratio, is_known),
        )

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        """Run a transaction that first writes what is not settled yet. After a failure, the file is opened again."""
        try:
            connection = self._connect()
            connection.execute("BEGIN IMMEDIATE")
            for settlement in self._unsettled:
                self._write_settlement(connection, settlement)
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            self._disconnect()  # this rolls back
            raise
        self._unsettled.clear()

    # --- opening ------------------------------------------------------------------------------

    def _connect(self) -> sqlite3.Connection:
        """Return the open connection. If the file was replaced or deleted since, open the file that is there now."""
        if self._connection is not None:
            if _identify(self._path) == self._identity:
                return self._connection
            self._disconnect()
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(self._path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            identity = _identify(self._path)
            connection.execute("PRAGMA journal_mode = WAL")
            # A commit waits for the disk only at checkpoints. If the host loses its power, the last seconds may be
            # lost. If only the process ends, nothing is lost.
            connection.execute("PRAGMA synchronous = NORMAL")
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        self._connection, self._identity = connection, identity
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Create the tables of a new file. Count the reservations of an earlier worker with this number as used."""
        connection.execute("BEGIN IMMEDIATE")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > VERSION:
            raise sqlite3.NotSupportedError(f"the file has version {version} and was written by a newer embedonce")
        if version == 0:
            for statement in _TABLES:
                connection.execute(statement)
        if not self._is_recovered:
            connection.execute("UPDATE reservations SET worker = ? WHERE worker = ?", (DEAD, self._worker))
            before = self.find_day() - KEEP_DAYS
            for table in ("usage", "reservations", "ratios"):
                connection.execute(f"DELETE FROM {table} WHERE day < ?", (before,))
        connection.execute("COMMIT")
        self._is_recovered = True

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def recover_budgets(path: Path, clock: Callable[[], float] = time.time) -> None:
    """Count all that workers of an earlier server have reserved as used. Call this before a worker starts.

    A worker that starts recovers only its own number, and there may be fewer workers now.
    """
    if not path.exists():
        return
    file = BudgetFile(path, DEAD, clock)
    try:
        file.recover_all()
        file.close()
    except (sqlite3.Error, OSError) as error:
        # The workers log what that means for tenants, and try again.
        log.warning("%s: the tokens of calls that an earlier server began cannot be counted (%s)", path, error)


def _identify(path: Path) -> tuple[int, int]:
    """Return the device and the inode of a file, or zeros if it is missing."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return 0, 0
    return found.st_dev, found.st_ino


def _estimate(load: Load, ratio: float) -> int:
    if load.tokens is not None:
        return load.tokens
    return min(max(load.texts, math.ceil(load.bytes * ratio)), _bound(load, SAFETY))


def _bound(load: Load, factor: float) -> int:
    return max(math.ceil(load.padded * factor), load.tokens or 0)
