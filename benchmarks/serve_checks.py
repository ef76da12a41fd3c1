"""What ``serve_load.py`` checks after a run: what the clients, the API and the server have noted must fit together."""

from __future__ import annotations

import re
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from serve_clients import NO_ANSWER, REFUSED, Key, Report, Sent

WORKERS = 4
FULL_SECONDS = 60.0
"""Length of a full run. The times of the faults are for it, and shrink with a shorter run."""
WARM_UP = 5.0
"""Seconds before the clock starts, in which each worker imports the client of the API. They are checked, too."""

TIER_TIMEOUT, LEASE, MAX_WAIT = 0.25, 2.5, 10.0
PROVIDER_TIMEOUT, RETRIES, LONGEST_PAUSE = 2.0, 2, 8.0
IMPORT = 3.0
"""Most seconds for which a worker imports the client of the API, at its first miss."""

BOUND = LEASE + PROVIDER_TIMEOUT + 4 * TIER_TIMEOUT + IMPORT
"""Most seconds of a request while the API works: it waits for the lease of a worker that was killed, and computes."""
FAULT_BOUND = BOUND + MAX_WAIT + RETRIES * LONGEST_PAUSE
"""Most seconds of a request while the API fails: it waits for the call of another request, and then repeats its own."""

COPY_SECONDS = 1.5
"""A worker copies its counters each second, or a little later if it has much to do."""
UNDER_WAY = 1.0
"""Seconds around a change in which something may still go on that has begun before it."""

Span = tuple[float, float]


class Times:
    """When something happened, on ``time.monotonic``."""

    def __init__(self, seconds: float) -> None:
        self.begin = time.monotonic() + WARM_UP
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

    def convert(self, moment: float) -> float:
        """Return the second of a full run."""
        return (moment - self.begin) / self.scale


@dataclass
class Observed:
    """Everything that was noted in a run."""

    times: Times
    report: Report
    log: Sequence[tuple[float, str]]
    """The lines that the server has logged."""
    metrics: Mapping[tuple[str, ...], float]
    """The counters of the server by their names and the values of their labels, in the labels' alphabetical order."""
    calls: Sequence[float]
    """The times of the API's calls."""
    failures: Sequence[float]
    computed: Sequence[tuple[float, Key]]
    faults: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def name_status(status: int) -> str:
    return {NO_ANSWER: "no answer", REFUSED: "refused"}.get(status) or str(status)


class Checks:
    """Compares what was noted. What is wrong goes to ``faults``, and what is worth knowing to ``notes``."""

    def __init__(self, observed: Observed) -> None:
        self.observed = observed
        self.times = observed.times
        self.report = observed.report
        self.faults = observed.faults
        self.notes = observed.notes
        self.dead: set[str] = set()
        """The worker that was killed."""

    def check(self) -> None:
        """Make all checks."""
        self.faults.update(self.report.faults)
        self._check_durations()
        self._check_statuses()
        self._check_workers()
        self._check_computed()
        self._check_metrics()
        for _, line in self.observed.log:
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
                    is_of_killed = sent.start <= times.killed + UNDER_WAY and sent.end >= times.killed
                    is_right = is_of_killed or sent.start >= times.terminated
                case -1:
                    is_right = sent.end >= times.terminated
                case _:
                    is_right = False
            if not is_right:
                second = times.convert(sent.start)
                self.faults[f"status {name_status(sent.status)} without a cause, at second {second:.0f}"] += 1

    def _check_workers(self) -> None:
        """Check that one worker was killed, and that another has replaced it."""
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
        for moment, key in self.observed.computed:
            by_key[key].append(moment)
        excess: Counter[str] = Counter()
        for key, moments in by_key.items():
            if key in report.unasked:
                self.faults["only-if-cached has sent a text to the API"] += 1
                continue
            if key in report.repeated:
                if len(moments) > report.repeated[key]:
                    self.faults["a text was computed more often than it was asked for with no-cache or no-store"] += 1
                continue
            allowed = len(report.asked[key])
            outside: Counter[int] = Counter()
            for moment in moments:
                place = bisect_right(starts, moment) - 1
                if place < 0 or moment > away[place][1]:
                    outside[place] += 1
            lost = report.lost[key]
            if any(count > allowed + lost for count in outside.values()):
                self.faults["a text was computed twice while Redis worked"] += 1
                seconds = ", ".join(f"{self.times.convert(moment):.2f}" for moment in moments)
                self.notes.append(f"for {allowed} tenants, a text was computed at the seconds {seconds}")
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
        """Return the spans in which a worker may have skipped Redis. Outside of them, all workers share it.

        A call that skipped Redis when it looked a text up does not write to it either, so a span ends with the requests
        that were under way.
        """
        opened: dict[tuple[str, str], float] = {}
        """When a worker began to skip the reads or the writes."""
        spans = [(self.times.redis[0] - UNDER_WAY, self.times.redis[1] + UNDER_WAY)]

        def close(breaker: tuple[str, str], moment: float) -> None:
            if (start := opened.pop(breaker, None)) is not None:
                spans.append((start - UNDER_WAY, moment + UNDER_WAY))

        for moment, line in self.observed.log:
            if found := re.search(r"(worker \d+) .* was ended by SIGKILL", line):
                close((found[1], "read"), moment)
                close((found[1], "write"), moment)
            elif found := re.search(r"(worker \d+): .*tier 'redis': (read|write)s (.*)", line):
                breaker = found[1], found[2]
                if "work again" in found[3]:
                    close(breaker, moment)
                    continue
                opened.setdefault(breaker, moment)
                if not self.times.redis[0] <= moment <= self.times.redis[1]:
                    self.notes.append(f"at second {self.times.convert(moment):.1f}: {line}")
        for breaker in list(opened):
            close(breaker, self.times.terminated)
        seconds = max(end for _, end in spans) - UNDER_WAY - self.times.redis[1]
        self.notes.append(f"all workers used Redis again {seconds:.1f} s after its start")
        merged: list[Span] = []
        for start, end in sorted(spans):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(merged[-1][1], end))
            else:
                merged.append((start, end))
        return [(start, self._find_end(end)) for start, end in merged]

    def _find_end(self, moment: float) -> float:
        """Return when the requests that were under way at a moment have ended."""
        return max((sent.end for sent in self.report.sent if sent.start <= moment <= sent.end), default=moment)

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
        for (name, *labels), value in self.observed.metrics.items():
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
