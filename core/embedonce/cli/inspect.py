"""The commands that change nothing: ``check``, ``config``, ``explain``, ``stats``, ``plugins``, ``schema``."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from embedonce._config.secrets import HIDDEN
from embedonce._messages import format_count, quote

from .money import describe_unknown, list_cells, sum_cost
from .options import ConfigOption, JsonOption, TaskOption, TextArgument, read_stdin
from .output import FAILED, Refused, emit, format_bytes, format_date, format_value, make_table, say, say_excerpt, show

if TYPE_CHECKING:
    from embedonce.answers import Held, ImporterCheck, ProviderCheck, TierCheck
    from embedonce.config import Config
    from embedonce.keys import SpaceCard
    from embedonce.plugins import InstalledPlugin
    from embedonce.savings import SavingsRecord

CheckT = TypeVar("CheckT", "ProviderCheck", "ImporterCheck")

CHECK_EPILOG = """
Examples:

embedonce check

embedonce check --provider

embedonce check --config production.toml --json

A probe is written to each tier, read, and deleted. A bundle gets no probe, because it is read-only. Instead, all of its
files are read and compared with their checksums, which takes about as long as copying them. A message says how large
they are. --quick skips this step.

The exit code is 1 if a tier does not answer, if one of these steps fails, if the provider's API key is missing, or if
an importer cannot read its source. The provider is called only with --provider, because a call may cost money. Warnings
about the chain and about broken plugins do not change the exit code.
"""
CONFIG_EPILOG = """
Examples:

embedonce config

embedonce config --config production.toml --json

A value is shown as (hidden) if it is a secret, if it may contain a secret, or if it is text from an environment
variable. This command does not open the tiers; embedonce check does.
"""
EXPLAIN_EPILOG = """
Examples:

embedonce explain "one text"

embedonce explain --stdin --json < one.txt

This command does not embed the text, and its output does not contain the text. A line end at the end of standard input
is part of the text.
"""
STATS_EPILOG = """
Examples:

embedonce stats

embedonce stats --json

A scope is one vector space with one key policy. It is current if the configuration uses it. Dates are in UTC. A column
has no value if the value is unknown. The bytes of a scope are the size of its values. The bytes after the folder of a
tier are the size of its files, which also have keys, indexes and unused space. The second table shows the work of all
processes within the last year. A row "computed" is work that the provider has done. A row "saved by" is work that the
hits of a tier have saved. The time is the sum of the seconds of all calls. `embedonce savings` adds the work up by
model, tier, namespace or day.
"""
PLUGINS_EPILOG = """
Examples:

embedonce plugins

embedonce plugins --json

If the configuration has a list of allowed plugins, no other plugins are loaded. The exit code is 1 if a plugin is
broken. A plugin does not count as broken if it is disabled or not allowed, or if its extra is not installed.
"""
SCHEMA_EPILOG = """
Examples:

embedonce schema > embedonce.schema.json

Then add the following comment as the first line of embedonce.toml. Some editors read the path of the schema from this
comment: #:schema ./embedonce.schema.json
"""

CARD = ("provider", "model", "task", "version", "namespace")
"""Fields of a scope's space card, in the order in which the commands show them."""


def describe_card(card: SpaceCard | None) -> str:
    """Return what a space card says, as one phrase; "" if there is no card."""
    return ", ".join(f"{name} {format_value(card[name])}" for name in (*CARD, "dimensions") if card and card.get(name))


