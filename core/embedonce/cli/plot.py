"""Functions that all plots of the command line use. They require the extra ``plot``."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .output import Refused

SUFFIXES = (".pdf", ".png", ".svg")
COLOURS = ("#4c6a92", "#d98e3d")


def check_plot(file: Path) -> None:
    """Refuse a plot that cannot be drawn, before anything is computed.

    Raises:
        Refused: the suffix is not one of :data:`SUFFIXES`, the folder is missing, or matplotlib is not installed.
    """
    if file.suffix.lower() not in SUFFIXES:
        raise Refused(f"--plot {file}: the file name must end in one of {', '.join(SUFFIXES)}")
    if not file.absolute().parent.is_dir():
        raise Refused(f"--plot {file}: the folder {file.parent} does not exist")
    if importlib.util.find_spec("matplotlib") is None:
        raise Refused("--plot requires matplotlib: pip install 'embedonce[plot]'")


def make_figure(width: float, height: float) -> Any:
    """Return an empty figure. It does not use pyplot, whose windows and global state could disturb the caller."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def label_axes(axes: Any, names: Sequence[Any]) -> None:
    """Write a name below each bar, and remove the lines at the top and on the right."""
    axes.set_xticks(range(len(names)), names)
    axes.tick_params(length=0, labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
