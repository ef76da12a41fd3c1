"""``embedonce embed``: embed the passages of files and write their vectors."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embedonce._messages import format_count

from .embedding.reading_options import (
    DelimiterOption,
    EncodingOption,
    ExcludeOption,
    FieldOption,
    FormatOption,
    IncludeOption,
    KeepOption,
    QuoteOption,
    SplitOption,
    check_inputs,
    find_conflict,
)
from .options import ConfigOption, JsonOption, TaskOption
from .output import FAILED, INTERRUPTED, OK, TERMINATED, Refused, emit, is_terminal, say, write
from .signals import Terminated, raise_on_sigterm

if TYPE_CHECKING:
    from embedonce.cache import Cache
    from embedonce.config import Config

    from .embedding.cost_limit import CostLimit
    from .embedding.dry_run import DryRun
    from .embedding.progress import Display
    from .embedding.run import Run
    from .embedding.sinks import Sink
    from .embedding.sources import Reader
    from .embedding.summary import Summary

EPILOG = """
Examples:

embedonce embed docs/ --out docs.npy

embedonce embed questions.jsonl --field question.text --task query --out questions.parquet

embedonce embed export.csv --delimiter ';' --encoding cp1252 --field body --keep id --out export.parquet

embedonce embed answers.tsv.gz --quote none --field answer --out answers.npy

embedonce embed repository/ --include '*.md' --exclude drafts/ --out repository.npy

embedonce embed dump.jsonl --format json --out dump.npy

zcat corpus.gz | embedonce embed - --split line --out corpus.jsonl

embedonce embed inbox/ --allow-empty --out inbox.npy

embedonce embed docs/ --dry-run

embedonce embed docs/ --out docs.npy --max-cost 5

Rows are in the order of the input: the paths as given, and the entries of each folder sorted by name. If a file cannot
be read, or if a passage cannot be read or embedded, the output has no rows for this file or passage. The failures are
reported on standard error, grouped by file and reason, and the exit code is 1. If there is no passage at all, the exit
code is 1 as well, and an earlier output stays, unless you pass --allow-empty. If a run is interrupted, run the same
command again. Vectors that a disk tier or a network tier has already stored are not computed again.

