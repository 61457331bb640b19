"""The stages of a run: load, adapt, train, score, save."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from randlora.adapters import save_adapter
from randlora.adapters.core import require_adaptation
from randlora.adapters.interface import Method, describe, method_from
from randlora.experiment import Experiment
from randlora.integrity import Damaged, read_json, write_json
from randlora.models.base import Backbone
from randlora.peft import export_warning
from randlora.records.kept import kept_adapter
from randlora.records.memory import PeakMemory
from randlora.records.record import Record
from randlora.records.result import Headline
from randlora.signals import STOP
from randlora.tasks.base import Bound, Splits
from randlora.training.cached_features import cache_features
from randlora.training.evaluate import brief, norms, prefixed
from randlora.training.processes import of_the_main_process

if TYPE_CHECKING:
    from accelerate import Accelerator


def finetune(experiment: Experiment, record: Record, accelerator: Accelerator) -> dict[str, Any]:
    """Loads, adapts, trains, scores and saves; returns the fields of the result that come of it."""
    task, trainer, seed = experiment.task, experiment.trainer, experiment.budget.seed
    STOP.check(accelerator)
    remark = task.remark()
    if remark:
        record.say(remark)
    memory = PeakMemory(accelerator.device)
    torch.manual_seed(seed)  # random weights and heads
    began = time.perf_counter()
    backbone = experiment.model.load()
    STOP.check(accelerator)
    splits = task.splits(backbone, experiment.budget)
    STOP.check(accelerator)
    experiment, chosen = calibrated(experiment, backbone, splits, record, accelerator)
    report = experiment.adapt(backbone)
    bound = experiment.bind(backbone)
    head = bound.head_parameters()
    head_size = sum(parameter.numel() for parameter in head.values())
    examples = {name: len(getattr(splits, name)) for name in ("train", "validation", "test")}
    record.say(
        f"{experiment.model.name}: {report.trainable_parameters:,} of {report.total_parameters:,} parameters in "
        f"{len(report.sites)} sites, {head_size:,} in the head; {examples['train']:,} training examples; "
        f"loaded in {time.perf_counter() - began:.1f} s"
    )
    if warning := export_warning(backbone.module):  # now, while the settings can still be changed
        record.say(warning)
    STOP.check(accelerator)
    splits = cache_features(task, bound.model, splits, trainer, record, accelerator)

    def scores(name: str, split: str) -> dict[str, float]:
        return prefixed(name, trainer.evaluate(task, bound.model, getattr(splits, split), record, accelerator))

    def keep(step: int) -> None:
        if accelerator.is_main_process:
            keep_adapter(backbone, bound, kept_adapter(record.folder, step))

    metrics: dict[str, float] = {}
    if task.zero_shot and bound.head is None and trainer.stop_at is None:  # of a paused run no test example is scored
        metrics = scores("zero_shot", "test")
        record.say(f"before training: {brief(metrics)}")
    fit = trainer.fit(
        task, bound, splits, seed=seed, folder=record.checkpoints, observer=record, accelerator=accelerator,
        optimizer=experiment.optimizer, steps=trainer.steps(examples["train"]),
        strict=experiment.config["resume"] == "strict", keep=keep if trainer.keep_adapters else None,
    )  # fmt: skip
    headline, grown = f"test/{task.headline}", fit.trainable_parameters - report.trainable_parameters
    known = {key: value for key, value in vars(fit).items() if key != "paused"} | {
        "calibrated": chosen,
        "head_parameters": head_size,
        "total_parameters": report.total_parameters + grown + head_size,
        "examples": examples,
    }
    if fit.paused is not None:
        where = f"after step {fit.steps} of {trainer.steps(examples['train'])}"
        error = f"{where}; the same command goes on with a later trainer.stop_at, or with none"
        return known | {"status": "paused", "metrics": fit.paused, "peak_memory_bytes": memory.bytes(), "error": error}
    metrics |= scores("validation", "validation")
    columns = trainer.predictions(task, bound.model, splits.test, record, accelerator)
    metrics |= prefixed("test", task.score(columns))
    if experiment.config["predictions"]:
        record.keep_predictions(columns)
    record.log(metrics | norms(bound.model), fit.steps)
    adapter_bytes = None
    if accelerator.is_main_process:
        adapter_bytes = save_adapter(backbone.module, record.folder / "adapter", bound.modules())
    return known | {
        "status": "finished",
        "headline": Headline(headline, metrics[headline]),
        "metrics": metrics,
        "adapter_bytes": adapter_bytes,
        "peak_memory_bytes": memory.bytes(),
    }


def keep_adapter(backbone: Backbone, bound: Bound, folder: Path) -> None:
    """Writes the adapter of a training that goes on, as it would be if it ended here."""
    module = backbone.module
    if type(require_adaptation(module).method).finish is not Method.finish:  # which changes the updates
        module = copy.deepcopy(module)
        adaptation = require_adaptation(module)
        adaptation.method = adaptation.method.finish(adaptation.updates)
    save_adapter(module, folder, bound.modules())


def calibrated(
    experiment: Experiment, backbone: Backbone, splits: Splits, record: Record, accelerator: Accelerator
) -> tuple[Experiment, dict[str, Any] | None]:
    """The experiment with its method as training data make it, and what they chose, if anything.

    A run that goes on takes what it began with, from calibrated.json, unless the file is damaged.
    """
    before, path = experiment.method, record.folder / "calibrated.json"
    if not before.calibration_examples:
        return experiment, None
    kept = None
    try:
        kept = method_from(read_json(path))
    except Damaged as error:
        if path.is_file():
            record.say(f"{error}; it is made again")
    kept = of_the_main_process(accelerator, kept)  # others may not see its files
    experiment = replace(experiment, method=kept) if kept else experiment.calibrated(backbone, splits, accelerator)
    if not kept and accelerator.is_main_process:
        write_json(path, describe(experiment.method))
    old = describe(before)
    chosen = {name: value for name, value in describe(experiment.method).items() if value != old[name]}
    record.say(f"{before.name} chose from training data: {chosen}")
    return experiment, chosen
