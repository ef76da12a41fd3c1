"""Frames of version 2 have the cost of their entry; an invalid cost is corrupt alone."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
from xxhash import xxh3_64_intdigest

from embedonce.encryption import Encryption
from embedonce.vectors import (
    MAX_SECONDS,
    MAX_TOKENS,
    Dtype,
    Entry,
    decode_frames,
    encode_frames,
    freeze,
    round_vectors,
    sum_costs,
)

NOW = 1_750_000_000.0
MADE = NOW - 100
METADATA = {"source": "notes/ä.md"}
COST_AT, COST_END = 64, 80
"""Where the cost of a frame of version 2 starts and ends."""

NO_COST: dict[str, Any] = {}
COSTS: list[dict[str, Any]] = [
    {"tokens": 0},
    {"seconds": 0.0},
    {"tokens": 0, "seconds": 0.0},
    {"tokens": 12, "seconds": 0.25},
    {"tokens": MAX_TOKENS, "seconds": MAX_SECONDS},
]
INVALID_COSTS = {
    "too many tokens": struct.pack("<Qd", MAX_TOKENS + 1, 0.5),
    "tokens with the highest bit": struct.pack("<Qd", 2**63, 0.5),
    "tokens that are nearly unknown": struct.pack("<Qd", 2**64 - 2, 0.5),
    "negative seconds": struct.pack("<Qd", 7, -0.001),
    "infinite seconds": struct.pack("<Qd", 7, math.inf),
    "too many seconds": struct.pack("<Qd", 7, 2 * MAX_SECONDS),
    "minus zero seconds": struct.pack("<Qd", 7, -0.0),
    "seconds that are another NaN": struct.pack("<QQ", 7, 0x7FF8000000000000),
    "seconds that are nearly unknown": struct.pack("<QQ", 7, 2**64 - 2),
    "negative seconds, unknown tokens": struct.pack("<Qd", 2**64 - 1, -1.0),
}


def key_of(number: int) -> str:
    return f"eo1.0123456789abcdef.{number:064x}"


def entry_of(seed: int, dimension: int = 8, dtype: Dtype = "float32", **more: Any) -> Entry:
    row = np.random.default_rng(seed).standard_normal((1, dimension)).astype(np.float32)
    return Entry(freeze(round_vectors(row, dtype)[0]), MADE, dtype=dtype, **more)


def replace_cost(frame: bytes, cost: bytes) -> bytes:
    """Return a frame of version 2 with another cost and a valid checksum."""
    body = frame[16:COST_AT] + cost + frame[COST_END:]
    return frame[:8] + struct.pack("<Q", xxh3_64_intdigest(body, int.from_bytes(frame[:8], "little"))) + body


def are_same(found: Any, expected: dict[str, Entry]) -> bool:
    return found.keys() == expected.keys() and all(
        found[key][1:] == entry[1:] and found[key].vector.tobytes() == entry.vector.tobytes()
        for key, entry in expected.items()
    )


# --- which version is written -----------------------------------------------------------------


@pytest.mark.parametrize("metadata", [None, METADATA])
def test_a_frame_has_sixteen_more_bytes_only_if_its_cost_is_known(metadata: Any) -> None:
    plain = encode_frames({"k": entry_of(1, metadata=metadata)})["k"]
    assert plain[4] == 1
    for cost in COSTS:
        frame = encode_frames({"k": entry_of(1, metadata=metadata, **cost)})["k"]
        assert frame[4] == 2
        assert frame[5:8] == plain[5:8]
        assert frame[16:COST_AT] + frame[COST_END:] == plain[16:]


def test_versions_are_chosen_entry_by_entry() -> None:
    items = {key_of(n): entry_of(n, **(COSTS[n % 5] if n % 2 else NO_COST)) for n in range(30)}
    frames = encode_frames(items)
    assert [frame[4] for frame in frames.values()] == [1, 2] * 15
    assert are_same(decode_frames(frames, now=NOW, dimensions=8).entries, items)


def test_minus_zero_is_written_as_zero() -> None:
    assert encode_frames({"k": entry_of(1, seconds=-0.0)}) == encode_frames({"k": entry_of(1, seconds=0)})


# --- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 5, 6, 40])
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("metadata", [None, METADATA])
def test_a_cost_comes_back(count: int, cost: dict[str, Any], metadata: Any) -> None:
    items = {key_of(n): entry_of(n, metadata=metadata, **cost) for n in range(count)}
    entries = decode_frames(encode_frames(items), now=NOW, dimensions=8).entries
    assert are_same(entries, items)
    for entry in entries.values():
        assert type(entry.tokens) in (int, type(None))
        assert type(entry.seconds) in (float, type(None))


def test_known_and_unknown_parts_are_kept_apart_in_one_batch() -> None:
    parts = [
        {"tokens": n} if n % 3 == 0 else {"seconds": n / 8} if n % 3 == 1 else {"tokens": n, "seconds": 0.5}
        for n in range(30)
    ]
    items = {key_of(n): entry_of(n, **part) for n, part in enumerate(parts)}
    entries = decode_frames(encode_frames(items), now=NOW, dimensions=8).entries
    assert len(entries.blocks) == 1
    assert sum_costs(entries.list_costs()).unknown_tokens == 10
    assert sum_costs(entries.list_costs()).unknown_seconds == 10
    assert are_same(entries, items)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_vector_that_is_rounded_when_it_is_read_keeps_its_cost(dtype: Dtype) -> None:
    items = {key_of(n): entry_of(n, tokens=n, seconds=0.5) for n in range(20)}
    frames = encode_frames(items)
    together = decode_frames(frames, now=NOW, dtype=dtype).entries
    for key, entry in items.items():
        assert (together[key].tokens, together[key].seconds) == (entry.tokens, entry.seconds)
        alone = decode_frames({key: frames[key]}, now=NOW, dtype=dtype).entries[key]
        assert (alone.tokens, alone.seconds) == (entry.tokens, entry.seconds)


@pytest.mark.parametrize("first", [1, 2])
def test_frames_of_both_versions_with_the_same_size_are_read(first: int) -> None:
    # 16 bytes of a cost take as much room as four more float32 values.
    items = {
        key_of(n): entry_of(n, 8, tokens=n, seconds=1.0) if n % 2 == first % 2 else entry_of(n, 12) for n in range(40)
    }
    frames = encode_frames(items)
    assert len(set(map(len, frames.values()))) == 1
    assert are_same(decode_frames(frames, now=NOW).entries, items)
    for dimensions, version in ((8, 2), (12, 1)):
        decoded = decode_frames(frames, now=NOW, dimensions=dimensions)
        assert {frames[key][4] for key in decoded.entries} == {version}
        assert {frames[key][4] for key in decoded.corrupt} == {3 - version}


@pytest.mark.parametrize("name", INVALID_COSTS)
@pytest.mark.parametrize("at", [0, 13, 39])
@pytest.mark.parametrize("metadata", [None, METADATA])
def test_an_invalid_cost_is_corrupt_alone(name: str, at: int, metadata: Any) -> None:
    items = {key_of(n): entry_of(n, metadata=metadata, tokens=n, seconds=0.5) for n in range(40)}
    frames = encode_frames(items)
    bad = key_of(at)
    frames[bad] = replace_cost(frames[bad], INVALID_COSTS[name])
    decoded = decode_frames(frames, now=NOW, dimensions=8)
    assert (decoded.corrupt, decoded.missed) == ([bad], [])
    del items[bad]
    assert are_same(decoded.entries, items)
    assert decode_frames({bad: frames[bad]}, now=NOW, dimensions=8).corrupt == [bad]
    few = {bad: frames[bad], key_of(20): frames[key_of(20)]}
    assert decode_frames(few, now=NOW, dimensions=8).corrupt == [bad]


@pytest.mark.parametrize("at", range(COST_AT, COST_END))
def test_damage_in_a_byte_of_the_cost_is_corrupt(at: int) -> None:
    items = {key_of(n): entry_of(n, tokens=n, seconds=0.5) for n in range(20)}
    frames = encode_frames(items)
    damaged = bytearray(frames[key_of(7)])
    damaged[at] ^= 0x40
    frames[key_of(7)] = bytes(damaged)
    assert decode_frames(frames, now=NOW).corrupt == [key_of(7)]
    assert decode_frames({key_of(7): bytes(damaged)}, now=NOW).corrupt == [key_of(7)]


@pytest.mark.parametrize("count", [1, 20])
def test_a_frame_of_an_unknown_version_is_a_miss(count: int) -> None:
    frames = encode_frames({key_of(n): entry_of(n, tokens=n) for n in range(count)})
    for key, frame in frames.items():
        start, body = frame[:4] + bytes([3]) + frame[5:8], frame[16:]
        frames[key] = start + struct.pack("<Q", xxh3_64_intdigest(body, int.from_bytes(start, "little"))) + body
    decoded = decode_frames(frames, now=NOW)
    assert decoded.missed == list(frames)


# --- encryption -------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("metadata", [None, METADATA])
def test_an_encrypted_cost_comes_back(cost: dict[str, Any], metadata: Any) -> None:
    items = {key_of(n): entry_of(n, metadata=metadata, **(cost if n % 2 else NO_COST)) for n in range(20)}
    plain = encode_frames(items)
    encryption = Encryption(bytes(32))
    opened, corrupt, unencrypted = encryption.decrypt(encryption.encrypt(plain))
    assert (opened, corrupt, unencrypted) == (plain, [], [])
    assert are_same(decode_frames(opened, now=NOW).entries, items)


def test_the_stored_bytes_do_not_contain_the_cost() -> None:
    plain = encode_frames({"k": entry_of(1, tokens=123_456_789, seconds=0.987654321)})["k"]
    sealed = Encryption(bytes(32)).encrypt({"k": plain})["k"]
    assert plain[COST_AT : COST_AT + 8] == struct.pack("<Q", 123_456_789)
    assert struct.pack("<Q", 123_456_789) not in sealed
    assert struct.pack("<d", 0.987654321) not in sealed


@pytest.mark.parametrize("version", [1, 2, 3])
def test_the_version_of_an_encrypted_frame_cannot_be_changed(version: int) -> None:
    # Otherwise, a frame of version 1 could make the first bytes of its payload pass for a cost.
    plain = encode_frames({"k": entry_of(1, **(NO_COST if version == 2 else COSTS[3]))})["k"]
    encryption = Encryption(bytes(32))
    sealed = encryption.encrypt({"k": plain})["k"]
    start, body = sealed[:4] + bytes([version]) + sealed[5:8], sealed[16:]
    changed = start + struct.pack("<Q", xxh3_64_intdigest(body, int.from_bytes(start, "little"))) + body
    assert encryption.decrypt({"k": changed}) == ({}, ["k"], [])
