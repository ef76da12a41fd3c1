"""The ``ngram`` provider: vectors from character n-grams, with no model, no network and no download.

Two texts are near each other when they share most of their short runs of characters: the same text
reflowed, in another case, with a typo, a word changed or a sentence added. It knows nothing of meaning.

How a text becomes a vector, step by step, so that anyone can make the same one:

1. Letters of Latin, Greek, Cyrillic and Armenian become lower case; every run of white space becomes
   one space; one space is put in front and one behind, so that word boundaries are n-grams too.
2. Every run of 3 and of 4 characters is hashed to a bucket and a sign, and counted there. An empty text has
   no run and counts one in the first bucket.
3. Component ``i`` is ``sign(c) * sqrt(abs(c) / s)``, for its count ``c`` and the sum ``s`` of all
   ``abs(c)``: the vector has length 1, and a run that comes a hundred times weighs ten times as much.

Every sum is over integers, and the root and the quotient are operations that IEEE 754 rounds exactly.
So a text has the same vector, bit for bit, on every platform, Python and numpy, alone or in a batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Annotated, Final

import numpy as np
from annotated_types import Ge, Le
from numpy.typing import NDArray

from embedonce import Limits, VectorSpace, hookimpl
from embedonce.contracts import Task
from embedonce.options import Doc

api = 1

SIZES: Final = (3, 4)
"""Lengths of the runs. Measured on docstrings with a fifth of their words edited: 3 and 4 together find as
many as 3 alone (F1 0.92) and keep texts that have nothing to do with each other further apart (mean
cosine 0.12, against 0.17); adding 5 costs time and finds no more."""

SPACE: Final = 0x20

# Case folding is taken from Python for blocks that are complete, and left alone elsewhere: a later Unicode
# adds cased letters, and what a text's vector is must not depend on which Python made it.
CASED: Final = (range(0x0000, 0x0590), range(0x1E00, 0x2000))
TABLE: Final = 0x3001
"""Code points from here on are neither folded nor white space. U+3000, the ideographic space, is the last."""

CHARACTERS: Final = 16_384
BUCKETS: Final = 131_072
"""Texts are worked on in groups of about this many characters and buckets, so that what a group needs stays in
the processor's cache: 7 µs for a docstring of 300 characters, where one group of a whole batch took 11."""


class NgramProvider:
    """Embeds texts by hashing their character n-grams. Deterministic, local, symmetric."""

    limits = Limits(max_batch=1024)

    def __init__(
        self,
        *,
        dimensions: Annotated[
            int, Ge(8), Le(8192), Doc("Length of the vectors; longer ones tell more texts apart.")
        ] = 256,
    ) -> None:
        if not 8 <= dimensions <= 8192:
            raise ValueError(f"dimensions is from 8 to 8192, not {dimensions}")
        self.dimensions = dimensions
        self._space = VectorSpace(
            provider="ngram",
            model="char-ngram",
            dimensions=dimensions,
            normalize=True,
            extra={"sizes": SIZES},
            space_version=1,
        )

    def space(self, task: Task) -> VectorSpace:
        """Return the one space of this provider, whatever the task."""
        return self._space

    def embed(self, texts: Sequence[str], task: Task) -> NDArray[np.float32]:
        """Return shape (n, dimensions), float32, every row of length 1. No text is refused, and none is zero."""
        rows = [_normalized(_counts(group, self.dimensions)) for group in _groups(texts, self.dimensions)]
        return np.concatenate(rows) if rows else np.empty((0, self.dimensions), np.float32)

    def close(self) -> None:
        """Do nothing: there is nothing to let go of."""


@hookimpl
def embedonce_providers() -> Mapping[str, type[NgramProvider]]:
    return {"ngram": NgramProvider}


def _groups(texts: Sequence[str], dimensions: int) -> Iterator[list[str]]:
    """Yield the texts in order, in groups; a text that is longer than a group is one of its own."""
    group: list[str] = []
    characters = 0
    for text in texts:
        if group and (characters + len(text) > CHARACTERS or (len(group) + 1) * dimensions > BUCKETS):
            yield group
            group, characters = [], 0
        group.append(text)
        characters += len(text)
    if group:
        yield group


