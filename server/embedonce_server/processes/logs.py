"""Messages of the server: one line each on standard error, which a thread writes.

A program that starts the server may not read its standard error. Then a write to it does not return, so only a thread
of its own writes, and nothing waits for that thread longer than for a moment at the end.
"""

from __future__ import annotations

import logging
import os
import select
import sys
import threading
from collections.abc import Iterator
from queue import SimpleQueue

MAX_LINES = 10_000
"""Maximum number of lines that wait to be written. Beyond it, new lines are lost."""
FLUSH_SECONDS = 0.5
"""Maximum number of seconds to wait at the end until the last lines are written."""


class LineWriter(logging.Handler):
    """Writes the lines of the log to a file descriptor, in a thread.

    Lines that are lost because the reader is too slow are counted. The next line that can be written says how many.
    """

    def __init__(self, descriptor: int, encoding: str = "utf-8") -> None:
        super().__init__()
        self._descriptor = descriptor
        self._encoding = encoding
        self._lines: SimpleQueue[bytes | None] = SimpleQueue()
        """The lines that wait; None is the end. A signal handler can put a line at any moment, unlike into a Queue."""
        self._lost = 0
        self._reported = 0
        self._is_closed = False
        # An interpreter that exits does not wait for a daemon thread.
        self._thread = threading.Thread(target=self._write_lines, name="embedonce log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        if self._lines.qsize() >= MAX_LINES:
            self._lost += 1
            return
        try:
            self.write_line(self.format(record))
        except Exception:  # noqa: BLE001  (as in the handlers of logging: an invalid message stops nothing)
            self.handleError(record)

    def write_line(self, line: str) -> None:
        """Write a line as it is."""
        self._lines.put(self._encode(line))

    def close(self) -> None:
        """Wait a moment until all lines are written. Later lines are lost."""
        if not self._is_closed:
            self._is_closed = True
            logging.getLogger().removeHandler(self)
            self._lines.put(None)
            self._thread.join(FLUSH_SECONDS)
        super().close()

    def _write_lines(self) -> None:
        for part in self._join_lines():
            self._write(part)
            if self._lines.empty() or self._lost - self._reported >= MAX_LINES:
                self._report_lost()
        self._report_lost()

    def _join_lines(self) -> Iterator[bytes]:
        """Yield the lines, and lines that wait together.

        A busy thread may keep the interpreter to itself for milliseconds, so one write per line would be too slow. A
        write of up to PIPE_BUF bytes is never mixed with the lines of other processes.
        """
        part = b""
        while (line := self._lines.get()) is not None:
            if part and len(part) + len(line) > select.PIPE_BUF:
                yield part
                part = b""
            part += line
            if self._lines.empty():
                yield part
                part = b""
        yield part

    def _write(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:  # another program has made the stream non-blocking
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                poll.poll()
            except OSError:  # nobody can read the stream any more
                return

    def _report_lost(self) -> None:
        count = self._lost - self._reported
        if count:
            self._reported += count
            level = {"levelno": logging.WARNING, "levelname": logging.getLevelName(logging.WARNING)}
            message = f"{count:,} lines of the log were lost, because standard error was not read fast enough"
            self._write(self._encode(self.format(logging.makeLogRecord({**level, "msg": message}))))

    def _encode(self, line: str) -> bytes:
        return f"{line}\n".encode(self._encoding, "backslashreplace")


def set_up_logging(*, worker: int | None = None) -> LineWriter:
    """Send the messages of this process to standard error. ``worker`` is the number of a worker among several."""
    who = "" if worker is None else f"worker {worker}: "
    # Python has no standard error if the shell has closed it.
    stream = sys.__stderr__
    handler = (
        LineWriter(os.open(os.devnull, os.O_WRONLY)) if stream is None else LineWriter(stream.fileno(), stream.encoding)
    )
    handler.setFormatter(logging.Formatter(f"%(asctime)s {who}%(levelname)s: %(message)s"))
    logging.raiseExceptions = False  # an invalid message must not print tracebacks
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("embedonce.serve", "embedonce.access"):
        logging.getLogger(name).setLevel(logging.INFO)
    return handler
