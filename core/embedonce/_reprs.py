"""The printed forms of values: a line in a console, a table in a notebook. No form shows a text or a vector."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from reprlib import Repr

from ._messages import quote_toml_key

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = 6


def shorten(value: object) -> str:
    """Return a value's repr on one line; long strings are cut in the middle, long collections at the end."""
    return " ".join(_SHORT.repr(value).split("\n"))


def format_counts(numbers: Mapping[str, int], between: str = " from ") -> str:
    """Return text such as ``990 from memory, 8 from provider``. Names with the number 0 are left out."""
    return ", ".join(f"{number:,}{between}{quote_toml_key(name)}" for name, number in numbers.items() if number)


def format_percent(share: float | None) -> str:
    """Return a share between 0 and 1 as ``93.1 %``, or ``none`` if the share is None."""
    return "none" if share is None else f"{share:.1%}".replace("%", " %")


def make_html_table(title: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return an HTML table; every cell is escaped, so that no name can add markup."""
    from html import escape  # only notebooks need it

    def line(cells: Sequence[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><caption>{escape(title)}</caption><thead>{line(head, 'th')}</thead><tbody>{body}</tbody></table>"
