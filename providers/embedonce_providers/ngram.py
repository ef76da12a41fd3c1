"""The ``ngram`` provider: vectors from character n-grams, with no model, no network and no download.

Two texts have similar vectors if they share most of their short runs of characters. For example, one text may be a copy
of the other with different line breaks, a different case, a typo, a changed word or an added sentence. The provider
knows nothing about meaning.

These steps make a vector from a text:

1. Latin, Greek, Cyrillic and Armenian letters become lower case. One space is added before the text and one after it,
   so that n-grams also cover the first and the last word boundary. Then every run of white space becomes one space.
2. Every run of 3 and every run of 4 characters is hashed to a bucket and a sign, and the sign is added to that bucket.
   An empty or blank text has no such run, so its first bucket is set to 1.
3. Component ``i`` is ``sign(c) * sqrt(abs(c) / s)``, where ``c`` is the count of bucket ``i`` and ``s`` the sum of all
   ``abs(c)``. So the vector has unit length, and a run that occurs a hundred times weighs ten times as much as a run
   that occurs once.

All sums are sums of integers, and IEEE 754 defines exactly how the root and the quotient are rounded. Therefore a text
has the same vector, bit for bit, on every platform, with every version of Python and numpy, alone or in a batch.
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
from embedonce.tasks import check_task
from embedonce.vectors import Matrix

api = 1

SIZES: Final = (3, 4)
"""Numbers of characters in a run. Several choices were compared on copies of docstrings in which a fifth of the words
were edited. Runs of 3 and 4 together find as many copies as runs of 3 alone (F1 0.92) and keep unrelated texts further
apart (mean cosine 0.12 instead of 0.17). With runs of 5 in addition, the provider takes longer and finds no additional
copies."""

SPACE: Final = 0x20

# Case is folded only in Unicode blocks that are complete. A later version of Python may use a later version of Unicode,
# which may add cased letters to the other blocks. A text's vector must not depend on the version of Python.
CASED: Final = (range(0x0000, 0x0590), range(0x1E00, 0x2000))
TABLE: Final = 0x3001
"""First code point after U+3000, the ideographic space. No code point from here on is folded, and none is
white space."""

CHARACTERS: Final = 16_384
BUCKETS: Final = 131_072
"""Maximum numbers of characters and of buckets in a group of texts that is embedded in one step. A group this small
stays in the processor's cache, so a docstring of 300 characters takes 7 µs. If the whole batch were one group, the
docstring would take 11 µs."""


class NgramProvider:
    """Embeds texts by hashing their character n-grams. It is deterministic, runs locally, and ignores the task."""

    limits = Limits(max_batch=1024, lease=False)

    def __init__(
        self,
        *,
        dimensions: Annotated[
            int, Ge(8), Le(8192), Doc("Number of dimensions. Vectors with more dimensions distinguish more texts.")
        ] = 256,
    ) -> None:
        if not 8 <= dimensions <= 8192:
            raise ValueError(f"dimensions must be between 8 and 8192, got {dimensions}")
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
        """Return the space of this provider, which is the same for every task.

        Raises:
            SpaceError: the task looks like a misspelled "document" or "query".
        """
        check_task(task, what="provider 'ngram'", accepts_others=True)
        return self._space

    def embed(self, texts: Sequence[str], task: Task) -> Matrix:
        """Return a float32 array of shape (n, dimensions). Every row has unit length, and no text is refused."""
        rows = [_normalize(_count_ngrams(group, self.dimensions)) for group in _split(texts, self.dimensions)]
        return np.concatenate(rows) if rows else np.empty((0, self.dimensions), np.float32)

    def count_exact_tokens(self, texts: Sequence[str], task: Task) -> list[int]:
        """Return 0 for each text, because this provider reads characters and charges nothing."""
        return [0] * len(texts)

    def close(self) -> None:
        """Do nothing, because this provider holds no resources."""


@hookimpl
def embedonce_providers() -> Mapping[str, type[NgramProvider]]:
    return {"ngram": NgramProvider}


def _split(texts: Sequence[str], dimensions: int) -> Iterator[list[str]]:
    """Yield the texts in order, in groups. A text that exceeds the limits by itself forms a group of its own."""
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


def _count_ngrams(texts: list[str], dimensions: int) -> NDArray[np.int64]:
    """Return an array of shape (n, dimensions) with the signed counts of each text's n-grams. No row is all zero."""
    codes, rows = _join(texts)
    counts = np.zeros((len(texts), dimensions, 2), np.int64)
    hashes = codes * _FACTOR
    for size in range(2, max(SIZES) + 1):
        hashes = (hashes[:-1] + codes[size - 1 :]) * _FACTOR
        if size not in SIZES:
            continue
        is_in_one_text = rows[: len(hashes)] == rows[size - 1 :]
        slots = _find_slots(hashes[is_in_one_text] ^ np.uint32(size), dimensions)
        slots += rows[: len(hashes)][is_in_one_text] * (2 * dimensions)
        counts += np.bincount(slots, minlength=counts.size).reshape(counts.shape)
    signed = counts[:, :, 1] - counts[:, :, 0]
    # Each text has a space before and after it. With these spaces, a text of n characters has n runs of 3 and n - 1
    # runs of 4. The total is an odd number, so the signs never cancel out completely. Only an empty or blank text has
    # no run, so its first bucket is set to 1.
    signed[~signed.any(axis=1), 0] = 1
    return signed


