"""``embedonce embed``: files in, vectors out."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .embedding.formats import Format, Split
from .options import ConfigOption, JsonOption, TaskOption
from .output import FAILED, INTERRUPTED, OK, TERMINATED, Refused, count, emit, say, write

if TYPE_CHECKING:
    from embedonce.cache import Cache
    from embedonce.config import Config

    from .embedding.progress import Bar, NoBar
    from .embedding.run import Run, Summary
    from .embedding.sinks import Sink
    from .embedding.sources import Reader

EPILOG = """
Examples:

embedonce embed docs/ --out docs.npy

embedonce embed questions.jsonl --field question.text --task query --out questions.parquet

zcat corpus.gz | embedonce embed - --split line --out corpus.jsonl

Rows are in the order of the input: paths as given, folders by name at every level. What is broken or refused is
named on standard error, counted, left out of the output, and the exit code is then 1. An interrupted run goes on
where it was when it is started again: what was computed is in the tiers.
"""


def embed(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATH", help="Files and folders; - is standard input.", show_default=False),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FILE", help="Write here: .npy, .jsonl or .parquet.", show_default=False),
    ],
    config: ConfigOption = None,
    split: Annotated[
        Split, typer.Option("--split", help="What one passage of a text is. Blank lines part paragraphs.")
    ] = "paragraph",
    field: Annotated[
        str,
        typer.Option(
            "--field", metavar="NAME", help="The field or column with the text; dots reach into JSON: meta.title."
        ),
    ] = "text",
    format: Annotated[
        Format, typer.Option("--format", help="Read every file as this, whatever its name ends in.")
    ] = "auto",
    task: TaskOption = "document",
    with_text: Annotated[
        bool, typer.Option("--with-text", help="Write each passage's text beside its source.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first thing that fails, and write no output.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar and no summary.")] = False,
    json: JsonOption = False,
) -> None:
    """Embed the passages of files, each distinct text once, and write one row per passage."""
    from embedonce.config import compose

    from .embedding.run import Run
    from .embedding.sources import Reader
    from .opened import load, telling

    sink = _sink(out, with_text)
    try:
        _check_paths(paths, out, format)
        loaded = load(config)
        with _sigterm(), telling(loaded), compose(loaded) as cache:
            # The configuration may hold secrets, which are no text to send to a provider.
            leave_out = [*_own_files(out), *([str(loaded.file)] if loaded.file else [])]
            reader = Reader(paths, split=split, field=field, format=format, leave_out=leave_out)
            lasting = [tier.name for tier in loaded.tiers if _outlives(tier.cls) and tier.write != "none"]
            run = Run(cache, reader, sink, task=task, strict=strict, tell=say, lasting=lasting)
            code = _outcome(run, loaded, out, bar=_bar(reader, cache, show=not (json or quiet)))
    finally:
        sink.abort()
    for line in troubles(run.summary):
        say(line)
    _tell(run.summary, as_json=json, quiet=quiet)
    if code:
        raise typer.Exit(code)


# --- before anything is computed --------------------------------------------------------------


def _sink(out: Path, with_text: bool) -> Sink:
    from .embedding.sinks import SinkError, open_sink

    try:
        return open_sink(out, with_text=with_text)
    except SinkError as error:
        raise Refused(str(error)) from None


def _own_files(out: Path) -> list[str]:
    from .embedding.sinks import written_by

    return [str(path) for path in written_by(out)]


def _check_paths(paths: Sequence[str], out: Path, format: Format) -> None:
    own = set(map(os.path.realpath, _own_files(out)))
    for path in paths:
        if path == "-":
            continue
        try:
            os.lstat(path)
        except FileNotFoundError:
            raise Refused(f"{path}: no such file or folder") from None
        except (OSError, ValueError) as error:
            raise Refused(f"{path}: {getattr(error, 'strerror', None) or error}") from None
        if os.path.realpath(path) in own:
            raise Refused(f"{path} is what --out writes")
    if paths.count("-") > 1:
        raise Refused("standard input (-) can be read once")
    if "-" in paths and format == "parquet":
        raise Refused("Parquet cannot be read from standard input")


def _bar(reader: Reader, cache: Cache, *, show: bool) -> Bar | NoBar:
    from .embedding.progress import Bar, NoBar

    if not (show and sys.stderr.isatty()):
        return NoBar()
    bar = Bar(reader.bytes_total())
    cache.subscribe(bar.event)
    return bar


# --- the run and how it ends ------------------------------------------------------------------


class Terminated(KeyboardInterrupt):
    """SIGTERM came: the run ends as with Ctrl-C."""


@contextmanager
def _sigterm() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that a stopped container leaves no half output either."""

    def terminate(signum: int, frame: Any) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _outcome(run: Run, config: Config, out: Path, bar: Bar | NoBar) -> int:
    """Run, and return the exit code; what ends a run early is said here and noted in the summary."""
    from .embedding.run import Stopped
    from .embedding.sinks import SinkError, finals_of

    summary = run.summary
    try:
        with bar:
            run.embed(bar)
    except Stopped as error:
        summary.stopped = str(error)
        say(f"stopped: {error}; no output was written. {_kept(config, error.passes)}")
        return FAILED
    except KeyboardInterrupt as error:
        summary.stopped = "interrupted"
        say(f"interrupted; no output was written. {_kept(config)}")
        return TERMINATED if isinstance(error, Terminated) else INTERRUPTED
    except (OSError, SinkError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        summary.stopped = f"cannot write {out}: {said or type(error).__name__}"
        say(f"error: {summary.stopped}. {_kept(config)}")
        return FAILED
    summary.out = str(out)
    summary.index = next(map(str, finals_of(out)[1:]), None)
    return FAILED if summary.failed or summary.unstored else OK


def _kept(config: Config, passes: bool = True) -> str:
    """Say what a run that ended early leaves behind; ``passes``: the same command may succeed next time."""
    if config.cache.mode == "replay":
        return 'Nothing is computed in replay mode: what is missing is stored by a run with mode = "read-through".'
    lasting = any(_outlives(tier.cls) for tier in config.tiers)
    if lasting and not passes:
        return "What was computed is stored, and is not computed again once that is put right."
    if lasting:
        return "What was computed is stored: run the same command again and it goes on from there."
    return "No tier outlives this process, so nothing is kept: add a disk tier to go on from there next time."


def _outlives(backend: type[Any]) -> bool:
    """Say whether what a backend holds is there when this process is not."""
    return getattr(getattr(backend, "capabilities", None), "scope", "host") != "process"


# --- the summary ------------------------------------------------------------------------------


def _tell(summary: Summary, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        emit(asdict(summary))
    elif not quiet:
        for line in told(summary):
            write(line)


def told(summary: Summary) -> Iterator[str]:
    """Yield the summary for people."""
    yield f"{count(summary.texts, 'passage')} from {count(summary.files, 'file')}, {summary.unique:,} distinct"
    yield f"  {_share(summary.computed, summary.texts)} computed"
    for tier, hits in summary.hits.items():
        if hits:
            yield f"  {_share(hits, summary.texts)} from {tier}"
    if summary.repeated:
        yield f"  {_share(summary.repeated, summary.texts)} repeated"
    if summary.failed:
        yield f"{summary.failed:,} failed, each named above"
    if summary.binary:
        yield f"{count(summary.binary, 'binary file')} passed over"
    if summary.out is not None:
        yield f"wrote {count(summary.rows, 'row')} of {summary.dimensions:,} dimensions to {summary.out}"
    if summary.index is not None:
        yield f"and the source of each row to {summary.index}"
    yield f"{summary.seconds:,.1f} s, {summary.texts / max(summary.seconds, 1e-9):,.0f} passages/s"


def troubles(summary: Summary) -> Iterator[str]:
    """Yield what went wrong in the tiers, a line for each, and what to do about one that stored nothing."""
    for tier, kinds in summary.trouble.items():
        causes = "; ".join(f"{cause}: {number:,}" for cause, number in summary.causes.get(tier, {}).items())
        counted = ", ".join(counted_as(kind, number) for kind, number in kinds.items())
        yield f"tier {tier}: {counted}{f' ({causes})' if causes else ''}"
    for tier in summary.unstored:
        yield (
            f"error: tier {tier} stored nothing of what was computed, and the next run computes it again: see whether "
            "its disk is full or read-only, or its service down; `embedonce check` asks it"
        )


def counted_as(kind: str, number: int) -> str:
    """Return ``1 error``, ``2 errors``, ``3 skipped``."""
    return count(number, "error") if kind == "errors" else f"{number:,} {kind}"


def _share(part: int, whole: int) -> str:
    return f"{part:>12,} ({100 * part / max(whole, 1):5.1f} %)"
