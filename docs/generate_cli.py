"""Write the reference part of docs/command-line.md from the commands themselves.

usage: python docs/generate_cli.py

tests/cli/test_reference.py fails where the page is not what this writes.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from typer.models import OptionInfo

from embedonce.cli import app

PAGE = Path(__file__).parent / "command-line.md"
BEGIN = "<!-- From here on this page is written by docs/generate_cli.py: change the commands instead. -->\n"


def page(current: str) -> str:
    """Return the page with its reference part as it must be."""
    head, mark, _ = current.partition(BEGIN)
    if not mark:
        raise SystemExit(f"{PAGE} has no line {BEGIN!r}")
    return head + BEGIN + "\n" + "\n".join(reference()) + "\n"


def reference() -> Iterator[str]:
    """Yield the lines that describe every command."""
    yield "## All commands and options"
    for command in app.registered_commands:
        callback = command.callback
        assert callback is not None
        name = command.name or callback.__name__
        yield from ("", f"### embedonce {name}", "", inspect.getdoc(callback) or "", "")
        yield from _parameters(callback)
        yield from _epilog(str(command.epilog or ""))


def _parameters(callback: Callable[..., Any]) -> Iterator[str]:
    hints = get_type_hints(callback, include_extras=True)
    yield "| | |"
    yield "| --- | --- |"
    for name, parameter in inspect.signature(callback).parameters.items():
        kind, info = get_args(hints[name])[:2]
        help = " ".join((info.help or "").split()).replace("|", "\\|")
        yield f"| {_spelling(name, kind, info)} | {help}{_default(kind, parameter.default)} |"


def _spelling(name: str, kind: Any, info: Any) -> str:
    """Return how a parameter is written on the command line."""
    repeated = "..." if get_origin(_inner(kind)) is list else ""
    if not isinstance(info, OptionInfo):
        return f"`{(info.metavar or name.upper()) + repeated}`"
    # Inside Annotated, typer keeps the first spelling where a default would be.
    first = [info.default] if isinstance(info.default, str) else []
    spelled = ", ".join([*first, *(info.param_decls or [])] or [f"--{name.replace('_', '-')}"])
    if _inner(kind) is bool:
        return f"`{spelled}`"
    return f"`{spelled} {'NAME' if get_origin(kind) is Literal else info.metavar}`"


def _default(kind: Any, default: Any) -> str:
    choices = f" One of {', '.join(f'`{choice}`' for choice in get_args(kind))}." if get_origin(kind) is Literal else ""
    if default is inspect.Parameter.empty:
        return f"{choices} Required."
    return choices if default is None or default is False else f"{choices} Default: `{default}`."


def _inner(kind: Any) -> Any:
    """Return the type beside None."""
    if get_origin(kind) in (Union, types.UnionType):
        return next(part for part in get_args(kind) if part is not type(None))
    return kind


def _epilog(epilog: str) -> Iterator[str]:
    """Yield the examples as one block, the rest as it is."""
    parts = [" ".join(part.split()) for part in epilog.strip().split("\n\n")]
    examples = [part for part in parts if part.startswith("embedonce ") or " | embedonce " in part]
    yield from ("", "```text", *examples, "```")
    for part in parts:
        if part not in examples and part != "Examples:":
            yield from ("", part)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
