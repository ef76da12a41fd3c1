"""Writes the golden frames that test_frames.py reads.

This script follows only docs/frames.md. It imports nothing from embedonce, so that it does not repeat a mistake of
embedonce's own code. The golden files may get more cases, but existing cases must never change. These commands write
the file for version 1 of the format, and the file for version 2:
python tests/core/golden/make_frames.py 1 > frames-v1.json
python tests/core/golden/make_frames.py 2 > frames-v2.json
"""

from __future__ import annotations

import json
import struct
import sys
from fractions import Fraction
from typing import Any

import xxhash

MAGIC = b"EO1F"
UNKNOWN = bytes([255] * 8)
CODES = {"float32": 1, "float16": 2, "int8": 3}


def write_frame(
    key: str,
    vector: list[float],
    *,
    created: float,
    expires: float | None = None,
    metadata: Any = None,
    dtype: str = "float32",
    tokens: int | None = None,
    seconds: float | None = None,
    version: int | None = None,
    key_id: int = 0,
    flags: int | None = None,
    raw_cost: bytes | None = None,
    raw_metadata: bytes | None = None,
    raw_payload: bytes | None = None,
) -> bytes:
    """Return a frame with a valid checksum, even for values that embedonce would never write."""
    plain = b"" if metadata is None else json.dumps(metadata, ensure_ascii=False, separators=(",", ":")).encode()
    if raw_metadata is not None:
        plain = raw_metadata
    payload = write_payload(vector, dtype) if raw_payload is None else raw_payload
    flags = bool(plain) if flags is None else flags
    cost = write_cost(tokens, seconds) if raw_cost is None else raw_cost
    if version is None:
        version = 2 if cost else 1
    start = MAGIC + bytes([version, CODES.get(dtype, 99)]) + flags.to_bytes(2, "little")
    body = len(vector).to_bytes(4, "little") + len(plain).to_bytes(4, "little")
    body += struct.pack("<d", created) + struct.pack("<d", float("inf") if expires is None else expires)
    body += xxhash.xxh3_128_digest(key.encode("ascii")) + key_id.to_bytes(8, "little")
    body += cost + plain + payload
    return seal(start, body)


def seal(start: bytes, body: bytes) -> bytes:
    seed = int.from_bytes(start, "little")
    return start + xxhash.xxh3_64_intdigest(body, seed=seed).to_bytes(8, "little") + body


def write_cost(tokens: int | None, seconds: float | None) -> bytes:
    if tokens is None and seconds is None:
        return b""
    count = UNKNOWN if tokens is None else tokens.to_bytes(8, "little")
    return count + (UNKNOWN if seconds is None else struct.pack("<d", seconds))


def write_payload(vector: list[float], dtype: str) -> bytes:
    if dtype == "int8":
        scale, steps = int8_steps(vector)
        return struct.pack("<f", scale) + struct.pack(f"<{len(steps)}b", *steps)
    return struct.pack(f"<{len(vector)}{'e' if dtype == 'float16' else 'f'}", *vector)


def int8_steps(vector: list[float]) -> tuple[float, list[int]]:
    """Return the scale and the steps for float32 values, computed by exact arithmetic."""
    smallest = Fraction(1, 2**126)
    wanted = max((abs(Fraction(value)) for value in vector), default=Fraction(0)) / 127
    unit = Fraction(1, 2**141)  # the last of the 16 significant bits of the smallest scale
    while wanted > unit * 2**16:
        unit *= 2
    scale = max(-(-wanted // unit) * unit, smallest)
    # docs/frames.md says that the quotient is a float64, and that a half is rounded to the nearest even integer.
    # round() rounds a Fraction in this way.
    return float(scale), [round(Fraction(float(Fraction(value) / scale))) for value in vector]


def key_of(number: int) -> str:
    return f"eo1.{0x0123456789ABCDEF:016x}.{number:064x}"


CASES: list[dict[str, Any]] = [
    {"name": "plain", "vector": [0.5, -1.0, 0.25]},
    {"name": "signed zero and subnormals", "vector": [-0.0, 1e-45, -1e-40, 3.4028234663852886e38]},
    {"name": "expires", "vector": [1.0, 2.0], "expires": 1800000000.25},
    {
        "name": "metadata",
        "vector": [0.5, -1.0, 0.25],
        "metadata": {"source": "notes/ä.md", "of": [1, None]},
    },
    {"name": "odd length of metadata", "vector": [1.5], "metadata": {"a": 1}, "expires": 1800000000.0},
    {"name": "empty metadata", "vector": [1.5], "metadata": {}},
    {"name": "half", "vector": [0.5, -65504.0, 5.960464477539063e-08], "dtype": "float16"},
    {"name": "half with metadata", "vector": [0.5, 0.25, -2.0], "dtype": "float16", "metadata": {"x": "y"}},
    {"name": "int8", "vector": [0.1, -0.7, 0.333, 0.0, 1e-30], "dtype": "int8"},
    {"name": "int8 with metadata", "vector": [3e38, -1e37, 12.0], "dtype": "int8", "metadata": {"x": [True, 1.5]}},
    {"name": "int8 at the smallest scale", "vector": [1.1754943508222875e-37, -2e-38], "dtype": "int8"},
    {"name": "card", "vector": [], "metadata": {"provider": "ngram", "model": "ngram", "version": "v1"}},
]

CASES_WITH_COST: list[dict[str, Any]] = [
    {"name": "tokens and seconds", "vector": [0.5, -1.0, 0.25], "tokens": 7, "seconds": 0.03125},
    {"name": "tokens alone", "vector": [0.5, -1.0, 0.25], "tokens": 1},
    {"name": "seconds alone", "vector": [0.5, -1.0, 0.25], "seconds": 0.1},
    {"name": "a cost of zero", "vector": [1.0], "tokens": 0, "seconds": 0.0},
    {"name": "the largest cost", "vector": [1.0], "tokens": 2**40, "seconds": 1e9},
    {"name": "expires", "vector": [1.0, 2.0], "expires": 1800000000.25, "tokens": 300},
    {"name": "metadata", "vector": [1.5], "metadata": {"source": "notes/ä.md"}, "tokens": 70000, "seconds": 2.5},
    {"name": "half with metadata", "vector": [0.5, -2.0], "dtype": "float16", "metadata": {"x": "y"}, "tokens": 2},
    {"name": "int8", "vector": [0.1, -0.7, 0.333, 0.0, 1e-30], "dtype": "int8", "tokens": 5, "seconds": 5e-324},
]


def main(version: int) -> None:
    golden = []
    for number, case in enumerate(CASES if version == 1 else CASES_WITH_COST):
        unknown = {} if version == 1 else {"tokens": None, "seconds": None}
        parts = {"dtype": "float32", "expires": None, "metadata": None, **unknown, **case}
        name, vector = (
            parts.pop("name"),
            struct.unpack(f"<{len(case['vector'])}f", struct.pack(f"<{len(case['vector'])}f", *parts.pop("vector"))),
        )
        frame = write_frame(key_of(number), list(vector), created=1700000000.5, **parts)
        reads = list(vector)
        if parts["dtype"] == "int8":
            scale, steps = int8_steps(reads)
            reads = [step * scale for step in steps]
        stored = struct.pack(f"<{len(reads)}f", *reads).hex()
        golden.append(
            {
                "name": name,
                "key": key_of(number),
                "created": 1700000000.5,
                **parts,
                "float32": stored,
                "frame": frame.hex(),
            }
        )
    json.dump(golden, sys.stdout, indent=1, ensure_ascii=False)
    print()


if __name__ == "__main__":
    main(int(sys.argv[1]))
