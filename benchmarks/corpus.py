"""Make a corpus of real passages from the text that ships with Python and with a Linux system.

    python benchmarks/corpus.py --out build/corpus --passages 100000

Documents of one kind are put together into files of some hundred passages; a passage is a paragraph, and
a blank line separates it from the next. The same system gives the same files. Where only Python is
installed, its standard library alone gives more than 100,000 (with its tests).
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
"""Characters of a passage; what is shorter is a heading, what is longer a table or a list."""


@dataclass(frozen=True)
class Kind:
    """One kind of document: where it lies, which files it is, and how its text is read from them."""

    name: str
    folders: tuple[str, ...]
    files: re.Pattern[str]
    text: Callable[[str], str]
    suffix: str = ".txt"


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a corpus from the text on this machine.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to; it must be empty or absent")
    parser.add_argument("--passages", type=int, default=100_000, help="how many to write (default: %(default)s)")
    parser.add_argument("--per-file", type=int, default=200, help="about how many to a file (default: %(default)s)")
    parser.add_argument("--python-only", action="store_true", help="use the standard library alone")
    options = parser.parse_args()
    if options.out.exists() and any(options.out.iterdir()):
        parser.error(f"{options.out} is not empty")
    kinds = [kind for kind in KINDS if not options.python_only or kind.name.startswith("python")]
    counts = write(documents(kinds), options.out, options.passages, options.per_file)
    print(json.dumps(counts, indent=1))
    if counts["passages"] < options.passages:
        print(f"this machine has no more than {counts['passages']} passages; {options.passages} were asked for")


def write(documents: Iterable[tuple[Kind, list[str]]], out: Path, passages: int, per_file: int) -> dict[str, int]:
    """Write documents until there are ``passages``, and return counts of passages, distinct ones, files and bytes."""
    waiting: dict[Kind, list[str]] = {}
    distinct: set[str] = set()
    counts = {"passages": 0, "distinct": 0, "files": 0, "bytes": 0}

    def flush(kind: Kind) -> None:
        content = "\n\n".join(waiting.pop(kind)) + "\n"
        counts["files"] += 1
        path = out / kind.name / f"{counts['files']:04}{kind.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        counts["bytes"] += path.write_bytes(content.encode())

    for kind, found in documents:
        found = found[: passages - counts["passages"]]
        waiting.setdefault(kind, []).extend(found)
        distinct.update(found)
        counts["passages"] += len(found)
        if len(waiting[kind]) >= per_file:
            flush(kind)
        if counts["passages"] == passages:
            break
    for kind in [kind for kind, found in waiting.items() if found]:
        flush(kind)
    return {**counts, "distinct": len(distinct)}


def documents(kinds: Iterable[Kind]) -> Iterator[tuple[Kind, list[str]]]:
    """Yield the passages of one document of each kind in turn, as long as there are any."""
    running = [(kind, _documents_of(kind)) for kind in kinds]
    while running:
        going_on = []
        for kind, passages in running:
            found = next(passages, None)
            if found is not None:
                yield kind, found
                going_on.append((kind, passages))
        running = going_on


def _documents_of(kind: Kind) -> Iterator[list[str]]:
    for path in _files(kind.folders, kind.files):
        content = _read(path)
        if content is not None and (passages := list(_passages(kind.text(content)))):
            yield passages


def _files(folders: Iterable[str], wanted: re.Pattern[str]) -> Iterator[Path]:
    for folder in folders:
        for here, inner, names in os.walk(folder):
            inner[:] = sorted(set(inner) - {"site-packages", "dist-packages", "__pycache__"})
            for name in sorted(names):
                path = Path(here, name)
                if wanted.search(path.as_posix()) and not path.is_symlink():
                    yield path


def _read(path: Path) -> str | None:
    """Return a file's text, or None where it is no UTF-8 or cannot be read: a corpus may leave a file out."""
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, EOFError, UnicodeDecodeError):
        return None


_CONTROL = re.compile(r"[^\S\n ]|[\x00-\x09\x0b-\x1f\x7f-\x9f]")
_LETTERS = re.compile(r"[^\W\d_]{2}")


def _passages(text: str) -> Iterator[str]:
    text = _CONTROL.sub(" ", text.replace("\r\n", "\n"))
    for paragraph in re.split(r"\n[ \n]*\n", text):
        passage = re.sub(r" +\n", "\n", paragraph).strip()
        if SHORTEST <= len(passage) <= LONGEST and len(_LETTERS.findall(passage)) >= 5:
            yield passage


# --- how each kind's text is read ---------------------------------------------------------------


def _as_it_is(content: str) -> str:
    return content


def _docstrings(source: str) -> str:
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


def _pod(source: str) -> str:
    """Return the paragraphs of a Perl file's documentation, without its commands."""
    kept: list[str] = []
    inside = False
    for line in source.split("\n"):
        if re.match(r"=[a-z]", line):
            inside = not line.startswith("=cut")
            kept.append("")
        elif inside:
            kept.append(line)
    return re.sub(r"[BCEFILSX]<([^<>]*)>", r"\1", "\n".join(kept))


def _roff(source: str) -> str:
    """Return the paragraphs of a manual page, without its requests and fonts."""
    lines = [re.sub(r"^\.[BIRbi]+ ", "", line) for line in source.split("\n")]
    text = "\n".join("" if line.startswith((".", "'")) else line for line in lines)
    text = re.sub(r"\\f(\[\w*\]|\(..|.)|\\&|\\[,/|^]|\\s[-+]?\d", "", text)
    return re.sub(r"\\(.)", lambda found: {"-": "-", ".": ".", "e": "\\", " ": " ", "~": " "}.get(found[1], ""), text)


_STDLIB = sysconfig.get_path("stdlib")
_SHARE = "/usr/share"
_DOCS = re.compile(r"(\.(txt|md|rst)|/(README|NEWS|[Cc]hange[Ll]og)[^/]*)(\.gz)?$")
_LICENCES = re.compile(r"/common-licenses/|/copyright$")
KINDS = (
    Kind("python-docstrings", (_STDLIB,), re.compile(r"\.py$"), _docstrings, ".md"),
    Kind("python-sources", (_STDLIB,), re.compile(r"\.py$"), _as_it_is),
    Kind("docs", (f"{_SHARE}/doc",), _DOCS, _as_it_is),
    Kind("licences", (f"{_SHARE}/common-licenses", f"{_SHARE}/doc"), _LICENCES, _as_it_is),
    Kind("manual", (f"{_SHARE}/man",), re.compile(r"/man/man\d/"), _roff),
    Kind("perl", (f"{_SHARE}/perl", f"{_SHARE}/perl5"), re.compile(r"\.(pod|pm)$"), _pod, ".md"),
)

if __name__ == "__main__":
    main()
