"""Compare file formats for an immutable store of vectors: Arrow, Parquet and Lance, beside LMDB.

    python benchmarks/bundle_formats.py                  # 400,000 vectors of 384 dimensions, 7 GB in the folder
    python benchmarks/bundle_formats.py --rows 1000000
    python benchmarks/bundle_formats.py --only Arrow LMDB

"open" is the time from a path to a store that can be read, in a new process that has imported its library. "batch"
reads 1,024 random keys into one matrix, and "single" reads one key. All stores read the same keys in turn, repeat by
repeat, after everything has been read once; the table shows the fastest repeat, because other work on the machine can
only make a repeat slower. The memory is that of one of several processes that have each read all batches: its share of
the memory (PSS), and the memory that only it has, without what the process had before it opened the store (Linux).

The second table shows which programs open the files: the time to count the rows and to compute the mean length of the
vectors, in a new process. To add a format, add a store to :data:`format_stores.STORES`.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from format_stores import STORES, Block, Store

BATCH = 1024
BLOCK = 16_384
"""Number of rows that are written at a time."""
SINGLES = 200
MAX_SECONDS = 1.0
"""A store whose batch takes longer is read only three times."""
SCOPE = "0123456789abcdef"


def make_keys(rows: int) -> list[str]:
    """Return sorted keys of one vector space."""
    return [f"eo1.{SCOPE}.{digest}" for digest in sorted(hashlib.sha256(b"%d" % at).hexdigest() for at in range(rows))]


def make_blocks(keys: Sequence[str], dimensions: int) -> Iterator[Block]:
    """Yield random vectors of length 1 in the order of their keys."""
    chance = np.random.default_rng(0)
    for start in range(0, len(keys), BLOCK):
        block = list(keys[start : start + BLOCK])
        vectors = chance.standard_normal((len(block), dimensions), np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        yield Block(block, vectors, np.full(len(block), 1.7e9))


def choose_batches(keys: Sequence[str], count: int) -> list[list[str]]:
    chance = random.Random(1)
    return [chance.sample(keys, min(BATCH, len(keys))) for _ in range(count)]


# --- one process ----------------------------------------------------------------------------------


def read_memory() -> dict[str, int]:
    """Return the bytes of memory of this process: RSS, PSS, and what only it has."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    except FileNotFoundError:  # not Linux
        return {"rss": 0, "pss": 0, "private": 0}
    sizes = {name: int(size.split()[0]) * 1024 for name, size in (line.split(":") for line in lines)}
    return {"rss": sizes["Rss"], "pss": sizes["Pss"], "private": sizes["Private_Clean"] + sizes["Private_Dirty"]}


def run_child(store: Store, rows: int, batches: int) -> None:
    """Open the store and read it, and print what it took. Wait for a line before the memory is read."""
    keys = make_keys(rows)
    work = choose_batches(keys, batches)
    del keys
    store.import_library()
    gc.collect()
    before = read_memory()
    start = time.perf_counter()
    store.open()
    opened = time.perf_counter() - start
    start = time.perf_counter()
    store.get(work[0][0])
    first = time.perf_counter() - start
    for batch in work if batches > 1 else ():  # with one batch, only the opening is measured
        store.get_many(batch)
    print(json.dumps({"open": opened, "first": first}), flush=True)
    sys.stdin.readline()  # the parent writes it when all processes have read everything
    gc.collect()
    after = read_memory()
    print(json.dumps({name: after[name] - before[name] for name in after}), flush=True)
    sys.stdin.readline()
    store.close()


def measure_processes(cls: type[Store], folder: Path, rows: int, batches: int, count: int) -> list[dict[str, float]]:
    """Let several processes read the store at once, and return what each of them took."""
    command = [sys.executable, __file__, "--child", cls.__name__, "--folder", str(folder)]
    command += ["--rows", str(rows), "--batches", str(batches)]
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)
    ]
    found: list[dict[str, float]] = [{} for _ in children]
    try:
        for _ in range(2):
            for child, answer in zip(children, found, strict=True):
                assert child.stdout is not None
                answer |= json.loads(child.stdout.readline())
            for child in children:
                assert child.stdin is not None
                child.stdin.write("\n")
                child.stdin.flush()
    finally:
        for child in children:
            child.communicate()
    return found


# --- all stores in turn ---------------------------------------------------------------------------


