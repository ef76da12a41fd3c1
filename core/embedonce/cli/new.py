"""``embedonce new``: a package around a plugin, complete and working, to begin with."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import JsonOption
from .output import Refused, emit, write

EPILOG = """
Examples:

embedonce new backend shelf

embedonce new provider my-model

It writes the package embedonce-NAME into a folder of that name: a working plugin with one option, its entry point, its
tests, a README and a CI file. Install it from there with its extra "test", and run pytest.
"""

NAME = r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*"
LONGEST = 40
TAKEN = ("backends", "integrations", "providers")
"""What embedonce's own packages are called after ``embedonce_``."""

_WORD = re.compile(r"embedonce-example|embedonce_example|Example(?=Backend|Provider)|\bexample\b")


def new(
    kind: Annotated[Literal["backend", "provider"], typer.Argument(metavar="KIND", help="backend or provider.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="What TOML will call it, such as shelf.")],
    folder: Annotated[
        Path | None,
        typer.Option("--folder", metavar="DIR", help="Write it here. Otherwise: embedonce-NAME in this folder."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Write a package with a plugin of your own: it works, and its tests pass."""
    _check(name)
    target = folder or Path(f"embedonce-{name}")
    try:
        written = _write(kind, name, target)
    except OSError as error:
        raise Refused(f"cannot write {target}: {error.strerror or error}") from None
    if json:
        emit({"folder": str(target), "files": written})
    else:
        write(f"wrote {target}; now try:\n  cd {shlex.quote(str(target))}\n  pip install -e '.[test]'\n  pytest")


def _check(name: str) -> None:
    """Refuse a name that TOML or Python could not say, or that means another plugin already."""
    from embedonce.keys import NORMALIZERS
    from embedonce.plugins import installed_by_embedonce

    if name.startswith(("embedonce-", "embedonce_")):
        raise Refused(f"the package will be called embedonce-NAME anyhow: give the rest, {name[len('embedonce-') :]}")
    if not re.fullmatch(NAME, name) or len(name) > LONGEST:
        raise Refused(
            f"a plugin's name is a letter a-z, then a-z and 0-9, with single hyphens inside, at most {LONGEST} "
            "characters: such as shelf or my-model"
        )
    if name in TAKEN or name == "provider":
        raise Refused(f"{name} has a meaning of its own in embedonce; choose another name")
    if name in NORMALIZERS or name in installed_by_embedonce():
        raise Refused(f"embedonce brings {name} itself, and TOML would mean that one; choose another name")


def _write(kind: str, name: str, target: Path) -> list[str]:
    """Write the package whole or not at all; return its files, relative to its folder."""
    if os.path.lexists(target):
        raise Refused(f"{target} is there already")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part-{os.getpid()}")
    template = files("embedonce") / "templates" / kind
    try:
        part.mkdir()
        written = sorted(_copy(template, part, name))
        os.rename(part, target)
    except BaseException:  # Ctrl-C too: half a package is not left behind
        shutil.rmtree(part, ignore_errors=True)
        raise
    return [file.relative_to(part).as_posix() for file in written]


def _copy(template: Traversable, folder: Path, name: str) -> list[Path]:
    written: list[Path] = []
    for item in template.iterdir():
        if item.name == "__pycache__":
            continue
        target = folder / _renamed(item.name, name)
        if item.is_dir():
            target.mkdir()
            written += _copy(item, target, name)
        else:
            target.write_text(_renamed(item.read_text(encoding="utf-8"), name), encoding="utf-8", newline="\n")
            written.append(target)
    return written


def _renamed(text: str, name: str) -> str:
    """Write the plugin's name where the template, which is a package in itself, says example."""
    forms = {
        "embedonce-example": f"embedonce-{name}",
        "embedonce_example": f"embedonce_{name.replace('-', '_')}",
        "Example": "".join(part.capitalize() for part in name.split("-")),
        "example": name,
    }
    return _WORD.sub(lambda match: forms[match[0]], text)
