"""Make a corpus of real passages from the text that ships with Python and with a Linux system.

    python benchmarks/corpus.py --out build/corpus --passages 100000

Documents of one kind are combined into files of a few hundred passages. A passage is a paragraph; blank
lines separate passages. The same system always gives the same files. Python's standard library alone has
more than 100,000 passages (with its tests).
"""

from __future__ import annotations

import argparse
import ast
import gzip
import json
import os
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SHORTEST, LONGEST = 20, 2000
"""Length of a passage in characters: shorter paragraphs are headings, and longer ones are tables or lists."""


@dataclass(frozen=True)
class Kind:
    """One kind of document: its folders, a pattern of its files, and a function that extracts its text."""

    name: str
    folders: tuple[str, ...]
    files: re.Pattern[str]
    text: Callable[[str], str]
    suffix: str = ".txt"


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a corpus from the text on this machine.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to; it must be empty or missing")
    parser.add_argument("--passages", type=int, default=100_000, help="number of passages (default: %(default)s)")
    parser.add_argument("--per-file", type=int, default=200, help="passages per file, roughly (default: %(default)s)")
    parser.add_argument("--python-only", action="store_true", help="use only Python's standard library")
    options = parser.parse_args()
    if options.out.exists() and any(options.out.iterdir()):
        parser.error(f"{options.out} is not empty")
    kinds = [kind for kind in KINDS if not options.python_only or kind.name.startswith("python")]
    counts = write(alternate_documents(kinds), options.out, options.passages, options.per_file)
    print(json.dumps(counts, indent=1))
    if counts["passages"] < options.passages:
        print(f"this machine has only {counts['passages']} passages, fewer than the {options.passages} requested")


def write(documents: Iterable[tuple[Kind, list[str]]], out: Path, passages: int, per_file: int) -> dict[str, int]:
    """Write ``passages`` passages; return the counts of passages, distinct passages, files and bytes."""
    pending: dict[Kind, list[str]] = {}
    distinct: set[str] = set()
    counts = {"passages": 0, "distinct": 0, "files": 0, "bytes": 0}

    def flush(kind: Kind) -> None:
        content = "\n\n".join(pending.pop(kind)) + "\n"
        counts["files"] += 1
        path = out / kind.name / f"{counts['files']:04}{kind.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        counts["bytes"] += path.write_bytes(content.encode())

    for kind, found in documents:
        found = found[: passages - counts["passages"]]
        pending.setdefault(kind, []).extend(found)
        distinct.update(found)
        counts["passages"] += len(found)
        if len(pending[kind]) >= per_file:
            flush(kind)
        if counts["passages"] == passages:
            break
    for kind in [kind for kind, found in pending.items() if found]:
        flush(kind)
    return {**counts, "distinct": len(distinct)}


def alternate_documents(kinds: Iterable[Kind]) -> Iterator[tuple[Kind, list[str]]]:
    """Yield the passages of one document of each kind in turn, until all documents are used."""
    active = [(kind, _read_documents(kind)) for kind in kinds]
    while active:
        remaining = []
        for kind, passages in active:
            found = next(passages, None)
            if found is not None:
                yield kind, found
                remaining.append((kind, passages))
        active = remaining


def _read_documents(kind: Kind) -> Iterator[list[str]]:
    for path in _find_files(kind.folders, kind.files):
        content = _read(path)
        if content is not None and (passages := list(_split_passages(kind.text(content)))):
            yield passages


def _find_files(folders: Iterable[str], wanted: re.Pattern[str]) -> Iterator[Path]:
    for folder in folders:
        for here, inner, names in os.walk(folder):
            inner[:] = sorted(set(inner) - {"site-packages", "dist-packages", "__pycache__"})
            for name in sorted(names):
                path = Path(here, name)
                if wanted.search(path.as_posix()) and not path.is_symlink():
                    yield path


def _read(path: Path) -> str | None:
    """Return a file's text, or None to skip a file that is not UTF-8 or cannot be read."""
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, EOFError, UnicodeDecodeError):
        return None


_CONTROL = re.compile(r"[^\S\n ]|[\x00-\x09\x0b-\x1f\x7f-\x9f]")
_LETTERS = re.compile(r"[^\W\d_]{2}")


def _split_passages(text: str) -> Iterator[str]:
    text = _CONTROL.sub(" ", text.replace("\r\n", "\n"))
    for paragraph in re.split(r"\n[ \n]*\n", text):
        passage = re.sub(r" +\n", "\n", paragraph).strip()
        if SHORTEST <= len(passage) <= LONGEST and len(_LETTERS.findall(passage)) >= 5:
            yield passage


# --- extracting the text of each kind -----------------------------------------------------------


def _keep_text(content: str) -> str:
    return content


def _extract_docstrings(source: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    nodes = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return "\n\n".join(docstring for node in nodes if (docstring := ast.get_docstring(node)))


def _extract_pod(source: str) -> str:
    """Return the paragraphs of a Perl file's documentation (POD), without its commands."""
    kept: list[str] = []
    inside = False
    for line in source.split("\n"):
        if re.match(r"=[a-z]", line):
            inside = not line.startswith("=cut")
            kept.append("")
        elif inside:
            kept.append(line)
    return re.sub(r"[BCEFILSX]<([^<>]*)>", r"\1", "\n".join(kept))


def _extract_roff(source: str) -> str:
    """Return the paragraphs of a manual page (roff), without its requests and fonts."""
    lines = [re.sub(r"^\.[BIRbi]+ ", "", line) for line in source.split("\n")]
    text = "\n".join("" if line.startswith((".", "'")) else line for line in lines)
    text = re.sub(r"\\f(\[\w*\]|\(..|.)|\\&|\\[,/|^]|\\s[-+]?\d", "", text)
    return re.sub(r"\\(.)", lambda found: {"-": "-", ".": ".", "e": "\\", " ": " ", "~": " "}.get(found[1], ""), text)


_STDLIB = sysconfig.get_path("stdlib")
_SHARE = "/usr/share"
_DOCS = re.compile(r"(\.(txt|md|rst)|/(README|NEWS|[Cc]hange[Ll]og)[^/]*)(\.gz)?$")
_LICENCES = re.compile(r"/common-licenses/|/copyright$")
KINDS = (
    Kind("python-docstrings", (_STDLIB,), re.compile(r"\.py$"), _extract_docstrings, ".md"),
    Kind("python-sources", (_STDLIB,), re.compile(r"\.py$"), _keep_text),
    Kind("docs", (f"{_SHARE}/doc",), _DOCS, _keep_text),
    Kind("licences", (f"{_SHARE}/common-licenses", f"{_SHARE}/doc"), _LICENCES, _keep_text),
    Kind("manual", (f"{_SHARE}/man",), re.compile(r"/man/man\d/"), _extract_roff),
    Kind("perl", (f"{_SHARE}/perl", f"{_SHARE}/perl5"), re.compile(r"\.(pod|pm)$"), _extract_pod, ".md"),
)

if __name__ == "__main__":
    main()