def measure(stores: Sequence[Store], keys: Sequence[str], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return µs per text of batches and of single reads, quickest and median, by name of store."""
    work = choose_batches(keys, options.batches)
    found: dict[str, dict[str, float]] = {}
    repeats = {store.name: options.repeats for store in stores}
    expected: Any = None
    for store in stores:
        store.open()
        start = time.perf_counter()
        for batch in work:
            matrix = store.get_many(batch)
        if (time.perf_counter() - start) / len(work) > MAX_SECONDS:
            repeats[store.name] = min(3, options.repeats)
        if isinstance(matrix, np.ndarray):
            expected = matrix if expected is None else expected
            assert np.array_equal(matrix, expected), store.name
    batches: dict[str, list[float]] = {store.name: [] for store in stores}
    singles: dict[str, list[float]] = {store.name: [] for store in stores}
    for repeat in range(options.repeats):
        batch = work[repeat % len(work)]
        for store in stores:
            if repeat < repeats[store.name]:
                batches[store.name].append(_time(lambda s=store, b=batch: s.get_many(b)) / len(batch))  # type: ignore[misc]
        alone = batch[: SINGLES // 10]
        for store in stores:
            if repeat < repeats[store.name]:
                each = _time(lambda s=store, a=alone: [s.get(key) for key in a])  # type: ignore[misc]
                singles[store.name].append(each / len(alone))
    for store in stores:
        store.close()
        name = store.name
        found[name] = {
            "batch": min(batches[name]) * 1e6,
            "median": statistics.median(batches[name]) * 1e6,
            "single": min(singles[name]) * 1e6,
        }
    return found


def _time(call: Callable[[], object]) -> float:
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    gc.enable()
    return seconds


# --- other programs -------------------------------------------------------------------------------


def open_with_pandas(store: Store) -> tuple[int, float]:
    import pandas

    match store.kind:
        case "arrow":
            frame = pandas.read_feather(store.target, columns=["vector"])
        case "parquet":
            frame = pandas.read_parquet(store.target, columns=["vector"])
        case _:
            import lance

            frame = lance.dataset(store.target).to_table(columns=["vector"]).to_pandas()
    lengths = np.fromiter((np.linalg.norm(row) for row in frame["vector"]), np.float64, len(frame))
    return len(frame), float(lengths.mean())


def open_with_polars(store: Store) -> tuple[int, float]:
    import polars

    match store.kind:
        case "arrow":
            frame = polars.scan_ipc(store.target)
        case "parquet":
            frame = polars.scan_parquet(store.target)
        case _:
            import lance

            frame = polars.scan_pyarrow_dataset(lance.dataset(store.target))
    squares = polars.col("vector").cast(polars.List(polars.Float32)).list.eval(polars.element().pow(2)).list.sum()
    rows, length = frame.select(polars.len(), squares.sqrt().mean().alias("length")).collect().row(0)
    return int(rows), float(length)


def open_with_duckdb(store: Store) -> tuple[int, float]:
    import duckdb

    with duckdb.connect() as connection:
        match store.kind:
            case "arrow":
                import pyarrow.dataset

                connection.register("bundle", pyarrow.dataset.dataset(store.target, format="ipc"))
            case "parquet":
                connection.execute(f"CREATE VIEW bundle AS SELECT * FROM read_parquet('{store.target}')")
            case _:
                import lance

                connection.register("bundle", lance.dataset(store.target))
        lengths = "avg(sqrt(list_sum(list_transform(vector::FLOAT[], lambda x: x * x))))"
        found = connection.execute(f"SELECT count(*), {lengths} FROM bundle").fetchone()
        assert found is not None
        return int(found[0]), float(found[1])


OPENERS: Mapping[str, tuple[str, Callable[[Store], tuple[int, float]]]] = {
    "pandas": ("pandas", open_with_pandas),
    "Polars": ("polars", open_with_polars),
    "DuckDB": ("duckdb", open_with_duckdb),
}
"""The module that each program requires, and what opens a store with it."""


def run_opener(program: str, store: Store, rows: int) -> None:
    """Open the store with another program, and print how long a query over all vectors took."""
    module, opener = OPENERS[program]
    importlib.import_module(module)
    start = time.perf_counter()
    count, length = opener(store)
    seconds = time.perf_counter() - start
    if count != rows or abs(length - 1) > 1e-3:
        raise RuntimeError(f"{program} read {count:,} rows with a mean length of {length}")
    print(json.dumps({"seconds": seconds}))


def measure_programs(stores: Sequence[Store], folder: Path, rows: int) -> None:
    names = [name for name, (module, _) in OPENERS.items() if importlib.util.find_spec(module) is not None]
    print("\n### A query over all vectors, in seconds\n")
    print(f"| | {' | '.join(names)} |\n| --- |{' ---: |' * len(names)}")
    for store in {store.path: store for store in stores if store.kind != "lmdb"}.values():
        cells = []
        for program in names:
            command = [sys.executable, __file__, "--open-with", program, type(store).__name__]
            command += ["--folder", str(folder), "--rows", str(rows)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            error = done.stderr.strip().splitlines()[-1:] or [""]
            cells.append(f"{json.loads(done.stdout)['seconds']:.2f}" if done.returncode == 0 else error[0][:100])
        print(f"| {store.name.split(',')[0] if store.kind != 'parquet' else store.name} | {' | '.join(cells)} |")


# --- the run --------------------------------------------------------------------------------------


def write_store(store: Store, keys: Sequence[str], dimensions: int) -> float:
    """Write the store to disk, and return the seconds without the making of the rows."""
    start, making = time.perf_counter(), 0.0

    def blocks() -> Iterator[Block]:
        nonlocal making
        source = make_blocks(keys, dimensions)
        while True:
            began = time.perf_counter()
            block = next(source, None)
            making += time.perf_counter() - began
            if block is None:
                return
            yield block

    store.write(blocks())
    os.sync()
    return time.perf_counter() - start - making


def run(options: argparse.Namespace, folder: Path) -> None:
    keys = make_keys(options.rows)
    stores = []
    for cls in STORES:
        if options.only and not any(word.lower() in cls.name.lower() for word in options.only):
            continue
        if importlib.util.find_spec(cls.requires) is None:
            print(f"(skipped: {cls.name}: {cls.requires} is not installed)", file=sys.stderr)
            continue
        stores.append(cls(folder))
    written: dict[str, float] = {}
    for store in stores:
        if store.path not in written:
            store.remove()
            written[store.path] = write_store(store, keys, options.dimensions)
    found = measure(stores, keys, options)
    for store in stores:
        alone = [measure_processes(type(store), folder, options.rows, 1, 1)[0] for _ in range(options.openings)]
        together = measure_processes(type(store), folder, options.rows, options.batches, options.processes)
        found[store.name] |= {
            "open": min(each["open"] for each in alone) * 1e3,
            "first": min(each["first"] for each in alone) * 1e3,
            "pss": statistics.median(each["pss"] for each in together) / 1e6,
            "private": statistics.median(each["private"] for each in together) / 1e6,
        }
    payload = options.rows * options.dimensions * 4
    read = min(len(keys), BATCH) * options.batches * options.dimensions * 4 / 1e6
    print(f"### {options.rows:,} vectors of {options.dimensions} dimensions, {payload / 1e6:,.0f} MB\n")
    print(f"Each of {options.processes} processes has read {options.batches} batches, {read:,.0f} MB of vectors.\n")
    print(
        "| | MB | written, s | open, ms | first key, ms | batch, µs per text | times the floor | median | single, µs ",
        end="",
    )
    print("| PSS, MB | private, MB |\n| --- |" + " ---: |" * 10)
    floor = found[stores[0].name]["batch"]
    for store in stores:
        one = found[store.name]
        cells = [f"{store.count_bytes() / 1e6:,.0f}", f"{written[store.path]:.1f}", f"{one['open']:.1f}"]
        cells += [f"{one['first']:.2f}", f"{one['batch']:.2f}", f"{one['batch'] / floor:.2f}", f"{one['median']:.2f}"]
        cells += [f"{one['single']:.1f}", f"{one['pss']:.0f}", f"{one['private']:.0f}"]
        print(f"| {store.name} | {' | '.join(cells)} |")
    measure_programs(stores, folder, options.rows)
    if not options.keep:
        for store in stores:
            store.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--batches", type=int, default=10, help="number of different batches")
    parser.add_argument("--openings", type=int, default=7)
    parser.add_argument("--processes", type=int, default=4, help="number of processes that read at once")
    parser.add_argument("--only", nargs="*", help="stores whose names have one of these words")
    parser.add_argument("--folder", type=Path, help="folder for the stores; without it, a temporary one")
    parser.add_argument("--keep", action="store_true", help="keep the stores in the folder")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--open-with", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(options.rows, options.repeats, options.batches, options.openings, options.processes) < 1:
        parser.error("--rows, --repeats, --batches, --openings and --processes must be at least 1")
    stores = {cls.__name__: cls for cls in STORES}
    if options.child:
        run_child(stores[options.child](options.folder), options.rows, options.batches)
    elif options.open_with:
        program, name = options.open_with
        run_opener(program, stores[name](options.folder), options.rows)
    else:
        with tempfile.TemporaryDirectory() if options.folder is None else nullcontext(options.folder) as folder:
            run(options, Path(folder))


if __name__ == "__main__":
    main()
