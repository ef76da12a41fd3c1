"""``embedonce savings``: what all processes that share the tiers have computed and saved."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedonce._reprs import format_percent

from .money import describe_unknown, list_cells, sum_cost
from .options import ConfigOption, JsonOption
from .output import FAILED, Failed, emit, escape_controls, has_blocks, make_table, say, show

if TYPE_CHECKING:
    from embedonce.savings import FoundSavings, Group, Savings

EPILOG = """
Examples:

embedonce savings

embedonce savings --since 30d --by tier

embedonce savings --since 2026-01-01 --by day --plot savings.png

embedonce savings --json

Each process records its work in its slowest tier that can list its keys and outlives the process. It writes the record
about twice a minute while it works, and when it ends. So the work of the last half minute may be missing. Each record
has the work of one day in UTC, and expires after a year. Money is shown for the work that was done with a price in the
table provider, for example price = "0.02 USD / 1M tokens". The time is the sum of the seconds of all calls.
"""

NO_NAME = "(none)"
"""Stands for the namespace of a key policy without a namespace."""
BAR = 40
"""Length of the longest bar in characters."""
MAX_NAME = 60
"""Maximum number of characters of a name beside its bar. The table has the whole name."""


def savings(
    since: Annotated[
        str | None,
        typer.Option(
            "--since",
            metavar="TIME",
            help="First day to add up: a date, or a duration before now, such as 30d. Default: one year ago.",
            show_default=False,
        ),
    ] = None,
    by: Annotated[
        str, typer.Option("--by", metavar="GROUP", help="Show one sum for each tier, model, namespace or day.")
    ] = "model",
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Also write the sums as a plot: .png, .svg or .pdf."),
    ] = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Show the texts, tokens, seconds and money that all processes have computed and saved."""
    from embedonce.savings import add_up, group_savings

    from .opened import open_for_upkeep
    from .plot import check_plot

    group, start = _read_group(by), _read_since(since)
    if plot is not None:
        check_plot(plot)
    with open_for_upkeep(config) as (_, cache):
        found = cache.savings(start)
    groups = group_savings(found.records, group)
    total = add_up(found.records)
    if json:
        emit(
            {
                "since": None if since is None else datetime.fromtimestamp(start, UTC).date().isoformat(),
                "by": group,
                "groups": [{"name": name, **_export_sums(sums)} for name, sums in groups.items()],
                "total": _export_sums(total),
                "tiers": found.tiers,
                "errors": dict(found.errors),
            }
        )
    elif groups:
        show(_make_savings_table(group, groups, total), "")
        full, light = ("█", "░") if has_blocks() else ("#", "-")
        for line in draw_bars(groups, group, full=full, light=light):
            show(line)
    elif found.tiers:
        show(f"No record of work{_describe_since(since)} found in {' and '.join(found.tiers)}.")
    if groups and not json:
        for note in describe_unknown(total.computed, total.saved):
            say(note)
    if plot is not None and groups:
        from .savings_plot import draw_savings

        draw_savings(groups, group, plot)
        say(f"wrote {plot}")
    _report_tiers(found)


def _report_tiers(found: FoundSavings) -> None:
    """Report the tiers that failed.

    Raises:
        typer.Exit: a tier failed.
        Failed: no tier can keep records.
    """
    for tier, reason in found.errors.items():
        say(f"error: tier {tier!r}: {reason}")
    if found.errors:
        raise typer.Exit(FAILED)
    if not found.tiers:
        raise Failed(
            "no tier of this configuration can keep records. A memory tier ends with its process, memcached cannot "
            "list its keys, and nothing is written to a read-only tier. Add a disk, Redis or Postgres tier"
        )


def _read_group(by: str) -> Group:
    groups: dict[str, Group] = {"tier": "tier", "model": "model", "namespace": "namespace", "day": "day"}
    if by not in groups:
        raise typer.BadParameter(f"must be one of {', '.join(groups)}", param_hint="--by")
    return groups[by]


def _read_since(since: str | None) -> float:
    """Return the Unix time that ``--since`` stands for; 0 if it was not given."""
    from embedonce.options import BadValue, parse_duration

    if since is None:
        return 0.0
    try:
        day = date.fromisoformat(since)
    except ValueError:
        try:
            return time.time() - parse_duration(since)
        except BadValue:
            raise typer.BadParameter(
                "must be a date such as 2026-01-31, or a duration such as 30d or 12h", param_hint="--since"
            ) from None
    return datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()


def _describe_since(since: str | None) -> str:
    return "" if since is None else f" since {datetime.fromtimestamp(_read_since(since), UTC).date()}"


def _export_sums(sums: Savings) -> dict[str, Any]:
    return {
        "computed": asdict(sum_cost(sums.computed, sums.spent)),
        "saved": asdict(sum_cost(sums.saved, sums.money_saved)),
    }


def _make_savings_table(group: str, groups: Mapping[str, Savings], total: Savings) -> Any:
    """Return a table with two lines per group: the work that was computed, and the work that was saved."""
    rows: list[list[Any]] = []
    for name, sums in [*groups.items(), *([("total", total)] if len(groups) > 1 else [])]:
        lines = [
            (word, work, money)
            for word, work, money in (("computed", sums.computed, sums.spent), ("saved", sums.saved, sums.money_saved))
            if work.texts or group != "tier"
        ]
        for number, (word, work, money) in enumerate(lines):
            rows.append([" " if number else name or NO_NAME, word, *list_cells(work, money)])
    numbers = ("texts", "tokens", "time", "money")
    return make_table({title: "right" if title in numbers else "left" for title in (group, "work", *numbers)}, rows)


def draw_bars(groups: Mapping[str, Savings], by: Group, *, full: str = "█", light: str = "░") -> list[str]:
    """Return a bar chart: one line per group, with a bar of the texts that were saved (█) and computed (░)."""
    sizes = {name: sums.computed.texts + sums.saved.texts for name, sums in groups.items()}
    names = {name: _shorten(escape_controls(name or NO_NAME)) for name in groups}
    width, longest, total = max(map(len, names.values())), max(sizes.values()), sum(sizes.values())
    lines = []
    for name, sums in groups.items():
        size = max(round(BAR * sizes[name] / max(longest, 1)), 1)
        saved = round(size * sums.saved.texts / max(sizes[name], 1))
        share = sizes[name] / max(total, 1) if by == "tier" else sums.saved.texts / max(sizes[name], 1)
        label = format_percent(share) + (" of all texts" if by == "tier" else " saved")
        lines.append(f"{names[name].ljust(width)}  {full * saved}{light * (size - saved)} {label}")
    return lines


def _shorten(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"
