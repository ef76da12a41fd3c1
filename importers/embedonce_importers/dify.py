"""The ``dify`` importer: the vectors that Dify keeps in Postgres and in Redis.

Dify caches the vectors of documents in its Postgres database, in the table ``embeddings``, as the pickle of a list. It
caches the vectors of queries in Redis for ten minutes, as base64 of float64 numbers. Both are found under
``sha256(text + "None")``, and both are normalised to length 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Annotated, Protocol

from embedonce import hookimpl
from embedonce.contracts import FoundVectors, Source, Task
from embedonce.errors import ConfigError, SourceError
from embedonce.options import Doc

from ._found import make_found
from ._missing_names import describe_missing
from ._values import ValueForm, decode

api = 1

TABLE = "embeddings"
NOT_DIFY = "the table is not Dify's"


class DifyImporter:
    """Reads the vectors of one model of Dify. They have no texts, so they can only be looked up."""

    def __init__(
        self,
        *,
        url: Annotated[
            str,
            Doc(
                "postgresql://user@host:5432/dify for the vectors of documents, or redis://host:6379/0 for those of "
                "queries: the database or the Redis that Dify itself uses."
            ),
        ],
        provider: Annotated[
            str,
            Doc("Provider of the model as Dify writes it, such as langgenius/openai/openai; in old versions openai."),
        ],
        model: Annotated[str, Doc("Name of the model as Dify writes it, such as text-embedding-3-small.")],
    ) -> None:
        self._store = _make_store(url, provider, model)
        name = f"dify {self._store.name} provider={provider!r} model={model!r}"
        self.source = Source(name, task=self._store.task)

    def __repr__(self) -> str:
        return f"<DifyImporter of {self.source.name}>"

    def check(self) -> None:
        """Check that the store can be read, and that Dify's table has vectors of the model."""
        self._store.check()

    def lookup(self, texts: Sequence[str], /) -> FoundVectors:
        """Return the texts that Dify has embedded, with one query."""
        by_hash = {hashed: text for text in texts if (hashed := hash_text(text)) is not None}
        found = self._store.read(list(by_hash))
        form = self._store.form
        texts = [by_hash[hashed] for hashed in found]
        return make_found(texts, list(found.values()), lambda value: decode(value, form))

    def close(self) -> None:
        """Close the connections."""
        self._store.close()


def hash_text(text: str) -> str | None:
    """Return Dify's hash of a text; None if Dify cannot have hashed it, because it has no UTF-8 form."""
    try:
        return sha256((text + "None").encode()).hexdigest()
    except UnicodeEncodeError:
        return None


class _Store(Protocol):
    """One of the two stores of Dify."""

    name: str
    task: Task
    form: ValueForm

    def check(self) -> None: ...

    def read(self, hashes: Sequence[str]) -> Mapping[str, bytes]:
        """Return the values that the store has, by their hash."""
        ...

    def close(self) -> None: ...


def _make_store(url: str, provider: str, model: str) -> _Store:
    scheme = url.strip().partition(":")[0].lower().partition("+")[0]
    if scheme in ("postgres", "postgresql"):
        return _Documents(url, provider, model)
    if scheme in ("redis", "rediss", "valkey", "valkeys", "unix"):
        return _Queries(url, provider, model)
    raise ConfigError(
        "url must begin with postgresql://, for the vectors of documents, or with redis://, rediss:// or unix://, for "
        "those of queries"
    )


class _Documents:
    """The table ``embeddings`` of Dify's database."""

    task: Task = "document"
    form: ValueForm = "pickled-list"

    def __init__(self, url: str, provider: str, model: str) -> None:
        from ._postgres import Database

        self._database = Database(url)
        self._owner = provider, model
        self.name = self._database.name

    def check(self) -> None:
        from psycopg import sql

        from ._postgres import explain_errors
        from ._postgres_tables import inspect_table

        with explain_errors(self._database):
            table = inspect_table(self._database, TABLE)
            for column in ("provider_name", "model_name", "hash"):
                table.check_column(column, "Dify's", ("varchar", "text", "bpchar"), NOT_DIFY)
            table.check_column("embedding", "Dify's vectors", ("bytea",), NOT_DIFY)
            one = sql.SQL("SELECT embedding FROM embeddings WHERE provider_name = %s AND model_name = %s LIMIT 1")
            if not self._database.run(one, self._owner):
                self._report_model()

    def _report_model(self) -> None:
        from psycopg import sql

        statement = sql.SQL("SELECT DISTINCT provider_name::text, model_name::text FROM embeddings ORDER BY 1, 2")
        pairs = [f"{provider} {model}" for provider, model in self._database.run(statement)]
        problem = f"{self.name} has no vectors of the provider and model"
        raise SourceError(describe_missing(problem, " ".join(self._owner), pairs, "providers and models"))

    def read(self, hashes: Sequence[str]) -> Mapping[str, bytes]:
        from psycopg import sql

        # The order of the columns of Dify's unique index is (model_name, hash, provider_name).
        statement = sql.SQL(
            "SELECT hash::text, embedding FROM embeddings "
            "WHERE provider_name = %s AND model_name = %s AND hash = ANY(%s::text[])"
        )
        wanted = set(hashes)
        rows = self._database.run(statement, (*self._owner, list(hashes)))
        return {hashed: value for hashed, value in rows if hashed in wanted and value is not None}

    def close(self) -> None:
        self._database.close()


class _Queries:
    """Dify's keys in Redis."""

    task: Task = "query"
    form: ValueForm = "base64-float64"

    def __init__(self, url: str, provider: str, model: str) -> None:
        from ._redis import RedisReader

        self._reader = RedisReader(url)
        self._prefix = f"{provider}_{model}_"
        self.name = self._reader.name

    def check(self) -> None:
        # An empty store is no error, because Dify keeps the vector of a query for ten minutes only.
        with self._reader.explain_errors():
            self._reader.get_values([self._prefix.encode()])

    def read(self, hashes: Sequence[str]) -> Mapping[str, bytes]:
        values = self._reader.get_values([(self._prefix + hashed).encode() for hashed in hashes])
        return {hashed: value for hashed, value in zip(hashes, values, strict=True) if value is not None}

    def close(self) -> None:
        self._reader.close()


@hookimpl
def embedonce_importers() -> Mapping[str, type[DifyImporter]]:
    """Return the class of the ``dify`` importer."""
    return {"dify": DifyImporter}