def check(
    config: ConfigOption = None,
    provider: Annotated[
        bool, typer.Option("--provider", help="Also embed one constant text, which may cost money.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Do not read all files of read-only tiers.")] = False,
    json: JsonOption = False,
) -> None:
    """Check the configuration, the provider's API key, the tiers (they store what is written) and the importers."""
    from embedonce.config import warnings

    from .opened import list_secrets, load_config, open_cache

    loaded = load_config(
        config, hint="check the file with `embedonce config`, and a running server with a POST to /admin/check"
    )
    with _silence_chain_log(), open_cache(loaded) as cache:
        space = cache.provider.space("document").described()
        if not quick:
            _announce_verification(loaded)
        checks = cache.check(verify=not quick)
        providers = [_hide_secrets(check, list_secrets(loaded)) for check in cache.check_providers(embed=provider)]
        importers = [_hide_secrets(check, list_secrets(loaded)) for check in cache.check_importers()]
        problems = warnings(loaded, cache.warnings)
    broken_plugins = [plugin for plugin in _list_installed(loaded.allow) if plugin.broken]
    failed_tiers = [check.tier for check in checks if not check.ok]
    failed_providers = [check for check in providers if not check.ok]
    failed_importers = [check for check in importers if not check.ok]
    is_ok = not failed_tiers and not failed_providers and not failed_importers
    if json:
        emit(
            {
                "provider": space,
                "providers": [asdict(check) for check in providers],
                "tiers": [asdict(check) for check in checks],
                "importers": [asdict(check) for check in importers],
                "warnings": [asdict(problem) for problem in problems],
                "plugins": [asdict(plugin) for plugin in broken_plugins],
                "ok": is_ok,
            }
        )
    else:
        show(f"provider  {space.get('provider')}, model {space.get('model')}, {_format_dimensions(space)}")
        for one in providers if provider else ():
            show(_format_provider_check(one))
        titles = ("tier", "type", "answers", "writes", "ms", "detail")
        rows = [
            [c.tier, c.type, _has_answered(c), _describe_writes(c), f"{c.seconds * 1000:.1f}", c.detail] for c in checks
        ]
        show(make_table({title: "right" if title == "ms" else "left" for title in titles}, rows))
        if importers:
            show("", _make_importers_table(importers))
    for problem in problems:
        say(f"warning: {problem}")
        say_excerpt(problem)
    for plugin in broken_plugins:
        say(f"warning: an installed plugin cannot be used: {_describe_broken_plugin(plugin)}")
    for one in failed_providers:
        say(f"error: provider {one.provider!r} cannot be called: {one.detail}")
    unwritten = [check.tier for check in checks if check.writes is False]
    damaged = [check.tier for check in checks if check.verified is False]
    for verb, tiers in (
        ("did not answer", [tier for tier in failed_tiers if tier not in (*unwritten, *damaged)]),
        ("failed to store, return or delete a probe", unwritten),
        ("cannot be read completely", damaged),
    ):
        if tiers:
            say(f"error: {format_count(len(tiers), 'tier')} {verb}: {', '.join(tiers)}")
    for failed in failed_importers:
        say(f"error: importer {failed.importer!r} cannot read its source: {failed.detail}")
    if not is_ok:
        raise typer.Exit(FAILED)


def _announce_verification(loaded: Config) -> None:
    """Say which stores are going to be read as a whole, and how large they are, because this may take minutes."""
    from .opened import list_folders, measure_folder

    folders = list_folders(loaded)
    for tier in loaded.tiers:
        if hasattr(tier.cls, "verify"):
            size = f" ({format_bytes(measure_folder(folders[tier.name]))})" if tier.name in folders else ""
            say(f"verifying tier {tier.name!r}{size} …")


def _has_answered(check: TierCheck) -> bool:
    return check.ok or check.writes is not None or check.verified is not None


def _describe_writes(check: TierCheck) -> bool | str | None:
    return "read-only" if check.read_only else check.writes


def _make_importers_table(importers: Sequence[ImporterCheck]) -> Any:
    rows = [[c.importer, c.source, c.ok, c.verification, f"{c.seconds * 1000:.1f}"] for c in importers]
    titles = ("importer", "source", "answers", "verification", "ms")
    return make_table({title: "right" if title == "ms" else "left" for title in titles}, rows)


def _hide_secrets(check: CheckT, secrets: Collection[str]) -> CheckT:
    """Return a result without its detail if the detail contains a secret of the configuration."""
    if any(secret in check.detail for secret in secrets):
        return replace(check, detail="(message hidden, because it contains a secret)")
    return check


def _format_provider_check(check: ProviderCheck) -> str:
    if not check.ok:
        return f"called    {check.provider}: failed"
    model = f", answered as {check.model}" if check.model else ""
    return f"called    {check.provider}: {check.dimensions} dimensions in {check.seconds * 1000:.1f} ms{model}"


