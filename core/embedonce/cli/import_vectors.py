"""``embedonce import``: store the vectors that another program has computed, after a proof that they are right."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from embedonce.store_writers import BUNDLE

from .embedding.reading_options import (
    DelimiterOption,
    EncodingOption,
    ExcludeOption,
    FieldOption,
    FormatOption,
    IncludeOption,
    QuoteOption,
    SplitOption,
    check_inputs,
    find_conflict,
    find_stream,
)
from .options import ConfigOption, JsonOption, TaskOption, decode_argument
from .output import FAILED, INTERRUPTED, OK, TERMINATED, Failed, Refused, emit, say, write
from .signals import Terminated, raise_on_sigterm

if TYPE_CHECKING:
    from embedonce.cache import Cache
    from embedonce.config import Config

    from .embedding.progress import Display
    from .embedding.sources import Reader
    from .importing.opening import OpenedSource
    from .importing.reading import SourceReader
    from .importing.run import Run
    from .importing.summary import Summary

EPILOG = """
Examples:

embedonce import vectors.parquet --from table --dry-run

embedonce import langchain-cache/ --from langchain --option namespace=text-embedding-3-small --texts chunks.jsonl

embedonce import redis://localhost:6379/0 --from redisvl --option model=text-embedding-3-small

embedonce import bundle/ --from bundle

First, choose the model that made the vectors as the provider in the configuration.

Some sources hold texts and vectors. Other sources hold no texts, only keys that are made from the texts. For such a
source, --texts names the files that have the texts. They are read as `embedonce embed` reads files. The passages must
be exactly the texts that the other program embedded, so choose --split and --field accordingly.

Before anything is stored, 20 texts are chosen at random from the whole source and embedded anew. If a vector of the
source differs, nothing is imported, the message names the likely cause, and the exit code is 1. With --verify 0,
nothing is compared.

The source of --from bundle is a folder that `embedonce export` has written. Its entries have embedonce's own keys, so
nothing is compared, and no provider is needed. They are copied to each tier that outlives the process, as
`embedonce copy` does it.

