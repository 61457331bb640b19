"""The figures of the analyses of runs, each from the rows that its analysis gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from randlora.errors import SettingsError
from randlora.studies.equal_scores import numbers
from randlora.studies.figures import COLOURS, MARKERS, OTHER_COLOUR, blank, save
from randlora.use.landscape import CLAMP
from randlora.use.sample import BASE

Rows = Sequence[Mapping[str, Any]]


def draw(rows: Rows, *paths: Path) -> None:
    """Writes the figure of an analysis to every one of the paths; the ending decides the format.

    Args:
        rows: Of `cka_of_runs`, `landscape`, `approximate` or `forgetting`, or means of `spectra`, of one model or of
            several.
        paths: Such as ``figure.svg``, ``.png`` or ``.pdf``.

    Raises:
        SettingsError: The rows are none of these, matplotlib is missing, or a file cannot be written.
    """
    drawing = next((DRAWINGS[column] for column in DRAWINGS if rows and column in rows[0]), None)
    if drawing is None:
        raise SettingsError(
            "these rows have no figure: give those of cka, landscape, approximate, forgetting or spectra"
        )
    drawing(rows, paths)


def _draw_cka(rows: Rows, paths: Sequence[Path]) -> None:
    """A panel for each model: CKA with the first run's features, by layer; the base dashed."""
    panels = _by(rows, "model", "task")
    figure = blank(5.2 * len(panels), 3.4)
    for axis, ((model, task), part) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for (run,), line in _by(part, "run").items():
            style = {"linestyle": "--"} if run == BASE else {"marker": "."}
            axis.plot([row["cka"] for row in line], color=_colour(run), label=run, **style)
        against = part[0]["against"]
        axis.set(
            title=f"{model}, {task}", xlabel="layer, from the input on", ylabel=f"CKA with {against}", ylim=(None, 1.01)
        )
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    save(figure, *paths)


def _draw_landscape(rows: Rows, paths: Sequence[Path]) -> None:
    """For each model the plane from above and as a surface, losses clamped, and the lines."""
    panels = _by(rows, "model", "task")
    figure = blank(12.5, 3.8 * len(panels))
    for number, ((model, task), part) in enumerate(panels.items()):
        kinds = {kind: group for (kind,), group in _by(part, "part").items()}
        title = f"{model}, {task}"
        if "plane" in kinds:
            _plane(figure, (len(panels), 3, 3 * number), kinds, title)
        axis = figure.add_subplot(len(panels), 3, 3 * number + 3)
        for (start, end), line in _by(kinds["line"], "run", "to").items():
            axis.plot([row["t"] for row in line], [row["loss"] for row in line], marker=".", label=f"{start} to {end}")
        axis.set(title=title, xlabel="share of the way", ylabel="loss")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    save(figure, *paths)


def _plane(figure: Any, place: tuple[int, int, int], kinds: Mapping[str, Rows], title: str) -> None:
    models, plane = kinds["model"], kinds["plane"]
    most = CLAMP * max(row["loss"] for row in models)
    xs, ys = (sorted({row[side] for row in plane}) for side in ("x", "y"))
    losses = np.minimum([row["loss"] for row in plane], most).reshape(len(ys), len(xs))
    rows, columns, first = place
    axis = figure.add_subplot(rows, columns, first + 1)
    filled = axis.contourf(xs, ys, losses, levels=20, cmap="viridis")
    figure.colorbar(filled, ax=axis, label=f"loss, at most {most:.2f}")
    for row in models:
        axis.plot(row["x"], row["y"], "o", color="white", markeredgecolor="black")
        axis.annotate(row["run"], (row["x"], row["y"]), xytext=(4, 5), textcoords="offset points", color="white")
    axis.set(title=title, xlabel="distance", ylabel="distance", aspect="equal")
    solid = figure.add_subplot(rows, columns, first + 2, projection="3d")
    solid.plot_surface(*np.meshgrid(xs, ys), losses, cmap="viridis", linewidth=0, antialiased=False)
    for row in models:
        solid.scatter([row["x"]], [row["y"]], [row["loss"]], color="black")
        solid.text(row["x"], row["y"], row["loss"], f" {row['run']}")
    solid.set(title=title, zlabel="loss")


