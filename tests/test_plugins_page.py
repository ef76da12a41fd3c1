"""docs/plugins.md: what it lists is what there is, and its commands do what it says, in an empty folder."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt

from embedonce import Capabilities, hookspecs, plugins
from embedonce._config.tables import PluginsTable
from embedonce._plugins.options import options_of
from embedonce.contracts import API, EXTRAS

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "plugins.md").read_text()
BEGIN, END = "## From nothing to a plugin in use\n", "\n## What a plugin is\n"


def rows(section: str) -> dict[str, list[str]]:
    """Return the rows of the first table below a heading, by their first cell."""
    part = PAGE.partition(f"# {section}\n")[2]
    found = re.search(r"^\|.*?(?=^[^|]|\Z)", part, re.DOTALL | re.MULTILINE)
    assert found is not None, f"docs/plugins.md has no table below {section!r}"
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in found[0].splitlines()[2:]]
    return {cells[0].strip("| `"): cells[1:] for cells in lines}


# --- what it lists ----------------------------------------------------------------------------


def test_every_hook_and_argument() -> None:
    said = {name: cells[0].rstrip(" |") for name, cells in rows("What a plugin is").items()}
    there = {}
    for hook in hookspecs.HOOKS:
        arguments = ", ".join(inspect.signature(hook).parameters)
        sentence = str(inspect.getdoc(hook)).replace("``", "`").removesuffix(".")
        there[f"{hook.__name__}({arguments})"] = sentence[0].lower() + sentence[1:]
    assert said == there


def test_every_option_of_hookimpl_and_the_version() -> None:
    options = [name for name, p in inspect.signature(hookspecs.hookimpl).parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert options == ["specname"]
    assert all(f"@hookimpl({name}=" in PAGE for name in options)
    assert f"`api = {API}`" in PAGE


def test_every_capability_with_its_default() -> None:
    said = rows("Capabilities")
    fields = {field.name: field.default for field in dataclasses.fields(Capabilities)}
    assert list(said) == list(fields)
    for name, default in fields.items():
        written = "none" if default is None else str(default).lower() if isinstance(default, bool) else f'`"{default}"`'
        assert said[name][0] == written, name
    for capability, method in EXTRAS.items():
        assert f"`{method}(" in said[capability][1]


def test_every_option_about_plugins() -> None:
    for name in options_of(PluginsTable):
        assert f"`[plugins] {name}`" in PAGE
    assert f"`{plugins.DISABLE}`" in PAGE


# --- what it does -----------------------------------------------------------------------------


def script() -> str:
    """Return the commands of the page, and the files that it shows between them, as one script."""
    lines = ["set -e"]
    for token in MarkdownIt("commonmark").parse(PAGE.partition(BEGIN)[2].partition(END)[0]):
        if token.type != "fence":
            continue
        if token.info == "text":
            lines += [line.removeprefix("$ ") for line in token.content.splitlines()]
        else:
            file = token.content.partition("\n")[0].removeprefix("# ")
            lines.append(f"cat > {file} <<'END OF FILE'\n{token.content}END OF FILE")
    return "\n".join(lines)


def everything_but_embedonce(folder: Path) -> Path:
    """Return a folder with links to what is installed here, so that a new environment has it without a network."""
    folder.mkdir()
    for installed in Path(sysconfig.get_path("purelib")).iterdir():
        if not installed.name.lower().startswith(("embedonce", "_embedonce", "pip", "__pycache__")):
            (folder / installed.name).symlink_to(installed)
    return folder


@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.platform == "win32", reason="the page's commands are those of a Unix shell")
def test_its_commands_in_an_empty_folder(tmp_path: Path) -> None:
    assert script().count("embedonce new backend shelf") == 1
    wheels, folder = tmp_path / "wheels", tmp_path / "empty"
    folder.mkdir()
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(wheels)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(everything_but_embedonce(tmp_path / "installed")),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PYTEST_ADDOPTS": "-q -p no:cacheprovider -p no:asyncio",
        "TMPDIR": next((folder for folder in ("/dev/shm",) if os.access(folder, os.W_OK)), str(tmp_path)),
    }
    said = subprocess.run(["bash"], input=script(), cwd=folder, env=environment, capture_output=True, text=True)
    assert said.returncode == 0, said.stdout[-3000:] + said.stderr[-3000:]

    package = folder / "embedonce-shelf"
    out = said.stdout
    assert len(re.findall(r"^\d+ passed", out, re.MULTILINE)) == 2, "pytest ran twice, and everything passed"
    assert re.search(r"^shelf, a backend: \d+ passed, \d+ skipped, 0 failed$", out, re.MULTILINE)
    assert re.search(r"^shelf +backend +embedonce-shelf 0\.1\.0 +-", out, re.MULTILINE)
    assert re.search(r"^shelf +shelf +yes", out, re.MULTILINE)
    assert re.search(r"^ +[1-9]\d* +\( ?100\.0 %\) computed$", out, re.MULTILINE)
    assert re.search(r"^ +[1-9]\d* +\( ?100\.0 %\) from shelf$", out, re.MULTILINE)
    assert len(np.load(package / "readme.npy")) > 1
    schema = json.loads((package / "embedonce.schema.json").read_text())
    (tier,) = [one for one in schema["properties"]["tiers"]["items"]["oneOf"] if one.get("title") == "shelf"]
    assert tier["properties"]["path"]["description"] == "File of the database."
    assert list(folder.glob(".venv/lib/*/site-packages/embedonce/__init__.py")), "it is the wheel that was used"


def test_the_backend_that_it_shows_is_short() -> None:
    code = PAGE.partition("class ShelfBackend:")[2].partition("@hookimpl")[0]
    assert len([line for line in code.splitlines() if line.strip()]) < 30
