"""``embedonce init``: a commented configuration to begin with."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from embedonce._config.documents import FILE, PYPROJECT

from .options import JsonOption
from .output import Refused, emit, write

EPILOG = """
Examples:

embedonce init

embedonce init production.toml

It works as it is, with a provider that needs no model; comments show how to use a real one. Then: embedonce check
"""

TEMPLATE = """\
# embedonce: embed each text once.
# `embedonce check` tries this file, `embedonce schema` describes every option, docs/configuration.md explains them.

[cache]
# Vectors are rounded to this once, before they are returned or stored: "float32", "float16" or "int8".
dtype = "float32"

[key]
# Raise it to leave all old vectors behind, then `embedonce purge --version v1`.
version = "v1"
# Steps that bring a text to one form; the result is what is embedded. Others: "nfkc", "collapse-whitespace",
# "casefold", "newlines". An empty list embeds texts as they are.
normalize = ["nfc", "strip"]
# Keeps projects or tenants apart in one store.
# namespace = "my-project"
# With it nobody who can read the keys can guess short texts from them.
# secret = "${EMBEDONCE_SECRET}"

# The provider makes the vectors. This one is local and needs no model: it finds texts that are spelled alike,
# not texts that mean the same.
[provider]
type = "ngram"
dimensions = 256

# For meaning, use a model: the provider of a plugin that is installed (`embedonce plugins` lists them),
#   [provider]
#   type = "the-plugins-name"
#   model = "the-models-name"
# or, from Python, any function that makes vectors: embedonce.Cache(function, tiers, space={"model": "..."}).

# The tiers are asked in this order, the fastest first. What a slower one has is copied into the faster ones.
[[tiers]]
type = "memory"
max_entries = 2048

# A relative path is relative to this file.
[[tiers]]
type = "disk"
path = ".embedonce"
max_bytes = "2 GiB"
# Without it entries stay until the space is needed.
# ttl = "30d"
"""


def init(
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="The file to write.")] = Path("embedonce.toml"),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    json: JsonOption = False,
) -> None:
    """Write a commented configuration that works as it is."""
    if file.name == PYPROJECT:
        raise Refused(f"{file} holds more than a configuration: init writes a file of its own, such as {FILE}")
    try:
        _write(file, force)
    except FileExistsError:
        raise Refused(f"{file} is there already; --force replaces it") from None
    except OSError as error:
        raise Refused(f"cannot write {file}: {error.strerror}") from None
    if json:
        emit({"file": str(file)})
    else:
        write(f"wrote {file}; now try: {_check(file)}")


def _check(file: Path) -> str:
    """Return the command that tries the file: only one of the usual name is found without being named."""
    return "embedonce check" if str(file) == FILE else f"embedonce check --config {shlex.quote(str(file))}"


def _write(file: Path, force: bool) -> None:
    """Write the file whole or not at all; without ``force``, only where there is none."""
    file = Path(os.path.realpath(file)) if force else file  # a link stays one
    if force and file.exists() and not file.is_file():
        raise Refused(f"{file} is no regular file")
    new = file.with_name(f".{file.name}.part") if force else file
    with open(new, "w" if force else "x", encoding="utf-8", newline="\n") as opened:
        try:
            opened.write(TEMPLATE)
            opened.flush()
        except BaseException:  # a full disk: no file without content is left behind
            new.unlink()
            raise
    if force:
        os.replace(new, file)
