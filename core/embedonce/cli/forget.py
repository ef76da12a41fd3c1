"""``embedonce forget``: remove the vectors of texts from every tier."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embedonce._engine.read_only import exclude_texts
from embedonce._messages import format_count
from embedonce.errors import EraseIncomplete, SpaceError

from .embedding.reading_options import (
    DelimiterOption,
    EncodingOption,
    FieldOption,
    FormatOption,
    QuoteOption,
    find_conflict,
)
from .file_texts import TextFiles, add_without_line_end
from .options import ConfigOption, JsonOption, TextArgument, read_stdin
from .output import FAILED, Refused, describe_os_error, emit, say, write

if TYPE_CHECKING:
    from embedonce.cache import Cache
    from embedonce.config import Config

EPILOG = """
Examples:

embedonce forget "one text"

embedonce forget --file customer-17.txt

embedonce forget --file answers.csv --delimiter ';' --field answer

embedonce forget --stdin --json < one.txt

The vectors are removed for every task. With --file, the texts are each passage that `embedonce embed` reads from the
file, with any --split, and the whole content of the file. Use the same --format, --delimiter, --quote and --encoding as
for `embedonce embed`. If the content of the file or of standard input ends with a line end, the vectors are removed for
the text with this line end and for the text without it.

Vectors of other models, versions and namespaces remain; `embedonce purge --unused` removes them. This command cannot
reach the memory tier of another process. The exit code is 1 if a tier was not reached. It is also 1 if a read-only tier
has vectors of the texts; the message has the command that rebuilds its store without them.
"""

WINDOW = 1024
"""Maximum number of texts that are removed in one call."""


def forget(
    text: TextArgument = None,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help="Forget the texts of this file.", show_default=False)
    ] = None,
    stdin: Annotated[bool, typer.Option("--stdin", help="Read one text to forget from standard input.")] = False,
    field: FieldOption = None,
    format: FormatOption = "auto",
    delimiter: DelimiterOption = None,
    quote: QuoteOption = None,
    encoding: EncodingOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Remove the vectors of a text from every tier, for every task. The output does not contain the text."""
    from .opened import load_config, open_cache

    if sum((text is not None, file is not None, stdin)) != 1:
        raise Refused("forget requires exactly one of TEXT, --file and --stdin")
    if problem := find_conflict(format, delimiter, quote, ()):
        raise Refused(problem)
    loaded = load_config(config)
    with open_cache(loaded) as cache:
        if file is not None:
            files = TextFiles(
                paths=[str(file)],
                field=field,
                fields=loaded.embed.fields,
                format=format,
                delimiter=delimiter,
                quote=quote,
                encoding=encoding,
            )
            windows, broken = _read_file(file, files)
        else:
            windows, broken = [add_without_line_end(read_stdin()) if text is None else [text]], 0
        erasing = _Erasing(cache)
        for window in windows:
            erasing.erase(window)
        reading = {
            "--field": field,
            "--format": None if format == "auto" else format,
            "--delimiter": delimiter,
            "--quote": quote,
            "--encoding": encoding,
        }
        erasing.explain_kept(loaded, file, {name: value for name, value in reading.items() if value is not None})
        _report(erasing, broken, as_json=json)
    if erasing.failed or broken:
        raise typer.Exit(FAILED)


class _Erasing:
    """Removes texts for every task, and collects which tiers were not reached."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        held = [one for one in cache.contents() if one.error is None]
        cards = [one.card for one in held if one.card is not None]
        self.tasks = sorted({"document", "query", *(task for card in cards if isinstance(task := card["task"], str))})
        self.others = {one.scope for one in held if one.current is False}
        """Scopes that the configuration does not use. They may still have vectors of the texts."""
        self.texts = 0
        self.failed: dict[str, str] = {}
        self.kept: dict[str, Counter[str]] = {}
        """By read-only tier, the number of vectors of the texts that it has in each scope."""

    @property
    def reached(self) -> list[str]:
        return [tier for tier in self._cache.tiers if tier not in self.failed]

    def erase(self, texts: list[str]) -> None:
        self.texts += len(texts)
        known = []
        kept: dict[str, Counter[str]] = {}
        for task in self.tasks:
            try:
                self._cache.forget(texts, task)
            except SpaceError:  # another provider has stored vectors for this task
                continue
            except EraseIncomplete as error:
                self.failed |= error.tiers
                for tier, scopes in error.kept.items():  # several tasks may have the same scope, and so the same keys
                    kept[tier] = kept.get(tier, Counter()) | Counter(scopes)
            known.append(task)
        self.tasks = known
        for tier, counts in kept.items():
            self.kept.setdefault(tier, Counter()).update(counts)

    def explain_kept(self, loaded: Config, file: Path | None, reading: Mapping[str, str]) -> None:
        """Say for each read-only tier with vectors of the texts how to rebuild its store without them.

        ``reading`` has the options with which the file was read, so that the command finds the same texts in it.
        """
        from .opened import explain_kept

        excluded = exclude_texts()
        if file is not None:
            options = [f" {name} {shlex.quote(value)}" for name, value in reading.items()]
            excluded = exclude_texts(shlex.quote(str(file))) + "".join(options)
        self.failed |= explain_kept(loaded, self.kept, lambda scopes: excluded)


def _read_file(file: Path, files: TextFiles) -> tuple[list[list[str]], int]:
    """Return the texts of a file in windows, and the number of records that cannot be read."""
    try:
        file.open("rb").close()
    except OSError as error:
        raise Refused(f"--file {describe_os_error(error)}") from None
    texts, broken = files.read_texts()
    return [texts[start : start + WINDOW] for start in range(0, len(texts), WINDOW)], broken


def _report(erasing: _Erasing, broken: int, *, as_json: bool) -> None:
    if as_json:
        emit(
            {
                "texts": erasing.texts,
                "tasks": erasing.tasks,
                "tiers": erasing.reached,
                "failed": erasing.failed,
                "kept": erasing.kept,
                "unreadable": broken,
                "other_scopes": sorted(erasing.others),
                "ok": not erasing.failed and not broken,
            }
        )
    elif erasing.reached:
        count = format_count(erasing.texts, "text")
        write(f"removed {count} from {', '.join(erasing.reached)}, for the tasks {', '.join(erasing.tasks)}")
    for tier, reason in erasing.failed.items():
        say(f"error: tier {tier!r} may still have vectors of the texts: {reason}")
    if broken:
        say(f"error: {format_count(broken, 'record')} could not be read; nothing was removed for them")
    if erasing.others:
        scopes = format_count(len(erasing.others), "other scope")
        say(
            f"note: {scopes} may have vectors of the texts; `embedonce stats` lists them, `purge --unused` removes them"
        )
