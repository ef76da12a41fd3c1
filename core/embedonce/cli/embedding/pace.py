"""How many texts are embedded at a time, so that a chunk takes about two seconds."""

from __future__ import annotations

SECONDS = 2.0
"""Seconds that a chunk should take. A run that is killed loses at most about one chunk."""
FIRST = 4
"""Number of texts of the first chunk. The provider may load its model for this chunk, so its duration says little."""
FACTOR = 8
"""A chunk has at most this many times more, or fewer, texts than the chunk before."""
SHARE_OF_COST = 3
"""A chunk takes at least this many times longer than the fixed cost of a call. Smaller chunks would mostly wait."""


class Pace:
    """Chooses the size of the next chunk from the duration of earlier chunks.

    A call has a fixed cost, for example a round trip to a server, and a cost per text. Both are estimated from two
    chunks of different sizes. With the cost per text alone, a server that takes 3 s for each call would get smaller and
    smaller chunks, and the run would take many times longer.

    Args:
        largest: maximum number of texts of a chunk.
        batch: number of texts that the provider takes in one call. A larger chunk is a multiple of it.
        least: minimum number of texts of a chunk.
    """

    def __init__(self, largest: int, *, batch: int = 1, least: int = 1) -> None:
        self._largest = largest
        self._batch = max(batch, 1)
        self._least = max(least, 1)
        self._fixed = 0.0
        """Estimated seconds that a chunk takes in addition to the seconds for its texts."""
        self._last: tuple[int, float] | None = None
        self._other: tuple[int, float] | None = None
        """The last chunk that had at most half, or at least twice, as many texts as the chunk after it."""
        self._is_first = True
        self._size = min(max(FIRST, self._least), largest)

    @property
    def size(self) -> int:
        """Number of texts of the next chunk."""
        if self._size >= self._largest or self._size <= self._batch:
            return self._size
        return self._size - self._size % self._batch

    def record(self, texts: int, seconds: float) -> None:
        """Record that ``texts`` texts, at least one, were embedded in ``seconds``."""
        if texts * 4 < self._size and seconds < SECONDS:
            return  # the chunk was too short to say anything about longer ones
        per_text = self._estimate_cost(texts, seconds)
        wanted = max(SECONDS - self._fixed, SHARE_OF_COST * self._fixed) / per_text
        least, most = max(self._size // FACTOR, self._least), min(self._size * FACTOR, self._largest)
        if self._is_first:
            least, self._is_first = self._size, False
        self._size = int(min(max(wanted, least), most))

    def _estimate_cost(self, texts: int, seconds: float) -> float:
        """Return the seconds per text, and estimate the fixed cost again if chunks of other sizes are known."""
        if self._is_first:
            return max(seconds / texts, 1e-9)
        if self._last is not None and not _have_similar_sizes(self._last[0], texts):
            self._other = self._last
        self._last = texts, seconds
        if self._other is not None and not _have_similar_sizes(self._other[0], texts):
            (few, short), (many, long) = sorted([self._other, self._last])
            per_text = max(long - short, 0.0) / (many - few)
            self._fixed = max(min(short, long) - per_text * few, 0.0)
        self._fixed = min(self._fixed, seconds)
        return max((seconds - self._fixed) / texts, 1e-9)


def _have_similar_sizes(one: int, other: int) -> bool:
    return max(one, other) < 2 * min(one, other)
