"""Output of the command line: results go to standard output, everything else to standard error."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import TextIO

    from embedonce.errors import ConfigError, Problem

OK, FAILED, USAGE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
"""Exit codes. The last two are 128 plus the number of the signal that ended the command."""


class Refused(Exception):
    """The arguments of a command are wrong; nothing was done. The exit code is 2."""


class Failed(Exception):
    """A command failed; the message says what the user must fix. The exit code is 1."""


def describe_os_error(error: OSError) -> str:
    """Return the operating system's reason for an error. If the error names a file, put the file's name first."""
    reason = error.strerror or str(error) or type(error).__name__
    return reason if error.filename is None else f"{os.fsdecode(error.filename)}: {reason}"


@contextlib.contextmanager
def tolerate_broken_consoles() -> Iterator[None]:
    """Let no encoding of the output streams, and no broken standard error, end a command or change its exit code.

    A console may be ASCII or cp1252, and the name of a file may have any character, or bytes that are not text at all.
    A character that a stream's encoding lacks is written as an escape such as ``\\xe9``.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):  # the stream is closed; its first write shows that
                stream.reconfigure(errors="backslashreplace")
    with contextlib.redirect_stderr(_Messages(sys.stderr)):
        yield


class _Messages:
    """Standard error. If the stream is closed or broken, messages are lost, but the command goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            return self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError):
            _discard_output(self._stream)
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            _discard_output(self._stream)

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except ValueError:  # the stream is closed
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _discard_output(stream: TextIO) -> None:
    """Send the rest of a broken stream's output nowhere. Python would fail to flush it at exit, with exit code 120."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def say(message: str) -> None:
    """Write one message to standard error."""
    print(message, file=sys.stderr, flush=True)


_results: TextIO | None = None
_has_emitted = False
"""Whether the running command has written its JSON document."""


@contextlib.contextmanager
def reserve_stdout() -> Iterator[None]:
    """Redirect ``print`` to standard error, because a line printed by a plugin would break the ``--json`` document."""
    global _results, _has_emitted
    previous, _results = _results, sys.stdout
    _has_emitted = False
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _results = previous


def write(line: str) -> None:
    """Write a line to standard output."""
    with _name_stdout_in_errors():
        print(line, file=_results or sys.stdout, flush=True)


@contextlib.contextmanager
def _name_stdout_in_errors() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of the output is gone; typer exits without a message
    except OSError as error:
        _discard_output(_results or sys.stdout)
        raise Failed(f"cannot write to standard output: {describe_os_error(error)}") from None


def emit(value: Any) -> None:
    """Write one JSON document to standard output, in ASCII so that every terminal and pipe accepts it."""
    global _has_emitted
    _has_emitted = True
    write(json.dumps(value, indent=2, default=str))


def emit_config_error(error: ConfigError) -> None:
    """Write the problems of a configuration as a command's JSON document, unless it has written its document already.

    Each problem has its message, file, line and column.
    """
    if not _has_emitted:
        emit({"ok": False, "problems": [asdict(problem) for problem in error.problems]})


def show(*renderables: Any) -> None:
    """Write tables and text to standard output. A pipe gets lines of up to 500 characters, so that nothing wraps."""
    from rich.console import Console

    out = _results or sys.stdout
    console = Console(file=out, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(file=out, highlight=False, markup=False, emoji=False, width=500, color_system=None)
    with _name_stdout_in_errors():
        for renderable in renderables:
            console.print(renderable)
        out.flush()


def make_table(columns: dict[str, str], rows: list[list[Any]]) -> Any:
    """Return a table; ``columns`` maps each title to ``"left"`` or ``"right"``."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title, justify in columns.items():
        result.add_column(title, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        result.add_row(*(Text(format_value(cell)) for cell in row))
    return result


def format_value(value: Any) -> str:
    """Format a value for people: an empty value as ``-``, integers with commas, floats with three digits."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3g}"
    return escape_controls(str(value))


def escape_controls(text: str) -> str:
    """Escape characters that a terminal would interpret. A shared tier may have names that another program chose."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def has_blocks() -> bool:
    """Return whether standard output can show block characters such as █."""
    try:
        "█░".encode(getattr(_results or sys.stdout, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def format_bytes(number: int) -> str:
    """Format a number of bytes in KiB, MiB or GiB, as the commands show it."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 2**10:.1f} KiB"


def format_date(seconds: float | None) -> str | None:
    """Format a Unix time as a date and a time in UTC, to the minute."""
    if seconds is None:
        return None
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError, OSError):  # another program may have stored any number
        return None


