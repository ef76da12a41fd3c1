"""The table of a Postgres tier: how to inspect and make the table, and the SQL statements that use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, LiteralString, Protocol, TypeAlias

from psycopg.sql import SQL, Composable, Identifier
from psycopg.sql import Literal as Quoted

from embedonce.errors import TierError

from .exchange import Parameter, Row
from .rows import encode_long

Column: TypeAlias = Literal["auto", "vector", "bytea"]

VERSION = 1
"""Version of the table's schema. The table's comment contains the version, because every role may read the comment and
every dump includes the comment."""
COMMENT = "embedonce cache, schema "
LOCK = 0x656F2031
"""Key of the ``pg_advisory_xact_lock`` that lets only one process at a time make the table."""
SWEEP_ROWS = 1000
"""Maximum number of expired rows that one statement deletes."""

NOW = "extract(epoch FROM statement_timestamp())::float8"
"""SQL for the server's time in seconds. All hosts use this time, so that they agree on when a lease ends even if
their own clocks differ."""


class Run(Protocol):
    """A function that runs a statement and returns its rows."""

    def __call__(self, statement: bytes, values: Sequence[Parameter] = ()) -> list[Row]: ...


_LOOK = b"""
SELECT
    (SELECT oid FROM pg_catalog.pg_namespace WHERE nspname = $1::text),
    c.oid,
    pg_catalog.obj_description(c.oid, 'pg_class'),
    ARRAY(SELECT attname::text FROM pg_catalog.pg_attribute
          WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped),
    e.extversion,
    e.nspname::text,
    e.oid,
    e.usable,
    (SELECT default_version FROM pg_catalog.pg_available_extensions WHERE name = 'vector'),
    pg_catalog.current_setting('transaction_isolation'),
    pg_catalog.pg_has_role(c.relowner, 'USAGE')
FROM (SELECT) AS one
LEFT JOIN (SELECT pg_class.oid, relowner FROM pg_catalog.pg_class
           JOIN pg_catalog.pg_namespace ON pg_namespace.oid = relnamespace
           WHERE nspname = $1::text AND relname = $2::text AND relkind IN ('r', 'p')) AS c ON true
LEFT JOIN (SELECT pg_type.oid, extversion, nspname,
               pg_catalog.has_schema_privilege(pg_namespace.oid, 'USAGE')
                   AND pg_catalog.has_type_privilege(pg_type.oid, 'USAGE') AS usable
           FROM pg_catalog.pg_extension
           JOIN pg_catalog.pg_namespace ON pg_namespace.oid = extnamespace
           JOIN pg_catalog.pg_type ON typnamespace = extnamespace AND typname = 'vector'
           WHERE extname = 'vector') AS e ON true
"""

COLUMNS: Mapping[str, LiteralString] = {
    "key": 'text COLLATE "C" PRIMARY KEY',
    "scope": """text COLLATE "C" NOT NULL GENERATED ALWAYS AS
        (split_part(key, '.', CASE WHEN split_part(key, '.', 2) IN ('card', 'lease') THEN 3 ELSE 2 END)) STORED""",
    "dtype": "text",
    "dimensions": "integer",
    "created": "double precision",
    "expires": "double precision",
    "kept_until": "double precision",
    "frame": "bytea",
    "metadata": "json",
    "text_preview": "text",
}
COST_COLUMNS: Mapping[str, LiteralString] = {"tokens": "bigint", "seconds": "double precision"}
"""Columns that a table of an earlier version of embedonce does not have. They have no version of their own, because
processes of that version use the table too, and refuse a table with a later version."""


@dataclass(frozen=True, slots=True)
class TableState:
    """The state of the table, its schema and pgvector in a database."""

    schema: bool
    table: bool
    version: int | None
    columns: frozenset[str]
    extension: str | None
    """pgvector's version if it is installed in this database."""
    extension_schema: str
    vector_oid: int | None
    may_use_vectors: bool
    """Whether this role has the privilege to use pgvector's type, and USAGE on the schema that contains it."""
    available: str | None
    """pgvector's version if the server offers it for installation."""
    isolation: str
    """Default isolation level of transactions, such as ``"read committed"``."""
    is_owner: bool
    """Whether this role owns the table, or is a member of the role that owns it. Only an owner may add columns."""

    @property
    def has_vectors(self) -> bool:
        """Whether the table has a vector column."""
        return self.vector_oid is not None and "embedding" in self.columns

    @property
    def has_costs(self) -> bool:
        """Whether the table has the columns for the costs of entries."""
        return self.columns >= COST_COLUMNS.keys()


