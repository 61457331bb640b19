"""Grids of learning rates and scales: every point for a whole run, or successive halving."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

from annotated_types import Ge, Le

from randlora.bounds import Count, CountOrZero
from randlora.errors import SettingsError
from randlora.sweeps.strategies.base import RATE, WORST, Arm, Course, Factor, Score, Strategy, Values

MANY = 1000  # points of a grid, at most


class _Point(NamedTuple):
    """How often the factors are in a trial's multiples of an arm's own rate and scale."""

    rate: float
    scale: int = 0


@dataclass(frozen=True)
class _Box:
    """The points of a grid, from the first to the last on each axis.

    An arm without a scale has as many points: rates alone, `parts` of them for one of the others'.
    """

    rates: tuple[int, int]
    scales: tuple[int, int]
    alone: tuple[int, int]
    parts: int

    @classmethod
    def around(cls, rates: int, scales: int) -> _Box:
        """So many points of each, the arm's own in their middle."""
        return cls(_around(rates), _around(scales), _around(rates * scales), scales)

    def points(self, arm: Arm) -> list[_Point]:
        """In order of the rate."""
        if arm.scale_key is None:
            return [_Point(number / self.parts) for number in _span(self.alone)]
        return [_Point(rate, scale) for rate, scale in itertools.product(_span(self.rates), _span(self.scales))]

    def edges(self, arm: Arm, point: _Point) -> dict[str, str]:
        """Those that a point lies at."""
        rates = self.rates if arm.scale_key else (self.alone[0] / self.parts, self.alone[1] / self.parts)
        edges = {RATE: _end(point.rate, rates)}
        if arm.scale_key:
            edges[arm.scale_key] = _end(point.scale, self.scales)
        return {key: end for key, end in edges.items() if end}

    def extended(self, ends: set[tuple[bool, str]]) -> _Box:
        """With one value more at these ends of rates (True) and scales (False).

        An arm without a scale gets as many points as the others: on the side where the others' rates grow, and
        otherwise half of them at each end.
        """
        rates, scales = (
            (first - ((axis, "lower") in ends), last + ((axis, "upper") in ends))
            for axis, (first, last) in ((True, self.rates), (False, self.scales))
        )
        height = len(_span(self.scales))
        below, above = (height * ((True, end) in ends) for end in ("lower", "upper"))
        more = len(_span(rates)) * len(_span(scales)) - len(_span(self.alone)) - below - above
        alone = self.alone[0] - below - more // 2, self.alone[1] + above + more - more // 2
        return _Box(rates, scales, alone, self.parts)