def _counts(texts: list[str], dimensions: int) -> NDArray[np.int64]:
    """Return shape (n, dimensions): signed counts of the n-grams of each text, no row all zero."""
    codes, rows = _stream(texts)
    counts = np.zeros((len(texts), dimensions, 2), np.int64)
    hashes = codes * _FACTOR
    for size in range(2, max(SIZES) + 1):
        hashes = (hashes[:-1] + codes[size - 1 :]) * _FACTOR
        if size not in SIZES:
            continue
        inside = rows[: len(hashes)] == rows[size - 1 :]
        slots = _slots(hashes[inside] ^ np.uint32(size), dimensions)
        slots += rows[: len(hashes)][inside] * (2 * dimensions)
        counts += np.bincount(slots, minlength=counts.size).reshape(counts.shape)
    signed = counts[:, :, 1] - counts[:, :, 0]
    # A text of n characters has n runs of 3 and n - 1 of 4: an odd number of signs never cancels out.
    # Only an empty text has none; it gets the first bucket.
    signed[~signed.any(axis=1), 0] = 1
    return signed


def _stream(texts: list[str]) -> tuple[NDArray[np.uint32], NDArray[np.intp]]:
    """Return the folded characters of all texts, each between two spaces, and the text that each belongs to."""
    joined = " " + "  ".join(texts) + " "
    codes = np.frombuffer(joined.encode("utf-32-le"), "<u4").astype(np.uint32)
    rows = np.repeat(np.arange(len(texts)), np.fromiter(map(len, texts), np.intp, len(texts)) + 2)
    codes = _folded(codes)
    space = codes == SPACE
    again = np.zeros(len(codes), np.bool_)
    np.logical_and(space[1:], space[:-1], out=again[1:])
    again[1:] &= rows[1:] == rows[:-1]
    return codes[~again], rows[~again]


def _folded(codes: NDArray[np.uint32]) -> NDArray[np.uint32]:
    table = _table()
    if codes.max() < TABLE:
        return table[codes]
    return np.where(codes < TABLE, table[np.minimum(codes, TABLE - 1)], codes)


@cache
def _table() -> NDArray[np.uint32]:
    """Return what each code point below :data:`TABLE` becomes: white space a space, a cased letter its lower case."""
    table = np.arange(TABLE, dtype=np.uint32)
    for code in itertools.chain(*CASED):
        folded = chr(code).casefold()
        if len(folded) == 1:
            table[code] = ord(folded)
    table[[code for code in range(TABLE) if chr(code).isspace()]] = SPACE
    return table


# Odd and without pattern (2**32 over the golden ratio), so that runs of other characters get other products.
_FACTOR: Final = np.uint32(0x9E3779B1)
_13, _16 = np.uint32(13), np.uint32(16)


def _mixed(hashes: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return the hashes with every bit depending on every other (the finalizer of MurmurHash3)."""
    hashes = hashes ^ (hashes >> _16)
    hashes *= np.uint32(0x85EBCA6B)
    hashes ^= hashes >> _13
    hashes *= np.uint32(0xC2B2AE35)
    hashes ^= hashes >> _16
    return hashes


def _slots(hashes: NDArray[np.uint32], dimensions: int) -> NDArray[np.intp]:
    """Return a number below ``2 * dimensions`` for each hash: twice the bucket, plus one where the sign is plus."""
    wide = _mixed(hashes).astype(np.uint64)
    wide *= np.uint64(2 * dimensions)
    wide >>= np.uint64(32)
    return wide.view(np.int64).astype(np.intp, copy=False)


def _normalized(counts: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return ``sign(c) * sqrt(abs(c) / sum(abs(c)))`` by row: in float64, rounded to float32 once."""
    sizes = np.abs(counts)
    lengths: NDArray[np.float64] = np.sqrt(sizes / sizes.sum(axis=1, keepdims=True))
    return np.copysign(lengths, counts).astype(np.float32)
