"""``embedonce migrate``: create or update the tables of a store."""

from __future__ import annotations

from .options import ConfigOption, JsonOption
from .output import emit, make_table, show

EPILOG = """
Examples:

embedonce migrate

embedonce migrate --config production.toml

Run this command once with a database role that is allowed to create tables, before you start programs with a role that
is not allowed to create tables. The output ends with the grants that such a role needs. Running this command again
changes nothing.
"""


def migrate(config: ConfigOption = None, json: JsonOption = False) -> None:
    """Create or update the tables of the tiers that have tables (Postgres)."""
    from .opened import open_cache

    with open_cache(config, needs_provider=False) as cache:
        done = cache.migrate()
    if json:
        emit({"tiers": done})
    elif done:
        show(make_table({"tier": "left", "done": "left"}, [[tier, change] for tier, change in done.items()]))
    else:
        show("no tier has tables to migrate")