--dry-run reads the same files as a run and looks up their texts. It computes and stores nothing, and sends no text to
the provider. --max-cost makes this estimate before the run, so the files are read twice. If the price may be above the
limit, embed asks for confirmation on a terminal. Without a terminal, the exit code is 1, and nothing is computed. Set
the price of the provider's tokens in the table provider, for example price = "0.02 USD / 1M tokens". --max-cost
requires a price. Without a price, --dry-run shows no amount of money.
"""


def embed(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATH", help="Files and folders to read; - is standard input.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="The file to write: .npy, .jsonl or .parquet. Required, except with --dry-run.",
            show_default=False,
        ),
    ] = None,
    config: ConfigOption = None,
    split: SplitOption = "paragraph",
    field: FieldOption = None,
    keep: KeepOption = None,
    format: FormatOption = "auto",
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    delimiter: DelimiterOption = None,
    quote: QuoteOption = None,
    encoding: EncodingOption = None,
    task: TaskOption = "document",
    with_text: Annotated[
        bool, typer.Option("--with-text", help="Write the text of each passage beside its source.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first failure, and write no output.")] = False,
    allow_empty: Annotated[
        bool, typer.Option("--allow-empty", help="Write an output without rows if there is no passage.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Embed nothing. Show how many texts no tier has, and the tokens, price and time of a run.",
        ),
    ] = False,
    max_cost: Annotated[
        str | None,
        typer.Option(
            "--max-cost",
            metavar="AMOUNT",
            help="If the texts that no tier has may cost more, ask for confirmation. Without a terminal, stop.",
            show_default=False,
        ),
    ] = None,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", help="Show no progress and no summary. The result of --dry-run is still shown."),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Embed the passages of files, each distinct text once, and write one row per passage."""
    from embedonce.config import compose

    from .embedding.cost_limit import check_can_read_twice, read_limit
    from .embedding.dry_run import DryRun
    from .embedding.run import Run
    from .embedding.sources import Reader
    from .opened import list_persistent_tiers, load_config, translate_tier_errors

    loaded = load_config(config)
    limit = None if max_cost is None else read_limit(max_cost, loaded)
    keep = list(dict.fromkeys(keep or loaded.embed.keep))
    sink = _open_output(out, with_text, keep, dry_run=dry_run)
    try:
        _check_paths(paths, out)
        if problem := find_conflict(format, delimiter, quote, paths):
            raise Refused(problem)
        if limit is not None and not dry_run:
            check_can_read_twice(paths)
        # Do not embed the configuration file. It may hold secrets, which must not be sent to a provider.
        leave_out = [*_list_output_files(out), *([str(loaded.file)] if loaded.file else [])]
        make_reader = partial(
            Reader,
            paths,
            split=split,
            field=field,
            fields=loaded.embed.fields,
            format=format,
            leave_out=leave_out,
            keep=keep,
            include=include or (),
            exclude=exclude or (),
            delimiter=delimiter,
            quote=quote,
            encoding=encoding,
        )
        show = not (json or quiet)
        with raise_on_sigterm(), translate_tier_errors(loaded), compose(loaded) as cache:
            trial = None
            if dry_run or (limit is not None and loaded.cache.mode != "replay"):
                trial = DryRun(cache, make_reader(), task=task, strict=strict, allow_empty=allow_empty)
                code = _execute_dry_run(trial, loaded, limit, show=show, can_ask=not dry_run)
                if out is None or dry_run or code:
                    _print_dry_run(trial, loaded, as_json=json, quiet=quiet, dry_run=dry_run)
                    raise typer.Exit(code)
            assert out is not None
            assert sink is not None
            reader = make_reader()
            run = Run(
                cache,
                reader,
                sink,
                task=task,
                strict=strict,
                allow_empty=allow_empty,
                persistent_tiers=list_persistent_tiers(loaded),
            )
            run.summary.estimate = None if trial is None else trial.summary.estimate
            code = _execute_run(run, loaded, out, _make_display(reader, cache, show=show))
    finally:
        if sink is not None:
            sink.abort()
    for line in _list_messages(run, reader, quiet=quiet):
        say(line)
    if limit is not None and (excess := limit.describe_real_excess(run.summary)):
        say(excess)
    _print_summary(run.summary, as_json=json, quiet=quiet)
    if code:
        raise typer.Exit(code)


# --- before anything is computed --------------------------------------------------------------


def _open_output(out: Path | None, with_text: bool, keep: Sequence[str], *, dry_run: bool) -> Sink | None:
    """Return the sink of the output. In a dry run, only check the output, and return None."""
    from .embedding.sinks import SinkError, check_output, open_sink

    if out is None:
        if dry_run:
            return None
        raise Refused("--out is missing: name the file to write, such as --out vectors.npy, or use --dry-run")
    try:
        if not dry_run:
            return open_sink(out, with_text=with_text, keep=keep)
        check_output(out, with_text=with_text, keep=keep)
        return None
    except SinkError as error:
        raise Refused(str(error)) from None


def _list_output_files(out: Path | None) -> list[str]:
    from .embedding.sinks import list_written_files

    return [] if out is None else [str(path) for path in list_written_files(out)]


def _check_paths(paths: Sequence[str], out: Path | None) -> None:
    check_inputs(paths)
    outputs = set(map(os.path.realpath, _list_output_files(out)))
    for path in paths:
        if path != "-" and os.path.realpath(path) in outputs:
            raise Refused(f"{path}: --out would overwrite this input; choose another output file")


