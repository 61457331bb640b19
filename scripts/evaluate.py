"""The scores of a finished run's adapter, on its own test set or on another task's.

python scripts/evaluate.py RUN                                                       the run's own test set again
python scripts/evaluate.py RUN task=openbookqa task.scoring=generation data_root=FOLDER [KEY=VALUE …]
python scripts/evaluate.py RUN --zero-shot …                                         the model before training

RUN is a run's folder. Model, method and seed are the run's, all else is of the settings where they are given. Prints
JSON and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch import nn

from randlora.adapters import adapt, load_adapter
from randlora.config import settings
from randlora.data.loader import Split, Unreadable
from randlora.errors import FAILED, FINISHED, SettingsError, exit_code
from randlora.records.console import Console
from randlora.run import Experiment, head_of
from randlora.tasks.base import Splits
from randlora.training.trainer import Loop

KEPT = ("model", "method", "targets", "seed")


class Terminal(Console):
    """Messages of the first process, and no curves."""

    def say(self, text: str) -> None:
        if PartialState().is_main_process:
            super().say(text)

    def log(self, metrics: dict[str, float], step: int) -> None: ...


def evaluate(run: Path, overrides: Sequence[str] = (), zero_shot: bool = False) -> dict[str, float]:
    """Metrics by name. SettingsError where there is no finished run, or where its head is not the task's."""
    experiment = Experiment.from_config(composed(finished(run), overrides))
    task, trainer, seed = experiment.task, experiment.trainer, experiment.budget.seed
    torch.manual_seed(seed)  # as in training: weights that no file gives
    backbone = experiment.model.load()
    if zero_shot and not task.zero_shot(backbone):
        raise SettingsError(f"--zero-shot: task {task.name} on {experiment.model.name} has no score before training")
    test = task.splits(backbone, experiment.budget).test
    if zero_shot:
        adapt(backbone.module, experiment.method, experiment.patterns, seed)
    else:
        load_adapter(backbone.module, run / "adapter")
    model = task.bind(backbone)
    if not zero_shot:
        load_head(model, backbone.module, run / "adapter" / "head.safetensors")
    nothing = Split(test.table, test.rows[:0], test.encode)  # to learn from
    with tempfile.TemporaryDirectory() as checkpoints:
        loop = Loop(
            trainer, task, model, Splits(nothing, nothing, test), seed, Path(checkpoints), Terminal(),
            trainer.accelerator(),
        )  # fmt: skip
        return loop.evaluate("zero_shot" if zero_shot else "test", loop.splits.test)


def finished(run: Path) -> dict[str, Any]:
    """The settings of a finished run."""
    try:
        result = json.loads((run / "result.json").read_text())
        status, config = result["status"], result["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{run} is not the folder of a run: {error}") from error
    if status != "finished":
        raise SettingsError(f"{run}: this run is {status}; give its command again to finish it")
    return config


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


def load_head(model: nn.Module, backbone: nn.Module, file: Path) -> None:
    """Gives `model` the head that was trained with the adapter, where the task has one."""
    head = head_of(model, backbone)
    found = load_file(file) if file.is_file() else {}
    needed, kept = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (head, found))
    if needed != kept:
        raise SettingsError(
            f"this task's head is {needed or 'none'} and the run's {kept or 'none'}: give a task of its kind"
        )
    with torch.no_grad():
        for name, parameter in head.items():
            parameter.copy_(found[name])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--zero-shot", action="store_true")
    arguments, overrides = parser.parse_known_args()
    try:
        metrics = evaluate(arguments.run, overrides, arguments.zero_shot)
    except Unreadable as error:
        print(f"failed: {error}", file=sys.stderr)
        return FAILED
    if PartialState().is_main_process:
        print(json.dumps(metrics, indent=1))
    return FINISHED


if __name__ == "__main__":
    sys.exit(exit_code(main))
