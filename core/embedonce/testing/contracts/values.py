"""Values for the backend contract: frames for a backend that holds frames, entries for one that holds entries."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, Protocol

import numpy as np

from embedonce.vectors import Dtype, Entry, freeze, round_vectors

SCOPE = "0123456789abcdef"

CREATED = 1_700_000_000.25
EXPIRES = 4_102_444_800.5
"""Far enough that no clock has come to it."""

MIB = 2**20
FRAME_SIZES = (0, 1, 6 * 1024, MIB)


def key(number: int, scope: str = SCOPE) -> str:
    """Return a key as the engine makes them, another for every number."""
    return f"eo1.{scope}.{sha256(b'%d' % number).hexdigest()}"


class Values(Protocol):
    """Makes and compares what a backend holds."""

    def sample(self, seed: int) -> Any:
        """Return a small value, another for every seed, the same in every process."""
        ...

    def edges(self, most: int | None) -> Mapping[str, Any]:
        """Return values that have broken stores, by what is special about them; none above ``most`` bytes."""
        ...

    def same(self, found: object, stored: Any) -> bool:
        """Tell whether what came back is what was stored, type and bits included."""
        ...


def values_for(holds: str, dimensions: Sequence[int]) -> Values:
    """Return the values that a backend holds, by what its capabilities say that it holds."""
    match holds:
        case "entries":
            return Entries(dimensions)
        case "either":
            return Either(dimensions)
        case _:
            return Frames()


class Frames:
    """Bytes. To a backend they mean nothing, so they may be any."""

    def sample(self, seed: int) -> bytes:
        """Return 64 bytes."""
        return random.Random(seed).randbytes(64)

    def edges(self, most: int | None) -> Mapping[str, bytes]:
        """Return values by size and by content."""
        chance = random.Random(0)
        values = {f"{size} bytes": chance.randbytes(size) for size in FRAME_SIZES}
        values |= {
            "NUL bytes alone": bytes(64),
            "NUL bytes at the end": b"value" + bytes(16),
            "every byte there is": bytes(range(256)),
            "white space around": b" \t\r\n value \r\n",
            "not UTF-8": b"\xff\xfe\x80\xc3",
            "what looks like a number": b"123",
        }
        return {name: value for name, value in values.items() if most is None or len(value) <= most}

    def same(self, found: object, stored: bytes) -> bool:
        """Compare type and bytes."""
        return type(found) is bytes and found == stored


class Entries:
    """Entries with vectors of the given dimensions; the first is that of :meth:`sample`."""

    def __init__(self, dimensions: Sequence[int]) -> None:
        self._dimensions = tuple(dimensions)

    def sample(self, seed: int) -> Entry:
        """Return an entry with metadata."""
        return Entry(_vector(self._dimensions[0], seed), CREATED + seed, None, {"seed": seed})

    def edges(self, most: int | None) -> Mapping[str, Entry]:
        """Return entries by dimension, number, date, metadata and dtype."""
        info = np.finfo(np.float32)
        first = self._dimensions[0]
        special = np.resize(np.array([-0.0, info.max, info.smallest_subnormal, info.tiny, -1.0], np.float32), first)
        special[-1] = 0.1
        values = {f"{size} dimensions": Entry(_vector(size, size), CREATED) for size in self._dimensions}
        values |= {
            "numbers at the ends of float32": Entry(freeze(special), CREATED),
            "a date of expiry": Entry(_vector(first, 1), CREATED, EXPIRES),
            "no metadata": Entry(_vector(first, 2), CREATED, None, None),
            "nested metadata": Entry(_vector(first, 3), CREATED, None, NESTED),
            "float16": Entry(_vector(first, 4, "float16"), CREATED, dtype="float16"),
            "int8": Entry(_vector(first, 5, "int8"), CREATED, dtype="int8"),
        }
        return values

    def same(self, found: object, stored: Entry) -> bool:
        """Compare the vector bit by bit, and the rest by value."""
        return (
            isinstance(found, Entry)
            and found.vector.dtype == np.float32
            and found.vector.shape == stored.vector.shape
            and found.vector.tobytes() == stored.vector.tobytes()
            and found[1:] == stored[1:]
        )


class Either:
    """Frames and entries in turn, for a backend that takes both."""

    def __init__(self, dimensions: Sequence[int]) -> None:
        self._frames, self._entries = Frames(), Entries(dimensions)

    def sample(self, seed: int) -> Any:
        """Return a frame for an even seed, an entry for an odd one."""
        return self._entries.sample(seed) if seed % 2 else self._frames.sample(seed)

    def edges(self, most: int | None) -> Mapping[str, Any]:
        """Return those of both."""
        return {**self._frames.edges(most), **self._entries.edges(most)}

    def same(self, found: object, stored: Any) -> bool:
        """Compare as the kind of what was stored does."""
        return self._frames.same(found, stored) if type(stored) is bytes else self._entries.same(found, stored)


NESTED = {"source": "a/b.md", "chunk": 3, "tags": ["ä", "\U0001f9ea"], "deep": {"none": None, "yes": True, "f": 0.5}}


def _vector(dimension: int, seed: int, dtype: Dtype = "float32") -> Any:
    chance = random.Random(seed)
    row = np.array([[chance.uniform(-1.0, 1.0) for _ in range(dimension)]], np.float32)
    return freeze(round_vectors(row, dtype)[0])
