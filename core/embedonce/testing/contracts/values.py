"""Values for the tests of backends: frames, entries or both, depending on what the backend holds."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from hashlib import sha256
from typing import Any, Protocol

import numpy as np

from embedonce.vectors import MAX_SECONDS, MAX_TOKENS, Dtype, Entry, freeze, is_valid_cost, round_vectors

SCOPE = "0123456789abcdef"

CREATED = 1_700_000_000.25
EXPIRES = 4_102_444_800.5
"""Unix time of expiry. It is in the year 2100, which is in the future on every clock."""

MIB = 2**20
FRAME_SIZES = (0, 1, 6 * 1024, MIB)


def key(number: int, scope: str = SCOPE) -> str:
    """Return a key in the format of the engine's keys. Every number gives a different key."""
    return f"eo1.{scope}.{sha256(b'%d' % number).hexdigest()}"


class Values(Protocol):
    """Makes and compares the values that a backend holds."""

    def sample(self, seed: int) -> Any:
        """Return a small value that differs for every seed and is the same in every process."""
        ...

    def make_edge_values(self, max_bytes: int | None) -> Mapping[str, Any]:
        """Return values that have exposed bugs in stores. The keys of the result describe the values.

        No frame has more than ``max_bytes`` bytes.
        """
        ...

    def is_equal(self, found: object, stored: Any) -> bool:
        """Return whether ``found`` has the same type as ``stored`` and identical content."""
        ...


def make_values(holds: str, dimensions: Sequence[int]) -> Values:
    """Return an object that makes values for a backend whose ``capabilities.holds`` equals ``holds``."""
    match holds:
        case "entries":
            return Entries(dimensions)
        case "either":
            return Either(dimensions)
        case _:
            return Frames()


class Frames:
    """Makes frames of arbitrary bytes, because a backend does not interpret the content of a frame."""

    def sample(self, seed: int) -> bytes:
        """Return 64 bytes."""
        return random.Random(seed).randbytes(64)

    def make_edge_values(self, max_bytes: int | None) -> Mapping[str, bytes]:
        """Return frames of several sizes and frames with unusual content."""
        chance = random.Random(0)
        values = {f"{size} bytes": chance.randbytes(size) for size in FRAME_SIZES}
        values |= {
            "only NUL bytes": bytes(64),
            "NUL bytes at the end": b"value" + bytes(16),
            "every byte from 0 to 255": bytes(range(256)),
            "surrounding white space": b" \t\r\n value \r\n",
            "invalid UTF-8": b"\xff\xfe\x80\xc3",
            "digits only": b"123",
        }
        return {name: value for name, value in values.items() if max_bytes is None or len(value) <= max_bytes}

    def is_equal(self, found: object, stored: bytes) -> bool:
        """Compare type and bytes."""
        return type(found) is bytes and found == stored


class Entries:
    """Makes entries with vectors of each size in ``dimensions``; :meth:`sample` uses only the first size."""

    def __init__(self, dimensions: Sequence[int]) -> None:
        self._dimensions = tuple(dimensions)

    def sample(self, seed: int) -> Entry:
        """Return an entry with metadata and a cost."""
        vector = _vector(self._dimensions[0], seed)
        return Entry(vector, CREATED + seed, None, {"seed": seed}, tokens=seed, seconds=seed / 8)

    def make_edge_values(self, max_bytes: int | None) -> Mapping[str, Entry]:
        """Return entries with various dimensions, extreme numbers, times of expiry, metadata, dtypes and costs."""
        info = np.finfo(np.float32)
        first = self._dimensions[0]
        special = np.resize(np.array([-0.0, info.max, info.smallest_subnormal, info.tiny, -1.0], np.float32), first)
        special[-1] = 0.1
        values = {f"{size} dimensions": Entry(_vector(size, size), CREATED) for size in self._dimensions}
        values |= {
            "the extremes of float32": Entry(freeze(special), CREATED),
            "an expiry date": Entry(_vector(first, 1), CREATED, EXPIRES),
            "no metadata": Entry(_vector(first, 2), CREATED, None, None),
            "nested metadata": Entry(_vector(first, 3), CREATED, None, NESTED),
            "float16": Entry(_vector(first, 4, "float16"), CREATED, dtype="float16"),
            "int8": Entry(_vector(first, 5, "int8"), CREATED, dtype="int8"),
            "a cost": Entry(_vector(first, 6), CREATED, tokens=12, seconds=0.1),
            "tokens without seconds": Entry(_vector(first, 7), CREATED, tokens=12),
            "seconds without tokens": Entry(_vector(first, 8), CREATED, seconds=0.1),
            "a cost of zero": Entry(_vector(first, 9), CREATED, tokens=0, seconds=0.0),
            "the largest cost": Entry(_vector(first, 10), CREATED, tokens=MAX_TOKENS, seconds=MAX_SECONDS),
            "the cost of an int8 vector": Entry(_vector(first, 11, "int8"), CREATED, None, NESTED, "int8", 12, 0.1),
        }
        return values

    def is_equal(self, found: object, stored: Entry) -> bool:
        """Compare the vector bit by bit, and the rest by value. Tokens must be an int, because 7.0 equals 7."""
        return (
            isinstance(found, Entry)
            and found.vector.dtype == np.float32
            and found.vector.shape == stored.vector.shape
            and found.vector.tobytes() == stored.vector.tobytes()
            and found[1:] == stored[1:]
            and is_valid_cost(found.tokens, found.seconds)
        )


