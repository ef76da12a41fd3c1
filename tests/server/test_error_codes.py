"""The page about the server lists each code of an error with its status, and no code that the server does not have."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
ANY = ""
"""Stands for a status that is only known when a request is answered."""


def find_codes_in_source() -> set[tuple[str, str]]:
    """Return each code with its status, from the calls that make an error."""
    calls = [
        node
        for file in (ROOT / "server" / "embedonce_server").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
    ]
    return {pair for call in calls for pair in _read_call(call)}


def _read_call(call: ast.Call) -> Iterator[tuple[str, str]]:
    arguments = [argument.value if isinstance(argument, ast.Constant) else ANY for argument in call.args]
    if isinstance(call.func, ast.Name) and call.func.id == "_make_answer":
        yield str(arguments[0]), str(arguments[1])
    for keyword in call.keywords:
        if keyword.arg == "code" and isinstance(keyword.value, ast.Constant):
            yield str(keyword.value.value), str(arguments[0])


def find_codes_on_page() -> set[tuple[str, str]]:
    page = (ROOT / "docs" / "serve.md").read_text()
    rows = re.findall(r"^\| (\d{3}(?:, \d{3})*) \| (`[^|]*`) \|", page, re.MULTILINE)
    return {
        (code, status)
        for statuses, codes in rows
        for status in statuses.split(", ")
        for code in re.findall(r"`(\w+)`", codes)
    }


def test_the_page_lists_the_codes_of_the_source_with_their_statuses() -> None:
    source, page = find_codes_in_source(), find_codes_on_page()
    known = {code for code, _ in page}
    assert {code for code, status in source if status == ANY} == {"upstream_unauthorized"}
    assert {code for code, _ in source} == known
    assert {pair for pair in source if pair[1] != ANY} == {pair for pair in page if pair[0] != "upstream_unauthorized"}
