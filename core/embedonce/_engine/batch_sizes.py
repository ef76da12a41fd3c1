"""The largest request that a provider accepts, as learned from requests that it refused.

A server may limit the number of texts in a request, or their total size, and often does not say which. Both numbers
are remembered, of the requests that worked and of the smallest that was too large. As soon as a request contradicts one
of the two explanations, only the other one is used.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SMALL = 0.25
"""Share of the largest total size that worked. A request that is this small may have more texts than ever worked.

Without this, two long texts that are too large together would limit all later requests to one text.
"""


@dataclass(slots=True)
class _Bounds:
    """The largest value that worked, and the smallest that was too large."""

    worked: int = 0
    refused: int | None = None

    @property
    def is_consistent(self) -> bool:
        return self.refused is not None and self.worked < self.refused

    def merge(self, other: _Bounds) -> _Bounds:
        refused = [value for value in (self.refused, other.refused) if value is not None]
        return _Bounds(max(self.worked, other.worked), min(refused, default=None))


class BatchSizes:
    """What one provider has accepted and refused in this process. Several threads may use it at the same time."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # re-entrant, because a signal handler may use the cache
        self._texts = _Bounds()
        self._bytes = _Bounds()
        self._doubtful: int | None = None
        """Number of texts of the request that failed and may have been too large."""
        self.doubts = 0
        """Number of times so far that a failure may have been a passing one."""
        self.has_limit = False
        self.is_reported = False
        """Whether the limit has been logged."""

    def learn(
        self, refused: Sequence[str], worked: Sequence[str], *, is_sure: bool, by_size: bool, doubts: int
    ) -> None:
        """Note a request that failed although all of its parts worked, and the largest of these parts.

        ``is_sure``: the server refused the request, so it would fail again. Otherwise the failure may have been a
        passing one. It counts only if there was an earlier one, and no request of that size has worked since.
        ``by_size``: the error speaks of the size of the texts. ``doubts`` is what
        :attr:`doubts` was before the request was sent. If the earlier failure was not yet known then, both may have had
        the same passing reason.
        """
        with self._lock:
            if not is_sure and (self._doubtful is None or doubts < self.doubts):
                if self._doubtful is None:
                    self._doubtful = len(refused)
                    self.doubts += 1
                return
            self._doubtful = None
            texts = _Bounds(len(refused) if by_size else len(worked), len(refused))
            size = _Bounds(_count_bytes(worked), _count_bytes(refused))
            self._texts, self._bytes = self._texts.merge(texts), self._bytes.merge(size)
            if not (self._texts.is_consistent or self._bytes.is_consistent):
                self._texts, self._bytes = texts, size
            self.has_limit = True

    def learn_number(self, texts: int) -> None:
        """Note the number of texts that the server itself named as its limit, after a request of this size worked."""
        with self._lock:
            self._texts = _Bounds(texts, texts + 1)
            self._bytes = _Bounds(1, 1)
            self.has_limit = True

    @property
    def is_in_doubt(self) -> bool:
        """Whether a request that works may contradict what is known."""
        return self.has_limit or self._doubtful is not None

    def note_success(self, texts: Sequence[str]) -> None:
        """Note a request that worked. Call this only if ``is_in_doubt``, because counting bytes takes time."""
        with self._lock:
            if self._doubtful is not None and len(texts) >= self._doubtful:
                self._doubtful = None
            if not self.has_limit:
                return
            self._texts.worked = max(self._texts.worked, len(texts))
            self._bytes.worked = max(self._bytes.worked, _count_bytes(texts))
            if not (self._texts.is_consistent or self._bytes.is_consistent):
                self._texts, self._bytes, self.has_limit = _Bounds(), _Bounds(), False

    @property
    def max_texts(self) -> int | None:
        """The largest number of texts that works, or None if the number is not what is limited."""
        return self._texts.worked if self._texts.is_consistent else None

    def get_test(self) -> Callable[[int, int], bool]:
        """Return a function that tells whether a request with so many texts and bytes is known to be accepted."""
        with self._lock:
            texts = self._texts.worked if self._texts.is_consistent else 1
            size: float = self._bytes.worked if self._bytes.is_consistent else 0
            if self._texts.is_consistent:
                size *= SMALL
        return lambda count, total: count <= max(1, texts) or total <= size


def _count_bytes(texts: Sequence[str]) -> int:
    return sum(map(count_bytes, texts))


def count_bytes(text: str) -> int:
    """Return the size of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode(errors="replace"))
