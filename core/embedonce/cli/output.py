"""What the command line says: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedonce.errors import ConfigError, Problem

OK, FAILED, USAGE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
"""Exit codes. The last two are those of a program that a signal ended: 128 and the signal's number."""


class Refused(Exception):
    """A command cannot be carried out as it was given; nothing was done. It ends with exit code 2."""


def say(message: str) -> None:
    """Write one message to standard error."""
    print(message, file=sys.stderr, flush=True)


def emit(value: Any) -> None:
    """Write one JSON document to standard output. It is ASCII, so that every terminal and pipe takes it."""
    print(json.dumps(value, indent=2, default=str), flush=True)


def show(*renderables: Any) -> None:
    """Write tables and text to standard output; into a pipe they are as wide as they need to be."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, emoji=False, width=500, color_system=None)
    for renderable in renderables:
        console.print(renderable)
    sys.stdout.flush()


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
        if sys.stderr.isatty():
            for line in excerpt(problem):
                say(line)


def excerpt(problem: Problem) -> list[str]:
    """Return the line that a problem is on, and a caret under its column; nothing where it has no place.

    Only for a terminal: the line may hold a secret, which has no place in a log.
    """
    if problem.file is None or problem.line is None:
        return []
    try:
        with open(problem.file, encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError:
        return []
    if not 1 <= problem.line <= len(lines):
        return []
    line = lines[problem.line - 1]
    before = line[: (problem.column or 1) - 1]
    number = f"{problem.line:>5}"
    pad = "".join("\t" if c == "\t" else " " for c in before)
    return [f"{number} | {line}", f"{' ' * len(number)} | {pad}^"]
