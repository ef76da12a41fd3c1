"""Embed the texts of Parquet files that a bundle does not have yet, with Ray Data, and add them to the bundle.

If the job is killed and run again, it computes only the rest. What is missing is decided by the keys of the texts. So
the rows need no ids, equal texts are computed once, and no process holds the keys of what is done in its memory.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from itertools import groupby, islice, repeat
from operator import itemgetter
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from embedonce import Cache, config
from embedonce.vectors import Entry
from embedonce_backends.bundle import BundleBackend, BundleWriter
from embedonce_backends.memory import MemoryBackend

HERE = Path(__file__).parent
DIGEST_AT = 21
"""Where the digest begins in a key. Its digits are random, so its first digits divide the keys evenly."""
WINDOW = 4096
"""Number of entries that are merged at once."""
NO_LIMIT = 2**40


def make_cache(file: Path, store: MemoryBackend | None = None) -> Cache:
    """Return a cache with the provider and the key policy of a configuration, and without its tiers."""
    loaded = config.load(file)
    if loaded.provider is None:
        raise SystemExit(f"{file} has no [provider]")
    provider = config.make_provider(loaded, loaded.provider)
    return Cache(provider, [store] if store else [], key=loaded.key, dtype=loaded.cache.dtype)


class FindMissing:
    """Adds the key to each text, and drops the texts that the bundle has. Each process maps the bundle once."""

    def __init__(self, file: Path, bundle: Path, digits: int) -> None:
        self.cache = make_cache(file)
        self.digits = digits
        scope = self.cache.keys([""])[0][4:20]
        manifest = bundle / "manifest.json"
        parts = json.loads(manifest.read_text())["parts"] if manifest.exists() else []
        files = [pa.memory_map(str(bundle / part["file"])) for part in parts if part["scope"] == scope]
        self.parts = [pa.ipc.open_file(file).get_batch(0) for file in files]

    def __call__(self, batch: pa.Table) -> pa.Table:
        texts = batch["text"].to_pylist()
        distinct = dict(zip(self.cache.keys(texts), texts, strict=True))
        keys = pa.array(distinct, pa.string())
        rows = pa.table({"key": keys, "text": list(distinct.values())})
        digits = "".join(key[DIGEST_AT : DIGEST_AT + 16] for key in distinct)
        prefixes = np.frombuffer(bytes.fromhex(digits), ">u8").astype(np.uint64)
        is_missing = pa.array(np.ones(len(keys), bool))
        for part in self.parts:
            # A part is sorted. If two keys have the same first 8 bytes, the second one is computed again, which is
            # rare and harmless.
            found = np.searchsorted(part["prefix"].to_numpy(), prefixes)
            places = pa.array(np.minimum(found, part.num_rows - 1))
            is_missing = pc.and_(is_missing, pc.not_equal(part["key"].take(places), keys))
        shards = pc.utf8_slice_codeunits(keys, DIGEST_AT, DIGEST_AT + self.digits)
        return rows.append_column("shard", shards).filter(is_missing)


class EmbedShard:
    """Embeds the texts of one shard, whose keys begin with the same digits, and writes them as a small bundle."""

    def __init__(self, file: Path, folder: Path, pause: float) -> None:
        self.store = MemoryBackend(max_entries=NO_LIMIT)
        self.cache = make_cache(file, self.store)
        self.folder = folder
        self.pause = pause

    def __call__(self, shard: pa.Table) -> pa.Table:
        time.sleep(self.pause)
        texts = dict(zip(shard["key"].to_pylist(), shard["text"].to_pylist(), strict=True))
        keys = sorted(texts)
        # The name says which keys are in the part. So if Ray repeats a task that had finished, its part is found.
        target = self.folder / hashlib.sha256("".join(keys).encode()).hexdigest()[:32]
        is_written = (target / "manifest.json").exists()
        computed = 0 if is_written else self.write_part(target, keys, [texts[key] for key in keys])
        return pa.table({"computed": [computed]})

    def write_part(self, target: Path, keys: list[str], texts: list[str]) -> int:
        """Embed the texts and write them to the folder ``target``. A killed task leaves no part."""
        fetched = self.cache.fetch(texts)
        self.cache.export(target, replace=True)
        self.store.delete_many(keys)
        for error in fetched.failed.values():
            raise error  # the other texts are stored
        return fetched.computed.texts


def compact(out: Path) -> None:
    """Merge the parts of all runs into the bundle, and remove them. Only a window of entries is in memory."""
    folder = out / "parts"
    parts = sorted(path.parent for path in folder.glob("*/manifest.json"))
    if parts:
        old = [out / "bundle"] if (out / "bundle" / "manifest.json").exists() else []
        sources = [BundleBackend(path=path) for path in [*old, *parts]]
        with BundleWriter(out / "bundle", replace=True) as writer:
            for entries in merge(sources):
                writer.add(entries)
            writer.commit()
    if folder.exists():
        shutil.rmtree(folder)


def merge(sources: list[BundleBackend]) -> Iterator[Mapping[str, Entry | bytes]]:
    """Yield the entries of all bundles in the order of their keys, each key once, in windows."""
    streams = [zip(source.scan("eo1."), repeat(number)) for number, source in enumerate(sources)]
    keys = groupby(heapq.merge(*streams), key=itemgetter(0))
    while window := [(key, [number for _, number in same]) for key, same in islice(keys, WINDOW)]:
        wanted: dict[int, list[str]] = {}
        for key, numbers in window:
            for number in numbers:
                wanted.setdefault(number, []).append(key)
        found: dict[str, Entry | bytes] = {}
        for number, some in wanted.items():
            values = sources[number].get_many(some)
            found |= {key: value for key, value in values.items() if value != b""}  # b"": a damaged row
        yield {key: found[key] for key, _ in window if key in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path, help="a folder of Parquet files with a column `text`")
    parser.add_argument("--config", type=Path, default=HERE / "embedonce.toml", help="its tiers are not used")
    parser.add_argument("--out", type=Path, default=Path("embedded"), help="a folder for the bundle and the parts")
    parser.add_argument("--digits", type=int, default=2, help="a task embeds the keys that begin with so many digits")
    parser.add_argument("--partitions", type=int, default=64, help="number of partitions of Ray's shuffle")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds before each task: time to kill the job")
    args = parser.parse_args()
    file, out = args.config.resolve(), args.out.resolve()

    ray.init(num_cpus=2 * args.workers + 2, include_dashboard=False, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    compact(out)  # what a killed run has left
    workers = ray.data.ActorPoolStrategy(size=args.workers)
    computed = (
        ray.data.read_parquet(str(args.corpus))
        .select_columns(["text"])
        .map_batches(
            FindMissing,
            fn_constructor_args=[file, out / "bundle", args.digits],
            batch_format="pyarrow",
            batch_size=8192,
            compute=workers,
        )
        .groupby("shard", num_partitions=args.partitions)
        .map_groups(
            EmbedShard,
            fn_constructor_args=[file, out / "parts", args.pause],
            batch_format="pyarrow",
            compute=workers,
        )
        .sum("computed")
    )
    compact(out)
    print(f"{computed or 0} texts computed; {BundleBackend(path=out / 'bundle').describe()}")


if __name__ == "__main__":
    main()
