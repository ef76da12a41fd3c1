"""``embedonce init``: write a commented configuration to start from."""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated

import typer

from embedonce._config.found_files import FILE, PYPROJECT, find_risk
from embedonce._messages import find_closest, join_words, quote

from .init_sections import PROVIDERS, TIERS, format_install_command, render_file
from .options import JsonOption
from .output import Refused, emit, say, write

EPILOG = """
Examples:

embedonce init

embedonce init --provider sentence-transformers

embedonce init --provider openai --tier memory --tier redis

embedonce init production.toml --provider gemini --tier memory --tier disk --tier postgres

The default provider needs no model, no key and no network. The file lists the tiers from the fastest to the slowest,
even if you name them in a different order. The file contains the names of environment variables instead of secrets. The
output lists the variables that you must set. Next, run embedonce check.
"""

DEFAULT_TIERS = ("memory", "disk")


def init(
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="The file to write.")] = Path("embedonce.toml"),
    provider: Annotated[
        str, typer.Option("--provider", metavar="NAME", help=f"The provider: {join_words(PROVIDERS, 'or')}.")
    ] = "ngram",
    tier: Annotated[
        list[str] | None,
        typer.Option(
            "--tier",
            metavar="NAME",
            help=f"A tier: {join_words(TIERS, 'or')}; repeatable. Default: {join_words(DEFAULT_TIERS)}.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    json: JsonOption = False,
) -> None:
    """Write a commented configuration for a provider and some tiers."""
    if file.name == PYPROJECT:
        raise Refused(f"{file} may contain other settings; write a separate file, such as {FILE}")
    _check_name("--provider", provider, PROVIDERS, "[provider]")
    tiers = _sort_tiers(tier or DEFAULT_TIERS)
    try:
        _write_file(file, render_file(provider, tiers), force=force)
    except FileExistsError:
        raise Refused(f"{file} already exists; replace it with --force") from None
    except OSError as error:
        raise Refused(f"cannot write {file}: {error.strerror}") from None
    risk = find_risk(file) if file.name == FILE else ""
    if risk:
        say(
            f"note: embedonce uses {file} only if you name it, because {risk}. "
            f"Name it with --config or EMBEDONCE_CONFIG, or move it to a folder that only you may write to"
        )
    sections = [PROVIDERS[provider], *(TIERS[name] for name in tiers)]
    extras = sorted(section.extra for section in sections if section.extra)
    variables = [variable for section in sections for variable in section.variables]
    if json:
        emit({"file": str(file), "provider": provider, "tiers": list(tiers), "extras": extras, "variables": variables})
    else:
        write("\n".join(_describe_next_steps(file, extras, variables, is_found=file == Path(FILE) and not risk)))


def _check_name(option: str, name: str, names: Collection[str], table: str) -> None:
    if name in names:
        return
    meant = find_closest(name, names)
    hint = f"; did you mean {meant}?" if meant else "."
    raise Refused(
        f"{option} must be one of {', '.join(names)}, got {quote(name)}{hint} "
        f"`embedonce plugins` lists the plugins of other packages; write their {table} table by hand."
    )


def _sort_tiers(names: Sequence[str]) -> list[str]:
    """Check the names of tiers and return them from the fastest to the slowest."""
    for position, name in enumerate(names):
        _check_name("--tier", name, TIERS, "[[tiers]]")
        if name in names[:position]:
            raise Refused(f"--tier {name} is given twice; name each tier once")
    return [name for name in TIERS if name in names]


def _describe_next_steps(file: Path, extras: Sequence[str], variables: Sequence[str], *, is_found: bool) -> list[str]:
    """Return the lines that tell the user what to install, what to set and which command to try."""
    check = "embedonce check" if is_found else f"embedonce check --config {shlex.quote(str(file))}"
    if not extras and not variables:
        return [f"wrote {file}; now try: {check}"]
    steps = [f"wrote {file}"]
    if extras:
        steps.append(f"install what it requires: {format_install_command(extras)}")
    if variables:
        steps.append(f"set in the environment: {', '.join(variables)}")
    return [*steps, f"then try: {check}"]


def _write_file(file: Path, text: str, *, force: bool) -> None:
    """Write the whole file or nothing; without ``force``, refuse to replace an existing file."""
    file = Path(os.path.realpath(file)) if force else file  # replace the target of a link, not the link
    if force and file.exists() and not file.is_file():
        raise Refused(f"{file} is not a regular file")
    new = file.with_name(f".{file.name}.part") if force else file
    with open(new, "w" if force else "x", encoding="utf-8", newline="\n") as opened:
        try:
            opened.write(text)
            opened.flush()
        except BaseException:  # if writing fails, for example on a full disk, leave no incomplete file behind
            new.unlink()
            raise
    if force:
        os.replace(new, file)
