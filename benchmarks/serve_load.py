"""Put a server with four workers under load while Redis, the model's API and a worker fail, and check every answer.

    python benchmarks/serve_load.py              # a minute
    python benchmarks/serve_load.py --quick      # ten seconds
    python benchmarks/serve_load.py --json

It requires Linux, ``redis-server`` and ``pip install 'embedonce[serve,openai,redis]'``. On a machine that also does
other work, requests may take longer than their bound.

64 connections of two processes send requests of two tenants for two models: 1 to 32 texts from Zipf's distribution or
new ones, float and base64, two numbers of dimensions, and some with ``Cache-Control``. The API of the models is a
loopback server. Redis is killed and started again, the API answers 429 and then 500, and a worker is killed. At the
end, the server gets SIGTERM under load.

The run fails, with exit code 1, in these cases:

- A vector is not exactly the vector of its text, or an answer does not have one vector for each input.
- A request takes longer than the sum of the timeouts that may apply to it.
- A status or a lost connection has no cause: 429 and 500 come only while the API answers so, 404 only for
  ``only-if-cached``, no answer only from the worker that was killed, and a refused connection only after SIGTERM.
- A tenant's text is computed twice without a cause. While Redis is away, each worker may compute it once, because the
  workers share nothing then. That includes calls that began before a worker used Redis again. The texts of the killed
  worker's requests under way may be computed once more.
- The sums in ``/metrics`` are not those of the clients. The killed worker may take its last second with it.
- After SIGTERM, a request that was sent before it gets no answer, or the exit code is not 0.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from serve_checks import (
    FULL_SECONDS,
    LEASE,
    MAX_WAIT,
    PROVIDER_TIMEOUT,
    RETRIES,
    TIER_TIMEOUT,
    WARM_UP,
    WORKERS,
    Checks,
    Observed,
    Times,
    name_status,
)
from serve_clients import DIMENSIONS, MODELS, REFUSED, TENANTS, Report, run_api, run_clients

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import servers

CONNECTIONS = 64
CLIENT_PROCESSES = 2
THINK = 0.15
"""Mean seconds that a client waits between an answer and its next request."""
REDIS_KILLED, REDIS_STARTED = 15.0, 25.0
LIMITED, UNLIMITED = 30.0, 35.0
"""The API answers 429 between these times."""
FAILING, HEALED = 38.0, 42.0
"""The API answers 500 between these times."""
WORKER_KILLED = 45.0

DRAIN_TIMEOUT = 10.0

CONFIGURATION = """\
[cache]
max_wait = {max_wait}

[[tiers]]
type = "memory"
max_entries = 1_000_000

[[tiers]]
type = "redis"
url = "{redis}"
timeout = {tier_timeout}
lease = {lease}

[serve]
admin_key = "{admin_key}"
state_dir = "{state}"
drain_timeout = {drain_timeout}

[[serve.models]]
name = "small"
provider = {{ type = "openai", model = "{small}", coalesce = "2ms", {options} }}

[[serve.models]]
name = "large"
provider = {{ type = "openai", model = "{large}", {options} }}

[[serve.tenants]]
name = "north"
keys = ["{north}"]
tokens_per_day = 1_000_000_000

