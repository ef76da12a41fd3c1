"""docs/import.md has a section for each importer, whose options, command and configuration exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from embedonce import hookspecs, plugins
from embedonce._plugins.options import options_of

PAGE = Path(__file__).parent.parent / "docs/import.md"
NAMES = plugins.installed_by_embedonce(hookspecs.IMPORTERS)


def test_the_table_of_importers_is_complete() -> None:
    rows = {re.findall(r"`([\w-]+)`", row[0])[0]: row for row in read_table(PAGE.read_text(), "importer")}
    assert sorted(rows) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_options_is_complete(name: str) -> None:
    options = options_of(plugins.importer(name))
    rows = {cell: row for row in read_table(read_section(name), "option") for cell in re.findall(r"`(\w+)`", row[0])}
    assert sorted(rows) == sorted(options)
    for option in options.values():
        is_either = " or " in rows[option.name][0]  # `path` or `url`
        assert option.required == (rows[option.name][1] == "required") or is_either, option.name


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_name_options_that_exist(name: str) -> None:
    cls = plugins.importer(name)
    options = options_of(cls)
    text = re.sub(r"\\\n\s*", "", read_section(name))
    commands = [line for line in text.splitlines() if line.startswith("embedonce import ")]
    assert commands
    for command in commands:
        _, _, location, *words = shlex.split(command)
        given = {words[at + 1].partition("=")[0] for at, word in enumerate(words) if word == "--option"}
        place = "url" if "://" in location and "url" in options else "path"
        required = {option.name for option in options.values() if option.required}
        assert words[words.index("--from") + 1] == name
        assert required <= {place, *given} <= set(options)
        assert ("--texts" in words) <= hasattr(cls, "lookup")


def read_section(name: str) -> str:
    """Return the text below the heading of an importer, up to the next heading."""
    section = PAGE.read_text().partition(f"\n### {name}\n")[2]
    assert section, f"{PAGE.name} has no section of {name}"
    return re.split(r"^#+ ", section, maxsplit=1, flags=re.MULTILINE)[0]


def read_table(text: str, first_cell: str) -> list[list[str]]:
    table = text.partition(f"| {first_cell} |")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