def inspect_table(run: Run, schema: str, table: str) -> TableState:
    """Return the state of the table, with one query that needs no privileges.

    Raises:
        TierError: a later version of embedonce made the table, or another program made it.
    """
    (row,) = run(_LOOK, (schema.encode(), table.encode()))
    namespace, oid, comment, columns, extension, extension_schema, vector_oid, usable, available, isolation, own = row
    version = None
    if comment is not None and comment.startswith(COMMENT) and comment.removeprefix(COMMENT).isdecimal():
        version = int(comment.removeprefix(COMMENT))
    if version is not None and version > VERSION:
        raise TierError(
            f"the table has version {version}, but this embedonce supports only {VERSION}: "
            "upgrade embedonce, or set the tier's `table` to another name"
        )
    if oid is not None and not frozenset(columns) >= COLUMNS.keys():
        raise TierError(
            f"embedonce did not make the table {table!r} in the schema {schema!r}: "
            "set the tier's `table` to another name"
        )
    return TableState(
        namespace is not None,
        oid is not None,
        version,
        frozenset(columns),
        extension,
        extension_schema or "",
        vector_oid,
        bool(usable),
        available,
        isolation,
        bool(own),
    )


def make_table(run: Run, schema: str, table: str, column: Column) -> str:
    """Make everything that is missing, and return a description of what was done.

    ``run`` must run all statements in the same transaction.

    Raises:
        TierError: a vector column is required, but the server has no pgvector.
        psycopg.Error: an error of the server, for example because the role is not allowed to make tables.
    """
    found = _lock_and_inspect(run, schema, table)
    name = Identifier(schema, table)
    done = []
    if column == "vector" and found.extension is None:
        if found.available is None:
            raise TierError('column = "vector" requires pgvector: install it on the server, or set column = "auto"')
        run(b"CREATE EXTENSION vector")
        found = inspect_table(run, schema, table)
        done.append(f"installed the extension vector {found.extension}")
    if not found.schema:
        run(_to_bytes(SQL("CREATE SCHEMA {}").format(Identifier(schema))))
        done.append(f"made the schema {schema!r}")
    if not found.table:
        for statement in _list_create_statements(name):
            run(_to_bytes(statement))
        done.append(f"made the table {table!r}")
    wants_vectors = column == "vector" or (column == "auto" and found.may_use_vectors)
    if found.vector_oid is not None and wants_vectors and "embedding" not in found.columns:
        kind = Identifier(found.extension_schema, "vector")
        run(_to_bytes(SQL("ALTER TABLE {} ADD COLUMN embedding {}").format(name, kind)))
        done.append("added the vector column")
    if found.table and not found.has_costs:
        run(_to_bytes(_make_cost_statement(name)))
        done.append("added the columns for costs")
    if found.table and found.version is None:
        run(_to_bytes(_make_comment_statement(name)))
    return ", ".join(done) or f"the table {table!r} is up to date (schema {VERSION})"


def add_cost_columns(run: Run, schema: str, table: str) -> None:
    """Add the columns for costs to a table of an earlier version. ``run`` must run all statements in one transaction.

    Raises:
        psycopg.Error: an error of the server, for example because another transaction keeps the table locked.
    """
    if not _lock_and_inspect(run, schema, table).has_costs:
        run(_to_bytes(_make_cost_statement(Identifier(schema, table))))


def _lock_and_inspect(run: Run, schema: str, table: str) -> TableState:
    run(b"SELECT pg_catalog.pg_advisory_xact_lock($1::bigint)", (encode_long(LOCK),))
    return inspect_table(run, schema, table)


