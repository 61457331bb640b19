"""Results in groups that can be compared, and paired differences of two settings within them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from randlora.errors import SettingsError
from randlora.records import Result
from randlora.records.predictions import example_scores
from randlora.records.signature import modern
from randlora.studies.statistics import Difference, paired_difference, student_difference


class Cell(NamedTuple):
    """What a comparison holds fixed: the model, the task and how much of its training set is used."""

    model: str
    task: str
    shots: int | None
    fraction: float | None

    @property
    def data(self) -> str:
        """Shots, a percentage, or all."""
        return str(self.shots or (f"{100 * self.fraction:g} %" if self.fraction else "all"))

    @property
    def budget(self) -> str:
        """`data` in words: 16 shots, 50 % of the data."""
        return f"{self.data} shot{'s' * (self.shots != 1)}" if self.shots else f"{self.data} of the data"

    @property
    def order(self) -> tuple[str, str, float, float]:
        """Sorts cells by name, and from few training examples to all."""
        return self.model, self.task, self.shots or float("inf"), self.fraction or 1.0


def cell(result: Result) -> Cell:
    """The cell that a result belongs to."""
    return Cell(result.model, result.task, result.shots, result.fraction)


def percent(result: Result) -> float:
    """The headline of a finished run, per cent."""
    if result.headline.value is None:
        raise SettingsError(f"{result.path}: the run {result.signature} is {result.status} and has no score")
    return 100 * result.headline.value


def finished(results: Sequence[Result]) -> list[Result]:
    """Those that ended by themselves, by cell and method, the only ones to compare; SettingsError for none."""
    kept = [result for result in results if result.status == "finished"]
    if not kept:
        raise SettingsError("none of the runs has finished: the same command goes on with an unfinished one")
    return sorted(kept, key=lambda result: (cell(result).order, result.method, result.signature))


def value(result: Result, key: str) -> str:
    """What a result says of `key` as text, "" where it has none.

    Args:
        key: A metric such as ``test/accuracy``, a field of Result such as ``method`` or ``collection``, or a setting
            such as ``trainer.learning_rate``.
    """
    content = _content(result, key)
    if isinstance(content, float):
        return f"{content:.4g}"
    return "" if content in (None, _ABSENT) else str(content)


def check_keys(results: Sequence[Result], keys: Sequence[str]) -> None:
    """Raises SettingsError for a key that none of the results has."""
    for key in keys:
        if results and all(_content(result, key) is _ABSENT for result in results):
            raise SettingsError(
                f"{key}: no run has it; give a metric such as test/accuracy, a setting such as method.rank, or a "
                "field of result.json"
            )


_ABSENT = object()


def _content(result: Result, key: str) -> object:
    """What `value` is the text of; _ABSENT where there is nothing of that name."""
    if "/" in key:
        return result.metrics.get(key, _ABSENT)
    if hasattr(result, key):
        return getattr(result, key)
    content: object = result.config
    for part in key.split("."):
        content = content.get(part, _ABSENT) if isinstance(content, Mapping) else _ABSENT
    return content


def select(results: Sequence[Result], conditions: Sequence[str]) -> list[Result]:
    """The results that meet every condition ``KEY=VALUE,VALUE…``; SettingsError where one leaves none."""
    kept = list(results)
    for condition in conditions:
        key, _, wanted = condition.partition("=")
        there = sorted({value(result, key) for result in kept})
        kept = [result for result in kept if value(result, key) in wanted.split(",")]
        if not kept:
            raise SettingsError(f"{condition}: no result has it; of {key!r} there is {', '.join(filter(None, there))}")
    return kept


_NO_GROUPS = ("seed", "run_root", "predictions")


def by_settings(results: Sequence[Result], paused: bool = False) -> list[list[Result]]:
    """The finished runs in groups that differ in their seed alone; scores of two versions of a task are not mixed.

    With `paused` those are grouped, and these are not.
    """
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in [run for run in results if run.status == "paused"] if paused else finished(results):
        settings = {key: setting for key, setting in modern(result.config).items() if key not in _NO_GROUPS}
        names = result.task, result.model, result.method, str(result.task_version)
        groups.setdefault((*names, json.dumps(settings, sort_keys=True)), []).append(result)
    return list(groups.values())


def spread(scores: Sequence[float], mean: str = ".1f", deviation: str = ".1f") -> str:
    """Mean ± sample deviation, or the mean alone of a single score."""
    end = f" ± {statistics.stdev(scores):{deviation}}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):{mean}}{end}"


class Pairs(NamedTuple):
    """Scores of two settings under the same seeds, per cent, and their difference."""

    first: Sequence[float]
    second: Sequence[float]
    difference: Difference


def paired(results: Sequence[Result], key: str, first: str, second: str, examples: bool = False) -> dict[Cell, Pairs]:
    """Differences ``first - second`` of the headline, seed by seed; nothing is corrected here.

    By Student's t, which takes the test examples as given; with `examples` by `paired_difference` over seeds and
    examples, from the predictions of these in the runs' folders.

    Args:
        results: Finished or not; only seeds that have both values count.
        key: What the two differ in, as `value` takes it; the method is the same in a pair unless it is this.
        first, second: Its values.
        examples: Whether the interval is over seeds and test examples.

    Raises:
        SettingsError: No cell has finished runs of both, a cell has fewer than two seeds with both, two runs of a
            cell have the same seed and value, or predictions are missing or of other examples.
    """
    groups: dict[tuple[Cell, str], dict[str, dict[int, Result]]] = {}
    for result in finished(results):
        setting = value(result, key)
        if setting in (first, second):
            group = cell(result), "" if key == "method" else result.method
            by_seed = groups.setdefault(group, {first: {}, second: {}})[setting]
            if result.seed in by_seed:
                raise SettingsError(
                    f"{result.path}: a second run of {key}={setting} with this task, model and seed "
                    f"({result.signature}); choose with --only"
                )
            by_seed[result.seed] = result
    pairs = {}
    for (where, _), runs in groups.items():
        if all(runs.values()):
            seeds = sorted(runs[first].keys() & runs[second].keys())
            if len(seeds) < 2:
                both = f"{len(seeds)} seeds have both {key}={first} and {second}"
                raise SettingsError(f"{where.task}, {where.model}: {both}; two are needed")
            ours, theirs = ([runs[setting][seed] for seed in seeds] for setting in (first, second))
            pairs[where] = _pairs(where, ours, theirs, examples)
    if not pairs:
        raise SettingsError(f"--paired {key}={first},{second}: no task and model has finished runs of both")
    return pairs


def _pairs(where: Cell, ours: Sequence[Result], theirs: Sequence[Result], examples: bool) -> Pairs:
    """Of runs with the same seeds in one order."""
    first, second = [percent(run) for run in ours], [percent(run) for run in theirs]
    if not examples:
        return Pairs(first, second, student_difference(first, second))
    scores = [[example_scores(run) for run in runs] for runs in (ours, theirs)]
    if len({tuple(of_run) for of_runs in scores for of_run in of_runs}) > 1:
        raise SettingsError(f"{where.task}, {where.model}: the runs were scored on different test examples")
    arrays = (dict(enumerate(100 * np.array([[*of_run.values()] for of_run in of_runs]))) for of_runs in scores)
    return Pairs(first, second, paired_difference(*arrays))
