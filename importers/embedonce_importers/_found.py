"""Puts together what a lookup or a part of a scan has found."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from embedonce.contracts import FoundVectors

from ._values import DecodedVector

V = TypeVar("V")


def collect_vectors(stored: Iterable[tuple[str, V]], decode: Callable[[V], DecodedVector]) -> FoundVectors:
    """Decode the stored value of each text. ValueErrors of ``decode`` are counted by their messages."""
    texts: list[str] = []
    vectors: list[DecodedVector] = []
    unreadable: dict[str, int] = {}
    for text, value in stored:
        try:
            vector = decode(value)
        except ValueError as error:
            unreadable[str(error)] = unreadable.get(str(error), 0) + 1
        else:
            texts.append(text)
            vectors.append(vector)
    return FoundVectors(texts, vectors, unreadable)
