"""Runs beside each other: their names, and the examples that all of them are asked about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from randlora.adapters import merged
from randlora.bounds import Bounded, Count
from randlora.data.loader import Split
from randlora.data.subsets import subsample
from randlora.errors import SettingsError
from randlora.tasks.base import Batch
from randlora.training.evaluate import once
from randlora.training.precision import attention_rule, autocast
from randlora.use.trained import Base, Trained, experiment_of

BASE = "base"  # the name of the model before training, among those of runs


@dataclass(frozen=True)
class Sample(Bounded):
    """Which examples are looked at: a fixed random choice, the same for every run.

    Args:
        split: Of the task's data; training examples are not augmented.
        examples: The most of them.
        batch_size: Examples at a time.
    """

    split: Literal["train", "validation", "test"] = "test"
    examples: Count = 512
    batch_size: Count = 64


def named(folders: Sequence[Path], overrides: Sequence[str] = ()) -> dict[str, Path]:
    """The runs by name: their method, and their signature too where several have the same.

    Raises:
        SettingsError: A folder has no finished run, or the runs are not of one model and one task.
    """
    experiments = [experiment_of(folder, overrides, data=False) for folder in folders]
    first = experiments[0]
    for folder, experiment in zip(folders, experiments, strict=True):
        for what in ("model", "task"):
            mine, others = getattr(experiment, what).name, getattr(first, what).name
            if mine != others:
                raise SettingsError(
                    f"{folder}: its {what} is {mine}, and that of {folders[0]} {others}: give runs of one"
                )
    counts = Counter(experiment.method.name for experiment in experiments)
    names = [
        experiment.method.name + (f" {folder.name}" if counts[experiment.method.name] > 1 else "")
        for folder, experiment in zip(folders, experiments, strict=True)
    ]
    if len(set(names)) < len(names):
        raise SettingsError(f"{', '.join(map(str, folders))}: a run is given twice; give each once")
    return dict(zip(names, folders, strict=True))


def load(name: str, runs: Mapping[str, Path], base: Base = "same", overrides: Sequence[str] = ()) -> Trained:
    """The model of the run of this name, with the task's data; of BASE, the first run's model before training."""
    if name == BASE:
        return Trained.before(next(iter(runs.values())), True, overrides)
    return Trained.load(runs[name], base, data=True, overrides=overrides)


def batches(subject: Trained, sample: Sample) -> list[Batch]:
    """The examples as the task's loss takes them, encoded once, on the trainer's device."""
    experiment, backbone = subject.experiment, subject.backbone
    splits = experiment.task.splits(backbone, experiment.budget)
    split: Split = getattr(splits, sample.split)
    encoder = experiment.task.encoder(backbone, training=splits.labelled is not None)
    rows = split.rows[subsample(len(split), sample.examples, experiment.task.name)]
    chosen = Split(split.table, rows, encoder, tolerance=split.tolerance)
    accelerator = experiment.trainer.accelerator()
    return list(once(chosen, accelerator, sample.batch_size, experiment.trainer.workers, print))


@contextmanager
def asked(subject: Trained) -> Iterator[torch.nn.Module]:
    """Inside, the bound model is on the trainer's device, in evaluation mode, merged, and as precise as when scored."""
    trainer = subject.experiment.trainer
    device = trainer.accelerator().device
    model = subject.bound.model.to(device).eval()
    rules = attention_rule(device.type, trainer.precision), autocast(device.type, trainer.precision)
    with merged(model), rules[0], rules[1], torch.no_grad():
        yield model
