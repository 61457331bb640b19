"""Figures of results: the score against the number of trained parameters, and against the learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from randlora.errors import SettingsError
from randlora.records import Result
from randlora.studies.arms import Arm, arms, baselines
from randlora.studies.groups import Cell, cell, finished
from randlora.studies.rates import Tried

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by everyone; a method keeps its own in every figure.
COLOURS = {
    "full": "#000000", "lora": "#0072B2", "dora": "#56B4E9", "vera": "#009E73", "nola": "#E69F00",
    "randlora": "#D55E00", "randlora_a": "#CC79A7", "linearprobe": "#999999",
    # They are eight; these are of Paul Tol's muted scheme.
    "edora": "#332288", "mora": "#44AA99", "melora": "#999933", "loramini": "#882255", "lorta": "#AA4499",
    "sora": "#CC6677", "increlora": "#117733", "flatlora": "#DDCC77", "gelora": "#88CCEE",
    "pixels": "#AA3377", "words": "#6B3FA0", "majority": "#BBBBBB", "features": "#666666",  # without fine-tuning
    "centroid": "#A08060",
}  # fmt: skip
OTHER_COLOUR = "#F0E442"  # of a method of one's own
MARKERS = ("o", "s", "D", "^", "v", "P", ">", "<")  # begun at another place by each method
ACROSS = 4  # panels in a row, so that a page's width shows them
# Text stays text in an SVG, and the same results make the same file.
SETTINGS: dict[Any, str] = {"svg.fonttype": "none", "svg.hashsalt": "randlora"}
NO_DATE: dict[str, dict[str, None]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


class Point(NamedTuple):
    """An arm in a panel: its method, its label, its trained parameters, and its score, per cent, over seeds."""

    method: str
    label: str
    parameters: int
    mean: float
    deviation: float  # 0 of a single seed
    seeds: int


def panels(of_arms: Sequence[Arm]) -> dict[Cell, list[Point]]:
    """The points of each cell, by task and model and in the order of the budget's size."""
    points: dict[Cell, list[Point]] = {}
    for arm in of_arms:
        parameters = arm.runs[0].trainable_parameters or 0
        point = Point(arm.method, arm.label, parameters, arm.mean, arm.deviation or 0.0, len(arm.runs))
        points.setdefault(arm.where, []).append(point)
    return dict(sorted(points.items(), key=lambda panel: (panel[0].task, panel[0].order)))


def looks(methods: Mapping[str, str]) -> dict[str, tuple[str, int]]:
    """The colour of each arm, its method's, and the number of its marker, which differs between a method's arms.

    Args:
        methods: By label of an arm, its method.
    """
    names = list(COLOURS)
    marks = {}
    for label, method in methods.items():
        siblings = sorted(other for other in methods if methods[other] == method)
        first = names.index(method) if method in COLOURS else len(names)
        marks[label] = COLOURS.get(method, OTHER_COLOUR), (first + siblings.index(label)) % len(MARKERS)
    return marks


def draw(results: Sequence[Result], *paths: Path) -> None:
    """Writes the figure to every one of the paths; the ending decides the format.

    A panel per task, model and budget, four in a row, those of a task and model in one scale; a point per method, its
    mean over n seeds and sample deviation. Dashed lines are scores to surpass: a thin grey one before training, thick
    ones in colour without a pretrained model and of a linear probe (see `randlora.studies.arms.baselines`).
    """
    results = finished(results)
    of_arms = arms(results)
    updated = {arm.where for arm in of_arms if not arm.is_baseline}
    beside = {where: baselines(where, of_arms) for where in updated}
    levels = {id(arm) for of_cell in beside.values() for arm in of_cell}
    shown = panels([arm for arm in of_arms if id(arm) not in levels])
    example = {cell(result): result for result in results}
    columns = min(ACROSS, len(shown))
    figure, axes = _panels(len(shown))
    marks = looks({arm.label: arm.method for arm in of_arms})
    alike: dict[tuple[str, str], list[Axes]] = {}
    for axis, (panel, points) in zip(axes, shown.items(), strict=False):
        alike.setdefault((panel.task, panel.model), []).append(axis)
        for point in points:
            colour, mark = marks[point.label]
            axis.errorbar(
                max(point.parameters, 1), point.mean, point.deviation, fmt=MARKERS[mark], capsize=3, label=point.label,
                color=colour,
            )  # fmt: skip
        if (before := example[panel].before) is not None:
            axis.axhline(100 * before, linestyle="--", color="#999999", linewidth=1)
        for arm in beside.get(panel, ()):
            axis.axhline(arm.mean, linestyle="--", color=marks[arm.label][0], linewidth=1.5, label=arm.label)
        counts, seeds = ([max(point[field], 1) for point in points] for field in (2, 5))
        n = " to ".join(map(str, dict.fromkeys((min(seeds), max(seeds)))))
        axis.set(
            title=f"{panel.task}, {panel.model}\n{panel.budget}, n = {n}", xlabel="trained parameters",
            ylabel=f"{example[panel].metric}, %", xscale="log",
            xlim=(min(counts) / 4, 4 * max(counts)),  # a power of ten at least, so that one is labelled
        )  # fmt: skip
        axis.xaxis.set_minor_formatter("")
        axis.grid(alpha=0.3)
    for group in alike.values():
        x, y = (
            [*chain(*limits)] for limits in zip(*((axis.get_xlim(), axis.get_ylim()) for axis in group), strict=True)
        )
        for axis in group:
            axis.set(xlim=(min(x), max(x)), ylim=(min(y), max(y)))
    _finish(figure, columns, paths)


