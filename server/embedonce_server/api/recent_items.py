"""Keeps the items that were used last, within a number of bytes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class RecentItems(Generic[K, V]):
    """Keeps items in two generations. When the newer one is full, it replaces the older one.

    An item that is used again moves to the newer generation. So looking up an item changes no order, as in a list of
    the items by their last use, and costs little more than in a dict.

    Args:
        max_bytes: the maximum size of each generation.
        measure: function that returns the bytes that an item takes.
    """

    def __init__(self, max_bytes: int, measure: Callable[[K, V], int]) -> None:
        self._max_bytes = max_bytes
        self._measure = measure
        self.clear()

    def clear(self) -> None:
        """Forget all items."""
        self._newer: dict[K, V] = {}
        self._older: dict[K, V] = {}
        self._bytes = 0

    def get(self, key: K) -> V | None:
        """Return the item, or None if it is not there."""
        value = self._newer.get(key)
        if value is None and (value := self._older.get(key)) is not None:
            self.keep(key, value)
        return value

    def keep(self, key: K, value: V) -> None:
        """Keep an item, unless it is larger than a generation."""
        size = self._measure(key, value)
        if size > self._max_bytes:
            return
        if self._bytes + size > self._max_bytes:
            self._older, self._newer, self._bytes = self._newer, {}, 0
        self._newer[key] = value
        self._bytes += size

    def __len__(self) -> int:
        return len(self._newer.keys() | self._older.keys())

    def __repr__(self) -> str:
        return f"<RecentItems {len(self)} items>"
