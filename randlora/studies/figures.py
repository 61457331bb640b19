"""Figures of results: the score against the number of trained parameters."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from randlora.errors import SettingsError
from randlora.records import Result
from randlora.studies.groups import Cell, by_settings, cell, finished, percent

# Okabe and Ito's colours, told apart by everyone; a method keeps its own in every figure.
COLOURS = {
    "full": "#000000", "lora": "#0072B2", "dora": "#56B4E9", "vera": "#009E73", "nola": "#E69F00",
    "randlora": "#D55E00", "randlora_a": "#CC79A7", "linearprobe": "#999999",
    # They are eight; these are of Paul Tol's muted scheme.
    "edora": "#332288", "mora": "#44AA99", "melora": "#999933", "loramini": "#882255", "lorta": "#AA4499",
    "sora": "#CC6677", "increlora": "#117733", "flatlora": "#DDCC77", "gelora": "#88CCEE",
}  # fmt: skip
OTHER_COLOUR = "#F0E442"  # of a method of one's own
ACROSS = 4  # panels in a row, so that a page's width shows them
# Text stays text in an SVG, and the same results make the same file.
SETTINGS: dict[Any, str] = {"svg.fonttype": "none", "svg.hashsalt": "randlora"}
NO_DATE: dict[str, dict[str, None]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


class Point(NamedTuple):
    method: str
    parameters: int
    mean: float  # per cent
    deviation: float  # 0 of a single seed


def panels(results: Sequence[Result]) -> dict[Cell, list[Point]]:
    """The points of each cell, by task and model and in the order of the budget's size."""
    points: dict[Cell, list[Point]] = {}
    for runs in by_settings(results):
        scores = [percent(run) for run in runs]
        deviation = statistics.stdev(scores) if len(scores) > 1 else 0.0
        point = Point(runs[0].method, runs[0].trainable_parameters or 0, statistics.mean(scores), deviation)
        points.setdefault(cell(runs[0]), []).append(point)
    return dict(sorted(points.items(), key=lambda panel: (panel[0].task, panel[0].order)))


def draw(results: Sequence[Result], *paths: Path) -> None:
    """Writes the figure to every one of the paths; the ending decides the format.

    A panel per task, model and budget, four in a row; a point per method, its mean over seeds and sample deviation;
    the dashed line is the score before training.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SettingsError("figures need the package matplotlib: pip install 'randlora[figures]'") from error
    results = finished(results)
    shown, example = panels(results), {cell(result): result for result in results}
    columns, rows = min(ACROSS, len(shown)), -(-len(shown) // ACROSS)
    figure = Figure(figsize=(max(5.0, 3.1 * columns), 3.0 * rows + 0.2), layout="constrained")
    axes = list(chain(*figure.subplots(rows, columns, squeeze=False)))
    for axis in axes[len(shown) :]:
        axis.remove()
    for axis, (panel, points) in zip(axes, shown.items(), strict=False):
        for point in points:
            axis.errorbar(
                point.parameters, point.mean, point.deviation, fmt="o", capsize=3, label=point.method,
                color=COLOURS.get(point.method, OTHER_COLOUR),
            )  # fmt: skip
        if (before := example[panel].before) is not None:
            axis.axhline(100 * before, linestyle="--", color="#999999", linewidth=1)
        used = f"{panel.data} shot{'s' * (panel.shots != 1)}" if panel.shots else f"{panel.data} of the data"
        counts = [point.parameters for point in points]
        axis.set(
            title=f"{panel.task}, {panel.model}\n{used}", xlabel="trained parameters",
            ylabel=f"{example[panel].metric}, %", xscale="log",
            xlim=(min(counts) / 4, 4 * max(counts)),  # a power of ten at least, so that one is labelled
        )  # fmt: skip
        axis.xaxis.set_minor_formatter("")
        axis.grid(alpha=0.3)
    handles = {label: h for axis in figure.axes for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False)
    for path in paths:
        try:
            with rc_context(SETTINGS):
                figure.savefig(path, metadata=NO_DATE.get(path.suffix))
                figure.set_layout_engine("none")  # the first file's is kept: to find it is most of the work
        except (OSError, ValueError) as error:  # no such folder; a format that matplotlib does not have
            raise SettingsError(f"{path} cannot be written: {str(error).splitlines()[0]}") from error
