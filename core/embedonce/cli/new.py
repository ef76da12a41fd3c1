"""``embedonce new``: write a complete, working package with a plugin to start from."""

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

embedonce new backend shelf --kind network

embedonce new provider my-model

embedonce new importer old-cache

The package is called embedonce-NAME. It contains a working plugin, which has one option. It also contains the plugin's
entry point, tests, a README and a CI file. Install the package with its extra "test", then run pytest.
"""

NAME = r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*"
MAX_NAME_LENGTH = 40
RESERVED = ("backends", "importers", "integrations", "providers", "server")
"""Names of embedonce's own packages, without their prefix ``embedonce_``."""

_PLACEHOLDER = re.compile(r"embedonce-example|embedonce_example|Example(?=Backend|Importer|Provider|Twin)|\bexample\b")


def new(
    kind: Annotated[
        Literal["backend", "provider", "importer"], typer.Argument(metavar="KIND", help="The kind of plugin.")
    ],
    name: Annotated[str, typer.Argument(metavar="NAME", help="The plugin's name in TOML, such as shelf.")],
    folder: Annotated[
        Path | None,
        typer.Option(
            "--folder", metavar="DIR", help="The folder to write. Default: embedonce-NAME in the current folder."
        ),
    ] = None,
    store: Annotated[
        Literal["folder", "network"] | None,
        typer.Option(
            "--kind",
            metavar="STORE",
            help="Kind of store of a backend: folder, or network, for which the package has a connection pool, "
            "deadlines and an async client. Default: folder.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Write a package with a small working plugin and its tests, as a start for your own plugin."""
    if store is not None and kind != "backend":
        raise Refused("--kind is valid only for a backend; remove it")
    _check_name(name, kind)
    target = folder or Path(f"embedonce-{name}")
    try:
        written = _write_package("network-backend" if store == "network" else kind, name, target)
    except OSError as error:
        raise Refused(f"cannot write {target}: {error.strerror or error}") from None
    if json:
        emit({"folder": str(target), "files": written})
    else:
        write(f"wrote {target}; now try:\n  cd {shlex.quote(str(target))}\n  pip install -e '.[test]'\n  pytest")


def _check_name(name: str, kind: str) -> None:
    """Refuse a name that is invalid in TOML or Python, is reserved, or belongs to another plugin."""
    from embedonce import hookspecs
    from embedonce.keys import NORMALIZERS
    from embedonce.plugins import installed_by_embedonce

    if name.startswith(("embedonce-", "embedonce_")):
        raise Refused(
            f'`embedonce new` adds the prefix "embedonce-" by itself; use the name {name[len("embedonce-") :]}'
        )
    if not re.fullmatch(NAME, name) or len(name) > MAX_NAME_LENGTH:
        raise Refused(
            "a plugin's name must start with a letter, contain only a-z, 0-9 and single hyphens, and have at most "
            f"{MAX_NAME_LENGTH} characters, such as shelf or my-model"
        )
    if name in RESERVED or name == "provider":
        raise Refused(f"{name} is reserved by embedonce; choose another name")
    if kind == "importer":
        own = installed_by_embedonce(hookspecs.IMPORTERS)
    else:
        own = [*NORMALIZERS, *installed_by_embedonce()]
    if name in own:
        what = "an importer" if kind == "importer" else "a plugin"
        raise Refused(f"{name} is {what} of embedonce itself; choose another name")


def _write_package(template_name: str, name: str, target: Path) -> list[str]:
    """Write the whole package or nothing; return its files, relative to its folder."""
    if os.path.lexists(target):
        raise Refused(f"{target} already exists; choose another folder with --folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part-{os.getpid()}")
    template = files("embedonce") / "templates" / template_name
    try:
        part.mkdir()
        written = sorted(_copy_template(template, part, name))
        os.rename(part, target)
    except BaseException:  # leave no incomplete package behind, even after Ctrl-C
        shutil.rmtree(part, ignore_errors=True)
        raise
    return [file.relative_to(part).as_posix() for file in written]


def _copy_template(template: Traversable, folder: Path, name: str) -> list[Path]:
    """Copy a template folder, with the plugin's name filled in; return the files that were written."""
    written: list[Path] = []
    for item in template.iterdir():
        if item.name == "__pycache__":
            continue
        target = folder / _fill_in_name(item.name, name)
        if item.is_dir():
            target.mkdir()
            written += _copy_template(item, target, name)
        else:
            target.write_text(_fill_in_name(item.read_text(encoding="utf-8"), name), encoding="utf-8", newline="\n")
            written.append(target)
    return written


def _fill_in_name(text: str, name: str) -> str:
    """Replace every form of "example", the plugin's name in the template, with the new plugin's name."""
    forms = {
        "embedonce-example": f"embedonce-{name}",
        "embedonce_example": f"embedonce_{name.replace('-', '_')}",
        "Example": "".join(part.capitalize() for part in name.split("-")),
        "example": name,
    }
    return _PLACEHOLDER.sub(lambda match: forms[match[0]], text)
