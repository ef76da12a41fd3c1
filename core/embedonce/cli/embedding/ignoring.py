"""Which entries of a folder its ``.gitignore`` files exclude."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from typing import Any, NamedTuple

FILE_NAME = ".gitignore"
MAX_BYTES = 2**20
"""Maximum size of a ``.gitignore`` file."""


class IgnoreFile(NamedTuple):
    """The patterns of one ``.gitignore`` file."""

    above: str
    """Path from the folder of the file down to the top of the walk, with a final slash, or an empty string."""
    below: int
    """Number of characters in the path from the top of the walk down to the folder of the file, with a final slash."""
    patterns: Sequence[Any]
    """Patterns of ``pathspec``, in the order of the file."""


Rules = tuple[IgnoreFile, ...]
"""The files that apply in a folder, the one that is highest up first."""


def is_ignored(rules: Rules, path: str, *, is_folder: bool) -> bool:
    """Return whether a path below the top of the walk is ignored. The file that is deepest down decides first."""
    for rule in reversed(rules):
        target = rule.above + path[rule.below :] + ("/" if is_folder else "")
        for pattern in reversed(rule.patterns):
            # The whole path must match. The walk has already asked the same of each folder above.
            if pattern.regex.fullmatch(target):
                return bool(pattern.include)
    return False


def read_rules(folder: str, path: str) -> Rules:
    """Return the rules of a folder's own ``.gitignore``. ``path`` leads from the top of the walk to the folder.

    Raises:
        OSError: the file exists and cannot be read.
    """
    patterns = _read_patterns(os.path.join(folder, FILE_NAME))
    return () if not patterns else (IgnoreFile("", len(path) + 1 if path else 0, patterns),)


def read_rules_above(top: str) -> Rules:
    """Return the rules of the folders above ``top``, up to the root of its git repository.

    Return no rules if these rules ignore ``top`` itself, because the user has asked for this folder by name.
    """
    folders = [os.path.realpath(top)]
    while not os.path.lexists(os.path.join(folders[-1], ".git")):
        parent = os.path.dirname(folders[-1])
        if parent == folders[-1]:
            return ()
        folders.append(parent)
    rules: Rules = ()
    for folder in reversed(folders[1:]):
        above = os.path.relpath(folders[0], folder).replace(os.sep, "/") + "/"
        patterns = _read_patterns(os.path.join(folder, FILE_NAME))
        if patterns:
            rules = (*rules, IgnoreFile(above, 0, patterns))
    return () if is_ignored(rules, "", is_folder=False) else rules


def _read_patterns(path: str) -> Sequence[Any]:
    """Return the patterns of a file. Git does not follow a link of this name either."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return ()
    except FileNotFoundError:
        return ()
    from pathspec import GitIgnoreSpec

    with open(path, "rb") as file:
        text = os.fsdecode(file.read(MAX_BYTES))
    patterns: list[Any] = []
    for line in text.removeprefix("\ufeff").split("\n"):
        try:
            patterns += GitIgnoreSpec.from_lines([_spell_out(line.removesuffix("\r"))]).patterns
        except (ValueError, re.error):
            continue  # git also skips an invalid pattern
    return [pattern for pattern in patterns if pattern.include is not None]


def _spell_out(line: str) -> str:
    """Return a pattern that matches the same paths as ``line``, each as a whole and not by its beginning."""
    sign = "!" if line.startswith("!") else ""
    pattern = line.removeprefix("!").rstrip(" ")
    end = "/" if pattern.endswith("/") else ""
    pattern = pattern.removesuffix("/")
    if pattern in ("*", "**", "**/*"):
        return f"{sign}?*{end}"
    return f"{sign}{pattern}/?*{end}" if pattern.endswith("/**") else line
