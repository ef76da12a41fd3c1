"""Time encoding and decoding of frames, in µs per text, compared with the floor: one np.frombuffer per frame.

Run: python benchmarks/frames.py [texts [dimensions]]
"""

from __future__ import annotations

import gc
import sys
import timeit
import tracemalloc
from collections.abc import Callable
from typing import get_args

import numpy as np

from embedonce.vectors import Dtype, Entry, decode_frames, encode_frames, freeze_rows, round_vectors


def make_entries(count: int, dimensions: int, dtype: Dtype) -> dict[str, Entry]:
    matrix = np.random.default_rng(0).standard_normal((count, dimensions)).astype(np.float32)
    rows = freeze_rows(round_vectors(matrix, dtype))
    return {f"eo1.{7:016x}.{i:064x}": Entry(row, 1e9, 2e9, None, dtype) for i, row in enumerate(rows)}


def measure_microseconds(call: Callable[[], object], texts: int) -> float:
    """Return the best of nine runs, in µs per text, because other load on the machine only adds time."""
    calls = max(1, 4096 // texts)
    return min(timeit.repeat(call, number=calls, repeat=9)) / calls / texts * 1e6


def measure_bytes_per_entry(frames: dict[str, bytes]) -> float:
    """Return the bytes that a decoded entry keeps allocated, without its key."""
    gc.collect()
    tracemalloc.start()
    held = decode_frames(frames, now=1.5e9)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return size / len(held.entries)


def main(count: int = 256, dimensions: int = 384) -> None:
    plain = encode_frames(make_entries(count, dimensions, "float32"))
    floor = measure_microseconds(lambda: [np.frombuffer(f, "<f4", offset=64) for f in plain.values()], count)
    print(f"{count} frames of {dimensions} dimensions, µs per text (times the floor)\n")
    print(f"{'np.frombuffer, the floor':34}{floor:8.2f}")

    def show(what: str, call: Callable[[], object], texts: int = count) -> None:
        each = measure_microseconds(call, texts)
        print(f"{what:34}{each:8.2f}   {each / floor:5.1f}x")

    for dtype in get_args(Dtype):
        items = make_entries(count, dimensions, dtype)
        frames = encode_frames(items)
        first = dict([next(iter(frames.items()))])
        matrix = np.stack([entry.vector for entry in items.values()])
        described = {key: entry._replace(metadata={"source": "a.md", "chunk": 3}) for key, entry in items.items()}
        with_metadata = encode_frames(described)
        show(f"encode {dtype}", lambda items=items: encode_frames(items))
        show(f"decode {dtype}", lambda f=frames, d=dtype: decode_frames(f, now=1.5e9, dtype=d, dimensions=dimensions))
        show(f"decode {dtype}, one frame", lambda f=first, d=dtype: decode_frames(f, now=1.5e9, dtype=d), 1)
        show(f"encode {dtype}, metadata", lambda items=described: encode_frames(items))
        show(f"decode {dtype}, metadata", lambda f=with_metadata, d=dtype: decode_frames(f, now=1.5e9, dtype=d))
        show(f"round to {dtype}", lambda m=matrix, d=dtype: round_vectors(m, d))
    show("freeze_rows", lambda: freeze_rows(matrix))
    each = measure_bytes_per_entry(plain)
    print(f"\nmemory of a float32 entry: {each:.0f} bytes, {each / (4 * dimensions):.2f}x its payload")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
