"""docs/plugins.md: its lists are complete, and its commands work in an empty folder as the page says."""

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


def read_table(section: str) -> dict[str, list[str]]:
    """Return the rows of the first table below a heading, by their first cell."""
    part = PAGE.partition(f"# {section}\n")[2]
    found = re.search(r"^\|.*?(?=^[^|]|\Z)", part, re.DOTALL | re.MULTILINE)
    assert found is not None, f"docs/plugins.md has no table below {section!r}"
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in found[0].splitlines()[2:]]
    return {cells[0].strip("| `"): cells[1:] for cells in lines}


# --- its lists --------------------------------------------------------------------------------


def test_every_hook_and_argument() -> None:
    documented = {name: cells[0].rstrip(" |") for name, cells in read_table("What a plugin is").items()}
    actual = {}
    for hook in hookspecs.HOOKS:
        arguments = ", ".join(inspect.signature(hook).parameters)
        sentence = str(inspect.getdoc(hook)).replace("``", "`").removesuffix(".")
        actual[f"{hook.__name__}({arguments})"] = sentence[0].lower() + sentence[1:]
    assert documented == actual


def test_every_option_of_hookimpl_and_the_version() -> None:
    options = [name for name, p in inspect.signature(hookspecs.hookimpl).parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert options == ["specname"]
    assert all(f"@hookimpl({name}=" in PAGE for name in options)
    assert f"`api = {API}`" in PAGE


def test_every_capability_with_its_default() -> None:
    documented = read_table("Capabilities")
    fields = {field.name: field.default for field in dataclasses.fields(Capabilities)}
    assert list(documented) == list(fields)
    for name, default in fields.items():
        written = "none" if default is None else str(default).lower() if isinstance(default, bool) else f'`"{default}"`'
        assert documented[name][0] == written, name
    for capability, method in EXTRAS.items():
        assert f"`{method}(" in documented[capability][1]


def test_every_option_about_plugins() -> None:
    for name in options_of(PluginsTable):
        assert f"`[plugins] {name}`" in PAGE
    assert f"`{plugins.DISABLE}`" in PAGE


# --- its commands -----------------------------------------------------------------------------


def build_script() -> str:
    """Return one script that runs the page's commands and writes the files that the page shows between them."""
    lines = ["set -e"]
    for token in MarkdownIt("commonmark").parse(PAGE.partition(BEGIN)[2].partition(END)[0]):
        if token.type != "fence":
            continue
        if token.info == "text":
            # The page installs from a clone, and the test from the wheel that it has built.
            commands = token.content.replace('"path/to/your/clone[testing]"', '"embedonce[testing]"')
            lines += [line.removeprefix("$ ") for line in commands.splitlines()]
        else:
            file = token.content.partition("\n")[0].removeprefix("# ")
            lines.append(f"cat > {file} <<'END OF FILE'\n{token.content}END OF FILE")
    return "\n".join(lines)


def link_other_packages(folder: Path) -> Path:
    """Return a folder of links to the packages installed here, so that a new environment needs no network."""
    folder.mkdir()
    for installed in Path(sysconfig.get_path("purelib")).iterdir():
        if not installed.name.lower().startswith(("embedonce", "_embedonce", "pip", "__pycache__")):
            (folder / installed.name).symlink_to(installed)
    return folder


@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.platform == "win32", reason="the page's commands are those of a Unix shell")
def test_its_commands_in_an_empty_folder(tmp_path: Path) -> None:
    assert build_script().count("embedonce new backend shelf") == 1
    wheels, folder = tmp_path / "wheels", tmp_path / "empty"
    folder.mkdir()
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(wheels)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(link_other_packages(tmp_path / "installed")),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PYTEST_ADDOPTS": "-q -p no:cacheprovider -p no:asyncio",
        "TMPDIR": next((folder for folder in ("/dev/shm",) if os.access(folder, os.W_OK)), str(tmp_path)),
    }
    done = subprocess.run(["bash"], input=build_script(), cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    package = folder / "embedonce-shelf"
    out = done.stdout
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
    assert list(folder.glob(".venv/lib/*/site-packages/embedonce/__init__.py")), "the wheel was installed"


def test_the_backend_on_the_page_is_short() -> None:
    code = PAGE.partition("class ShelfBackend:")[2].partition("@hookimpl")[0]
    assert len([line for line in code.splitlines() if line.strip()]) < 30
