"""Windows: some passages that are looked up together, and the vectors of their texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from embedonce.errors import TextError

if TYPE_CHECKING:
    from embedonce.answers import Fetched

    from .passages import Passage


class Results(NamedTuple):
    """How many passages of a window got a result, by its kind."""

    sources: Counter[str]
    """Passages that got a vector, by the vector's source: the name of a tier, or ``"provider"``."""
    failed: int


class Window:
    """Some passages, and what is known about the vectors of their texts. Each distinct text is embedded once.

    ``broken`` is the number of items without a passage that were read with the passages. ``bytes_read`` is the number
    of bytes that had been read when the window was complete.
    """

    def __init__(self, passages: Sequence[Passage], broken: int = 0, bytes_read: int = 0) -> None:
        self.passages = passages
        self.broken = broken
        self.bytes_read = bytes_read
        self._numbers_of_texts: dict[str, int] = {}
        numbers = self._numbers_of_texts
        self.numbers = [numbers.setdefault(passage.text, len(numbers)) for passage in passages]
        """For each passage, the number of its text."""
        self.texts = list(numbers)
        """The distinct texts, in the order of the passages."""
        self.rows: list[Any] = [None] * len(self.texts)
        """The vectors by number of the text."""
        self.failed: dict[int, Exception | None] = {}
        """Errors by number of the text. None stands for a text without a vector and without an error."""
        self.is_computed = False
        """Whether the provider has embedded any text."""
        self._repeats = Counter(self.numbers) if len(self.texts) < len(passages) else None

    def list_new(self, earlier: Iterable[Window]) -> Sequence[int]:
        """Return the numbers of the texts that none of the earlier windows has."""
        known = [window._numbers_of_texts for window in earlier]
        if all(texts.keys().isdisjoint(self._numbers_of_texts) for texts in known):
            return range(len(self.texts))
        return [number for number, text in enumerate(self.texts) if not any(text in texts for texts in known)]

    def list_missing(self) -> list[int]:
        """Return the numbers of the texts that have neither a vector nor an error, in order."""
        return [number for number, row in enumerate(self.rows) if row is None and number not in self.failed]

    def list_failed_passages(self) -> list[tuple[Passage, Exception | None]]:
        """Return the passages whose texts have failed, in order, with their errors."""
        if not self.failed:
            return []
        pairs = zip(self.passages, self.numbers, strict=True)
        return [(passage, self.failed[number]) for passage, number in pairs if number in self.failed]

    def add(self, numbers: Sequence[int], fetched: Fetched, *, is_final: bool) -> Results:
        """Take over the vectors of texts from tiers, and the errors that another call would not change.

        With ``is_final``, take over all vectors and errors. Without it, ``fetched`` is the result of a lookup. A vector
        that no tier had is then one that the window before is computing. It is fetched later, when it is in a tier.
        """
        repeats = self._repeats
        sources: Counter[str] = Counter()
        failed = 0
        for number, row, source in zip(numbers, fetched.rows, fetched.sources, strict=True):
            if row is not None and source is not None and (is_final or source != "provider"):
                self.rows[number] = row
                sources[source] += 1 if repeats is None else repeats[number]
        for place, number in enumerate(numbers) if fetched.failed or is_final else ():
            error = fetched.failed.get(place)
            if fetched.rows[place] is None and (is_final or isinstance(error, TextError)):
                self.failed[number] = error
                failed += 1 if repeats is None else repeats[number]
        self.is_computed = self.is_computed or "provider" in sources
        return Results(sources, failed)
