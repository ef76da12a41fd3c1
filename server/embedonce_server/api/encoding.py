"""Vectors as JSON: a list of numbers, or base64 of float32 in little-endian order.

Encoding is what an answer with many hits costs most. So the encoded form of the vectors that were sent last is kept.
It belongs to one array object: a memory tier returns the same read-only array for the same entry, and a vector that was
erased or replaced is another object, whose encoded form is made anew.
"""

from __future__ import annotations

import binascii
from typing import Final, Literal
from weakref import ref

import numpy as np
import orjson

from embedonce.vectors import Vector

from .recent_items import RecentItems

Encoding = Literal["float", "base64"]

MEMO_BYTES: Final = 32 * 1024 * 1024
"""Maximum size of each of the two generations of kept forms, in bytes."""

_OVERHEAD: Final = 200
"""Bytes that an item of the memo takes beside its encoded form."""


def encode_vector(vector: Vector, encoding: Encoding) -> bytes:
    """Return a vector as a JSON value: ``[0.1,0.2]`` or ``"zczMPc3MTD4="``.

    A number has as few digits as identify the float32.
    """
    if encoding == "base64":
        return b'"%b"' % binascii.b2a_base64(np.ascontiguousarray(vector, "<f4").data, newline=False)
    return orjson.dumps(np.ascontiguousarray(vector, np.float32), option=orjson.OPT_SERIALIZE_NUMPY)


def format_end(json_name: bytes, tokens: int) -> bytes:
    """Return what follows the last vector of an answer. ``json_name`` is the name of the model as JSON."""
    return b'}],"model":%b,"usage":{"prompt_tokens":%d,"total_tokens":%d}}' % (json_name, tokens, tokens)


class EncodedVectors(RecentItems[int, "tuple[ref[Vector], bytes]"]):
    """Keeps the encoded form of recent vectors, within a number of bytes.

    An array is known by its identity. A weak reference to it shows whether the array with this identity is still the
    same one. A strong reference would keep the whole batch in memory of which the array may be one row.
    """

    def __init__(self, encoding: Encoding, max_bytes: int = MEMO_BYTES) -> None:
        super().__init__(max_bytes, _measure)
        self._encoding: Encoding = encoding

    def encode(self, vector: Vector) -> bytes:
        """Return the vector as a JSON value."""
        kept = self._newer.get(id(vector)) or self.get(id(vector))
        if kept is not None and kept[0]() is vector:
            return kept[1]
        encoded = encode_vector(vector, self._encoding)
        if not vector.flags.writeable:  # an array that can change is encoded each time
            self.keep(id(vector), (ref(vector), encoded))
        return encoded


def _measure(_: int, kept: tuple[ref[Vector], bytes]) -> int:
    return len(kept[1]) + _OVERHEAD