def list_grants(found: TableState, schema: str, table: str, column: Column) -> list[str]:
    """Return the statements that let another role use the table. ``ROLE`` stands for the name of that role."""
    grants = [
        SQL("GRANT USAGE ON SCHEMA {} TO ROLE").format(Identifier(schema)),
        SQL("GRANT SELECT, INSERT, UPDATE, DELETE ON {} TO ROLE").format(Identifier(schema, table)),
    ]
    if found.has_vectors and column != "bytea" and found.extension_schema != schema:
        grants.append(SQL("GRANT USAGE ON SCHEMA {} TO ROLE").format(Identifier(found.extension_schema)))
    return [_to_bytes(grant).decode() for grant in grants]


def _list_create_statements(name: Composable) -> list[Composable]:
    kinds: dict[str, LiteralString] = {**COLUMNS, **COST_COLUMNS}
    columns = SQL(",\n    ").join(SQL("{} {}").format(Identifier(key), SQL(kind)) for key, kind in kinds.items())
    return [
        # With this toast_tuple_target, Postgres stores a vector of up to 2,000 dimensions inside its row. If Postgres
        # moved the vector to the TOAST table, reading the vector would take four more reads.
        SQL("CREATE TABLE {} (\n    {}\n) WITH (toast_tuple_target = 8160)").format(name, columns),
        # EXTERNAL turns compression off, because compression would not make vectors smaller.
        SQL("ALTER TABLE {} ALTER COLUMN frame SET STORAGE EXTERNAL").format(name),
        SQL("CREATE INDEX ON {} (kept_until) WHERE kept_until IS NOT NULL").format(name),
        _make_comment_statement(name),
    ]


def _make_cost_statement(name: Composable) -> Composable:
    # The new columns are NULL in each row. Therefore Postgres changes only its catalog, and no row.
    columns = [
        SQL("ADD COLUMN IF NOT EXISTS {} {}").format(Identifier(key), SQL(kind)) for key, kind in COST_COLUMNS.items()
    ]
    return SQL("ALTER TABLE {} {}").format(name, SQL(", ").join(columns))


def _make_comment_statement(name: Composable) -> Composable:
    return SQL("COMMENT ON TABLE {} IS {}").format(name, Quoted(f"{COMMENT}{VERSION}"))


def _to_bytes(statement: Composable) -> bytes:
    return statement.as_bytes(None)


@dataclass(frozen=True, slots=True)
class Statements:
    """The statements for a table in a given state.

    If a statement compares dates, its first parameter is a number of seconds that is added to the server's clock.
    """

    get: bytes
    set: bytes
    add: bytes
    delete: bytes
    scan: bytes
    count: bytes
    measure: bytes
    sweep: bytes
    is_isolated: bool
    """Whether each statement needs a transaction that sets the isolation level to read committed."""
    vector_oid: int | None
    """Id of pgvector's type if new rows use the vector column, or None if they store frames."""


_PREFIXED = "key >= $1::text AND ($2::text IS NULL OR key < $2::text)"

