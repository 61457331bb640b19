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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from randlora.adapters import load_adapter
from randlora.adapters.files import load_modules
from randlora.adapters.identity import MODULES
from randlora.adapters.tensor_files import header
from randlora.config import settings
from randlora.data.loader import Unreadable
from randlora.errors import FAILED, FINISHED, SettingsError, exit_code
from randlora.experiment import Experiment
from randlora.records import Result
from randlora.records.signature import modern
from randlora.tasks.base import Bound
from randlora.training.evaluate import evaluate, prefixed

KEPT = ("model", "method", "targets", "seed")


def scores(
    run: Path, overrides: Sequence[str] = (), zero_shot: bool = False, any_base: bool = False
) -> dict[str, float]:
    """Metrics by name. SettingsError where there is no finished run, or where its head is not the task's."""
    experiment = Experiment.from_config(composed(finished(run), overrides))
    task, trainer = experiment.task, experiment.trainer
    torch.manual_seed(experiment.budget.seed)  # as in training: weights that no file gives
    backbone = experiment.model.load()
    test = task.splits(backbone, experiment.budget).test
    if zero_shot:
        experiment.adapt(backbone)
    else:
        load_adapter(backbone.module, run / "adapter", "any" if any_base else "same", modules={})
    bound = experiment.bind(backbone)
    if zero_shot and not (task.zero_shot and bound.head is None):
        raise SettingsError(f"--zero-shot: task {task.name} on {experiment.model.name} has no score before training")
    if not zero_shot:
        load_head(bound, run / "adapter")
    metrics = evaluate(
        task, bound.model, test, trainer.accelerator(), batch_size=trainer.evaluation_batch_size,
        workers=trainer.workers, precision=trainer.precision, say=say,
    )  # fmt: skip
    return prefixed("zero_shot" if zero_shot else "test", metrics)


def say(text: str) -> None:
    """A message, of the first process alone."""
    if PartialState().is_main_process:
        print(text, file=sys.stderr, flush=True)


def finished(run: Path) -> dict[str, Any]:
    """The settings of a finished run."""
    try:
        result = Result.read(run / "result.json")
    except SettingsError as error:
        raise SettingsError(f"{run} is not the folder of a run: {error}") from error
    if result.status != "finished":
        raise SettingsError(f"{run}: this run is {result.status}; give its command again to finish it")
    return modern(result.config)


def composed(of_the_run: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The run's settings, or those of `overrides` with the run's model, method, targets and seed."""
    if not overrides:
        return dict(of_the_run)
    for override in overrides:
        if override.lstrip("+~").partition("=")[0].partition(".")[0] in (*KEPT, "experiment"):
            raise SettingsError(f"{override}: {', '.join(KEPT)} are the run's; give a task and its settings")
    if not any(override.startswith("task=") for override in overrides):
        raise SettingsError(f"{' '.join(overrides)}: name the task too, such as task={of_the_run['task']['name']}")
    return settings(*overrides) | {name: of_the_run[name] for name in KEPT}


def load_head(bound: Bound, folder: Path) -> None:
    """Gives `bound` the head that was trained with the adapter in `folder`, where the task has one."""
    needed = {name: tuple(parameter.shape) for name, parameter in bound.head_parameters().items()}
    kept = {name: e.shape for name, e in header(folder / MODULES).items()} if (folder / MODULES).is_file() else {}
    if needed != kept:
        raise SettingsError(
            f"this task's head is {needed or 'none'} and the run's {kept or 'none'}: give a task like the run's"
        )
    if needed:
        load_modules(folder, bound.modules())


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
