"""A backend of two nodes, one of which may be down."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from embedonce.contracts import Capabilities
from embedonce.errors import PartialAnswer
from embedonce.testing import DictBackend

T = TypeVar("T")


class TwoNodesBackend:
    """Holds frames. Keys that end with an odd digit are on the node that may be down."""

    capabilities = Capabilities(scope="process", delete=True, add=True)

    def __init__(self) -> None:
        self._store = DictBackend()
        self.away = False

    def get_many(self, keys: Sequence[str], /) -> Mapping[str, Any]:
        return self._raise_if_lost(keys, self._store.get_many(self._get_reachable_keys(keys)))

    def set_many(self, items: Mapping[str, Any], ttl: float | None, /) -> None:
        self._store.set_many({key: items[key] for key in self._get_reachable_keys(items)}, ttl)
        self._raise_if_lost(items, None)

    def add_many(self, items: Mapping[str, Any], ttl: float | None, /) -> set[str]:
        return self._raise_if_lost(
            items, self._store.add_many({key: items[key] for key in self._get_reachable_keys(items)}, ttl)
        )

    def delete_many(self, keys: Sequence[str], /) -> None:
        self._store.delete_many(self._get_reachable_keys(keys))
        self._raise_if_lost(keys, None)

    def close(self) -> None:
        self._store.close()

    def _is_lost(self, key: str) -> bool:
        return self.away and key[-1] in "13579bdf"

    def _get_reachable_keys(self, keys: Iterable[str]) -> list[str]:
        return [key for key in keys if not self._is_lost(key)]

    def _raise_if_lost(self, keys: Iterable[str], answer: T) -> T:
        lost = [key for key in keys if self._is_lost(key)]
        if lost:
            raise PartialAnswer("a node is down", answer=answer, failed=lost) from ConnectionRefusedError()
        return answer
