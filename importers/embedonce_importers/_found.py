"""Puts together what a lookup or a part of a scan has found."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from embedonce.contracts import FoundVectors

from ._values import DecodedVector

Item = TypeVar("Item")


def collect_vectors(items: Iterable[Item], read: Callable[[Item], tuple[str, DecodedVector]]) -> FoundVectors:
    """Return the texts and vectors that ``read`` makes of the items. Its ValueErrors are counted by their messages."""
    texts: list[str] = []
    vectors: list[DecodedVector] = []
    unreadable: dict[str, int] = {}
    for item in items:
        try:
            text, vector = read(item)
        except ValueError as error:
            unreadable[str(error)] = unreadable.get(str(error), 0) + 1
        else:
            texts.append(text)
            vectors.append(vector)
    return FoundVectors(texts, vectors, unreadable)