@contextmanager
def _silence_chain_log() -> Iterator[None]:
    """Keep chain warnings out of the log, because the command prints the warnings, with line and column."""
    log = logging.getLogger("embedonce.chain")
    log.addFilter(_drop_record)
    try:
        yield
    finally:
        log.removeFilter(_drop_record)


def _drop_record(record: logging.LogRecord) -> bool:
    return False


def _list_installed(allow: Sequence[str] | None) -> list[InstalledPlugin]:
    from embedonce import plugins

    with plugins.restrict_plugins(allow):
        return plugins.installed()


def _describe_broken_plugin(plugin: InstalledPlugin) -> str:
    """Return a plugin's error. Put the plugin's name, distribution and version before the error.

    An error that already starts with the name, distribution and version is returned unchanged.
    """
    error = str(plugin.error)
    name = f'plugin "{plugin.name}" of {plugin.distribution} {plugin.version}'
    return error if error.startswith(name) else f"{name}: {error}"


def config(config: ConfigOption = None, json: JsonOption = False) -> None:
    """Show every effective setting and its source: a line of the file, an environment variable, or a default."""
    from embedonce.config import load

    from .opened import describe_source

    loaded = load(config)
    describe_source(loaded)
    settings = loaded.settings()
    if json:
        emit({"source": loaded.source, "settings": [asdict(setting) for setting in settings]})
        return
    show(f"from  {loaded.source}")
    show(
        make_table(
            dict.fromkeys(("setting", "value", "from"), "left"),
            [[setting.name, _format_toml(setting.value), setting.origin] for setting in settings],
        )
    )


def _format_toml(value: Any) -> str | None:
    """Format a value much like TOML does; return None for a setting without a value."""
    if value is None or isinstance(value, bool):
        return None if value is None else str(value).lower()
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(str(_format_toml(item)) for item in value)}]"
    return quote(value) if isinstance(value, str) and value != HIDDEN else str(value)


def _format_dimensions(space: Mapping[str, Any]) -> str:
    dimensions = space.get("dimensions")
    return "the model's own dimensions" if dimensions is None else f"{dimensions} dimensions"


