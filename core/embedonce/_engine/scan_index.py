"""Finds the vectors of single texts in a source that can only be read as a whole.

The source is read once, in a thread. Its vectors go into a temporary file, and for each text 16 bytes of its hash stay
in memory, so that a million texts take 24 MB.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from hashlib import blake2b
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from embedonce.contracts import FoundVectors, ScanImporter, time_left
from embedonce.errors import ProviderError, SourceError, TierTimeout
from embedonce.vectors import Matrix

from .checks import check_rows
from .source_calls import run_source
from .verifying import LEAST_COSINE, compute_cosines

MAX_BYTES = 8 * 2**30
"""Maximum size of the temporary file with the vectors."""
MAX_DIMENSIONS = 8
"""Maximum number of different dimensions. Vectors of further dimensions are left out."""
RETRY_SECONDS = 60.0
"""Seconds after which a source that could not be read is read again."""
MARGIN = 0.05
"""Seconds before the deadline of a call at which it stops waiting for the index."""

_HASH = np.dtype([("first", "<u8"), ("second", "<u8")])


class IndexNotReady(Exception):
    """The source is still being read."""


class ScanIndex:
    """The vectors of a source by text. Several threads may use it at the same time."""

    def __init__(self, importer: Any) -> None:
        self._importer: ScanImporter = importer
        self.reset()

    def reset(self) -> None:
        """Start over in a forked child, because the thread that reads the source belongs to the parent."""
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._is_closed = False
        self._thread: threading.Thread | None = None
        self._table: _Table | None = None
        self._error: Exception | None = None
        self._retry_at = 0.0

    def close(self) -> None:
        """Stop reading the source, and remove the temporary file."""
        with self._lock:
            self._is_closed = True
            self._table = None

    def lookup(self, texts: Sequence[str]) -> FoundVectors:
        """Return the vectors of the texts that the source has. The first call waits until the source has been read.

        Raises:
            IndexNotReady: the source was not read before the deadline of the call.
            Exception: the error with which reading the source has ended.
        """
        self._start()
        left = time_left()
        self._ended.wait(None if left is None else max(0.0, left - MARGIN))
        table, error = self._table, self._error
        if error is not None:
            raise error.with_traceback(None)  # otherwise, it would keep the frames of all calls that raise it
        if table is None:
            raise IndexNotReady
        return table.find(texts)

    def _start(self) -> None:
        with self._lock:
            if self._is_closed or self._table is not None:
                return
            if self._thread is not None and (self._error is None or time.monotonic() < self._retry_at):
                return
            self._error = None
            self._ended.clear()
            self._thread = threading.Thread(target=self._read, name="embedonce-scan", daemon=True)
            self._thread.start()

    def _read(self) -> None:
        table: _Table | None = None
        problem: Exception | None = None
        try:
            with run_source(self._importer):
                table = _read_table(self._importer, lambda: self._is_closed)
        except TimeoutError as error:
            problem = TierTimeout(str(error))
        except Exception as error:  # noqa: BLE001  (an importer may raise anything)
            problem = error
        with self._lock:
            self._retry_at = time.monotonic() + RETRY_SECONDS
            self._error = problem
            self._table = None if self._is_closed else table
            self._ended.set()


class _Table:
    """Hashes of texts, sorted, and the rows of their vectors in a file."""

    def __init__(self, hashes: NDArray[Any], rows: NDArray[np.int64], vectors: Matrix) -> None:
        self._hashes = hashes
        self._rows = rows
        self._vectors = vectors

    def find(self, texts: Sequence[str]) -> FoundVectors:
        if not self._hashes.size:
            return FoundVectors((), ())
        wanted = _hash_texts(texts)
        places = np.searchsorted(self._hashes["first"], wanted["first"])
        found: list[str] = []
        rows: list[int] = []
        for text, hashed, place in zip(texts, wanted, places.tolist(), strict=True):
            while place < self._hashes.size and self._hashes["first"][place] == hashed["first"]:
                if self._hashes["second"][place] == hashed["second"]:
                    found.append(text)
                    rows.append(int(self._rows[place]))
                    break
                place += 1
        return FoundVectors(found, self._vectors[rows] if rows else ())


def _hash_texts(texts: Sequence[str]) -> NDArray[Any]:
    # A text from a source may have a lone surrogate. It has a hash like any other text, and no key.
    joined = b"".join([blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts])
    return np.frombuffer(joined, _HASH)


class _Rows:
    """The rows of a source that have the same number of dimensions."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.hashes: list[NDArray[Any]] = []
        self.count = 0

    def add(self, hashes: NDArray[Any], rows: Matrix) -> None:
        self.hashes.append(hashes)
        self.count += len(rows)
        self.file.write(np.ascontiguousarray(rows, np.float32).data)

    def make_table(self, dimensions: int) -> _Table:
        self.file.flush()
        # The memory map keeps the file open.
        vectors = np.memmap(self.file, np.float32, "r", shape=(self.count, dimensions))
        joined = np.concatenate(self.hashes)
        order = np.lexsort((joined["second"], joined["first"]))
        return _drop_repeated(joined[order], order, vectors)


def _read_table(importer: ScanImporter, is_closed: Any) -> _Table:
    """Read the whole source. If its vectors differ in their dimensions, use those that most of them have.

    Raises:
        SourceError: the vectors take more than :data:`MAX_BYTES`.
    """
    by_dimensions: dict[int, _Rows] = {}
    size = 0
    with ExitStack() as files:
        for part in importer.scan():
            if is_closed():
                break
            if not len(part.texts):
                continue
            try:
                rows, bad = check_rows(
                    part.vectors, len(part.texts), dimensions=None, dtype="float32", who="the source has"
                )
            except ProviderError:
                continue  # none of these vectors is valid
            size += rows.size * 4
            if size > MAX_BYTES:
                raise SourceError(
                    f"the source has more than {MAX_BYTES // 2**30} GiB of vectors, which is too much for [[imports]]; "
                    "run `embedonce import` instead"
                )
            dimensions = rows.shape[1]
            if dimensions not in by_dimensions:
                if len(by_dimensions) == MAX_DIMENSIONS:
                    continue
                by_dimensions[dimensions] = _Rows(files.enter_context(tempfile.TemporaryFile(prefix="embedonce-")))
            by_dimensions[dimensions].add(
                _hash_texts([text for i, text in enumerate(part.texts) if i not in bad]), rows
            )
        if not by_dimensions:
            return _Table(np.empty(0, _HASH), np.empty(0, np.int64), np.empty((0, 1), np.float32))
        most, largest = max(by_dimensions.items(), key=lambda item: item[1].count)
        return largest.make_table(most)


def _drop_repeated(hashes: NDArray[Any], rows: NDArray[np.int64], vectors: Matrix) -> _Table:
    """Keep one row of each text. Drop a text that the source has with different vectors, because one must be wrong."""
    is_first = np.ones(len(hashes), bool)
    is_first[1:] = hashes[1:] != hashes[:-1]
    if not is_first.all():
        starts = np.flatnonzero(is_first)
        ends = np.append(starts[1:], len(hashes))
        for start, end in zip(starts[ends - starts > 1], ends[ends - starts > 1], strict=True):
            same = vectors[rows[start:end]]
            if (compute_cosines(same, np.broadcast_to(same[0], same.shape)) < LEAST_COSINE).any():
                is_first[start] = False
    return _Table(hashes[is_first], rows[is_first], vectors)