class Either:
    """Makes frames and entries alternately, for a backend that takes both."""

    def __init__(self, dimensions: Sequence[int]) -> None:
        self._frames, self._entries = Frames(), Entries(dimensions)

    def sample(self, seed: int) -> Any:
        """Return a frame if ``seed`` is even, and an entry if ``seed`` is odd."""
        return self._entries.sample(seed) if seed % 2 else self._frames.sample(seed)

    def make_edge_values(self, max_bytes: int | None) -> Mapping[str, Any]:
        """Return the edge values of frames and of entries."""
        return {**self._frames.make_edge_values(max_bytes), **self._entries.make_edge_values(max_bytes)}

    def is_equal(self, found: object, stored: Any) -> bool:
        """Compare as frames or as entries, depending on the type of ``stored``."""
        return self._frames.is_equal(found, stored) if type(stored) is bytes else self._entries.is_equal(found, stored)


NESTED = {"source": "a/b.md", "chunk": 3, "tags": ["ä", "\U0001f9ea"], "deep": {"none": None, "yes": True, "f": 0.5}}


def _vector(dimension: int, seed: int, dtype: Dtype = "float32") -> Any:
    chance = random.Random(seed)
    row = np.array([[chance.uniform(-1.0, 1.0) for _ in range(dimension)]], np.float32)
    return freeze(round_vectors(row, dtype)[0])


def require_samples(values: Values, found: Mapping[str, Any], expected: Mapping[str, int]) -> None:
    """Require that ``found`` has exactly the samples of ``expected``, which maps keys to the seeds of samples."""
    assert isinstance(found, Mapping), f"get_many must return a mapping, got {type(found).__name__}"
    missing = [place for place, name in enumerate(expected) if name not in found]
    assert not missing, f"get_many did not return {len(missing)} of {len(expected)} keys that are stored"
    assert len(found) == len(expected), f"get_many returned {len(found) - len(expected)} unexpected keys"
    for place, (name, seed) in enumerate(expected.items()):
        stored = values.sample(seed)
        about = _describe_difference(found[name], stored)
        assert values.is_equal(found[name], stored), (
            f"get_many returned {about} for key {place} of {len(expected)}, not the stored value"
        )


def require_partition(answer: Collection[str], failed: frozenset[str], asked: Mapping[str, int]) -> None:
    """Require that each key is either in the answer of a PartialAnswer or in ``failed``, and not in both."""
    both = len(failed & set(answer))
    assert not both, f"{both} keys are both in PartialAnswer.failed and in PartialAnswer.answer"
    neither = len(asked.keys() - failed - set(answer))
    assert not neither, f"{neither} keys are neither in PartialAnswer.failed nor in PartialAnswer.answer"


def _describe_difference(value: object, stored: object) -> str:
    if value is None:
        return "None"
    if type(value) is not type(stored):
        return f"a {type(value).__name__} instead of a {type(stored).__name__}"
    return f"{len(value)} different bytes" if isinstance(value, bytes) else f"a different {type(value).__name__}"
