"""What was tried for an arm: the validation score against the learning rate, and at which of them it was chosen."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from randlora.records import Result
from randlora.records.metrics import Row
from randlora.studies.arms import SEARCHED, Arm, flat_settings, text


class Tried(NamedTuple):
    """Settings that were tried, after some steps.

    Args:
        rate: The learning rate.
        scale: The other settings that are searched, in words.
        steps: Of the optimiser; None where they are not known.
        whole: Whether those are all steps of a run; if not, a search has compared its trials there.
        validation: The mean score over seeds, per cent.
        test: The same on the test set, where it was scored.
        runs: One for each seed.
        chosen: Whether these settings were chosen.
        edge: Whether they are so at the lowest or highest rate that was tried.
    """

    rate: float
    scale: str
    steps: int | None
    whole: bool
    validation: float
    test: float | None
    runs: Sequence[Result]
    chosen: bool
    edge: bool


def tried(arm: Arm, curves: Mapping[str, Sequence[Row]]) -> list[Tried]:
    """Of an arm, by rate; none where a single learning rate was tried.

    Args:
        arm: The chosen runs, and those that they were chosen from; paused ones among them.
        curves: What was logged, by signature: it has the scores at which promoted runs had paused.
    """
    steps = [run.steps for runs in arm.tried for run in runs if run.steps is not None]
    last, pauses = max(steps, default=None), {*steps}
    found = []
    for runs in arm.tried:
        settings, done = flat_settings(runs[0]), runs[0].steps
        rate = settings.get(SEARCHED[0])
        if not isinstance(rate, float | int):
            continue
        scale = ", ".join(
            f"{key.partition('.')[2]} {text(settings[key])}" for key in SEARCHED[1:] if settings.get(key) is not None
        )
        chosen = runs is arm.runs
        for step in sorted(pause for pause in pauses if done is not None and pause < done):
            if (score := _mean([_logged(run, step, curves) for run in runs])) is not None:
                found.append(Tried(rate, scale, step, False, score, None, runs, False, False))
        whole = done == last or runs[0].status == "finished"
        if (score := _mean([run.validation for run in runs])) is not None:
            test = _mean([run.headline.value for run in runs])
            found.append(Tried(rate, scale, done, whole, score, test, runs, chosen, False))
    rates = {point.rate for point in found}
    if len(rates) < 2:
        return []
    ends = min(rates), max(rates)
    return sorted((point._replace(edge=point.chosen and point.rate in ends) for point in found), key=lambda p: p.rate)


def _logged(run: Result, step: int, curves: Mapping[str, Sequence[Row]]) -> float | None:
    for row in curves.get(run.signature, ()):
        if row.step == step and (score := row.metrics.get(f"validation/{run.metric}")) is not None:
            return score
    return None


def _mean(scores: Sequence[float | None]) -> float | None:
    """Per cent; None unless all are known."""
    known = [score for score in scores if score is not None]
    return 100 * statistics.mean(known) if known and len(known) == len(scores) else None
