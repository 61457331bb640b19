"""Adapters that a run has kept on its way, and the first of them whose validation score reaches a value."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from randlora.errors import SettingsError
from randlora.records.metrics import NAME as METRICS
from randlora.records.metrics import Row
from randlora.records.result import Result

LOSS = "loss"  # the validation metric of which less is better


class Reached(NamedTuple):
    """A step of a run, its score on the validation split, and its adapter; None where no step has reached the score.

    The step and the score are then those of the run's best.
    """

    step: int
    validation: float
    adapter: Path | None


def kept_adapter(run: Path, step: int) -> Path:
    """Where a run keeps the adapter that it had after `step` steps: ``trainer.keep_adapters``."""
    return run / "adapters" / f"step_{step:07d}"


def first_at(run: Path, score: float, metric: str | None = None) -> Reached:
    """The first evaluated step of a finished run whose validation score is `score` or better.

    Args:
        run: Its folder.
        score: In the metric's own unit: 0.5 for an accuracy of 50 %.
        metric: Of which more is better, but for `LOSS`; None: the task's headline.

    Raises:
        SettingsError: The run has no such validation score, or has not kept that step's adapter.
    """
    result = Result.read(run / "result.json")
    name = f"validation/{metric or result.metric}"
    sign = -1 if metric == LOSS else 1
    rows = [*map(Row.of, (run / METRICS).read_text().splitlines())] if (run / METRICS).is_file() else []
    scores = [(row.step, row.metrics[name]) for row in rows if name in row.metrics]
    if not scores:
        wish = "trainer.evaluate_every" + " and trainer.select=best" * (metric == LOSS)
        raise SettingsError(f"{run}: its {METRICS} has no {name}; run it with {wish}")
    there = (pair for pair in scores if sign * pair[1] >= sign * score)
    step, reached = next(there, max(scores, key=lambda pair: sign * pair[1]))
    if sign * reached < sign * score:
        return Reached(step, reached, None)
    kept = kept_adapter(run, step)
    if not kept.is_dir() and step == (result.selected_step or result.steps):
        kept = run / "adapter"
    if not kept.is_dir():
        raise SettingsError(
            f"{run}: {name} reaches {score:g} at step {step}, whose adapter was not kept; run it again with "
            "trainer.keep_adapters=true resume=false"
        )
    return Reached(step, reached, kept)
