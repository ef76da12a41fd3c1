"""Options of ``embedonce embed`` that say which files are read, and how."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from typing import Annotated, TypeAlias

import typer

from embedonce.cli.options import decode_argument
from embedonce.cli.output import Refused

from .csv_records import NO_QUOTE
from .decoding import find_encoding
from .formats import Format
from .texts import Split

TAB_NAMES = ("tab", "\\t")
"""Ways to type a tab, which many shells do not pass on."""


def check_delimiter(value: str | None) -> str | None:
    """Return the delimiter character.

    Raises:
        typer.BadParameter: the value is not one character, or is a quote or a line end.
    """
    value = decode_argument(value)
    if value is None:
        return None
    if value in TAB_NAMES:
        return "\t"
    if len(value) != 1 or value in '"\r\n':
        raise typer.BadParameter("must be one character, such as ';', or tab")
    return value


def check_quote(value: str | None) -> str | None:
    """Return the quote character, or ``none``.

    Raises:
        typer.BadParameter: the value is not one character, or is a line end.
    """
    value = decode_argument(value)
    if value is not None and value != NO_QUOTE and (len(value) != 1 or value in "\r\n"):
        raise typer.BadParameter('must be one character, such as "\'", or none')
    return value


def check_encoding(value: str | None) -> str | None:
    """Return Python's name of the encoding.

    Raises:
        typer.BadParameter: Python has no text encoding of this name.
    """
    if value is None:
        return None
    try:
        return find_encoding(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _check_globs(values: list[str] | None) -> list[str] | None:
    from embedonce._globs import compile_globs

    for value in values or ():
        try:
            compile_globs([value])
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return values


def _check_field(value: str | None) -> str | None:
    if value == "":
        raise typer.BadParameter("must be the name of a field, which is not empty")
    return decode_argument(value)


def _check_names(values: list[str] | None) -> list[str] | None:
    return None if values is None else [name for name in map(_check_field, values) if name is not None]


def find_conflict(format: Format, delimiter: str | None, quote: str | None, paths: Sequence[str]) -> str | None:
    """Return what is wrong with options that are valid alone, or None."""
    if delimiter is not None and delimiter == quote:
        return "--delimiter and --quote must be different characters"
    if "-" in paths and format == "parquet":
        return "cannot read Parquet from standard input; give the path of a file"
    return None


def check_inputs(paths: Sequence[str]) -> None:
    """Check that the files and folders to read exist.

    Raises:
        Refused: one of them does not exist or has an impossible name, or standard input is given more than once.
    """
    for path in paths:
        if path == "-":
            continue
        try:
            os.lstat(path)
        except FileNotFoundError:
            raise Refused(f"{path}: no such file or folder") from None
        except (OSError, ValueError) as error:
            raise Refused(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if paths.count("-") > 1:
        raise Refused("standard input (-) can be given only once")


def find_stream(paths: Sequence[str]) -> str | None:
    """Return the name of the first input that can be read only once, because it is standard input or a pipe."""
    for path in paths:
        if path == "-":
            return "standard input (-)"
        if not _is_file_or_folder(path):
            return path
    return None


def _is_file_or_folder(path: str) -> bool:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return True  # the run reports it
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


SplitOption: TypeAlias = Annotated[
    Split, typer.Option("--split", help="How to split text into passages. Blank lines separate paragraphs.")
]
FieldOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--field",
        metavar="NAME",
        callback=_check_field,
        help="The field or column with the text. In JSON and Parquet, meta.title is the field title of the inner "
        "object meta. Default: the option fields of the table embed in the configuration, otherwise text.",
        show_default=False,
    ),
]
KeepOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--keep",
        metavar="NAME",
        callback=_check_names,
        help="Write the value of this field or column beside each vector, for example --keep id. Can be repeated. "
        "Default: the option keep of the table embed in the configuration.",
        show_default=False,
    ),
]
FormatOption: TypeAlias = Annotated[
    Format, typer.Option("--format", help="Read every file in this format, whatever its suffix.")
]
IncludeOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        metavar="GLOB",
        callback=_check_globs,
        help="Read only files that match, for example --include '*.md'. Can be repeated.",
        show_default=False,
    ),
]
ExcludeOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude",
        metavar="GLOB",
        callback=_check_globs,
        help="Do not read files and folders that match, for example --exclude drafts/. Can be repeated.",
        show_default=False,
    ),
]
DelimiterOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--delimiter",
        metavar="CHAR",
        callback=check_delimiter,
        help="Character between the columns of CSV, for example --delimiter ';'. Default: a comma, in .tsv a tab.",
        show_default=False,
    ),
]
QuoteOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--quote",
        metavar="CHAR",
        callback=check_quote,
        help="Character that quotes a column of CSV, or none if quotes are part of the text, for example --quote none. "
        "Default: a double quote.",
        show_default=False,
    ),
]
EncodingOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--encoding",
        metavar="NAME",
        callback=check_encoding,
        help="Encoding of the files, for example --encoding cp1252. Default: UTF-8, or UTF-16 and UTF-32 if a file "
        "begins with their byte order mark.",
        show_default=False,
    ),
]
