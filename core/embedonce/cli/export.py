"""``embedonce export``: write entries to a new bundle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embedonce._messages import format_count, join_words

from .embedding.reading_options import DelimiterOption, EncodingOption, FieldOption, FormatOption, QuoteOption
from .options import ConfigOption, JsonOption
from .output import FAILED, Refused, format_bytes, say, write
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
    emit_result,
    list_unknown_scopes,
    run_transfer,
)

if TYPE_CHECKING:
    from embedonce.answers import Exported

EPILOG = """
Examples:

embedonce export --out bundle

embedonce export --out bundle --from redis --model my-model-v2

embedonce export --out bundle --from bundle --replace --except-texts customer-17.txt

embedonce export --out tests/embeddings --texts fixtures/

A bundle is a folder of immutable files, which a tier of the type bundle reads. By default, the entries of all tiers
that outlive the process are exported. Entries keep their vectors, costs, metadata and dates. A bundle of an encrypted
tier is encrypted with the key of the tier.

The new bundle is in the folder only when it is complete. After an interruption or an error, there is no new bundle, and
a bundle that was to be replaced is still there. The exit code is 1 if a tier does not answer for several seconds, or if
no entry matches. The texts of a file of --texts and --except-texts are its passages, with any --split, and the whole
content of the file.
"""


def export(
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="FOLDER",
            help="The folder of the bundle. It is created if it does not exist.",
            show_default=False,
        ),
    ],
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="TIER",
            help="Name of the tier to read. Default: all tiers that outlive the process.",
            show_default=False,
        ),
    ] = None,
    scope: ScopeOption = None,
    model: ModelOption = None,
    version: VersionOption = None,
    namespace: NamespaceOption = None,
    texts: TextsOption = None,
    except_scope: ExceptScopeOption = None,
    except_texts: ExceptTextsOption = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace the bundle in the folder, once the new one is complete.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read the tiers and show the counts, but write nothing.")
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
    """Write entries of the tiers to a new bundle, which other programs and processes can open."""
    from .opened import list_secrets, open_for_upkeep

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
        if source is not None:
            check_lasting_tier(loaded, source)
        elif all(tier.scope == "process" for tier in loaded.tiers):
            raise Refused("no tier outlives a process, so there is nothing to export; add a tier such as disk")
        arguments = selected.read(loaded)
        with TransferDisplay("exporting", is_shown=not (json or quiet)) as display:
            ended = run_transfer(
                lambda: cache.export(out, source, replace=replace, dry_run=dry_run, progress=display, **arguments),
                list_secrets(loaded),
                "No bundle was written",
            )
    exported, code = ended.result, ended.code
    if exported is not None:
        for line in list_unknown_scopes(exported.unknown):
            say(line)
        if not code and not exported.entries:
            code = FAILED
    if json:
        emit_result(exported, ended.stopped, dry_run=dry_run, done=display.done)
    elif exported is not None and not ended.stopped:
        if not exported.entries:
            kept = f". {out} stays as it is; remove the folder if nothing is to stay" if _is_kept(out, replace) else ""
            say(f"{_explain_nothing(exported)}; no bundle was written{kept}")
        elif not quiet:
            for line in _describe_export(exported, dry_run=dry_run):
                write(line)
    if code:
        raise typer.Exit(code)


def _is_kept(out: Path, replace: bool) -> bool:
    """Return whether something was to be replaced, and is still there."""
    return replace and out.expanduser().is_dir() and any(out.expanduser().iterdir())


def _explain_nothing(exported: Exported) -> str:
    if not exported.found:
        return f"no matching entries in {join_words(exported.sources)}"
    return f"none of the {format_count(exported.found, 'entry', 'entries')} can be exported: " + ", ".join(
        f"{count:,} {what}" for count, what in _list_left_out(exported)
    )


def _describe_export(exported: Exported, *, dry_run: bool) -> Iterator[str]:
    entries = format_count(exported.entries, "entry", "entries")
    spaces = format_count(len(exported.scopes), "space")
    encrypted = ", encrypted," if exported.encrypted else ""
    if dry_run:
        yield f"{entries} of {spaces} would be exported{encrypted} to {exported.path}"
    else:
        parts, size = format_count(exported.parts, "part"), format_bytes(exported.bytes)
        yield f"{entries} of {spaces} exported{encrypted} to {exported.path} ({parts}, {size})"
    for count, what in _list_left_out(exported):
        yield f"  {count:,} {what}"


def _list_left_out(exported: Exported) -> Iterator[tuple[int, str]]:
    if exported.expired:
        yield exported.expired, "expired"
    if exported.corrupt:
        yield exported.corrupt, "damaged, or not readable with the keys of the tiers"
