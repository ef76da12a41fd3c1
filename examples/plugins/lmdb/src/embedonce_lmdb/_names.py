"""Names: the keys of embedonce in binary, which take half the space, and other keys as text.

A key ``eo1.<16 hex digits>.<64 hex digits>`` becomes 41 bytes: the byte 1, and the 40 bytes of its digits. Any other
key becomes the byte 2 and its UTF-8. So different keys have different names. Among the names that begin with the same
byte, the order is that of the keys.
"""

from __future__ import annotations

from collections.abc import Collection

BINARY = b"\1"
TEXT = b"\2"
NAME_BYTES = 41
"""Size of the name of a key of embedonce."""
LOWEST = f"eo1.{'0' * 16}.{'0' * 64}"
HIGHEST = LOWEST.replace("0", "f")
LENGTH = len(LOWEST)
POINTS = ((0, "e"), (1, "o"), (2, "1"), (3, "."), (20, "."))
"""The characters of such a key that are not digits, and their places."""


def encode_key(key: str) -> bytes:
    """Return the name of a key."""
    if len(key) == LENGTH and key[:4] == "eo1." and key[20] == "." and (name := _read_digits(key[4:20] + key[21:])):
        return BINARY + name
    return TEXT + key.encode()


def encode_keys(keys: Collection[str]) -> list[bytes]:
    """Return the names of several keys. If all of them are keys of embedonce, they are converted with a few calls."""
    joined = "".join(keys)
    if {*map(len, keys)} == {LENGTH} and all([joined[place::LENGTH] == one * len(keys) for place, one in POINTS]):
        names = _read_digits(joined.replace("eo1.", BINARY.hex()).replace(".", ""))
        if names is not None and len(names) == NAME_BYTES * len(keys):
            return [names[start : start + NAME_BYTES] for start in range(0, len(names), NAME_BYTES)]
    return [encode_key(key) for key in keys]


def _read_digits(digits: str) -> bytes | None:
    """Return the bytes of hexadecimal digits, or None if there are other characters."""
    try:
        found = bytes.fromhex(digits)
    except ValueError:
        return None
    return found if found.hex() == digits else None  # fromhex also takes capital letters and spaces


def decode_name(name: bytes) -> str:
    """Return the key of a name."""
    if name[:1] == TEXT:
        return name[1:].decode()
    digits = name[1:].hex()
    return f"eo1.{digits[:16]}.{digits[16:]}"


def find_ranges(prefix: str) -> list[tuple[bytes, bytes]]:
    """Return the first and the last name of each range in which the keys start with ``prefix``."""
    first, last = (encode_key(prefix + whole[len(prefix) :]) for whole in (LOWEST, HIGHEST))
    text = TEXT + prefix.encode(), TEXT + prefix.encode() + b"\xff"  # UTF-8 does not contain the byte 255
    return [(first, last), text] if first[:1] == last[:1] == BINARY else [text]
