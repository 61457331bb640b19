"""How a search goes: what is tried next and what is chosen, from the scores that are known and from nothing else.

So a search that was killed goes on as if it had not been: the same scores make the same plan. In one cell, which is a
task, a model and a budget of examples, all arms (methods, or settings of one) have as many trials of as many steps.
"""

from __future__ import annotations

import itertools
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, NamedTuple

from annotated_types import Ge, Gt, Le

from randlora.bounds import Bounded, Count, CountOrZero, Seed
from randlora.errors import SettingsError
from randlora.rng import integer

RATE = "trainer.learning_rate"
WORST = -math.inf  # the score of a trial of which a run has failed
MANY = 1000  # points of a grid, at most

Values = Mapping[str, float]  # of the searched settings
Factor = Annotated[float, Gt(1), Le(1000)]
# The score of an arm's trial after so many steps, a mean over seeds; None while it is not known.
Score = Callable[["Arm", Values, int], float | None]


@dataclass(frozen=True)
class Arm:
    """A method whose rate and scale are searched.

    Args:
        label: The settings that set it apart.
        rate: The learning rate that it has by itself.
        steps: Of its whole run.
        scale_key: Its own name of the scale, such as ``method.alpha``; None where it has none, or it is not searched.
        scale: The one that it has by itself.
    """

    label: str
    rate: float
    steps: int
    scale_key: str | None = None
    scale: float = 1.0

    def values(self, rate: float, scale: float = 1.0) -> Values:
        """The settings for multiples of the arm's own, in three significant digits."""
        values = {RATE: rounded(self.rate * rate)}
        return values if self.scale_key is None else values | {self.scale_key: rounded(self.scale * scale)}


@dataclass(frozen=True)
class Course:
    """How far an arm's search is.

    Args:
        arm: Whose it is.
        rungs: The steps after which trials are compared, the last of them those of a whole run.
        trials: What is tried, in the order in which that was decided.
        scores: Of each trial by rung, as far as they are known.
        wanted: What is to be run next: a trial's number, and the rung.
        chosen: The number of the best trial; None while trials are wanted, and where none has a score.
        edges: The settings whose chosen value is at an end of what was tried, and which: ``lower`` or ``upper``.
    """

    arm: Arm
    rungs: Sequence[int]
    trials: Sequence[Values]
    scores: Sequence[Mapping[int, float]]
    wanted: Sequence[tuple[int, int]] = ()
    chosen: int | None = None
    edges: Mapping[str, str] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """How many one seed's trials have done, or were to do before they failed."""
        return sum(max(scores, default=0) for scores in self.scores)


