"""How keys are stored: the keys of entries and leases as 40 bytes, and all other keys as text.

The key of an entry, ``eo1.<16 hex digits>.<64 hex digits>``, is stored as the bytes that its digits stand for: 8 bytes
of the scope and 32 bytes of the digest. So the index of the table has half the size. The key of a lease has the same
digits, and is stored in the same way in a table of its own. SQLite never takes a BLOB for a TEXT, so no two keys have
the same stored form in the same table.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Final, NamedTuple, TypeAlias

from embedonce.keys import KEY_PREFIX, LEASE_PREFIX

StoredKey: TypeAlias = "bytes | str"

STORED_BYTES: Final = 40
"""Size in bytes of the stored form of the key of an entry or a lease."""

_SCOPE_DIGITS: Final = 16
_DIGEST_DIGITS: Final = 64


class Form(IntEnum):
    """A form in which keys are stored."""

    ENTRY = 0
    LEASE = 1
    TEXT = 2


_PREFIXES: Final = (KEY_PREFIX, LEASE_PREFIX)
"""First characters of the keys of each form, in the order of :class:`Form`."""
_FORMS: Final = {
    len(prefix) + _SCOPE_DIGITS + 1 + _DIGEST_DIGITS: (Form(i), len(prefix)) for i, prefix in enumerate(_PREFIXES)
}
"""By the length of a key, the form that the key may have, and where its digits start."""
_LEASE_LENGTH: Final = next(length for length, (form, _) in _FORMS.items() if form is Form.LEASE)


class KeyGroup(NamedTuple):
    """Keys of one form."""

    form: Form
    keys: Sequence[str]
    joined: bytes = b""
    """The stored forms one after the other, unless they are text."""

    @property
    def parameters(self) -> tuple[object, ...]:
        """The first parameters of a statement for a batch of these keys."""
        return (json.dumps(self.keys),) if self.form is Form.TEXT else (len(self.keys) - 1, self.joined)

    def list_stored(self) -> Iterable[tuple[str, StoredKey]]:
        """Return each key and its stored form."""
        if self.form is Form.TEXT:
            return zip(self.keys, self.keys, strict=True)
        ends = range(STORED_BYTES, len(self.joined) + 1, STORED_BYTES)
        return zip(self.keys, [self.joined[end - STORED_BYTES : end] for end in ends], strict=True)

    def as_texts(self) -> KeyGroup:
        """Return the same keys as an earlier version stored them, as text."""
        return KeyGroup(Form.TEXT, self.keys)


def encode_key(key: str) -> tuple[Form, StoredKey]:
    """Return the form in which a key is stored, and its stored form."""
    found = _FORMS.get(len(key))
    if found is None:
        return Form.TEXT, key
    form, start = found
    middle = start + _SCOPE_DIGITS
    try:
        stored = bytes.fromhex(key[start:middle] + key[middle + 1 :])
    except ValueError:
        return Form.TEXT, key
    # The bytes stand for this key only if they give it back. For example, bytes.fromhex also accepts capital letters.
    return (form, stored) if _write_key(form, stored) == key else (Form.TEXT, key)


def decode_key(form: Form, stored: bytes) -> str:
    """Return the key from its stored form. A text is given as UTF-8; bytes that are not valid UTF-8 are replaced.

    Raises:
        ValueError: these bytes are not the stored form of a key.
    """
    if form is Form.TEXT:
        return stored.decode("utf-8", "replace")
    if len(stored) != STORED_BYTES:
        raise ValueError(f"the stored form of a key has {STORED_BYTES} bytes, got {len(stored)}")
    return _write_key(form, stored)


def _write_key(form: Form, stored: bytes) -> str:
    digits = stored.hex()
    return f"{_PREFIXES[form]}{digits[:_SCOPE_DIGITS]}.{digits[_SCOPE_DIGITS:]}"


def pick_leases(keys: Sequence[str]) -> list[str]:
    """Return the keys of leases."""
    if _LEASE_LENGTH not in set(map(len, keys)):
        return []
    return [key for key in keys if encode_key(key)[0] is Form.LEASE]


def group_keys(keys: Sequence[str]) -> list[KeyGroup]:
    """Group keys by the form in which they are stored."""
    group = _group_scope(keys)
    if group is not None:
        return [group]
    stored: dict[Form, list[bytes]] = {form: [] for form in Form}
    named: dict[Form, list[str]] = {form: [] for form in Form}
    for key in keys:
        form, encoded = encode_key(key)
        named[form].append(key)
        if isinstance(encoded, bytes):
            stored[form].append(encoded)
    return [KeyGroup(form, group, b"".join(stored[form])) for form, group in named.items() if group]


def _group_scope(keys: Sequence[str]) -> KeyGroup | None:
    """Return a group if all keys have the form and the scope of the first one; else None.

    Nearly every batch is such a group, and this takes a third of the time of encoding each key.
    """
    form, stored = encode_key(keys[0])
    if isinstance(stored, str):
        return None
    end = len(keys[0]) - _DIGEST_DIGITS
    beginning = keys[0][:end]
    digests = [key[end:] for key in keys]
    if len(set(map(len, keys))) > 1 or beginning + beginning.join(digests) != "".join(keys):
        return None
    scope = stored[:8].hex()
    digits = scope + scope.join(digests)
    try:
        joined = bytes.fromhex(digits)
    except ValueError:
        return None
    return KeyGroup(form, keys, joined) if joined.hex() == digits else None


def find_range(form: Form, prefix: str) -> tuple[StoredKey, StoredKey] | None:
    """Return the range of the stored keys of one form that start with ``prefix``; its end is not part of it.

    None if no key of this form starts with ``prefix``.
    """
    if form is Form.TEXT:
        # SQLite sorts every BLOB after every TEXT.
        return prefix.encode(), prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else b""
    ends = []
    for digit in "0f":
        whole = f"{_PREFIXES[form]}{digit * _SCOPE_DIGITS}.{digit * _DIGEST_DIGITS}"
        found, stored = encode_key(prefix + whole[len(prefix) :])
        if found is not form:
            return None
        ends.append(stored)
    return ends[0], ends[1] + b"\0"  # type: ignore[operator]
