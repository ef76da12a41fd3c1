"""``embedonce embed``: embed the passages of files and write their vectors."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    find_conflict,
)
from .options import ConfigOption, JsonOption, TaskOption
from .output import FAILED, INTERRUPTED, OK, TERMINATED, Refused, emit, is_terminal, say, write

if TYPE_CHECKING:
    from embedonce.cache import Cache
    from embedonce.config import Config

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

Rows are in the order of the input: the paths as given, and the entries of each folder sorted by name. If a file cannot
be read, or if a passage cannot be read or embedded, the output has no rows for this file or passage. The failures are
reported on standard error, grouped by file and reason, and the exit code is 1. If there is no passage at all, the exit
code is 1 as well, and an earlier output stays, unless you pass --allow-empty. If a run is interrupted, run the same
command again. Vectors that a disk tier or a network tier has already stored are not computed again.
"""


def embed(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATH", help="Files and folders to read; - is standard input.", show_default=False),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FILE", help="The file to write: .npy, .jsonl or .parquet.", show_default=False),
    ],
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
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress and no summary.")] = False,
    json: JsonOption = False,
) -> None:
    """Embed the passages of files, each distinct text once, and write one row per passage."""
    from embedonce.config import compose

    from .embedding.run import Run
    from .embedding.sources import Reader
    from .opened import load_config, translate_tier_errors

    loaded = load_config(config)
    keep = list(dict.fromkeys(keep or loaded.embed.keep))
    sink = _open_output(out, with_text, keep)
    try:
        _check_paths(paths, out)
        if problem := find_conflict(format, delimiter, quote, paths):
            raise Refused(problem)
        with _raise_on_sigterm(), translate_tier_errors(loaded), compose(loaded) as cache:
            # Do not embed the configuration file. It may hold secrets, which must not be sent to a provider.
            leave_out = [*_list_output_files(out), *([str(loaded.file)] if loaded.file else [])]
            reader = Reader(
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
            persistent = [tier.name for tier in loaded.tiers if _outlives_process(tier.cls) and tier.write != "none"]
            run = Run(
                cache,
                reader,
                sink,
                task=task,
                strict=strict,
                allow_empty=allow_empty,
                persistent_tiers=persistent,
            )
            code = _execute_run(run, loaded, out, _make_display(reader, cache, show=not (json or quiet)))
    finally:
        sink.abort()
    for line in _list_messages(run, reader, quiet=quiet):
        say(line)
    _print_summary(run.summary, as_json=json, quiet=quiet)
    if code:
        raise typer.Exit(code)


# --- before anything is computed --------------------------------------------------------------


def _open_output(out: Path, with_text: bool, keep: Sequence[str]) -> Sink:
    from .embedding.sinks import SinkError, open_sink

    try:
        return open_sink(out, with_text=with_text, keep=keep)
    except SinkError as error:
        raise Refused(str(error)) from None


def _list_output_files(out: Path) -> list[str]:
    from .embedding.sinks import list_written_files

    return [str(path) for path in list_written_files(out)]


def _check_paths(paths: Sequence[str], out: Path) -> None:
    outputs = set(map(os.path.realpath, _list_output_files(out)))
    for path in paths:
        if path == "-":
            continue
        try:
            os.lstat(path)
        except FileNotFoundError:
            raise Refused(f"{path}: no such file or folder") from None
        except (OSError, ValueError) as error:
            raise Refused(f"{path}: {getattr(error, 'strerror', None) or error}") from None
        if os.path.realpath(path) in outputs:
            raise Refused(f"{path}: --out would overwrite this input; choose another output file")
    if paths.count("-") > 1:
        raise Refused("standard input (-) can be given only once")


def _make_display(reader: Reader, cache: Cache, *, show: bool) -> Display:
    """Return the display of the progress: a bar on a terminal, a line now and then elsewhere.

    An error in the display costs only the display.
    """
    from .embedding.progress import Bar, Display, Lines, Progress

    display = Display()
    if show:
        with suppress(Exception):
            progress = Progress(reader.compute_total_bytes())
            display = Display(progress, Bar(progress) if is_terminal() else Lines(progress, say))
            cache.subscribe(display.handle_event)
    return display


# --- the run and its exit code ----------------------------------------------------------------


class Terminated(KeyboardInterrupt):
    """Raised on SIGTERM, so that the run ends as it does after Ctrl-C."""


@contextmanager
def _raise_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that a stopped container leaves no unfinished output behind."""

    def terminate(signum: int, frame: Any) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


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
    if not any(_outlives_process(tier.cls) for tier in config.tiers):
        return "The computed vectors are lost, because no tier outlives this process. Add a disk tier to keep them."
    if is_temporary:
        return "The computed vectors are stored. Run the same command again to continue."
    return "The computed vectors are stored. Fix the cause, then run the same command to continue."


def _outlives_process(backend: type[Any]) -> bool:
    """Return whether the entries of a backend outlive this process."""
    return getattr(getattr(backend, "capabilities", None), "scope", "host") != "process"


# --- the summary ------------------------------------------------------------------------------


def _list_messages(run: Run, reader: Reader, *, quiet: bool) -> Iterator[str]:
    """Yield what the user must know after the run: notes about the input, failed tiers, unknown statistics."""
    if not quiet:
        yield from reader.notes
    yield from describe_tier_failures(run.summary)
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
    from .embedding.summary import describe_skipped

    passages, files = format_count(summary.texts, "passage"), format_count(summary.files, "file")
    yield f"{passages} from {files}" + ("" if summary.unique is None else f", {summary.unique:,} distinct")
    yield f"  {_format_share(summary.computed, summary.texts)} computed"
    for tier, hits in summary.hits.items():
        if hits:
            yield f"  {_format_share(hits, summary.texts)} from {tier}"
    if summary.repeated:
        yield f"  {_format_share(summary.repeated, summary.texts)} repeated"
    if summary.failed:
        yield f"{summary.failed:,} failed, reported above"
    if summary.binary:
        yield f"{format_count(summary.binary, 'binary file')} skipped"
    if summary.skipped:
        yield f"skipped: {describe_skipped(summary.skipped)}"
    if summary.out is not None:
        yield f"wrote {format_count(summary.rows, 'row')} of {summary.dimensions:,} dimensions to {summary.out}"
    if summary.index is not None:
        yield f"and the source of each row to {summary.index}"
    yield f"{summary.seconds:,.1f} s, {summary.texts / max(summary.seconds, 1e-9):,.0f} passages/s"


def describe_tier_failures(summary: Summary) -> Iterator[str]:
    """Yield one line per tier that failed, and one line of advice per tier that stored nothing."""
    for tier, kinds in summary.trouble.items():
        causes = "; ".join(f"{cause}: {number:,}" for cause, number in summary.causes.get(tier, {}).items())
        counted = ", ".join(format_failure_count(kind, number) for kind, number in kinds.items())
        yield f"tier {tier}: {counted}{f' ({causes})' if causes else ''}"
    for tier in summary.unstored:
        yield (
            f"error: tier {tier} stored none of the computed vectors, so the next run will compute them again; check "
            "whether the tier's disk is full or read-only, or whether its server is down (run `embedonce check`)"
        )


def format_failure_count(kind: str, number: int) -> str:
    """Return ``1 error``, ``2 errors``, ``3 skipped``."""
    return format_count(number, "error") if kind == "errors" else f"{number:,} {kind}"


def _format_share(part: int, whole: int) -> str:
    return f"{part:>12,} ({100 * part / max(whole, 1):5.1f} %)"
