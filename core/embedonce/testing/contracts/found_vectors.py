"""Compares what an importer finds with what was written to its store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedonce._messages import format_count, quote
from embedonce.contracts import FoundVectors

MAX_PART = 5_000
"""Maximum number of texts in a part of a scan."""


class StoreReader:
    """An importer, and what its store contains. The methods read the store and check the answers."""

    def __init__(self, importer: Any, texts: Sequence[str], vectors: NDArray[np.float32], tolerance: float) -> None:
        self.importer = importer
        self.texts = list(texts)
        self.vectors = vectors
        self.by_text: Mapping[str, NDArray[np.float32]] = dict(zip(texts, vectors, strict=True))
        self._tolerance = tolerance

    @property
    def has_lookup(self) -> bool:
        return callable(getattr(self.importer, "lookup", None))

    @property
    def has_scan(self) -> bool:
        return callable(getattr(self.importer, "scan", None))

    @property
    def methods(self) -> list[str]:
        """The methods with which the importer reads: ``lookup``, ``scan`` or both."""
        return ["lookup"] * self.has_lookup + ["scan"] * self.has_scan

    def look_up(self, asked: Sequence[str], what: str = "lookup") -> FoundVectors:
        """Look up texts, and check that the answer has the vectors of the stored ones and nothing else."""
        found: FoundVectors = self.importer.lookup(asked)
        self.check_lookup(found, asked, what)
        return found

    def check_lookup(
        self, found: Any, asked: Sequence[str], what: str = "lookup", *, without: Sequence[str] = ()
    ) -> None:
        """Check an answer of ``lookup``. The texts of ``without`` are stored, but their values cannot be read."""
        seen = set()
        for text, row in self._list_rows(found, what):
            assert text in asked, f"{what} returned a text that it was not asked for: {quote(text)}"
            assert text not in seen, f"{what} returned the text {quote(text)} twice"
            seen.add(text)
            if row is not None or text not in without:
                self._check_row(text, row, what, without)
        missing = [text for text in asked if text in self.by_text and text not in seen and text not in without]
        assert not missing, (
            f"{what} left out {format_count(len(missing), 'text')} of {len(asked)}, although the store has them; "
            f"the first is {quote(missing[0])}"
        )
        if not without:
            self._require_readable(found, what)

    def scan(self, what: str = "scan", *, without: Sequence[str] = ()) -> list[str]:
        """Read the whole store with ``scan``, check it, and return the texts in their order."""
        # All parts are kept until the end, so that a part which the next one overwrites has wrong vectors.
        parts = list(self.importer.scan())
        texts: list[str] = []
        for part in parts:
            for text, row in self._list_rows(part, what):
                if row is not None or text not in without:
                    self._check_row(text, row, what, without)
                texts.append(text)
            if not without:
                self._require_readable(part, what)
        left_out = set(self.by_text) - set(texts) - set(without)
        assert not left_out, (
            f"{what} left out {format_count(len(left_out), 'text')} of {len(self.texts)}; "
            f"one of them is {quote(min(left_out))}"
        )
        return texts

    def read_all(self, what: str = "") -> None:
        """Read the whole store with ``lookup`` and ``scan``, as far as the importer has them."""
        if self.has_lookup:
            self.look_up(self.texts, f"{what}lookup")
        if self.has_scan:
            self.scan(f"{what}scan")

    def check_vectors(self, found: Any, what: str) -> None:
        """Check the vectors of an answer from which texts may be missing."""
        for text, row in self._list_rows(found, what):
            self._check_row(text, row, what, ())

    def _list_rows(self, found: Any, what: str) -> Iterator[tuple[str, Any]]:
        assert isinstance(found, FoundVectors), f"{what} must return FoundVectors(...), got {type(found).__name__}"
        assert not isinstance(found.texts, str), f"{what}: texts must be a sequence of texts, got one str"
        for text in found.texts:
            assert isinstance(text, str), f"{what}: a text must be a str, got {type(text).__name__}"
        assert len(found.vectors) == len(found.texts), (
            f"{what} returned {format_count(len(found.vectors), 'vector')} for {format_count(len(found.texts), 'text')}"
        )
        for reason, number in found.unreadable.items():
            valid = isinstance(reason, str) and reason and type(number) is int and number >= 0
            assert valid, f"{what}: unreadable must map reasons to numbers, got {type(reason).__name__}: {number!r}"
        yield from zip(found.texts, found.vectors, strict=True)

    def _check_row(self, text: str, row: Any, what: str, without: Sequence[str]) -> None:
        assert text in self.by_text, f"{what} returned a text that is not in the store: {quote(text)}"
        assert text not in without, f"{what} returned a vector for a value that cannot be read"
        assert row is not None, f"{what} returned None for the text {quote(text)}, whose value is valid"
        vector, expected = np.asarray(row), self.by_text[text]
        assert vector.ndim == 1 and np.issubdtype(vector.dtype, np.number), (  # noqa: PT018  (one message)
            f"{what}: a vector must be a flat sequence of numbers, got an array of {vector.dtype} with shape "
            f"{vector.shape}"
        )
        assert len(vector) == len(expected), (
            f"{what}: the vector of {quote(text)} has {len(vector)} dimensions instead of {len(expected)}"
        )
        with np.errstate(over="ignore", under="ignore"):
            vector = vector.astype(np.float32)
        if self._tolerance == 0.0:
            same = np.array_equal(vector, expected)
        else:
            same = np.allclose(vector, expected, rtol=self._tolerance, atol=self._tolerance)
        if same:
            return
        others = np.flatnonzero(np.all(np.abs(self.vectors - vector) <= max(self._tolerance, 1e-6), axis=1))
        reason = "differs from the one that was written"
        if any(self.texts[other] != text for other in others):
            other = next(self.texts[other] for other in others if self.texts[other] != text)
            reason = f"is that of another text: {quote(other)}"
        raise AssertionError(f"{what}: the vector of {quote(text)} {reason}")

    def _require_readable(self, found: FoundVectors, what: str) -> None:
        assert not any(found.unreadable.values()), f"{what} could not read valid values: {', '.join(found.unreadable)}"
