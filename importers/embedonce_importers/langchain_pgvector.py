"""The ``langchain-pgvector`` importer: the collections of LangChain's ``PGVector`` (langchain-postgres).

All collections are in two tables: ``langchain_pg_collection(uuid, name)`` and
``langchain_pg_embedding(collection_id, document, embedding)``. ``PGVector`` embeds exactly the text in ``document``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

from psycopg import sql

from embedonce import hookimpl
from embedonce.contracts import FoundVectors, Source
from embedonce.errors import SourceError
from embedonce.options import Doc

from ._found import NO_TEXT, merge_repeated
from ._missing_names import describe_missing
from ._postgres import Database, Row, Statement, explain_errors, is_storable
from ._postgres_tables import BinaryDecoder, decode_rows, inspect_table, select_vector

api = 1

COLLECTIONS = "langchain_pg_collection"
EMBEDDINGS = "langchain_pg_embedding"
OTHER_STORE = (
    '. For a table of LangChain\'s PGVectorStore, use the importer "postgres" with text_column = "content" and '
    'vector_column = "embedding"'
)

# Not a join, because the server could return its rows in another order each time.
_FROM = sql.SQL(f"FROM {EMBEDDINGS} e WHERE e.collection_id = (SELECT c.uuid FROM {COLLECTIONS} c WHERE c.name = %s)")


class LangChainPGVectorImporter:
    """Reads one collection of LangChain's ``PGVector``."""

    def __init__(
        self,
        *,
        url: Annotated[
            str,
            Doc(
                "postgresql://user@host:5432/database, or any other connection string that libpq accepts. The URL that "
                "LangChain uses works too: +psycopg in it is ignored."
            ),
        ],
        collection: Annotated[str, Doc("Name of the collection.")] = "langchain",
    ) -> None:
        self._database = Database(url)
        self._collection = collection
        self._known: tuple[Statement, BinaryDecoder] | None = None
        self.source = Source(f"langchain-pgvector {self._database.name} collection={collection!r}", task="document")

    def __repr__(self) -> str:
        return f"<LangChainPGVectorImporter of {self.source.name}>"

    def check(self) -> None:
        """Check that the tables and the collection exist, and that they can be read."""
        with explain_errors(self._database):
            self._known = None
            self._database.run(self._get_select()[0] + sql.SQL(" LIMIT 1"), (self._collection,))

    def lookup(self, texts: Sequence[str], /) -> FoundVectors:
        """Return the texts that are documents of the collection, with one query."""
        asked = [text for text in texts if is_storable(text)]
        select, decode = self._get_select()
        rows = self._database.run(select + sql.SQL(" AND e.document = ANY(%s)"), (self._collection, asked))
        # The collation of the database may count different texts as equal.
        wanted = set(asked)
        return merge_repeated(_make_part([row for row in rows if row[0] in wanted], decode))

    def scan(self) -> Iterator[FoundVectors]:
        """Yield all documents of the collection, in the order of the table."""
        select, decode = self._get_select()
        for rows in self._database.scan(select, (self._collection,)):
            yield _make_part(rows, decode)

    def count(self) -> int | None:
        """Return the number of rows of the collection; None if counting takes long."""
        return self._database.count(sql.SQL("SELECT count(*) ") + _FROM, (self._collection,))

    def close(self) -> None:
        """Close the connections."""
        self._database.close()

    def _get_select(self) -> tuple[Statement, BinaryDecoder]:
        """Return the statement that selects the rows of the collection, and a decoder of their vectors.

        The first call inspects the tables.
        """
        if self._known is None:
            inspect_table(self._database, COLLECTIONS, advice=OTHER_STORE)
            table = inspect_table(self._database, EMBEDDINGS, advice=OTHER_STORE)
            advice = "expected vector; the table is not LangChain's"
            kind = table.check_column("embedding", "LangChain's vectors", ("vector", "halfvec"), advice)
            table.check_column("document", "LangChain's texts", ("varchar", "text"), advice)
            self._check_collection()
            vector = select_vector(sql.Identifier("e", "embedding"), kind)
            self._known = sql.SQL("SELECT e.document, {} ").format(vector) + _FROM, BinaryDecoder(kind)
        return self._known

    def _check_collection(self) -> None:
        rows = self._database.run(sql.SQL(f"SELECT name FROM {COLLECTIONS} ORDER BY 1"))
        names = Counter(str(name) for (name,) in rows)
        if names[self._collection] > 1:
            raise SourceError(
                f"{self._database.name} has {names[self._collection]} collections with the name {self._collection!r} "
                f"in {COLLECTIONS}; rename all but one of them"
            )
        if self._collection not in names:
            problem = f"{self._database.name} has no collection"
            raise SourceError(describe_missing(problem, self._collection, [*names], "collections"))


def _make_part(rows: Sequence[Row], decode: BinaryDecoder) -> FoundVectors:
    with_text = [row for row in rows if row[0] is not None]
    found = decode_rows([text for text, _ in with_text], [value for _, value in with_text], decode)
    missing = len(rows) - len(with_text)
    return FoundVectors(found.texts, found.vectors, {**found.unreadable, NO_TEXT: missing}) if missing else found


@hookimpl
def embedonce_importers() -> Mapping[str, type[LangChainPGVectorImporter]]:
    """Return the class of the ``langchain-pgvector`` importer."""
    return {"langchain-pgvector": LangChainPGVectorImporter}
