"""Entries and bundles for tests."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import numpy as np

from embedonce.keys import CARD_PREFIX
from embedonce.store_writers import WrittenStore
from embedonce.vectors import Dtype, Entry, freeze, freeze_rows, round_vectors

SCOPE = "0123456789abcdef"
OTHER_SCOPE = "fedcba9876543210"
CARD = Entry(freeze(()), 0.0, metadata={"provider": "test", "model": "a-model", "dimensions": 8, "namespace": None})


def key_of(number: int, scope: str = SCOPE) -> str:
    return f"eo1.{scope}.{sha256(b'%d' % number).hexdigest()}"


def make_entries(
    count: int, *, dtype: Dtype = "float32", dimensions: int = 8, scope: str = SCOPE, seed: int = 1
) -> dict[str, Entry]:
    """Return entries in the order of their keys, with and without an expiry date, metadata and a cost."""
    rows = np.random.default_rng(seed).standard_normal((count, dimensions)).astype(np.float32)
    vectors = freeze_rows(round_vectors(rows, dtype))
    entries = {
        key_of(number, scope): Entry(
            vector,
            1_700_000_000.0 + number,
            4_000_000_000.0 + number if number % 3 else None,
            {"source": f"{number}.md", "chunk": number} if number % 4 == 0 else None,
            dtype,
            number if number % 2 else None,
            number / 8 if number % 5 else None,
        )
        for number, vector in enumerate(vectors)
    }
    return dict(sorted(entries.items()))


def write_bundle(folder: Path, items: Mapping[str, Entry | bytes], *, replace: bool = False) -> WrittenStore:
    """Write a bundle of these items, in the order of their keys."""
    from embedonce_backends.bundle import BundleWriter

    with BundleWriter(folder, replace=replace) as writer:
        writer.add(dict(sorted(items.items())))
        return writer.commit()


def is_same(one: object, other: object) -> bool:
    """Return whether two entries are equal in every bit, or two values are the same bytes."""
    if not isinstance(one, Entry) or not isinstance(other, Entry):
        return one == other
    return one[1:] == other[1:] and one.vector.tobytes() == other.vector.tobytes()


def are_same(found: Mapping[str, object], expected: Mapping[str, object]) -> bool:
    """Return whether two mappings have the same keys and values."""
    return set(found) == set(expected) and all(is_same(found[key], expected[key]) for key in expected)


CARD_KEY = CARD_PREFIX + SCOPE
