"""Embed a real corpus with the command line: cold, warm, killed half-way and resumed, and with one document changed.

    python benchmarks/resume.py --passages 100000

corpus.py makes the corpus from text on this machine. Each row is a new process. The last column shows whether the
vectors of the run equal those of the cold run.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CONFIGURATION = """\
[provider]
type = "ngram"
dimensions = 256

[[tiers]]
type = "memory"

[[tiers]]
type = "disk"
path = "{folder}"
"""


class Runs:
    """Runs of ``embedonce embed`` over one corpus."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.corpus = folder / "corpus"

    def write_configuration(self, name: str) -> Path:
        path = self.folder / f"{name}.toml"
        path.write_text(CONFIGURATION.format(folder=self.folder / name))
        return path

    def start(self, tier: str, out: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "embedonce", "embed", self.corpus, "--json"),
                *("--config", self.write_configuration(tier), "--out", self.folder / out),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )

    def finish(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        with process.stdout as pipe:
            output = pipe.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise SystemExit(f"embedonce embed exited with status {process.returncode}")
        report: dict[str, Any] = json.loads(output)
        return report | {"peak": usage.ru_maxrss / 1024}


def show(name: str, report: dict[str, Any], equal: str) -> None:
    hits = sum(report["hits"].values())
    print(
        f"| {name} | {report['texts']:,} | {report['unique']:,} | {report['computed']:,} | {hits:,} "
        f"| {report['seconds']:.1f} | {report['peak']:.0f} | {equal} |",
        flush=True,
    )


def change_one_document(corpus: Path) -> tuple[Path, int]:
    """Add a sentence to every passage of one document; return the document and its number of passages."""
    document = sorted(path for path in corpus.rglob("*") if path.is_file())[7]
    passages = [passage for passage in document.read_text().split("\n\n") if passage.strip()]
    document.write_text("\n\n".join(f"{passage} And one more sentence." for passage in passages))
    return document, len(passages)


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--passages", type=int, default=100_000)
    passages = arguments.parse_args().passages
    with tempfile.TemporaryDirectory() as temporary:
        runs = Runs(Path(temporary))
        maker = Path(__file__).with_name("corpus.py")
        command = [sys.executable, str(maker), "--out", str(runs.corpus), "--passages", str(passages)]
        subprocess.run(command, check=True)
        print("\n| run | texts | unique | computed | hits | seconds | peak, MB | vectors |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |")

        start = time.monotonic()
        cold = runs.finish(runs.start("one", "cold.npy"))
        cold_seconds = time.monotonic() - start
        show("cold", cold, "")
        warm = runs.finish(runs.start("one", "warm.npy"))
        show("warm", warm, compare(runs, "cold.npy", "warm.npy"))

        killed = runs.start("two", "killed.npy")
        time.sleep(cold_seconds * 0.55)
        os.kill(killed.pid, signal.SIGKILL)
        killed.communicate()
        assert not (runs.folder / "killed.npy").exists(), "a killed run must not leave an output file"
        resumed = runs.finish(runs.start("two", "killed.npy"))
        show("killed and resumed", resumed, compare(runs, "cold.npy", "killed.npy"))

        document, count = change_one_document(runs.corpus)
        changed = runs.finish(runs.start("one", "changed.npy"))
        show(f"one document changed ({count} passages)", changed, "")
    print(f"\nThe changed document is {document.name}.")


def compare(runs: Runs, one: str, other: str) -> str:
    """Return ``equal`` or ``DIFFERENT``, after comparing two output files bit by bit."""
    same = filecmp.cmp(runs.folder / one, runs.folder / other, shallow=False)
    return "equal" if same else "DIFFERENT"


if __name__ == "__main__":
    main()
