"""Compare a run of `embedonce embed` whose vectors are all stored with a script that has no cache.

    python benchmarks/warm_run.py --passages 100000

corpus.py makes the corpus from text on this machine, and a first run stores its vectors in a disk tier. Then come the
floor and the run, each in new processes, in turn. The floor reads the same files, splits them into the same passages,
hashes each passage with SHA-256, and writes the same rows, but its vectors are zeros that come from nowhere. Both write
a .npy file and its index; the index files must be equal. Of each, the quickest of the repeats counts.
"""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

CONFIGURATION = """\
[provider]
type = "ngram"
dimensions = {dimensions}

[[tiers]]
type = "memory"

[[tiers]]
type = "disk"
path = "{folder}"
"""
WINDOW = 2048
"""Rows that the floor writes at a time."""


def run_floor(corpus: Path, out: Path, dimensions: int) -> None:
    """Read, split, hash and write, without a cache."""
    rows = 0
    lines: list[str] = []
    digests: list[bytes] = []
    with out.open("wb") as matrix, out.with_suffix(".index.jsonl").open("w") as index:
        matrix.write(bytes(128))

        def flush() -> None:
            matrix.write(np.zeros((len(lines), dimensions), np.float32))
            index.write("".join(lines))
            lines.clear()
            digests.clear()

        for folder, folders, names in os.walk(corpus):
            folders.sort()
            for name in sorted(names):
                path = os.path.join(folder, name)
                source = json.dumps(path, ensure_ascii=False)
                line = 1
                for passage in re.split(r"\n\n", Path(path).read_text().removesuffix("\n")):
                    digests.append(hashlib.sha256(passage.encode()).digest())
                    lines.append(f'{{"row": {rows}, "source": {source}, "line": {line}}}\n')
                    rows += 1
                    line += passage.count("\n") + 2
                    if len(lines) == WINDOW:
                        flush()
        flush()
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {(rows, dimensions)}, }}".encode().ljust(117)
        matrix.seek(0)
        matrix.write(b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + header + b"\n")
        for file in (matrix, index):
            file.flush()
            os.fsync(file.fileno())


def measure(command: Sequence[str | Path]) -> tuple[float, float]:
    """Return the CPU seconds and the elapsed seconds of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[1]} failed")
    return usage.ru_utime + usage.ru_stime, seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--dimensions", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--floor", nargs=2, type=Path, metavar=("CORPUS", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.floor:
        run_floor(*options.floor, options.dimensions)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        corpus = folder / "corpus"
        maker = [sys.executable, str(Path(__file__).with_name("corpus.py")), "--out", str(corpus)]
        subprocess.run([*maker, "--passages", str(options.passages)], check=True, stdout=subprocess.DEVNULL)
        config = folder / "embedonce.toml"
        config.write_text(CONFIGURATION.format(folder=folder / "disk", dimensions=options.dimensions))
        embed = [sys.executable, "-m", "embedonce", "embed", corpus, "--json", "--config", config, "--out"]
        floor = [sys.executable, __file__, "--dimensions", str(options.dimensions), "--floor", corpus]
        measure([*embed, folder / "cold.npy"])
        commands = {"floor": [*floor, folder / "floor.npy"], "embedonce embed": [*embed, folder / "warm.npy"]}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(options.repeats):
            for name, command in commands.items():
                times[name].append(measure(command))
        for one, other in (("cold.npy", "warm.npy"), ("floor.index.jsonl", "warm.index.jsonl")):
            assert filecmp.cmp(folder / one, folder / other, shallow=False), f"{one} and {other} differ"
        print("| | CPU, µs per passage | elapsed, µs per passage |\n| --- | ---: | ---: |")
        scale = 1e6 / options.passages
        best = {name: [min(all_) * scale for all_ in zip(*found, strict=True)] for name, found in times.items()}
        for name, (cpu, elapsed) in best.items():
            print(f"| {name} | {cpu:.1f} | {elapsed:.1f} |")
        cpu, elapsed = (run / floor for floor, run in zip(*best.values(), strict=True))
        print(f"| ratio | {cpu:.2f} | {elapsed:.2f} |")


if __name__ == "__main__":
    main()