def draw_rates(points: Mapping[str, Sequence[Tried]], *paths: Path) -> None:
    """Writes a figure of what was tried, validation score against learning rate, to every one of the paths.

    A panel per method, four in a row; a line through the best at each rate, faint where a search has compared its
    trials before their end; a ring is round the chosen point, dashed where it is at an end of the rates.

    Args:
        points: By the panel's title.
        paths: The ending decides the format.
    """
    figure, axes = _panels(len(points))
    for axis, (title, of_panel) in zip(axes, points.items(), strict=False):
        last = max(point.steps or 0 for point in of_panel)
        for steps in sorted({(point.steps or last) for point in of_panel}):
            there = [point for point in of_panel if (point.steps or last) == steps]
            best = {point.rate: max(p.validation for p in there if p.rate == point.rate) for point in there}
            faint = 1.0 if any(point.whole for point in there) else 0.2 + 0.4 * steps / last
            axis.plot([*best], [*best.values()], color="#0072B2", alpha=faint, label=f"after {steps} steps")
            axis.plot(
                [point.rate for point in there],
                [point.validation for point in there],
                ".",
                color="#0072B2",
                alpha=faint,
            )
        for point in of_panel:
            if point.chosen:
                style = (0, (2, 1)) if point.edge else "-"
                axis.scatter(point.rate, point.validation, 160, "none", edgecolor="#D55E00", linestyle=style, zorder=3)
        run = of_panel[0].runs[0]
        seeds = max(len(point.runs) for point in of_panel)
        axis.set(
            title=f"{title}, n = {seeds}", xlabel="learning rate", xscale="log", ylabel=f"validation {run.metric}, %"
        )
        rates = [point.rate for point in of_panel]
        axis.set_xlim(min(rates) / 2, 2 * max(rates))  # about a power of ten at least, so that one is labelled
        axis.xaxis.set_minor_formatter("")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize="small")
    save(figure, *paths)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, four in a row."""
    columns, rows = min(ACROSS, count), -(-count // ACROSS)
    figure = blank(max(5.0, 3.1 * columns), 3.0 * rows + 0.2)
    axes = list(chain(*figure.subplots(rows, columns, squeeze=False)))
    for axis in axes[count:]:
        axis.remove()
    return figure, axes


def _finish(figure: Figure, columns: int, paths: Sequence[Path]) -> None:
    """Writes it with one legend for all panels."""
    handles = {label: h for axis in figure.axes for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=min(len(handles), 2 * columns + 3), frameon=False
    )
    save(figure, *paths)


def blank(width: float, height: float) -> Figure:
    """An empty figure, in inches; SettingsError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SettingsError("figures need the package matplotlib: pip install 'randlora[figures]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, *paths: Path) -> None:
    """Writes a figure to every one of the paths; SettingsError for a file that cannot be written."""
    from matplotlib import rc_context

    for path in paths:
        try:
            with rc_context(SETTINGS):
                figure.savefig(path, metadata=NO_DATE.get(path.suffix))
                figure.set_layout_engine("none")  # the first file's is kept: to find it is most of the work
        except (OSError, ValueError) as error:  # no such folder; a format that matplotlib does not have
            raise SettingsError(f"{path} cannot be written: {str(error).splitlines()[0]}") from error
