"""Trials drawn by Optuna's sampler."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Le

from randlora.bounds import Count, Seed
from randlora.errors import SettingsError
from randlora.rng import integer
from randlora.sweeps.strategies.base import WORST, Arm, Course, Factor, Score, Strategy, Values, rounded


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
