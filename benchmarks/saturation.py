"""Show whether embedonce keeps a fast provider busy: how much of the provider's own rate a long run reaches.

    python benchmarks/saturation.py --texts 100000 --entries 1000000

The provider returns 10,000 vectors a second from two concurrent calls: it sleeps, then returns a constant. No text is
in a tier, so each one is looked up, computed and stored, over a memory tier and over a disk tier that holds a million
entries already. The first row is the provider alone: two threads call it with chunks of texts that are ready.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import embedonce
from embedonce import hookimpl
from embedonce_backends.disk import DiskBackend
from embedonce_backends.memory import MemoryBackend

RATE = 10_000
"""Vectors per second that the provider returns if all of its calls are used."""
CALLS = 2
DIMENSIONS = 384
FRAME = 1_600
"""Bytes of a frame with 384 dimensions."""
CHUNK = 4_096
"""Entries per transaction while the disk tier is filled."""

CONFIGURATION = """\
[provider]
type = "constant"

[[tiers]]
type = "memory"

[[tiers]]
type = "disk"
path = "{folder}"
max_bytes = "16GiB"
"""


class ConstantProvider:
    """Sleeps as long as the vectors take at :data:`RATE`, and returns the same vector for each text."""

    limits = embedonce.Limits(max_batch=256, concurrency=CALLS)

    def __init__(self) -> None:
        self._row = np.ones(DIMENSIONS, np.float32)

    def space(self, task: str, /) -> embedonce.VectorSpace:
        return embedonce.VectorSpace(provider="constant", model="constant", dimensions=DIMENSIONS)

    def embed(self, texts: Sequence[str], task: str, /) -> Any:
        time.sleep(len(texts) * CALLS / RATE)
        return np.tile(self._row, (len(texts), 1))

    def close(self) -> None: ...


api = 1


@hookimpl
def embedonce_providers() -> dict[str, type[ConstantProvider]]:
    return {"constant": ConstantProvider}


def install_plugin(site: Path) -> None:
    """Write the metadata that makes this file a plugin of every process that has ``site`` in its path."""
    info = site / "saturation-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: saturation\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[embedonce]\nconstant = saturation\n")


def fill(folder: Path, entries: int) -> None:
    """Store ``entries`` frames of random content under random keys."""
    backend = DiskBackend(path=folder, max_bytes=2**34)
    scope = hashlib.sha256(b"another scope").hexdigest()[:16]
    for start in range(0, entries, CHUNK):
        keys = [f"eo1.{scope}.{os.urandom(32).hex()[:62]}" for _ in range(start, min(start + CHUNK, entries))]
        backend.set_many({key: os.urandom(FRAME) for key in keys}, None)
    backend.close()


def make_texts(count: int, run: str) -> Iterator[str]:
    """Yield texts of about 170 characters that no other run has."""
    for number in range(count):
        yield f"{run} text {number} " + "words that make the passage as long as a usual paragraph of a document " * 2


def time_provider(texts: int) -> float:
    """Return the seconds of the provider alone."""
    provider = ConstantProvider()
    size = provider.limits.max_batch
    chunks = iter([["text"] * min(size, texts - start) for start in range(0, texts, size)])
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                chunk = next(chunks, None)
            if chunk is None:
                return
            provider.embed(chunk, "document")

    start = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(CALLS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start


def time_embed_iter(folder: Path, texts: int) -> tuple[float, float]:
    """Return the elapsed seconds and the CPU seconds of ``embed_iter`` over new texts."""
    tiers = [MemoryBackend(), DiskBackend(path=folder, max_bytes=2**34)]
    with embedonce.Cache(ConstantProvider(), tiers) as cache:
        cache.embed_batch(["warm up"])
        start, cpu = time.perf_counter(), time.process_time()
        found = sum(1 for _ in cache.embed_iter(make_texts(texts, os.urandom(4).hex())))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    assert found == texts
    return seconds, cpu


def time_command(folder: Path, texts: int, scratch: Path) -> tuple[float, float]:
    """Return the elapsed seconds and the CPU seconds of ``embedonce embed`` over new texts."""
    corpus = scratch / "corpus.txt"
    corpus.write_text("\n\n".join(make_texts(texts, os.urandom(4).hex())))
    config = scratch / "embedonce.toml"
    config.write_text(CONFIGURATION.format(folder=folder))
    command = [sys.executable, "-m", "embedonce", "embed", str(corpus), "--json", "--config", str(config)]
    install_plugin(scratch / "site")
    paths = [str(Path(__file__).parent), str(scratch / "site"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    process = subprocess.Popen(
        [*command, "--out", str(scratch / "out.npy")], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    with process.stdout as pipe:
        output = pipe.read()
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit("embedonce embed failed")
    report = json.loads(output)
    assert report["computed"] == texts
    return report["seconds"], usage.ru_utime + usage.ru_stime


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=100_000)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="a disk tier that is filled already, or that shall be kept")
    parser.add_argument("--only", choices=["embed_iter", "embed"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "disk"
        if not folder.exists():
            fill(folder, options.entries)
        print("\n| run | vectors/s | of the provider's rate | CPU, µs per text |\n| --- | ---: | ---: | ---: |")
        alone = options.texts / time_provider(options.texts)
        print(f"| the provider alone | {alone:,.0f} | 1.00 | |", flush=True)
        rows = {
            "embed_iter": lambda: time_embed_iter(folder, options.texts),
            "embed": lambda: time_command(folder, options.texts, Path(temporary)),
        }
        for name, measure in rows.items():
            if options.only in (None, name):
                seconds, cpu = measure()
                rate = options.texts / seconds
                print(f"| `{name}` | {rate:,.0f} | {rate / alone:.2f} | {cpu / options.texts * 1e6:.1f} |", flush=True)


if __name__ == "__main__":
    main()