class Strategy(Bounded):
    """A search's settings, and what follows from them."""

    section: ClassVar[str] = "search"

    @abstractmethod
    def courses(self, arms: Sequence[Arm], score: Score, before: Mapping[str, Sequence[Values]]) -> list[Course]:
        """Of every arm of a cell.

        Args:
            arms: Of one cell.
            score: What is known of a trial.
            before: The trials that were decided earlier, by the arm's label.
        """

    @property
    @abstractmethod
    def scaled(self) -> bool:
        """Whether scales are searched, too."""

    unscaled: ClassVar[str]  # the setting with which they are not

    @abstractmethod
    def rungs(self, steps: int) -> list[int]:
        """The steps after which the trials of runs with so many are compared; the last is `steps`."""

    @abstractmethod
    def most_steps(self, steps: int) -> int:
        """Those of an arm's whole search, for one seed, where a run has `steps`."""


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
    of the one before, and its share of the trials, 1 in `eta`, rounded down. Jamieson and Talwalkar, AISTATS 2016.

    Args:
        eta: See above.
        min_steps: The fewest steps of the first rung; None: those of a whole run over the square of `eta`.
    """

    eta: Annotated[int, Ge(2), Le(100)] = 3
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
        return max(1, trials // self.eta**rung)


@dataclass(frozen=True)
class TPE(Strategy):
    """Optuna's tree-structured Parzen estimator: trials drawn where earlier ones were good, for a whole run each.

    The first trial is a method's own rate and scale. Bergstra et al., NeurIPS 2011. What is drawn depends on the scores
    of all earlier trials and on `seed`, and not on how many run at a time.

    Args:
        trials: How many for each arm.
        rate_factor: Rates are between the method's own over this, and the method's own times this.
        scale_factor: As `rate_factor`; 1: the method's own scale.
        startup: Trials that are drawn at random before the estimator is asked.
        batch: Trials of an arm that are drawn at a time, and may run at a time.
        seed: Of what is drawn.
    """

    trials: Count = 15
    rate_factor: Factor = 9.0
    scale_factor: Annotated[float, Ge(1), Le(1000)] = 2.0
    startup: Count = 5
    batch: Count = 1
    seed: Seed = 0

    unscaled: ClassVar[str] = "search.scale_factor=1"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_optuna()

    @property
    def scaled(self) -> bool:
        return self.scale_factor > 1

    def rungs(self, steps: int) -> list[int]:
        return [steps]

    def most_steps(self, steps: int) -> int:
        return self.trials * steps

    def courses(self, arms: Sequence[Arm], score: Score, before: Mapping[str, Sequence[Values]]) -> list[Course]:
        return [self._course(arm, [*before.get(arm.label, ())], score) for arm in arms]

    def _course(self, arm: Arm, trials: list[Values], score: Score) -> Course:
        known = [score(arm, values, arm.steps) for values in trials]
        if None not in known and len(trials) < self.trials:
            for _ in range(min(self.batch, self.trials - len(trials))):
                trials.append(self._next(arm, trials, known))
                known.append(None)
        scores = [{} if value is None else {arm.steps: value} for value in known]
        wanted = [(number, arm.steps) for number, value in enumerate(known) if value is None]
        ranked = sorted((-value, number) for number, value in enumerate(known) if value is not None and value > WORST)
        if wanted or not ranked:
            return Course(arm, [arm.steps], trials, scores, wanted)
        chosen = ranked[0][1]
        return Course(arm, [arm.steps], trials, scores, (), chosen, self._edges(arm, trials[chosen]))

    def _bounds(self, arm: Arm) -> dict[str, tuple[float, float]]:
        lower = arm.values(1 / self.rate_factor, 1 / self.scale_factor)
        upper = arm.values(self.rate_factor, self.scale_factor)
        return {key: (lower[key], upper[key]) for key in lower}

    def _next(self, arm: Arm, trials: Sequence[Values], known: Sequence[float | None]) -> Values:
        if not trials:
            return arm.values(1.0)
        optuna = require_optuna()
        key = integer("search", self.seed, arm.label, len(trials)) % 2**32
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant_liar is experimental
            sampler = optuna.samplers.TPESampler(seed=key, n_startup_trials=self.startup, constant_liar=True)
        study = optuna.create_study(sampler=sampler, direction="maximize")
        space = {
            key: optuna.distributions.FloatDistribution(*ends, log=True) for key, ends in self._bounds(arm).items()
        }
        for values, value in zip(trials, known, strict=True):
            study.add_trial(_optuna_trial(values, space, value))
        return {key: rounded(value) for key, value in study.ask(space).params.items()}

    def _edges(self, arm: Arm, values: Values) -> dict[str, str]:
        """Ends that a value is nearer to than a twentieth of the range, on a logarithmic axis."""
        edges = {}
        for key, (lower, upper) in self._bounds(arm).items():
            place = math.log(values[key] / lower) / math.log(upper / lower) if upper > lower else 0.5
            edges[key] = "lower" if place < 0.05 else "upper" if place > 0.95 else ""
        return {key: end for key, end in edges.items() if end}


def rounded(value: float) -> float:
    """In three significant digits: labels are read by people."""
    return float(f"{value:.3g}")


def require_optuna() -> Any:
    """The package, quiet; SettingsError where it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise SettingsError("search=tpe needs the package optuna: pip install 'randlora[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _optuna_trial(values: Values, space: Mapping[str, Any], value: float | None) -> Any:
    """A trial as Optuna has it: complete, or running where it has no value yet."""
    import optuna

    state = optuna.trial.TrialState.RUNNING if value is None else optuna.trial.TrialState.COMPLETE
    return optuna.trial.create_trial(state=state, params=dict(values), distributions=dict(space), value=value)


def _around(count: int) -> tuple[int, int]:
    return -(count // 2), count - count // 2 - 1


def _span(ends: tuple[int, int]) -> range:
    return range(ends[0], ends[1] + 1)


def _end(place: float, ends: tuple[float, float]) -> str:
    """The end that a place is at; none of an axis with one value."""
    return "" if ends[0] == ends[1] else "lower" if place == ends[0] else "upper" if place == ends[1] else ""
