"""The columns of a part, and the checksum of a row. ``docs/bundles.md`` has both, byte by byte."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, cast

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from embedonce.keys import KEY_PREFIX
from embedonce.vectors import Dtype, Matrix

SCOPE_DIGITS: Final = 16
DIGEST_DIGITS: Final = 64
SCOPE_AT: Final = len(KEY_PREFIX)
DIGEST_AT: Final = SCOPE_AT + SCOPE_DIGITS + 1
"""Position in a key of the first digit of its digest."""
KEY_BYTES: Final = DIGEST_AT + DIGEST_DIGITS
"""Length of the key of an entry, ``eo1.<16 hex digits>.<64 hex digits>``."""
PREFIX_DIGITS: Final = 16
"""Number of digits of the digest that the column ``prefix`` has as a number."""
ENTRY_KEY: Final = re.compile(rf"{re.escape(KEY_PREFIX)}([0-9a-f]{{{SCOPE_DIGITS}}})\.[0-9a-f]{{{DIGEST_DIGITS}}}")

UNKNOWN_TOKENS: Final = -1
UNKNOWN_SECONDS: Final = np.uint64(2**64 - 1)
"""The bits under a null in the column ``seconds``; as a float64, they are a NaN."""

Rows: TypeAlias = NDArray[Any]
"""The fixed fields of rows as a structured array, in the order in which the checksum covers them."""

_PAYLOADS: Final[dict[Dtype, tuple[Any, str, int]]] = {
    "float32": (pa.float32(), "<f4", 4),
    "float16": (pa.float16(), "<f2", 2),
    "int8": (pa.int8(), "<i1", 1),
}
"""For each dtype, the Arrow type and the numpy type of a value, and its size in bytes."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The form of the entries in a part: a dtype and a number of dimensions."""

    dtype: Dtype
    dimensions: int

    @property
    def vector_bytes(self) -> int:
        """Size of a vector in bytes, without its scale."""
        return self.dimensions * _PAYLOADS[self.dtype][2]

    @property
    def has_scale(self) -> bool:
        return self.dtype == "int8"

    @property
    def arrow_vector(self) -> Any:
        """The Arrow type of the column ``vector``."""
        return pa.list_(pa.field("item", _PAYLOADS[self.dtype][0], nullable=False), self.dimensions)

    def make_schema(self) -> Any:
        """Return the Arrow schema of a part with plain entries."""
        return pa.schema(
            [
                pa.field("key", pa.string(), nullable=False),
                pa.field("prefix", pa.uint64(), nullable=False),
                pa.field("created", pa.float64(), nullable=False),
                pa.field("expires", pa.float64(), nullable=False),
                pa.field("tokens", pa.int64()),
                pa.field("seconds", pa.float64()),
                *([pa.field("scale", pa.float32(), nullable=False)] if self.has_scale else []),
                pa.field("vector", self.arrow_vector, nullable=False),
                pa.field("metadata", pa.string()),
                pa.field("checksum", pa.uint64(), nullable=False),
            ]
        )

    def make_rows(self, count: int) -> Rows:
        """Return a structured array for ``count`` rows. Its fields have no gaps, and are not initialised."""
        scale = [("scale", "<u4")] if self.has_scale else []
        # The fields are integers or plain bytes, because copying a float may change the bits of a NaN.
        fields = [
            ("key", f"V{KEY_BYTES}"),
            ("created", "<u8"),
            ("expires", "<u8"),
            ("tokens", "<u8"),
            ("seconds", "<u8"),
            *scale,
            ("vector", f"V{self.vector_bytes}"),
        ]
        return np.empty(count, fields)

    def read_vectors(self, rows: Rows) -> Matrix:
        """Return the vectors of some rows, float32, shape (n, d)."""
        values = np.ascontiguousarray(rows["vector"]).view(_PAYLOADS[self.dtype][1])
        values = values.reshape(len(rows), self.dimensions)
        if self.dtype == "float32":
            return cast("Matrix", values.astype(np.float32, copy=False))
        with np.errstate(all="ignore"):  # the engine refuses values that are not finite
            vectors = values.astype(np.float32)
            if self.has_scale:
                vectors *= np.ascontiguousarray(rows["scale"]).view("<f4")[:, None]
        return cast("Matrix", vectors)


ENCRYPTED_SCHEMA: Final = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("prefix", pa.uint64(), nullable=False),
        pa.field("frame", pa.binary(), nullable=False),
    ]
)
"""The Arrow schema of a part with encrypted frames."""


def compute_checksums(rows: Rows, metadata: Sequence[bytes] | None) -> NDArray[np.uint64]:
    """Return the XXH3-64 of each row: its fixed fields, followed by its metadata as JSON if it has metadata.

    ``metadata`` has ``b""`` for a row without metadata. It is None if no row has any.
    """
    # A row that is one value of a void type becomes a bytes object in C, which is faster than slicing.
    items = rows.view(f"V{rows.itemsize}").tolist()
    if metadata is not None:
        items = [item + more for item, more in zip(items, metadata, strict=True)]
    return np.fromiter(map(xxh3_64_intdigest, items), np.uint64, len(items))


_NIBBLES: Final = np.full(256, 0x10, np.uint8)
"""The value of each hex digit by its ASCII code; 0x10 for every other character. Capital letters do not occur in
keys."""
for _value, _digit in enumerate(b"0123456789abcdef"):
    _NIBBLES[_digit] = _value


def read_prefixes(keys: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return the first 8 bytes of each key's digest as numbers. ``keys`` are ASCII codes, of shape (n, KEY_BYTES).

    The result for a key with other characters than hex digits there is arbitrary.
    """
    nibbles = _NIBBLES[keys[:, DIGEST_AT : DIGEST_AT + PREFIX_DIGITS]]
    octets = (nibbles[:, 0::2] << 4) | nibbles[:, 1::2]
    return np.ascontiguousarray(octets).view(">u8")[:, 0].astype(np.uint64)
