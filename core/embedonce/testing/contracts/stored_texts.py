"""Texts and vectors for the tests of importers."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import md5, sha1, sha256
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

TEXTS = (
    "A cache keeps what was computed once.",
    "Der schnelle braune Fuchs springt über den faulen Hund.",
    "富士山は日本で一番高い山です。",
    "Быстрая коричневая лиса прыгает через ленивую собаку.",
    "🧪 emoji, a family 👨‍👩‍👧 and a flag 🇨🇭",
    "two\nlines\tand a tab",
    "SELECT vector FROM entries WHERE key = ANY(%s);",
    '{"text": "a record of JSON", "vector": [0.5]}',
)

LONG = "A long text is cut nowhere. " * 4000

ALIKE: tuple[tuple[str, ...], ...] = (
    ("", " ", "\n", "\t", "\u00a0", "\u200b", "\ufeff", "  "),
    ("Text", "text", "TEXT", " text", "text ", "text\n", "te xt", "te  xt", "\ufefftext", "text\u200b"),
    ("\u00e9", "e\u0301", "e", "E\u0301"),
    ("\u00c5", "A\u030a", "\u212b"),
    ("\ufb01", "fi", "\u00df", "ss", "\u0130", "i\u0307", "\u0131", "i"),
    ("👨‍👩‍👧", "👨👩👧", "👨", "👍", "👍🏽", "🇨🇭", "🇨"),
    ("one\ntwo", "one\r\ntwo", "one\rtwo", "one\\ntwo", "one\u2028two", "one two"),
    ("a\0b", "a\0", "a", "ab", "\0a", "a\\0b", "a\\u0000b"),
    ("a:b", "b:a", "a|b", "a||b", "a/b", "a\\b", "a,b", "a;b", "a=b", "a\x1fb", "a_b", "a-b", "a.b"),
    ("*", "?", "[a]", "%", "_", "a%", "a_", "a*", "^a$", "a.*"),
    ("'", '"', "''", '""', "`", "\\", "\\'", "' OR 1 = 1 --", "text'", '"text"', "(text)"),
    ("..", ".", "../text", "./text", "/", "~", "text.json", "$HOME", "${HOME}", "%s", "{text}", "{model}|{text}"),
    ("1", "01", "1.0", "1e0", "+1", "0x1", "true", "True", "null", "None", "NaN", "nan", "inf", "NA", "-"),
    ("2024-01-01", "2024-01-01T00:00:00", "1704067200", "[1.0, 2.0]", "{}", "[]", "# text", "--text"),
    (LONG, LONG + "x", LONG + "y", "x" + LONG, LONG[:-1], LONG[: len(LONG) // 2]),
)
"""Texts that stores or keys may confuse. Each group has texts that look alike."""

DIGESTS = tuple(
    form
    for digest in (md5(b"text").hexdigest(), sha1(b"text").hexdigest(), sha256(b"text").hexdigest())
    for form in (digest, digest.upper(), digest[:16])
)
"""Digests of a text that is stored. An importer must not take such a text for a key."""

ALPHABET = "aA b:\n/|é\u0301"
"""Characters of the texts that hypothesis makes. There are only a few, so that many of the texts are almost equal."""


def make_short_texts() -> list[str]:
    """Return every text of at most two characters of :data:`ALPHABET`."""
    return ["".join(characters) for length in range(3) for characters in product(ALPHABET, repeat=length)]


def make_numbered_texts(count: int) -> list[str]:
    """Return ``count`` different texts."""
    return [f"Text {number} of several." for number in range(count)]


def make_vectors(texts: Sequence[str], dimensions: int, *, is_unit: bool) -> NDArray[np.float32]:
    """Return a float32 matrix of shape (n, d). Each text has a vector of its own, the same in every process."""
    seeds = np.array([_make_seed(text) for text in texts], np.uint64).reshape(-1, 1)
    # This is splitmix64. A generator of numpy per text would take longer than everything else in a test.
    state = seeds + np.arange(1, dimensions + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    state ^= state >> np.uint64(31)
    vectors = (state >> np.uint64(11)).astype(np.float64) / 2.0**52 - 1.0
    if is_unit:
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32)


def _make_seed(text: str) -> int:
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big")


def make_special_vectors(dimensions: int) -> NDArray[Any]:
    """Return a float32 matrix with values that a store may round, or read as another type."""
    values = (1.0, -1.0, 0.0, 0.1, 1 / 3, 1e-30, -1e-10, 12345.678, 16777217.0, 1e10, 1e-45, 65520.0)
    rows = [values[start:] + values[:start] for start in range(len(values))]
    repeated = [[row[column % len(row)] for column in range(dimensions)] for row in rows]
    # Every row must differ from zero in a vector of one dimension too.
    return np.array([row if any(row) else [1.0] * dimensions for row in repeated], np.float32)
