"""The scores of a finished run's adapter, on its own test set or on another task's.

python scripts/evaluate.py RUN                                                       the run's own test set again
python scripts/evaluate.py RUN task=openbookqa task.scoring=generation data_root=FOLDER [KEY=VALUE …]
python scripts/evaluate.py RUN --zero-shot …                                         the model before training
python scripts/evaluate.py RUN --any-base …                                          on other weights than the run's

RUN is a run's folder. Model, method and seed are the run's, all else is of the settings where they are given. Prints
JSON and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from randlora.data.loader import Unreadable
from randlora.errors import FAILED, FINISHED, SettingsError, exit_code
from randlora.training.evaluate import evaluate, prefixed
from randlora.use.trained import Trained, experiment_of


def scores(
    run: Path, overrides: Sequence[str] = (), zero_shot: bool = False, any_base: bool = False
) -> dict[str, float]:
    """Metrics by name. SettingsError where there is no finished run, or where its head is not the task's."""
    if zero_shot:
        experiment = experiment_of(run, overrides)
        backbone = experiment.model.load()
        experiment.adapt(backbone)
        bound = experiment.bind(backbone)
    else:
        trained = Trained.load(run, "any" if any_base else "same", data=True, overrides=overrides)
        experiment, backbone, bound = trained.experiment, trained.backbone, trained.bound
    task, trainer = experiment.task, experiment.trainer
    if zero_shot and not (task.zero_shot and bound.head is None):
        raise SettingsError(f"--zero-shot: task {task.name} on {experiment.model.name} has no score before training")
    metrics = evaluate(
        task, bound.model, task.splits(backbone, experiment.budget).test, trainer.accelerator(),
        batch_size=trainer.evaluation_batch_size, workers=trainer.workers, precision=trainer.precision, say=say,
    )  # fmt: skip
    return prefixed("zero_shot" if zero_shot else "test", metrics)


def say(text: str) -> None:
    """A message, of the first process alone."""
    if PartialState().is_main_process:
        print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--zero-shot", action="store_true")
    parser.add_argument("--any-base", action="store_true")
    arguments, overrides = parser.parse_known_args()
    try:
        metrics = scores(arguments.run, overrides, arguments.zero_shot, arguments.any_base)
    except Unreadable as error:
        print(f"failed: {error}", file=sys.stderr)
        return FAILED
    if PartialState().is_main_process:
        print(json.dumps(metrics, indent=1))
    return FINISHED


if __name__ == "__main__":
    sys.exit(exit_code(main))
