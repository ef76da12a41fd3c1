"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

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


def _check_task_option(task: str) -> str:
    if not task:
        raise typer.BadParameter('must not be empty; use "document" or "query"')
    return task


TaskOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--task",
        metavar="TASK",
        callback=_check_task_option,
        help='What the text is embedded for: "document" or "query".',
    ),
]
