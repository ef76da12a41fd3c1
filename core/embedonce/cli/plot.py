"""The plot of ``embedonce evaluate``: on the left, recall and nDCG of each dtype; on the right, the bytes per entry.

The plot requires the extra ``plot``.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import Refused

if TYPE_CHECKING:
    from .retrieval import Evaluation

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


def draw_plot(evaluation: Evaluation, file: Path) -> None:
    """Write the plot. Do not use pyplot, because the windows and global state of pyplot could disturb the caller."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    found, kept = figure.subplots(1, 2, width_ratios=[3, 2])
    names = [one.dtype for one in evaluation.dtypes]
    places = range(len(names))
    truth = "judgements" if evaluation.truth == "qrels" else "float32 as the truth"
    for number, (label, values) in enumerate(
        (
            (f"recall@{evaluation.k}", [100 * one.recall for one in evaluation.dtypes]),
            (f"nDCG@{evaluation.k}", [100 * one.ndcg for one in evaluation.dtypes]),
        )
    ):
        bars = found.bar([place + 0.38 * number - 0.19 for place in places], values, 0.36, color=COLOURS[number])
        bars.set_label(label)
        found.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    found.set_ylim(0, 118)
    found.set_ylabel("%")
    found.set_title(f"Found ({truth})", fontsize=10)
    found.legend(loc="upper center", ncols=2, fontsize=8, frameon=False)
    bars = kept.bar(places, [one.bytes for one in evaluation.dtypes], 0.6, color="#7a8f6a")
    kept.bar_label(bars, fmt="{:,.0f}", fontsize=8, padding=2)
    kept.set_title("Bytes per entry", fontsize=10)
    kept.margins(y=0.12)
    for axes in (found, kept):
        _label_axes(axes, names)
    figure.suptitle(
        f"{evaluation.model}, {evaluation.documents:,} documents, {evaluation.queries:,} queries", fontsize=10
    )
    figure.savefig(file, dpi=110)


def _label_axes(axes: Any, names: list[Any]) -> None:
    axes.set_xticks(range(len(names)), names)
    axes.tick_params(length=0, labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
