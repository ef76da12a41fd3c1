"""A provider that counts each letter of a text."""

from collections.abc import Mapping, Sequence
from typing import Annotated

from annotated_types import Ge, Le

from embedonce import Limits, VectorSpace, hookimpl
from embedonce.options import Doc

api = 1

seen: list[object] = []
"""Events that the hook received, for the tests."""


class LettersProvider:
    limits = Limits()

    def __init__(self, *, first: Annotated[int, Ge(1), Le(26), Doc("Number of letters to count.")] = 26) -> None:
        self._letters = "abcdefghijklmnopqrstuvwxyz"[:first]

    def space(self, task: str, /) -> VectorSpace:
        return VectorSpace(provider="letters", model="letters-1", dimensions=len(self._letters) + 1)

    def embed(self, texts: Sequence[str], task: str, /) -> list[list[float]]:
        return [[1.0, *(float(text.count(letter)) for letter in self._letters)] for text in texts]

    def close(self) -> None:
        pass


@hookimpl
def embedonce_providers() -> Mapping[str, type]:
    return {"letters": LettersProvider}


@hookimpl
def embedonce_event(event: object) -> None:
    seen.append(event)
