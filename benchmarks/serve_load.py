"""Put a server with four workers under load while Redis, the model's API and a worker fail, and check every answer.

    python benchmarks/serve_load.py              # a minute
    python benchmarks/serve_load.py --quick      # ten seconds
    python benchmarks/serve_load.py --json

It requires ``redis-server`` and ``pip install 'embedonce[serve,openai,redis]'``. 64 connections of two processes send
requests of two tenants for two models: 1 to 32 texts from Zipf's distribution or new ones, float and base64, two
numbers of dimensions, and some with ``Cache-Control``. The API of the models is a loopback server. Redis is killed and
started again, the API answers 429 and then 500, and a worker is killed. At the end, the server gets SIGTERM under load.

The run fails, with exit code 1, in these cases:

- A vector is not exactly the vector of its text, or an answer does not have one vector for each input.
- A request takes longer than the sum of the timeouts that may apply to it.
- A status or a lost connection has no cause: 429 and 500 only while the API answers so, 404 only for ``only-if-cached``,
  no answer only from the worker that was killed, and nothing refused before SIGTERM.
- A tenant's text is computed twice without a cause. While Redis is away, each worker may compute it once, because the
  workers share nothing then. The texts of the killed worker's requests under way may be computed once more.
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
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from serve_clients import DIMENSIONS, MODELS, NO_ANSWER, REFUSED, TENANTS, Key, Report, Sent, run_api, run_clients

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import servers

WORKERS = 4
CONNECTIONS = 64
CLIENT_PROCESSES = 2
THINK = 0.05
"""Mean seconds that a client waits between an answer and its next request."""
FULL_SECONDS = 60.0
"""The length of the run that the times of the faults below are for. They shrink with it."""

REDIS_KILLED, REDIS_STARTED = 15.0, 25.0
LIMITED, UNLIMITED = 30.0, 35.0
"""The API answers 429 between these times."""
FAILING, HEALED = 38.0, 42.0
"""The API answers 500 between these times."""
WORKER_KILLED = 45.0

TIER_TIMEOUT, LEASE, MAX_WAIT = 0.25, 2.5, 10.0
PROVIDER_TIMEOUT, RETRIES, LONGEST_PAUSE = 2.0, 2, 8.0
DRAIN_TIMEOUT = 10.0

BOUND = LEASE + PROVIDER_TIMEOUT + 4 * TIER_TIMEOUT
"""Most seconds of a request while the API works: it waits for the lease of a worker that was killed, and computes."""
FAULT_BOUND = BOUND + MAX_WAIT + RETRIES * LONGEST_PAUSE
"""Most seconds of a request while the API fails: it waits for the call of another request, and then repeats its own."""

COPY_SECONDS = 1.5
"""A worker copies its counters each second, or a little later if it has much to do."""
UNDER_WAY = 1.0
"""Seconds around a change of a tier in which a call may have begun before the change."""

CONFIGURATION = """\
[cache]
max_wait = {max_wait}

[[tiers]]
type = "memory"
max_bytes = "256 MiB"

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

Span = tuple[float, float]


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


class Times:
    """When something happened, on ``time.monotonic``."""

    def __init__(self, seconds: float) -> None:
        self.begin = time.monotonic()
        self.scale = seconds / FULL_SECONDS
        self.redis: Span = (0.0, 0.0)
        self.limited: Span = (0.0, 0.0)
        self.failing: Span = (0.0, 0.0)
        self.killed = 0.0
        self.quiet: Span = (0.0, 0.0)
        self.terminated = 0.0
        self.ended = 0.0

    def sleep_until(self, second: float) -> float:
        """Sleep until a second of a full run, and return the time."""
        time.sleep(max(self.begin + second * self.scale - time.monotonic(), 0.0))
        return time.monotonic()


