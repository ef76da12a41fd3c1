"""``embedonce compact``: give unused space of the stores back to the system."""

from __future__ import annotations

from .options import ConfigOption, JsonOption
from .output import emit, make_table, show

EPILOG = """
Examples:

embedonce compact

embedonce compact --config production.toml --json

A store keeps the space of removed entries for new entries. Run this command after you have removed many entries, for
example with `embedonce purge`. Also run it once for a disk folder of an earlier version, whose keys it converts. It may
take minutes. It needs no space for a copy, and other programs can read and write meanwhile. If you interrupt this
command, no entry is lost. The exit code is 1 if a store could not be compacted; the other stores are compacted
nevertheless.
"""


def compact(config: ConfigOption = None, json: JsonOption = False) -> None:
    """Give unused space back to the system, in the tiers that support this (disk)."""
    from .opened import open_cache

    with open_cache(config, needs_provider=False) as cache:
        done = cache.compact()
        others = [tier for tier in cache.tiers if tier not in done]
    if json:
        emit({"tiers": done, "nothing_to_compact": others})
    else:
        lines = done | dict.fromkeys(others, "nothing to compact")
        show(make_table({"tier": "left", "size": "left"}, [[tier, lines[tier]] for tier in cache.tiers]))
