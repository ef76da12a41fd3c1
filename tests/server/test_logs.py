"""The log is written by a thread, so a reader that does not read stops nothing."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from patience import wait_until

from embedonce_server.processes import logs
from embedonce_server.processes.logs import LineWriter


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """The reading and the writing end of a pipe of 4,096 bytes."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    yield reading, writing
    os.close(reading)
    os.close(writing)


def log_line(writer: LineWriter, text: str) -> None:
    writer.handle(logging.makeLogRecord({"msg": text}))


def read_lines(reading: int, count: int) -> list[str]:
    """Read until there are so many lines."""
    data = b""
    while data.count(b"\n") < count:
        data += os.read(reading, 65_536)
    return data.decode().splitlines()


def test_lines_keep_their_order_and_the_last_ones_are_written_at_the_end(tmp_path: Path) -> None:
    file = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    try:
        writer = LineWriter(file)
        writer.write_line("first")
        for i in range(2_000):
            log_line(writer, f"line {i} é")
        writer.close()
        writer.close()
    finally:
        os.close(file)
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines == ["first", *(f"line {i} é" for i in range(2_000))]


@pytest.mark.parametrize("is_blocking", [True, False])
def test_lines_beyond_the_limit_are_lost_and_counted(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch, is_blocking: bool
) -> None:
    reading, writing = pipe
    monkeypatch.setattr(logs, "MAX_LINES", 10)
    os.set_blocking(writing, is_blocking)
    os.write(writing, b"." * 4095 + b"\n")
    with closing(LineWriter(writing)) as writer:
        log_line(writer, "first")
        wait_until(writer._lines.empty)  # the thread has taken the line, and cannot write it
        for i in range(15):
            log_line(writer, f"line {i}")
        lines = read_lines(reading, 13)
        assert lines[1:-1] == ["first", *(f"line {i}" for i in range(10))]
        assert lines[-1] == "5 lines of the log were lost, because standard error was not read fast enough"
        log_line(writer, "next")
        assert read_lines(reading, 1) == ["next"]


def test_the_end_waits_only_a_moment_for_a_stream_that_nobody_reads(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = pipe
    monkeypatch.setattr(logs, "FLUSH_SECONDS", 0.01)
    os.write(writing, b"." * 4096)
    writer = LineWriter(writing)
    log_line(writer, "late")
    writer.close()
    os.read(reading, 4096)
    assert read_lines(reading, 1) == ["late"]
    writer._thread.join()


def test_a_stream_that_is_closed_stops_no_writer() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    writer = LineWriter(writing)
    log_line(writer, "nobody reads this")
    writer.close()
    assert not writer._thread.is_alive()
    os.close(writing)
