"""The objects of one run, built from its settings and checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from randlora.adapters import Report, adapt, calibrate
from randlora.bounds import FolderName, check
from randlora.config import General, build
from randlora.data.loader import loader, training_keys
from randlora.errors import SettingsError
from randlora.methods import Method
from randlora.models.base import Backbone, Model
from randlora.records.logger import Logger
from randlora.records.signature import signature
from randlora.tasks.base import Bound, Budget, Splits, Task
from randlora.training import Optimizer, Trainer
from randlora.training.evaluate import to_device
from randlora.training.processes import of_the_main_process

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Experiment:
    """What one run is made of; making it is quick and checks every setting that can be checked without loading.

    Args:
        method, model, task, trainer, optimizer: One object of each of these groups of settings.
        loggers: Mirrors of the record, such as dashboards.
        patterns: Of the module names that are adapted.
        budget: How much of the training set is used, and the seed.
        config: All settings, as plain data.
    """

    method: Method
    model: Model
    task: Task
    trainer: Trainer
    optimizer: Optimizer
    loggers: Sequence[Logger]
    patterns: Sequence[str]
    budget: Budget
    config: Mapping[str, Any]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Experiment:
        """From composed settings; SettingsError with one sentence for whatever is wrong."""
        general = General.from_config(config)
        method, model, task, trainer, optimizer = (
            _part(config, name, base)
            for name, base in (
                ("method", Method), ("model", Model), ("task", Task), ("trainer", Trainer), ("optimizer", Optimizer),
            )
        )  # fmt: skip
        check("method", {"name": FolderName}, {"name": method.name})
        budget = Budget(general.seed, general.shots, general.fraction)
        patterns = model.patterns(general.targets)
        task.check_model(model)
        check("", {"logger": Mapping[str, Mapping]}, config)
        loggers = [_part(config["logger"], name, Logger) for name in config["logger"]]
        if not general.dry_run:
            model.check()
            task.check()
        trainer.steps(task.training_size(budget))  # refuses shots where there are no classes
        if not general.dry_run:
            optimizer.check(trainer.weight_decay)
        return cls(method, model, task, trainer, optimizer, loggers, patterns, budget, config)

    @property
    def folder(self) -> Path:
        """run_root/task/model/method/signature."""
        names = (self.task.name, self.model.name, self.method.name, signature(self.config, self.task.version))
        return Path(self.config["run_root"]).joinpath(*names)

    def calibrated(self, backbone: Backbone, splits: Splits, accelerator: Accelerator) -> Experiment:
        """The experiment with its method as training data make it, where it chooses by them; see `adapters.calibrate`.

        The data are the batches that training begins with, in float32. Every process goes by what the first chooses.
        """
        count, size = self.method.calibration_examples, self.trainer.micro_batch_size or self.trainer.batch_size
        if not count:
            return self
        module, train = backbone.module, splits.train
        before, device = next(module.parameters()).device, accelerator.device
        keys = training_keys(len(train), size, range(-(-min(count, len(train)) // size)), self.budget.seed)
        # So that the head to come starts as with any other method, and as in a run that goes on and does without this.
        with torch.random.fork_rng():
            model = self.task.bind(backbone).model.to(device).eval()
            batches = chain.from_iterable(loader(train, keys, self.trainer.workers))
            loss = lambda batch: self.task.loss(model, to_device(batch, device))  # noqa: E731
            method = calibrate(module, self.method, self.patterns, batches, loss)
        module.to(before)
        return replace(self, method=of_the_main_process(accelerator, method))

    def adapt(self, backbone: Backbone) -> Report:
        """Puts the method's updates into the backbone's module, in place; SettingsError for sizes beyond all memory."""
        try:
            return adapt(backbone.module, self.method, self.patterns, self.budget.seed)
        except RuntimeError as error:
            if "overflow" not in str(error):
                raise
            raise SettingsError(f"{self.method}: makes a matrix that torch cannot count; lower its sizes") from error

    def bind(self, backbone: Backbone) -> Bound:
        """The adapted model with the task's head.

        SettingsError where it has none and the settings give one a rate, and where nothing at all is trained.
        """
        bound, rate = self.task.bind(backbone), self.trainer.head_learning_rate
        if bound.head is None and rate is not None:
            raise SettingsError(
                f"trainer.head_learning_rate={rate}: task {self.task.name} on {self.model.name} trains no head; use "
                "null, or trainer.learning_rate for the updates"
            )
        bound.trained()
        return bound


def _part(config: Mapping[str, Any], name: str, base: type) -> Any:
    """The object that the settings `name` describe; SettingsError unless it is a `base`."""
    part = build(config[name])
    if not isinstance(part, base):
        target = config[name].get("_target_") if isinstance(config[name], Mapping) else config[name]
        raise SettingsError(f"{name}: {target!r} is not a {base.__name__}")
    return part
