"""Find the line and column of each key and value in a TOML text.

The standard library's parser does not report lines and columns. This code runs only to show where an error is or
where a value comes from.
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

TomlPath: TypeAlias = tuple[str | int, ...]
"""Keys and list indexes from the top of a document: ``("tiers", 0, "ttl")``."""


MAX_KEY_PARTS = 50
"""In a dotted key, only this many names get a place. No valid configuration has a dotted key with more names."""


class Place(NamedTuple):
    """Line and column where a key or value begins. Both are counted from 1; the column is counted in characters."""

    line: int
    column: int


@dataclass(slots=True)
class Places:
    """The places of a document's keys and values, by path."""

    keys: dict[TomlPath, Place] = field(default_factory=dict)
    values: dict[TomlPath, Place] = field(default_factory=dict)

    def key(self, path: TomlPath) -> Place | None:
        """Return the place of the key, or of the nearest enclosing table that has a place."""
        return self._nearest(path, self.keys, self.values)

    def value(self, path: TomlPath) -> Place | None:
        """Return the place of the value, or of its key, or of the nearest enclosing table that has a place."""
        return self._nearest(path, self.values, self.keys)

    def _nearest(self, path: TomlPath, first: dict[TomlPath, Place], second: dict[TomlPath, Place]) -> Place | None:
        for length in range(len(path), 0, -1):
            found = first.get(path[:length]) or second.get(path[:length])
            if found is not None:
                return found
        return None


def find_places(text: str) -> Places:
    """Return the places of keys and values in a text. The standard library's parser must have accepted the text."""
    import tree_sitter
    import tree_sitter_toml

    source = text.encode()
    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_toml.language()))
    return _Walk(source).document(parser.parse(source).root_node)


class _Walk:
    """Walks a syntax tree once and records the place of each key and value."""

    def __init__(self, source: bytes) -> None:
        self._lines = source.split(b"\n")
        self._places = Places()
        self._elements: Counter[TomlPath] = Counter()
        """Number of elements seen so far in each array of tables."""

    def document(self, root: Any) -> Places:
        for node in root.named_children:
            if node.type == "pair":
                self._pair(node, ())
            elif node.type in ("table", "table_array_element"):
                self._table(node, array=node.type == "table_array_element")
        return self._places

    def _table(self, node: Any, *, array: bool) -> None:
        header, *rest = node.named_children
        names = [name for name, _ in _list_key_parts(header)]
        place = self._place(node)
        path: TomlPath = ()
        for name in names[:-1]:
            self._places.keys.setdefault((*path, name), place)
            path = self._element((*path, name))
        path = (*path, names[-1])
        if array:
            self._elements[path] += 1
            self._places.keys.setdefault(path, place)
        path = self._element(path)
        self._places.keys.setdefault(path, place)
        for child in rest:
            if child.type == "pair":
                self._pair(child, path)

    def _element(self, path: TomlPath) -> TomlPath:
        """Return the path of the last element if ``path`` is an array of tables, else ``path``."""
        return (*path, self._elements[path] - 1) if path in self._elements else path

    def _pair(self, node: Any, path: TomlPath) -> None:
        key, *rest = [child for child in node.named_children if child.type != "comment"]
        for name, part in _list_key_parts(key):
            path = (*path, name)
            self._places.keys.setdefault(path, self._place(part))
        if rest:
            self._value(rest[0], path)

    def _value(self, node: Any, path: TomlPath) -> None:
        self._places.values.setdefault(path, self._place(node))
        children = [child for child in node.named_children if child.type not in ("comment", "ERROR")]
        if node.type == "inline_table":
            for child in children:
                self._pair(child, path)
        elif node.type == "array":
            for index, child in enumerate(children):
                self._value(child, (*path, index))

    def _place(self, node: Any) -> Place:
        row, column = node.start_point
        return Place(row + 1, len(self._lines[row][:column].decode(errors="replace")) + 1)


def _list_key_parts(node: Any) -> Iterator[tuple[str, Any]]:
    """Yield each name of a dotted key, without its quotes, and the node of the name."""
    parts = []
    while node.type == "dotted_key":  # the first child of a dotted_key holds all names except the last
        node, *last = node.named_children
        parts += last[::-1]
    parts.append(node)
    for part in islice(reversed(parts), MAX_KEY_PARTS):
        yield next(iter(tomllib.loads(part.text.decode() + "=0"))), part


# --- syntax errors ----------------------------------------------------------------------------

_POSITION = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")


_TUPLE = re.compile(r"\('[^()]*',?\)")
"""A dotted key in the messages of Python's parser: ``('a', 'b')``."""


def read_syntax_error(error: ValueError, text: str) -> tuple[str, Place | None]:
    """Return the message and the place of an error that the standard library's parser raised for ``text``."""
    full = str(error)
    found = _POSITION.search(full)
    if found is None:
        return full, None
    message = _TUPLE.sub(lambda names: ".".join(re.findall(r"'([^']*)'", names[0])), full[: found.start()])
    lines = text.split("\n")
    place = Place(int(found[1]), int(found[2])) if found[1] else Place(len(lines), len(lines[-1]) + 1)
    if message.startswith("Cannot "):  # a repeated key: the parser reports the end of the value, so find the key
        line = lines[place.line - 1]
        place = Place(place.line, len(line) - len(line.lstrip()) + 1)
    return message[:1].lower() + message[1:], place
