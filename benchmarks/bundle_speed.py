"""Measure a bundle of 1,000,000 entries beside LMDB and the disk tier: size, opening, hits, and memory of processes.

    python benchmarks/bundle_speed.py                     # about ten minutes, and up to 12 GB in the folder
    python benchmarks/bundle_speed.py --entries 100000
    python benchmarks/bundle_speed.py --opening 10000000  # also how long a bundle of that size takes to open

A disk tier gets random vectors of length 1, and `embedonce export` writes them to a bundle. LMDB, and the plugin `lmdb`
of `examples/plugins/lmdb`, get the same vectors.

"raw" reads 2,000 random keys from the store alone, and "cache" reads the vectors of 2,000 texts into one matrix with
`Cache.embed_batch`. All stores read the same keys in turn, repeat by repeat, after everything has been read once. The
table shows the fastest repeat, because other work on the machine can only make a repeat slower. There are only two
batches, so that the caches remember the keys of all texts. "open" is the time until the first vector is there, from the
store alone and from a new cache, in a new process that has imported embedonce and numpy. A library that only one store
needs is part of its time.

The memory is that of one of several processes that read all batches through their caches at once: its share of the
memory (PSS), and the memory that only it has, without what it had before it opened the store (Linux).
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

import embedonce
from embedonce_providers.ngram import NgramProvider

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "plugins" / "lmdb" / "src"))

BATCH = 2000
BLOCK = 8192
"""Number of texts that are stored at a time."""
SINGLES = 100
MAX_BYTES = 2**40
"""Size limit of the tiers that have one, so that none of them evicts."""


def make_text(number: int) -> str:
    """Return a text of about 170 characters."""
    return f"passage {number}: " + "some words of a passage, " * 6


def make_vectors(chance: np.random.Generator, count: int, dimensions: int) -> Any:
    """Return random rows of length 1."""
    vectors = chance.standard_normal((count, dimensions), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def choose_batches(entries: int, count: int) -> list[list[str]]:
    chance = random.Random(1)
    return [list(map(make_text, chance.sample(range(entries), min(BATCH, entries)))) for _ in range(count)]


# --- the stores -----------------------------------------------------------------------------------


class Store:
    """A store under test: as the tier of a cache, and alone."""

    name: ClassVar[str]
    requires: ClassVar[str] = ""
    """The module that the store requires; "" if it is always there."""
    is_tier: ClassVar[bool] = True

    def __init__(self, root: Path, dimensions: int) -> None:
        self.root = root
        self.path = root / type(self).__name__.lower()
        self.dimensions = dimensions
        self.raw: Any = None
        self.cache: Any = None

    def fill(self, entries: int) -> None:
        """Store the entries. The store does not exist yet."""
        self.open("read-through")
        for texts, vectors in make_blocks(entries, self.dimensions):
            self.cache.put(texts, vectors)
        self.close()

    def make_backend(self) -> Any:
        raise NotImplementedError

    def open(self, mode: Literal["read-through", "replay"] = "replay") -> None:
        """Open the store as a tier. The same backend is used as the raw store. In a replay, nothing is computed."""
        self.open_raw()
        self.cache = embedonce.Cache(NgramProvider(dimensions=self.dimensions), [self.raw], mode=mode)

    def open_raw(self) -> None:
        self.raw = self.make_backend()

    def get_many(self, keys: list[str]) -> Any:
        return self.raw.get_many(keys)

    def get(self, key: str) -> Any:
        return self.raw.get(key)

    def close(self) -> None:
        for opened in (self.cache, self.raw):
            if opened is not None:
                opened.close()
        self.cache = self.raw = None

    def read_files(self) -> None:
        """Read all files once, so that the system has them in memory.

        The PSS depends on it, because a page that is read brings its neighbours along if they are in memory.
        """
        for path in self.path.rglob("*"):
            if path.is_file():
                with path.open("rb", buffering=0) as file:
                    while file.read(2**24):
                        pass

    def count_bytes(self) -> int:
        files = [file for file in self.path.rglob("*") if file.is_file()]
        return sum(min(file.stat().st_size, file.stat().st_blocks * 512) for file in files)


def make_keys(texts: list[str], dimensions: int) -> list[str]:
    """Return the stored keys of texts."""
    with embedonce.Cache(NgramProvider(dimensions=dimensions)) as cache:
        return cache.keys(texts)


class Disk(Store):
    name = "disk tier"

    def make_backend(self) -> Any:
        from embedonce_backends.disk import DiskBackend

        return DiskBackend(path=self.path, max_bytes=MAX_BYTES)


class Bundle(Store):
    name = "**bundle**"
    requires = "pyarrow"

    def fill(self, entries: int) -> None:
        disk = Disk(self.root, self.dimensions).path
        config = self.root / "embedonce.toml"
        provider = f'[provider]\ntype = "ngram"\ndimensions = {self.dimensions}\n'
        config.write_text(f'{provider}[[tiers]]\ntype = "disk"\npath = "{disk}"\nmax_bytes = {MAX_BYTES}\n', "utf-8")
        command = [sys.executable, "-m", "embedonce", "export", "--config", str(config), "--out", str(self.path)]
        subprocess.run([*command, "--quiet"], check=True)

    def make_backend(self) -> Any:
        from embedonce_backends.bundle import BundleBackend

        return BundleBackend(path=self.path)

    def read_parts(self) -> Iterator[tuple[list[str], Any]]:
        """Yield the keys and the vectors of the bundle in the order of the keys."""

        for file in sorted(self.path.glob("*.arrow"), key=lambda file: _open_part(file).column("key")[0].as_py()):
            part = _open_part(file)
            for start in range(0, len(part), BLOCK):
                rows = part.slice(start, BLOCK)
                values = rows.column("vector").flatten().to_numpy().reshape(len(rows), -1)
                yield rows.column("key").to_pylist(), values


def _open_part(file: Path) -> Any:
    import pyarrow
    import pyarrow.ipc

    return pyarrow.ipc.open_file(pyarrow.memory_map(str(file))).get_batch(0)


class LmdbTier(Store):
    name = "plugin `lmdb` as a tier"
    requires = "lmdb"

    def make_backend(self) -> Any:
        from embedonce_lmdb.backend import LmdbBackend

        return LmdbBackend(path=self.path, max_bytes=MAX_BYTES, sync=False)


class Lmdb(Store):
    """The floor: one transaction and one getmulti. The keys are the 32 bytes of the digests."""

    name = "LMDB, `getmulti` alone"
    requires = "lmdb"
    is_tier = False

    def fill(self, entries: int) -> None:
        import lmdb

        self.path.mkdir()
        with lmdb.open(str(self.path), map_size=MAX_BYTES, sync=False, metasync=False) as handle:
            for keys, vectors in Bundle(self.root, self.dimensions).read_parts():
                pairs = [(make_name(key), row.tobytes()) for key, row in zip(keys, vectors, strict=True)]
                with handle.begin(write=True) as transaction, transaction.cursor() as cursor:
                    cursor.putmulti(pairs, append=True)

    def open(self, mode: Literal["read-through", "replay"] = "replay") -> None:
        self.open_raw()

    def make_backend(self) -> Any:
        import lmdb

        return lmdb.open(str(self.path), map_size=MAX_BYTES, readonly=True, lock=False, readahead=False)

    def get_many(self, keys: list[str]) -> Any:
        names = list(map(make_name, keys))
        with self.raw.begin() as transaction, transaction.cursor() as cursor:
            return cursor.getmulti(names)

    def get(self, key: str) -> Any:
        with self.raw.begin() as transaction:
            return transaction.get(make_name(key))


def make_name(key: str) -> bytes:
    """Return the digest of a key."""
    return bytes.fromhex(key[-64:])


class LmdbMatrix(Lmdb):
    name = "LMDB, `getmulti` and a matrix"

    def __init__(self, root: Path, dimensions: int) -> None:
        super().__init__(root, dimensions)
        self.path = root / "lmdbcopy"  # a process can open a folder of LMDB only once

    def get_many(self, keys: list[str]) -> Any:
        values = b"".join([value for _, value in super().get_many(keys)])
        return np.frombuffer(values, np.float32).reshape(len(keys), -1)

    def get(self, key: str) -> Any:
        return np.frombuffer(super().get(key), np.float32)


STORES: Sequence[type[Store]] = (Lmdb, LmdbMatrix, Disk, Bundle, LmdbTier)


def make_blocks(entries: int, dimensions: int) -> Iterator[tuple[list[str], Any]]:
    chance = np.random.default_rng(0)
    for start in range(0, entries, BLOCK):
        texts = list(map(make_text, range(start, min(start + BLOCK, entries))))
        yield texts, make_vectors(chance, len(texts), dimensions)


# --- one process ----------------------------------------------------------------------------------


def read_memory() -> dict[str, int]:
    """Return the bytes of memory that are this process's share, and those that only it has."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    except FileNotFoundError:  # not Linux
        return {"pss": 0, "private": 0}
    sizes = {name: int(size.split()[0]) * 1024 for name, size in (line.split(":") for line in lines)}
    return {"pss": sizes["Pss"], "private": sizes["Private_Clean"] + sizes["Private_Dirty"]}


