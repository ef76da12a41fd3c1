"""Measure how fast importers read: seconds, CPU time and peak memory, against the floor of reading the same bytes.

    python benchmarks/import_speed.py                          # 1,000,000 texts, 384 dimensions, 15 GB in the folder
    python benchmarks/import_speed.py --rows 100000 --repeats 5
    python benchmarks/import_speed.py --only parquet

"floor" reads the same columns or files with nothing but the library of the format. "importer" reads them with the
importer. "store" stores as many vectors, which are in memory, in a new disk tier. "command" is `embedonce import` into
a new disk tier, without a verification, because no provider makes these random vectors.

Each measurement is a process of its own, so that its peak memory is its own. The processes of a case take turns, and
the table shows the fastest repeat, because other work on the machine can only make a repeat slower. The peak memory
includes Python, numpy and the library that reads the store; "start" is a process that only imports them.

To add a case, add a :class:`Case` to :data:`CASES`: how to write the store, the floor, and the importer's options.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 10_000
"""Number of texts that are written at a time."""


@dataclass(frozen=True, slots=True)
class Case:
    """A store, and two ways to read all of it. Each of them yields numbers of texts."""

    write: Callable[[Path, Iterator[tuple[list[str], Any]]], None]
    """Writes the store to a path that does not exist, from blocks of texts and vectors."""
    floor: Callable[[Path], Iterator[int]]
    """Reads the same columns or files with nothing but the library of the format."""
    start: Callable[[], None]
    """Imports what ``floor`` needs."""
    importer: Callable[[Path], Iterator[int]]
    """Reads with the importer."""
    type: str
    """Name of the importer."""
    options: Sequence[str] = ()
    """Options of the command."""
    has_texts: bool = True
    """Whether the store has texts. Otherwise they are in a file beside it, one per line."""


def make_blocks(rows: int, dimensions: int) -> Iterator[tuple[list[str], Any]]:
    """Yield blocks of texts of about 250 characters, and their vectors of shape (n, dimensions)."""
    chance = np.random.default_rng(0)
    for start in range(0, rows, BLOCK):
        numbers = range(start, min(start + BLOCK, rows))
        texts = [f"passage {number}: " + "some words of a passage, " * 9 for number in numbers]
        yield texts, chance.standard_normal((len(texts), dimensions), np.float32)


def write_parquet(path: Path, blocks: Iterator[tuple[list[str], Any]]) -> None:
    """Write one row group, which is the worst case for memory."""
    import pyarrow
    import pyarrow.parquet

    tables = []
    for texts, vectors in blocks:
        offsets = pyarrow.array(np.arange(0, vectors.size + 1, vectors.shape[1], np.int64))
        column = pyarrow.LargeListArray.from_arrays(offsets, pyarrow.array(vectors.reshape(-1)))
        tables.append(pyarrow.table({"text": texts, "vector": column}))
    table = pyarrow.concat_tables(tables)
    pyarrow.parquet.write_table(table, path, row_group_size=max(table.num_rows, 1), store_schema=False)


def read_parquet(path: Path) -> Iterator[int]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
        for batch in file.iter_batches(batch_size=2048, columns=["text", "vector"]):
            yield batch.num_rows


def scan_table(path: Path) -> Iterator[int]:
    from embedonce_importers.table import TableImporter

    for part in TableImporter(path=path).scan():
        assert np.asarray(part.vectors).shape[0] == len(part.texts)
        yield len(part.texts)


def import_pyarrow() -> None:
    import pyarrow.parquet  # noqa: F401


def write_langchain(path: Path, blocks: Iterator[tuple[list[str], Any]]) -> None:
    """Write the files of CacheBackedEmbeddings over a LocalFileStore, with the key encoder sha256.

    ``tests/importers/test_langchain.py`` shows that LangChain itself writes these files.
    """
    path.mkdir()
    with open(find_texts(path), "w", encoding="utf-8") as lines:
        for texts, vectors in blocks:
            for text, row in zip(texts, vectors.tolist(), strict=True):
                lines.write(f"{text}\n")
                name = f"model{hashlib.sha256(text.encode()).hexdigest()}"
                (path / name).write_text(json.dumps(row))


def find_texts(path: Path) -> Path:
    return path.with_suffix(".txt")


def read_texts(path: Path) -> Iterator[list[str]]:
    with open(find_texts(path), encoding="utf-8") as lines:
        while batch := [line.rstrip("\n") for line in itertools.islice(lines, 1024)]:
            yield batch


def read_langchain(path: Path) -> Iterator[int]:
    import orjson

    for texts in read_texts(path):
        for text in texts:
            name = f"{path}/model{hashlib.sha256(text.encode()).hexdigest()}"
            file = os.open(name, os.O_RDONLY)
            content = os.read(file, 2**20)
            os.close(file)
            np.array(orjson.loads(content), np.float32)
        yield len(texts)


def look_up_langchain(path: Path) -> Iterator[int]:
    from embedonce_importers.langchain import LangChainImporter

    importer = LangChainImporter(path=path, namespace="model", key_encoder="sha256")
    for texts in read_texts(path):
        yield len(importer.lookup(texts).texts)


def import_orjson() -> None:
    import orjson  # noqa: F401


CASES: Mapping[str, Case] = {
    "parquet": Case(write_parquet, read_parquet, import_pyarrow, scan_table, "table"),
    "langchain": Case(
        write_langchain,
        read_langchain,
        import_orjson,
        look_up_langchain,
        "langchain",
        ("--option", "namespace=model", "--option", "key_encoder=sha256"),
        has_texts=False,
    ),
}
WAYS = ("start", "floor", "importer", "store", "command")


def store_vectors(folder: Path, rows: int, dimensions: int) -> int:
    """Store vectors in a new disk tier."""
    import embedonce

    with embedonce.open(write_config(folder, dimensions)) as cache:
        for texts, vectors in make_blocks(rows, dimensions):
            for start in range(0, len(texts), 2048):
                cache.put(texts[start : start + 2048], vectors[start : start + 2048])
    return rows


def run_command(case: Case, path: Path, folder: Path, dimensions: int) -> int:
    """Import the store into a new disk tier."""
    from typer.testing import CliRunner

    from embedonce.cli import app

    arguments = ["import", str(path), "--from", case.type, *case.options, "--verify", "0", "--json"]
    arguments += ["--config", str(write_config(folder, dimensions))]
    if not case.has_texts:
        arguments += ["--texts", str(find_texts(path)), "--split", "line"]
    result = CliRunner().invoke(app, arguments)
    if result.exit_code:
        raise SystemExit(result.output)
    return int(json.loads(result.stdout)["imported"])


def write_config(folder: Path, dimensions: int) -> Path:
    file = folder / "embedonce.toml"
    file.write_text(
        f'[provider]\ntype = "ngram"\ndimensions = {dimensions}\n[[tiers]]\ntype = "disk"\npath = "vectors"\n',
        encoding="utf-8",
    )
    return file


def measure(one: Case, way: str, path: Path, rows: int, dimensions: int) -> dict[str, float]:
    """Return the seconds, the CPU seconds, the peak memory in MB, and the number of texts of one way."""
    count = 0
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        started, cpu = time.perf_counter(), time.process_time()
        match way:
            case "start":
                one.start()
            case "store":
                count = store_vectors(Path(folder), rows, dimensions)
            case "command":
                count = run_command(one, path, Path(folder), dimensions)
            case _:
                count = sum((one.floor if way == "floor" else one.importer)(path))
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return {"seconds": seconds, "cpu": cpu, "megabytes": read_peak_memory() / 1e6, "texts": count}


def read_peak_memory() -> float:
    """Return the most bytes of memory that this process has used."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux; there, ru_maxrss also counts what the parent used before it started this process
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert found is not None
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_child(name: str, way: str, path: Path, rows: int, dimensions: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", name, way, str(path)]
    command += ["--rows", str(rows), "--dimensions", str(dimensions)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


def print_case(name: str, rows: int, found: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    print(f"\n### {name}: {rows:,} texts\n")
    print("| | seconds | CPU seconds | µs per text | peak memory, MB |\n| --- | ---: | ---: | ---: | ---: |")
    for way, runs in found.items():
        best = min(runs, key=lambda run: run["seconds"])
        each = f"{best['seconds'] / rows * 1e6:.2f}" if best["texts"] else ""
        memory = max(run["megabytes"] for run in runs)
        print(f"| {way} | {best['seconds']:.2f} | {min(run['cpu'] for run in runs):.2f} | {each} | {memory:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--folder", type=Path, help="folder for the stores, which are kept and used again")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, way, path = options.child
        print(json.dumps(measure(CASES[name], way, Path(path), options.rows, options.dimensions)))
        return
    if options.rows < 1 or options.repeats < 1:
        parser.error("--rows and --repeats must be at least 1")
    with tempfile.TemporaryDirectory() if options.folder is None else nullcontext(options.folder) as folder:
        for name in options.only:
            path = Path(folder, f"{name}-{options.rows}-{options.dimensions}")
            if not path.exists():
                CASES[name].write(path, make_blocks(options.rows, options.dimensions))
            found: dict[str, list[dict[str, float]]] = {way: [] for way in options.ways}
            for _ in range(options.repeats):
                for way in options.ways:
                    found[way].append(run_child(name, way, path, options.rows, options.dimensions))
            counts = {run["texts"] for way, runs in found.items() for run in runs if way != "start"}
            if counts != {options.rows}:
                raise SystemExit(f"{name}: read {counts} texts instead of {options.rows:,}")
            print_case(name, options.rows, found)


if __name__ == "__main__":
    main()