# --- configuration errors ---------------------------------------------------------------------


def say_config_error(error: ConfigError) -> None:
    """Report every problem of a configuration. On a terminal, also show the line of each problem, with a caret."""
    for problem in error.problems:
        say(f"error: {problem}")
        say_excerpt(problem)


def say_excerpt(problem: Problem) -> None:
    """On a terminal, show the line of a problem with a caret under the column."""
    if is_terminal():
        for line in read_excerpt(problem):
            say(line)


def is_terminal() -> bool:
    """Return whether standard error is a terminal."""
    return sys.stderr.isatty()


def read_excerpt(problem: Problem) -> list[str]:
    """Return the line of a problem and a line with a caret under the column, for a terminal.

    Return an empty list if the problem has no place, or if its line may hold a secret.
    """
    if problem.file is None or problem.line is None:
        return []
    try:
        with open(problem.file, encoding="utf-8", errors="replace") as file:
            lines = file.read().removeprefix("\ufeff").split("\n")
    except OSError:
        return []
    if lines[-1] == "":
        del lines[-1]
    if not 1 <= problem.line <= len(lines) or _may_hold_secret(lines, problem.line - 1):
        return []
    # Replace control characters, because a terminal would interpret them. Valid TOML has none except the tab.
    line = "".join(c if c.isprintable() or c == "\t" else " " for c in lines[problem.line - 1].removesuffix("\r"))
    before = line[: (problem.column or 1) - 1]
    number = f"{problem.line:>5}"
    pad = "".join("\t" if c == "\t" else " " for c in before)
    return [f"{number} | {line}", f"{' ' * len(number)} | {pad}^"]


_HEADER = re.compile(r"\s*\[")
_KEY = re.compile(r"""\s*(?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*\s*=""")
_SECRETS = ("password", "passphrase", "secret", "token", "apikey", "credential", "authorization")


def _may_hold_secret(lines: Sequence[str], number: int) -> bool:
    """Return whether a line may hold a secret, judged by the words in the line, the key and the table header.

    A value may span several lines. Then the lines from the key to this line are checked as well. The words are compared
    without parsing the file, which may not be valid TOML. Similar words count too, because a key may be misspelled. A
    false positive is harmless, because its only effect is that the line is not shown.
    """
    line = lines[number]
    key_line = next((n for n in range(number, -1, -1) if _KEY.match(lines[n]) or _HEADER.match(lines[n])), 0)
    header = next((lines[n] for n in range(number, -1, -1) if _HEADER.match(lines[n])), "")
    table = [word for word in re.findall(r"[\w-]+", header) if word not in ("tool", "embedonce")]
    if _HEADER.match(line) and "=" not in line:
        return False
    words = [*table[1:], *re.findall(r"[\w-]+", " ".join(lines[key_line:number])), *re.findall(r"[\w-]+", line)]
    return re.search(r"//[^/\s]*@", line) is not None or any(map(_is_secret_word, words))


def _is_secret_word(word: str) -> bool:
    from embedonce._config.secrets import is_secret
    from embedonce._messages import find_closest

    form = word.lower().replace("-", "_")
    return is_secret((form,)) or find_closest(form.replace("_", ""), _SECRETS, likeness=0.8) is not None