class Run:
    """One run: what happened, and what is wrong."""

    def __init__(self, seconds: float, seed: int) -> None:
        self.seconds = seconds
        self.seed = seed
        self.faults: Counter[str] = Counter()
        self.notes: list[str] = []
        self.metrics: dict[tuple[str, ...], float] = {}
        self.before_quiet = 0
        """Number of requests that were answered before the metrics were read."""

    def run(self) -> None:
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
            self._read_metrics(clients)
            self._terminate(clients)
            reports: list[Report] = [child.pipe.recv() for child in clients]
            self.calls, self.failures, self.computed = api.ask("end")
        self.report = _merge(reports)

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

    def _read_metrics(self, clients: Sequence[Child]) -> None:
        """Let the clients wait for their answers and send nothing, and read the metrics."""
        start = time.monotonic()
        for child in clients:
            child.pipe.send("pause")
        for child in clients:
            child.pipe.recv()
        try:
            self.metrics = self.server.read_metrics()
        except OSError as error:
            self.faults[f"/metrics cannot be read ({error})"] += 1
        self.times.quiet = (start, time.monotonic())
        for child in clients:
            child.pipe.send("resume")

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

    # --- checks -------------------------------------------------------------------------------

    def check(self) -> None:
        self.faults.update(self.report.faults)
        self._check_durations()
        self._check_statuses()
        self._check_workers()
        self._check_computed()
        self._check_metrics()
        for _, line in self.server.log:
            if "ERROR" in line and "was ended by SIGKILL" not in line:
                self.faults[f"the server logged: {line}"] += 1

    def _may_meet_fault(self, sent: Sent) -> bool:
        """Return whether the API failed during a request, or had failed just before, so that its calls paused."""
        spans = (self.times.limited, self.times.failing)
        return any(start <= sent.end and sent.start <= end + LONGEST_PAUSE for start, end in spans)

    def _check_durations(self) -> None:
        for sent in self.report.sent:
            bound = FAULT_BOUND if self._may_meet_fault(sent) else BOUND
            if sent.seconds > bound:
                self.faults[f"a request took longer than its bound of {bound:g} s"] += 1
        longest = max(self.report.sent, key=lambda sent: sent.seconds)
        self.notes.append(f"slowest request: {longest.seconds:.2f} s, status {longest.status}")

    def _check_statuses(self) -> None:
        times = self.times
        for sent in self.report.sent:
            match sent.status:
                case 200:
                    is_right = True
                case 404:
                    is_right = sent.kind == "only-if-cached"
                case 429:
                    is_right = times.limited[0] <= sent.end and sent.start <= times.limited[1]
                case 500:
                    is_right = times.failing[0] <= sent.end and sent.start <= times.failing[1]
                case 0:
                    is_right = sent.start <= times.killed <= sent.end or sent.start >= times.terminated
                case -1:
                    is_right = sent.end >= times.terminated
                case _:
                    is_right = False
            if not is_right:
                second = (sent.start - times.begin) / times.scale
                self.faults[f"status {_name_status(sent.status)} without a cause, at second {second:.0f}"] += 1

    def _check_workers(self) -> None:
        """Check that the worker that was killed is the only one that lost requests, and that another has replaced it."""
        answers = [sent for sent in self.report.sent if sent.worker]
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        for sent in sorted(answers, key=lambda sent: sent.end):
            first.setdefault(sent.worker, sent.end)
            last[sent.worker] = sent.end
        killed = self.times.killed
        dead = [worker for worker, end in last.items() if end <= killed + UNDER_WAY and first[worker] <= killed]
        born = [worker for worker, start in first.items() if start > killed]
        if len(first) != WORKERS + 1 or len(dead) != 1 or len(born) != 1:
            self.faults[f"of {len(first)} workers, {len(dead)} ended and {len(born)} started; expected 5, 1 and 1"] += 1
        self.dead = set(dead)
        lost = [sent for sent in self.report.sent if sent.status == NO_ANSWER and sent.start < self.times.terminated]
        self.notes.append(f"requests that the killed worker did not answer: {len(lost)}")
        if born:
            self.notes.append(f"its successor answered after {first[born[0]] - killed:.2f} s")
        shares = Counter(sent.worker for sent in answers)
        self.notes.append(f"answers by worker: {', '.join(f'{count:,}' for _, count in shares.most_common())}")

    def _check_computed(self) -> None:
        """Check how often each vector was computed."""
        report, away = self.report, self._find_spans_without_redis()
        starts = [start for start, _ in away]
        by_key: dict[Key, list[float]] = defaultdict(list)
        for moment, key in self.computed:
            by_key[key].append(moment)
        excess: Counter[str] = Counter()
        for key, moments in by_key.items():
            if key in report.unasked:
                self.faults["only-if-cached has sent a text to the API"] += 1
                continue
            if key in report.repeated:
                if len(moments) > report.repeated[key] + WORKERS:
                    self.faults["a text was computed more often than it was asked for with no-cache or no-store"] += 1
                continue
            allowed = len(report.asked[key])
            outside: Counter[int] = Counter()
            for moment in moments:
                place = bisect_right(starts, moment) - 1
                if place < 0 or moment > away[place][1]:
                    outside[place] += 1
            lost = report.lost[key]
            for count in outside.values():
                if count > allowed + lost:
                    self.faults["a text was computed twice while Redis worked"] += 1
            if len(moments) > (WORKERS + 1) * allowed + lost:
                self.faults["a text was computed more than once by a worker"] += 1
            if len(moments) > allowed:
                excess["texts that were computed again because of the faults"] += 1
                excess["computations of these texts beyond the first"] += len(moments) - allowed
        for key, tenants in report.answered.items():
            if len(by_key.get(key, ())) < len(tenants):
                self.faults["a tenant got the vector of another tenant"] += 1
        self.notes += [f"{what}: {count:,}" for what, count in sorted(excess.items())]

    def _find_spans_without_redis(self) -> list[Span]:
        """Return the spans in which a worker may have skipped Redis. Outside of them, all workers share it."""
        opened: dict[str, float] = {}
        spans = [(self.times.redis[0] - UNDER_WAY, self.times.redis[1] + UNDER_WAY)]
        for moment, line in self.server.log:
            if (found := re.search(r"(worker \d+): .*tier 'redis': (read|write)s (.*)", line)) is None:
                continue
            breaker = f"{found[1]} {found[2]}"
            if "work again" in found[3]:
                start = opened.pop(breaker, None)
                if start is not None:
                    spans.append((start - UNDER_WAY, moment + UNDER_WAY))
            else:
                opened.setdefault(breaker, moment)
                if not self.times.redis[0] <= moment <= self.times.redis[1]:
                    self.notes.append(f"at second {(moment - self.times.begin) / self.times.scale:.1f}: {line}")
        ends = [end for _, end in spans]
        spans += [(start - UNDER_WAY, self.times.killed) for start in opened.values()]
        self.notes.append(
            f"all workers used Redis again {max(ends) - UNDER_WAY - self.times.redis[1]:.1f} s after its start"
        )
        merged: list[Span] = []
        for start, end in sorted(spans):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(merged[-1][1], end))
            else:
                merged.append((start, end))
        return merged

    def _check_metrics(self) -> None:
        """Compare the sums of the metrics with those of the clients."""
        seen: Counter[tuple[str, ...]] = Counter()
        last: Counter[tuple[str, ...]] = Counter()
        """What the killed worker may not have copied."""
        lost: Counter[tuple[str, ...]] = Counter()
        """What it may have counted although the client got no answer."""
        for sent in self.report.sent:
            if sent.start >= self.times.quiet[1]:
                continue
            values = {("requests", sent.tenant, str(sent.status)): 1}
            if sent.status in (200, NO_ANSWER):
                for name in ("hits", "computed"):
                    most = sent.inputs if sent.status == NO_ANSWER else getattr(sent, name)
                    values[name, sent.tenant, sent.model] = most
            if sent.status == 200:
                values["computed_tokens", sent.tenant, sent.model] = sent.tokens
                values["saved_tokens", sent.tenant, sent.model] = sent.saved
            if sent.status == NO_ANSWER:
                values = {(*key[:2], "200") if key[0] == "requests" else key: value for key, value in values.items()}
                lost.update(values)
                continue
            seen.update(values)
            if sent.worker in self.dead and sent.end > self.times.killed - COPY_SECONDS:
                last.update(values)
        counted: Counter[tuple[str, ...]] = Counter()
        for (name, *labels), value in self.metrics.items():
            # The labels are in alphabetical order: model, status, tenant, tier.
            match name.removeprefix("embed_serve_").removesuffix("_total"), labels:
                case "requests", [_, status, tenant]:
                    counted["requests", tenant, status] += int(value)
                case "hits" | "computed" | "computed_tokens" | "saved_tokens" as short, [model, tenant, *_]:
                    counted[short, tenant, model] += int(value)
        missing = 0
        for key in seen | counted:
            difference = seen[key] - counted[key]
            missing += abs(difference) * (key[0] == "requests")
            if key[0].endswith("tokens") and self.report.lost:
                continue
            if not -lost[key] <= difference <= last[key]:
                self.faults[f"/metrics counts {counted[key]:,} {' '.join(key)}, and the clients {seen[key]:,}"] += 1
        self.notes.append(
            f"requests that /metrics does not count: {missing} (answers of the killed worker in its last second: "
            f"{sum(count for key, count in last.items() if key[0] == 'requests')})"
        )

    # --- results ------------------------------------------------------------------------------

    def summarize(self) -> list[dict[str, Any]]:
        """Return one row for each phase, and one for the whole run."""
        begin, scale = self.times.begin, self.times.scale
        edges = [begin + phase.start * scale for phase in PHASES[:-1]]
        edges += [self.times.terminated, self.times.ended]
        spans = list(itertools.pairwise(edges))
        rows = [self._summarize(phase.name, *span) for phase, span in zip(PHASES, spans, strict=True)]
        return [*rows, self._summarize("the whole run", edges[0], edges[-1])]

    def _summarize(self, name: str, start: float, end: float) -> dict[str, Any]:
        sent = [one for one in self.report.sent if start <= one.start < end and one.status != REFUSED]
        seconds = [one.seconds for one in sent if one.status > 0] or [0.0]
        p50, p95, p99 = np.percentile(seconds, [50, 95, 99]) * 1000
        inputs = sum(one.hits + one.computed for one in sent)
        statuses = Counter(_name_status(one.status) for one in sent)
        return {
            "phase": name,
            "seconds": round(end - start, 2),
            "requests": len(sent),
            "requests_per_second": round(len(sent) / (end - start)),
            "p50_ms": round(p50, 1),
            "p95_ms": round(p95, 1),
            "p99_ms": round(p99, 1),
            "max_ms": round(max(seconds) * 1000, 1),
            "hit_rate": round(sum(one.hits for one in sent) / inputs, 4) if inputs else None,
            "statuses": dict(sorted(statuses.items())),
            "calls": sum(start <= moment < end for moment in self.calls),
            "failed_calls": sum(start <= moment < end for moment in self.failures),
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


def _name_status(status: int) -> str:
    return {NO_ANSWER: "no answer", REFUSED: "refused"}.get(status) or str(status)


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows as a table in Markdown."""
    print("| phase | requests/s | p50 | p95 | p99 | max | hit rate | statuses | calls of the API |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |")
    for row in rows:
        statuses = ", ".join(f"{status}: {count:,}" for status, count in row["statuses"].items())
        times = " | ".join(f"{row[name]:,.0f} ms" for name in ("p50_ms", "p95_ms", "p99_ms", "max_ms"))
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
    run.run()
    run.check()
    rows = run.summarize()
    if options.log:
        for moment, line in run.server.log:
            print(f"{(moment - run.times.begin) / run.times.scale:6.2f} {line}", file=sys.stderr)
    if options.json:
        print(json.dumps({"phases": rows, "notes": run.notes, "faults": dict(run.faults)}, indent=2))
    else:
        print_table(rows)
        print("\n".join(["", *run.notes]))
        for fault, count in run.faults.most_common():
            print(f"FAULT, {count:,} times: {fault}")
        print("nothing is wrong" if not run.faults else "the run found faults")
    return 1 if run.faults else 0


if __name__ == "__main__":
    sys.exit(main())
