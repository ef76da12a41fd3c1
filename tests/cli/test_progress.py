"""The pace of a run and the progress that it shows, with a clock that the provider moves."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import embedonce
from embedonce.cli.embedding import progress as showing
from embedonce.cli.embedding import run as running
from embedonce.cli.embedding.pace import FACTOR, FIRST, SECONDS, Pace
from embedonce.cli.embedding.progress import Display, Lines, Progress, format_seconds
from embedonce.cli.embedding.run import Run
from embedonce.cli.embedding.sinks import open_sink
from embedonce.cli.embedding.sources import Reader
from embedonce.events import Computed

# --- pace -------------------------------------------------------------------------------------


def simulate(cost: Callable[[int], float], texts: int, *, load: float = 0.0, **options: Any) -> list[tuple[int, float]]:
    """Return the size and the seconds of each chunk, for a provider that needs ``cost(n)`` seconds for n texts."""
    pace = Pace(2048, **options)
    chunks = []
    while texts:
        size = min(pace.size, texts)
        seconds = cost(size) + (0.0 if chunks else load)
        pace.record(size, seconds)
        chunks.append((size, seconds))
        texts -= size
    return chunks


@pytest.mark.parametrize("per_text", [0.05, 0.2, 0.9, 2.0])
def test_chunks_of_a_slow_model_take_about_two_seconds(per_text: float) -> None:
    chunks = simulate(lambda texts: per_text * texts, 400, load=50.0, batch=256)
    settled = [seconds for _, seconds in chunks[4:-1]]
    assert all(0.5 * SECONDS <= seconds <= 1.1 * SECONDS for seconds in settled)


def test_loading_a_model_does_not_shrink_the_chunks() -> None:
    sizes = [size for size, _ in simulate(lambda texts: 0.001 * texts, 10_000, load=300.0)]
    assert sizes[:2] == [FIRST, FIRST]
    assert sizes[2] == FIRST * FACTOR


def test_chunks_of_a_fast_model_grow_to_whole_windows() -> None:
    assert [size for size, _ in simulate(lambda texts: 1e-5 * texts, 6000)] == [4, 32, 256, 2048, 2048, 1612]


@pytest.mark.parametrize("latency", [0.5, 3.0, 20.0])
def test_a_provider_with_slow_calls_gets_large_chunks(latency: float) -> None:
    """Small chunks would take a whole call each, and the run would take many times longer."""

    def cost(texts: int) -> float:
        return latency * math.ceil(texts / 256)

    total = sum(seconds for _, seconds in simulate(cost, 20_000, batch=256))
    assert total < 1.5 * cost(20_000)


def test_a_model_that_becomes_slower_and_faster_again_is_followed() -> None:
    pace = Pace(2048)
    for cost in (0.001, 0.5, 0.001):
        for _ in range(20):
            pace.record(pace.size, cost * pace.size)
        assert pace.size == pytest.approx(min(SECONDS / cost, 2048), rel=0.2)


def test_a_limited_provider_gets_whole_batches() -> None:
    assert {size for size, _ in simulate(lambda texts: 60.0, 2048, batch=256, least=256)} == {256}


# --- windows in flight ------------------------------------------------------------------------


def make_computed(texts: int) -> Computed:
    return Computed(
        provider="p", task="document", texts=texts, failed=0, tokens=None, seconds=1.0, fallback=False, scope="s"
    )


def test_texts_of_the_next_window_count_as_soon_as_they_are_embedded() -> None:
    progress = Progress(100, lambda: 0.0)
    progress.start_chunk()
    progress.handle_event(make_computed(15))
    progress.start_window(10, 50)
    progress.finish_chunk(10)
    progress.start_chunk()
    progress.add_results(hits=0, others=10, failed=0)
    assert progress.describe().startswith("15 passages")
    progress.handle_event(make_computed(5))
    progress.start_window(10, 100)
    progress.finish_chunk()
    progress.add_results(hits=0, others=10, failed=0)
    assert progress.describe().startswith("20 passages")


# --- what a run shows -------------------------------------------------------------------------


class Clock:
    """Stands in for the module ``time``."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class Slow:
    """A view that records what it would show, and a provider that moves the clock."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, load: float = 0.0, per_text: float = 0.1):
        self.clock = Clock()
        monkeypatch.setattr(running, "time", self.clock)
        self.folder, self.load, self.per_text = folder, load, per_text
        self.calls: list[int] = []
        self.shown: list[str] = []
        self.after_call: Callable[[], None] = lambda: None

    def __call__(self, texts: list[str]) -> Any:
        self.calls.append(len(texts))
        self.clock.now += self.per_text * len(texts) + self.load
        self.load = 0.0
        self.after_call()
        return np.array([[len(text), 1.0] for text in texts], np.float32)

    def run(self, texts: Sequence[str]) -> Any:
        """Embed the texts, and return the summary."""
        (self.folder / "in.txt").write_text("\n".join(texts))
        reader = Reader([str(self.folder / "in.txt")], split="line")
        progress = Progress(reader.compute_total_bytes(), self.clock.monotonic)
        slow = self

        class View:
            def start(self) -> None: ...

            def stop(self) -> None: ...

            def update(self) -> None:
                slow.shown.append(f"{round(progress.completed)} {showing.describe_with_time(progress)}")

        display: Any = Display(progress, View())  # type: ignore[arg-type]
        disk = self.folder / "vectors.cache"
        from embedonce_backends.disk import DiskBackend

        with embedonce.Cache(self, [DiskBackend(path=disk)], space={"model": "slow"}) as cache:
            cache.subscribe(display.handle_event)
            sink = open_sink(self.folder / "out.npy")
            run = Run(cache, reader, sink, task="document")
            try:
                run.embed(display)
            finally:
                sink.abort()
        return run.summary


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slow:
    return Slow(tmp_path, monkeypatch, load=60.0)


TEXTS = [f"text number {number}" for number in range(400)]


def test_loading_a_model_is_said_and_is_not_part_of_the_rate(slow: Slow) -> None:
    slow.run(TEXTS)
    waiting = [line for line in slow.shown if "loading the model" in line]
    assert waiting
    assert all(" 0 passages" in line for line in waiting)
    after = [line for line in slow.shown if re.search(r" (8|\d{2,}) passages", line)]
    assert after
    assert all("10/s" in line and "loading" not in line for line in after)


def test_the_passages_and_the_time_left_are_true_from_the_beginning(slow: Slow) -> None:
    slow.run(TEXTS)
    size = (slow.folder / "in.txt").stat().st_size
    found = [re.search(r"^(\d+) .*?(\d+) passages  10/s  0 % hits  (?:(\d+) min )?(\d+) s left", s) for s in slow.shown]
    lines = [tuple(int(part or 0) for part in match.groups()) for match in found if match]
    assert len(lines) > 20
    for done, passages, minutes, seconds in lines:
        assert passages == pytest.approx(400 * done / size, abs=1)
        assert 60 * minutes + seconds == pytest.approx((400 - passages) * slow.per_text, abs=1)
    assert slow.shown[-1].startswith(f"{size} 400 passages")


def test_a_chunk_that_is_lost_is_short(slow: Slow) -> None:
    """After each call of the provider, the run might be killed. The next run computes only the texts of one chunk."""

    class Killed(BaseException): ...

    def kill() -> None:
        if len(slow.calls) == 6:
            raise Killed

    slow.after_call = kill
    with pytest.raises(Killed):
        slow.run(TEXTS)
    assert slow.calls[-1] * slow.per_text <= SECONDS * 1.1
    stored = sum(slow.calls[:-1])
    slow.calls.clear()
    slow.after_call = lambda: None
    slow.shown.clear()
    summary = slow.run(TEXTS)
    assert (sum(slow.calls), sum(summary.hits.values())) == (400 - stored, stored)
    # The hits are shown before the provider is called for the first time.
    first = next(line for line in slow.shown if "loading the model" in line)
    assert f" {stored} passages" in first
    assert "100 % hits" in first
    assert f"400 passages  10/s  {100 * stored / 400:.0f} % hits" in slow.shown[-1]


def test_a_repeated_text_is_computed_once_however_small_the_chunks_are(slow: Slow) -> None:
    slow.per_text = 1.0
    summary = slow.run(["the same", *TEXTS[:30], "the same"] * 2)
    assert sum(slow.calls) == 31
    assert (summary.rows, summary.computed, summary.repeated, summary.unique) == (64, 31, 33, 31)
    assert np.load(slow.folder / "out.npy")[:, 0].tolist() == [8, *map(len, TEXTS[:30]), 8] * 2


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_a_duration_is_readable(seconds: float, shown: str) -> None:
    assert format_seconds(seconds) == shown


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(showing, "INTERVAL", 0.001)
    progress = Progress(1000)
    progress.start_window(10, 500)
    progress.add_results(hits=5, others=0, failed=1)
    lines: list[str] = []
    is_written = threading.Event()

    def report(line: str) -> None:
        lines.append(line)
        is_written.set()

    with Display(progress, Lines(progress, report)):
        assert is_written.wait(100)
    assert re.fullmatch(r"30 %  6 passages  [\d,.]+/s  83 % hits  1 failed", lines[0])


# --- no statistic ends a run ------------------------------------------------------------------


class Failing:
    """A view whose methods fail."""

    def __init__(self, name: str, error: Exception) -> None:
        self._name, self._error = name, error
        self.is_stopped = False

    def start(self) -> None:
        self._fail("start")

    def update(self) -> None:
        self._fail("update")

    def stop(self) -> None:
        self.is_stopped = True
        self._fail("stop")

    def _fail(self, name: str) -> None:
        if name == self._name:
            raise self._error


@pytest.mark.parametrize("error", [OSError("closed"), ValueError("closed"), MemoryError(), RuntimeError("no threads")])
@pytest.mark.parametrize("name", ["start", "update", "stop"])
def test_an_error_of_the_display_costs_only_the_display(name: str, error: Exception) -> None:
    view: Any = Failing(name, error)
    display = Display(Progress(100), view)
    with display:
        display.start_window(10, 50)
        display.start_chunk()
        display.handle_event(embedonce.events.Computed(provider="p", task="document", texts=1))
        display.finish_chunk()
        display.add_results(hits=1, others=9, failed=0)
    assert view.is_stopped


def embed_with_failing(slow: Slow, monkeypatch: pytest.MonkeyPatch, target: Any, name: str, error: Exception) -> Any:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(target, name, fail)
    return slow.run(TEXTS)


@pytest.mark.parametrize("name", ["add", "count"])
@pytest.mark.parametrize("error", [MemoryError(), OSError(30, "Read-only file system")])
def test_distinct_texts_that_cannot_be_counted_are_unknown(
    slow: Slow, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception
) -> None:
    summary = embed_with_failing(slow, monkeypatch, running.DistinctTexts, name, error)
    assert (summary.unique, summary.unknown, summary.rows, summary.computed) == (None, ["unique"], 400, 400)
    assert np.load(slow.folder / "out.npy").shape == (400, 2)


def test_the_statistics_of_the_cache_may_fail(slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = embed_with_failing(slow, monkeypatch, embedonce.Cache, "stats", RuntimeError("changed size"))
    assert (summary.unknown, summary.rows, summary.computed) == (["computed"], 400, 400)
    assert np.load(slow.folder / "out.npy").shape == (400, 2)


def test_more_than_a_million_distinct_texts_need_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    distinct = running.DistinctTexts()
    for start in range(0, 2**20 + 4096, 2048):
        distinct.add([str(number) for number in range(start, start + 2048)])
    assert distinct.count() == 2**20 + 4096


@pytest.mark.parametrize("name", ["compute_total_bytes", "skipped"])
def test_a_command_whose_statistics_fail_writes_its_output(
    command: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (folder / "embedonce.toml").write_text('tiers = []\n\n[provider]\ntype = "ngram"\n')
    (folder / "a.txt").write_text("one\n\ntwo\n")

    def fail(*arguments: Any) -> Any:
        raise RecursionError

    monkeypatch.setattr(Reader, name, property(fail) if name == "skipped" else fail)
    done = command("embed", "a.txt", "--out", "out.npy")
    assert done.code == 0
    assert "wrote 2 rows" in done.out
    assert np.load("out.npy").shape == (2, 256)
