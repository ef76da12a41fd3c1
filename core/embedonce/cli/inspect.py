"""The commands that look and change nothing: ``check``, ``explain``, ``stats``, ``plugins``, ``schema``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Annotated, Any

import typer

from .options import ConfigOption, JsonOption, TaskOption
from .output import FAILED, Refused, count, emit, say, show, shown, table

CHECK_EPILOG = """
Examples:

embedonce check

embedonce check --config production.toml --json

The exit code is 1 where a tier does not answer. The provider is shown, not asked: that may cost money.
"""
EXPLAIN_EPILOG = """
Examples:

embedonce explain "one text"

embedonce explain --stdin --json < one.txt

Nothing is computed, and the text is in no output. A line end at the end of standard input belongs to the text.
"""
STATS_EPILOG = """
Examples:

embedonce stats

embedonce stats --json
"""
PLUGINS_EPILOG = """
Examples:

embedonce plugins

The exit code is 1 where a plugin is installed and cannot be used.
"""
SCHEMA_EPILOG = """
Examples:

embedonce schema > embedonce.schema.json

Then, as the first line of embedonce.toml, for editors that understand it: #:schema ./embedonce.schema.json
"""

CARD = ("provider", "model", "task", "version", "namespace")
"""The parts of a space card that are shown, in this order."""


def check(config: ConfigOption = None, json: JsonOption = False) -> None:
    """Compose the chain, ask each tier whether it answers, and show it."""
    from .opened import opened

    with opened(config) as cache:
        space = cache.provider.space("document").described()
        checks = cache.check()
    if json:
        emit({"provider": space, "tiers": [asdict(one) for one in checks], "ok": all(one.ok for one in checks)})
    else:
        show(f"provider  {space.get('provider')}, model {space.get('model')}, {_dimensions(space)}")
        columns = {"tier": "left", "type": "left", "answers": "left", "ms": "right", "detail": "left"}
        show(table(columns, [[c.tier, c.type, c.ok, f"{c.seconds * 1000:.1f}", c.detail] for c in checks]))
    broken = [one.tier for one in checks if not one.ok]
    if broken:
        say(f"error: {count(len(broken), 'tier')} without an answer: {', '.join(broken)}")
        raise typer.Exit(FAILED)


def _dimensions(space: Mapping[str, Any]) -> str:
    dimensions = space.get("dimensions")
    return "dimensions as the model has them" if dimensions is None else f"{dimensions} dimensions"


def explain(
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="The text.", show_default=False)] = None,
    stdin: Annotated[bool, typer.Option("--stdin", help="Read the text from standard input.")] = False,
    task: TaskOption = "document",
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Show what a text's key is made of, which tier has it, and why the others do not."""
    from .opened import opened

    if stdin == (text is not None):
        raise Refused("give TEXT, or --stdin")
    with opened(config) as cache:
        explained = cache.explain(_read_stdin() if text is None else text, task).as_dict()
    if json:
        emit(explained)
        return
    lines = list(_outline(explained))
    width = max(len(name) for name, _ in lines)
    show("\n".join(f"{name.ljust(width)}  {value}".rstrip() for name, value in lines))


def _read_stdin() -> str:
    if sys.stdin is None:
        raise Refused("standard input is closed")
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise Refused(f"standard input is not UTF-8 at byte {error.start + 1}") from None


def _outline(value: Mapping[str, Any], indent: str = "") -> Iterator[tuple[str, str]]:
    """Yield name and value of a nested mapping, inner ones indented; what is not set is left out."""
    for name, item in value.items():
        if isinstance(item, Mapping):
            yield f"{indent}{name}", ""
            yield from _outline(item, indent + "  ")
        elif isinstance(item, list | tuple):
            if item:
                yield f"{indent}{name}", "; ".join(map(str, item))
        elif item is not None:
            yield f"{indent}{name}", shown(item)


def stats(config: ConfigOption = None, json: JsonOption = False) -> None:
    """Show what the tiers hold, by scope: one row per tier, model, task, version and namespace."""
    from .opened import opened

    with opened(config) as cache:
        listed = cache.contents()
    held = [one for one in listed if one.error is None]
    broken = {one.tier: one.error for one in listed if one.error is not None}
    if json:
        emit({"held": [asdict(one) for one in held], "entries": sum(one.entries for one in held), "errors": broken})
    else:
        rows = [[one.tier, one.scope, *((one.card or {}).get(name) for name in CARD), one.entries] for one in held]
        columns = {"tier": "left", "scope": "left", **dict.fromkeys(CARD, "left"), "entries": "right"}
        show(table(columns, rows) if rows else "The tiers hold nothing.")
    for tier, why in broken.items():
        say(f"tier {tier!r}: {why}")
    if broken:
        raise typer.Exit(FAILED)


def plugins(json: JsonOption = False) -> None:
    """List the backends, providers and normalisation steps that are installed."""
    from embedonce.plugins import installed

    found = installed()
    if json:
        emit([asdict(one) for one in found])
    else:
        rows = [[one.name, ", ".join(one.kinds), f"{one.distribution} {one.version}", one.error] for one in found]
        show(table({"name": "left", "is": "left", "from": "left", "problem": "left"}, rows))
    if any(one.error for one in found):
        raise typer.Exit(FAILED)


def schema(json: JsonOption = False) -> None:
    """Print the JSON schema of the configuration, with the options of all installed plugins."""
    from embedonce import config

    emit(config.schema())
