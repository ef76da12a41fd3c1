"""Write the tables of docs/conformance.md from the broken plugins of tests/testing/test_*contract_catches.py.

usage: python docs/generate_conformance.py

tests/testing/test_kit_is_documented.py fails where the page is not what this writes. The tests are read, not
imported: a bug's sentence is the docstring of the class or function that has it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

DOCS = Path(__file__).parent
PAGE = DOCS / "conformance.md"
TESTS = DOCS.parent / "tests" / "testing"
BEGIN = "<!-- From here on this page is written by docs/generate_conformance.py: run it instead of changing this. -->\n"

TITLES = {
    "BROKEN_BACKENDS": "Broken backends",
    "BROKEN_READ_ONLY_BACKENDS": "Broken read-only backends",
    "BROKEN_PROVIDERS": "Broken providers",
    "BROKEN_IMPORTERS": "Broken importers",
    "BROKEN_NORMALIZERS": "Broken normalisation steps",
}


def page(current: str) -> str:
    """Return the page with its tables as they must be."""
    head, mark, _ = current.partition(BEGIN)
    if not mark:
        raise SystemExit(f"{PAGE} has no line {BEGIN!r}")
    return head + BEGIN + "\n" + "\n".join(tables()) + "\n"


def tables() -> Iterator[str]:
    """Yield the lines of the tables: each bug, and the standard test that finds it."""
    shared = {name: said for tree in _parse(sorted((TESTS / "shelf").glob("*.py"))) for name, said in _sentences(tree)}
    registries: dict[str, list[tuple[str, str]]] = {}
    sentences: dict[str, dict[str, str]] = {}
    for tree in _parse(sorted(TESTS.glob("test_*contract_catches.py"))):
        for registry, rows in _registries(tree):
            registries[registry] = rows
            sentences[registry] = {**shared, **dict(_sentences(tree))}
    for registry, title in TITLES.items():
        rows = registries[registry]
        yield f"## {title}"
        yield ""
        yield f"{len({broken for _, broken in rows})} bugs, each found by the test beside it:"
        yield ""
        yield "| bug | found by |"
        yield "| --- | --- |"
        for test, broken in rows:
            yield f"| {sentences[registry][broken].removesuffix('.').replace('|', chr(92) + '|')} | `{test}` |"
        if registry != list(TITLES)[-1]:
            yield ""


def _parse(files: Iterable[Path]) -> list[ast.Module]:
    return [ast.parse(file.read_text(), str(file)) for file in files]


def _sentences(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield name and docstring of every class and function, and of what is one of such a class."""
    known: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            known[node.name] = " ".join((ast.get_docstring(node) or "").split())
        elif (
            isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name)
        ):
            made = known.get(node.value.func.id)
            if made and isinstance(node.targets[0], ast.Name):
                known[node.targets[0].id] = made
    yield from known.items()


def _registries(tree: ast.Module) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield each list of broken plugins: the test that finds one, and its name."""
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id in TITLES:
            assert isinstance(node.value, ast.List)
            yield node.target.id, [(pair.elts[0].value, pair.elts[1].id) for pair in node.value.elts]  # type: ignore[attr-defined]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