def run_child(store: Store, way: str, entries: int, batches: int) -> None:
    """Open the store, and print how long the first vector took. Then read everything, and print the memory."""
    work = choose_batches(entries, batches)
    key = make_keys(work[0][:1], store.dimensions)[0]
    gc.collect()
    before = read_memory()
    start = time.perf_counter()
    if way == "raw":
        store.open_raw()
        assert store.get(key) is not None
    else:
        store.open()
        store.cache.embed(work[0][0])
    print(json.dumps({"open": time.perf_counter() - start}), flush=True)
    for texts in work if batches > 1 else ():
        store.cache.embed_batch(texts) if store.is_tier else store.get_many(make_keys(texts, store.dimensions))
    print(json.dumps({"ready": True}), flush=True)
    sys.stdin.readline()  # the parent writes it when all processes have read everything
    gc.collect()
    after = read_memory()
    print(json.dumps({name: after[name] - before[name] for name in after}), flush=True)
    sys.stdin.readline()
    store.close()


def run_children(store: Store, way: str, entries: int, batches: int, count: int) -> list[dict[str, float]]:
    """Open the store in several processes at once, and return what each of them took."""
    command = [sys.executable, __file__, "--child", type(store).__name__, way, "--folder", str(store.root)]
    command += ["--entries", str(entries), "--batches", str(batches), "--dimensions", str(store.dimensions)]
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)
    ]
    found: list[dict[str, float]] = [{} for _ in children]
    try:
        for step in ("open", "read", "memory"):
            for child, answer in zip(children, found, strict=True):
                assert child.stdout is not None
                answer |= json.loads(child.stdout.readline())
            for child in children if step != "open" else ():
                assert child.stdin is not None
                child.stdin.write("\n")
                child.stdin.flush()
    finally:
        for child in children:
            child.communicate()
    return found


