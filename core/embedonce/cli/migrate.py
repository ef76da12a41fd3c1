"""``embedonce migrate``: the layout of a store that has one."""

from __future__ import annotations

from .options import ConfigOption, JsonOption
from .output import emit, show, table

EPILOG = """
Examples:

embedonce migrate

embedonce migrate --config production.toml

Run it once with a role that may create tables, before programs whose role may not. Running it again does nothing.
"""


def migrate(config: ConfigOption = None, json: JsonOption = False) -> None:
    """Create or update the tables of tiers that have some (Postgres)."""
    from .opened import opened

    with opened(config, computes=False) as cache:
        done = cache.migrate()
    if json:
        emit({"tiers": done})
    elif done:
        show(table({"tier": "left", "done": "left"}, [[tier, what] for tier, what in done.items()]))
    else:
        show("no tier has a layout to migrate")
