"""Make a small retrieval set from Python's standard library, without a download.

    python examples/docstrings.py build/docstrings
    embedonce evaluate build/docstrings/corpus.jsonl build/docstrings/queries.jsonl --qrels build/docstrings/qrels.tsv

A query is the first sentence of a docstring, and its only relevant document is the rest of that docstring. The files
have the format of a BEIR data set. The docstrings depend on the version of Python.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

SENTENCE = re.compile(r"(.{20,200}?[.!?])\s+(.*)", re.DOTALL)
MIN_LENGTH, MAX_LENGTH = 100, 1500
"""Minimum and maximum characters of a document."""


def read_docstrings() -> Iterator[str]:
    """Yield the docstrings of the standard library's modules and packages, without its tests."""
    top = Path(sysconfig.get_path("stdlib"))
    for path in sorted(top.rglob("*.py")):
        if {"site-packages", "test", "tests", "idle_test", "lib2to3"} & set(path.relative_to(top).parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield ast.get_docstring(node) or ""


def make_pairs() -> list[tuple[str, str]]:
    """Return each first sentence with the rest of its docstring. Of equal sentences or rests, keep only the first."""
    found: dict[str, str] = {}
    rests: set[str] = set()
    for text in read_docstrings():
        match = SENTENCE.fullmatch(text.strip())
        if match and MIN_LENGTH <= len(match[2]) <= MAX_LENGTH:
            sentence, rest = " ".join(match[1].split()), " ".join(match[2].split())
            if sentence not in found and rest not in rests:
                found[sentence] = rest
                rests.add(rest)
    return sorted(found.items())


def main(folder: Path) -> None:
    """Write the three files."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = make_pairs()
    for name, texts in (("queries", [query for query, _ in pairs]), ("corpus", [document for _, document in pairs])):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for number, text in enumerate(texts):
                print(json.dumps({"_id": str(number), "text": text}), file=file)
    with (folder / "qrels.tsv").open("w", encoding="utf-8") as file:
        print("query-id\tcorpus-id\tscore", file=file)
        for number in range(len(pairs)):
            print(f"{number}\t{number}\t1", file=file)
    print(f"{len(pairs):,} queries and documents in {folder}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/docstrings.py FOLDER")
    main(Path(sys.argv[1]))
