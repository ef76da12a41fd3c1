"""``embedonce copy``: copy entries from one tier to another one."""

from __future__ import annotations

from typing import Annotated

import typer

from .embedding.reading_options import DelimiterOption, EncodingOption, FieldOption, FormatOption, QuoteOption
from .options import ConfigOption, JsonOption
from .output import FAILED, say, write
from .signals import raise_on_sigterm
from .transfers import (
    ExceptScopeOption,
    ExceptTextsOption,
    ModelOption,
    NamespaceOption,
    QuietOption,
    ScopeOption,
    Selected,
    TextsOption,
    TransferDisplay,
    VersionOption,
    check_lasting_tier,
    copy_entries,
    describe_copy,
    emit_result,
    list_copy_notes,
)

EPILOG = """
Examples:

embedonce copy --from redis --to disk

embedonce copy --from disk --to postgres --model my-model-v2 --dry-run

embedonce copy --from memcached --to redis --texts chunks.jsonl

Entries are copied as they are: vectors, costs, metadata and dates. Nothing is computed. An entry lives in the target as
long as in the source, or for the ttl of the target if that is shorter. Entries that the target has already are skipped.
So after an interruption or an error, run the same command again, and it continues.

A tier that is busy gets several tries. If it does not answer for several seconds, the command stops with exit code 1.
The exit code is also 1 if nothing matches, or if an entry is too large for the target. A file of --texts and
--except-texts is read as `embedonce forget --file` reads it.
"""


def copy(
    source: Annotated[
        str, typer.Option("--from", metavar="TIER", help="Name of the tier to read.", show_default=False)
    ],
    target: Annotated[
        str, typer.Option("--to", metavar="TIER", help="Name of the tier to write to.", show_default=False)
    ],
    scope: ScopeOption = None,
    model: ModelOption = None,
    version: VersionOption = None,
    namespace: NamespaceOption = None,
    texts: TextsOption = None,
    except_scope: ExceptScopeOption = None,
    except_texts: ExceptTextsOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read both tiers and show the counts, but store nothing.")
    ] = False,
    field: FieldOption = None,
    format: FormatOption = "auto",
    delimiter: DelimiterOption = None,
    quote: QuoteOption = None,
    encoding: EncodingOption = None,
    config: ConfigOption = None,
    quiet: QuietOption = False,
    json: JsonOption = False,
) -> None:
    """Copy entries from one tier to another one, with their costs, metadata and dates."""
    from .opened import open_for_upkeep

    selected = Selected(
        scope=scope,
        model=model,
        version=version,
        namespace=namespace,
        texts=texts or (),
        except_scopes=except_scope or (),
        except_texts=except_texts or (),
        field=field,
        format=format,
        delimiter=delimiter,
        quote=quote,
        encoding=encoding,
    )
    selected.check()
    with raise_on_sigterm(), open_for_upkeep(config) as (loaded, cache):
        for name in (source, target):
            check_lasting_tier(loaded, name)
        arguments = selected.read(loaded)
        with TransferDisplay("copying", is_shown=not (json or quiet)) as display:
            ended = copy_entries(cache, loaded, source, target, display, dry_run=dry_run, **arguments)
    copied, code = ended.result, ended.code
    if copied is not None:
        for line in list_copy_notes(copied):
            say(line)
        if not code and (copied.too_large or not copied.found):
            code = FAILED
    if json:
        emit_result(copied, ended.stopped, dry_run=dry_run, done=display.done)
    elif copied is not None and (copied.found or not ended.stopped):
        for line in describe_copy(copied, dry_run=dry_run):
            if not quiet:
                write(line)
            elif not copied.found:
                say(line)
    if code:
        raise typer.Exit(code)
