"""Reading what a source has: all of it, or the vectors of given texts. Each text and each vector is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from embedonce._engine.checks import check_matrix
from embedonce._messages import format_count, quote
from embedonce.cli.embedding.failures import Failures
from embedonce.cli.embedding.passages import Passage
from embedonce.cli.embedding.run import split_windows
from embedonce.cli.embedding.sources import Reader
from embedonce.cli.output import Failed, escape_controls
from embedonce.contracts import LOOKUP_BATCH, FoundVectors
from embedonce.errors import ProviderError
from embedonce.vectors import Matrix

from .opening import OpenedSource
from .sampling import Sample, SamplesBySize

WINDOW = 2048
"""Minimum number of vectors in a window of a scan. The vectors of a window are stored together."""
MAX_REASONS = 50
"""Maximum number of reasons that are counted one by one, because a plugin may put anything into a reason."""
OTHER_REASONS = "other reasons"
CANDIDATES = 1024
"""Number of texts that are chosen at random for the verification, and looked up until enough are found. If more texts
than this are to be verified, twice as many are chosen."""


class Part(NamedTuple):
    """Texts with valid vectors of the same dimensions: a float32 matrix of shape (n, d)."""

    texts: list[str]
    matrix: Matrix


class Window(NamedTuple):
    """What was read at once."""

    parts: list[Part]
    texts: int
    """Number of texts that were read or looked up, including texts without a valid vector."""
    position: int
    """What was read so far, in the unit of the total: rows of a scan, or bytes of the files with the texts."""


@dataclass(slots=True)
class Counts:
    """Counts of one pass over a source."""

    found: int = 0
    """Texts for which the source had a value that could be read."""
    changed: int = 0
    """Texts that normalisation changes. Their vectors do not belong to the texts that the provider would embed."""
    unreadable: dict[str, int] = field(default_factory=dict)
    invalid: dict[str, int] = field(default_factory=dict)
    passages: int = 0
    missing: int = 0
    """Texts that were looked up and that the source does not have."""

    def add_unreadable(self, reasons: Mapping[str, int]) -> None:
        for reason, count in reasons.items():
            _count(self.unreadable, escape_controls(reason), count)

    def add_invalid(self, reason: str, count: int = 1) -> None:
        _count(self.invalid, reason, count)


def _count(counts: dict[str, int], reason: str, count: int) -> None:
    if reason not in counts and len(counts) >= MAX_REASONS:
        reason = OTHER_REASONS
    counts[reason] = counts.get(reason, 0) + count


class SourceReader(Protocol):
    """One pass over a source. Use it once."""

    counts: Counts
    failures: Failures
    """Passages that could not be read."""

    def read(self) -> Iterator[Window]:
        """Yield everything.

        Raises:
            Failed: the source cannot be read.
        """
        ...

    def sample(self, size: int, random: np.random.Generator, report: Callable[[Window], None]) -> SamplesBySize:
        """Return a random sample of the source. Report each window that is read meanwhile.

        Raises:
            Failed: the source cannot be read.
        """
        ...


class Scan:
    """Reads all texts and vectors of a source."""

    def __init__(self, opened: OpenedSource, normalize: Callable[[str], str]) -> None:
        self._opened = opened
        self._normalize = normalize
        self.counts = Counts()
        self.failures = Failures()

    def read(self) -> Iterator[Window]:
        parts: list[Part] = []
        texts = position = 0
        for found in self._opened.scan():
            added = check_found(found, self._opened, self.counts)
            parts += [self._select_normalized(part) for part in added]
            texts += len(found.texts)
            position += len(found.texts)
            if texts >= WINDOW:
                yield Window(_join_parts(parts), texts, position)
                parts, texts = [], 0
        if texts:
            yield Window(_join_parts(parts), texts, position)

    def sample(self, size: int, random: np.random.Generator, report: Callable[[Window], None]) -> SamplesBySize:
        return _sample_windows(self.read(), size, random, report)

    def _select_normalized(self, part: Part) -> Part:
        """Return the texts that normalising leaves unchanged, with their vectors."""
        good = [index for index, text in enumerate(part.texts) if self._is_normalized(text)]
        return part if len(good) == len(part.texts) else Part([part.texts[i] for i in good], part.matrix[good])

    def _is_normalized(self, text: str) -> bool:
        try:
            normalized = self._normalize(text)
            normalized.encode()
        except UnicodeEncodeError:
            self.counts.add_invalid("the text is not valid Unicode")
            return False
        except Exception:  # noqa: BLE001  (a normalisation step may raise anything)
            self.counts.add_invalid("a normalisation step failed")
            return False
        if normalized != text:
            self.counts.changed += 1
            return False
        return True


class Lookup:
    """Looks up the passages of files in a source."""

    def __init__(
        self, opened: OpenedSource, normalize: Callable[[str], str], make_reader: Callable[[], Reader]
    ) -> None:
        self._opened = opened
        self._normalize = normalize
        self._make_reader = make_reader
        self.counts = Counts()
        self.failures = Failures()
        self.notes: list[str] = []

    def read(self) -> Iterator[Window]:
        for passages, position in self._read_passages():
            yield Window(self._look_up(self._normalize_passages(passages)), len(passages), position)

    def sample(self, size: int, random: np.random.Generator, report: Callable[[Window], None]) -> SamplesBySize:
        """Look up texts in a random order until ``size`` of them are found, so that few texts are looked up twice."""
        chosen: Sample[Passage] = Sample(max(CANDIDATES, 2 * size), random)
        for passages, position in self._read_passages():
            chosen.add(len(passages), passages.__getitem__)
            report(Window([], len(passages), position))
        shuffled = [chosen.items[index] for index in random.permutation(len(chosen.items))]
        candidates = list(self._normalize_passages(shuffled).items())
        samples = SamplesBySize(size, random)
        step = min(max(2 * size, 64), LOOKUP_BATCH)
        for start in range(0, len(candidates), step):
            for part in self._look_up(dict(candidates[start : start + step])):
                samples.add(part.texts, part.matrix)
            if samples.count_most_kept() >= size:
                break
        if samples.count_most_kept() < size and chosen.seen > len(chosen.items):
            # The source has few of the texts, so all of them are looked up.
            whole = Lookup(self._opened, self._normalize, self._make_reader)
            samples = _sample_windows(whole.read(), size, random, report)
            self.counts, self.failures = whole.counts, whole.failures
        return samples

    def _read_passages(self) -> Iterator[tuple[list[Passage], int]]:
        """Yield the passages in windows, those with the same text once, and the number of bytes that were read."""
        reader = self._make_reader()
        for window in split_windows(self._skip_broken(reader)):
            self.counts.passages += len(window)
            yield list({passage.text: passage for passage in window}.values()), reader.bytes_read
        self.notes = reader.notes

    def _skip_broken(self, reader: Reader) -> Iterator[Passage]:
        for item in reader:
            if isinstance(item, Passage):
                yield item
            else:
                self.failures.add_broken(item)

    def _normalize_passages(self, passages: Iterable[Passage]) -> dict[str, str]:
        """Return the original texts by their normalised texts."""
        originals: dict[str, str] = {}
        for passage in passages:
            try:
                normalized = self._normalize(passage.text)
                normalized.encode()
            except Exception as error:  # noqa: BLE001  (a normalisation step may raise anything)
                self.failures.add_failed(passage, error)
            else:
                originals.setdefault(normalized, passage.text)
        return originals

    def _look_up(self, originals: Mapping[str, str]) -> list[Part]:
        """Look up the keys of ``originals``. The parts of the result have the values of ``originals``."""
        wanted = list(originals)
        parts: list[Part] = []
        for start in range(0, len(wanted), LOOKUP_BATCH):
            batch = wanted[start : start + LOOKUP_BATCH]
            found = self._opened.call(lambda batch=batch: self._opened.importer.lookup(batch))  # type: ignore[misc]
            added = check_found(found, self._opened, self.counts)
            self._check_texts(found.texts, batch)
            unreadable = sum(found.unreadable.values())
            self.counts.missing += max(len(batch) - len(found.texts) - unreadable, 0)
            parts += [Part([originals[text] for text in part.texts], part.matrix) for part in added]
        return _join_parts(parts)

    def _check_texts(self, texts: Sequence[str], wanted: Sequence[str]) -> None:
        """Check that an importer has returned only texts that it was asked for, and each of them once.

        Raises:
            Failed: it has not.
        """
        if len(set(texts)) < len(texts) or not set(texts) <= set(wanted):
            name = quote(self._opened.importer_name)
            raise Failed(
                f"the importer {name} has returned texts that it was not asked for, or a text twice; this is an error "
                "of the importer, so nothing more is imported"
            )


def check_found(found: Any, opened: OpenedSource, counts: Counts) -> list[Part]:
    """Return the valid vectors of an importer's answer, a part for each number of dimensions. Count the others.

    Raises:
        Failed: the answer does not have one vector per text.
    """
    if not isinstance(found, FoundVectors) or len(found.texts) != len(found.vectors):
        what = (
            f"{format_count(len(found.texts), 'text')} with {format_count(len(found.vectors), 'vector')}"
            if isinstance(found, FoundVectors)
            else f"a value of the type {type(found).__name__}, not FoundVectors"
        )
        name = quote(opened.importer_name)
        raise Failed(f"the importer {name} has returned {what}; this is an error of the importer")
    counts.found += len(found.texts)
    counts.add_unreadable(found.unreadable)
    texts = list(found.texts)
    if all(type(text) is str for text in texts):
        try:
            return [Part(texts, check_matrix(found.vectors, len(texts), dimensions=None, who=""))] if texts else []
        except ProviderError:
            pass  # some rows are invalid
    by_size: dict[int, tuple[list[str], list[Matrix]]] = {}
    for text, row in zip(texts, found.vectors, strict=True):
        if type(text) is not str:
            counts.add_invalid("the text is not a str")
            continue
        try:
            vector = check_matrix([row], 1, dimensions=None, who="")
        except ProviderError:
            counts.add_invalid(explain_invalid(row))
            continue
        group = by_size.setdefault(vector.shape[1], ([], []))
        group[0].append(text)
        group[1].append(vector)
    return [Part(texts, np.concatenate(rows)) for texts, rows in by_size.values()]


def explain_invalid(row: Any) -> str:
    """Return why a row is not a vector."""
    if row is None:
        return "no vector"
    try:
        array = np.asarray(row)
    except (ValueError, TypeError, RuntimeError):
        return "not a list of numbers"
    if array.dtype.kind not in "fiu" or array.ndim != 1:
        return "not a list of numbers" if array.size or array.ndim != 1 else "no values"
    if not array.size:
        return "no values"
    with np.errstate(over="ignore"):
        is_finite = np.isfinite(array.astype(np.float32)).all()
    return "only zeros" if is_finite else "NaN, infinity or a number that is too large"


def _join_parts(parts: Sequence[Part]) -> list[Part]:
    """Return one part for each number of dimensions."""
    by_size: dict[int, list[Part]] = {}
    for part in parts:
        if part.texts:
            by_size.setdefault(part.matrix.shape[1], []).append(part)
    return [
        group[0] if len(group) == 1 else Part([text for part in group for text in part.texts], _stack(group))
        for group in by_size.values()
    ]


def _stack(parts: Sequence[Part]) -> Matrix:
    return np.concatenate([part.matrix for part in parts])


def _sample_windows(
    windows: Iterable[Window], size: int, random: np.random.Generator, report: Callable[[Window], None]
) -> SamplesBySize:
    samples = SamplesBySize(size, random)
    for window in windows:
        for part in window.parts:
            samples.add(part.texts, part.matrix)
        report(window)
    return samples
