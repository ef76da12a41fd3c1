"""The commands that look and change nothing: ``check``, ``config``, ``explain``, ``stats``, ``plugins``, ``schema``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedonce._config.secrets import HIDDEN
from embedonce._messages import quoted

from .options import ConfigOption, JsonOption, TaskOption
from .output import FAILED, Refused, count, emit, say, say_excerpt, show, shown, table

if TYPE_CHECKING:
    from embedonce.plugins import InstalledPlugin

CHECK_EPILOG = """
Examples:

embedonce check

embedonce check --config production.toml --json

The exit code is 1 where a tier does not answer. The provider is shown, not asked: that may cost money. What the chain
is warned of, and plugins that are installed and broken, are named and change no exit code.
"""
CONFIG_EPILOG = """
Examples:

embedonce config

embedonce config --config production.toml --json

A value that is, or may hold, a secret is shown as (hidden), as is text that came out of the environment. Nothing is
opened, and no tier is asked: that is what check does.
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

embedonce plugins --json

Where the configuration has a list of allowed plugins, no others are loaded. The exit code is 1 where a plugin is
broken: not where it is disabled, not allowed, or one of its extras is not installed.
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
    from embedonce.config import warnings

    from .opened import load, opened

    loaded = load(config)
    with _chain_log_silent(), opened(loaded) as cache:
        space = cache.provider.space("document").described()
        checks = cache.check()
        warned = warnings(loaded, cache.warnings)
    unusable = [one for one in _installed(loaded.allow) if one.broken]
    if json:
        emit(
            {
                "provider": space,
                "tiers": [asdict(one) for one in checks],
                "warnings": [asdict(one) for one in warned],
                "plugins": [asdict(one) for one in unusable],
                "ok": all(one.ok for one in checks),
            }
        )
    else:
        show(f"provider  {space.get('provider')}, model {space.get('model')}, {_dimensions(space)}")
        columns = {"tier": "left", "type": "left", "answers": "left", "ms": "right", "detail": "left"}
        show(table(columns, [[c.tier, c.type, c.ok, f"{c.seconds * 1000:.1f}", c.detail] for c in checks]))
    for problem in warned:
        say(f"warning: {problem}")
        say_excerpt(problem)
    for one in unusable:
        say(f"warning: a plugin that is installed cannot be used: {_named(one)}")
    broken = [one.tier for one in checks if not one.ok]
    if broken:
        say(f"error: {count(len(broken), 'tier')} without an answer: {', '.join(broken)}")
        raise typer.Exit(FAILED)


@contextmanager
def _chain_log_silent() -> Iterator[None]:
    """Keep warnings of a chain out of the log where they are shown with their places."""
    log = logging.getLogger("embedonce.chain")
    log.addFilter(_nothing)
    try:
        yield
    finally:
        log.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


def _installed(allow: Sequence[str] | None) -> list[InstalledPlugin]:
    from embedonce import plugins

    with plugins.restrict_plugins(allow):
        return plugins.installed()


def _named(plugin: InstalledPlugin) -> str:
    """Return what is wrong with a plugin, with its name, distribution and version, which the error may have already."""
    error = str(plugin.error)
    named = f'plugin "{plugin.name}" of {plugin.distribution} {plugin.version}'
    return error if error.startswith(named) else f"{named}: {error}"


def config(config: ConfigOption = None, json: JsonOption = False) -> None:
    """Show every value that holds, and where it came from: a line of the file, the environment, or a default."""
    from .opened import load

    loaded = load(config)
    settings = loaded.settings()
    if json:
        emit({"source": loaded.source, "settings": [asdict(one) for one in settings]})
        return
    show(f"from  {loaded.source}")
    show(
        table(
            dict.fromkeys(("setting", "value", "from"), "left"),
            [[s.name, _written(s.value), s.origin] for s in settings],
        )
    )


def _written(value: Any) -> str | None:
    """Return a value much as TOML writes it; what is not set is left empty."""
    if value is None or isinstance(value, bool):
        return None if value is None else str(value).lower()
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(str(_written(item)) for item in value)}]"
    return quoted(value) if isinstance(value, str) and value != HIDDEN else str(value)


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

    with opened(config, computes=False) as cache:
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


def plugins(config: ConfigOption = None, json: JsonOption = False) -> None:
    """List the backends, providers and normalisation steps that are installed."""
    from embedonce.config import read_allow_list

    found = _installed(read_allow_list(config))
    if json:
        emit([asdict(one) for one in found])
    else:
        rows = [[one.type, ", ".join(one.kinds), f"{one.distribution} {one.version}", one.error] for one in found]
        show(table({"type": "left", "is": "left", "from": "left", "problem": "left"}, rows))
    if any(one.broken for one in found):
        raise typer.Exit(FAILED)


def schema(config: ConfigOption = None, json: JsonOption = False) -> None:
    """Print the JSON schema of the configuration, with the options of all installed plugins."""
    from embedonce.config import read_allow_list, schema
    from embedonce.plugins import restrict_plugins

    with restrict_plugins(read_allow_list(config)):
        emit(schema())
