"""The failures of a run: counted by file and reason, and described without quoting a text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from embedonce._messages import find_closest, format_count
from embedonce.errors import TextError

from .passages import Broken, format_place

if TYPE_CHECKING:
    from .passages import Passage

MAX_GROUPS = 1000
"""Maximum number of groups that are kept, so that the memory does not grow with the number of failures."""
MAX_SHOWN = 20
"""Maximum number of groups that are written to standard error."""
MAX_LINES = 5
"""Number of line numbers that are kept for each group: the first ones."""

_NUMBER = re.compile(r"\d+")


@dataclass(slots=True)
class FailureGroup:
    """The failures of one file that have the same reason."""

    file: str
    reason: str
    count: int = 0
    lines: list[int] = field(default_factory=list)
    """The first line numbers, from 1, in the order of the input. Empty if the whole file failed."""
    last_line: int | None = None
    fields: list[str] = field(default_factory=list)
    """Names of the fields that exist, if the field to read does not."""
    detail: str = ""
    """What the first failure says beside the reason."""
    suggestion: str | None = None
    """The existing field that resembles the missing one."""


class Failures:
    """Counts failures by file and reason. After :data:`MAX_GROUPS` groups, only the number of failures is counted."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, str], FailureGroup] = {}
        self.ungrouped = 0
        """Number of failures that belong to no group, because there were too many groups."""

    @property
    def groups(self) -> list[FailureGroup]:
        """The groups, in the order of their first failures."""
        return list(self._groups.values())

    def add_broken(self, item: Broken) -> None:
        group = self._count(item.source, item.line, item.reason, item.detail)
        if group is None or group.count > MAX_LINES or not item.fields:
            return
        # The records of a file may have different fields.
        group.fields = list(dict.fromkeys([*group.fields, *item.fields]))
        group.suggestion = _suggest_field(item.reason, group.fields)

    def add_failed(self, passage: Passage, error: Exception | None) -> None:
        self._count(passage.source, passage.line, describe_error(error, passage.text), "")

    def _count(self, source: str, line: int | None, reason: str, detail: str) -> FailureGroup | None:
        # Errors of one kind may differ in a position or a count. Such errors belong together.
        key = source, _NUMBER.sub("0", reason)
        group = self._groups.get(key)
        if group is None:
            if len(self._groups) == MAX_GROUPS:
                self.ungrouped += 1
                return None
            group = self._groups[key] = FailureGroup(source, reason, detail=detail)
        group.count += 1
        if line is not None:
            group.last_line = line
            if len(group.lines) < MAX_LINES:
                group.lines.append(line)
        return group

    def describe(self) -> Iterator[str]:
        """Yield at most :data:`MAX_SHOWN` + 1 lines, one per group."""
        groups = self.groups
        for group in groups[:MAX_SHOWN]:
            yield describe_group(group)
        hidden = sum(group.count for group in groups[MAX_SHOWN:]) + self.ungrouped
        if hidden:
            yield f"... and {format_count(hidden, 'more failure')}; --json lists up to {MAX_GROUPS:,} files and reasons"


def describe_group(group: FailureGroup) -> str:
    """Return one line: the place, the reason, the number of failures if there are several, and the fields that exist.

    >>> describe_group(FailureGroup("a.csv", 'no field "txt"', 9, [2, 3, 4, 5, 6], 10, ["id", "text"], "", "text"))
    'a.csv: no field "txt": 9 times, lines 2, 3, 4, 5, 6, ..., 10; the fields are: id, text; did you mean "text"?'
    """
    line = group.lines[0] if group.count == 1 and group.lines else None
    parts = [f"{format_place(group.file, line)}: {group.reason}{group.detail if group.count == 1 else ''}"]
    if group.count > 1:
        parts[0] += f": {group.count:,} times"
        parts[0] += f", lines {_format_lines(group)}" if group.lines else ""
    if group.fields:
        parts.append(f"the fields are: {', '.join(group.fields)}")
    if group.suggestion is not None:
        parts.append(f'did you mean "{group.suggestion}"?')
    return "; ".join(parts)


def _format_lines(group: FailureGroup) -> str:
    shown = ", ".join(map(str, group.lines))
    if group.count <= len(group.lines):
        return shown
    return f"{shown}, ..., {group.last_line}"


def _suggest_field(reason: str, fields: Sequence[str]) -> str | None:
    """Return the existing field whose name resembles the missing one, which the reason has in quotation marks."""
    _, quote, after = reason.partition('"')
    return find_closest(after.rpartition('"')[0], fields) if quote else None


def describe_error(error: Exception | None, text: str) -> str:
    """Return a description of an error, in one line and without the text.

    A vendor's message may quote the text. A message that contains the beginning of the text is left out.
    """
    if error is None:
        return "the provider returned no vector"
    name, message = type(error).__name__, " ".join(str(error).split())[:300]
    if isinstance(error, TextError):  # the position counts within a window; the reader of the message sees the line
        message = message.removeprefix(f"item {error.position}: ")
    beginning = " ".join(text.split())[:20]
    is_quoted = beginning and (beginning in message or ascii(beginning)[1:-1] in message)
    return name if is_quoted or not message else f"{name}: {message}"
