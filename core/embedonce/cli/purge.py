"""``embedonce purge``: remove whole scopes from every tier."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from .inspect import CARD
from .options import ConfigOption, JsonOption
from .output import Refused, count, emit, say, shown

if TYPE_CHECKING:
    from embedonce.answers import Purged

EPILOG = """
Examples:

embedonce purge --version v1 --dry-run

embedonce purge --model my-model-v1 --namespace tests --yes

Options together select what matches all of them. `embedonce stats` shows what there is.
Another process's memory is out of reach: what it holds goes when its TTL or the process ends.
"""


def purge(
    scope: Annotated[str | None, typer.Option("--scope", metavar="SCOPE", help="16 hex digits, from stats.")] = None,
    model: Annotated[str | None, typer.Option("--model", metavar="MODEL", help="Everything of this model.")] = None,
    version: Annotated[
        str | None, typer.Option("--version", metavar="VERSION", help="Everything of this version of the key.")
    ] = None,
    namespace: Annotated[
        str | None, typer.Option("--namespace", metavar="NAME", help='Everything of this namespace; "" is one too.')
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be removed, and remove nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Remove what is stored of a model, a version, a namespace or a scope, from every tier."""
    from .opened import opened

    selected = {"scope": scope, "model": model, "version": version, "namespace": namespace}
    if all(value is None for value in selected.values()):
        raise Refused("say what to purge: --scope, --model, --version or --namespace")
    if scope is not None and not re.fullmatch("[0-9a-f]{16}", scope):
        raise Refused(f"--scope {scope}: a scope has 16 hex digits, as `embedonce stats` shows them")
    asks = not (dry_run or yes)
    if asks and not sys.stdin.isatty():
        raise Refused("nobody can be asked here: add --yes, or look with --dry-run")
    with opened(config, computes=False) as cache:
        if asks:
            would = cache.purge(**selected, dry_run=True)
            if would.scopes and not _confirmed(would):
                say("nothing was removed")
                raise typer.Exit
        purged = cache.purge(**selected, dry_run=dry_run)
    if json:
        emit(asdict(purged) | {"dry_run": dry_run})
    else:
        for line in told(purged, "would be removed" if dry_run else "removed"):
            print(line, flush=True)


def _confirmed(would: Purged) -> bool:
    for line in told(would, "would be removed"):
        say(line)
    try:
        return typer.confirm("Remove this?", err=True)
    except typer.Abort as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        return False  # the end of the input is no yes


def told(purged: Purged, verb: str) -> Iterator[str]:
    """Yield what a purge did, or would do, for people."""
    for scope, card in purged.scopes.items():
        parts = [f"{name} {shown(card[name])}" for name in CARD if card and card.get(name)]
        yield f"{scope}: {', '.join(parts) or 'its space card is lost'}"
    for tier, entries in purged.removed.items():
        yield f"{count(entries, 'entry', 'entries')} {verb} from {tier}"
    if not purged.scopes:
        yield "nothing matches"
