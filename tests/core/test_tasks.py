"""Unknown tasks are refused with a suggestion, by one rule, wherever a task enters."""

from __future__ import annotations

import asyncio
import functools
from typing import Annotated, Any, Literal, TypeAlias

import pytest

import embedonce
from embedonce import Cache, SpaceError
from embedonce.functions import wrap
from embedonce.tasks import check_task
from embedonce.testing.fakes import CountingProvider
from embedonce_backends.memory import MemoryBackend

Purpose: TypeAlias = Literal["document", "query", "code"]
SPACE = {"model": "m"}
TYPOS = {
    "qurey": "query",
    "qery": "query",
    "querry": "query",
    "Query": "query",
    "QUERY": "query",
    " query": "query",
    "documnet": "document",
    "documents": "document",
    "Document": "document",
}
OWN = ["code", "classification", "passage", "search_document", "query_en", "document2", "doc", "question", "x" * 500]


@pytest.mark.parametrize(("typo", "meant"), TYPOS.items())
def test_a_misspelled_task_is_refused_with_a_suggestion(typo: str, meant: str) -> None:
    for accepts_others in (True, False):
        with pytest.raises(SpaceError, match=rf'^the model does not know the task ".*"; did you mean "{meant}"\?'):
            check_task(typo, what="the model", accepts_others=accepts_others)


@pytest.mark.parametrize("task", OWN)
def test_an_own_task_is_refused_only_by_a_provider_that_names_its_tasks(task: str) -> None:
    check_task(task, what="the model", accepts_others=True)
    with pytest.raises(SpaceError, match="does not know the task"):
        check_task(task, what="the model")
    check_task(task, ["document", "query", task], what="the model")


def test_a_message_lists_the_tasks_if_none_is_similar() -> None:
    with pytest.raises(SpaceError, match=r'"code"; it knows "document" and "query"\. Add it\.$'):
        check_task("code", what="the model", advice="Add it.")


@pytest.mark.parametrize("task", [None, 7, ["document"], "", b"query"])
def test_a_task_is_a_str_that_is_not_empty(task: Any) -> None:
    with pytest.raises(TypeError, match="task must be a str"):
        check_task(task, what="the model")


def test_a_long_task_is_shortened_in_the_message() -> None:
    with pytest.raises(SpaceError) as caught:
        check_task("private words " * 100_000, what="the model")
    assert len(str(caught.value)) < 300


# --- functions --------------------------------------------------------------------------------


def any_task(texts: list[str], task: str = "document") -> list[list[float]]:
    return [[len(text), len(task)] for text in texts]


def named(texts: list[str], task: Literal["document", "query", "code"]) -> list[list[float]]:
    return any_task(texts, task)


def aliased(texts: list[str], *, task: Purpose | None = None) -> list[list[float]]:
    return any_task(texts, task or "")


def annotated(texts: list[str], task: Annotated[Purpose, "what for"] = "document") -> list[list[float]]:
    return any_task(texts, task)


async def named_async(texts: list[str], task: Purpose) -> list[list[float]]:
    return any_task(texts, task)


class Model:
    def __call__(self, texts: list[str], task: Purpose) -> list[list[float]]:
        return any_task(texts, task)

    def encode(self, scale: float, texts: list[str], task: Purpose) -> list[list[float]]:
        return any_task(texts, task)


CLOSED = [named, aliased, annotated, named_async, Model(), functools.partial(Model().encode, 1.0)]


@pytest.mark.parametrize("function", CLOSED, ids=["named", "aliased", "annotated", "async", "callable", "partial"])
@pytest.mark.parametrize("method", ["embed", "aembed", "fetch", "lookup", "embed_iter", "put", "explain", "forget"])
def test_a_function_with_a_literal_knows_only_these_tasks(function: Any, method: str) -> None:
    with Cache(function, [MemoryBackend()], space=SPACE) as cache:
        for task in ("document", "query", "code"):
            assert cache.embed("a", task)[1] == len(task)
        arguments: list[Any] = {"embed": ["a"], "aembed": ["a"], "explain": ["a"], "put": [["a"], [[1.0, 2.0]]]}.get(
            method, [["a"]]
        )

        def run(task: str) -> None:
            answer = getattr(cache, method)(*arguments, task=task)
            if method == "aembed":
                asyncio.run(answer)
            list(answer)

        for wrong, message in (("cod", 'did you mean "code"'), ("other", 'it knows "document", "query" and "code"')):
            with pytest.raises(SpaceError, match=message):
                run(wrong)


def test_a_function_that_does_not_know_the_default_tasks() -> None:
    def embed(texts: list[str], task: Literal["search", "match"]) -> list[list[float]]:
        return any_task(texts, task)

    with Cache(embed, [MemoryBackend()], space=SPACE) as cache:
        assert cache.embed("a", "search")[1] == 6
        with pytest.raises(SpaceError, match='does not know the task "document"; it knows "search" and "match"'):
            cache.embed("a")


@pytest.mark.parametrize("function", [any_task, lambda texts, task: any_task(texts, task)])
def test_a_function_that_names_no_tasks_takes_any_but_a_misspelled_one(function: Any) -> None:
    with Cache(function, [MemoryBackend()], space=SPACE) as cache:
        assert cache.embed("a", "classification")[1] == len("classification")
        with pytest.raises(SpaceError, match=r'did you mean "query"\? To name the tasks .* task: Literal\[\.\.\.\]'):
            cache.embed("a", "qurey")


def test_the_names_of_an_open_literal_are_checked_too() -> None:
    def embed(texts: list[str], task: Literal["document", "query", "classification"] | str) -> list[list[float]]:
        return any_task(texts, task)

    provider = wrap(embed, SPACE)
    provider.space("code")
    with pytest.raises(SpaceError, match='did you mean "classification"'):
        provider.space("clasification")


def test_an_annotation_that_cannot_be_evaluated_is_ignored() -> None:
    def embed(texts, task):  # type: ignore[no-untyped-def]
        return any_task(texts, task)

    embed.__annotations__ = {"texts": "list[str]", "task": "OnlyForTypeCheckers"}
    assert wrap(embed, SPACE).space("code").task == "code"


def test_a_symmetric_function_refuses_a_misspelled_task_too() -> None:
    with Cache(lambda texts: [[1.0, 2.0]] * len(texts), space=SPACE) as cache, pytest.raises(SpaceError, match="query"):
        cache.embed("a", "qurey")


def test_the_ngram_provider_refuses_a_misspelled_task() -> None:
    with embedonce.open({"provider": {"type": "ngram"}, "tiers": [{"type": "memory"}]}) as cache:
        cache.embed("a", "classification")
        with pytest.raises(SpaceError, match="provider 'ngram' does not know the task \"qurey\"; did you mean"):
            cache.embed("a", "qurey")


def test_a_provider_of_its_own_decides_itself() -> None:
    with Cache(CountingProvider(), [MemoryBackend()]) as cache:
        cache.embed("a", "qurey")