def _draw_errors(rows: Rows, paths: Sequence[Path]) -> None:
    """A panel for each model and kind of matrix: the mean error over sites against the trained parameters of a site."""
    panels = _by(rows, "model", "of")
    figure = blank(4.6 * len(panels), 3.6)
    for axis, ((model, of), part) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for number, ((method,), own) in enumerate(_by(part, "method").items()):
            budgets = _by(own, "budget").values()
            axis.plot(
                [np.mean([row["parameters"] for row in group]) for group in budgets],
                [np.mean([row["error"] for row in group]) for group in budgets],
                marker=MARKERS[number % len(MARKERS)], color=_colour(method), label=method,
            )  # fmt: skip
        axis.set(
            title=f"{model}, {of}",
            xlabel="trained parameters of a site",
            ylabel="error, ‖ΔW − fit‖ / ‖ΔW‖",
            xscale="log",
        )
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    save(figure, *paths)


def _draw_at_scores(rows: Rows, paths: Sequence[Path]) -> None:
    """A panel for each model and thing scored: the change at each validation score, a mean over seeds with deviation.

    A method has its colour, and its arms, by the numbers in their settings, markers that are the same for all methods.
    """
    panels = _by([row for row in rows if row.get("at_score") is not None], "model", "on", "metric")
    figure = blank(7.2 * len(panels), 4.4)
    for axis, ((model, on, metric), part) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        scores = sorted({row["at_score"] for row in part})
        arms = sorted(_by(part, "method", "arm").items(), key=lambda item: (item[0][0], numbers(item[0][1])))
        siblings: Counter[str] = Counter()
        for number, ((method, arm), own) in enumerate(arms):
            changes = [[r["change"] for r in own if r["at_score"] == s and r["change"] is not None] for s in scores]
            known = [place for place, values in enumerate(changes) if values]
            axis.errorbar(
                [place + (number / len(arms) - 0.5) * 0.8 for place in known],
                [np.mean(changes[place]) for place in known],
                [np.std(changes[place], ddof=1) if len(changes[place]) > 1 else 0.0 for place in known],
                fmt=MARKERS[siblings[method] % len(MARKERS)], color=_colour(method), label=arm, capsize=2,
            )  # fmt: skip
            siblings[method] += 1
        axis.axhline(0, linestyle="--", color="#999999", linewidth=1)
        axis.set_xticks(range(len(scores)), [f"{score:g}" for score in scores])
        axis.set(
            title=f"{model} on {on}",
            xlabel=f"first validation {part[0].get('by') or 'score'} of",
            ylabel=f"change of {metric}",
        )
        axis.grid(alpha=0.3, axis="y")
        axis.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, *paths)


def _draw_forgetting(rows: Rows, paths: Sequence[Path]) -> None:
    """A panel for each model and thing scored: the change against the size of the update."""
    panels = _by(rows, "model", "on", "metric")
    figure = blank(4.6 * len(panels), 3.6)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, ((model, on, metric), part) in zip(axes, panels.items(), strict=True):
        for row in part:
            axis.plot(row["relative_norm"], row["change"], "o", color=_colour(row["run"]))
            axis.annotate(row["run"], (row["relative_norm"], row["change"]), xytext=(4, 4), textcoords="offset points")
        axis.axhline(0, linestyle="--", color="#999999", linewidth=1)
        axis.margins(0.2)
        axis.set(title=f"{model} on {on}", xlabel="mean ‖ΔW‖ / ‖W0‖", ylabel=f"change of {metric}")
        axis.grid(alpha=0.3)
    save(figure, *paths)


def _draw_spectra(rows: Rows, paths: Sequence[Path]) -> None:
    """A panel for each model: singular values as parts of the largest, means over sites, a line for each run."""
    panels = _by(rows, "model")
    figure = blank(4.6 * len(panels), 3.6)
    for axis, ((model,), part) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for row in part:
            shares = np.linspace(0, 100, len(row["values"]))
            axis.plot(shares, row["values"], marker=".", color=_colour(row["run"]), label=row["run"])
        axis.set(title=model, xlabel="singular directions, %", ylabel="σ / σ₁", yscale="log", ylim=(1e-4, 1.5))
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    save(figure, *paths)


DRAWINGS = {  # by a column that only its rows have, or that comes first
    "cka": _draw_cka,
    "part": _draw_landscape,
    "error": _draw_errors,
    "at_score": _draw_at_scores,
    "change": _draw_forgetting,
    "values": _draw_spectra,
}


def _by(rows: Iterable[Mapping[str, Any]], *columns: str) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    """The rows by their values in the columns, in the order of the first of each."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return groups


def _colour(run: str) -> str:
    """A method's own; of a run, its method's."""
    return "#999999" if run == BASE else COLOURS.get(run.partition(" ")[0], OTHER_COLOUR)
