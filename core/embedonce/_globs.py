"""Patterns of file names, with the rules of ``.gitignore``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def compile_globs(globs: Iterable[str]) -> Any:
    """Return a ``pathspec.GitIgnoreSpec`` of patterns such as ``*.csv`` or ``docs/**/*.md``.

    Raises:
        ValueError: a pattern is invalid. The message says what is wrong and does not repeat the pattern.
    """
    from pathspec import GitIgnoreSpec

    return GitIgnoreSpec([_compile_glob(glob) for glob in globs])


def _compile_glob(glob: str) -> Any:
    import re

    from pathspec import GitIgnoreSpec

    if not glob.strip():
        raise ValueError("must not be empty; use a pattern such as *.csv")
    if glob.startswith(("!", "#")):
        raise ValueError(f"must not begin with {glob[0]}; write \\{glob[0]} if a file name begins with it")
    try:
        (pattern,) = GitIgnoreSpec.from_lines([glob.removeprefix("./")]).patterns
    except (ValueError, re.error):
        pattern = None
    if pattern is None or pattern.include is None:
        raise ValueError("is not a valid pattern; use a pattern such as *.csv, docs/ or docs/**/*.md")
    return pattern
