"""What the command line says: results on standard output, everything else on standard error."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import TextIO

    from embedonce.errors import ConfigError, Problem

OK, FAILED, USAGE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
"""Exit codes. The last two are those of a program that a signal ended: 128 and the signal's number."""


class Refused(Exception):
    """A command cannot be carried out as it was given; nothing was done. It ends with exit code 2."""


class Failed(Exception):
    """Something failed that its user must see to; the message says what. It ends with exit code 1."""


def said_of(error: OSError) -> str:
    """Return what the system says of a failed call, with the file that it was for."""
    said = error.strerror or str(error) or type(error).__name__
    return said if error.filename is None else f"{os.fsdecode(error.filename)}: {said}"


def say(message: str) -> None:
    """Write one message to standard error."""
    print(message, file=sys.stderr, flush=True)


_results: TextIO | None = None


@contextlib.contextmanager
def results_alone() -> Iterator[None]:
    """Let what others print go to standard error: a plugin's line would make the document of ``--json`` no JSON."""
    global _results
    before, _results = _results, sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _results = before


def write(line: str) -> None:
    """Write a line to standard output."""
    print(line, file=_results or sys.stdout, flush=True)


def emit(value: Any) -> None:
    """Write one JSON document to standard output. It is ASCII, so that every terminal and pipe takes it."""
    write(json.dumps(value, indent=2, default=str))


def show(*renderables: Any) -> None:
    """Write tables and text to standard output; into a pipe they are as wide as they need to be."""
    from rich.console import Console

    out = _results or sys.stdout
    console = Console(file=out, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(file=out, highlight=False, markup=False, emoji=False, width=500, color_system=None)
    for renderable in renderables:
        console.print(renderable)
    out.flush()


def table(columns: dict[str, str], rows: list[list[Any]]) -> Any:
    """Return a table; ``columns`` maps each title to ``"left"`` or ``"right"``."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title, justify in columns.items():
        made.add_column(title, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        made.add_row(*(Text(shown(cell)) for cell in row))
    return made


def shown(value: Any) -> str:
    """Return a value for people: nothing as ``-``, whole numbers with commas, times with three digits."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)


def count(number: int, noun: str, plural: str = "") -> str:
    """Return ``1 row`` or ``2 rows``."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


# --- configuration errors ---------------------------------------------------------------------


def say_config_error(error: ConfigError) -> None:
    """Name every problem of a configuration; on a terminal, show the line with a mark under the place."""
    for problem in error.problems:
        say(f"error: {problem}")
        say_excerpt(problem)


def say_excerpt(problem: Problem) -> None:
    """On a terminal, show the line that a problem is on with a mark under the place."""
    if is_terminal():
        for line in excerpt(problem):
            say(line)


def is_terminal() -> bool:
    """Whether somebody looks at standard error."""
    return sys.stderr.isatty()


def excerpt(problem: Problem) -> list[str]:
    """Return the line that a problem is on, and a caret under its column; nothing where it has no place.

    Only for a terminal. A line that may hold a secret is not shown at all.
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
    if not 1 <= problem.line <= len(lines) or _holds_secret(lines, problem.line - 1):
        return []
    # A terminal obeys control characters, which only a broken file has.
    line = "".join(c if c.isprintable() or c == "\t" else " " for c in lines[problem.line - 1].removesuffix("\r"))
    before = line[: (problem.column or 1) - 1]
    number = f"{problem.line:>5}"
    pad = "".join("\t" if c == "\t" else " " for c in before)
    return [f"{number} | {line}", f"{' ' * len(number)} | {pad}^"]


_HEADER = re.compile(r"\s*\[")
_KEY = re.compile(r"""\s*(?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*\s*=""")
_SECRETS = ("password", "passphrase", "secret", "token", "apikey", "credential", "authorization")


def _holds_secret(lines: Sequence[str], number: int) -> bool:
    """Whether a line may hold a secret: by the words in it, in the key that it goes on from, and in its table.

    It looks at words alone, since the file may be no TOML, and a key may be misspelled: rather too often.
    """
    line = lines[number]
    begins = next((n for n in range(number, -1, -1) if _KEY.match(lines[n]) or _HEADER.match(lines[n])), 0)
    header = next((lines[n] for n in range(number, -1, -1) if _HEADER.match(lines[n])), "")
    table = [word for word in re.findall(r"[\w-]+", header) if word not in ("tool", "embedonce")]
    if _HEADER.match(line) and "=" not in line:
        return False
    words = [*table[1:], *re.findall(r"[\w-]+", " ".join(lines[begins:number])), *re.findall(r"[\w-]+", line)]
    return re.search(r"//[^/\s]*@", line) is not None or any(map(_is_secretive, words))


def _is_secretive(word: str) -> bool:
    from embedonce._config.secrets import is_secret
    from embedonce._messages import closest

    form = word.lower().replace("-", "_")
    return is_secret((form,)) or closest(form.replace("_", ""), _SECRETS, likeness=0.8) is not None
