"""The plot of ``embedonce evaluate``: on the left, recall and nDCG of each dtype; on the right, the bytes per entry."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .plot import COLOURS, label_axes, make_figure

if TYPE_CHECKING:
    from .retrieval import Evaluation


def draw_evaluation(evaluation: Evaluation, file: Path) -> None:
    """Write the plot."""
    figure = make_figure(8, 3.2)
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
        label_axes(axes, names)
    figure.suptitle(
        f"{evaluation.model}, {evaluation.documents:,} documents, {evaluation.queries:,} queries", fontsize=10
    )
    figure.savefig(file, dpi=110)
