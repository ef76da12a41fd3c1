"""Encryption of stored frames with AES-256-GCM, for a tier whose store other people can read.

A vector is as sensitive as its text, because short texts can be reconstructed from their vectors.
``docs/encryption.md`` has the layout of an encrypted frame.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ._messages import format_count
from .errors import ConfigError
from .vectors import SealedFrame, is_plain_frame, open_frame, seal_frame

KEY_BYTES = 32
NONCE_BYTES = 12
"""Length of the nonce, which is random for each frame. NIST SP 800-38D allows 2^32 random nonces per key."""

FILE_PREFIX = "file:"


class Encryption:
    """Encrypts and decrypts the frames of a tier.

    Args:
        keys: One or more keys. A key is 32 bytes. Pass it as bytes, as a str in base64, or as ``"file:PATH"``. The file
            contains the key in base64. The first key encrypts, and all keys decrypt. To rotate keys, put the new key
            before the old key. Remove the old key when its frames have expired. If no key can decrypt a frame, its text
            is embedded again.

    Raises:
        ConfigError: a key is invalid or missing, or the package ``cryptography`` is not installed.
    """

    def __init__(self, keys: Sequence[str | bytes] | str | bytes) -> None:
        given = [keys] if isinstance(keys, str | bytes) else list(keys)
        if not given:
            raise ConfigError("encryption requires at least one key")
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as error:
            raise ConfigError(
                "encryption requires the package cryptography: pip install 'embedonce[encryption]'"
            ) from error
        self._invalid: type[Exception] = InvalidTag
        decoded = [_read_key(key) for key in given]
        self._ciphers: dict[int, Any] = {key_id(key): AESGCM(key) for key in decoded}
        self._first = key_id(decoded[0])

    def __repr__(self) -> str:
        return f"<Encryption with {format_count(len(self._ciphers), 'key')}>"

    @property
    def key_ids(self) -> Sequence[str]:
        """The id of each key, as 16 hex digits. Frames contain the id of their key. The first key encrypts."""
        return [f"{key:016x}" for key in self._ciphers]

    def encrypt(self, frames: Mapping[str, bytes]) -> dict[str, bytes]:
        """Encrypt frames with the first encryption key.

        Each frame is bound to its storage key: a copy of the frame under another storage key cannot be decrypted.
        """
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
        """Return the decrypted frames, the storage keys of corrupt frames, and the storage keys of unencrypted frames.

        An encrypted frame is corrupt unless one of our keys encrypted it for exactly this storage key and header. For
        example, a frame is corrupt if it was damaged, if it was stored under a different storage key, if its date was
        changed, or if another tenant encrypted it.
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
            body = self._decrypt_body(cipher, key, sealed)
            if body is None:
                corrupt.append(key)
            else:
                plain[key] = sealed.with_body(body)
        return plain, corrupt, unencrypted

    def _decrypt_body(self, cipher: Any, key: str, sealed: SealedFrame) -> bytes | None:
        nonce, ciphertext = sealed.body[:NONCE_BYTES], sealed.body[NONCE_BYTES:]
        try:
            body: bytes = cipher.decrypt(nonce, ciphertext, key.encode() + sealed.header)
        except (self._invalid, ValueError):  # ValueError: the body is shorter than a nonce
            return None
        return body


def key_id(key: bytes) -> int:
    """Return the 8-byte id of a key. The id does not reveal the key, and is never 0, because 0 marks a plain frame."""
    return int.from_bytes(hashlib.sha256(b"embedonce/key-id/1" + key).digest()[:8], "little") or 1


def _read_key(key_or_text: str | bytes) -> bytes:
    if isinstance(key_or_text, bytes):
        key = key_or_text
    else:
        text = key_or_text
        if text.startswith(FILE_PREFIX):
            try:
                text = Path(text.removeprefix(FILE_PREFIX)).expanduser().read_text()
            except (OSError, UnicodeDecodeError, RuntimeError) as error:  # RuntimeError: no home folder
                raise ConfigError(f"cannot read the file of an encryption key ({type(error).__name__})") from None
        try:
            key = base64.b64decode(text.strip(), altchars=b"-_" if set("-_") & set(text) else None, validate=True)
        except (binascii.Error, ValueError):
            key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(
            f"an encryption key must be {KEY_BYTES} random bytes as base64 (create one: openssl rand -base64 32), "
            'or "file:PATH" for a file that contains the base64'
        )
    return key
