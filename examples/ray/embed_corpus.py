"""Embed a corpus with Ray Data. If the job is killed and run again, it computes only the rest."""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
import ray.data

from embedonce_integrations.ray import BatchEmbedder

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path, help="a text file with one text per line")
    parser.add_argument("--config", type=Path, default=HERE / "embedonce.toml")
    parser.add_argument(
        "--out", type=Path, default=Path("vectors"), help="a folder for Parquet files; its content is replaced"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between batches: time to kill the job")
    args = parser.parse_args()

    def pause(batch: dict[str, Any]) -> dict[str, Any]:
        time.sleep(args.pause)
        return batch

    ray.init(num_cpus=args.workers + 1, include_dashboard=False, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    embedded = (
        ray.data.read_text(str(args.corpus))
        .map_batches(pause, batch_size=args.batch_size)
        .map_batches(
            BatchEmbedder,
            fn_constructor_args=[str(args.config.resolve())],
            fn_constructor_kwargs={"sources": "source"},
            batch_size=args.batch_size,
            concurrency=args.workers,
        )
        .materialize()
    )
    embedded.write_parquet(str(args.out), mode="overwrite")
    counts = Counter(row["source"] for row in embedded.select_columns(["source"]).iter_rows())
    print(f"{embedded.count()} texts: {counts.pop('provider', 0)} computed, {sum(counts.values())} found")


if __name__ == "__main__":
    main()
