"""Functions as providers: sync or async, with or without the task, and the errors for unsuitable functions."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from embedonce.contracts import AnyProvider, Limits
from embedonce.errors import SpaceError
from embedonce.functions import AsyncFunctionProvider, FunctionProvider, wrap
from embedonce.keys import VectorSpace
from embedonce.testing import ProviderContract

SPACE = {"model": "lengths-v1", "dimensions": 2}


def lengths(texts: list[str]) -> list[list[float]]:
    assert type(texts) is list
    return [[len(text), 1.0] for text in texts]


def asymmetric(texts: list[str], task: str = "document") -> list[list[float]]:
    return [[len(text), 1.0 if task == "query" else 2.0] for text in texts]


async def async_lengths(texts: list[str]) -> list[list[float]]:
    await asyncio.sleep(0)
    return lengths(texts)


async def async_asymmetric(texts: list[str], *, task: str) -> list[list[float]]:
    return asymmetric(texts, task)


class Model:
    def __call__(self, texts: list[str]) -> list[list[float]]:
        return lengths(texts)

    def encode(self, texts: list[str], task: str) -> list[list[float]]:
        return asymmetric(texts, task)


class AsyncModel:
    async def __call__(self, texts: list[str], task: str) -> list[list[float]]:
        return asymmetric(texts, task)


def with_keywords(texts: list[str], **options: Any) -> list[list[float]]:
    assert not options
    return lengths(texts)


def characters(texts: list[str], task: str) -> list[list[float]]:
    return [[float(len(text) + 1), *(text.count(chr(c)) for c in range(32, 128)), task == "query"] for text in texts]


async def async_characters(texts: list[str]) -> list[list[float]]:
    await asyncio.sleep(0)
    return [[*row, 1.0] for row in characters(texts, "document")]


class TestFunction(ProviderContract):
    def make(self) -> AnyProvider:
        return wrap(characters, {"model": "characters-v1"})


class TestAsyncFunction(ProviderContract):
    def make(self) -> AnyProvider:
        return wrap(async_characters, {"model": "characters-v1", "dimensions": 99})


SYMMETRIC = [lengths, Model(), functools.partial(asymmetric, task="query"), with_keywords, lambda texts: lengths(texts)]
ASYMMETRIC = [asymmetric, Model().encode, functools.partial(asymmetric), lambda texts, *, task: asymmetric(texts, task)]


@pytest.mark.parametrize("function", SYMMETRIC)
def test_a_function_that_takes_only_texts_is_symmetric(function: Any) -> None:
    provider = wrap(function, SPACE)
    assert isinstance(provider, FunctionProvider)
    assert not hasattr(provider, "aembed")
    assert provider.space("document") == provider.space("query") == VectorSpace.of(SPACE)
    assert provider.embed(("a", "bb"), "query") == [[1, 1.0], [2, 1.0]]
    provider.close()


@pytest.mark.parametrize("function", ASYMMETRIC)
def test_a_function_that_takes_the_task_has_one_space_per_task(function: Any) -> None:
    provider = wrap(function, SPACE)
    assert isinstance(provider, FunctionProvider)
    assert provider.space("document").task == "document"
    assert provider.space("document").fingerprint() != provider.space("query").fingerprint()
    assert provider.embed(["a"], "query") == [[1, 1.0]]
    assert provider.embed(["a"], "document") == [[1, 2.0]]


@pytest.mark.parametrize("function", [async_lengths, functools.partial(async_asymmetric, task="query")])
async def test_an_async_function_that_takes_only_texts_is_symmetric(function: Any) -> None:
    provider = wrap(function, SPACE)
    assert isinstance(provider, AsyncFunctionProvider)
    assert not hasattr(provider, "embed")
    assert provider.space("document") == provider.space("query")
    assert await provider.aembed(("a", "bb"), "document") == [[1, 1.0], [2, 1.0]]


@pytest.mark.parametrize("function", [async_asymmetric, AsyncModel(), AsyncModel().__call__])
async def test_an_async_function_that_takes_the_task(function: Any) -> None:
    provider = wrap(function, SPACE)
    assert isinstance(provider, AsyncFunctionProvider)
    assert provider.space("query").task == "query"
    assert await provider.aembed(["a"], "document") == [[1, 2.0]]


def test_a_function_without_a_signature_is_symmetric() -> None:
    dot = functools.partial(np.dot, 2)
    provider = wrap(dot, SPACE)
    assert provider.space("document") == provider.space("query")


def test_a_single_parameter_named_task_gets_the_texts() -> None:
    def embed(task: list[str]) -> list[list[float]]:
        return lengths(task)

    provider = wrap(embed, SPACE)
    assert isinstance(provider, FunctionProvider)
    assert provider.embed(["a"], "query") == [[1, 1.0]]


def test_a_coroutine_from_a_function_that_is_not_async_is_refused() -> None:
    provider = wrap(lambda texts: async_lengths(texts), SPACE)
    assert isinstance(provider, FunctionProvider)
    with pytest.raises(TypeError, match="async def"):
        provider.embed(["a"], "document")


def test_the_space_may_be_a_vector_space_and_limits_are_kept() -> None:
    space = VectorSpace(provider="mine", model="m", dimensions=2)
    provider = wrap(lengths, space, Limits(max_batch=7))
    assert provider.space("document") is space
    assert provider.limits.max_batch == 7
    assert wrap(lengths, space).limits == Limits()


def test_a_function_without_a_space_is_refused_with_an_example() -> None:
    with pytest.raises(SpaceError, match=r'space=\{"model": "my-model-v2"\}'):
        wrap(lengths)
    with pytest.raises(SpaceError, match="must name the model"):
        wrap(lengths, {"dimensions": 3})


def test_a_space_with_a_task_is_refused_if_the_function_takes_the_task() -> None:
    with pytest.raises(SpaceError, match='remove "task" from space='):
        wrap(asymmetric, {"model": "m", "task": "document"})
    assert wrap(lengths, {"model": "m", "task": "document"}).space("query").task == "document"


class Vendor:
    limits = Limits()

    def space(self, task: str) -> VectorSpace:
        return VectorSpace(provider="vendor", model="m")

    def embed(self, texts: Sequence[str], task: str) -> list[list[float]]:
        return [[1.0] for _ in texts]

    def close(self) -> None: ...


class AsyncVendor:
    limits = Limits()
    space = Vendor.space

    async def aembed(self, texts: Sequence[str], task: str) -> list[list[float]]:
        return [[1.0] for _ in texts]

    def close(self) -> None: ...


@pytest.mark.parametrize("provider", [Vendor(), AsyncVendor()])
def test_a_provider_is_returned_unchanged(provider: Any) -> None:
    assert wrap(provider) is provider


def test_space_or_limits_beside_a_provider_are_refused() -> None:
    with pytest.raises(SpaceError, match="describes its own"):
        wrap(Vendor(), SPACE)
    with pytest.raises(SpaceError, match="describes its own"):
        wrap(Vendor(), limits=Limits())


@pytest.mark.parametrize("source", [None, "ngram", 3, object(), {"type": "ngram"}])
def test_anything_else_is_refused_with_an_example(source: Any) -> None:
    with pytest.raises(TypeError, match=r"neither a provider .* nor a function.*lambda texts"):
        wrap(source, SPACE)


def test_a_class_is_refused_with_a_hint_to_pass_an_instance() -> None:
    with pytest.raises(TypeError, match=r"pass an instance of it, Vendor\(\.\.\.\)"):
        wrap(Vendor, SPACE)  # type: ignore[arg-type]