def _make_display(reader: Reader, cache: Cache | None, *, show: bool) -> Display:
    """Return the display of the progress: a bar on a terminal, a line now and then elsewhere.

    An error in the display costs only the display. Without ``cache``, it is the display of a dry run.
    """
    from .embedding.progress import Bar, Display, Lines, Progress, ReadingProgress

    display = Display()
    if show:
        with suppress(Exception):
            total = reader.compute_total_bytes()
            progress = ReadingProgress(total) if cache is None else Progress(total)
            display = Display(progress, Bar(progress) if is_terminal() else Lines(progress, say))
            if cache is not None:
                cache.subscribe(display.handle_event)
    return display


# --- the dry run and its exit code ------------------------------------------------------------


def _execute_dry_run(trial: DryRun, config: Config, limit: CostLimit | None, *, show: bool, can_ask: bool) -> int:
    """Execute a dry run and return the exit code.

    If ``can_ask`` is set, this is the first part of a run, and 0 means that the run may go on. In this case the run,
    not the dry run, reports the failures of the input.
    """
    from .embedding.dry_run import describe_tier_errors
    from .embedding.run import Stopped

    summary = trial.summary
    try:
        with _make_display(trial.reader, None, show=show) as display:
            estimate = trial.execute(display)
        for line in describe_tier_errors(estimate):
            say(line)
        if limit is not None and limit.is_exceeded(estimate):
            summary.stopped = limit.describe_excess(estimate)
            if can_ask and _can_ask():
                from .embedding.cost_limit import ask_to_embed

                return OK if ask_to_embed(summary.stopped) else _report_early_end(trial, summary.stopped, "stopped")
            advice = " To embed anyway, raise --max-cost; --dry-run shows more." if can_ask else ""
            return _report_early_end(trial, summary.stopped, f"error: {summary.stopped}", advice)
    except Stopped as error:
        return _report_early_end(trial, str(error), f"stopped: {error}")
    except KeyboardInterrupt as error:
        _report_early_end(trial, "interrupted", "interrupted")
        return TERMINATED if isinstance(error, Terminated) else INTERRUPTED
    if can_ask:
        return OK
    for line in trial.failures.describe():
        say(line)
    fails_in_replay = config.cache.mode == "replay" and estimate.missing
    return FAILED if summary.failed or fails_in_replay else OK


def _report_early_end(trial: DryRun, reason: str, message: str, advice: str = "") -> int:
    """Report the failures of a dry run, and why it ended early or why no run follows. Return the exit code."""
    trial.summary.stopped = reason
    for line in trial.failures.describe():
        say(line)
    say(f"{message}; nothing was computed.{advice}")
    return FAILED


def _can_ask() -> bool:
    return sys.stdin is not None and sys.stdin.isatty() and is_terminal()


def _print_dry_run(trial: DryRun, config: Config, *, as_json: bool, quiet: bool, dry_run: bool) -> None:
    """Print the result of a dry run that ends the command. Without ``as_json``, print it only with ``--dry-run``."""
    from .embedding.dry_run import describe_dry_run

    if not quiet:
        for note in trial.reader.notes:
            say(note)
    if as_json:
        emit(asdict(trial.summary))
    elif dry_run and trial.estimate is not None:
        for line in describe_dry_run(trial.summary, trial.estimate, is_replay=config.cache.mode == "replay"):
            write(line)


# --- the run and its exit code ----------------------------------------------------------------


