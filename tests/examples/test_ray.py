"""The Ray examples are killed half-way with their whole cluster. The next run computes only the rest."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from servers import wait_until

import embedonce
from embedonce_backends.bundle import BundleBackend
from embedonce_providers.ngram import NgramProvider

FOLDER = Path(__file__).parents[2] / "examples" / "ray"
SCRIPT = FOLDER / "embed_corpus.py"
LINES = [f"passage {i} of the corpus, of which no other is the same" for i in range(2000)]

pytestmark = [
    pytest.mark.timeout(900),  # Ray starts a dozen processes, twice
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="it requires /proc to find the processes of a job"),
]


def count_entries(config: Path) -> int:
    with embedonce.open(config) as cache:
        return sum(held.entries for held in cache.contents() if held.tier == "disk")


def kill_all_processes(job: str) -> None:
    """Kill the driver and all processes that Ray has started for it. They are found by an environment variable."""

    def kill() -> bool:
        found = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ") if has_variable(path, job)]
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not found

    wait_until(kill, "all processes of the job have ended", seconds=60)


def has_variable(environ: Path, job: str) -> bool:
    try:
        return f"EMBEDONCE_TEST_JOB={job}\0".encode() in environ.read_bytes()
    except OSError:
        return False  # the process has ended


def make_environment(job: Path) -> dict[str, str]:
    """Return the environment variables of a job."""
    return {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "RAY_TMPDIR": "/tmp",
        # Ray would restart a worker that a busy machine has not started within a minute.
        "RAY_worker_register_timeout_seconds": "300",
        "EMBEDONCE_TEST_JOB": str(job),
    }


@pytest.mark.usefixtures("patient_disk")
def test_after_a_kill_a_job_computes_only_the_rest(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join([*LINES, LINES[7]]))
    config = tmp_path / "embedonce.toml"
    config.write_text(SCRIPT.with_name("embedonce.toml").read_text())
    store = tmp_path / "vectors.cache"
    command = [sys.executable, str(SCRIPT), str(corpus), "--config", str(config), "--out", str(tmp_path / "vectors")]
    environment = make_environment(tmp_path)

    with (tmp_path / "log").open("wb") as log:
        job = subprocess.Popen(
            [
                *command,
                "--batch-size",
                "25",
                "--pause",
                "0.5",
            ],  # the job has 20 s left when the first vectors are stored
            env=environment,
            stdout=log,
            stderr=log,
        )
        try:
            # Look only for the file while Ray starts, because Ray needs both cores for that.
            wait_until(lambda: job.poll() is not None or store.exists(), "a worker has opened the tier", seconds=300)
            wait_until(lambda: job.poll() is not None or count_entries(config) >= 50, "some are stored", seconds=300)
            assert job.poll() is None, (tmp_path / "log").read_text()
        finally:
            kill_all_processes(environment["EMBEDONCE_TEST_JOB"])
            job.wait()
    stored = count_entries(config)
    (tmp_path / "vectors").mkdir(exist_ok=True)
    assert 50 <= stored < len(LINES)

    pyarrow.parquet.write_table(pyarrow.table({"text": ["of another run"]}), tmp_path / "vectors" / "left.parquet")
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    report = re.fullmatch(r"2001 texts: (\d+) computed, (\d+) found", again.stdout.strip().splitlines()[-1])
    assert report is not None, again.stdout
    computed = int(report[1])
    # Two workers may request the text that occurs twice at the same moment.
    assert computed - (len(LINES) - stored) in (0, 1)

    table = pyarrow.parquet.read_table(tmp_path / "vectors")
    assert sorted(table["text"].to_pylist()) == sorted([*LINES, LINES[7]])
    expected = NgramProvider().embed(table["text"].to_pylist(), "document")
    assert (np.array(table["embedding"].to_pylist(), np.float32) == expected).all()


def list_parts(folder: Path) -> list[BundleBackend]:
    """Return the bundles that tasks have written."""
    return [BundleBackend(path=path.parent) for path in folder.glob("*/manifest.json")]


def test_a_job_that_joins_by_keys_computes_each_distinct_text_once_although_it_is_killed(tmp_path: Path) -> None:
    texts = [*LINES, *LINES[::5]]
    (tmp_path / "corpus").mkdir()
    for number in range(4):
        table = pyarrow.table({"id": list(range(number, len(texts), 4)), "text": texts[number::4]})
        pyarrow.parquet.write_table(table, tmp_path / "corpus" / f"{number}.parquet")
    out = tmp_path / "out"
    parts = out / "parts"
    command = [sys.executable, str(FOLDER / "embed_missing.py"), str(tmp_path / "corpus"), "--out", str(out)]
    command += ["--digits", "1", "--partitions", "4"]  # 16 tasks
    environment = make_environment(tmp_path)

    with (tmp_path / "log").open("wb") as log:
        # The job has 6 s left when the kill comes, because it has two workers.
        job = subprocess.Popen([*command, "--pause", "1"], env=environment, stdout=log, stderr=log)
        try:
            wait_until(lambda: job.poll() is not None or len(list_parts(parts)) >= 3, "some are stored", seconds=300)
            assert job.poll() is None, (tmp_path / "log").read_text()
        finally:
            kill_all_processes(environment["EMBEDONCE_TEST_JOB"])
            job.wait()
    stored = sum(part.count("eo1.") for part in list_parts(parts)) - len(list_parts(parts))  # each has a space card
    assert 0 < stored < len(LINES)

    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    assert f"{len(LINES) - stored} texts computed; {len(LINES):,} entries in 1 part" in again.stdout, again.stdout
    assert not parts.exists()
    tiers = [{"type": "bundle", "path": str(out / "bundle")}]
    with embedonce.open({"provider": {"type": "ngram"}, "tiers": tiers}) as cache:
        found = cache.lookup(texts)
        assert (found.vectors == NgramProvider().embed(texts, "document")).all()