def _join(texts: list[str]) -> tuple[NDArray[np.uint32], NDArray[np.intp]]:
    """Return the folded characters of all texts and, for each character, the index of its text.

    Each text has a space before and after it.
    """
    joined = " " + "  ".join(texts) + " "
    codes = np.frombuffer(joined.encode("utf-32-le"), "<u4").astype(np.uint32)
    rows = np.repeat(np.arange(len(texts)), np.fromiter(map(len, texts), np.intp, len(texts)) + 2)
    codes = _fold(codes)
    is_space = codes == SPACE
    is_repeated = np.zeros(len(codes), np.bool_)
    np.logical_and(is_space[1:], is_space[:-1], out=is_repeated[1:])
    is_repeated[1:] &= rows[1:] == rows[:-1]
    return codes[~is_repeated], rows[~is_repeated]


def _fold(codes: NDArray[np.uint32]) -> NDArray[np.uint32]:
    table = _folding_table()
    if codes.max() < TABLE:
        return table[codes]
    return np.where(codes < TABLE, table[np.minimum(codes, TABLE - 1)], codes)


@cache
def _folding_table() -> NDArray[np.uint32]:
    """Return the replacement of each code point below :data:`TABLE`.

    White space becomes a space, and a cased letter becomes lower case. A letter whose lower case has more than one
    character stays as it is.
    """
    table = np.arange(TABLE, dtype=np.uint32)
    for code in itertools.chain(*CASED):
        folded = chr(code).casefold()
        if len(folded) == 1:
            table[code] = ord(folded)
    table[[code for code in range(TABLE) if chr(code).isspace()]] = SPACE
    return table


# This factor is 2**32 divided by the golden ratio. It is odd and its bits have no pattern, so two different runs of
# characters rarely get the same hash.
_FACTOR: Final = np.uint32(0x9E3779B1)
_13, _16 = np.uint32(13), np.uint32(16)


def _mix(hashes: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Make every bit of a hash depend on every other bit (the finalizer of MurmurHash3)."""
    hashes = hashes ^ (hashes >> _16)
    hashes *= np.uint32(0x85EBCA6B)
    hashes ^= hashes >> _13
    hashes *= np.uint32(0xC2B2AE35)
    hashes ^= hashes >> _16
    return hashes


def _find_slots(hashes: NDArray[np.uint32], dimensions: int) -> NDArray[np.intp]:
    """Return a number below ``2 * dimensions`` for each hash: twice the bucket, plus one if the sign is plus."""
    wide = _mix(hashes).astype(np.uint64)
    wide *= np.uint64(2 * dimensions)
    wide >>= np.uint64(32)
    return wide.view(np.int64).astype(np.intp, copy=False)


def _normalize(counts: NDArray[np.int64]) -> Matrix:
    """Return ``sign(c) * sqrt(abs(c) / sum(abs(c)))`` per row, computed in float64 and rounded to float32 once."""
    sizes = np.abs(counts)
    lengths: NDArray[np.float64] = np.sqrt(sizes / sizes.sum(axis=1, keepdims=True))
    return np.copysign(lengths, counts).astype(np.float32)
