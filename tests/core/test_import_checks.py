"""A source is refused if its vectors may be those of another task."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from embedonce._engine.import_checks import check_source, list_other_tasks
from embedonce.contracts import Source, Task
from embedonce.errors import ImportRefused, SpaceError
from embedonce.keys import VectorSpace
from embedonce.tasks import check_task
from embedonce.testing import CountingProvider

MIXING = Source("caches of notes", mixing="queries and documents are stored under the same keys")
DOCUMENTS = Source("notes.db", task="document")
ANY = Source("vectors.parquet")


class Clusters(CountingProvider):
    """Embeds queries in their own way. The task "cluster" has the vectors of documents. No other task is known."""

    def space(self, task: Task, /) -> VectorSpace:
        check_task(task, ("document", "query", "cluster"), what="provider 'counting'")
        return VectorSpace(provider="counting", model="clusters", task="query" if task == "query" else None)


@pytest.mark.parametrize("source", [MIXING, DOCUMENTS, ANY])
@pytest.mark.parametrize("task", ["document", "query", "cluster"])
def test_a_provider_without_tasks_accepts_every_source(source: Source, task: str) -> None:
    check_source(source, CountingProvider(), task)


@pytest.mark.parametrize("task", ["document", "query", "cluster"])
def test_a_source_that_mixes_tasks_is_refused_if_the_provider_has_tasks(task: str) -> None:
    with pytest.raises(ImportRefused, match="caches of notes: queries and documents are stored under the same keys"):
        check_source(MIXING, Clusters(), task)


def test_vectors_of_documents_are_refused_for_queries() -> None:
    with pytest.raises(ImportRefused, match=r'task "query": it has vectors of the task "document"'):
        check_source(DOCUMENTS, Clusters(), "query")


@pytest.mark.parametrize("task", ["document", "cluster"])
def test_vectors_of_documents_are_accepted_for_tasks_with_the_same_vectors(task: str) -> None:
    check_source(DOCUMENTS, Clusters(), task)


@pytest.mark.parametrize("source", [MIXING, DOCUMENTS, ANY])
def test_a_task_that_the_provider_does_not_know_is_an_error(source: Source) -> None:
    with pytest.raises(SpaceError, match="documnt"):
        check_source(source, Clusters(), "documnt")


@pytest.mark.parametrize(
    ("task", "others"),
    [("document", ["query"]), ("query", ["document"]), ("cluster", ["query"])],
)
def test_the_other_tasks_are_those_with_other_vectors(task: str, others: Sequence[str]) -> None:
    assert list_other_tasks(Clusters(), task) == others
    assert list_other_tasks(CountingProvider(), task) == []
