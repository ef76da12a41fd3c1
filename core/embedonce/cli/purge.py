"""``embedonce purge``: remove whole scopes from every tier."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from embedonce._engine.read_only import exclude_scopes
from embedonce._messages import format_count
from embedonce.errors import EraseIncomplete

from .inspect import describe_card
from .options import ConfigOption, JsonOption, decode_argument
from .output import FAILED, Refused, emit, say, write

if TYPE_CHECKING:
    from embedonce.answers import Purged

EPILOG = """
Examples:

embedonce purge --version v1 --dry-run

embedonce purge --model my-model-v1 --namespace tests --yes

embedonce purge --unused --dry-run

If you give several options, only scopes that match all of them are removed. `embedonce stats` lists the scopes.
With --unused, the scopes of other namespaces, versions and models are removed, even if another program uses them.
This command cannot reach the memory tier of another process. The entries in that memory remain until they expire or
until that process ends. The exit code is 1 if a tier was not reached, or if a read-only tier has some of the entries.
Then a message has the command that rebuilds the store of this tier without them.
"""


_text_option = partial(typer.Option, callback=decode_argument)


def purge(
    scope: Annotated[
        str | None,
        typer.Option(
            "--scope",
            metavar="SCOPE",
            callback=decode_argument,
            help="The scope with this ID, 16 hex digits, as stats shows it.",
        ),
    ] = None,
    model: Annotated[str | None, _text_option("--model", metavar="MODEL", help="All scopes of this model.")] = None,
    version: Annotated[
        str | None,
        _text_option("--version", metavar="VERSION", help="All scopes of this key version."),
    ] = None,
    namespace: Annotated[
        str | None,
        typer.Option(
            "--namespace",
            metavar="NAME",
            callback=decode_argument,
            help='All scopes of this namespace; "" is the default namespace.',
        ),
    ] = None,
    unused: Annotated[
        bool,
        typer.Option("--unused", help="All scopes that the configuration does not use now, for any task."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be removed, and remove nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Remove all vectors of a model, a version, a namespace or a scope from every tier."""
    from embedonce.answers import Purged

    from .opened import explain_kept, load_config, open_cache

    if all(value is None for value in (scope, model, version, namespace)) and not unused:
        raise Refused("say what to purge: add --scope, --model, --version or --namespace, or --unused")
    if scope is not None and not re.fullmatch("[0-9a-f]{16}", scope):
        raise Refused(f"--scope {scope}: must be 16 hex digits, as `embedonce stats` shows them")
    must_ask = not (dry_run or yes)
    if must_ask and not (sys.stdin and sys.stdin.isatty()):
        raise Refused("cannot ask for confirmation without a terminal: add --yes, or try --dry-run first")
    loaded = load_config(config, needs_provider=unused)
    if unused and (loaded.serve.models or loaded.serve.tenants):
        raise Refused(
            "--unused would also remove vectors that embedonce serve uses, because its models and tenants have scopes "
            "of their own; say what to purge with --scope, --model, --version or --namespace"
        )
    with open_cache(loaded) as cache:
        purge_selected = partial(
            cache.purge, scope=scope, model=model, version=version, namespace=namespace, unused=unused
        )
        if must_ask:
            preview = purge_selected(dry_run=True)
            if preview.scopes and not _confirm_purge(preview):
                say("nothing was removed")
                raise typer.Exit
        failed: dict[str, str] = {}
        try:
            purged = purge_selected(dry_run=dry_run)
        except EraseIncomplete as error:
            purged = Purged(error.matched, error.removed, error.kept)
            failed = error.tiers | explain_kept(loaded, error.kept, exclude_scopes)
    if json:
        emit(asdict(purged) | {"dry_run": dry_run, "failed": failed})
    else:
        for line in describe_purge(purged, "would be removed" if dry_run else "removed"):
            write(line)
    for tier, reason in failed.items():
        say(f"error: tier {tier!r} may still have entries: {reason}")
    if failed:
        raise typer.Exit(FAILED)


def _confirm_purge(preview: Purged) -> bool:
    for line in describe_purge(preview, "would be removed"):
        say(line)
    try:
        return typer.confirm("Remove this?", err=True)
    except typer.Abort as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        return False  # the end of the input counts as the answer "no"


def describe_purge(purged: Purged, verb: str) -> Iterator[str]:
    """Yield the scopes and counts of a purge, one line each. ``verb`` is "removed" or "would be removed"."""
    for scope, card in purged.scopes.items():
        yield f"{scope}: {describe_card(card) or 'unknown (its space card is missing)'}"
    for tier, entries in purged.removed.items():
        yield f"{format_count(entries, 'entry', 'entries')} {verb} from {tier}"
    for tier, scopes in purged.kept.items():
        yield f"{format_count(sum(scopes.values()), 'entry', 'entries')} kept in {tier}, which is read-only"
    if not purged.scopes:
        yield "nothing matches"