def _execute_run(run: Run, config: Config, out: Path, display: Display) -> int:
    """Execute the run and return the exit code. If the run ends early, report the reason and add it to the summary."""
    from .embedding.run import Stopped
    from .embedding.sinks import SinkError, list_outputs

    summary = run.summary
    try:
        with display:
            run.embed(display)
    except Stopped as error:
        return _report_end(run, str(error), f"stopped: {error}; no output was written", config, error.is_temporary)
    except KeyboardInterrupt as error:
        _report_end(run, "interrupted", "interrupted; no output was written", config)
        return TERMINATED if isinstance(error, Terminated) else INTERRUPTED
    except (OSError, SinkError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        reason = f"cannot write {out}: {reason or type(error).__name__}"
        return _report_end(run, reason, f"error: {reason}", config)
    summary.out = str(out)
    summary.index = next(map(str, list_outputs(out)[1:]), None)
    for line in run.failures.describe():
        say(line)
    return FAILED if summary.failed or summary.unstored else OK


def _report_end(run: Run, reason: str, message: str, config: Config, is_temporary: bool = True) -> int:
    """Report why a run ended early, after the failures that it had, and return the exit code."""
    run.summary.stopped = reason
    for line in run.failures.describe():
        say(line)
    nothing_read = "Run the same command again." if is_temporary else "Fix the cause, then run the same command again."
    say(f"{message}. {_describe_stored(config, is_temporary) if run.summary.texts else nothing_read}")
    return FAILED


def _describe_stored(config: Config, is_temporary: bool = True) -> str:
    """Return a message for a run that ended early: what was stored, and what the user must do next.

    ``is_temporary`` means that the same command may succeed later without a change.
    """
    if config.cache.mode == "replay":
        return (
            'Replay mode does not call the provider. To store the missing vectors, run once with mode = "read-through".'
        )
    from .opened import list_persistent_tiers

    if not list_persistent_tiers(config):
        return "The computed vectors are lost, because no tier outlives this process. Add a disk tier to keep them."
    if is_temporary:
        return "The computed vectors are stored. Run the same command again to continue."
    return "The computed vectors are stored. Fix the cause, then run the same command to continue."


# --- the summary ------------------------------------------------------------------------------


def _list_messages(run: Run, reader: Reader, *, quiet: bool) -> Iterator[str]:
    """Yield what the user must know after the run: notes about the input, failed tiers, unknown statistics."""
    from .embedding.summary import describe_tier_failures

    if not quiet:
        yield from reader.notes
    yield from describe_tier_failures(run.summary.trouble, run.summary.causes)
    for tier in run.summary.unstored:
        yield (
            f"error: tier {tier} stored none of the computed vectors, so the next run will compute them again; check "
            "whether the tier's disk is full or read-only, or whether its server is down (run `embedonce check`)"
        )
    if run.summary.unknown:
        yield f"note: these statistics could not be computed: {', '.join(run.summary.unknown)}; the rows are complete"


def _print_summary(summary: Summary, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        emit(asdict(summary))
    elif not quiet:
        for line in describe_summary(summary):
            write(line)


def describe_summary(summary: Summary) -> Iterator[str]:
    """Yield the lines of the summary for people."""
    from .embedding.summary import describe_cost, describe_left_out, format_share

    passages, files = format_count(summary.texts, "passage"), format_count(summary.files, "file")
    yield f"{passages} from {files}" + ("" if summary.unique is None else f", {summary.unique:,} distinct")
    yield f"  {format_share(summary.computed, summary.texts)} computed"
    for tier, hits in summary.hits.items():
        if hits:
            yield f"  {format_share(hits, summary.texts)} from {tier}"
    for importer, number in summary.imported.items():
        if number:
            yield f"  {format_share(number, summary.texts)} imported from {importer}"
    if summary.repeated:
        yield f"  {format_share(summary.repeated, summary.texts)} repeated"
    for label, cost in (("cost", summary.spent), ("saved", summary.saved)):
        if line := describe_cost(cost):
            yield f"{label}: {line}"
    yield from describe_left_out(summary)
    if summary.out is not None:
        yield f"wrote {format_count(summary.rows, 'row')} of {summary.dimensions:,} dimensions to {summary.out}"
    if summary.index is not None:
        yield f"and the source of each row to {summary.index}"
    yield f"{summary.seconds:,.1f} s, {summary.texts / max(summary.seconds, 1e-9):,.0f} passages/s"