# The server plans this statement anew for each call, and every function and condition makes planning longer. So
# decode_rows drops the rows that have expired. CURRENT_TIMESTAMP is not a function that has to be looked up.
_GET = (
    "SELECT key, {read}, frame, dtype, created, expires, metadata, text_preview, {costs}, kept_until, CURRENT_TIMESTAMP"
    " FROM {table} WHERE key = ANY($1::text[])"
)
# Two statements that lock the same rows in different orders could deadlock. So a statement that stores or deletes
# entries locks the rows in the order of the keys. The statement that deletes expired rows skips locked rows instead.
_INSERT = """
INSERT INTO {table} AS held
    (key, frame, dtype, dimensions, created, expires, metadata, text_preview, kept_until{cost_columns}{embedding})
SELECT key, frame, dtype, dimensions, created, expires, metadata::json, text_preview,
    {now} + $1::float8 + $2::float8{cost_columns}{embedding}
FROM unnest($3::text[], $4::bytea[], $5::text[], $6::integer[], $7::float8[], $8::float8[], $9::text[], $10::text[],
    $11::bigint[], $12::float8[]{vectors})
    AS given (key, frame, dtype, dimensions, created, expires, metadata, text_preview, tokens, seconds{embedding})
ORDER BY key COLLATE "C"
ON CONFLICT (key) DO UPDATE SET frame = excluded.frame, dtype = excluded.dtype, dimensions = excluded.dimensions,
    created = excluded.created, expires = excluded.expires, metadata = excluded.metadata,
    text_preview = excluded.text_preview, kept_until = excluded.kept_until{set_costs}{set_embedding}
"""
_SET = (
    _INSERT
    + """
WHERE held.kept_until IS DISTINCT FROM excluded.kept_until OR held.created IS DISTINCT FROM excluded.created
    OR held.dtype IS DISTINCT FROM excluded.dtype OR held.expires IS DISTINCT FROM excluded.expires
    OR held.frame IS DISTINCT FROM excluded.frame OR held.text_preview IS DISTINCT FROM excluded.text_preview
    OR held.metadata::text IS DISTINCT FROM excluded.metadata::text{or_costs}{or_embedding}
"""
)
_ADD = _INSERT + "WHERE held.kept_until <= {now} + $1::float8 RETURNING key"
_DELETE = """
DELETE FROM {table} WHERE key = ANY(ARRAY(
    SELECT key FROM {table} WHERE key = ANY($1::text[]) ORDER BY key FOR UPDATE))
"""
_SCAN = "SELECT key FROM {table} WHERE " + _PREFIXED + " AND key > $3::text ORDER BY key LIMIT $4::bigint"
_COUNT = "SELECT count(*) FROM {table} WHERE " + _PREFIXED
_MEASURE = (
    "SELECT sum(pg_column_size(held.*))::bigint, min(created), max(created), max(dimensions) FROM {table} AS held"
    " WHERE " + _PREFIXED
)
_SWEEP = """
DELETE FROM {table} WHERE key = ANY(ARRAY(
    SELECT key FROM {table} WHERE kept_until <= {now} + $1::float8 ORDER BY kept_until LIMIT {sweep}
    FOR UPDATE SKIP LOCKED))
"""


def make_statements(found: TableState, schema: str, table: str, column: Column) -> Statements:
    """Return the statements for a table."""
    writes_vectors = found.has_vectors and found.may_use_vectors and column != "bytea"
    space = found.extension_schema
    optional = ("cost_columns", "set_costs", "or_costs", "embedding", "vectors", "set_embedding", "or_embedding")
    parts: dict[str, Composable] = dict.fromkeys(optional, SQL(""))
    if writes_vectors:
        parts["embedding"] = SQL(", embedding")
        parts["vectors"] = SQL(", $13::{}[]").format(Identifier(space, "vector"))
    if found.has_vectors:  # even if new rows have no vector, older rows may have one
        parts["set_embedding"] = SQL(", embedding = excluded.embedding")
        parts["or_embedding"] = SQL(" OR held.embedding IS NOT NULL")
    if writes_vectors:
        # This compares bytes, because -0.0 and 0.0 are equal as numbers but have different bytes.
        differs = SQL(" OR {0}(held.embedding) IS DISTINCT FROM {0}(excluded.embedding)")
        parts["or_embedding"] = differs.format(Identifier(space, "vector_send"))
    if found.has_costs:
        parts["cost_columns"] = SQL(", tokens, seconds")
        parts["set_costs"] = SQL(", tokens = excluded.tokens, seconds = excluded.seconds")
        parts["or_costs"] = SQL(
            " OR held.tokens IS DISTINCT FROM excluded.tokens OR held.seconds IS DISTINCT FROM excluded.seconds"
        )
    parts["costs"] = SQL("tokens, seconds" if found.has_costs else "NULL::bigint, NULL::float8")
    parts["read"] = SQL("embedding" if found.has_vectors else "NULL::bytea")
    parts |= {"table": Identifier(schema, table), "now": SQL(NOW), "sweep": Quoted(SWEEP_ROWS)}

    def fill(statement: LiteralString) -> bytes:
        return _to_bytes(SQL(statement).format(**parts))

    return Statements(
        get=fill(_GET),
        set=fill(_SET),
        add=fill(_ADD),
        delete=fill(_DELETE),
        scan=fill(_SCAN),
        count=fill(_COUNT),
        measure=fill(_MEASURE),
        sweep=fill(_SWEEP),
        is_isolated=found.isolation != "read committed",
        vector_oid=found.vector_oid if writes_vectors else None,
    )
