"""A run whose provider or tiers fail: its messages, its counts, and when it stops."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import embedonce
from embedonce.cli.embedding import distinct as counting
from embedonce.cli.embedding import run as running
from embedonce.cli.embedding.distinct import DistinctTexts
from embedonce.cli.embedding.failures import describe_error
from embedonce.cli.embedding.passages import Passage
from embedonce.cli.embedding.progress import Display
from embedonce.cli.embedding.run import Run, Stopped, split_windows
from embedonce.cli.embedding.sinks import open_sink
from embedonce.cli.embedding.sources import Reader
from embedonce_backends.memory import MemoryBackend


class FailingFunction:
    """A provider that raises the error that ``fails`` returns for the texts."""

    def __init__(self, fails: Callable[[Sequence[str]], Exception | None] = lambda texts: None) -> None:
        self.fails = fails
        self.calls = 0

    def __call__(self, texts: list[str]) -> Any:
        self.calls += 1
        error = self.fails(texts)
        if error is not None:
            raise error
        return np.array([[len(text), 1.0] for text in texts], dtype=np.float32)


class Broken:
    """A tier whose every call fails."""

    capabilities = embedonce.Capabilities(holds="frames", scope="host")

    def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        raise OSError("no connection")

    def set_many(self, items: Any, ttl: float | None) -> None:
        raise OSError("no connection")

    def close(self) -> None: ...


class FinishedRun:
    """Runs the texts, one per line, through a cache, and keeps the messages."""

    def __init__(
        self,
        folder: Path,
        texts: Sequence[str],
        provider: Any,
        *,
        strict: bool = False,
        display: Display | None = None,
        **options: Any,
    ):
        (folder / "in.txt").write_text("\n".join(texts))
        out = folder / "out.npy"
        self.stopped = ""
        sink = open_sink(out)
        space = {"space": {"model": "test"}} if isinstance(provider, FailingFunction) else {}
        with embedonce.Cache(provider, **space, **options) as cache:
            reader = Reader([str(folder / "in.txt")], split="line")
            run = Run(cache, reader, sink, task="document", strict=strict)
            try:
                run.embed(display or Display())
            except Stopped as stopped:
                self.stopped = str(stopped)
            finally:
                sink.abort()
        self.messages = list(run.failures.describe())
        self.summary = run.summary
        self.rows = np.load(out) if out.exists() else None


def make_refusing(*refused: str) -> FailingFunction:
    def fails(texts: Sequence[str]) -> Exception | None:
        positions = [position for position, text in enumerate(texts) if text in refused]
        return embedonce.TextRefused("too long", positions) if positions else None

    return FailingFunction(fails)


def test_a_refused_text_is_reported_and_left_out(tmp_path: Path) -> None:
    run = FinishedRun(tmp_path, ["one", "a secret", "three"], make_refusing("a secret"))
    assert run.messages == [f"{tmp_path}/in.txt:2: TextRefused: too long"]
    assert (run.summary.texts, run.summary.failed, run.summary.rows, run.summary.computed) == (
        3,
        1,
        2,
        2,
    )
    assert run.rows is not None
    assert run.rows[:, 0].tolist() == [3, 5]


def test_strict_stops_at_a_refused_text(tmp_path: Path) -> None:
    run = FinishedRun(tmp_path, ["one", "two"], make_refusing("two"), strict=True)
    assert run.stopped == "a passage failed, and --strict is set"
    assert run.rows is None


def test_a_chunk_that_fails_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"text {number}" for number in range(600)]
    provider = FailingFunction(lambda batch: ConnectionError("cut off") if "text 300" in batch else None)
    run = FinishedRun(tmp_path, texts, provider)
    # The chunks are of 4, 32, 256 and 308 texts. Text 300 is in the last one, and a call takes 256 texts.
    places = "256 times, lines 293, 294, 295, 296, 297, ..., 548"
    assert run.messages == [f"{tmp_path}/in.txt: ConnectionError: cut off: {places}"]
    assert (run.summary.failed, run.summary.rows) == (256, 344)
    assert not run.stopped


def test_a_run_stops_if_the_provider_is_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "WINDOW", 10)
    first = {f"text {number}" for number in range(10)}
    provider = FailingFunction(lambda batch: None if first.issuperset(batch) else ConnectionError("down"))
    run = FinishedRun(tmp_path, [f"text {number}" for number in range(1000)], provider)
    assert run.stopped == "every call to the provider fails"
    assert (run.summary.texts, run.summary.rows, run.summary.failed, len(run.messages)) == (30, 10, 20, 1)
    assert run.rows is None


def test_a_provider_that_is_down_gets_few_calls(tmp_path: Path) -> None:
    provider = FailingFunction(lambda batch: ConnectionError("down"))
    run = FinishedRun(tmp_path, [f"text {number}" for number in range(10_000)], provider)
    assert run.stopped == "every call to the provider fails"
    # Each of the two windows has chunks of 4, 32, 256 and 1756 texts. A call has at most 256 texts.
    assert provider.calls == 2 * (1 + 1 + 1 + 7)


def test_refused_texts_are_not_an_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "WINDOW", 1)
    texts = [f"text {number}" for number in range(20)]
    run = FinishedRun(tmp_path, texts, make_refusing(*texts[1:]))
    assert (run.summary.failed, run.summary.rows, run.stopped) == (19, 1, "")


def test_hits_between_failures_mean_that_there_is_no_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "WINDOW", 2)
    provider = FailingFunction(lambda batch: ConnectionError("down") if "bad" in batch else None)
    run = FinishedRun(tmp_path, ["bad", "a", "b", "c", "bad", "d", "e", "f"], provider)
    assert (run.stopped, run.summary.rows) == ("", 4)


def test_one_output_never_mixes_two_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "WINDOW", 2)

    class Fallback:
        limits = embedonce.Limits()

        def space(self, task: str) -> embedonce.VectorSpace:
            return embedonce.VectorSpace(provider="spare", model="small", dimensions=2)

        def embed(self, texts: Sequence[str], task: str) -> Any:
            return np.ones((len(texts), 2), np.float32)

        def close(self) -> None: ...

    provider = FailingFunction(lambda batch: ConnectionError("down") if "three" in batch else None)
    run = FinishedRun(
        tmp_path, ["one", "two", "three", "four"], provider, fallback=Fallback(), fallback_fetch_only=True
    )
    assert "the fallback (spare small) has a different vector space" in run.stopped
    assert run.rows is None


def test_a_failing_tier_costs_no_row_and_is_counted(tmp_path: Path) -> None:
    run = FinishedRun(tmp_path, ["one", "two"], FailingFunction(), tiers=[embedonce.Tier(Broken(), name="far")])
    assert (run.summary.rows, run.summary.failed, run.messages) == (2, 0, [])
    assert run.summary.trouble["far"]["errors"] > 0


def test_a_failing_tier_with_on_error_raise_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(embedonce.TierError):
        FinishedRun(tmp_path, ["one"], FailingFunction(), tiers=[embedonce.Tier(Broken(), on_error="raise")])


@given(
    st.lists(st.sampled_from(["a", "bb", "ccc", "dddd", "eeeee", "refused", "also refused"]), min_size=1, max_size=24),
    st.integers(1, 6),
    st.booleans(),
)
def test_windows_in_flight_give_the_rows_and_counts_of_windows_in_turn(
    texts: list[str], window: int, with_tier: bool
) -> None:
    good = [text for text in texts if "refused" not in text]
    tiers = [MemoryBackend()] if with_tier else []
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "WINDOW", window)
        run = FinishedRun(Path(folder), texts, make_refusing("refused", "also refused"), tiers=tiers)
    summary = run.summary
    assert (summary.texts, summary.unique) == (len(texts), len(set(texts)))
    assert (summary.rows, summary.failed) == (len(good), len(texts) - len(good))
    if not good:
        assert run.stopped == "no passage could be embedded"
        return
    assert run.rows is not None
    assert run.rows[:, 0].tolist() == [len(text) for text in good]
    assert summary.computed + sum(summary.hits.values()) + summary.repeated == len(good)
    if with_tier:
        assert summary.computed == len(set(good))
    assert sum(group.count for group in summary.failures) == len(texts) - len(good)


def test_broken_items_are_reported_in_the_order_of_the_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "WINDOW", 2)
    for number in range(4):
        (tmp_path / f"{number}.txt").write_bytes(b"good\n\nrefused\n\nbroken \xff\n")
    sink = open_sink(tmp_path / "out.npy")
    with embedonce.Cache(make_refusing("refused"), space={"model": "test"}) as cache:
        reader = Reader([str(tmp_path / f"{number}.txt") for number in range(4)])
        run = Run(cache, reader, sink, task="document")
        run.embed(Display())
    found = [(Path(group.file).stem, group.reason) for group in run.failures.groups]
    assert sorted(found[:2]) == [("0", "TextRefused: too long"), ("0", "not UTF-8")]
    assert [file for file, _ in found] == sorted(file for file, _ in found)
    assert run.summary.failed == 8


def test_what_was_read_ahead_is_reported_if_the_run_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "WINDOW", 1)
    (tmp_path / "in.txt").write_bytes(b"one\n\ntwo \xff\n\nthree\n\nfour\n")
    sink = open_sink(tmp_path / "out.npy")
    down = FailingFunction(lambda batch: ConnectionError("down"))
    with embedonce.Cache(down, space={"model": "test"}) as cache:
        run = Run(cache, Reader([str(tmp_path / "in.txt")]), sink, task="document")
        with pytest.raises(Stopped, match="every call"):
            run.embed(Display())
        sink.abort()
    assert "not UTF-8" in {group.reason for group in run.failures.groups}
    assert sum(group.count for group in run.failures.groups) == run.summary.failed


# --- windows and messages ---------------------------------------------------------------------


def test_windows_are_bounded_in_number_and_in_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "WINDOW", 3)
    monkeypatch.setattr(running, "WINDOW_CHARACTERS", 100)
    sizes = [1, 1, 1, 1, 99, 1, 500, 1]
    found = split_windows(Passage("x" * size, "s", 1) for size in sizes)
    assert [[len(passage.text) for passage in window] for window in found] == [[1, 1, 1], [1, 99], [1, 500], [1]]


@pytest.mark.parametrize(
    ("text", "message", "expected"),
    [
        ("the text", "bad\nrequest", "ValueError: bad request"),
        ("the text", "bad: the text", "ValueError"),
        ("a secret plan\nfor all", "input 'a secret plan for all' is bad", "ValueError"),
        ("a secret plan that goes on and on", "input 'a secret plan that go…' is bad", "ValueError"),
        ("café\u0007 bill", "got caf\\xe9\\x07 bill", "ValueError"),
        ("the text", "", "ValueError"),
        ("the text", "x" * 500, "ValueError: " + "x" * 300),
    ],
)
def test_an_error_message_never_quotes_the_text(text: str, message: str, expected: str) -> None:
    assert describe_error(ValueError(message), text) == expected


# --- distinct texts ---------------------------------------------------------------------------


@given(st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=3))))
def test_distinct_texts_are_counted_like_a_set(batches: list[list[str]]) -> None:
    distinct, expected = DistinctTexts(), set()
    for batch in batches:
        distinct.add(batch)
        expected.update(batch)
        assert distinct.count() == len(expected)


def test_distinct_texts_are_counted_in_several_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "MERGE_HASHES", 1000)
    distinct = DistinctTexts()
    for start in range(0, 40_000, 2048):
        distinct.add([str(number % 30_011) for number in range(start, start + 2048)])
    assert distinct.count() == 30_011
