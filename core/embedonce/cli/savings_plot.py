"""The plot of ``embedonce savings``: one bar per group, with the texts that were computed and those that were saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .output import escape_controls
from .plot import COLOURS, label_axes, make_figure

if TYPE_CHECKING:
    from embedonce.savings import Savings

MOST_BARS = 60
"""Maximum number of bars. If there are more days, the plot shows the last ones. If there are more groups of another
kind, it shows the largest ones."""


def draw_savings(groups: Mapping[str, Savings], by: str, file: Path) -> None:
    """Write the plot."""
    items = list(groups.items())
    items = items[-MOST_BARS:] if by == "day" else items[:MOST_BARS]
    figure = make_figure(max(6.0, 1.5 + 0.35 * len(items)), 3.8)
    axes = figure.subplots()
    places = range(len(items))
    computed = [sums.computed.texts for _, sums in items]
    saved = [sums.saved.texts for _, sums in items]
    axes.bar(places, computed, 0.7, color=COLOURS[1], label="computed")
    axes.bar(places, saved, 0.7, bottom=computed, color=COLOURS[0], label="saved")
    axes.set_ylabel("texts")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.margins(y=0.15)
    axes.legend(loc="upper center", ncols=2, fontsize=8, frameon=False)
    names = [_shorten(name) for name, _ in items]
    label_axes(axes, names)
    if len(items) > 6 or max(map(len, names)) > 12:
        axes.tick_params(axis="x", labelrotation=60)
    axes.set_title(f"Texts by {by}", fontsize=10)
    figure.savefig(file, dpi=110)


def _shorten(name: str) -> str:
    # matplotlib would read dollar signs as formulas.
    shown = escape_controls(name or "(none)").replace("$", r"\$")
    return shown if len(shown) <= 30 else f"{shown[:14]}…{shown[-14:]}"
