"""Which entries of a folder its ``.gitignore`` files exclude."""

from __future__ import annotations

import os
import re
import stat
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
    patterns: Any
    """A ``pathspec.GitIgnoreSpec``."""


Rules = tuple[IgnoreFile, ...]
"""The files that apply in a folder, the one that is highest up first."""


def is_ignored(rules: Rules, path: str, *, is_folder: bool) -> bool:
    """Return whether a path below the top of the walk is ignored. The file that is deepest down decides first."""
    for rule in reversed(rules):
        target = rule.above + path[rule.below :] + ("/" if is_folder else "")
        found: bool | None = rule.patterns.check_file(target).include
        if found is not None:
            return found
    return False


def read_rules(folder: str, path: str) -> Rules:
    """Return the rules of a folder's own ``.gitignore``. ``path`` leads from the top of the walk to the folder.

    Raises:
        OSError: the file exists and cannot be read.
    """
    patterns = _read_patterns(os.path.join(folder, FILE_NAME))
    return () if patterns is None else (IgnoreFile("", len(path) + 1 if path else 0, patterns),)


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
        if patterns is not None:
            rules = (*rules, IgnoreFile(above, 0, patterns))
    return () if is_ignored(rules, "", is_folder=False) else rules


def _read_patterns(path: str) -> Any:
    """Return the patterns of a file, or None if there is none. Git does not follow a link of this name either."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return None
    except FileNotFoundError:
        return None
    from pathspec import GitIgnoreSpec

    with open(path, "rb") as file:
        text = os.fsdecode(file.read(MAX_BYTES))
    patterns: list[Any] = []
    for line in text.removeprefix("\ufeff").splitlines():
        try:
            patterns += GitIgnoreSpec.from_lines([line]).patterns
        except (ValueError, re.error):
            continue  # git also skips an invalid pattern
    return GitIgnoreSpec(patterns)