[[serve.tenants]]
name = "south"
keys = ["{south}"]
requests_per_minute = 1_000_000
"""
ADMIN_KEY = "key-of-the-administrator"


class Phase(NamedTuple):
    """A part of the run, with the second of a full run at which it begins."""

    name: str
    start: float


PHASES = [
    Phase("everything works", 0.0),
    Phase("Redis is down", REDIS_KILLED),
    Phase("Redis is back, and empty", REDIS_STARTED),
    Phase("the API answers 429", LIMITED),
    Phase("the API works again", UNLIMITED),
    Phase("the API answers 500", FAILING),
    Phase("the API works again", HEALED),
    Phase("a worker is killed", WORKER_KILLED),
    Phase("SIGTERM", FULL_SECONDS),
]


# --- the processes --------------------------------------------------------------------------------


class Child:
    """A process of this benchmark, and the pipe to it."""

    def __init__(self, target: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(theirs, *args), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, message: str) -> Any:
        self.pipe.send(message)
        return self.pipe.recv()

    def end(self) -> None:
        self.process.terminate()
        self.process.join()


class Server:
    """``embedonce serve``, and the lines that it has logged."""

    def __init__(self, config: Path) -> None:
        command = [sys.executable, "-m", "embedonce", "serve", "--config", str(config), "--port", "0"]
        self.process = subprocess.Popen([*command, "--workers", str(WORKERS)], stderr=subprocess.PIPE, text=True)
        self.log: list[tuple[float, str]] = []
        self._is_listening = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._is_listening.wait(60)
        found = re.search(r"listening on http://127\.0\.0\.1:(\d+)", self.read_log())
        if found is None:
            self.process.kill()
            raise SystemExit(f"the server did not start:\n{self.read_log()}")
        self.port = int(found[1])

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append((time.monotonic(), line.rstrip()))
            if "listening on" in line:
                self._is_listening.set()
        self._is_listening.set()

    def read_log(self) -> str:
        return "\n".join(line for _, line in self.log)

    def list_workers(self) -> list[int]:
        listed = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True, check=True
        )
        return [int(pid) for pid in listed.stdout.split()]

    def read_metrics(self) -> dict[tuple[str, ...], float]:
        """Return the values of the server's own counters by their name and the values of their labels."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/metrics", headers={"authorization": f"Bearer {ADMIN_KEY}"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            families = text_string_to_metric_families(answer.read().decode())
            return {
                (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
                for family in families
                for sample in family.samples
            }

    def wait(self, seconds: float) -> int | None:
        """Return the exit code, or None if the server has not ended in time."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        self._reader.join(10)
        return code

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


# --- the run --------------------------------------------------------------------------------------


class Run:
    """One run."""

    def __init__(self, seconds: float, seed: int) -> None:
        self.seconds = seconds
        self.seed = seed
        self.faults: Counter[str] = Counter()

    def run(self) -> Observed:
        """Do everything, and return what was noted."""
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            redis = stack.enter_context(servers.RedisServer())
            api = Child(run_api)
            stack.callback(api.end)
            config = folder / "embedonce.toml"
            config.write_text(_make_configuration(redis.url, api.pipe.recv(), folder))
            self.server = Server(config)
            stack.callback(self.server.kill)
            share = CONNECTIONS // CLIENT_PROCESSES
            clients = [
                Child(run_clients, self.server.port, share, THINK, self.seed * 100 + number)
                for number in range(CLIENT_PROCESSES)
            ]
            for child in clients:
                stack.callback(child.end)
                child.pipe.recv()  # it is ready
            for child in clients:
                child.pipe.send("resume")
            self.times = Times(self.seconds)
            self._disturb(redis, api)
            metrics = self._read_metrics(clients)
            self._terminate(clients)
            reports: list[Report] = [child.pipe.recv() for child in clients]
            calls, failures, computed = api.ask("end")
        report = _merge(reports)
        return Observed(self.times, report, self.server.log, metrics, calls, failures, computed, self.faults)

    def _disturb(self, redis: servers.RedisServer, api: Child) -> None:
        times = self.times
        down = times.sleep_until(REDIS_KILLED)
        redis.kill()
        times.sleep_until(REDIS_STARTED)
        redis.restart()
        times.redis = (down, time.monotonic())
        start = times.sleep_until(LIMITED)
        api.ask("rate_limit")
        times.sleep_until(UNLIMITED)
        api.ask("heal")
        times.limited = (start, time.monotonic())
        start = times.sleep_until(FAILING)
        api.ask("server_error")
        times.sleep_until(HEALED)
        api.ask("heal")
        times.failing = (start, time.monotonic())
        times.sleep_until(WORKER_KILLED)
        victim = random.Random(self.seed).choice(self.server.list_workers())
        times.killed = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        times.sleep_until(FULL_SECONDS)

    def _read_metrics(self, clients: Sequence[Child]) -> dict[tuple[str, ...], float]:
        """Let the clients wait for their answers and send nothing, and read the metrics."""
        start = time.monotonic()
        for child in clients:
            child.pipe.send("pause")
        for child in clients:
            child.pipe.recv()
        metrics: dict[tuple[str, ...], float] = {}
        try:
            metrics = self.server.read_metrics()
        except OSError as error:
            self.faults[f"/metrics cannot be read ({error})"] += 1
        self.times.quiet = (start, time.monotonic())
        for child in clients:
            child.pipe.send("resume")
        return metrics

    def _terminate(self, clients: Sequence[Child]) -> None:
        time.sleep(min(2.0, self.seconds / 10))
        workers = self.server.list_workers()
        self.times.terminated = time.monotonic()
        self.server.process.send_signal(signal.SIGTERM)
        code = self.server.wait(DRAIN_TIMEOUT + 10)
        self.times.ended = time.monotonic()
        if code != 0:
            self.faults[f"after SIGTERM, the exit code is {code}"] += 1
        if any(Path(f"/proc/{pid}").exists() for pid in workers):
            self.faults["a worker still runs after the server has ended"] += 1
        for child in clients:
            child.pipe.send("end")


# --- results --------------------------------------------------------------------------------------


def summarize(observed: Observed) -> list[dict[str, Any]]:
    """Return one row for each phase, and one for the whole run."""
    times = observed.times
    edges = [times.begin - WARM_UP, *(times.begin + phase.start * times.scale for phase in PHASES[:-1])]
    edges += [times.terminated, times.ended]
    names = [f"{WARM_UP:g} s of warm-up", *(phase.name for phase in PHASES)]
    rows = [_summarize(observed, name, *span) for name, span in zip(names, itertools.pairwise(edges), strict=True)]
    return [*rows, _summarize(observed, "the whole run", edges[1], edges[-1])]


def _summarize(observed: Observed, name: str, start: float, end: float) -> dict[str, Any]:
    sent = [one for one in observed.report.sent if start <= one.start < end and one.status != REFUSED]
    seconds = [one.seconds for one in sent if one.status > 0] or [0.0]
    p50, p95, p99 = np.percentile(seconds, [50, 95, 99]) * 1000
    hits = [one.seconds for one in sent if one.status == 200 and not one.computed] or [0.0]
    inputs = sum(one.hits + one.computed for one in sent)
    statuses = Counter(name_status(one.status) for one in sent)
    return {
        "phase": name,
        "seconds": round(end - start, 2),
        "requests": len(sent),
        "requests_per_second": round(len(sent) / (end - start)),
        "p50_ms": round(p50, 1),
        "p95_ms": round(p95, 1),
        "p99_ms": round(p99, 1),
        "max_ms": round(max(seconds) * 1000, 1),
        "hits_p99_ms": round(np.percentile(hits, 99) * 1000, 1),
        "hit_rate": round(sum(one.hits for one in sent) / inputs, 4) if inputs else None,
        "statuses": dict(sorted(statuses.items())),
        "calls": sum(start <= moment < end for moment in observed.calls),
        "failed_calls": sum(start <= moment < end for moment in observed.failures),
    }


def _make_configuration(redis: str, api: str, folder: Path) -> str:
    options = f'base_url = "{api}", api_key = "any", dimensions = {DIMENSIONS}, timeout = {PROVIDER_TIMEOUT}, '
    options += f"max_retries = {RETRIES}"
    return CONFIGURATION.format(
        redis=redis,
        state=folder / "state",
        options=options,
        tier_timeout=TIER_TIMEOUT,
        lease=LEASE,
        max_wait=MAX_WAIT,
        drain_timeout=DRAIN_TIMEOUT,
        admin_key=ADMIN_KEY,
        **MODELS,
        **TENANTS,
    )


def _merge(reports: Sequence[Report]) -> Report:
    whole = Report([], {}, {}, Counter(), set(), Counter(), Counter())
    for report in reports:
        whole.sent.extend(report.sent)
        for mine, theirs in ((whole.asked, report.asked), (whole.answered, report.answered)):
            for key, tenants in theirs.items():
                mine.setdefault(key, set()).update(tenants)
        whole.repeated.update(report.repeated)
        whole.unasked.update(report.unasked)
        whole.lost.update(report.lost)
        whole.faults.update(report.faults)
    return whole


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows as a table in Markdown."""
    print("| phase | requests/s | p50 | p95 | p99 | max | p99 of hits | hit rate | statuses | calls of the API |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |")
    for row in rows:
        statuses = ", ".join(f"{status}: {count:,}" for status, count in row["statuses"].items())
        times = " | ".join(f"{row[name]:,.0f} ms" for name in ("p50_ms", "p95_ms", "p99_ms", "max_ms", "hits_p99_ms"))
        rate = "" if row["hit_rate"] is None else f"{row['hit_rate']:.1%}"
        failed = f" ({row['failed_calls']:,} failed)" if row["failed_calls"] else ""
        print(
            f"| {row['phase']} | {row['requests_per_second']:,} | {times} | {rate} | {statuses} | "
            f"{row['calls']:,}{failed} |"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=FULL_SECONDS, help="length of the run (default: 60)")
    parser.add_argument("--quick", action="store_true", help="a run of ten seconds")
    parser.add_argument("--seed", type=int, default=1, help="seed of the requests (default: 1)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--log", action="store_true", help="print what the server has logged")
    options = parser.parse_args()
    run = Run(10.0 if options.quick else options.seconds, options.seed)
    observed = run.run()
    Checks(observed).check()
    rows, notes, faults = summarize(observed), observed.notes, observed.faults
    notes.append(f"load of the machine (1, 5 and 15 minutes): {', '.join(f'{load:.1f}' for load in os.getloadavg())}")
    if options.log:
        for moment, line in observed.log:
            print(f"{observed.times.convert(moment):6.2f} {line}", file=sys.stderr)
    if options.json:
        print(json.dumps({"phases": rows, "notes": notes, "faults": dict(faults)}, indent=2))
    else:
        print_table(rows)
        print("\n".join(["", *notes]))
        for fault, count in faults.most_common():
            print(f"FAULT, {count:,} times: {fault}")
        print("nothing is wrong" if not faults else "the run found faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