@dataclass(frozen=True)
class Grid(Strategy):
    """Every point of a grid of learning rates and scales, for a whole run each.

    The points are multiples of a method's own rate and scale. A method without a scale has as many points on the axis
    of rates. Where the best point of an arm lies at an end of the grid, the grid grows there by one value, for all arms
    of its cell, up to `extend` times.

    Args:
        rates: How many learning rates.
        rate_factor: From one to the next.
        scales: How many scales; 1: the method's own.
        scale_factor: From one to the next.
        extend: How often a grid may grow.
    """

    rates: Count = 5
    rate_factor: Factor = 3.0
    scales: Count = 3
    scale_factor: Factor = 2.0
    extend: CountOrZero = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rates * self.scales > MANY:
            raise SettingsError(
                f"search.rates={self.rates}: with search.scales={self.scales} makes {self.rates * self.scales:,} "
                f"points for each method, and {MANY:,} are allowed"
            )

    unscaled: ClassVar[str] = "search.scales=1"

    @property
    def scaled(self) -> bool:
        return self.scales > 1

    def rungs(self, steps: int) -> list[int]:
        return [steps]

    def kept(self, trials: int, rung: int) -> int:
        """How many of so many trials reach a rung, from 0."""
        return trials

    def most_steps(self, steps: int) -> int:
        trials, rungs = self.rates * self.scales, self.rungs(steps)
        return sum(
            self.kept(trials, number) * (rung - before)
            for number, (before, rung) in enumerate(itertools.pairwise([0, *rungs]))
        )

    def courses(self, arms: Sequence[Arm], score: Score, before: Mapping[str, Sequence[Values]]) -> list[Course]:
        box = _Box.around(self.rates, self.scales)
        points = [box.points(arm) for arm in arms]
        for extensions in itertools.count():
            courses = [self._course(arm, box, of_arm, score) for arm, of_arm in zip(arms, points, strict=True)]
            ends = {(key == RATE, end) for course in courses for key, end in course.edges.items()}
            if not ends or extensions == self.extend or any(course.wanted for course in courses):
                break
            box = box.extended(ends)
            points = [
                [*of_arm, *(point for point in box.points(arm) if point not in of_arm)]
                for arm, of_arm in zip(arms, points, strict=True)
            ]
        return courses

    def _course(self, arm: Arm, box: _Box, points: Sequence[_Point], score: Score) -> Course:
        trials = [arm.values(self.rate_factor**point.rate, self.scale_factor**point.scale) for point in points]
        rungs, kept = self.rungs(arm.steps), [*range(len(trials))]
        scores: list[dict[int, float]] = [{} for _ in trials]
        for number, known in enumerate(scores):  # also of what the smaller grid promoted
            known |= {rung: value for rung in rungs if (value := score(arm, trials[number], rung)) is not None}

        def worth(number: int, rung: int) -> tuple[float, float, float, float]:
            """Of two equal scores the one nearer to the arm's own settings is taken."""
            point = points[number]
            return -scores[number][rung], abs(point.rate) + abs(point.scale), point.rate, point.scale

        for place, rung in enumerate(rungs):
            if wanted := [(number, rung) for number in kept if rung not in scores[number]]:
                return Course(arm, rungs, trials, scores, wanted)
            good = [number for number in kept if scores[number][rung] > WORST]
            kept = sorted(good, key=lambda number: worth(number, rung))[: self.kept(len(trials), place + 1)]
        whole = [number for number in range(len(trials)) if scores[number].get(rungs[-1], WORST) > WORST]
        if not whole:
            return Course(arm, rungs, trials, scores)
        chosen = min(whole, key=lambda number: worth(number, rungs[-1]))
        return Course(arm, rungs, trials, scores, (), chosen, box.edges(arm, points[chosen]))


@dataclass(frozen=True)
class Halving(Grid):
    """A grid by successive halving: all trials for a few steps, the best of them for more, and so on.

    A trial that is promoted goes on from its checkpoint, the others stay paused. Every rung has `eta` times the steps
    of the one before, and its share of the trials, 1 in `eta`, rounded down, but `finalists` at the least. Jamieson and
    Talwalkar, AISTATS 2016, whose last rung may have a single trial.

    Args:
        eta: See above.
        finalists: The fewest trials of a rung.
        min_steps: The fewest steps of the first rung; None: those of a whole run over the square of `eta`.
    """

    eta: Annotated[int, Ge(2), Le(100)] = 3
    finalists: Count = 3
    min_steps: Count | None = None

    def rungs(self, steps: int) -> list[int]:
        """As many as are of `min_steps` or more; SettingsError where that is one."""
        least = self.min_steps or max(1, steps / self.eta**2)
        shares = itertools.takewhile(lambda share: share >= least, (steps / self.eta**k for k in itertools.count()))
        rungs = sorted({math.ceil(share) for share in shares})
        if len(rungs) < 2:
            raise SettingsError(
                f"search.min_steps={self.min_steps}: a run has {steps:,} steps, and with search.eta={self.eta} nothing "
                "is left to promote; lower it, or use search=grid"
            )
        return rungs

    def kept(self, trials: int, rung: int) -> int:
        return min(trials, max(self.finalists, trials // self.eta**rung))


def _around(count: int) -> tuple[int, int]:
    return -(count // 2), count - count // 2 - 1


def _span(ends: tuple[int, int]) -> range:
    return range(ends[0], ends[1] + 1)


def _end(place: float, ends: tuple[float, float]) -> str:
    """The end that a place is at; none of an axis with one value."""
    return "" if ends[0] == ends[1] else "lower" if place == ends[0] else "upper" if place == ends[1] else ""
