"""Make frames whose cost, metadata and payload are encrypted, and split such frames into their parts."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from xxhash import xxh3_64_intdigest

from .frames import HEADER, MAGIC, START, to_bytes

_ENCRYPTED = 2
_START_BYTES, _CHECKSUM_END = 8, 16
_KEY_ID = struct.Struct("<Q")
_KEY_ID_AT = HEADER - _KEY_ID.size


class SealedFrame(NamedTuple):
    """The parts of an encrypted frame."""

    key_id: int
    header: bytes
    """The header without its checksum, 56 bytes. Decrypting the body requires this header and the storage key."""
    body: bytes

    def with_body(self, body: bytes) -> bytes:
        """Return the plain frame, as it was before encryption; ``body`` is the decrypted cost, metadata and payload."""
        word = int.from_bytes(self.header[:_START_BYTES], "little") & ~(_ENCRYPTED << 48)
        rest = self.header[_START_BYTES : -_KEY_ID.size] + _KEY_ID.pack(0) + body
        return START.pack(word, xxh3_64_intdigest(rest, word)) + rest


def seal_frame(frame: bytes, key_id: int, encrypt: Callable[[bytes, bytes], bytes]) -> bytes:
    """Return a frame whose cost, metadata and payload are encrypted with ``encrypt(body, header)``."""
    word = int.from_bytes(frame[:_START_BYTES], "little") | _ENCRYPTED << 48
    head = frame[_CHECKSUM_END:_KEY_ID_AT] + _KEY_ID.pack(key_id)
    rest = head + encrypt(frame[HEADER:], word.to_bytes(_START_BYTES, "little") + head)
    return START.pack(word, xxh3_64_intdigest(rest, word)) + rest


def open_frame(frame: Any) -> SealedFrame | None:
    """Return the parts of an encrypted frame, or None if the value is not an encrypted frame."""
    frame = frame if type(frame) is bytes else to_bytes(frame)
    if frame is None or len(frame) < HEADER or not int.from_bytes(frame[:_START_BYTES], "little") >> 48 & _ENCRYPTED:
        return None
    (key_id,) = _KEY_ID.unpack_from(frame, _KEY_ID_AT)
    return SealedFrame(key_id, frame[:_START_BYTES] + frame[_CHECKSUM_END:HEADER], frame[HEADER:])


def is_plain_frame(frame: Any) -> bool:
    """Return whether the value is a complete frame that is not encrypted."""
    frame = frame if type(frame) is bytes else to_bytes(frame)
    if frame is None or len(frame) < HEADER:
        return False
    word, checksum = START.unpack_from(frame)
    is_whole = word & 0xFFFFFFFF == MAGIC and xxh3_64_intdigest(frame[START.size :], word) == checksum
    return is_whole and not word >> 48 & _ENCRYPTED
