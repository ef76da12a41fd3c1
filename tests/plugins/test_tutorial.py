"""The final folder of the backend tutorial matches the page and works as the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

import embedonce

from .conftest import PLUGINS

PAGE = PLUGINS.parents[1] / "docs" / "backend-tutorial.md"
FOLDER = PLUGINS / "table"
FENCES = [token.content for token in MarkdownIt("commonmark").parse(PAGE.read_text()) if token.type == "fence"]


def shown(name: str) -> str:
    """Return the last full version of a file on the page, without the line that names the file."""
    found = [content for content in FENCES if content.startswith(f"# {name}\n")]
    return found[-1].partition("\n")[2]


@pytest.mark.parametrize(
    "name", ["pyproject.toml", "src/embedonce_table/__init__.py", "src/embedonce_table/backend.py"]
)
def test_page_and_folder_are_the_same(name: str) -> None:
    assert (FOLDER / name).read_text() == shown(name)


def test_the_tests_are_those_of_the_page_and_its_patches() -> None:
    """The folder's file has exactly the lines that the page shows or adds."""
    changes = [content for content in FENCES if "--- tests/test_table.py\n" in content]
    lines = shown("tests/test_table.py").splitlines()
    for line in changes[0].partition("+++ tests/test_table.py\n")[2].splitlines():
        if line.startswith("-"):
            lines.remove(line[1:])
        elif line.startswith("+"):
            lines.append(line[1:])
    assert sorted(filter(None, lines)) == sorted(
        filter(None, (FOLDER / "tests/test_table.py").read_text().splitlines())
    )


@pytest.mark.timeout(500)  # pip may have to install the plugins first
def test_its_configuration_works(tmp_path: Path, installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (configuration,) = (content for content in FENCES if re.search(r'^type = "table"$', content, re.MULTILINE))
    (tmp_path / "embedonce.toml").write_text(configuration)
    monkeypatch.setenv("EMBEDONCE__TIERS__TABLE__TIMEOUT", "60s")  # a busy machine must not cause a timeout
    monkeypatch.syspath_prepend(str(installed))
    for source in ("provider", "table"):
        with embedonce.open(tmp_path / "embedonce.toml") as cache:
            assert cache.fetch(["a text"]).sources == [source]
    assert (tmp_path / "frames.db").is_file()
