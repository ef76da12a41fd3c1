"""Counting distinct texts in bounded memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from hashlib import blake2b
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

HELD = 2**20
"""Hashes that are held in memory at once: 8 MiB."""


class Distinct:
    """Counts distinct texts by 8 bytes of BLAKE2b each.

    More than :data:`HELD` of them go, sorted, to a temporary file that is merged when it is counted, so
    that memory does not grow with the corpus. Two texts that share 8 bytes would count as one: among ten
    million texts the chance that this happens once is 3 in a million.
    """

    def __init__(self, held: int = HELD) -> None:
        self._limit = held
        self._held: list[NDArray[np.uint64]] = []
        self._count = 0
        self._runs: list[int] = []
        self._file: IO[bytes] | None = None

    def add(self, texts: Iterable[str]) -> None:
        joined = b"".join([blake2b(text.encode(), digest_size=8).digest() for text in texts])
        self._held.append(np.frombuffer(joined, dtype=np.uint64))
        self._count += len(self._held[-1])
        if self._count >= self._limit:
            self._pack()

    def _pack(self) -> None:
        """Drop duplicates of what is held, and write it out where that does not halve it."""
        hashes = np.unique(np.concatenate(self._held))
        self._held, self._count = [hashes], len(hashes)
        if self._count > self._limit // 2:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="embedonce-")  # noqa: SIM115 - until close
            self._file.write(hashes.tobytes())
            self._runs.append(self._count)
            self._held, self._count = [], 0

    def count(self) -> int:
        """Return how many distinct texts were added."""
        if self._file is None:
            return len(np.unique(np.concatenate(self._held))) if self._held else 0
        self._file.flush()
        whole: Any = np.memmap(self._file, dtype=np.uint64, mode="r", shape=(sum(self._runs),))
        runs = np.split(whole, np.cumsum(self._runs)[:-1])
        if self._held:
            runs.append(np.unique(np.concatenate(self._held)))
        return _merged(runs, parts=2 * len(runs))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _merged(runs: list[NDArray[np.uint64]], parts: int) -> int:
    """Count what is distinct in sorted runs, one range of values after the other."""
    edges = np.array([2**64 * part // parts for part in range(1, parts)], dtype=np.uint64)
    cuts = [[0, *np.searchsorted(run, edges).tolist(), len(run)] for run in runs]
    total = 0
    for part in range(parts):
        pieces = [run[cut[part] : cut[part + 1]] for run, cut in zip(runs, cuts, strict=True)]
        total += len(np.unique(np.concatenate(pieces)))
    return total
