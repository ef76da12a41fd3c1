"""After Ctrl-C at any line of a call, later calls in the same thread work as if nothing had happened."""

from __future__ import annotations

import gc
import itertools
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from embedonce import Cache, Tier
from embedonce._engine import ports
from embedonce._engine.flights import Claims, InFlight
from embedonce.contracts import deadline, time_left
from embedonce.vectors import Entry, freeze
from embedonce_backends import memory
from embedonce_backends.disk import DiskBackend
from embedonce_backends.memory import MemoryBackend

TEXTS = ["one", "two"]


def lengths(texts: list[str]) -> np.ndarray[Any, Any]:
    return np.array([[len(text), 1.0] for text in texts], np.float32)


@contextmanager
def interrupted_at(line: int, file: str = "") -> Iterator[list[int]]:
    """Raise KeyboardInterrupt when this thread reaches its ``line``-th line of Python inside the block.

    With ``file``, only the lines of the files whose name ends so are counted.
    """
    count = itertools.count()
    reached = [0]

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if event == "line" and frame.f_code.co_filename.endswith(file):
            reached[0] = next(count)
            if reached[0] == line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield reached
    finally:
        sys.settrace(before)


def test_ctrl_c_leaves_no_deadline_in_the_thread() -> None:
    with interrupted_at(-1) as lines:
        ports.call_with_deadline(time_left, 60.0)
    for line in range(lines[0]):
        with suppress(KeyboardInterrupt), interrupted_at(line):
            ports.call_with_deadline(time_left, 60.0)
        assert time_left() is None, f"interrupted at line {line}"


# Python warns when it collects a coroutine that was never awaited. An interrupt may leave such a coroutine behind.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
def test_ctrl_c_on_a_line_of_a_batch_leaves_no_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A trace function can raise where a signal handler cannot: before a ``with`` statement releases its lock. So this
    # test uses a lock of its own, because all memory tiers share one.
    monkeypatch.setattr(memory, "_lock", threading.RLock())
    # Every third line takes long enough. Each minor version of Python tests other lines.
    for line in itertools.count(sys.version_info.minor % 3, 3):
        tiers = [MemoryBackend(), Tier(DiskBackend(path=tmp_path / str(line)), timeout=0.5, lease="off")]
        with Cache(lengths, tiers, space={"model": "m"}) as cache:
            with suppress(KeyboardInterrupt), interrupted_at(line) as lines:
                cache.embed_batch(TEXTS)
            assert time_left() is None, f"interrupted at line {line}"
            assert cache.embed_batch(TEXTS)[:, 0].tolist() == [3.0, 3.0]
        # The call may go on after an interrupt, because Python ignores an exception in ``__del__``.
        if lines[0] < line:
            break


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_leaves_no_call_and_no_write_behind() -> None:
    """A call that is left behind would keep all later erasures, and a write would make each ``forget`` wait."""

    def run_call(in_flight: InFlight) -> None:
        with in_flight.new_ticket() as ticket:
            in_flight.claim(ticket, ["a"], None, Claims())
            ticket.hold()
            with in_flight.track_write("tier", ticket.number, {"a": Entry(freeze([1.0]), 0.0)}):
                pass
            ticket.release()

    for line in itertools.count():
        in_flight = InFlight(max_queued=10)
        with suppress(KeyboardInterrupt), interrupted_at(line, "flights.py") as lines:
            run_call(in_flight)
        if in_flight._writing:
            gc.collect()  # tracked writes are held weakly
        assert not in_flight._calls, f"interrupted at line {line}"
        assert not in_flight._reading, f"interrupted at line {line}"
        assert not in_flight._writing, f"interrupted at line {line}"
        if lines[0] < line:
            break


def test_one_deadline_object_can_be_nested() -> None:
    limit = deadline(60.0)
    with limit:
        with limit:
            assert time_left() is not None
        assert time_left() is not None
    assert time_left() is None