If a tier already has the vector of a text, the tier keeps it. So you can repeat the command. After an interruption, run
the same command again. The source is only read. The exit code is 1 if the source cannot be read, if nothing was found,
if a passage could not be read, or if a tier that outlives the process did not store everything.
"""


def import_vectors(
    location: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="Where the vectors are: a file, a folder or a URL.", show_default=False),
    ],
    importer: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="NAME",
            help="The importer that reads the source, such as langchain. `embedonce plugins` lists all importers.",
            show_default=False,
        ),
    ],
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            metavar="NAME=VALUE",
            help="An option of the importer, for example --option namespace=notes. docs/import.md lists the options of "
            "each importer. Can be repeated.",
            show_default=False,
        ),
    ] = None,
    texts: Annotated[
        list[str] | None,
        typer.Option(
            "--texts",
            metavar="PATH",
            help="A file or folder with the texts to look up in the source. Can be repeated. With --verify 0, - is "
            "standard input.",
            show_default=False,
        ),
    ] = None,
    task: TaskOption = "document",
    verify: Annotated[
        int,
        typer.Option(
            "--verify",
            metavar="N",
            min=0,
            help="Embed N texts of the source anew, and import nothing if a vector differs. 0: import without a "
            "comparison.",
        ),
    ] = 20,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Read and verify the source and show the counts, but store nothing. With --verify 0, nothing is "
            "computed.",
        ),
    ] = False,
    config: ConfigOption = None,
    split: SplitOption = "paragraph",
    field: FieldOption = None,
    format: FormatOption = "auto",
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    delimiter: DelimiterOption = None,
    quote: QuoteOption = None,
    encoding: EncodingOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress and no summary.")] = False,
    json: JsonOption = False,
) -> None:
    """Import the vectors that another program has computed, so that they are not paid for again."""
    from embedonce._engine.import_checks import check_source
    from embedonce.config import compose
    from embedonce.errors import ImportRefused

    from .embedding.sources import Reader
    from .importing.opening import make_importer
    from .importing.progress import make_display
    from .importing.run import Run
    from .importing.summary import Summary
    from .opened import list_persistent_tiers, load_config, translate_tier_errors

    if importer == BUNDLE:
        from .importing.bundles import import_bundle

        import_bundle(location, config, dry_run=dry_run, quiet=quiet, json=json)
        return
    if texts:
        check_inputs(texts)
        _check_can_read_twice(texts, verify)
        if problem := find_conflict(format, delimiter, quote, texts):
            raise Refused(problem)
    # What other importers have is not asked for, because this command imports from one source.
    loaded = replace(load_config(config), imports=())
    persistent_tiers = list_persistent_tiers(loaded)
    _check_config(loaded, persistent_tiers, verify)
    opened = make_importer(importer, location, [decode_argument(item) or "" for item in option or ()], loaded)
    try:
        with raise_on_sigterm(), translate_tier_errors(loaded), compose(loaded) as cache:
            try:
                check_source(opened.source, cache.provider, task)
            except ImportRefused as error:
                raise Failed(f"{error}. Nothing was imported") from None
            make_texts: Callable[[], Reader] | None = None
            if texts:
                make_texts = partial(
                    Reader,
                    texts,
                    split=split,
                    field=field,
                    fields=loaded.embed.fields,
                    format=format,
                    leave_out=[str(loaded.file)] if loaded.file else [],
                    include=include or (),
                    exclude=exclude or (),
                    delimiter=delimiter,
                    quote=quote,
                    encoding=encoding,
                )
            make_reader = _choose_way(opened, cache, make_texts)
            opened.call(opened.importer.check)
            summary = Summary(opened.source.name, importer, task, dry_run)
            if not verify:
                say("warning: --verify 0: nothing proves that these are the vectors that the provider computes")
            run = Run(
                cache,
                make_reader,
                summary=summary,
                verify=verify,
                dtype=loaded.cache.dtype,
                with_texts=make_texts is not None,
                persistent_tiers=persistent_tiers,
            )
            total = _find_total(opened, make_texts) if not (json or quiet) else None
            code = _execute(run, partial(make_display, total=total, is_shown=not (json or quiet)), verify)
            run.complete_summary()
    finally:
        opened.close()
    code = _report_tiers(summary, code)
    if json:
        emit(asdict(summary))
    elif not quiet and (summary.found or summary.unreadable):
        from .importing.summary import describe_summary

        for line in describe_summary(summary):
            write(line)
    if code:
        raise typer.Exit(code)


# --- before anything is read ------------------------------------------------------------------


def _check_can_read_twice(texts: list[str], verify: int) -> None:
    stream = find_stream(texts)
    if stream is not None and verify:
        raise Refused(
            f"--texts cannot be {stream}, because the texts are read twice, first for the verification. Write them to "
            "a file first, or use --verify 0 to import without a proof"
        )


def _check_config(loaded: Config, persistent_tiers: list[str], verify: int) -> None:
    if not persistent_tiers:
        raise Refused(
            "no tier that stores vectors outlives this process, so the imported vectors would be lost; add a disk tier"
        )
    if verify and loaded.cache.mode == "replay":
        raise Refused(
            'mode = "replay" computes nothing, so the vectors cannot be verified; set mode = "read-through" for the '
            "import, or use --verify 0 to import without a proof"
        )


def _choose_way(
    opened: OpenedSource, cache: Cache, make_texts: Callable[[], Reader] | None
) -> Callable[[], SourceReader]:
    """Return a function that starts a pass over the source: a lookup of texts, or a scan.

    Raises:
        Refused: the importer does not support this.
    """
    from embedonce._messages import quote

    from .importing.reading import Lookup, Scan

    name = quote(opened.importer_name)
    can_look_up = callable(getattr(opened.importer, "lookup", None))
    can_scan = callable(getattr(opened.importer, "scan", None))
    if make_texts is not None:
        if not can_look_up:
            raise Refused(
                f"the importer {name} does not need --texts, because it reads the whole source; remove --texts"
            )
        return partial(Lookup, opened, cache.normalize, make_texts)
    if not can_scan:
        raise Refused(
            f"the importer {name} needs --texts, because the source holds no texts; name the files that have the texts "
            "that the other program embedded"
        )
    return partial(Scan, opened, cache.normalize)


def _find_total(opened: OpenedSource, make_texts: Callable[[], Reader] | None) -> int | None:
    """Return the size of the whole work for the progress, or None if it is not known."""
    with suppress(Exception):  # whatever the error is, it belongs to the progress alone
        return opened.importer.count() if make_texts is None else make_texts().compute_total_bytes()
    return None


# --- the run and its exit code ----------------------------------------------------------------


def _execute(run: Run, make_display: Callable[[str], Display], verify: int) -> int:
    """Verify and store. Return the exit code. If the run ends early, report the reason and add it to the summary."""
    summary = run.summary
    is_verified = False
    try:
        with make_display("verifying") as display:
            run.verify(display)
        if 0 < summary.verified < verify:
            say(f"note: only {summary.verified:,} of {verify:,} texts could be verified, because no more were found")
        is_verified = True
        with make_display("importing") as display:
            run.store(display)
    except Failed as error:
        return _report_end(run, str(error), f"error: {error}", is_verified=is_verified)
    except KeyboardInterrupt as error:
        _report_end(run, "interrupted", "interrupted", is_verified=is_verified)
        return TERMINATED if isinstance(error, Terminated) else INTERRUPTED
    for line in run.reader.failures.describe():
        say(line)
    return FAILED if run.reader.failures.groups else OK


def _report_end(run: Run, reason: str, message: str, *, is_verified: bool) -> int:
    """Report why a run ended early, and return the exit code."""
    run.summary.stopped = reason
    for line in run.reader.failures.describe():
        say(line)
    if run.summary.dry_run:
        end = "Nothing was stored"
    elif is_verified and run.summary.imported:
        end = "The vectors that were imported until then are stored. Run the same command again to continue"
    else:
        end = "Nothing was imported"
    say(f"{message}. {end}.")
    return FAILED


def _report_tiers(summary: Summary, code: int) -> int:
    """Report the tiers that failed. Return the exit code, which is 1 if a tier did not store everything."""
    from .embedding.summary import describe_tier_failures

    for line in describe_tier_failures(summary.trouble, summary.tier_causes):
        say(line)
    for tier, count in summary.unstored.items():
        say(
            f"error: tier {tier} did not store {count:,} of the imported vectors; check whether the tier's disk is "
            "full or read-only, or whether its server is down (run `embedonce check`), then run the same command again"
        )
    return FAILED if code == OK and summary.unstored else code