# --- all stores in turn ---------------------------------------------------------------------------


def measure(stores: Sequence[Store], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return µs per text of the raw store and of the cache, for batches and single texts, by name of store."""
    work = choose_batches(options.entries, options.batches)
    keys = [make_keys(texts, options.dimensions) for texts in work]
    expected = None
    for store in stores:
        store.open()
        for texts in work if store.is_tier else ():
            matrix = store.cache.embed_batch(texts)
        if store.is_tier:
            expected = matrix if expected is None else expected
            assert np.array_equal(matrix, expected), f"{store.name} has other vectors"
    few = slice(0, SINGLES)
    # The cache reads another batch than the raw store has just read. Otherwise it would find the vectors in the
    # processor's caches. For the same reason, the stores take turns within each way.
    ways: dict[str, Callable[[Store, int], object]] = {
        "raw": lambda store, at: store.get_many(keys[at]),
        "cache": lambda store, at: store.cache.embed_batch(work[at - 1]),
        "raw single": lambda store, at: [store.get(key) for key in keys[at][few]],
        "cache single": lambda store, at: [store.cache.embed(text) for text in work[at - 1][few]],
    }
    calls = {
        (store.name, way): partial(call, store)
        for way, call in ways.items()
        for store in stores
        if store.is_tier or way.startswith("raw")
    }
    times: dict[tuple[str, str], list[float]] = {name: [] for name in calls}
    for repeat in range(options.repeats + options.batches):
        at = repeat % options.batches
        for name, call in calls.items():
            gc.collect()
            gc.disable()
            start = time.perf_counter()
            call(at)
            seconds = time.perf_counter() - start
            gc.enable()
            if repeat >= options.batches:  # the calls before were the first ones
                times[name].append(seconds / len(work[at][few] if "single" in name[1] else work[at]) * 1e6)
    found: dict[str, dict[str, float]] = {store.name: {} for store in stores}
    for (store_name, way), values in times.items():
        found[store_name] |= {way: min(values), f"{way} median": statistics.median(values)}
    for store in stores:
        store.close()
    return found


def print_hits(stores: Sequence[Store], found: dict[str, dict[str, float]], title: str, ways: tuple[str, str]) -> None:
    raw, cache = ways
    floor = found[stores[0].name][raw]
    print(f"\n### {title}, in µs per text\n")
    print("| | raw | median | times `getmulti` | cache | median | times `getmulti` |\n| --- |" + " ---: |" * 6)
    for store in stores:
        one = found[store.name]
        cells = [f"{one[raw]:.2f}", f"{one[raw + ' median']:.2f}", f"{one[raw] / floor:.2f}"]
        if cache in one:
            cells += [f"{one[cache]:.2f}", f"{one[cache + ' median']:.2f}", f"{one[cache] / floor:.2f}"]
        print(f"| {store.name} | {' | '.join([*cells, '', '', ''][:6])} |")


def print_opening(stores: Sequence[Store], options: argparse.Namespace) -> None:
    how = (options.entries, options.batches, options.processes)
    together: dict[str, list[dict[str, float]]] = {}
    for store in stores:
        store.read_files()
        together[store.name] = run_children(store, "cache" if store.is_tier else "raw", *how)
    print(f"\n### Opening, and {options.processes} processes at once\n")
    print("| | MB | bytes per entry | open alone, ms | open in a cache, ms | at once, ms | PSS, MB | private, MB |")
    print("| --- |" + " ---: |" * 7)
    for store in stores:
        size = store.count_bytes()
        cells = [f"{size / 1e6:,.0f}", f"{size / options.entries:,.0f}"]
        for way in ("raw", "cache") if store.is_tier else ("raw",):
            alone = [run_children(store, way, options.entries, 1, 1)[0]["open"] for _ in range(options.openings)]
            cells.append(f"{min(alone) * 1e3:.1f}")
        cells += [""] * (not store.is_tier)
        each = together[store.name]
        cells += [f"{statistics.median(one['open'] for one in each) * 1e3:.1f}"]
        cells += [f"{statistics.median(one[name] for one in each) / 1e6:.0f}" for name in ("pss", "private")]
        print(f"| {store.name} | {' | '.join(cells)} |")


# --- Polars, and a larger bundle ------------------------------------------------------------------


def query_with_polars(bundle: Path, key: str) -> None:
    """Query the bundle, and print the answers and the seconds that they took."""
    import polars

    lines = []
    files = str(bundle / "*.arrow")
    lengths = (polars.col("vector") * polars.col("vector")).arr.sum().sqrt()
    for name, query in {
        "count": lambda: polars.scan_ipc(files).select(polars.len()),
        "mean length of the vectors": lambda: polars.scan_ipc(files).select(lengths.mean()),
        "the row of one key": lambda: polars.scan_ipc(files).filter(polars.col("key") == key).select(lengths),
    }.items():
        start = time.perf_counter()
        answer = query().collect().item()
        lines.append(f"| {name} | {answer:,} | {time.perf_counter() - start:.3f} |")
    print("\n### Polars\n\n| query | answer | seconds |\n| --- | ---: | ---: |\n" + "\n".join(lines))


def measure_opening(options: argparse.Namespace, folder: Path) -> None:
    """Write a bundle of random entries, and measure how long it takes to open it."""
    bundle = Bundle(folder, options.dimensions)
    if not bundle.path.exists():
        start = time.perf_counter()
        write_random_bundle(bundle, options.opening)
        print(
            f"\nThe writer took {time.perf_counter() - start:,.0f} s for {options.opening:,} entries.", file=sys.stderr
        )
    key = next(bundle.read_parts())[0][0]
    command = [
        sys.executable,
        __file__,
        "--open",
        key,
        "--folder",
        str(folder),
        "--dimensions",
        str(options.dimensions),
    ]
    found = []
    for _ in range(options.openings):
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout))
    size = bundle.count_bytes()
    print(f"\n### Opening a bundle of {options.opening:,} entries, {size / 1e9:.1f} GB\n")
    print("| | ms, fastest | ms, median |\n| --- | ---: | ---: |")
    names = {"imports": "importing pyarrow and the backend", "open": "opening", "first": "the first vector after it"}
    for name, shown in names.items():
        values = [one[name] * 1e3 for one in found]
        print(f"| {shown} | {min(values):.1f} | {statistics.median(values):.1f} |")


def open_bundle(bundle: Bundle, key: str) -> None:
    """Open the bundle in this process, and print how long each step took."""
    times = [time.perf_counter()]
    import embedonce_backends.bundle  # noqa: F401

    times.append(time.perf_counter())
    bundle.open_raw()
    found = bundle.raw.get_many([])  # a backend may open its files at the first call
    times.append(time.perf_counter())
    found = bundle.raw.get_many([key])
    times.append(time.perf_counter())
    assert list(found) == [key]
    steps = [later - earlier for earlier, later in itertools.pairwise(times)]
    print(json.dumps(dict(zip(("imports", "open", "first"), steps, strict=True))))


def write_random_bundle(bundle: Bundle, entries: int) -> None:
    """Write a bundle of one space. Its digests are random numbers in ascending order."""
    from embedonce.vectors import Block, Entries
    from embedonce_backends.bundle import BundleBackend

    chance = np.random.default_rng(0)
    scope = make_keys(["a text"], bundle.dimensions)[0][:21]
    step = np.uint64(2**64 // entries)
    with BundleBackend.create_writer(bundle.path, replace=False) as writer:
        for start in range(0, entries, BLOCK):
            count = min(BLOCK, entries - start)
            rests = chance.bytes(24 * count).hex()
            numbers = np.arange(start, start + count, dtype=np.uint64) * step
            numbers += chance.integers(0, step, count, np.uint64)
            keys = [
                f"{scope}{number:016x}{rests[48 * at : 48 * at + 48]}" for at, number in enumerate(numbers.tolist())
            ]
            dates = np.full(count, 1.7e9), np.full(count, np.inf)
            writer.add(Entries(blocks=[Block(keys, make_vectors(chance, count, bundle.dimensions), *dates)]))
        writer.commit()


# --- the run --------------------------------------------------------------------------------------


def run(options: argparse.Namespace, folder: Path) -> None:
    folder = folder / f"{options.entries}-{options.dimensions}"
    folder.mkdir(exist_ok=True)
    filled: dict[str, float] = {}
    stores = [cls(folder, options.dimensions) for cls in STORES]
    missing = {store.requires for store in stores if store.requires and not importlib.util.find_spec(store.requires)}
    if missing:
        raise SystemExit(f"{', '.join(sorted(missing))} is not installed; install the group `bench`")
    for store in sorted(stores, key=lambda store: (Disk, Bundle, LmdbTier, Lmdb, LmdbMatrix).index(type(store))):
        if not store.path.exists():
            start = time.perf_counter()
            store.fill(options.entries)
            os.sync()
            filled[store.name] = time.perf_counter() - start
    print(f"{options.entries:,} entries of {options.dimensions} dimensions, {BATCH:,} texts in a batch.")
    for name, seconds in filled.items():
        print(f"{name} was filled in {seconds:.1f} s.", file=sys.stderr)
    found = measure(stores, options)
    print_hits(stores, found, "Batch hits", ("raw", "cache"))
    print_hits(stores, found, "Single hits", ("raw single", "cache single"))
    print_opening(stores, options)
    key = make_keys([make_text(0)], options.dimensions)[0]
    if importlib.util.find_spec("polars") is not None:
        command = [sys.executable, __file__, "--query", key, "--folder", str(folder)]
        print(subprocess.run(command, check=True, capture_output=True, text=True).stdout, end="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--batches", type=int, default=2, help="number of different batches")
    parser.add_argument("--openings", type=int, default=7)
    parser.add_argument("--processes", type=int, default=4, help="number of processes that read at once")
    parser.add_argument("--opening", type=int, help="number of entries of a bundle that is only opened")
    parser.add_argument("--folder", type=Path, help="folder for the stores, which are kept and used again")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--query", help=argparse.SUPPRESS)
    parser.add_argument("--open", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(options.entries, options.repeats, options.batches, options.openings, options.processes) < 1:
        parser.error("--entries, --repeats, --batches, --openings and --processes must be at least 1")
    if options.child:
        name, way = options.child
        cls = next(cls for cls in STORES if cls.__name__ == name)
        run_child(cls(options.folder, options.dimensions), way, options.entries, options.batches)
    elif options.query:
        query_with_polars(Bundle(options.folder, options.dimensions).path, options.query)
    elif options.open:
        open_bundle(Bundle(options.folder, options.dimensions), options.open)
    else:
        with tempfile.TemporaryDirectory() if options.folder is None else nullcontext(options.folder) as folder:
            run(options, Path(folder))
            if options.opening:
                large = Path(folder, f"opening-{options.opening}-{options.dimensions}")
                large.mkdir(exist_ok=True)
                measure_opening(options, large)


if __name__ == "__main__":
    main()
