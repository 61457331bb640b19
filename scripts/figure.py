"""A figure of the records under a folder: the score against the number of trained parameters.

python scripts/figure.py experiments/image_protocol/records --out accuracy.svg

One panel per task, model and budget, four in a row; a point per method, its mean over seeds and sample deviation; the
dashed line is the score before training.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from table import Run, by_settings, data_used, finished, read

from randlora.errors import SettingsError, exit_code

# Okabe and Ito's colours, told apart by everyone; a method keeps its own in every figure.
COLOURS = {
    "full": "#000000", "lora": "#0072B2", "dora": "#56B4E9", "vera": "#009E73", "nola": "#E69F00",
    "randlora": "#D55E00", "randlora_a": "#CC79A7", "linearprobe": "#999999",
}  # fmt: skip
ACROSS = 4  # panels in a row, so that a page's width shows them
# Text stays text in an SVG, and the same records make the same file.
SETTINGS: dict[Any, str] = {"svg.fonttype": "none", "svg.hashsalt": "randlora"}


class Point(NamedTuple):
    method: str
    parameters: int
    mean: float  # per cent
    deviation: float  # 0 of a single seed


def panels(runs: Sequence[Run]) -> dict[tuple[str, str, str], list[Point]]:
    """The points by (task, model, budget), in the order of the budget's size."""
    found: dict[tuple, list[Point]] = {}
    for members in by_settings(runs):
        task, model, method = members[0].cell
        scores = [100 * run.result["headline"]["value"] for run in members]
        deviation = statistics.stdev(scores) if len(scores) > 1 else 0.0
        point = Point(method, members[0].result["trainable_parameters"], statistics.mean(scores), deviation)
        found.setdefault((task, model, *members[0].budget), []).append(point)
    ranked = sorted(found.items(), key=lambda item: (*item[0][:2], item[0][2] or 10**9, item[0][3] or 1.0))
    return {(task, model, data_used(*size)): points for (task, model, *size), points in ranked}


def panel_of(run: Run) -> tuple[str, str, str]:
    """task, model, budget"""
    return (*run.cell[:2], data_used(*run.budget))


def draw(runs: Sequence[Run], path: Path) -> None:
    """Writes the figure; the ending decides the format."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SettingsError("figures need the package matplotlib: pip install 'randlora[figures]'") from error
    runs = finished(runs)
    found, example = panels(runs), {panel_of(run): run for run in runs}
    columns, rows = min(ACROSS, len(found)), -(-len(found) // ACROSS)
    figure = Figure(figsize=(max(5.0, 3.1 * columns), 3.0 * rows + 0.2), layout="constrained")
    axes = list(chain(*figure.subplots(rows, columns, squeeze=False)))
    for axis in axes[len(found) :]:
        axis.remove()
    for axis, (panel, points) in zip(axes, found.items(), strict=False):
        for point in points:
            axis.errorbar(
                point.parameters, point.mean, point.deviation, fmt="o", capsize=3, label=point.method,
                color=COLOURS.get(point.method, "#F0E442"),
            )  # fmt: skip
        if (before := example[panel].before) is not None:
            axis.axhline(100 * before, linestyle="--", color="#999999", linewidth=1)
        task, model, size = panel
        used = f"{size} shot{'s' * (size != '1')}" if size.isdigit() else f"{size} of the data"
        counts = [point.parameters for point in points]
        axis.set(
            title=f"{task}, {model}\n{used}", xlabel="trained parameters", ylabel=f"{example[panel].metric}, %",
            xscale="log", xlim=(min(counts) / 4, 4 * max(counts)),  # a power of ten at least, so that one is labelled
        )  # fmt: skip
        axis.xaxis.set_minor_formatter("")
        axis.grid(alpha=0.3)
    handles = {label: h for axis in figure.axes for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False)
    with rc_context(SETTINGS):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="such as figure.svg or figure.png")
    arguments = parser.parse_args()
    draw(read(arguments.root), arguments.out)


if __name__ == "__main__":
    sys.exit(exit_code(main))
