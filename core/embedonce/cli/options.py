"""Options that several commands share."""

from __future__ import annotations

import os
import sys
from contextvars import ContextVar
from typing import Annotated, TypeAlias

import typer

from .output import Refused

ConfigOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Use this TOML file. Default: EMBEDONCE_CONFIG, then embedonce.toml or pyproject.toml in this folder "
        "or a folder above it.",
    ),
]
JsonOption: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on standard output; messages go to standard error.")
]


given_options: ContextVar[frozenset[str]] = ContextVar("embedonce_given_options", default=frozenset())
"""Names of the parameters of the running command that are on the command line, even with their default values."""


def decode_argument(value: str | None) -> str | None:
    """Return an argument that is a text and not the name of a file, as the user typed it.

    Python decodes arguments like names of files. In the C locale, for example, it turns each byte beyond ASCII into a
    lone surrogate.

    Raises:
        typer.BadParameter: the bytes of the argument are not UTF-8.
    """
    if value is None or value.isascii():
        return value
    try:
        value.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(value).decode()
        except UnicodeError:
            raise typer.BadParameter("must be UTF-8") from None
    return value


def _check_task_option(task: str) -> str | None:
    if not task:
        raise typer.BadParameter('must not be empty; use "document" or "query"')
    return decode_argument(task)


TextArgument: TypeAlias = Annotated[
    str | None, typer.Argument(metavar="TEXT", help="The text.", callback=decode_argument, show_default=False)
]


TaskOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--task",
        metavar="TASK",
        callback=_check_task_option,
        help='What the text is embedded for: "document" or "query".',
    ),
]


def read_stdin() -> str:
    """Return standard input as text.

    Raises:
        Refused: it is closed, or it is not UTF-8.
    """
    if sys.stdin is None:
        raise Refused("standard input is closed")
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise Refused(f"standard input is not UTF-8 at byte {error.start + 1}") from None
