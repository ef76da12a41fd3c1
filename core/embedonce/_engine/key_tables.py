"""The keys of many entries in sorted tables, which take 32 bytes per key."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from embedonce.keys import KEY_PREFIX

SCOPE: Final = r"[0-9a-f]{16}"
_ENTRY_KEY: Final = re.compile(rf"{re.escape(KEY_PREFIX)}({SCOPE})\.([0-9a-f]{{64}})")
_DIGEST: Final = np.dtype("S32")
"""numpy compares values of this type byte by byte, as unsigned numbers. It pads shorter values with zeros, so a digest
that ends in zeros keeps its place. Such a value loses its zeros only if it becomes a bytes object."""


class KeyTable:
    """The digests of one scope's keys, each once, in ascending order."""

    def __init__(self, digests: NDArray[np.bytes_]) -> None:
        self._digests: NDArray[np.bytes_] = np.unique(digests)

    def __len__(self) -> int:
        return len(self._digests)

    def list_keys(self, scope: str, start: int, stop: int) -> list[str]:
        """Return the keys of the rows from ``start`` to ``stop``, in ascending order."""
        digits = self._digests[start:stop].tobytes().hex()
        prefix = f"{KEY_PREFIX}{scope}."
        return [prefix + digits[at : at + 64] for at in range(0, len(digits), 64)]

    def contains(self, keys: Sequence[str]) -> NDArray[np.bool_]:
        """Return for each key of the scope whether the table has it, shape (n,)."""
        if not len(self):
            return np.zeros(len(keys), np.bool_)
        digests = _read_digests([key[-64:] for key in keys])
        # A binary search per key. np.isin would sort the whole table for each call.
        places = np.minimum(np.searchsorted(self._digests, digests), len(self) - 1)
        is_there: NDArray[np.bool_] = self._digests[places] == digests
        return is_there

    def unite(self, other: KeyTable) -> KeyTable:
        """Return the keys that are in one of the tables."""
        return KeyTable(np.concatenate((self._digests, other._digests)))

    def intersect(self, other: KeyTable) -> KeyTable:
        """Return the keys that are in both tables."""
        return KeyTable(np.intersect1d(self._digests, other._digests, assume_unique=True))

    def subtract(self, other: KeyTable) -> KeyTable:
        """Return the keys that are not in the other table."""
        return KeyTable(np.setdiff1d(self._digests, other._digests, assume_unique=True))


def make_key_table(digests: Sequence[str]) -> KeyTable:
    """Return the table of some digests, each written as 64 hex digits."""
    return KeyTable(_read_digests(digests))


def _read_digests(digests: Sequence[str]) -> NDArray[np.bytes_]:
    return _split(bytes.fromhex("".join(digests)))


def _split(joined: bytes | bytearray) -> NDArray[np.bytes_]:
    """Return joined digests as an array, shape (n,)."""
    return np.ndarray((len(joined) // _DIGEST.itemsize,), _DIGEST, joined)


NO_KEYS: Final = make_key_table(())


def read_key_tables(keys: Iterable[str]) -> dict[str, KeyTable]:
    """Return the keys of entries by scope. Keys of leases, space cards and other records are left out."""
    digests: dict[str, bytearray] = {}
    for key in keys:
        match = _ENTRY_KEY.fullmatch(key)
        if match is not None:
            scope, digest = match.groups()
            if scope not in digests:
                digests[scope] = bytearray()
            digests[scope] += bytes.fromhex(digest)
    return {scope: KeyTable(_split(joined)) for scope, joined in digests.items()}
