"""Frames encrypted at rest with AES-256-GCM, for a tier whose store others can read.

A vector is as sensitive as its text: short texts can be rebuilt from their vectors. The layout of an
encrypted frame is in ``docs/encryption.md``.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .vectors import SealedFrame, is_plain_frame, open_frame, seal_frame

KEY_BYTES = 32
NONCE_BYTES = 12
"""Random for each frame: NIST SP 800-38D allows 2^32 of them under one key."""

FILE = "file:"


class Encryption:
    """Encrypts and decrypts the frames of a tier.

    Args:
        keys: 32 bytes each, or their base64, or ``"file:PATH"`` of a file with the base64. The first one
            encrypts, all of them decrypt: to rotate, put the new key before the old one, and drop the old
            one when what it encrypted has expired or been read again.

    Raises:
        ConfigError: a key that is none, or the package ``cryptography`` is missing.
    """

    def __init__(self, keys: Sequence[str | bytes] | str | bytes) -> None:
        given = [keys] if isinstance(keys, str | bytes) else list(keys)
        if not given:
            raise ConfigError("encryption needs at least one key")
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as error:
            raise ConfigError(
                "encryption needs the package cryptography: pip install 'embedonce[encryption]'"
            ) from error
        self._invalid: type[Exception] = InvalidTag
        read = [_read_key(key) for key in given]
        self._ciphers: dict[int, Any] = {key_id(key): AESGCM(key) for key in read}
        self._first = key_id(read[0])

    def __repr__(self) -> str:
        return f"<Encryption with {len(self._ciphers)} keys>"

    @property
    def key_ids(self) -> Sequence[str]:
        """The keys' ids, 16 hex digits each, as frames carry them; the first one encrypts."""
        return [f"{key:016x}" for key in self._ciphers]

    def encrypt(self, frames: Mapping[str, bytes]) -> dict[str, bytes]:
        """Return each frame encrypted with the first key, bound to the key that it is stored under."""
        cipher = self._ciphers[self._first]
        sealed = {}
        for key, frame in frames.items():
            nonce = os.urandom(NONCE_BYTES)
            sealed[key] = seal_frame(
                frame,
                self._first,
                lambda body, header, key=key, nonce=nonce: (  # type: ignore[misc]
                    nonce + cipher.encrypt(nonce, body, key.encode() + header)
                ),
            )
        return sealed

    def decrypt(self, frames: Mapping[str, Any]) -> tuple[dict[str, bytes], list[str], list[str]]:
        """Return the plain frames, the keys of frames that are corrupt, and those of frames that are not encrypted.

        Corrupt is whatever was not encrypted with one of the keys for exactly this key and header:
        another tenant's, swapped, damaged, or with a date that somebody changed.
        """
        plain: dict[str, bytes] = {}
        corrupt: list[str] = []
        unencrypted: list[str] = []
        for key, frame in frames.items():
            sealed = open_frame(frame)
            cipher = None if sealed is None else self._ciphers.get(sealed.key_id)
            if sealed is None or cipher is None:
                (unencrypted if is_plain_frame(frame) else corrupt).append(key)
                continue
            body = self._body(cipher, key, sealed)
            if body is None:
                corrupt.append(key)
            else:
                plain[key] = sealed.with_body(body)
        return plain, corrupt, unencrypted

    def _body(self, cipher: Any, key: str, sealed: SealedFrame) -> bytes | None:
        nonce, ciphertext = sealed.body[:NONCE_BYTES], sealed.body[NONCE_BYTES:]
        try:
            body: bytes = cipher.decrypt(nonce, ciphertext, key.encode() + sealed.header)
        except (self._invalid, ValueError):  # ValueError: too short for a nonce
            return None
        return body


def key_id(key: bytes) -> int:
    """Return the 8 bytes that name a key in a frame without telling it; never 0, which means not encrypted."""
    return int.from_bytes(hashlib.sha256(b"embedonce/key-id/1" + key).digest()[:8], "little") or 1


def _read_key(given: str | bytes) -> bytes:
    if isinstance(given, bytes):
        key = given
    else:
        text = given
        if given.startswith(FILE):
            try:
                text = Path(given.removeprefix(FILE)).expanduser().read_text()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"the file of an encryption key cannot be read ({type(error).__name__})") from None
        try:
            key = base64.b64decode(text.strip(), altchars=b"-_" if set("-_") & set(text) else None, validate=True)
        except (binascii.Error, ValueError):
            key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(
            f"an encryption key is {KEY_BYTES} random bytes as base64 (make one: openssl rand -base64 32), "
            'or "file:" and the path of a file with it'
        )
    return key