def explain(
    text: TextArgument = None,
    stdin: Annotated[bool, typer.Option("--stdin", help="Read the text from standard input.")] = False,
    task: TaskOption = "document",
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Show how a text's key is made, which tier has the vector, and why the other tiers do not have it."""
    from .opened import open_cache

    if stdin == (text is not None):
        raise Refused("explain requires either TEXT or --stdin")
    with open_cache(config) as cache:
        explained = cache.explain(read_stdin() if text is None else text, task).as_dict()
    if json:
        emit(explained)
        return
    lines = list(_flatten(explained))
    width = max(len(name) for name, _ in lines)
    show("\n".join(f"{name.ljust(width)}  {value}".rstrip() for name, value in lines))


def _flatten(value: Mapping[str, Any], indent: str = "") -> Iterator[tuple[str, str]]:
    """Yield the names and values of a nested mapping. Indent the inner names; skip None and empty lists."""
    for name, item in value.items():
        if isinstance(item, Mapping):
            yield f"{indent}{name}", ""
            yield from _flatten(item, indent + "  ")
        elif isinstance(item, list | tuple):
            if item:
                yield f"{indent}{name}", "; ".join(map(str, item))
        elif item is not None:
            yield f"{indent}{name}", format_value(item)


def stats(config: ConfigOption = None, json: JsonOption = False) -> None:
    """Show the entries that each tier has in each scope, and the work that was computed and saved in each scope."""
    from embedonce.savings import add_up, group_by_scope

    from .opened import list_folders, measure_folder, open_for_upkeep

    with open_for_upkeep(config) as (loaded, cache):
        contents = cache.contents()
        found = cache.savings()
    work = group_by_scope(found.records)
    held = [one for one in contents if one.error is None]
    errors = dict(found.errors) | {one.tier: one.error for one in contents if one.error is not None}
    folders = list_folders(loaded)
    sizes = {tier: measure_folder(folder) for tier, folder in folders.items()}
    if json:
        entries = sum(one.entries for one in held)
        emit(
            {
                "held": [asdict(one) for one in held],
                "entries": entries,
                "work": [_export_scope(records) for records in work.values()],
                "errors": errors,
                "folders": folders,
                "folder_bytes": sizes,
            }
        )
    else:
        write_line = show if held else say  # without contents, the folders are only a hint where to look
        for tier, folder in folders.items():
            write_line(f"{tier}  {folder}  {format_bytes(sizes[tier])}")
        if held:
            show(_make_contents_table(held))
        elif not errors:  # a tier that cannot be listed may have entries
            show("The tiers are empty.")
        if work:
            show("", _make_work_table(work))
            total = add_up(found.records)
            for note in describe_unknown(total.computed, total.saved):
                say(note)
    for tier, reason in dict.fromkeys((one.tier, one.unmeasured) for one in held if one.unmeasured):
        say(f"note: tier {tier!r}: bytes and dates not measured: {reason}")
    for tier, error in errors.items():
        say(f"tier {tier!r}: {error}")
    if errors:
        raise typer.Exit(FAILED)


def _make_contents_table(held: Sequence[Held]) -> Any:
    numbers = ("dimensions", "entries", "bytes")
    titles = ("tier", "scope", *CARD, *numbers, "oldest", "newest", "current")
    rows = [[*_list_card(one), one.dimensions, one.entries, one.bytes, *_list_dates(one), one.current] for one in held]
    return make_table({title: "right" if title in numbers else "left" for title in titles}, rows)


def _make_work_table(work: Mapping[str, Sequence[SavingsRecord]]) -> Any:
    """Return a table with a row for the computed texts of each scope, and a row for the hits of each tier."""
    from embedonce.savings import add_up, group_savings

    rows: list[list[Any]] = []
    for scope, records in work.items():
        sums = add_up(records)
        card = [getattr(records[-1], name) for name in CARD]
        rows.append([scope, *card, "computed", *list_cells(sums.computed, sums.spent)])
        for tier, saved in group_savings(records, "tier").items():
            if saved.saved.texts:
                rows.append([scope, *card, f"saved by {tier}", *list_cells(saved.saved, saved.money_saved)])
    numbers = ("texts", "tokens", "time", "money")
    titles = ("scope", *CARD, "work", *numbers)
    return make_table({title: "right" if title in numbers else "left" for title in titles}, rows)


def _export_scope(records: Sequence[SavingsRecord]) -> dict[str, Any]:
    from embedonce.savings import add_up, group_savings

    sums = add_up(records)
    return {
        "scope": records[-1].scope,
        **{name: getattr(records[-1], name) for name in CARD},
        "computed": asdict(sum_cost(sums.computed, sums.spent)),
        "saved": {
            tier: asdict(sum_cost(saved.saved, saved.money_saved))
            for tier, saved in group_savings(records, "tier").items()
            if saved.saved.texts
        },
    }


def _list_card(held: Held) -> list[Any]:
    return [held.tier, held.scope, *((held.card or {}).get(name) for name in CARD)]


def _list_dates(held: Held) -> list[str | None]:
    return [format_date(held.oldest), format_date(held.newest)]


def plugins(config: ConfigOption = None, json: JsonOption = False) -> None:
    """List the installed backends, providers, importers and normalisation steps."""
    from embedonce.config import read_allow_list

    found = _list_installed(read_allow_list(config))
    if json:
        emit([asdict(one) for one in found])
    else:
        rows = [[one.type, ", ".join(one.kinds), f"{one.distribution} {one.version}", one.error] for one in found]
        show(make_table({"type": "left", "is": "left", "from": "left", "problem": "left"}, rows))
    if any(one.broken for one in found):
        raise typer.Exit(FAILED)


def schema(config: ConfigOption = None, json: JsonOption = False) -> None:
    """Print the JSON schema of the configuration, with the options of all installed plugins."""
    from embedonce.config import read_allow_list, schema
    from embedonce.plugins import restrict_plugins

    with restrict_plugins(read_allow_list(config)):
        emit(schema())
