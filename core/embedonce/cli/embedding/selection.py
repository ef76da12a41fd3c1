"""Which files are read: the paths that the user names, and the files in folders, in a fixed order."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from embedonce._globs import compile_globs

from .ignoring import Rules, is_ignored, read_rules, read_rules_above
from .passages import Broken, decode_path, describe_os_error

STDIN = "-"
GENERATED = frozenset({"node_modules", "__pycache__", ".venv"})
"""Names of folders whose files nobody has written by hand."""

IGNORED = "ignored by .gitignore"
LEADS_OUT = "link that leads out of the folder"
LEADS_TO_SKIPPED = "link to a file that is not read"
EXCLUDED = "excluded by --exclude"
NOT_INCLUDED = "not matched by --include"


class Found(NamedTuple):
    """A file to read."""

    path: str
    name: str
    """Path from the folder that the user named, or the path that the user named."""
    is_argument: bool
    """Whether the user named the path; if not, the file was found in a folder."""


class _Entry(NamedTuple):
    """An entry of a folder that is still to be looked at."""

    name: str
    """Path from the top of the walk."""
    rules: Rules
    """Rules of all folders above the entry."""


class Selection:
    """Finds the files to read. The entries of a folder are found in the order of their names, at every level.

    In folders, hidden files, linked folders, generated folders (``node_modules``), entries that ``.gitignore`` ignores
    and links that lead out of the folder are skipped. ``include`` and ``exclude`` apply to all files, except
    standard input.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        leave_out: Collection[str] = (),
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        self._paths = tuple(paths)
        self._leave_out = frozenset(map(os.path.realpath, leave_out))
        self._include = compile_globs(include) if include else None
        self._exclude = compile_globs(exclude) if exclude else None

    def walk(self, skipped: Counter[str]) -> Iterator[Found | Broken]:
        """Yield the files to read, and what cannot be read. Count skipped entries in ``skipped``."""
        for path in self._paths:
            if path == STDIN:
                yield Found(path, path, is_argument=True)
            elif os.path.isdir(path):
                yield from _Walk(self, path, skipped).walk()
            elif reason := self.find_filter(_normalize(path), is_folder=False):
                skipped[reason] += 1
            else:
                yield Found(path, path, is_argument=True)

    def is_left_out(self, path: str) -> bool:
        return os.path.realpath(path) in self._leave_out

    def find_filter(self, name: str, *, is_folder: bool) -> str | None:
        """Return the option that excludes an entry, or None."""
        if self._exclude is not None and self._exclude.match_file(name + ("/" if is_folder else "")):
            return EXCLUDED
        if self._include is not None and not is_folder and not self._include.match_file(name):
            return NOT_INCLUDED
        return None


def _normalize(path: str) -> str:
    return os.path.normpath(path).replace(os.sep, "/").lstrip("/")


class _Walk:
    """A walk through one folder, with an explicit stack, because folders may nest deeper than the recursion limit."""

    def __init__(self, selection: Selection, top: str, skipped: Counter[str]) -> None:
        self._selection = selection
        self._top = top
        self._skipped = skipped
        self._real_top = os.path.realpath(top)
        self._above: Rules = ()

    def walk(self) -> Iterator[Found | Broken]:
        try:
            self._above = read_rules_above(self._top)
        except OSError as error:
            yield Broken(decode_path(self._top), None, f"cannot read a .gitignore above it: {describe_os_error(error)}")
            return
        stack = [_Entry("", self._above)]
        while stack:
            entry = stack.pop()
            path = os.path.join(self._top, entry.name) if entry.name else self._top
            if not entry.name or (os.path.isdir(path) and not os.path.islink(path)):
                entries = self._list_entries(path, entry)
                if isinstance(entries, Broken):
                    yield entries
                else:
                    stack += reversed(entries)
                continue
            found = self._check_file(path, entry)
            if found is not None:
                yield found

    def _list_entries(self, path: str, folder: _Entry) -> list[_Entry] | Broken:
        """Return the entries of a folder that are not skipped because of their names."""
        try:
            rules = (*folder.rules, *read_rules(path, folder.name))
        except OSError as error:
            return Broken(decode_path(path), None, f"cannot read its .gitignore: {describe_os_error(error)}")
        try:
            names = sorted(os.listdir(path))
        except OSError as error:
            return Broken(decode_path(path), None, describe_os_error(error))
        entries = []
        for name in names:
            entry = _Entry(f"{folder.name}/{name}" if folder.name else name, rules)
            reason = self._find_reason(entry, os.path.join(path, name))
            if reason is None:
                entries.append(entry)
            elif reason:
                self._skipped[reason] += 1
        return entries

    def _find_reason(self, entry: _Entry, path: str) -> str | None:
        """Return why an entry is skipped: None if it is not, an empty string if the reason is not reported."""
        name = entry.name.rpartition("/")[2]
        is_folder = os.path.isdir(path) and not os.path.islink(path)
        if name in GENERATED and os.path.isdir(path):
            return name
        if name.startswith("."):
            return ""
        if is_ignored(entry.rules, entry.name, is_folder=is_folder):
            return IGNORED
        return self._selection.find_filter(entry.name, is_folder=is_folder or os.path.isdir(path))

    def _check_file(self, path: str, entry: _Entry) -> Found | Broken | None:
        if os.path.islink(path) and os.path.exists(path):
            try:
                reason = self._check_link(path)
            except OSError as error:
                return Broken(decode_path(path), None, f"cannot follow the link: {describe_os_error(error)}")
            if reason:
                self._skipped[reason] += 1
            if reason or os.path.isdir(path):  # a linked folder is read at its own place
                return None
        if os.path.isfile(path):
            return None if self._selection.is_left_out(path) else Found(path, entry.name, is_argument=False)
        is_dangling = os.path.islink(path) and not os.path.exists(path)
        return Broken(decode_path(path), None, "dangling link" if is_dangling else "not a regular file")

    def _check_link(self, path: str) -> str | None:
        """Return why a link is not followed. A link must not reveal a file that would not be read at its own place."""
        target = os.path.realpath(path)
        if target == self._real_top:
            return None
        if os.path.commonpath([target, self._real_top]) != self._real_top:
            return LEADS_OUT
        parts = os.path.relpath(target, self._real_top).split(os.sep)
        rules, folder = self._above, self._real_top
        for count, part in enumerate(parts, start=1):
            name = "/".join(parts[:count])
            rules = (*rules, *read_rules(folder, "/".join(parts[: count - 1])))
            folder = os.path.join(folder, part)
            reason = self._find_reason(_Entry(name, rules), folder)
            # Kubernetes mounts each file of a volume as a link into a folder whose name begins with two dots.
            is_volume = part.startswith("..") and reason == ""
            if reason is not None and not is_volume and reason != NOT_INCLUDED:
                return LEADS_TO_SKIPPED
        return None
