"""Kept values as columns of a Parquet file. The type of a column follows from its values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from embedonce.keys import NORMALIZERS

EXACT = 2**53
"""Every integer up to this one can be a float without becoming another number."""


class KeptColumns:
    """The kept columns of a Parquet file. A column starts without a type and gets a wider one when a value needs it.

    Values of different kinds, for example numbers and strings, become strings: strings as they are, and other values as
    JSON. ``arrow`` is the module ``pyarrow``.
    """

    def __init__(self, arrow: Any, names: Sequence[str]) -> None:
        self._arrow = arrow
        self._types: dict[str, Any] = {name: arrow.null() for name in names}
        self._large: set[str] = set()
        """Columns with integers that a float cannot represent."""

    @property
    def fields(self) -> list[tuple[str, Any]]:
        """Name and type of each column."""
        return list(self._types.items())

    def widen(self, rows: Sequence[Sequence[Any]]) -> bool:
        """Choose types that fit the earlier values and these rows. Return whether a type has changed."""
        before = dict(self._types)
        for number, name in enumerate(self._types):
            values = [row[number] for row in rows]
            kind = self._infer(values)
            if self._arrow.types.is_integer(kind) and any(abs(value or 0) > EXACT for value in values):
                self._large.add(name)
            self._types[name] = self._unify(self._types[name], kind, is_exact=name not in self._large)
        return self._types != before

    def make_arrays(self, rows: Sequence[Sequence[Any]]) -> list[Any]:
        """Return one array per column, with the types that :meth:`widen` has chosen."""
        return [self._convert([row[number] for row in rows], kind) for number, kind in enumerate(self._types.values())]

    def _convert(self, values: Sequence[Any], kind: Any) -> Any:
        if kind == self._arrow.string():
            values = [value if value is None else _make_string(value) for value in values]
        return self._arrow.array(values, type=kind)

    def _infer(self, values: Sequence[Any]) -> Any:
        """Return the type of the values: string if they have no type in common, or if Parquet cannot store it."""
        arrow = self._arrow
        try:
            kind = arrow.array(values).type
        except (arrow.ArrowException, OverflowError, TypeError, ValueError):
            return arrow.string()
        return arrow.string() if _has_empty_struct(arrow, kind) else kind

    def _unify(self, one: Any, other: Any, *, is_exact: bool) -> Any:
        """Return a type for the values of both types. ``is_exact`` means that a float can be every integer so far."""
        arrow = self._arrow
        is_scalar = not (arrow.types.is_nested(one) or arrow.types.is_nested(other))
        # An integer becomes a float only if it stays the same number.
        if "double" in str(one) + str(other) and one != other and not (is_scalar and is_exact):
            known = [kind for kind in (one, other) if not arrow.types.is_null(kind)]
            return known[0] if len(known) == 1 else arrow.string()
        schemas = [arrow.schema([("value", kind)]) for kind in (one, other)]
        try:
            return arrow.unify_schemas(schemas, promote_options="permissive").field(0).type
        except arrow.ArrowException:
            return arrow.string()


def _make_string(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return NORMALIZERS["surrogates"](text)


def _has_empty_struct(arrow: Any, kind: Any) -> bool:
    """Return whether a type contains a struct without fields, which Parquet cannot store."""
    if arrow.types.is_list(kind):
        return _has_empty_struct(arrow, kind.value_type)
    if not arrow.types.is_struct(kind):
        return False
    return not kind.num_fields or any(_has_empty_struct(arrow, kind.field(n).type) for n in range(kind.num_fields))
