"""Is a score limited by the number of trained parameters, or by the rank of the update? Arms that differ in the two.

Arms of a like count whose ranks differ are a line, and so are arms of a like rank whose counts differ; the slope of a
line, the score's gain per doubling of what differs, is found seed by seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from randlora.errors import SettingsError
from randlora.records import Result
from randlora.studies.figures import COLOURS, MARKERS, blank, save
from randlora.studies.groups import by_settings, percent
from randlora.studies.statistics import Difference, holm, sign_flip_p, student_difference

ALIKE = 1.1  # counts and ranks of a line are within this factor


class Place(NamedTuple):
    """Runs of one setting that differ in their seed alone.

    Args:
        runs: Finished ones.
        parameters: Trained ones, of all sites.
        rank: Of the updates, a mean over sites and runs.
        stable_rank: The same.
        scores: Per cent, by seed.
    """

    runs: Sequence[Result]
    parameters: int
    rank: float
    stable_rank: float
    scores: Mapping[int, float]

    @property
    def mean(self) -> float:
        return float(np.mean([*self.scores.values()]))

    @property
    def deviation(self) -> float:
        """Sample deviation over seeds; 0 of a single one."""
        return float(np.std([*self.scores.values()], ddof=1)) if len(self.scores) > 1 else 0.0


class Line(NamedTuple):
    """Three arms or more that have one thing alike.

    Args:
        alike: What they have alike.
        value: Its geometric mean.
        places: By what differs, from the least on.
        slope: The score's gain, in points, per doubling of what differs: a mean over seeds, with Student's interval.
        holm: The p of `sign_flip_p`, corrected for the number of lines.
    """

    alike: Literal["parameters", "rank"]
    value: float
    places: Sequence[Place]
    slope: Difference
    holm: float


def places(results: Sequence[Result], spectra: Sequence[Mapping[str, Any]]) -> list[Place]:
    """The arms of finished runs, from the fewest parameters and the least rank on.

    Args:
        results: Of one model and one task.
        spectra: What ``randlora spectra RUNS --into FILE.jsonl`` has written of these runs.

    Raises:
        SettingsError: A run has no row in `spectra`, or has trained nothing.
    """
    of_run = {row["run"].rpartition(" ")[2]: row for row in spectra}
    found = []
    for runs in by_settings(results):
        if missing := [run.signature for run in runs if run.signature not in of_run]:
            raise SettingsError(f"the run {missing[0]} has no row in the spectra: give randlora spectra all runs")
        rows = [of_run[run.signature] for run in runs]
        rank, stable = (float(np.mean([row[name] for row in rows])) for name in ("rank", "stable_rank"))
        if not rank or not runs[0].trainable_parameters:
            raise SettingsError(
                f"the run {runs[0].signature} has no trained update, and so no rank: leave it out by --only"
            )
        scores = {run.seed: percent(run) for run in runs}
        found.append(Place(runs, runs[0].trainable_parameters, rank, stable, scores))
    return sorted(found, key=lambda place: (place.parameters, place.rank))


def lines(of_places: Sequence[Place]) -> list[Line]:
    """All lines of three arms or more that have two seeds in common: those of like counts, then those of like ranks."""
    kept: list[tuple[Literal["parameters", "rank"], float, list[Place], list[float]]] = []
    for alike, other in ((_parameters, _rank), (_rank, _parameters)):
        for group in _groups(of_places, alike):
            ordered = sorted(group, key=other)
            seeds = sorted(set.intersection(*(set(place.scores) for place in ordered)))
            if len(ordered) < 3 or len(seeds) < 2:
                continue
            doublings = np.log2([other(place) for place in ordered])
            scores = np.array([[place.scores[seed] for seed in seeds] for place in ordered])
            value = float(np.exp(np.mean(np.log([alike(place) for place in ordered]))))
            slopes = np.polyfit(doublings, scores, 1)[0].tolist()
            kept.append(("parameters" if alike is _parameters else "rank", value, ordered, slopes))
    corrected = holm([sign_flip_p(slopes) for *_, slopes in kept])
    return [
        Line(alike, value, ordered, student_difference(slopes, [0.0] * len(slopes)), p)
        for (alike, value, ordered, slopes), p in zip(kept, corrected, strict=True)
    ]


def draw_lines(of_lines: Sequence[Line], *paths: Path) -> None:
    """Two panels: the score against rank at like counts, and against the count at like ranks; deviations over seeds."""
    figure = blank(8.4, 3.6)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, alike in zip(axes, ("parameters", "rank"), strict=True):
        own = [line for line in of_lines if line.alike == alike]
        other = _rank if alike == "parameters" else _parameters
        for line, colour, marker in zip(own, COLOURS.values(), MARKERS, strict=False):
            axis.errorbar(
                [other(place) for place in line.places],
                [place.mean for place in line.places],
                [place.deviation for place in line.places],
                marker=marker, capsize=3, color=colour, label=name(line),
            )  # fmt: skip
            methods = [place.runs[0].method for place in line.places]
            for place, method in zip(line.places, methods, strict=True):
                if method != max(methods, key=methods.count):
                    at = other(place), place.mean
                    axis.annotate(method, at, xytext=(5, 6), textcoords="offset points", color=colour)
        axis.set(xscale="log", xlabel="rank of the update" if alike == "parameters" else "trained parameters")
        axis.xaxis.set_minor_formatter("")
        axis.grid(alpha=0.3)
        if own:
            axis.legend(frameon=False)
    run = of_lines[0].places[0].runs[0]
    axes[0].set_ylabel(f"{run.metric}, %")
    figure.suptitle(f"{run.task}, {run.model}, n = {of_lines[0].slope.seeds}")
    save(figure, *paths)


def name(line: Line) -> str:
    """What its arms have alike, in words."""
    rounded = float(f"{line.value:.2g}")
    return f"about {rounded:,.0f} parameters" if line.alike == "parameters" else f"rank {line.value:.0f}"


def _parameters(place: Place) -> float:
    return float(place.parameters)


def _rank(place: Place) -> float:
    return place.rank


def _groups(of_places: Sequence[Place], key: Callable[[Place], float]) -> list[list[Place]]:
    """Those whose key is within `ALIKE` of the least of their group."""
    groups: list[list[Place]] = []
    for place in sorted(of_places, key=key):
        if groups and key(place) <= ALIKE * key(groups[-1][0]):
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups
