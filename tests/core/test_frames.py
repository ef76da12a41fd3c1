from __future__ import annotations

import gc
import importlib.util
import json
import math
import random
import re
import struct
import weakref
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from embedonce.vectors import (
    MAX_METADATA,
    MAX_SECONDS,
    MAX_TOKENS,
    Decoded,
    Dtype,
    Entry,
    decode_frame,
    decode_frames,
    encode_frames,
    freeze,
    round_vectors,
)

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "frames.md"
GOLDEN: list[dict[str, Any]] = [
    golden
    for version in (1, 2)
    for golden in json.loads((HERE / "golden" / f"frames-v{version}.json").read_text(encoding="utf-8"))
]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
NOW = 1_750_000_000.0
MADE = 1_700_000_000.5
SIGNALLING = struct.unpack("<d", struct.pack("<Q", 0x7FF0000000000001))[0]
METADATA = {"source": "notes/ä.md", "chunk": 3}


def _load_frame_writer() -> ModuleType:
    """Return the module that wrote the golden frames. The module follows docs/frames.md and does not use embedonce."""
    spec = importlib.util.spec_from_file_location("make_frames", HERE / "golden" / "make_frames.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


page = _load_frame_writer()
write_frame = page.write_frame
key_of = page.key_of


def entry_of(seed: int, dimension: int = 8, dtype: Dtype = "float32", **more: Any) -> Entry:
    row = np.random.default_rng(seed).standard_normal((1, dimension)).astype(np.float32)
    return Entry(freeze(round_vectors(row, dtype)[0]), MADE, dtype=dtype, **more)


def frame_of(key: str, entry: Entry) -> bytes:
    return encode_frames({key: entry})[key]


def is_same(found: Entry, expected: Entry) -> bool:
    return (
        found.vector.dtype == np.float32
        and found.vector.shape == expected.vector.shape
        and found.vector.tobytes() == expected.vector.tobytes()
        and found[1:] == expected[1:]
    )


def find_verdict(decoded: Decoded, key: str) -> str:
    """Return the field of the result that contains the key: "entry", "corrupt" or "missed"."""
    places = {"entry": decoded.entries, "corrupt": decoded.corrupt, "missed": decoded.missed}
    (found,) = [name for name, place in places.items() if key in place]
    return found


def decode_alone_and_in_batches(key: str, frame: Any, **wanted: Any) -> str:
    """Return the verdict on a frame that is decoded alone. Check that the verdict is the same in a batch."""
    wanted = {"now": NOW, **wanted}
    alone = decode_frames({key: frame}, **wanted)
    size = len(frame) if isinstance(frame, bytes) else 96
    others = {key_of(900 + n): bytes(size) for n in range(20)}
    dtype = wanted.get("dtype", "float32")
    good = {key_of(950 + n): entry_of(n, max(1, (size - 64) // 4), dtype) for n in range(20)}
    frames = encode_frames({key: entry._replace(dtype="float32") for key, entry in good.items()})
    first = decode_frames({key: frame, **frames, **others}, **wanted)
    among = decode_frames({**others, **frames, key: frame}, **wanted)
    assert find_verdict(first, key) == find_verdict(among, key) == find_verdict(alone, key)
    for decoded in (first, among):
        assert set(others) <= set(decoded.corrupt)
        assert all(is_same(decoded.entries[k], e) for k, e in good.items() if k in decoded.entries)
    return find_verdict(alone, key)


# --- golden frames and the page ---------------------------------------------------------------


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden["name"])
def test_frames_of_released_versions_are_read_and_written_again(golden: dict[str, Any]) -> None:
    frame = bytes.fromhex(golden["frame"])
    entry = decode_frames({golden["key"]: frame}, now=NOW, dtype=golden["dtype"]).entries[golden["key"]]
    assert entry.vector.tobytes() == struct.pack(
        f"={len(entry.vector)}f", *np.frombuffer(bytes.fromhex(golden["float32"]), "<f4")
    )
    assert (entry.created, entry.expires) == (golden["created"], golden["expires"])
    assert (entry.metadata, entry.dtype) == (golden["metadata"], golden["dtype"])
    assert (entry.tokens, entry.seconds) == (golden.get("tokens"), golden.get("seconds"))
    assert frame_of(golden["key"], entry) == frame


def test_the_examples_of_the_page_follow_its_text() -> None:
    text = PAGE.read_text(encoding="utf-8")
    (key,) = set(re.findall(r"`(eo1\.[0-9a-f]{16}\.[0-9a-f]{64})`", text))
    vector = json.loads(re.findall(r"vector is\s+`(\[.*?\])`", text)[0])
    created = float(re.findall(r"\*created\* is ([0-9.]+[0-9])", text)[0])
    (metadata,) = re.findall(r"with the metadata `(\{.*?\})`", text)
    (expires,) = re.findall(r"expiring at ([0-9.]+[0-9])", text)
    ((tokens, seconds),) = re.findall(r"([0-9]+) tokens and ([0-9.]+[0-9]) seconds", text)
    float32, int8, with_cost = (
        bytes.fromhex("".join(line[4:] for line in block.splitlines()))
        for block in re.findall(r"```text\n(  0  45 .*?)```", text, re.DOTALL)
    )
    array = freeze(vector)
    assert float32 == frame_of(key, Entry(array, created, None, json.loads(metadata)))
    assert float32 == write_frame(key, vector, created=created, metadata=json.loads(metadata))
    assert int8 == frame_of(key, Entry(array, created, float(expires), None, "int8"))
    assert int8 == write_frame(key, vector, created=created, expires=float(expires), dtype="int8")
    assert float32[64:91].decode() == metadata
    cost: dict[str, Any] = {"tokens": int(tokens), "seconds": float(seconds)}
    assert with_cost == frame_of(key, Entry(array, created, **cost))
    assert with_cost == write_frame(key, vector, created=created, **cost)


def test_the_table_of_the_page_has_no_gaps() -> None:
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\w+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    widths = {"u8": 1, "u16": 2, "u32": 4, "u64": 8, "f64": 8}
    at = 0
    for start, size, kind in rows:
        assert int(start) == at
        assert widths.get(kind, int(size)) == int(size)
        at += int(size)
    assert at == 80


float32s = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(
    values=st.lists(float32s, min_size=1, max_size=12),
    dtype=st.sampled_from(DTYPES),
    tokens=st.none() | st.integers(0, MAX_TOKENS),
    seconds=st.none() | st.floats(0, MAX_SECONDS),
)
def test_frames_are_written_as_the_page_says(
    values: list[float], dtype: Dtype, tokens: int | None, seconds: float | None
) -> None:
    try:
        frame = frame_of(key_of(1), Entry(freeze(values), MADE, None, None, dtype, tokens, seconds))
    except ValueError:
        with pytest.raises(ValueError, match=r"^row 0 "):
            round_vectors([values], dtype)
        return
    assert frame == write_frame(key_of(1), values, created=MADE, dtype=dtype, tokens=tokens, seconds=seconds)


# --- round trips ------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
metadatas = st.none() | st.dictionaries(st.text(max_size=8), json_values, max_size=3)
dates = st.floats(allow_nan=False, allow_infinity=False)
costs = st.tuples(st.none() | st.integers(0, MAX_TOKENS), st.none() | st.floats(0, MAX_SECONDS))
entries = st.builds(
    lambda seed, dimension, dtype, created, expires, metadata, cost: entry_of(seed, dimension, dtype)._replace(
        created=created, expires=expires, metadata=metadata, tokens=cost[0], seconds=cost[1]
    ),
    st.integers(0, 99),
    st.sampled_from([0, 1, 3, 8, 8, 8, 384]),
    st.sampled_from(DTYPES),
    dates | st.just(MADE),
    st.none() | st.just(NOW + 1) | dates,
    st.none() | metadatas,
    costs | st.just((None, None)),
)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(made=st.lists(entries, max_size=40), dimensions=st.none() | st.just(8), dtype=st.sampled_from(DTYPES))
def test_any_batch_reads_back(made: list[Entry], dimensions: int | None, dtype: Dtype) -> None:
    items = {key_of(number): entry for number, entry in enumerate(made)}
    frames = encode_frames(items)
    assert list(map(type, frames.values())) == [bytes] * len(items)
    decoded = decode_frames(frames, now=NOW, dtype=dtype, dimensions=dimensions)
    for key, entry in items.items():
        if dimensions is not None and len(entry.vector) != dimensions:
            assert find_verdict(decoded, key) == "corrupt"
        elif (entry.expires is not None and entry.expires <= NOW) or DTYPES.index(entry.dtype) > DTYPES.index(dtype):
            assert find_verdict(decoded, key) == "missed"
        else:
            rounded = round_vectors(entry.vector[None], dtype)[0]
            assert is_same(decoded.entries[key], entry._replace(vector=rounded, dtype=dtype))
    assert len(decoded.entries) + len(decoded.corrupt) + len(decoded.missed) == len(items)


@given(rows=st.lists(st.lists(float32s, min_size=4, max_size=4), min_size=1, max_size=20))
def test_float32_comes_back_bit_for_bit(rows: list[list[float]]) -> None:
    items = {key_of(number): Entry(freeze(row), MADE) for number, row in enumerate(rows)}
    decoded = decode_frames(encode_frames(items), now=NOW, dimensions=4)
    assert all(is_same(decoded.entries[key], entry) for key, entry in items.items())


def test_batches_single_frames_and_both_byte_orders_give_the_same_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    items = {key_of(n): entry_of(n, 16, DTYPES[n % 3]) for n in range(60)}
    usual = encode_frames(items)
    monkeypatch.setattr("embedonce._format.frames.LITTLE_ENDIAN", False)
    assert encode_frames(items) == usual
    decoded = decode_frames(usual, now=NOW, dtype="int8")
    assert len(decoded.entries) == 60
    for key, frame in usual.items():
        alone = decode_frames({key: frame}, now=NOW, dtype="int8").entries[key]
        assert is_same(decoded.entries[key], alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metadata", [None, METADATA])
@pytest.mark.parametrize("count", [1, 40])
def test_decoded_vectors_are_read_only_and_keep_nothing_else_alive(
    dtype: Dtype, metadata: dict[str, Any] | None, count: int
) -> None:
    items = {key_of(n): entry_of(n, 384, dtype, metadata=metadata) for n in range(count)}
    for entry in decode_frames(encode_frames(items), now=NOW, dtype=dtype).entries.values():
        assert type(entry.vector.base) is bytes
        assert len(entry.vector.base) == 4 * 384
        with pytest.raises(ValueError, match="WRITEABLE"):
            entry.vector.setflags(write=True)


def test_a_client_may_reuse_its_buffer() -> None:
    class Buffer(bytearray):
        pass

    item = entry_of(1)
    buffer = Buffer(frame_of(key_of(1), item))
    alive = weakref.ref(buffer)
    read = decode_frames({key_of(1): memoryview(buffer)}, now=NOW).entries[key_of(1)]  # type: ignore[dict-item]
    buffer[:] = bytes(len(buffer))
    assert is_same(read, item)
    del buffer
    gc.collect()
    assert alive() is None


def test_a_vector_that_is_not_rounded_yet_is_rounded_when_written() -> None:
    row = np.random.default_rng(5).standard_normal(64).astype(np.float32)
    for dtype in DTYPES:
        read = decode_frames({"k": frame_of("k", Entry(row, MADE, dtype=dtype))}, now=NOW, dtype=dtype).entries["k"]
        assert read.vector.tobytes() == round_vectors(row[None], dtype)[0].tobytes()


def test_vectors_that_are_strided_or_of_another_type_are_written_as_float32() -> None:
    expected = frame_of("k", Entry(freeze([1, 2, 3]), MADE))
    for vector in (np.array([3, 2, 1], np.float32)[::-1], np.array([1.0, 2.0, 3.0]), np.array([1, 2, 3], ">f4")):
        assert frame_of("k", Entry(vector, MADE)) == expected


@pytest.mark.parametrize("batch", [1, 30])
def test_a_finer_entry_that_cannot_be_rounded_is_a_miss(batch: int) -> None:
    items = {key_of(n): entry_of(n, 2) for n in range(batch)}
    items["huge"] = Entry(freeze([1e30, 1.0]), MADE)
    items["tiny"] = Entry(freeze([1e-30, 1e-30]), MADE)
    decoded = decode_frames(encode_frames(items), now=NOW, dtype="float16")
    assert decoded.missed == ["huge", "tiny"]
    assert len(decoded.entries) == batch


def test_an_empty_mapping_gives_an_empty_result() -> None:
    assert decode_frames({}, now=NOW) == Decoded()
    assert encode_frames({}) == {}


# --- outcomes ---------------------------------------------------------------------------------


def test_an_entry_is_expired_from_its_expiry_date_on() -> None:
    frame = frame_of("k", entry_of(1, expires=NOW))
    assert decode_alone_and_in_batches("k", frame, now=NOW) == "missed"
    assert decode_alone_and_in_batches("k", frame, now=math.nextafter(NOW, 0)) == "entry"


def test_an_entry_without_expiry_never_expires() -> None:
    assert decode_alone_and_in_batches("k", frame_of("k", entry_of(1)), now=1e300) == "entry"
    # An expiry of 0.0 is a date like any other. It does not mean that the entry never expires.
    assert decode_alone_and_in_batches("k", frame_of("k", entry_of(1, expires=0.0))) == "missed"
    assert decode_frames({"k": frame_of("k", entry_of(1, expires=math.inf))}, now=1e300).entries["k"].expires is None


def test_the_dimension_is_checked_if_it_is_known() -> None:
    frame = frame_of("k", entry_of(1, 8))
    assert decode_alone_and_in_batches("k", frame, dimensions=8) == "entry"
    assert decode_alone_and_in_batches("k", frame) == "entry"
    assert decode_alone_and_in_batches("k", frame, dimensions=7) == "corrupt"
    card = frame_of("k", Entry(freeze([]), MADE, metadata={"model": "m"}))
    assert decode_alone_and_in_batches("k", card) == "entry"
    assert decode_alone_and_in_batches("k", card, dimensions=8) == "corrupt"
    assert decode_alone_and_in_batches("k", card, dimensions=0) == "corrupt"


@pytest.mark.parametrize(("stored", "asked"), [(a, b) for a in DTYPES for b in DTYPES])
def test_a_coarser_entry_is_a_miss(stored: Dtype, asked: Dtype) -> None:
    expected = "missed" if DTYPES.index(stored) > DTYPES.index(asked) else "entry"
    assert decode_alone_and_in_batches("k", frame_of("k", entry_of(1, dtype=stored)), dtype=asked) == expected


FORGED: dict[str, tuple[dict[str, Any], str]] = {
    "as it should be": ({}, "entry"),
    "version 0": ({"version": 0}, "missed"),
    "version 3": ({"version": 3}, "missed"),
    "version 3 with a cost": ({"version": 3, "tokens": 7}, "missed"),
    "version 3 of another dtype": ({"version": 3, "dtype": "float8", "raw_payload": b"abc"}, "missed"),
    "version 255": ({"version": 255}, "missed"),
    "version 2": ({"tokens": 7, "seconds": 0.5}, "entry"),
    "version 2 without a cost": ({"version": 2}, "corrupt"),
    "version 2 with half a cost": ({"version": 2, "raw_cost": bytes(8)}, "corrupt"),
    "version 1 with a cost": ({"version": 1, "tokens": 7}, "corrupt"),
    "both parts of the cost are unknown": ({"raw_cost": page.UNKNOWN + page.UNKNOWN}, "entry"),
    "tokens are the maximum": ({"tokens": MAX_TOKENS}, "entry"),
    "tokens are too large": ({"tokens": MAX_TOKENS + 1}, "corrupt"),
    "tokens have their highest bit": ({"tokens": 2**63}, "corrupt"),
    "tokens are nearly unknown": ({"tokens": 2**64 - 2}, "corrupt"),
    "seconds are the maximum": ({"seconds": MAX_SECONDS}, "entry"),
    "seconds are too large": ({"seconds": math.nextafter(MAX_SECONDS, math.inf)}, "corrupt"),
    "seconds are infinite": ({"seconds": math.inf}, "corrupt"),
    "seconds are minus infinity": ({"seconds": -math.inf}, "corrupt"),
    "seconds are negative": ({"seconds": -1.0}, "corrupt"),
    "seconds are barely negative": ({"tokens": 7, "seconds": -5e-324}, "corrupt"),
    "seconds are minus zero": ({"seconds": -0.0}, "corrupt"),
    "seconds are another NaN": ({"seconds": math.nan}, "corrupt"),
    "seconds are a signalling NaN": ({"raw_cost": bytes(8) + struct.pack("<Q", 0x7FF0000000000001)}, "corrupt"),
    "dtype unknown": ({"dtype": "float8", "raw_payload": b"abcdefgh"}, "corrupt"),
    "encrypted": ({"flags": 2}, "corrupt"),
    "encrypted, with metadata": ({"flags": 3, "metadata": {}}, "corrupt"),
    "flag unknown": ({"flags": 0x8000}, "corrupt"),
    "key id": ({"key_id": 1}, "corrupt"),
    "metadata announced": ({"flags": 1}, "corrupt"),
    "metadata not announced": ({"metadata": {}, "flags": 0}, "corrupt"),
    "created is NaN": ({"created": math.nan}, "corrupt"),
    "created is a signalling NaN": ({"created": SIGNALLING}, "corrupt"),
    "expires is a signalling NaN": ({"expires": SIGNALLING}, "corrupt"),
    "created is infinite": ({"created": math.inf}, "corrupt"),
    "expires is NaN": ({"expires": math.nan}, "corrupt"),
    "expires is minus infinity": ({"expires": -math.inf}, "corrupt"),
    "payload too short": ({"raw_payload": bytes(7)}, "corrupt"),
    "payload too long": ({"raw_payload": bytes(9)}, "corrupt"),
    "payload absent": ({"raw_payload": b""}, "corrupt"),
    "a value is NaN": ({"vector": [math.nan, 1.0]}, "corrupt"),
    "a value is infinite": ({"vector": [1.0, -math.inf]}, "corrupt"),
    "a value is a signalling NaN": ({"raw_payload": struct.pack("<II", 0x7F800001, 0)}, "corrupt"),
    "a float16 is infinite": ({"dtype": "float16", "vector": [1.0, math.inf]}, "corrupt"),
    "a float16 is a signalling NaN": ({"dtype": "float16", "raw_payload": struct.pack("<HH", 0x7C01, 0)}, "corrupt"),
    "scale is NaN": ({"dtype": "int8", "raw_payload": struct.pack("<fbb", math.nan, 127, 1)}, "corrupt"),
    "scale is a signalling NaN": ({"dtype": "int8", "raw_payload": struct.pack("<Ibb", 0x7F800001, 127, 1)}, "corrupt"),
    "scale is infinite": ({"dtype": "int8", "raw_payload": struct.pack("<fbb", math.inf, 127, 0)}, "corrupt"),
    "scale is negative": ({"dtype": "int8", "raw_payload": struct.pack("<fbb", -1.0, 127, 1)}, "corrupt"),
    "scale is zero": ({"dtype": "int8", "raw_payload": struct.pack("<fbb", 0.0, 127, 1)}, "corrupt"),
    "scale is subnormal": ({"dtype": "int8", "raw_payload": struct.pack("<fbb", 1e-40, 127, 1)}, "corrupt"),
    "scale is too fine": ({"dtype": "int8", "raw_payload": struct.pack("<fbb", 1 + 2**-20, 127, 1)}, "corrupt"),
    "scale is a bit too fine": ({"dtype": "int8", "raw_payload": struct.pack("<fbb", 1 + 2**-16, 127, 1)}, "corrupt"),
    "scale is as fine as can be": ({"dtype": "int8", "raw_payload": struct.pack("<fbb", 1 + 2**-15, 127, 1)}, "entry"),
    "scale is too large": ({"dtype": "int8", "raw_payload": struct.pack("<fbb", 2.0**127, 127, 1)}, "corrupt"),
    "steps leave room": ({"dtype": "int8", "raw_payload": struct.pack("<fbb", 1.0, 126, 1)}, "corrupt"),
    "a step is -128": ({"dtype": "int8", "raw_payload": struct.pack("<fbb", 1.0, -128, 127)}, "corrupt"),
    "steps leave room at the smallest scale": (
        {"dtype": "int8", "raw_payload": struct.pack("<fbb", 2.0**-126, -126, 1)},
        "entry",
    ),
    "metadata is not JSON": ({"raw_metadata": b"{"}, "corrupt"),
    "metadata is a list": ({"raw_metadata": b"[1]"}, "corrupt"),
    "metadata is null": ({"raw_metadata": b"null"}, "corrupt"),
    "metadata is not UTF-8": ({"raw_metadata": b'{"a":"\xff"}'}, "corrupt"),
    "metadata is UTF-16": ({"raw_metadata": '{"a":1}'.encode("utf-16")}, "corrupt"),
    "metadata has NaN": ({"raw_metadata": b'{"a":NaN}'}, "corrupt"),
    "metadata has infinity": ({"raw_metadata": b'{"a":1e999}'}, "corrupt"),
    "metadata has half a character": ({"raw_metadata": b'{"a":"\\ud800"}'}, "corrupt"),
    "metadata has escapes": ({"raw_metadata": b'{"a":"\\ud83d\\ude00 C:\\\\udo \\u0001"}'}, "entry"),
    "metadata is deep": ({"raw_metadata": b'{"a":' + b"[" * 30000 + b"]" * 30000 + b"}"}, "corrupt"),
    "metadata has a number without end": ({"raw_metadata": b'{"a":' + b"9" * 6000 + b"}"}, "corrupt"),
    "metadata is too large": ({"raw_metadata": b'{"a":"' + b"x" * MAX_METADATA + b'"}'}, "corrupt"),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_frames_with_a_valid_checksum(name: str) -> None:
    parts, expected = FORGED[name]
    parts = {"vector": [0.5, -1.0], "created": MADE, **parts}
    frames = {key_of(n): write_frame(key_of(n), **parts) for n in range(20)}
    finest: Dtype = (
        "int8" if parts.get("dtype") == "int8" else "float16" if parts.get("dtype") == "float16" else "float32"
    )
    decoded = decode_frames(frames, now=NOW, dtype=finest, dimensions=2)
    assert [find_verdict(decoded, key) for key in frames] == [expected] * 20
    assert decode_alone_and_in_batches(key_of(3), frames[key_of(3)], dtype=finest, dimensions=2) == expected
    # A promotion must be able to write every entry that was read.
    assert encode_frames(decoded.entries).keys() == decoded.entries.keys()


@pytest.mark.parametrize("half", [40, 48])
def test_both_halves_of_the_echo_are_checked(half: int) -> None:
    frames = {key_of(n): frame_of(key_of(n), entry_of(n)) for n in range(20)}
    frame = bytearray(frames[key_of(3)])
    frame[half : half + 8] = bytes(8)
    frames[key_of(3)] = page.seal(bytes(frame[:8]), bytes(frame[16:]))
    decoded = decode_frames(frames, now=NOW)
    assert decoded.corrupt == [key_of(3)]
    assert decode_frames({key_of(3): frames[key_of(3)]}, now=NOW).corrupt == [key_of(3)]
    assert len(decoded.entries) == 19


def test_frames_of_the_same_size_with_different_layouts_are_decoded_correctly() -> None:
    made = [entry_of(n, 2, metadata={"a": 1}) if n % 2 else entry_of(n, 1, metadata={"a": 12345}) for n in range(20)]
    frames = encode_frames({key_of(n): entry for n, entry in enumerate(made)})
    assert len(set(map(len, frames.values()))) == 1
    decoded = decode_frames(frames, now=NOW)
    assert all(is_same(decoded.entries[key_of(n)], entry) for n, entry in enumerate(made))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metadata", [None, METADATA])
@pytest.mark.parametrize("cost", [{}, {"tokens": 7}, {"seconds": 0.5}])
def test_valid_frames_of_the_same_size_are_decoded_together(
    dtype: Dtype, metadata: dict[str, Any] | None, cost: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = encode_frames({key_of(n): entry_of(n, 8, metadata=metadata, **cost) for n in range(20)})
    monkeypatch.delattr("embedonce._format.frames._decode_one")
    assert len(decode_frames(frames, now=NOW, dtype=dtype, dimensions=8).entries) == 20


@pytest.mark.parametrize("size", [*range(0, 64, 7), 48, 56, 63])
def test_short_frames_with_a_valid_checksum(size: int) -> None:
    for version in (1, 2):
        start = b"EO1F" + bytes([version, 1, 0, 0])
        assert decode_alone_and_in_batches("k", page.seal(start, bytes(size))[: 16 + size]) == "corrupt"


@pytest.mark.parametrize(
    "value", [None, "", "EO1F", 7, 1.5, [], {}, np.zeros(20), object(), Entry(freeze([1.0]), MADE), b"", bytearray()]
)
def test_a_value_that_is_not_bytes_is_corrupt(value: Any) -> None:
    assert decode_alone_and_in_batches("k", value) == "corrupt"


def test_a_memoryview_that_was_released_is_corrupt() -> None:
    view = memoryview(frame_of("k", entry_of(1)))
    view.release()
    assert decode_frames({"k": view}, now=NOW).corrupt == ["k"]  # type: ignore[dict-item]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, type("Reply", (bytes,), {})])
def test_bytes_like_values_are_decoded(kind: type) -> None:
    items = {key_of(n): entry_of(n) for n in range(20)}
    frames = {key: kind(frame) for key, frame in encode_frames(items).items()}
    decoded = decode_frames(frames, now=NOW)
    assert all(is_same(decoded.entries[key], entry) for key, entry in items.items())


@pytest.mark.parametrize("key", ["", "ключ", "\ud800", "a" * 500])
def test_any_string_can_be_a_key(key: str) -> None:
    assert decode_alone_and_in_batches(key, frame_of(key, entry_of(1))) == "entry"
    assert decode_alone_and_in_batches(key, frame_of(key + "x", entry_of(1))) == "corrupt"


# --- damage -----------------------------------------------------------------------------------

SAMPLES = {
    "float32": entry_of(1, 5),
    "float32, expiring, metadata": entry_of(2, 5, expires=NOW + 5, metadata=METADATA),
    "float16": entry_of(3, 5, "float16"),
    "int8": entry_of(4, 5, "int8"),
    "int8, metadata": entry_of(5, 5, "int8", metadata=METADATA),
    "float32, cost": entry_of(7, 5, tokens=12, seconds=0.25),
    "float32, tokens": entry_of(7, 5, tokens=12),
    "float16, cost, metadata": entry_of(8, 5, "float16", metadata=METADATA, tokens=0, seconds=0.0),
    "int8, seconds": entry_of(9, 5, "int8", seconds=1e-9),
    "card": Entry(freeze([]), MADE, metadata={"model": "m"}),
    "of real size": entry_of(6, 384),
}


def check_damaged_frames_are_corrupt(sample: Entry, damage: list[Any]) -> None:
    """Check that damaged frames are corrupt, and that valid frames of the same size beside them stay valid.

    Each function in ``damage`` turns a valid frame into a damaged one.
    """
    good = {key_of(n): sample for n in range(0, 3 * len(damage), 3)}
    frames = encode_frames({key_of(n): sample for n in range(3 * len(damage))})
    bad = set()
    for number, harm in enumerate(damage):
        key = key_of(3 * number + 1)
        frames[key] = harm(frames[key])
        del frames[key_of(3 * number + 2)]
        bad.add(key)
    for frames_in_order in (frames, dict(reversed(frames.items()))):
        decoded = decode_frames(frames_in_order, now=NOW, dtype=sample.dtype)
        assert set(decoded.corrupt) == bad
        assert decoded.missed == []
        assert decoded.entries.keys() == good.keys()
        assert all(is_same(entry, sample) for entry in decoded.entries.values())
    alone = random.Random(0).sample(sorted(bad), min(len(bad), 200))
    assert all(decode_frames({key: frames[key]}, now=NOW, dtype=sample.dtype).corrupt == [key] for key in alone)


def flip(bit: int) -> Any:
    def harm(frame: bytes) -> bytes:
        changed = bytearray(frame)
        changed[bit // 8] ^= 1 << bit % 8
        return bytes(changed)

    return harm


@pytest.mark.parametrize("name", SAMPLES)
def test_every_flipped_bit_is_corrupt(name: str) -> None:
    sample = SAMPLES[name]
    check_damaged_frames_are_corrupt(sample, [flip(bit) for bit in range(8 * len(frame_of("k", sample)))])


@pytest.mark.parametrize("name", SAMPLES)
def test_every_truncation_is_corrupt(name: str) -> None:
    sample = SAMPLES[name]
    size = len(frame_of("k", sample))
    check_damaged_frames_are_corrupt(sample, [lambda frame, end=end: frame[:end] for end in range(size)])
    check_damaged_frames_are_corrupt(sample, [lambda frame, start=start: frame[start:] for start in range(1, size)])


@pytest.mark.parametrize("name", SAMPLES)
def test_every_extension_is_corrupt(name: str) -> None:
    harms = [lambda frame, n=n: frame + bytes(n) for n in range(1, 65)]
    harms += [lambda frame, n=n: frame + frame[:n] for n in (1, 16, 64, None)]
    harms += [lambda frame, n=n: bytes(n) + frame for n in (1, 8, 64)]
    check_damaged_frames_are_corrupt(SAMPLES[name], harms)


@pytest.mark.parametrize("name", SAMPLES)
def test_frames_under_each_others_keys_are_corrupt(name: str) -> None:
    sample = SAMPLES[name]
    frames = encode_frames({key_of(n): sample for n in range(50)})
    keys = list(frames)
    shifted = dict(zip(keys, [frames[key] for key in keys[1:] + keys[:1]], strict=True))
    assert decode_frames(shifted, now=NOW, dtype=sample.dtype).corrupt == keys
    keys[3], keys[7] = keys[7], keys[3]
    swapped = dict(zip(keys, frames.values(), strict=True))
    decoded = decode_frames(swapped, now=NOW, dtype=sample.dtype)
    assert sorted(decoded.corrupt) == [key_of(3), key_of(7)]
    assert len(decoded.entries) == 48


@given(values=st.lists(st.binary(max_size=200), max_size=30))
def test_random_bytes_are_corrupt(values: list[bytes]) -> None:
    frames = {key_of(n): value for n, value in enumerate(values)}
    assert sorted(decode_frames(frames, now=NOW).corrupt) == list(frames)


COSTS = [bytes(16), bytes(8) + page.UNKNOWN, page.UNKNOWN + bytes(8), bytes(7) + b"\x01" + bytes(8)]


@given(
    values=st.lists(
        st.tuples(
            st.sampled_from([1, 1, 1, 2, 2, 3]),
            st.sampled_from([1, 1, 2, 3, 4]),
            st.sampled_from([0, 0, 1, 2]),
            st.sampled_from([0, 1, 4]),
            st.sampled_from([0, 0, 2]),
            st.binary(min_size=16, max_size=16) | st.just(struct.pack("<dd", MADE, math.inf)),
            st.sampled_from([b"", b"", *COSTS]),
            st.binary(max_size=24) | st.sampled_from([b"{}" + bytes(4), bytes(16)]),
        ),
        min_size=6,
        max_size=30,
    ),
    dtype=st.sampled_from(DTYPES),
    dimensions=st.sampled_from([None, 1, 4]),
)
def test_random_contents_get_the_same_verdict_alone_and_in_a_batch(
    values: list[tuple[int, int, int, int, int, bytes, bytes, bytes]], dtype: Dtype, dimensions: int | None
) -> None:
    frames = {}
    for number, (version, code, flags, dimension, length, when, cost, rest) in enumerate(values):
        key = key_of(number)
        body = struct.pack("<II", dimension, length) + when + page.xxhash.xxh3_128_digest(key.encode()) + bytes(8)
        body += cost + rest
        frames[key] = page.seal(b"EO1F" + struct.pack("<BBH", version, code, flags), body)
    together = decode_frames(frames, now=NOW, dtype=dtype, dimensions=dimensions)
    for key, frame in frames.items():
        alone = decode_frames({key: frame}, now=NOW, dtype=dtype, dimensions=dimensions)
        assert find_verdict(alone, key) == find_verdict(together, key)
        if key in alone.entries:
            assert is_same(together.entries[key], alone.entries[key])
    assert encode_frames(together.entries).keys() == together.entries.keys()


# --- entries that cannot be written -----------------------------------------------------------


@pytest.mark.parametrize(
    "entry",
    [
        Entry(freeze([1.0, math.nan]), MADE),
        Entry(freeze([math.inf]), MADE),
        Entry(np.array([1e300]), MADE),  # type: ignore[arg-type]
        Entry(freeze([1e6]), MADE, dtype="float16"),
        Entry(freeze([1e-30]), MADE, dtype="float16"),
        Entry(freeze([1e-45]), MADE, dtype="int8"),
        Entry(np.zeros((1, 2), np.float32), MADE),
        Entry(freeze([1.0]), MADE, dtype="float8"),  # type: ignore[arg-type]
        Entry(freeze([1.0]), math.nan),
        Entry(freeze([1.0]), math.inf),
        Entry(freeze([1.0]), MADE, math.nan),
        Entry(freeze([1.0]), MADE, -math.inf),
        Entry(freeze([1.0]), MADE, metadata={"a": "x" * MAX_METADATA}),
        Entry(freeze([1.0]), MADE, tokens=-1),
        Entry(freeze([1.0]), MADE, tokens=MAX_TOKENS + 1),
        Entry(freeze([1.0]), MADE, tokens=True),
        Entry(freeze([1.0]), MADE, tokens=1.0),  # type: ignore[arg-type]
        Entry(freeze([1.0]), MADE, seconds=-1.0),
        Entry(freeze([1.0]), MADE, seconds=math.nan),
        Entry(freeze([1.0]), MADE, seconds=math.inf),
        Entry(freeze([1.0]), MADE, tokens=1, seconds=MAX_SECONDS + 1),
    ],
)
def test_the_error_names_the_key_of_an_entry_that_does_not_fit_a_frame(entry: Entry) -> None:
    items = {key_of(n): entry_of(n, 1, "int8") for n in range(3)}
    with pytest.raises(ValueError, match=f"^{re.escape(key_of(7))}: "):
        encode_frames({**items, key_of(7): entry})


loop: dict[str, Any] = {}
loop["self"] = loop
deep: list[Any] = []
for _ in range(100_000):
    deep = [deep]


@pytest.mark.parametrize(
    "metadata",
    [
        {"secret": object()},
        {"secret": b"bytes"},
        {"secret": math.nan},
        {"secret": [-math.inf]},
        {"secret": "\ud800"},
        {"secret": {1: "x"}},
        {"secret": [{None: "x"}]},
        {1: "secret"},
        {"secret": 10**5000},
        ["secret"],
        [("secret", 1)],
        "secret",
        loop,
        {"secret": deep},
    ],
    ids=lambda metadata: type(metadata).__name__,
)
def test_metadata_that_is_not_json_is_refused_without_showing_it(metadata: Any) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(key_of(7))}: metadata must be") as caught:
        frame_of(key_of(7), Entry(freeze([1.0]), MADE, metadata=metadata))
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_metadata_of_the_largest_size_is_kept() -> None:
    room = MAX_METADATA - len('{"a":""}')
    item = entry_of(1, metadata={"a": "x" * room})
    assert is_same(decode_frames({"k": frame_of("k", item)}, now=NOW).entries["k"], item)


def test_metadata_may_be_any_mapping() -> None:
    item = entry_of(1, metadata=MappingProxyType({"a": (1, 2)}))
    assert decode_frames({"k": frame_of("k", item)}, now=NOW).entries["k"].metadata == {"a": [1, 2]}


@pytest.mark.parametrize("count", [1, 20])
def test_values_whose_squares_are_not_finite_are_valid(count: int) -> None:
    vector = freeze(np.full(8, 3e30, np.float32))
    frames = encode_frames({f"eo1.0.{i}": Entry(vector, 1.0) for i in range(count)})
    assert len(decode_frames(frames, now=2.0, dimensions=8).entries) == count


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_single_frame_with_a_value_that_is_not_finite_is_corrupt(bad: float) -> None:
    frame = bytearray(encode_frames({"eo1.0.1": entry_of(1)})["eo1.0.1"])
    frame[-4:] = struct.pack("<f", bad)
    word = int.from_bytes(frame[:8], "little")
    frame[8:16] = xxh3_64_intdigest(bytes(frame[16:]), word).to_bytes(8, "little")
    assert decode_frames({"eo1.0.1": bytes(frame)}, now=2.0).corrupt == ["eo1.0.1"]
    assert decode_frame("eo1.0.1", bytes(frame), now=2.0, dtype="float32", dimensions=8) is None
